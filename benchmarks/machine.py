"""Where and with what a benchmark ran."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any


def describe() -> dict[str, Any]:
    """The machine and the versions; no host or user name."""
    import torch

    import objkern
    from objkern import _C

    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "allocator": allocator(),
        "keeps_pages": keeps_pages(),
        "huge_pages": huge_pages(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "objkern": objkern.__version__,
        "objkern_build": dict(_C.build_info()),
    }


def allocator() -> str:
    """The C allocator and its settings: they decide whether a fresh tensor is made of fresh pages."""
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")]
    return " ".join([os.environ.get("LD_PRELOAD") or "system malloc", *settings])


def cpu_model() -> str:
    """The model as the kernel names it; with family and model number, because virtual machines shorten names."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    first = cpuinfo.read_text().partition("\n\n")[0]
    fields = {key.strip(): " ".join(value.split()) for key, _, value in (s.partition(":") for s in first.splitlines())}
    numbers = ", ".join(
        f"{name} {fields[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in fields
    )
    return fields.get("model name", platform.machine()) + (f" ({numbers})" if numbers else "")


def keeps_pages() -> bool:
    """glibc was told to take everything from its heap and to give nothing back."""
    return os.environ.get("MALLOC_MMAP_MAX_") == "0" and "MALLOC_TRIM_THRESHOLD_" in os.environ


def huge_pages() -> str | None:
    """The kernel's setting for transparent huge pages: always, madvise or never."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text().partition("[")[2].partition("]")[0] if setting.exists() else None


def available_bytes() -> int:
    """Memory that can be had without swapping; 0 where the system does not tell."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0)


def commit() -> str | None:
    """Of the checkout; "+" marks that it has changes."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True,
        )  # fmt: skip
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


class Others:
    """How many cores other processes kept busy since this was made.

    Args:
        children: process ids of one's own that take part.
    """

    def __init__(self, children: Sequence[int] = ()) -> None:
        self.children = children
        self.start, self.busy = perf_counter(), self._busy()

    def cores(self) -> float | None:
        now = self._busy()
        return None if now is None else max(0.0, (now - self.busy) / (perf_counter() - self.start))

    def _busy(self) -> float | None:
        """Seconds of all processors, from Linux's /proc (man 5 proc), without idle time and one's own."""
        if not Path("/proc/stat").exists():
            return None
        user, nice, system, _, _, *interrupts_and_steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        ticks = user + nice + system + sum(interrupts_and_steal)
        for process in ("self", *self.children):
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            ticks -= sum(map(int, fields[11:15]))  # user and system time, its own and that of children that ended
        return ticks / os.sysconf("SC_CLK_TCK")


def load_warning(load: float) -> str | None:
    """Others at work spoil times, and most of all those of small shapes."""
    if load <= 1.0:
        return None
    return f"the load average was {load:.2f} before the run: other processes were busy, so its times may be off"
