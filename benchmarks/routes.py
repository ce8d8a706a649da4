"""Three ways to bind an op with its derivative to torch, for what they cost before the first logit is read.

    C++ autograd               csrc/autograd.cpp, through torch.ops: what objkern does
    autograd.Function          a Python class over the same ops
    register_autograd          torch.library's registration of Python functions on an op

They run the same kernels, so that the differences are the routes' own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import objkern  # noqa: F401  registers the ops

TERMS, MEAN = [0.0, 0.0, 1.0], 1  # cross-entropy; the mean of the rows
OPS = torch.ops.objkern


class Function(torch.autograd.Function):
    """The route of a Python class."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        loss, _, kept = OPS.objective.default(TERMS, MEAN, logits, target)
        ctx.save_for_backward(logits, target, kept)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        logits, target, kept = ctx.saved_tensors
        return OPS.gradient.default(upstream, kept, False, TERMS, MEAN, logits, target), None


def registered() -> Callable[[Tensor, Tensor], Tensor]:
    """The route of torch.library.register_autograd, on an op of its own."""
    library = torch.library.Library("objkern_routes", "DEF")
    library.define("objective(Tensor logits, Tensor target) -> (Tensor, Tensor, Tensor)")
    library.impl("objective", lambda x, y: OPS.objective.default(TERMS, MEAN, x, y), "CPU")

    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, output[2])

    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        logits, target, kept = ctx.saved_tensors
        return OPS.gradient.default(upstream, kept, False, TERMS, MEAN, logits, target), None

    torch.library.register_autograd("objkern_routes::objective", backward, setup_context=setup_context, lib=library)
    op = torch.ops.objkern_routes.objective.default

    def run(logits: Tensor, target: Tensor) -> Tensor:
        return op(logits, target)[0]

    run.library = library  # lives as long as the route does
    return run


def routes() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return {
        "C++ autograd": lambda x, y: OPS.objective.default(TERMS, MEAN, x, y)[0],
        "autograd.Function": Function.apply,
        "register_autograd": registered(),
    }
