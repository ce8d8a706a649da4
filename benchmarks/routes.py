"""What a loss costs before its first logit is read: three ways to bind an op with its derivative to torch.

    python -m benchmarks.routes [rows classes dtype]

Forward and backward of cross-entropy on 32 x 9 float32 logits, where the arithmetic takes about a microsecond, or on
others. The routes run the same kernels and take turns, so that the differences are the routes' own:

    C++ autograd               csrc/autograd.cpp, through torch.ops: what objkern does
    autograd.Function          a Python class over the same ops
    register_autograd          torch.library's registration of Python functions on an op
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import objkern

TERMS, MEAN = [0.0, 0.0, 1.0], 1  # cross-entropy; the mean of the rows
OPS = torch.ops.objkern
CALLS, ROUNDS = 1000, 31


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
    objective = objkern.CrossEntropy()
    return {
        "F.cross_entropy": F.cross_entropy,
        "C++ autograd": lambda x, y: OPS.objective.default(TERMS, MEAN, x, y)[0],
        "autograd.Function": Function.apply,
        "register_autograd": registered(),
        "objkern.CrossEntropy()": objective,
        "objkern.cross_entropy": objkern.cross_entropy,
    }


def microseconds(
    rows: int, classes: int, dtype: torch.dtype, calls: int = CALLS, rounds: int = ROUNDS
) -> dict[str, dict[str, float]]:
    """Median over the rounds of a forward pass, and of a forward and a backward pass, of each route."""
    x, y = torch.randn(rows, classes, dtype=dtype, requires_grad=True), torch.randint(0, classes, (rows,))
    losses = routes()

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        x.grad = None
        loss(x, y).backward()

    (expected,) = torch.autograd.grad(F.cross_entropy(x, y), x)
    for loss in losses.values():  # right before fast
        step(loss)
        torch.testing.assert_close(x.grad, expected)
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "forward + backward": []} for name in losses}
    for _ in range(rounds):
        for name, loss in losses.items():
            for what, run in (("forward", loss), ("forward + backward", None)):
                start = perf_counter()
                for _ in range(calls):
                    step(loss) if run is None else run(x, y)
                times[name][what].append((perf_counter() - start) / calls * 1e6)
    return {name: {what: statistics.median(found) for what, found in both.items()} for name, both in times.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="?", default=32)
    parser.add_argument("classes", type=int, nargs="?", default=9)
    parser.add_argument("dtype", choices=("float32", "bfloat16"), nargs="?", default="float32")
    options = parser.parse_args()
    measured = microseconds(options.rows, options.classes, getattr(torch, options.dtype))
    native = measured["F.cross_entropy"]["forward + backward"]
    print("| route | forward | forward + backward | of F.cross_entropy |\n| --- | --- | --- | --- |")
    for name, found in measured.items():
        both = found["forward + backward"]
        print(f"| {name} | {found['forward']:.1f} µs | {both:.1f} µs | {both / native:.2f} |")
