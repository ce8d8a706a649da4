"""Right before fast: loss and gradients of every contestant against float64, before anyone is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Loss = Callable[..., Tensor]
Errors = dict[str, list[float]]  # by contestant, relative: of the loss, and the largest of the gradients'

CHUNK = 4_000_000  # elements of a row-wise input that are held in float64 at a time; Llama-3's logits would not fit


def errors(
    losses: dict[str, Loss], truth: Loss, inputs: Sequence[Tensor], shared: Sequence[int] = (), fatal: bool = True
) -> tuple[Errors, dict[str, str]]:
    """Of each contestant the relative errors of its loss and of its gradients, in the Euclidean norm; and who failed.

    Args:
        truth: evaluated in float64, a few rows at a time; its value on all rows is the mean of those on parts of them,
            weighted by their number.
        inputs: of every loss. Gradients are those of all that require them.
        shared: places of inputs that have no rows but belong to every part, such as a weight.
        fatal: an error of objkern's is raised, and not one of the results.
    """
    found: dict[str, tuple[float, list[Tensor]]] = {}
    failed: dict[str, str] = {}
    for name, loss in losses.items():
        try:
            found[name] = value_and_gradients(loss, inputs)
        except Exception as error:  # whatever another library raises is an entry of the result; ours is a bug
            if fatal and name.startswith("objkern"):
                raise
            failed[name] = reason(error)
    value, gradients = in_float64(truth, inputs, shared)
    return {
        name: [abs(ours - value) / abs(value), max(distance(a, b) for a, b in zip(theirs, gradients, strict=True))]
        for name, (ours, theirs) in found.items()
    }, failed


def in_float64(truth: Loss, inputs: Sequence[Tensor], shared: Sequence[int]) -> tuple[float, list[Tensor]]:
    by_rows = [k for k in range(len(inputs)) if k not in shared]
    rows = inputs[by_rows[0]].shape[0] if by_rows else 1
    widest = max((inputs[k].numel() // rows for k in by_rows), default=1)
    exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() and k in shared else x
             for k, x in enumerate(inputs)]  # fmt: skip
    value, size = 0.0, max(1, CHUNK // max(1, widest))
    total = [torch.zeros_like(x, dtype=torch.float64) for x in inputs if x.requires_grad]
    for begin in range(0, rows, size):
        some = slice(begin, begin + size)
        part = [x if k in shared else as_float64(x[some]) for k, x in enumerate(exact)]
        share = min(size, rows - begin) / rows
        loss, gradients = value_and_gradients(lambda *x, w=share: truth(*x) * w, part)
        value += loss
        places = [k for k, x in enumerate(inputs) if x.requires_grad]
        for k, sum_, gradient in zip(places, total, gradients, strict=True):
            sum_.add_(gradient) if k in shared else sum_[some].add_(gradient)
    return value, total


def as_float64(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x


def value_and_gradients(loss: Loss, inputs: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    value = loss(*inputs)
    return value.item(), list(torch.autograd.grad(value, [x for x in inputs if x.requires_grad]))


def distance(found: Tensor, truth: Tensor) -> float:
    """‖found − truth‖ / ‖truth‖, in float64 without a float64 copy of all of `found`."""
    squares = sum(
        (a.double() - b).square().sum().item()
        for a, b in zip(found.flatten().split(CHUNK), truth.flatten().split(CHUNK), strict=True)
    )
    return squares**0.5 / truth.norm().item()


def assert_as_accurate(found: Errors, dtype: torch.dtype) -> None:
    """objkern's errors are at most twice eager torch's in the same dtype, plus what rounding the result may cost."""
    rounding = 1e-7 if dtype.itemsize >= 4 else 1e-4
    for name, error in found.items():
        if name.startswith("objkern"):
            for what, ours, eager in zip(("loss", "gradient"), error, found["eager"], strict=True):
                allowed = 2 * eager + rounding
                assert ours <= allowed, f"{name}, {what}: error {ours:.1e} exceeds {allowed:.1e} (eager: {eager:.1e})"


def reason(error: Exception) -> str:
    """Its type and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]
