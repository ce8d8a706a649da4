"""Who takes part: eager torch, the same formula compiled, objkern, and objkern's variants."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

import objkern
from objkern import _C

from .pairing import Step
from .workloads import PLAIN, Loss, Shape, Workload

OURS = "objkern"
PLAIN_OURS = "objkern, plain"  # beside regularized objectives, for what the regularizers cost
FORWARD = "objkern, forward"  # gradient="forward": one read and one write
FRESH = "objkern, fresh pages"  # no buffer is kept from step to step
DROP_IN = "objkern.cross_entropy"


def losses(workload: Workload, shape: Shape, compile: bool = True) -> dict[str, Loss]:
    """Name -> loss. Compiled ones are compiled here, forward and backward, for this shape alone."""
    found = {"eager": workload.eager}
    if shape.dtype.itemsize < 4:
        found["eager, float32"] = upcast(workload.eager)
    if compile:
        torch._dynamo.reset()  # or the count of recompilations ends in a silent fall-back to eager
        found |= {name.replace("eager", "compiled"): compiled(loss, shape) for name, loss in found.items()}
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


def compiled(loss: Loss, shape: Shape) -> Loss:
    function = torch.compile(loss, dynamic=False, fullgraph=True)
    logits, target = shape.inputs()
    function(logits, target).backward()
    return function


def step(loss: Loss, logits: Tensor, target: Tensor, repeat: int = 1) -> Step:
    """A training step's share: drop the old gradient, forward, backward."""

    def run() -> float:
        start = perf_counter()
        for _ in range(repeat):
            logits.grad = None
            loss(logits, target).backward()
        return (perf_counter() - start) / repeat

    return run


def within_limit(run: Step, limit: int) -> Step:
    """The step with so many bytes of freed gradients kept (`objkern.set_buffer_limit`)."""

    def limited() -> float:
        objkern.set_buffer_limit(limit)
        return run()

    return limited


def steps(found: dict[str, Loss], workload: Workload, shape: Shape, logits: Tensor, target: Tensor) -> dict[str, Step]:
    """The losses as timed steps, and for large logits: objkern in fresh pages, and a copy, the bandwidth's measure."""
    timed = {name: step(loss, logits, target, shape.steps) for name, loss in found.items()}
    if not shape.large:
        return timed
    limit = objkern.buffer_limit()
    timed |= {name: within_limit(run, limit) for name, run in timed.items() if name.startswith("objkern")}
    if workload is PLAIN:
        timed[FRESH] = within_limit(step(found[OURS], logits, target), 0)
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
