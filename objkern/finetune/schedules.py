"""Coefficients that change from step to step: a KL penalty that warms up, label smoothing that decays.

A coefficient of an objective may be a 0-dim tensor, which is read at every call. A schedule writes its value in place
before a step, so nothing is built or compiled anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..terms import checked_number

__all__ = ["Schedule", "cosine", "linear"]

Shape = Callable[[float], float]  # of the share of the steps that are done, in [0, 1], to the value


def linear(begin: float, end: float, until: float = 1.0) -> Shape:
    """``begin + (end - begin) * min(share / until, 1)``: a line, and `end` from the share `until` of all steps on.

    >>> from objkern.finetune.schedules import linear
    >>> [linear(0.0, 0.1, until=0.5)(share) for share in (0.0, 0.25, 0.5, 1.0)]
    [0.0, 0.05, 0.1, 0.1]
    """
    _check(begin, end, until)
    return lambda share: begin + (end - begin) * min(share / until, 1.0)


def cosine(begin: float, end: float, until: float = 1.0) -> Shape:
    """``end + (begin - end) * (1 + cos(pi * min(share / until, 1))) / 2``: half a cosine, then `end`.

    >>> from objkern.finetune.schedules import cosine
    >>> [round(cosine(0.1, 0.0)(share), 4) for share in (0.0, 0.5, 1.0)]
    [0.1, 0.05, 0.0]
    """
    _check(begin, end, until)
    return lambda share: end + (begin - end) * (1.0 + math.cos(math.pi * min(share / until, 1.0))) / 2.0


def _check(begin: float, end: float, until: float) -> None:
    for name, value in (("begin", begin), ("end", end)):
        checked_number(name, value, -1e300, 1e300)
    if checked_number("until", until, 0.0, 1.0) == 0.0:
        raise ValueError("until: expected a share in (0, 1] but got 0")


@dataclass(frozen=True)
class Schedule:
    """``coefficient.fill_(shape(step / total))`` before step `step` of `total`, counted from 0.

    Args:
        coefficient: 0-dim floating-point tensor, the very one in the objective; it must not require grad.
        shape: of the share of the steps that are done to the value, e.g. `linear(0.0, 0.1, until=0.2)`.

    The first step has the share 0, the last one 1.

    >>> from objkern.finetune.schedules import Schedule, linear
    >>> strength = torch.tensor(0.0)
    >>> objective = CrossEntropy() - strength * Entropy()
    >>> schedule = Schedule(strength, linear(0.0, 0.1))
    >>> schedule.set(step=50, total=101)
    >>> strength
    tensor(0.0500)
    """

    coefficient: Tensor
    shape: Shape

    def __post_init__(self) -> None:
        c = self.coefficient
        if not isinstance(c, Tensor) or c.dim() != 0 or not c.is_floating_point():
            raise ValueError(f"coefficient: expected a 0-dim floating-point tensor but got {c!r}")
        if c.requires_grad:
            raise ValueError("coefficient: one that requires grad is learned, and not scheduled")
        if not callable(self.shape):
            raise TypeError(f"shape: expected a function of the share of the steps but got {self.shape!r}")

    def set(self, step: int, total: int) -> None:
        if type(step) is not int or type(total) is not int or not 0 <= step < total:
            raise ValueError(f"step: expected one of 0 to total − 1 but got {step!r} of {total!r}")
        self.coefficient.fill_(checked_number("shape", self.shape(step / max(1, total - 1))))
