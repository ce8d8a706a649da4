"""The Triton backend: the ops of csrc/bindings.cpp in the namespace `objkern_triton`, on NVIDIA, AMD and Intel GPUs.

    elementary.py   log1p, expm1, tanh                     objective.py   the mathematics of csrc/objective.h
    elements.py     running sums and gradient, by tile     epilogue.py    from the sums of a row to its coefficients
    narrow.py       kernels for rows of few classes        wide.py        kernels for rows of many classes
    reduce.py       denominators, and the sum over rows    launch.py      what is launched how: the table of sizes
    ops.py          the ops

Nothing here is imported before it is asked for: `import objkern` does without triton. See docs/triton-kernels.md.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache

import torch

DEVICES = ("cuda", "xpu")  # AMD's GPUs are "cuda" to torch


@lru_cache(maxsize=1)
def _missing() -> str | None:
    """Why triton itself cannot be used; None if it can."""
    try:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        importlib.import_module("triton.language")
    except (ImportError, ValueError) as error:
        return f"triton cannot be imported ({error})"
    return None


def interpreted() -> bool:
    """Whether triton interprets kernels on the CPU: TRITON_INTERPRET=1 stood in the environment at its import."""
    if _missing() is not None:
        return False
    from .elementary import tanh

    return type(tanh).__name__ == "InterpretedFunction"


def why_not(device_type: str) -> str | None:
    """Why the kernels cannot run on tensors of a type of device; None if they can. The first yes registers them."""
    missing = _missing()
    if missing is not None:
        return missing
    if device_type == "cpu" and not interpreted():
        return (
            "Triton compiles for GPUs; on the CPU its interpreter runs kernels for tests, if TRITON_INTERPRET=1 is "
            "in the environment before triton is imported"
        )
    if device_type not in (*DEVICES, "cpu"):
        return f"there is no Triton for {device_type} devices"
    _register()
    return None


@lru_cache(maxsize=1)
def _register() -> None:
    from . import ops

    ops.register(*DEVICES, *(("cpu",) if interpreted() else ()))


def summary() -> str:
    """A line for `python -m objkern info`."""
    missing = _missing()
    if missing is not None:
        return f"cannot run: {missing}"
    import triton

    found = [name for name in DEVICES if getattr(torch, name).is_available()]
    if interpreted():
        found.append("cpu (interpreted)")
    if not found:
        return f"cannot run: triton {triton.__version__} is there, but no GPU that torch sees"
    return f"runs on {', '.join(found)}, with triton {triton.__version__}"
