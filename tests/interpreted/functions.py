"""The elementary functions of objkern/triton, interpreted, against float64; run as cases.py is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from objkern.triton import elementary, launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@triton.jit
def apply(x, out, size, BLOCK: tl.constexpr, WHICH: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + place, mask=place < size, other=0.0)
    if WHICH == 0:
        v = elementary.log1p_of_unit(v)
    elif WHICH == 1:
        v = elementary.expm1(v)
    elif WHICH == 3:
        v = elementary.exp(v)
    else:
        v = elementary.tanh(v)
    tl.store(out + place, v, mask=place < size)


@triton.jit
def numbers_kernel(out, numbers):
    for k in tl.static_range(6):
        tl.store(out + k, elementary.number(numbers, k))


def applied(x: torch.Tensor, which: int) -> torch.Tensor:
    out = torch.empty_like(x)
    apply[(triton.cdiv(len(x), 1024),)](x, out, len(x), BLOCK=1024, WHICH=which)
    return out


def spread(low: float, high: float, **kind: Any) -> torch.Tensor:
    """Magnitudes from tiny to large, and a dense grid."""
    small = torch.logspace(-30, 0, 4000, dtype=torch.float64) * max(abs(low), abs(high))
    grid = torch.linspace(low, high, 20001, dtype=torch.float64)
    return torch.cat([x[(x >= low) & (x <= high)] for x in (small, -small, grid)]).to(**kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("which", "exact", "low", "high"),
    [
        (0, torch.log1p, 0.0, 1.0),
        (1, torch.expm1, -200.0, 0.0),
        (2, torch.tanh, -30.0, 30.0),
        (3, torch.exp, -87.0, 80.0),
    ],
    ids=["log1p", "expm1", "tanh", "exp"],
)
def test_elementary_functions_keep_their_digits(
    which: int, exact: Any, low: float, high: float, dtype: torch.dtype
) -> None:
    """log(1 + x) as written has none left for small x. float64's own truth is good to about 1 ulp here."""
    x = spread(low, high, dtype=dtype)
    truth = exact(x.double())
    error = (applied(x, which).double() - truth).abs()
    ulps = {torch.float32: 4 * 2.0**-24, torch.float64: 8 * 2.0**-53}[dtype]
    assert (error <= ulps * truth.abs()).all(), f"{(error / truth.abs()).nan_to_num().max().item() / ulps:.2f} times"
    nan = applied(torch.tensor([float("nan")], dtype=dtype), which)
    assert nan.isnan().all()


def test_numbers_keep_every_bit() -> None:
    """Triton would pass 0.1 as a float32."""
    numbers = (0.1, -1e-300, 1.0, 5e-324, -1e300, float("inf"))
    out = torch.empty(6, dtype=torch.float64)
    numbers_kernel[(1,)](out, launch.words(*numbers))
    assert out.tolist() == list(numbers)
