"""Small calls of every kernel of one backend, for tools that watch each access: python -m benchmarks.gpu.every_kernel

Ragged sizes: rows that end within a warp, a tile, a 16-byte word, a cluster; every dtype, option and kind of target.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor

import objkern
from objkern import CrossEntropy, Entropy, KLDivergence, LogitL2, MaxZLoss, Unlikelihood, ZLoss

EVERY_TERM = objkern.parse(
    "CrossEntropy(label_smoothing=0.1) + 0.5*ZLoss() + 0.3*MaxZLoss() - 0.7*Entropy() + Focal(gamma=2.0) + "
    "Poly1(epsilon=1.0) + GeneralizedCrossEntropy(q=0.7) + 0.2*Unlikelihood() + Margin(m=0.35) + 0.9*LogitL2()"
)
BESIDE = CrossEntropy() + KLDivergence("forward", 2.0) + KLDivergence("reverse", 2.0)
OBJECTIVES = [CrossEntropy(), CrossEntropy() - 0.1 * Entropy() + LogitL2(), EVERY_TERM]
CLASSES = [2, 9, 33, 130, 1003, 4099, 20011]
DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.float64]


def both(loss: Tensor, *inputs: Tensor, upstream: float = 1.7) -> None:
    torch.autograd.grad(loss.sum() * upstream, inputs)


def rows(device: str, count: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = torch.empty(count, classes, dtype=dtype, device=device).normal_(0, 3).requires_grad_()
    y = torch.randint(0, classes, (count,), device=device)
    y[0] = -100
    return x, y


def sizes(device: str, backend: str, quick: bool) -> int:
    calls = 0
    for classes in CLASSES[:3] if quick else CLASSES:
        for dtype in DTYPES[:2] if quick or classes > 5000 else DTYPES:
            x, y = rows(device, 5, classes, dtype)
            for objective in OBJECTIVES:
                for mode in ("backward", "forward"):
                    both(objective(x, y, gradient=mode, backend=backend), x)
                both(objective(x, y, reduction="none", backend=backend), x)
                calls += 3
            for beside in (x.detach() * 0.9, x.detach().float()):
                for mode in ("backward", "forward"):
                    both(BESIDE(x, y, reference=beside, gradient=mode, backend=backend), x)
                both(objkern.row_statistics(x, y, reference=beside, backend=backend).forward_kl, x)
                both(KLDivergence("forward", 2.0)(x, reference=beside, backend=backend), x)
                both(KLDivergence("reverse", 2.0)(x, reference=beside, gradient="forward", backend=backend), x)
                calls += 5
    return calls


def options(device: str, backend: str) -> int:
    x, y = rows(device, 37, 1003, torch.bfloat16)
    c, s = (torch.tensor(value, device=device, requires_grad=True) for value in (0.3, 1.2))
    both((CrossEntropy() + c * ZLoss())(x, y, logit_scale=s, softcap=20.0, backend=backend), x, c, s)
    both(CrossEntropy(torch.rand(1003, device=device), 0.1)(x, y, backend=backend), x)
    dense = torch.rand(37, 1003, device=device).softmax(-1)
    both(CrossEntropy(label_smoothing=0.1)(x, dense, backend=backend), x)
    both((ZLoss() + MaxZLoss() - Entropy())(x, backend=backend), x)
    both(EVERY_TERM(x, y, return_parts=True, normalizer=torch.tensor(7.0, device=device), backend=backend)[0], x)
    both(torch.stack(objkern.row_statistics(x, y, backend=backend)[:10]).sum(), x)
    if device != "cpu":
        y[3:7] = torch.tensor([-1, 1003, 2**40, -(2**63)], device=device)
        both(EVERY_TERM(x, y, backend=backend), x)
    wide = torch.randn(9, 2100, device=device).requires_grad_()
    for part in (wide[:, 3:1006], wide[::2, 7:1010]):  # rows that begin between 16-byte words
        both(Unlikelihood()(part, y[: len(part)].clamp(0, 1002), backend=backend), wide)
    both(CrossEntropy()(wide[:, ::2], y[:9].clamp(0, 1002), backend=backend), wide)
    masked = torch.full((5, 4099), -torch.inf, device=device)
    masked[:, ::101] = 1.0
    both(ZLoss()(masked.requires_grad_(), backend=backend), masked)
    return 11


def elementwise(device: str, backend: str) -> int:
    objective = objkern.parse(
        "BinaryCrossEntropy(label_smoothing=0.1) - 0.1*BernoulliEntropy() + MeanSquaredError() + MeanAbsoluteError() + "
        "Huber(delta=0.3) + 0.01*LogitL2()"
    )
    calls = 0
    for dtype in DTYPES:
        for shape in ((1,), (7,), (33, 129), (3, 20011)):
            x = torch.randn(shape, dtype=dtype, device=device).requires_grad_()
            y = torch.rand(shape, dtype=dtype, device=device)
            for mode in ("backward", "forward"):
                both(objective(x, y, gradient=mode, backend=backend), x)
            both(objective(x, y, reduction="none", backend=backend), x)
            calls += 3
    x, y = (torch.rand(33, 129, device=device, requires_grad=True) for _ in range(2))
    term = objkern.BinaryCrossEntropy(torch.rand(129, device=device), torch.rand(33, 1, device=device))
    both(term(x, y.detach(), softcap=3.0, backend=backend), x)
    both(objective(x[1:], y.detach()[1:], backend=backend), x)
    return calls + 2


def penalties(device: str) -> int:
    calls = 0
    for dtype in DTYPES:
        theta = [torch.randn(count, dtype=dtype, device=device).requires_grad_() for count in (0, 1, 7, 33000)]
        theta += [torch.randn(1001, dtype=dtype, device=device)[1:].requires_grad_()]
        fisher = {str(k): torch.rand_like(p, dtype=torch.float32) for k, p in enumerate(theta)}
        for term in (objkern.ElasticNet(theta, 0.3, 0.7), objkern.L2SP(theta), objkern.EWC(theta, fisher)):
            both(term(), *theta)
            term.accumulate_()
            term.accumulate_(0.5)
            calls += 3
    return calls


def forced_plans(device: str, backend: str) -> int:
    """Each cluster and number of lanes, whatever the table would choose."""
    from .plans import plans

    calls = 0
    for narrow, classes in ((False, 4099), (True, 30)):
        for force in plans(backend, narrow).values():
            x, y = rows(device, 5, classes, torch.bfloat16)
            try:
                with force():
                    for mode in ("backward", "forward"):
                        both(EVERY_TERM(x, y, gradient=mode, backend=backend), x)
                        calls += 1
            except (ValueError, RuntimeError) as error:
                if "illegal" in str(error) or "misaligned" in str(error):
                    raise
                print(f"a plan that cannot be launched: {error}")
    return calls


def main(device: str, backend: str, quick: str = "") -> None:
    calls = sizes(device, backend, bool(quick)) + options(device, backend) + elementwise(device, backend)
    if backend == "cuda":
        calls += penalties(device) + (0 if quick else forced_plans(device, backend))
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls of {backend} on {device}", flush=True)
    os._exit(0)  # what is watched is over; torch's own end is none of it


if __name__ == "__main__":
    main(*sys.argv[1:])
