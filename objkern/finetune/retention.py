"""What keeps a model what it was while it learns something else.

l2sp:0.01    c · ½Σ(θ − θ₀)²: weights stay near where they began
ewc:0.1      c · ½ΣF(θ − θ₀)²: those that the examples need, by the diagonal F of their Fisher information, stay nearer
kl:0.5       c · KL(q ‖ p): answers stay near those of the starting model, a frozen copy beside the one that trains
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from objkern import Objective

    from .tasks import Example, Task

__all__ = ["apply", "fisher", "parse"]

NAMES = ("l2sp", "ewc", "kl")


def parse(spec: str) -> tuple[str, float]:
    """A name and its coefficient: ``"l2sp:0.01"`` → ``("l2sp", 0.01)``.

    >>> from objkern.finetune import retention
    >>> retention.parse("l2sp:0.01")
    ('l2sp', 0.01)
    """
    name, _, number = spec.partition(":")
    try:
        coefficient = float(number)
    except ValueError:
        coefficient = math.nan
    if name not in NAMES or not 0.0 < coefficient < math.inf:
        raise ValueError(f"retain: expected l2sp:C, ewc:C or kl:C with a positive number C but got {spec!r}")
    return name, coefficient


def apply(
    spec: str, objective: Objective, model: nn.Module, task: Task, examples: Sequence[Example], batch_size: int = 1
) -> tuple[Objective, nn.Module | None]:
    """The objective with what `spec` adds to it, and the reference that `train` is to be given with it, if any.

    On the starting weights, before `train`, and with the strategy applied: terms on parameters are about those that
    train now. A run that is resumed makes it anew from the same weights. An objective that is attached to a language
    model is taken off, because it is another one from here on.

    Args:
        examples: for ewc, of what is to be kept. Each costs a forward and a backward pass.
        batch_size: for ewc, how many of them are in memory at a time.

    Raises:
        ValueError: what `parse` says; ewc without examples; kl beside an objective that compares element by element,
            which has no distribution over classes.
    """
    import objkern
    from objkern.transformers import detach

    name, coefficient = parse(spec)
    if task.linear_head:
        detach(model)
    if name == "l2sp":
        return objective + coefficient * objkern.L2SP(model), None
    if name == "ewc":
        return objective + coefficient * objkern.EWC(model, fisher(model, task, examples, batch_size)), None
    if objective._elementwise:
        raise ValueError(f"retain: expected an objective of classes beside kl but got {objective!r}")
    return objective + coefficient * objkern.KLDivergence(), copy.deepcopy(model).eval().requires_grad_(False)


def fisher(model: nn.Module, task: Task, examples: Sequence[Example], batch_size: int = 1) -> dict[str, Tensor]:
    """`objkern.diagonal_fisher` of the task's own loss, that of an example being its negative log-likelihood."""
    import objkern
    from objkern.transformers import detach

    plain = objkern.parse(task.formula())
    device = next(model.parameters()).device

    def log_likelihood(model: nn.Module, some: Sequence[Example]) -> Tensor:
        return torch.stack([-task.loss(model, task.collate([example]).to(device), plain, 1)[0] for example in some])

    training = model.training
    model.eval()
    try:
        batches = (examples[first : first + batch_size] for first in range(0, len(examples), batch_size))
        return objkern.diagonal_fisher(model, batches, log_likelihood)
    finally:
        model.train(training)
        if task.linear_head:
            detach(model)
