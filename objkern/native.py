"""The native core: the compiled module `objkern._C`, with the CPU and CUDA kernels, or why it is not there.

An installation may do without (OBJKERN_NATIVE=0, see docs/building.md). A core that is there and does not load is an
error of its own: it was built against another torch, and to go on without it would be a silent fallback.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

_HOW = "docs/building.md says how to build them: it takes a C++20 compiler and `pip install --no-build-isolation .`"


def _load() -> Any | None:
    try:
        return importlib.import_module("objkern._C")  # `from . import _C` would speak of a circular import
    except ModuleNotFoundError as error:
        if error.name != "objkern._C":
            raise
        return None
    except ImportError as error:
        raise ImportError(
            f"objkern: the native kernels do not load with torch {torch.__version__}: {error}. They belong to the "
            "minor version of torch that they were built against; build them anew (docs/building.md)"
        ) from error


_C = _load()


def why_not() -> str | None:
    """Why there are no native kernels, or None."""
    if _C is not None:
        return None
    others = sorted(path.name for path in Path(__file__).parent.glob("_C.*"))
    found = f"; {', '.join(others)} belongs to another Python" if others else ""
    return f"objkern's native kernels are not built here{found}. {_HOW}"


def core() -> Any:
    """The core, for what cannot do without."""
    if _C is None:
        raise RuntimeError(why_not())
    return _C
