"""Elementwise objectives on 64 million elements, the divergence from a reference, and terms on parameters: objkern,
eager torch and torch.compile, in paired rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from objkern import L2SP

from ..accuracy import reason
from ..workloads import DIVERGENCE, ELEMENTWISE, Workload
from .contest import Contestant, compared, ours, race, record_absences
from .device import Device
from .step import Step, main

SHAPE = (1 << 16, 1 << 10)
LOGITS = (8192, 32000)
WORKLOADS = [workload for workload in ELEMENTWISE if "penalties" in workload.name]


def pair(device: Device, workload: Workload, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A prediction and its targets, or logits and those of a reference."""
    rows, classes = LOGITS if workload is DIVERGENCE else SHAPE
    z = torch.randn(rows // device.scale, classes, device=device.name, dtype=dtype)
    y = z + torch.randn_like(z) if workload is DIVERGENCE else torch.rand_like(z)
    return z.requires_grad_(), y


def penalties(device: Device, step: Step) -> None:
    """The distance of a sentence encoder's 22M weights to where they began."""
    block = [(384, 384)] * 4 + [(1536, 384), (384, 1536)]
    theta = [
        torch.randn(shape, device=device.name).requires_grad_() for shape in [(30522, 384), (512, 384), *block * 6]
    ]
    origins = [p.detach().clone() for p in theta]

    def naive() -> Tensor:
        return sum(0.5 * (p - o).square().sum() for p, o in zip(theta, origins, strict=True))

    times: dict[str, list[float]] = {"objkern L2SP": [], "eager": []}
    runs = {"objkern L2SP": L2SP(theta), "eager": naive}
    for number in range(22):
        for name, loss in runs.items():
            seconds = device.seconds(lambda loss=loss: torch.autograd.grad(loss(), theta))
            if number >= 2:
                times[name].append(seconds)
    step.record({"kind": "penalty", "weights": sum(p.numel() for p in theta), "dtype": "float32"} | compared(times))


def run(step: Step) -> int:
    device = step.device()
    record_absences(device, step)
    failed = 0
    try:
        penalties(device, step)
    except Exception as error:  # recorded, and counts as failed; the others go on
        failed += 1
        step.record({"kind": "penalty", "skipped": {"all": reason(error)}})
    cases = [(workload, dtype) for workload in (DIVERGENCE, *WORKLOADS) for dtype in (torch.bfloat16, torch.float32)]
    for number, (workload, dtype) in enumerate(cases[:3] if step.quick else cases):
        z, y = pair(device, workload, dtype)
        kind = "divergence" if workload is DIVERGENCE else "elementwise"
        where = {"kind": kind, "rows": z.shape[0], "classes": z.shape[1], "dtype": str(dtype)[6:],
                 "workload": workload.name}  # fmt: skip
        try:
            contestants = ours(device, workload) | {"eager": Contestant(workload.eager)}
            if not step.quick:
                contestants["compiled"] = Contestant(torch.compile(workload.eager, dynamic=False), compiles=True)
            share = max(0.5, step.left / (len(cases) - number))
            times, notes = race(device, contestants, z, y, min(3.0, 0.4 * share), 31)
            step.record(where | compared(times) | notes)
        except Exception as error:  # recorded with the case, which counts as failed; the others go on
            failed += 1
            step.record(where | {"skipped": {"all": reason(error)}})
    return failed


if __name__ == "__main__":
    main(run)
