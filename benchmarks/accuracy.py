"""Right before fast: loss and gradient of every contestant against float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .workloads import Loss

CHUNK = 4_000_000  # elements that are held in float64 at a time; Llama-3's logits would not fit whole

Errors = dict[str, float]


def errors(contestants: dict[str, Loss], truth: Loss, logits: Tensor, target: Tensor) -> dict[str, Errors]:
    """For each contestant the relative error of its loss, and of its gradient in the Euclidean norm.

    Args:
        truth: evaluated in float64, a few rows at a time.
        logits: (N, V), requires grad.
        target: (N)
    """
    results = {name: value_and_gradient(loss, logits, target) for name, loss in contestants.items()}
    value, squares, difference = 0.0, 0.0, dict.fromkeys(results, 0.0)
    rows, classes = logits.shape
    size = max(1, CHUNK // classes)
    for begin in range(0, rows, size):
        part = logits[begin : begin + size].detach().double().requires_grad_()
        share = part.shape[0] / rows  # of the mean over all rows
        loss, gradient = value_and_gradient(lambda x, y, w=share: truth(x, y) * w, part, target[begin : begin + size])
        value += loss
        squares += gradient.square().sum().item()
        for name, (_, found) in results.items():
            difference[name] += (found[begin : begin + size].double() - gradient).square().sum().item()
    return {
        name: {"loss": abs(found - value) / abs(value), "gradient": (difference[name] / squares) ** 0.5}
        for name, (found, _) in results.items()
    }


def value_and_gradient(loss: Loss, logits: Tensor, target: Tensor) -> tuple[float, Tensor]:
    value = loss(logits, target)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.item(), gradient


def assert_as_accurate(ours: Errors, eager: Errors, dtype: torch.dtype) -> None:
    """At most twice eager torch's error in the same dtype, plus what rounding the result may cost."""
    rounding = 1e-7 if dtype.itemsize >= 4 else 1e-4
    for what, error in ours.items():
        allowed = 2 * eager[what] + rounding
        assert error <= allowed, f"{what}: error {error:.1e} exceeds {allowed:.1e} (eager torch: {eager[what]:.1e})"
