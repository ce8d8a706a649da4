"""Small logits, where a launch costs as much as the bytes: twenty steps between two events, the cache warm.

In training a layer has just written such logits, so they are in the cache; and the host is ahead of the device.
"""

from __future__ import annotations

import torch

import objkern

from ..accuracy import reason
from ..workloads import WORKLOADS
from .contest import Contestant, able, checked, compared, described, inputs, ours, race, record_absences, rivals
from .step import Step, main

SHAPES = [(4096, 9), (512, 32), (65536, 10)]
DTYPES = (torch.bfloat16, torch.float32)


def run(step: Step) -> int:
    device = step.device()
    record_absences(device, step)
    cases = [
        (*shape, dtype, name) for shape in SHAPES for dtype in (torch.bfloat16, torch.float32) for name in WORKLOADS
    ]
    failed = 0
    for number, (rows, classes, dtype, name) in enumerate(cases[:3] if step.quick else cases):
        workload = WORKLOADS[name]
        try:
            x, y = inputs(device, rows // min(device.scale, 16), classes, dtype)
            contestants = ours(device, workload)
            if name == "plain" and None in able(device).values():
                contestants["objkern.cross_entropy"] = Contestant(objkern.cross_entropy)
            contestants |= rivals(workload, dtype, compile=not step.quick)
            contestants.pop("eager, float32", None)
            errors = checked(device, contestants, workload, x, y)
            share = max(0.5, step.left / (len(cases) - number))
            times, notes = race(device, contestants, x, y, min(1.0, 0.4 * share), 31, repeat=20, flush=False)
            step.record(described("small", x, workload) | compared(times) | notes | {"errors": errors})
        except Exception as error:  # recorded with the case, which counts as failed; the others go on
            failed += 1
            step.record({"kind": "small", "rows": rows, "classes": classes, "dtype": str(dtype)[6:], "workload": name,
                         "skipped": {"all": reason(error)}})  # fmt: skip
    return failed


if __name__ == "__main__":
    main(run)
