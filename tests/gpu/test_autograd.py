"""Backward passes, one or several; second derivatives; torch.func; what memory a pass takes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import objkern
from objkern import CrossEntropy, ZLoss, custom

from .rows import EVERYTHING, GRADIENT, REGULARIZED, require_memory, rows_on, value_and_gradient

CUSTOM = CrossEntropy() + 0.1 * custom(lambda s: s.entropy * s.lse, name="product")


@pytest.mark.parametrize("gradient", GRADIENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [9, 1003, 50257])
@pytest.mark.parametrize("upstreams", [(1.0, 1.0, -0.5), (3.0, 1.0, 0.25), (1e-3, 7.0, 1.0)])
def test_several_backward_passes(
    upstreams: tuple[float, ...], classes: int, dtype: torch.dtype, gradient: str, device: torch.device, backend: str
) -> None:
    """2: the saved gradient was scaled in place, so the second backward pass of a retained graph was wrong."""
    z, y = rows_on(device, 5, classes, dtype)
    x = z.clone().requires_grad_()
    loss = REGULARIZED(x, y, gradient=gradient, backend=backend)
    eps = torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 16)
    _, one = value_and_gradient(
        REGULARIZED, z.double(), y, backend="reference", upstream=torch.tensor(1.0, device=device)
    )
    found = []
    for u in upstreams:
        found.append(torch.autograd.grad(loss, x, torch.tensor(u, device=device), retain_graph=True)[0])
        torch.testing.assert_close(found[-1].double(), u * one, rtol=eps, atol=eps * abs(u) * one.abs().max().item())
        found[0].zero_()  # what one backward pass returned belongs to its caller


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [9, 1003, 50257])
def test_an_upstream_gradient_of_one_leaves_the_gradient_of_the_forward_pass(
    classes: int, dtype: torch.dtype, device: torch.device, backend: str
) -> None:
    """The op's own gradient, bit for bit; under any other upstream gradient that of gradient="backward"."""
    family = torch.ops.objkern_triton if backend == "triton" else torch.ops.objkern
    z, y = rows_on(device, 33, classes, dtype)
    terms = [n for c, t in REGULARIZED.weighted_terms for n in (t.kind, t.parameter, c)]
    *_, finished = family.fused(terms, 1, z, y)
    for upstream in (1.0, 1.7, -1.0, 0.0):
        options = {"backend": backend, "upstream": torch.tensor(upstream, device=device)}
        _, found = value_and_gradient(REGULARIZED, z, y, gradient="forward", **options)
        if upstream == 1.0:
            assert torch.equal(found, finished)
        _, expected = value_and_gradient(REGULARIZED, z, y, gradient="backward", **options)
        eps = torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 8)
        torch.testing.assert_close(found, expected, rtol=eps, atol=eps * finished.abs().max().item() * 1e-3)


def test_loss_scaling(device: torch.device, backend: str) -> None:
    """float16 under a gradient scaler: the factor is applied before the result is rounded to half precision."""
    z, y = rows_on(device, 64, 1003, torch.float16)
    upstream = torch.tensor(2.0**12, device=device)
    _, truth = value_and_gradient(CrossEntropy(), z.double(), y, backend="reference", upstream=upstream)
    for gradient in GRADIENT:
        _, found = value_and_gradient(CrossEntropy(), z, y, backend=backend, gradient=gradient, upstream=upstream)
        torch.testing.assert_close(found.double(), truth, rtol=2**-10, atol=2**-24)


# ---- second derivatives and torch.func ------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives(reduction: str, device: torch.device, any_backend: str) -> None:
    x, y = rows_on(device, 4, 6, torch.float64)
    y[2] = -100
    scale = torch.tensor(1.3, dtype=torch.float64, device=device, requires_grad=True)
    options = {"reduction": reduction, "backend": any_backend}
    run = lambda x, s: EVERYTHING(x, y, logit_scale=s, softcap=7.0, **options)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), scale))
    assert torch.autograd.gradgradcheck(run, (x, scale))


@pytest.mark.parametrize("objective", [REGULARIZED, CUSTOM], ids=["terms", "custom"])
def test_func_grad_and_vmap(objective: objkern.Objective, device: torch.device, any_backend: str) -> None:
    if any_backend == "reference" and device.type == "cpu":
        pytest.skip("on the CPU the reference looks at every label, which vmap does not allow")
    run = lambda z, t: 1.7 * objective(z, t, backend=any_backend)  # noqa: E731
    z, y = rows_on(device, 15, 77, torch.float32)
    z, y = z.view(3, 5, 77), y.view(3, 5)
    y[0, 1] = -100
    per_sample = torch.vmap(torch.func.grad(run))(z, y)
    for found, a, b in zip(per_sample, z, y, strict=True):
        leaf = a.clone().requires_grad_()
        torch.testing.assert_close(found, *torch.autograd.grad(run(leaf, b), leaf))
    torch.testing.assert_close(torch.vmap(run)(z, y), torch.stack([run(a, b) for a, b in zip(z, y, strict=True)]))


