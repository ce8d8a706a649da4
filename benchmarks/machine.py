"""Where and with what a benchmark ran."""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import objkern
from objkern import _C


def describe() -> dict[str, Any]:
    """The machine and the versions; no host or user name."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "allocator": allocator(),
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


def copy_bandwidth(size: int = 1 << 28, rounds: int = 11) -> float:
    """GB/s of a copy between two buffers that exist already, with torch's threads; reads and writes are counted."""
    source = torch.ones(size, dtype=torch.uint8)
    destination = torch.zeros_like(source)
    seconds = []
    for _ in range(rounds):
        start = perf_counter()
        destination.copy_(source)
        seconds.append(perf_counter() - start)
    return 2 * size / statistics.median(seconds) / 1e9
