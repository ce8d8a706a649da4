"""Who takes part on logits: eager torch, the same formula compiled, other libraries, objkern and its variants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

import objkern
from objkern import _C

from . import peers
from .accuracy import Loss
from .contest import OURS, compiled, step
from .pairing import Step
from .workloads import PLAIN, Shape, Workload

PLAIN_OURS = "objkern, plain"  # beside regularized objectives, for what the regularizers cost
FORWARD = "objkern, forward"  # gradient="forward": one read and one write
FRESH = "objkern, fresh pages"  # no buffer is kept from step to step
DROP_IN = "objkern.cross_entropy"


@dataclass(frozen=True)
class Contestant:
    loss: Loss
    overwrites: bool = False  # the logits, with the gradient

    def on_a_copy(self) -> Loss:
        return (lambda logits, target: self.loss(logits.clone(), target)) if self.overwrites else self.loss


def contestants(workload: Workload, shape: Shape, compile: bool = True) -> dict[str, Contestant]:
    found = {name: Contestant(loss) for name, loss in losses(workload, shape, compile).items()}
    if workload is PLAIN:
        others = {name: Contestant(peer.loss(), peer.overwrites) for name, peer in peers.on("logits").items()}
        found = {**others, **found}
    return found


def losses(workload: Workload, shape: Shape, compile: bool = True) -> dict[str, Loss]:
    """Of torch and objkern, ours last; compiled ones are compiled when they are called first."""
    found = {"eager": workload.eager}
    if shape.dtype.itemsize < 4:
        found["eager, float32"] = upcast(workload.eager)
    if compile:
        found |= {name.replace("eager", "compiled"): compiled(loss) for name, loss in found.items()}
    if workload is not PLAIN:
        found[PLAIN_OURS] = PLAIN.objective
    if shape.vocabulary:
        found[FORWARD] = lambda logits, target: workload.objective(logits, target, gradient="forward")
    if workload is PLAIN and shape.steps > 1:
        found[DROP_IN] = objkern.cross_entropy
    return {**found, OURS: workload.objective}


def upcast(loss: Loss) -> Loss:
    """Half-precision logits go through float32, as Transformers does."""
    return lambda logits, target: loss(logits.float(), target)


def within_limit(run: Step, limit: int) -> Step:
    """The step with so many bytes of freed gradients kept (`objkern.set_buffer_limit`)."""

    def limited() -> float:
        objkern.set_buffer_limit(limit)
        return run()

    return limited


def steps(
    found: dict[str, Contestant], workload: Workload, shape: Shape, logits: Tensor, target: Tensor
) -> dict[str, Step]:
    """The losses as timed steps, and for large logits: objkern in fresh pages, and a copy, the bandwidth's measure."""
    timed = {name: step(one.loss, (logits, target), shape.steps, one.overwrites) for name, one in found.items()}
    if not shape.large:
        return timed
    limit = objkern.buffer_limit()
    timed |= {name: within_limit(run, limit) for name, run in timed.items() if name.startswith("objkern")}
    if workload is PLAIN:
        timed[FRESH] = within_limit(step(found[OURS].loss, (logits, target)), 0)
    return {"copy": copy_step(), **timed}


COPY_BYTES = 1 << 28  # read, and as many written


def copy_step() -> Step:
    """Between two buffers that exist already, each too large for a cache, with torch's threads."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    destination = torch.zeros_like(source)

    def run() -> float:
        start = perf_counter()
        destination.copy_(source)
        return perf_counter() - start

    return run


def kept_bytes(run: Callable[[], float], logits: Tensor) -> int:
    """What objkern keeps between two steps for the next gradient, once this one is freed."""
    run()
    logits.grad = None
    return _C.kept_bytes()
