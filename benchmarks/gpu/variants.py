"""Parts of a step apart, so that a missed target can be explained by the difference of two variants.

statistics    forward pass without a gradient: one read
gradient      backward pass alone: one read, one write
fused         forward pass with the gradient: one read, one write
handed over   the backward pass after it, upstream gradient 1: nothing to do
rescaled      the same, upstream gradient 1.7: one read, one write
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..accuracy import reason
from ..pairing import summary
from ..workloads import WORKLOADS, Loss
from .contest import able, described, inputs, objkern_loss
from .device import Device
from .step import Step, main

PASSES = {"statistics": 1, "gradient": 2, "fused": 2, "handed over": 0, "rescaled": 2}
ROWS = 8192
CLASSES = [128256, 32000, 256000, 50257, 151936]

Variant = tuple[Callable[[], Any], Callable[[], Any] | None]  # the timed part, and what is done before it


class Handed:
    """A backward pass after a forward pass that has made the gradient already, which hands it over only once."""

    def __init__(self, loss: Loss, x: Tensor, y: Tensor, upstream: float) -> None:
        self.loss, self.x, self.y = loss, x, y
        self.upstream = torch.tensor(upstream, device=x.device)
        self.value: Tensor | None = None

    def prepare(self) -> None:
        self.value = self.loss(self.x, self.y)

    def run(self) -> None:
        if self.value is None:
            self.prepare()
        value, self.value = self.value, None
        torch.autograd.grad(value, self.x, self.upstream)


def variants(workload_name: str, backend: str, x: Tensor, y: Tensor) -> dict[str, Variant]:
    workload = WORKLOADS[workload_name]
    backward, forward = (objkern_loss(workload, backend, mode) for mode in ("backward", "forward"))
    constant = x.detach()
    value = backward(x, y)
    handed, rescaled = Handed(forward, x, y, 1.0), Handed(forward, x, y, 1.7)
    return {
        "statistics": (lambda: backward(constant, y), None),
        "gradient": (lambda: torch.autograd.grad(value, x, retain_graph=True), None),
        "fused": (lambda: forward(x, y), None),
        "handed over": (handed.run, handed.prepare),
        "rescaled": (rescaled.run, rescaled.prepare),
    }


def measure(device: Device, step: Step, classes: int, seconds: float) -> None:
    rows = ROWS // device.scale
    x, y = inputs(device, rows, classes, torch.bfloat16)
    for workload_name, workload in WORKLOADS.items():
        found: dict[str, list[float]] = {}
        skipped: dict[str, str] = {}
        for name, backend in device.backends.items():
            if able(device)[name] is not None:
                continue
            for variant, (run, prepare) in variants(workload_name, backend, x, y).items():
                try:
                    run()
                    once = max(1e-3, device.seconds(run, prepare=prepare))
                    rounds = max(5, min(30, int(seconds / 20 / once)))
                    times = [device.seconds(run, prepare=prepare) for _ in range(rounds)]
                    found[f"objkern {name} {variant}"] = summary(times)
                except Exception as error:  # recorded with the case, which counts as failed; the others go on
                    skipped[f"objkern {name} {variant}"] = reason(error)
        step.record(described("variant", x, workload) | {"seconds": found, "skipped": skipped})


def run(step: Step) -> int:
    device, failed = step.device(), 0
    chosen = CLASSES[:1] if step.quick else CLASSES
    for number, classes in enumerate(chosen):
        try:
            if device.free_bytes() < 6.0 * ROWS // device.scale * classes:
                raise MemoryError("too little device memory is free")
            measure(device, step, classes, max(1.0, step.left / (len(chosen) - number)))
        except Exception as error:  # recorded with the case, which counts as failed; the others go on
            failed += 1
            step.record({"kind": "variant", "rows": ROWS, "classes": classes, "dtype": "bfloat16", "workload": "both",
                         "skipped": {"all": reason(error)}})  # fmt: skip
    return failed


if __name__ == "__main__":
    main(run)
