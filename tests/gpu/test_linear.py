"""The fused linear path on a device: the kernels see chunks of float32 logits, the GEMMs half-precision inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import objkern

from ..conftest import assert_within_budget
from .rows import REGULARIZED
from .test_streams import capture, no_waiting

ROWS, FEATURES, CLASSES = 300, 64, 1003
MODES = ["forward", "recompute"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def inputs(device: torch.device, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, labels."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, FEATURES, generator=generator)
    weight = 3 * torch.randn(CLASSES, FEATURES, generator=generator) / FEATURES**0.5
    bias = torch.randn(CLASSES, generator=generator)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    labels[::7] = -100
    return *(x.to(device, dtype) for x in (hidden, weight, bias)), labels.to(device)


def results(loss: object, *tensors: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, torch.full_like(value, 0.7))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_rows", [64, 1000])
def test_as_the_logits_path(chunk_rows: int, mode: str, dtype: torch.dtype, device: torch.device, backend: str) -> None:
    hidden, weight, bias, labels = inputs(device, dtype)
    options = {"mode": mode, "chunk_rows": chunk_rows, "backend": backend}
    ours = results(lambda h, w, b: REGULARIZED.linear(h, w, labels, b, **options), hidden, weight, bias)
    eager = results(lambda h, w, b: REGULARIZED(F.linear(h, w, b), labels, backend="reference"), hidden, weight, bias)
    doubles = [x.cpu().double() for x in (hidden, weight, bias)]
    exact = results(lambda h, w, b: REGULARIZED(F.linear(h, w, b), labels.cpu(), backend="reference"), *doubles)
    for one, other, truth in zip(ours, eager, exact, strict=True):
        assert_within_budget(one.cpu(), other.cpu(), truth, dtype)


@pytest.mark.parametrize("path", ["logits", *MODES])
def test_coefficients_on_the_host(path: str, device: torch.device, backend: str) -> None:
    """Each is that of its own term, and has its gradient where it lies."""
    hidden, weight, bias, labels = inputs(device, torch.float32)
    numbers = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.5, 0.25, -0.125)]
    terms = (objkern.CrossEntropy(), objkern.ZLoss(), objkern.Entropy())

    def loss(numbers: list[Tensor]) -> Tensor:
        objective = numbers[0] * terms[0] + numbers[1] * terms[1] + numbers[2] * terms[2]
        if path == "logits":
            return objective(F.linear(hidden, weight, bias), labels, backend=backend)
        return objective.linear(hidden, weight, labels, bias, mode=path, backend=backend)

    found, alone = loss(numbers), [loss([torch.tensor(float(k == j)) for j in range(3)]) for k in range(3)]
    gradients = torch.autograd.grad(found, numbers)
    torch.testing.assert_close(found, sum(n.item() * a for n, a in zip(numbers, alone, strict=True)).detach())
    for gradient, own in zip(gradients, alone, strict=True):
        assert gradient.device == torch.device("cpu")
        torch.testing.assert_close(gradient.float(), own.cpu().detach())


@pytest.mark.real_device
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("classes", [9, 1000, 1003, 50257, 128256])
def test_half_precision_gradients_of_float32_logits(
    classes: int, dtype: torch.dtype, device: torch.device, backend: str
) -> None:
    """Each is the float32 gradient, rounded once: in the forward pass and from what it kept, wherever rows begin."""
    ops = torch.ops.objkern if backend == "cuda" else torch.ops.objkern_triton
    labels = torch.randint(classes, (5,), device=device)
    terms = [x for c, t in REGULARIZED.weighted_terms for x in (t.kind, t.parameter, c)]
    for offset in (0, 1, 3):
        z = torch.randn(5, classes + offset, device=device)[:, offset:]
        _, _, kept, wide = ops.fused(terms, 2, z, labels)
        slack = wide.abs() * 2.0**-21
        low, high = (wide - slack).to(dtype), (wide + slack).to(dtype)
        out = torch.full(z.shape, torch.nan, dtype=dtype, device=device)
        ops.fused.into(terms, 2, z, labels, gradient=out)
        assert ((out >= low) & (out <= high) | (out <= low) & (out >= high)).all()
        ops.gradient.into(
            torch.ones((), device=device), kept, False, terms, 2, z, labels, gradient=out.fill_(torch.nan)
        )
        assert ((out >= low) & (out <= high) | (out <= low) & (out >= high)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_statistics_and_custom_terms(dtype: torch.dtype, device: torch.device, backend: str) -> None:
    hidden, weight, bias, labels = inputs(device, dtype)

    def loss(h: Tensor, w: Tensor, b: Tensor, backend: str) -> Tensor:
        s = objkern.linear_row_statistics(h, w, labels.to(h.device), bias=b, backend=backend)
        return (s.logprob * s.entropy + 0.1 * s.max_logit).sum()

    ours = results(lambda h, w, b: loss(h, w, b, backend), hidden, weight, bias)
    exact = results(lambda h, w, b: loss(h, w, b, "reference"), *(x.cpu().double() for x in (hidden, weight, bias)))
    for one, truth in zip(ours, exact, strict=True):
        # The gradient of a chunk's logits is rounded once to half precision, and so is the result.
        far = (one.cpu().double() - truth).norm() / truth.norm()
        assert far <= (TOLERANCE[dtype] if one.dim() else 1e-5)


@pytest.mark.real_device
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalizer", [None, 17.0])
def test_nothing_waits_for_the_device(normalizer: float | None, mode: str, device: torch.device, backend: str) -> None:
    hidden, weight, bias, labels = inputs(device, torch.bfloat16)
    objective = torch.tensor(0.3) * REGULARIZED
    options = {"mode": mode, "chunk_rows": 64, "backend": backend, "normalizer": normalizer}
    run = lambda: results(lambda h, w, b: objective.linear(h, w, labels, b, **options), hidden, weight, bias)  # noqa: E731
    run()
    with no_waiting():
        run()


@pytest.mark.real_device
@pytest.mark.parametrize("mode", MODES)
def test_a_graph_captures_and_replays(mode: str, device: torch.device, backend: str) -> None:
    hidden, weight, _, labels = inputs(device, torch.bfloat16)
    h, w = hidden.requires_grad_(), weight.requires_grad_()

    def run() -> list[Tensor]:
        loss = REGULARIZED.linear(h, w, labels, mode=mode, chunk_rows=64, backend=backend)
        return [loss.detach(), *torch.autograd.grad(loss, (h, w), torch.full_like(loss, 0.7))]

    graph, captured = capture(run)
    for seed in (0, 5):
        for old, new in zip((h.data, w.data, labels), (*inputs(device, torch.bfloat16, seed)[:2], labels.roll(seed)),
                            strict=True):  # fmt: skip
            old.copy_(new)
        graph.replay()
        for a, b in zip(captured, run(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.real_device
@pytest.mark.parametrize("mode", MODES)
def test_memory_is_a_chunk_and_the_gradients(mode: str, device: torch.device, backend: str) -> None:
    """Flat in the number of rows, but for the gradient of the hidden states; a frozen weight has none (23)."""
    classes, chunk = 50257, 256
    weight = torch.randn(classes, FEATURES, device=device, dtype=torch.bfloat16)
    found = {}
    once = torch.randn(64, FEATURES, device=device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(64, dtype=torch.long, device=device)
    REGULARIZED.linear(once, weight, labels, mode=mode, backend=backend).backward()  # the GEMMs take their workspace
    for rows in (1024, 8192):
        for trains in (False, True):
            h = torch.randn(rows, FEATURES, device=device, dtype=torch.bfloat16, requires_grad=True)
            w = weight.clone().requires_grad_(trains)
            labels = torch.randint(classes, (rows,), device=device)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            REGULARIZED.linear(h, w, labels, mode=mode, chunk_rows=chunk, backend=backend).backward()
            found[rows, trains] = torch.cuda.max_memory_allocated() - before
    of_chunk = chunk * classes * (4 + 2)  # logits and their gradient
    for (rows, trains), count in found.items():
        gradients = 6 * FEATURES * (rows + (classes if trains else 0))
        assert count <= of_chunk + gradients + 200 * rows + (8 << 20), (rows, trains, count)
