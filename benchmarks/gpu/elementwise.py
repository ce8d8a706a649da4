"""Elementwise objectives: objkern, eager torch and torch.compile on 64 million elements, in paired rounds."""

from __future__ import annotations

import torch

from ..workloads import ELEMENTWISE
from .contest import Contestant, compared, ours, race, reason, record_absences
from .step import Step, main

SHAPE = (1 << 16, 1 << 10)


WORKLOADS = [workload for workload in ELEMENTWISE if "penalties" in workload.name]


def run(step: Step) -> int:
    device = step.device()
    record_absences(device, step)
    failed = 0
    cases = [(workload, dtype) for workload in WORKLOADS for dtype in (torch.bfloat16, torch.float32)]
    for number, (workload, dtype) in enumerate(cases[:2] if step.quick else cases):
        rows, classes = SHAPE[0] // device.scale, SHAPE[1]
        where = {"kind": "elementwise", "rows": rows, "classes": classes, "dtype": str(dtype)[6:],
                 "workload": workload.name}  # fmt: skip
        try:
            z = torch.randn(rows, classes, device=device.name, dtype=dtype).requires_grad_()
            y = torch.rand(rows, classes, device=device.name, dtype=dtype)
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
