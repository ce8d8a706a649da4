"""What a call costs the host: forward and backward enqueued over and over without waiting for the device.

At 512 × 32 the device is done before the host has enqueued the next call. The time until the last call is enqueued is
the host's; if the device needs longer to finish after that than a call takes, it was the device that was measured, and
the entry says so. A profile of the calls follows, by Python function and by op.
"""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import objkern

from ..accuracy import reason
from ..pairing import paired_ratio, summary
from .contest import able, inputs
from .device import Device
from .step import Step, main

ROWS, CLASSES = 512, 32
TERMS, MEAN = [0.0, 0.0, 1.0], 1  # cross-entropy; the mean of the rows

Loss = Callable[[Tensor, Tensor], Tensor]


def contestants(device: Device) -> dict[str, Loss]:
    found: dict[str, Loss] = {"F.cross_entropy": F.cross_entropy}
    objective = objkern.CrossEntropy()
    for name, backend in device.backends.items():
        if able(device)[name] is not None:
            continue
        for mode in ("backward", "forward"):
            found[f"objkern {name} {mode}"] = lambda x, y, b=backend, m=mode: objective(x, y, gradient=m, backend=b)
        if backend == "reference":
            continue
        family = torch.ops.objkern_triton if backend == "triton" else torch.ops.objkern
        found[f"objkern {name} op"] = lambda x, y, op=family.objective.default: op(TERMS, MEAN, x, y)[0]
    if any(able(device)[name] is None for name in device.backends):
        found["objkern.cross_entropy"] = objkern.cross_entropy
    return found


def forward_backward(loss: Loss, x: Tensor, y: Tensor) -> None:
    torch.autograd.grad(loss(x, y), x)


def enqueue(device: Device, run: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Seconds per call until the last one is enqueued, and those that the device needs after that, all in all."""
    device.synchronize()
    begin = perf_counter()
    for _ in range(calls):
        run()
    enqueued = perf_counter()
    device.synchronize()
    return (enqueued - begin) / calls, perf_counter() - enqueued


def race(device: Device, runs: dict[str, Callable[[], Any]], calls: int, rounds: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {name: [] for name in runs}
    after: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        enqueue(device, run, 20)
    names = list(runs)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds, rest = enqueue(device, runs[name], calls)
            found[name].append(seconds)
            after[name].append(rest)
    return {
        "seconds": {name: summary(times) for name, times in found.items()},
        "ratio": {name: paired_ratio(times, found["F.cross_entropy"]) for name, times in found.items()},
        "device_after": {name: summary(times)[1] for name, times in after.items()},
        "bound_by_host": {name: summary(after[name])[1] < 3 * summary(found[name])[1] for name in runs},
    }


def profile(run: Callable[[], Any], calls: int) -> dict[str, Any]:
    """The largest functions by their own time, and ops by theirs, microseconds per call."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(calls):
        run()
    profiler.disable()
    rows = [
        (f"{name[0].rpartition('/')[2]}:{name[1]} {name[2]}", own / calls * 1e6)
        for name, (_, _, own, _, _) in pstats.Stats(profiler).stats.items()
    ]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as traced:
        for _ in range(calls):
            run()
    ops = [(event.key, event.self_cpu_time_total / calls) for event in traced.key_averages()]
    return {
        "python": dict(sorted(rows, key=lambda row: -row[1])[:12]),
        "ops": dict(sorted(ops, key=lambda row: -row[1])[:12]),
    }


def run(step: Step) -> int:
    device, failed = step.device(), 0
    rounds = 5 if step.quick else 15
    for dtype in (torch.bfloat16, torch.float32):
        x, y = inputs(device, ROWS, CLASSES, dtype)
        losses, skipped = {}, {}
        for name, loss in contestants(device).items():
            try:
                torch.autograd.grad(loss(x, y), x)
                losses[name] = loss
            except Exception as error:  # recorded with the case, which counts as failed; the others go on
                failed, skipped[name] = failed + 1, reason(error)
        both = {name: partial(forward_backward, loss, x, y) for name, loss in losses.items()}
        forward = {name: partial(loss, x, y) for name, loss in losses.items()}
        calls = 50 if step.stand_in else 200
        for what, runs in (("forward and backward", both), ("forward", forward)):
            step.record({
                "kind": "host", "what": what, "rows": ROWS, "classes": CLASSES, "dtype": str(dtype)[6:],
                "calls": calls, "rounds": rounds, "skipped": skipped, **race(device, runs, calls, rounds),
            })  # fmt: skip
    for name, go in both.items():
        try:
            step.record({"kind": "profile", "contestant": name, "microseconds": profile(go, 20 if step.quick else 200)})
        except Exception as error:  # a profiler that is not there is no failure of a kernel
            step.record({"kind": "profile", "contestant": name, "skipped": reason(error)})
    return failed


if __name__ == "__main__":
    main(run)
