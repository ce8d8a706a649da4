"""Floors: the least time that kernels of objkern take on one core, beside that of work that never changes.

A shared machine makes a step slower in a hundred ways and quicker in none, so of many steps the quickest says most
about the code. What is left is the clock, which a yardstick shares that takes turns with the kernel: torch.exp into
memory that exists, or eager torch.

python -m benchmarks.watch 0.5    # seconds for each kernel; prints JSON, in a process of its own
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import objkern

from . import switches
from .compare import YARDSTICK
from .contest import OURS, step
from .pairing import Step
from .workloads import DIVERGENCE, ELEMENTWISE, PLAIN, REGULARIZED


class Watched(NamedTuple):
    """A kernel, by what it is called on."""

    workload: str
    rows: int
    classes: int
    dtype: torch.dtype
    make: Callable[[Tensor, Tensor], tuple[Step, Step]]  # of logits and labels: objkern's step, and its yardstick


def on_logits(loss: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], tuple[Step, Step]]:
    return lambda z, y: (step(loss, (z, y)), exp(z))


def beside_a_reference(z: Tensor, y: Tensor) -> tuple[Step, Step]:
    return step(DIVERGENCE.objective, (z, z.detach().flip(0).contiguous())), exp(z)


def elementwise(z: Tensor, y: Tensor) -> tuple[Step, Step]:
    return step(ELEMENTWISE[1].objective, (z, (z.detach() > 0).to(z.dtype))), exp(z)


def on_weights(z: Tensor, y: Tensor) -> tuple[Step, Step]:
    term = objkern.L2([z])
    return step(lambda _: term(), (z,)), exp(z)


def linear(z: Tensor, y: Tensor) -> tuple[Step, Step]:
    """From 64 features; the yardstick is a step of eager torch, for most of the time is Python's."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(z.shape[0], 64, generator=generator).requires_grad_()
    weight = torch.randn(z.shape[1], 64, generator=generator).mul_(0.4).requires_grad_()

    def eager(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), y)

    inputs = (hidden, weight, y)
    return step(lambda h, w, y: REGULARIZED.objective.linear(h, w, y), inputs), step(eager, inputs)


WATCHED = [  # but for the first they stay within a core's own cache, whose speed depends on nobody else
    Watched("regularized", 256, 32000, torch.float32, on_logits(REGULARIZED.objective)),
    Watched("regularized", 16, 4000, torch.float32, on_logits(REGULARIZED.objective)),
    Watched("regularized", 16, 4000, torch.bfloat16, on_logits(REGULARIZED.objective)),
    Watched("regularized", 64, 1000, torch.float32, on_logits(REGULARIZED.objective)),
    Watched("regularized", 1024, 50, torch.float32, on_logits(REGULARIZED.objective)),
    Watched("plain", 16, 4000, torch.float32, on_logits(PLAIN.objective)),
    Watched("plain", 4096, 9, torch.float32, on_logits(PLAIN.objective)),
    Watched("divergence", 16, 2000, torch.float32, beside_a_reference),
    Watched("binary, penalties", 64, 512, torch.float32, elementwise),
    Watched("L2", 64, 512, torch.float32, on_weights),
    Watched("linear, regularized", 16, 1000, torch.float32, linear),
]


def exp(z: Tensor) -> Step:
    source, result = z.detach().float(), torch.empty_like(z, dtype=torch.float32)

    def run() -> float:
        begin = perf_counter()
        torch.exp(source, out=result)
        return perf_counter() - begin

    return run


def floors(seconds: float) -> Iterator[dict[str, float]]:
    """Of every watched kernel, the quickest step of each of the two, who take turns."""
    for one in WATCHED:
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(one.rows, one.classes, generator=generator).mul_(3).to(one.dtype).requires_grad_()
        ours, yardstick = one.make(z, torch.randint(one.classes, (one.rows,), generator=generator))
        steps = switches.slowed({YARDSTICK: yardstick, OURS: ours})
        quickest = {name: min(run() for _ in range(3)) for name, run in steps.items()}
        end = perf_counter() + seconds
        while perf_counter() < end:
            quickest = {name: min(run(), run(), quickest[name]) for name, run in steps.items()}
        yield quickest


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(list(floors(float(sys.argv[1])))))
