"""Peak memory: the resident set on the CPU, torch's allocator on a GPU.

Linux keeps the highest resident set of a process in /proc/self/status (VmHWM) and lowers it to the present one when "5"
is written to /proc/self/clear_refs. getrusage's ru_maxrss won't do: a child inherits its parent's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def peak_bytes(device: torch.device) -> float:
    """The highest use of this process so far: of torch's allocator on a GPU, else the resident set."""
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_resident_bytes()


def peak_resident_bytes() -> float:
    """Highest resident set of this process so far; NaN where the system doesn't tell."""
    if STATUS.exists():
        return _status_bytes("VmHWM")
    if sys.platform == "darwin":
        import resource

        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return math.nan


def extra_peak_bytes(call: Callable[[], object], device: torch.device) -> float:
    """How much more memory is in use at the height of `call()` than before it; NaN where that can't be measured."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    try:
        CLEAR.write_text("5")
    except OSError:
        call()
        return math.nan
    before = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> float:
    for line in STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024.0 * int(value.split()[0])
    return math.nan  # a kernel that leaves the line out
