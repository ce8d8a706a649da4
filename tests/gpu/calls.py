"""Calls with every option on, whose numbers live on the device: what graphs capture, and what must not wait."""

from typing import Any

import torch
from torch import Tensor

from objkern import CrossEntropy, Entropy, Objective, ZLoss, custom

from .rows import EVERYTHING, rows_on


class Call:
    """An objective with options that live on the device, where they may change between two runs."""

    def __init__(self, device: torch.device, classes: int, name: str) -> None:
        on_device = lambda value: torch.tensor(value, device=device)  # noqa: E731
        self.numbers: list[Tensor] = []  # change in place
        self.leaves: list[Tensor] = []  # get gradients, beside the logits
        self.objective: Objective = EVERYTHING
        self.options: dict[str, Any] = {}
        self.dense = False
        self.upstream = torch.linspace(-1, 2, 11, device=device)  # for good: a graph reads what it was captured with
        match name:
            case "plain":
                self.objective = CrossEntropy()
            case "every term":
                pass
            case "rows":
                self.options = {"reduction": "none"}
            case "coefficients":
                self.numbers = [on_device(0.1), on_device(-0.3)]
                self.objective = CrossEntropy(0.1 + 0 * torch.rand(classes, device=device))
                self.objective = self.objective + self.numbers[0] * ZLoss() + self.numbers[1] * Entropy()
            case "scale, softcap, normalizer":
                self.numbers = [on_device(1.3), on_device(9.0)]
                self.options = {"logit_scale": self.numbers[0], "softcap": 20.0, "normalizer": self.numbers[1]}
            case "learned scale and coefficient":
                self.leaves = [on_device(1.2).requires_grad_(), on_device(0.2).requires_grad_()]
                self.objective = CrossEntropy() + self.leaves[1] * ZLoss()
                self.options = {"logit_scale": self.leaves[0]}
            case "numbers of the host":
                self.options = {"logit_scale": 1.3, "normalizer": 9.0, "softcap": 20.0, "empty": "zero"}
            case "parts":
                self.options = {"return_parts": True}
            case "probabilities":
                self.objective, self.dense = CrossEntropy(label_smoothing=0.1) - 0.1 * Entropy(), True
            case "custom":
                self.objective = CrossEntropy() + 0.1 * custom(lambda s: s.entropy * s.lse)
            case "an ignore index inside":
                self.options = {"ignore_index": 2}
        self.name = name

    def __call__(self, x: Tensor, y: Tensor, **options: Any) -> list[Tensor]:
        """The loss, its parts, and the gradients to logits and leaves."""
        found = self.objective(x, y, **self.options, **options)
        loss, parts = found if isinstance(found, tuple) else (found, {})
        upstream = torch.full_like(loss, 1.7) if loss.dim() == 0 else self.upstream[: loss.numel()]
        return [loss.detach(), *parts.values(), *torch.autograd.grad(loss, [x, *self.leaves], upstream)]

    def inputs(self, device: torch.device, classes: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
        z, y = rows_on(device, 11, classes, dtype, seed=seed)
        y[4] = self.options.get("ignore_index", -100)
        return z, rows_on(device, 11, classes, torch.float32, seed=seed + 1)[0].softmax(-1) if self.dense else y


CALLS = [
    "plain", "every term", "rows", "coefficients", "scale, softcap, normalizer", "learned scale and coefficient",
    "numbers of the host", "parts", "probabilities", "custom", "an ignore index inside",
]  # fmt: skip
