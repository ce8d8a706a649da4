"""Large logits: objkern, eager torch, torch.compile and Liger-Kernel, plain and regularized, in paired rounds."""

from __future__ import annotations

import torch

from ..accuracy import reason
from ..workloads import PLAIN, WORKLOADS
from .contest import checked, compared, described, inputs, ours, race, record_absences, rivals
from .device import Device
from .step import Step, main

ROWS = 8192
# Llama-3's first: what a time limit cuts off is at the end.
CASES = [
    (128256, torch.bfloat16), (32000, torch.bfloat16), (256000, torch.bfloat16), (50257, torch.bfloat16),
    (151936, torch.bfloat16), (32000, torch.float32),
]  # fmt: skip


def measure(device: Device, step: Step, classes: int, dtype: torch.dtype, workload_name: str, seconds: float) -> None:
    workload = WORKLOADS[workload_name]
    rows = ROWS // device.scale
    needed = 3.0 * rows * classes * dtype.itemsize
    where = {"kind": "objective", "rows": rows, "classes": classes, "dtype": str(dtype)[6:], "workload": workload_name}
    if (free := device.free_bytes()) < needed:
        step.record(where | {"skipped": {"all": f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"}})
        return
    x, y = inputs(device, rows, classes, dtype)
    contestants = ours(device, workload)
    if workload is not PLAIN:  # in the same rounds, for what the regularizers cost
        contestants |= ours(device, PLAIN, ", plain")
    # Compiling the regularized formula for every shape would take longer than everything else.
    compile = not step.quick and (workload is PLAIN or classes in (32000, 128256))
    contestants |= rivals(workload, dtype, compile)
    errors = checked(device, contestants, workload, x, y)
    times, notes = race(device, contestants, x, y, seconds, most=10 if step.quick else 60)
    step.record(described("objective", x, workload) | compared(times) | notes | {"errors": errors})


def run(step: Step) -> int:
    device = step.device()
    record_absences(device, step)
    cases = [(*case, name) for case in (CASES[:2] if step.quick else CASES) for name in WORKLOADS]
    failed = 0
    for number, (classes, dtype, name) in enumerate(cases):
        share = max(1.0, step.left / (len(cases) - number))
        try:
            measure(device, step, classes, dtype, name, min(6.0, 0.5 * share))
        except Exception as error:  # recorded with the case, which counts as failed; the others go on
            failed += 1
            step.record({
                "kind": "objective", "rows": ROWS, "classes": classes, "dtype": str(dtype)[6:], "workload": name,
                "skipped": {"all": reason(error)},
            })  # fmt: skip
    return failed


if __name__ == "__main__":
    main(run)
