"""How much memory a forward pass adds, and a forward with its backward pass: measured in a process of its own.

The peak of the resident set is the honest number: it sees every buffer, whoever allocated it, if pages are touched.
Linux keeps it, and forgets it on request (man 5 proc: clear_refs).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def measure(contestant: str, workload: str, rows: int, classes: int, dtype: str) -> tuple[int, int]:
    """Bytes that the forward pass adds to the resident set, its graph alive, and those that both passes add.

    Args:
        contestant: a name in `contestants.losses`.
    """
    arguments = [contestant, workload, str(rows), str(classes), dtype]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: the process ended with {done.returncode}\n{done.stderr}")
    forward, both = json.loads(done.stdout)
    return forward, both


def main(contestant: str, workload: str, rows: str, classes: str, dtype: str) -> None:
    import torch

    import objkern

    from .contestants import losses
    from .workloads import WORKLOADS, Shape

    shape = Shape(int(rows), int(classes), getattr(torch, dtype), "its memory", 1)
    loss = losses(WORKLOADS[workload], shape, compile=contestant.startswith("compiled"))[contestant]
    logits, target = shape.inputs()
    loss(logits[:2], target[:2]) if not contestant.startswith("compiled") else loss(logits, target)  # code, threads
    objkern.release_buffers()
    forget_peak()
    before = status("VmRSS")
    value = loss(logits, target)
    forward = status("VmHWM") - before
    value.backward()
    print(json.dumps([forward, status("VmHWM") - before]))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def status(field: str) -> int:
    """Bytes, of a field in kB of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main(*sys.argv[1:])
