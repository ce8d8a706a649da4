"""How much memory a forward pass adds, and a forward with its backward pass: measured in a process of its own.

The peak of the resident set is the honest number: it sees every buffer, whoever allocated it, if pages are touched.
Linux keeps it, and forgets it on request (man 5 proc: clear_refs).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from .workloads import Loss

ROOT = Path(__file__).parent.parent


def measure(contestants: list[str], workload: str, rows: int, classes: int, dtype: str) -> dict[str, tuple[int, int]]:
    """For each: bytes that its forward pass adds to the resident set, its graph alive, and those that both passes add.

    Args:
        contestants: names in `contestants.losses`.
    """
    found = in_a_process("benchmarks.memory", workload, rows, classes, dtype, *contestants)
    return {name: tuple(counts) for name, counts in found.items()}


def in_a_process(module: str, *arguments: object) -> Any:
    """What a module prints as JSON, in a process of its own with the system's allocator as it is."""
    words = [str(argument) for argument in arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-m", module, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(words)}: the process ended with {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout)


def main(workload: str, rows: str, classes: str, dtype: str, *contestants: str) -> None:
    import torch

    from .contestants import losses
    from .workloads import WORKLOADS, Shape

    shape = Shape(int(rows), int(classes), getattr(torch, dtype), "its memory")
    found = losses(WORKLOADS[workload], shape, compile=any(name.startswith("compiled") for name in contestants))
    logits, target = shape.inputs()
    print(json.dumps({name: growth(found[name], logits, target) for name in contestants}))


def growth(loss: Loss, logits: Tensor, target: Tensor) -> tuple[int, int]:
    import objkern

    loss(logits, target).backward()  # brings in code and threads
    logits.grad = None
    objkern.release_buffers()
    forget_peak()
    before = status("VmRSS")
    value = loss(logits, target)
    forward = status("VmHWM") - before
    value.backward()
    both = status("VmHWM") - before
    logits.grad = None
    return forward, both


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def status(field: str) -> int:
    """Bytes, of a field in kB of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main(*sys.argv[1:])
