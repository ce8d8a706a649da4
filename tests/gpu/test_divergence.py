"""Divergence from a reference: digits, gradients, every plan of the kernels, the linear path, graphs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import objkern
from objkern import CrossEntropy, Entropy, KLDivergence, custom

from ..conftest import (
    DTYPES,
    assert_masks_are_no_part_of_a_gradient,
    assert_rounded,
    assert_within_budget,
    masked_sides,
)
from ..test_divergence import DIRECTIONS, eager
from .rows import GRADIENT, assert_like_reference, rows_on, value_and_gradient
from .test_streams import capture, no_waiting

BOTH = CrossEntropy(label_smoothing=0.1) + 0.3 * KLDivergence("forward", 2.0) + 0.2 * KLDivergence("reverse", 2.0)


def beside(z: Tensor, apart: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return (z.double() + apart * noise.to(z.device)).to(dtype or z.dtype)


@pytest.mark.parametrize("classes", [1, 9, 130, 1003, 20011, 128256])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(
    dtype: torch.dtype, direction: str, classes: int, device: torch.device, backend: str
) -> None:
    z, _ = rows_on(device, 7, classes, dtype)
    r = beside(z)
    term = KLDivergence(direction, 1.5)
    ours = value_and_gradient(term, z, None, reference=r, reduction="none", backend=backend)
    if dtype == torch.float64:
        truth = value_and_gradient(term, z, None, reference=r, reduction="none", backend="reference")
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        return
    native = value_and_gradient(lambda x: eager(x, r, direction, 1.5), z)
    truth = value_and_gradient(lambda x: eager(x, r.double(), direction, 1.5), z.double())
    for a, b, c, what in zip(ours, native, truth, ("value", "gradient"), strict=True):
        assert_within_budget(a, b, c, dtype, what)


@pytest.mark.parametrize("gradient", GRADIENT)
@pytest.mark.parametrize("classes", [9, 130, 700])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_alone(direction: str, classes: int, gradient: str, device: torch.device, backend: str) -> None:
    """Beside it nothing is collected of the logits, and the gradient is written all the same."""
    z, _ = rows_on(device, 33, classes, torch.float32)
    assert_like_reference(KLDivergence(direction), z, None, reference=beside(z), gradient=gradient, backend=backend)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("classes", [16, 1031, 20011])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_masks_of_the_least_number(
    dtype: torch.dtype, classes: int, temperature: float, device: torch.device, backend: str
) -> None:
    """Over T < 1 they are −∞ after all, and differences times an upstream gradient of 65536 are: 0·∞ is 0 here."""
    up = torch.full((3,), 65536.0, device=device)
    for direction, z, r in masked_sides(3, classes, dtype):
        term, found = KLDivergence(direction, temperature), []
        for x, beside, backend_ in ((z, r, backend), (*(s.double().clamp(min=-1e30) for s in (z, r)), "reference")):
            x = x.to(device).requires_grad_()
            loss = term(x, reference=beside.to(device), reduction="none", backend=backend_)
            found.append((loss.detach(), *torch.autograd.grad(loss, x, up.to(loss))))
        for ours, truth in zip(*found, strict=True):
            assert_rounded(ours, truth, 1e-12 if dtype == torch.float64 else 4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("classes", [9, 1031, 20011])
def test_statistics_beside_masks_of_the_least_number(
    classes: int, dtype: torch.dtype, device: torch.device, backend: str
) -> None:
    assert_masks_are_no_part_of_a_gradient(backend, classes, dtype, device)


def test_a_reference_that_excludes_thousands_of_classes(device: torch.device, backend: str) -> None:
    """In a row, while the maximum of the logits rises."""
    z, _ = rows_on(device, 3, 20011, torch.float32)
    z[:, :9000] += torch.linspace(0, 9, 9000, device=device)
    r = beside(z)
    r[:, :9000] = float("-inf")
    assert_like_reference(KLDivergence("forward"), z, None, reference=r, backend=backend)


@pytest.mark.parametrize("classes", [130, 32000])
def test_a_small_divergence_keeps_its_digits(classes: int, device: torch.device, backend: str) -> None:
    z, _ = rows_on(device, 16, classes, torch.float32)
    r = beside(z, 1e-3)
    for direction in DIRECTIONS:
        exact = eager(z.double(), r.double(), direction)
        assert (exact < 2e-6).all()
        found = KLDivergence(direction)(z, reference=r, reduction="none", backend=backend)
        torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("gradient", GRADIENT)
@pytest.mark.parametrize("classes", [9, 1003, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_other_terms(
    dtype: torch.dtype, classes: int, gradient: str, device: torch.device, backend: str
) -> None:
    z, y = rows_on(device, 33, classes, dtype)
    y[4] = -100
    for r in (beside(z), beside(z, dtype=torch.float32), F.pad(beside(z), (1, 2))[:, 1 : classes + 1]):
        assert_like_reference(
            BOTH - 0.1 * Entropy(), z, y, reference=r, softcap=30.0, logit_scale=0.8, gradient=gradient, backend=backend
        )


@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_the_linear_path(mode: str, device: torch.device, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (70, 32), (1003, 32), (70, 16), (1003, 16)
    h, w, h2, w2 = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    y = torch.arange(70, device=device)
    found = []
    for run in (
        lambda a, b: BOTH.linear(a, b, y, reference=(h2, w2), mode=mode, chunk_rows=32, backend=backend),
        lambda a, b: BOTH(F.linear(a, b), y, reference=F.linear(h2, w2).double(), backend="reference"),
    ):
        a, b = (x.to(torch.float64 if found else torch.float32, copy=True).requires_grad_() for x in (h, w))
        loss = run(a, b)
        found.append((loss.detach(), *torch.autograd.grad(loss, (a, b))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_statistics(device: torch.device, backend: str) -> None:
    z, y = rows_on(device, 11, 1003, torch.float32)
    objective = CrossEntropy() + custom(lambda s: s.forward_kl * s.lse + s.reverse_kl)
    assert_like_reference(objective, z, y, reference=beside(z), backend=backend)
    s = objkern.row_statistics(z, y, reference=beside(z), temperature=2.0, backend=backend)
    torch.testing.assert_close(s.forward_kl, eager(z, beside(z), "forward", 2.0) / 4, rtol=1e-4, atol=1e-5)


@pytest.mark.real_device
@pytest.mark.parametrize("gradient", GRADIENT)
def test_graphs_and_waiting(gradient: str, device: torch.device, backend: str) -> None:
    z, y = rows_on(device, 64, 1003, torch.bfloat16)
    r = beside(z)

    def run() -> list[Tensor]:
        return list(value_and_gradient(BOTH, z, y, reference=r, gradient=gradient, backend=backend))

    expected = run()
    with no_waiting():
        run()
    graph, captured = capture(run)
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)
