"""Where it ran: device, driver, versions, clocks as found. Nothing is set, and no host or user is named."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess

from ..machine import cpu_model
from ..peers import PEERS
from .step import Entry, Step, main

CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,utilization.gpu,memory.used"


def facts(stand_in: bool) -> Entry:
    import torch

    found: Entry = {
        "kind": "facts",
        "device": "stand-in",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": version("triton"),
        "peers": {package: version(package) for package in dict.fromkeys(peer.package for peer in PEERS)},
        "nvcc": nvcc(),
        "compute_sanitizer": tool("compute-sanitizer"),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "environment": {
            name: value for name, value in sorted(os.environ.items())
            if name.startswith(("OBJKERN_", "TORCH_CUDA_ARCH", "TRITON_", "PYTORCH_", "CUDA_")) and "/" not in value
        },
    }  # fmt: skip
    if stand_in:
        return found
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "device": properties.name,
        "devices": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "free_gib": torch.cuda.mem_get_info()[0] / 2**30,
        "l2_mb": properties.L2_cache_size / 1e6,
        "driver": ask("driver_version"),
        "as_found": dict(zip(CLOCKS.split(","), (ask(CLOCKS) or "").split(", "), strict=False)),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def tool(name: str) -> str | None:
    """Where a tool of the CUDA toolkit is, on PATH or in its usual homes."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [None, *(f"{home}/{folder}" for home in homes if home for folder in ("bin", name))]
    return next((found for place in places if (found := shutil.which(name, path=place))), None)


def nvcc() -> str | None:
    if (found := tool("nvcc")) is None:
        return None
    done = subprocess.run([found, "--version"], capture_output=True, text=True)
    release = re.search(r"V([\d.]+)", done.stdout)
    return release[1] if release else None


def ask(fields: str) -> str | None:
    """nvidia-smi's answer for the first device."""
    if (smi := shutil.which("nvidia-smi")) is None:
        return None
    command = [smi, f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def run(step: Step) -> None:
    step.record(facts(step.stand_in))


if __name__ == "__main__":
    main(run)