def test_func_jacrev_twice(device: torch.device, any_backend: str) -> None:
    z, y = rows_on(device, 5, 7, torch.float64)
    twice = torch.func.jacrev(torch.func.jacrev(lambda x: REGULARIZED(x, y, backend=any_backend)))(z)
    hessian = torch.autograd.functional.hessian(lambda x: REGULARIZED(x, y, backend="reference"), z)
    torch.testing.assert_close(twice, hessian)


# ---- the same again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", GRADIENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "classes"), [(4096, 9), (67, 1003), (2048, 32000), (257, 128256)])
def test_bitwise_the_same_in_every_run(
    rows: int, classes: int, dtype: torch.dtype, gradient: str, device: torch.device, backend: str
) -> None:
    """30: autotuning, or sums in the order in which blocks happen to finish."""
    rows = rows if device.type == "cuda" else min(rows, 67)
    z, y = rows_on(device, rows, classes, dtype)
    first = value_and_gradient(EVERYTHING, z, y, gradient=gradient, backend=backend)
    for repetition in range(5):
        if device.type == "cuda" and repetition == 2:
            torch.cuda.empty_cache()  # other addresses
            held = torch.empty(12345, device=device)
        again = value_and_gradient(EVERYTHING, z.clone(), y, gradient=gradient, backend=backend)
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b), repetition
    if device.type == "cuda":
        del held


@pytest.mark.parametrize("gradient", GRADIENT)
def test_bitwise_the_same_in_every_process(gradient: str, device: torch.device, backend: str) -> None:
    """30: through the shipped selection of launch parameters, from a cold start."""
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "import hashlib, torch; from tests.gpu.rows import EVERYTHING, rows_on, value_and_gradient;"
        f"z, y = rows_on(torch.device('{device}'), 67, 50257, torch.bfloat16);"
        f"loss, found = value_and_gradient(EVERYTHING, z, y, gradient='{gradient}', backend='{backend}');"
        "print(loss.item(), hashlib.sha256(found.cpu().view(torch.int16).numpy().tobytes()).hexdigest())"
    )
    results = set()
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        results.add(done.stdout)
    assert len(results) == 1


# ---- memory ---------------------------------------------------------------------------------------------------------


def growth(device: torch.device, run: Callable[[], Any]) -> tuple[Any, int]:
    """What a call returns, and by how many bytes it raised the peak."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    found = run()
    torch.cuda.synchronize(device)
    return found, torch.cuda.max_memory_allocated(device) - before


@pytest.mark.real_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [32000, 50257, 128256])
@pytest.mark.parametrize("upstream", [1.0, 1.7])
def test_memory_of_a_pass(
    upstream: float, classes: int, dtype: torch.dtype, device: torch.device, backend: str
) -> None:
    """The forward pass takes no (N, V) tensor and the backward pass exactly one; or the forward pass that one."""
    rows = 1024
    size = rows * classes * dtype.itemsize
    require_memory(device, 4 * size)
    x = torch.randn(rows, classes, device=device, dtype=dtype).requires_grad_()
    y = torch.randint(0, classes, (rows,), device=device)
    u = torch.tensor(upstream, device=device)
    slack = 1 << 21  # numbers per row, and blocks of 2 MiB
    for gradient, forward_pass, both in (("backward", 0, size), ("forward", size, size)):
        value_and_gradient(EVERYTHING, x, y, gradient=gradient, backend=backend)  # loads what there is to load
        loss, after_forward = growth(device, lambda g=gradient: EVERYTHING(x, y, gradient=g, backend=backend))
        assert after_forward <= forward_pass + slack, gradient
        found, in_backward = growth(device, lambda value=loss: torch.autograd.grad(value, x, u))
        assert in_backward <= both - forward_pass + slack, gradient
        assert found[0].numel() == x.numel()
        del found, loss


@pytest.mark.real_device
def test_memory_of_strided_logits(device: torch.device, backend: str) -> None:
    """Rows that are far apart are read where they are; no copy is made."""
    wide = torch.randn(1024, 40000, device=device, dtype=torch.bfloat16)
    x = wide[:, 100:32100].detach().requires_grad_()
    y = torch.randint(0, 32000, (1024,), device=device)
    value_and_gradient(CrossEntropy() + 0.1 * ZLoss(), x, y, backend=backend)
    loss, after_forward = growth(device, lambda: REGULARIZED(x, y, backend=backend))
    assert after_forward <= 1 << 21
    del loss


def test_saved_tensor_hooks_and_checkpointing(device: torch.device, backend: str) -> None:
    z, y = rows_on(device, 5, 1003, torch.float32)
    x = z.clone().requires_grad_()
    run = lambda x: REGULARIZED(x, y, backend=backend)  # noqa: E731
    again = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    (found,) = torch.autograd.grad(again * 1.7, x)
    (expected,) = torch.autograd.grad(run(x) * 1.7, x)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
