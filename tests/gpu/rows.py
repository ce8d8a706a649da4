"""Rows on a device, losses with their gradients, and what they are held against."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import objkern
from objkern import CrossEntropy, Entropy, LogitL2, ZLoss

from ..conftest import EVERY_TERM, random_rows

REGULARIZED = CrossEntropy(label_smoothing=0.1) + 1e-4 * ZLoss() - 0.01 * Entropy() + 1e-4 * LogitL2()
EVERYTHING = objkern.parse(EVERY_TERM)
# log(1 − p_y) is −inf where the target is the only class that is left.
BUT_UNLIKELIHOOD = objkern.parse(EVERY_TERM.replace("+ 0.2*Unlikelihood() ", ""))
GRADIENT = ["backward", "forward"]

# Around every size of warp, tile and 16-byte word, a prime, and one row per cluster of several blocks.
RAGGED = [2, 3, 9, 17, 31, 33, 129, 1000, 1003, 4099, 8191, 20011]
# LLaMA-2, GPT-2, Llama-3, Qwen-2, Gemma.
VOCABULARIES = [32000, 50257, 128256, 151936, 256000]


def rows_on(
    device: torch.device, rows: int, classes: int, dtype: torch.dtype, scale: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits and labels, the same on every device."""
    z, y = random_rows(rows, classes, dtype, scale, seed)
    return z.to(device), y.to(device)


def upstream_of(loss: Tensor) -> Tensor:
    """Never 1 alone: a shortcut for 1 must not hide a missing factor (PITFALLS 4), nor rows that share one (3)."""
    if loss.dim() == 0:
        return torch.full_like(loss, 1.7)
    return torch.linspace(-1.0, 2.0, loss.numel(), dtype=loss.dtype, device=loss.device).view_as(loss)


def value_and_gradient(
    run: Callable[..., Tensor], z: Tensor, *arguments: Any, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Of a leaf of the same memory and strides as z."""
    x = z.detach().requires_grad_()
    loss = run(x, *arguments, **options)
    (gradient,) = torch.autograd.grad(loss, x, upstream_of(loss) if upstream is None else upstream.to(loss.dtype))
    return loss.detach(), gradient


def assert_like_reference(
    run: Callable[..., Tensor], z: Tensor, *arguments: Any, backend: str, what: str = "", **options: Any
) -> tuple[Tensor, Tensor]:
    """Loss and gradient are the reference's in float64, but for rounding."""
    ours = value_and_gradient(run, z, *arguments, backend=backend, **options)
    truth = value_and_gradient(run, z.double(), *arguments, backend="reference", **options)
    assert_rounded(ours[0], truth[0], f"{what} loss")
    assert_rounded(ours[1], truth[1], f"{what} gradient")
    return ours


def assert_rounded(ours: Tensor, truth: Tensor, what: str = "") -> None:
    """Within a few roundings of float32 (float64), and of the dtype itself, norm-wise and in the worst place.

    What the kernels owe torch's own formulas is asked in test_precision.py, and is less.
    """
    ulps = 1 if ours.dtype.itemsize == 2 else 16
    eps = ulps * torch.finfo(ours.dtype).eps
    error, truth = ours.detach().double() - truth.detach().double(), truth.detach().double()
    assert torch.isfinite(error).all(), f"{what}: not finite"
    for measure in (lambda x: x.square().mean().sqrt().item(), lambda x: x.abs().max().item()):
        assert measure(error) <= eps * measure(truth), f"{what}: error {measure(error):.3e} of {measure(truth):.3e}"


def require_memory(device: torch.device, count: float) -> None:
    """Skip where a test's tensors would not fit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        if free < 1.1 * count:
            pytest.skip(f"needs {count / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} are free")
