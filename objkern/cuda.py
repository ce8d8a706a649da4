"""Where the CUDA kernels run, and what keeps them from running elsewhere."""

from __future__ import annotations

import functools

import torch

from .native import _C


def missing() -> list[str]:
    """All that keeps the kernels from running on any device: one who mends the first wants to know of the second."""
    reasons = []
    if _C is None:
        reasons.append("the native kernels are not built (docs/building.md)")
    elif _C.build_info()["cuda_archs"] is None:
        reasons.append("built without CUDA kernels (they take nvcc, and OBJKERN_CUDA not 0; see docs/building.md)")
    else:
        devices, reason = _C.cuda_support()
        if reason is not None or devices == 0:
            reasons.append(reason or "there is no CUDA device")
    if torch.version.cuda is None:
        reasons.append(f"torch {torch.__version__} is a build without CUDA")
    elif not reasons and not torch.cuda.is_available():
        reasons.append("torch.cuda.is_available() is False")
    return reasons


@functools.cache
def why_not(device: int) -> str | None:
    """Why the kernels cannot run on a CUDA device, or None."""
    return "; ".join(missing()) or _C.cuda_why_not(device)
