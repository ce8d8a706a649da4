"""What happens to elements of a row: the transform, the running sums of the lanes, and the gradient.

A tile of a long row is (R, E): R vectors of E neighbours, 16 bytes each, so that one vector belongs to one thread and
sums along E cost no exchange. Lane r of the running sums holds what vectors r of all tiles gave.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .elementary import least_exponent, lowest, tanh, zero_of
from .objective import Piece


@triton.jit
def transformed(x, scale, cap, TRANSFORM: tl.constexpr):
    """z = cap·tanh(scale·x / cap); −inf stays −inf. TRANSFORM: 0 none, 1 the scale alone, 2 scale and cap."""
    if TRANSFORM == 0:
        return x
    else:
        z = x * scale
        if TRANSFORM == 2:
            z = tanh(z / cap) * cap
        return tl.where(x == float("-inf"), float("-inf"), z)


@triton.jit
def slope(z, gain, cap, TRANSFORM: tl.constexpr):
    """dz/dx; `gain` is the scale, or 1 for the derivative to scale·x."""
    if TRANSFORM == 2:
        ratio = z / cap
        return tl.where(z == float("-inf"), gain, gain * (1.0 - ratio * ratio))
    else:
        return gain


class Lanes(NamedTuple):
    """Running sums, relative to the lane's maximum so far; the fields are those of Piece."""

    max: tl.tensor
    e: tl.tensor
    et: tl.tensor
    t: tl.tensor
    n: tl.tensor
    zz: tl.tensor
    dd: tl.tensor
    w: tl.tensor
    wt: tl.tensor
    q: tl.tensor
    qt: tl.tensor


@triton.jit
def no_lanes(R: tl.constexpr, A: tl.constexpr):
    zero = tl.zeros((R,), A)
    return Lanes(
        max=zero + lowest(A), e=zero, et=zero, t=zero, n=zero, zz=zero, dd=zero, w=zero, wt=zero, q=zero, qt=zero
    )


@triton.jit
def add(s, z, A: tl.constexpr, DEPTH: tl.constexpr):
    """Adds a tile of z (R, E) without −inf; should there be one, Σ t is not finite in the end.

    One exponential an element and one a vector: sums so far are taken along to a larger maximum without a branch.
    """
    top = tl.maximum(s.max, tl.max(z, 1))
    shift = tl.maximum(s.max - top, lowest(A))
    near = tl.maximum(shift, least_exponent(A))  # where its product with Σ e is finite: 0·∞ would be NaN
    factor = tl.exp(near)
    t_ = z - top[:, None]
    e_ = tl.exp(t_)
    et, t, n, zz = s.et, s.t, s.n, s.zz
    if DEPTH >= 1:
        et = factor * (et + near * s.e) + tl.sum(e_ * t_, 1)
        t = t + n * shift + tl.sum(t_, 1)
        n = n + z.shape[1]
    if DEPTH >= 2:
        zz += tl.sum(z * z, 1)
    return Lanes(
        max=top, e=s.e * factor + tl.sum(e_, 1), et=et, t=t, n=n, zz=zz, dd=s.dd, w=s.w, wt=s.wt, q=s.q, qt=s.qt
    )


@triton.jit
def add_carefully(
    s, z, w, q, there, A: tl.constexpr, DEPTH: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr,
    DENSE: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """Adds a tile with −inf in it. w, q: class weights and dense target, read where WEIGHTED and DENSE say so.

    there: (R, E), which elements are classes other than the target. Those of −inf among them are excluded, or, not
    MASKED, numbers that make the weighted sums infinite (NaN under a factor of 0, as in torch).
    """
    out = z == float("-inf")
    top = tl.maximum(s.max, tl.max(z, 1))
    shift = tl.maximum(s.max - top, lowest(A))
    near = tl.maximum(shift, least_exponent(A))  # where its product with Σ e is finite: 0·∞ would be NaN
    factor = tl.exp(near)
    apart = z - top[:, None]
    e_ = tl.where(out, 0.0, tl.exp(apart))
    et, t, n, zz, dd = s.et, s.t, s.n, s.zz, s.dd
    sum_w, sum_wt, sum_q, sum_qt = s.w, s.wt, s.q, s.qt
    if DEPTH >= 1:
        t_ = tl.where(out, 0.0, tl.where(apart < lowest(A), lowest(A), apart))  # finite: 0·(−inf) would be NaN
        found = tl.sum(tl.where(out, 0.0, 1.0).to(A), 1)
        et = factor * (et + near * s.e) + tl.sum(e_ * t_, 1)
        t_old, t_new = t + n * shift, tl.sum(t_, 1)
        if DEPTH == 3:  # the spread about a mean that both parts share, as of two samples
            mean = t_new / tl.maximum(found, 1.0)
            d_ = tl.where(out, 0.0, t_ - mean[:, None])
            means = mean - t_old / tl.maximum(n, 1.0)
            both = (n > 0) & (found > 0)
            dd += tl.sum(d_ * d_, 1) + tl.where(both, means * means * (n * found / (n + found)), 0.0)
        t = t_old + t_new
        n = n + found
    if DEPTH >= 2:
        finite = tl.where(out, 0.0, z)
        zz += tl.sum(finite * finite, 1)
    if WEIGHTED or DENSE:
        if MASKED:
            left_out = out
            t_w = t_
        else:
            left_out = there == 0
            t_w = tl.where(out & there, float("-inf"), t_)
        weight = tl.where(left_out, 0.0, w).to(A)
        wt = tl.where(left_out, 0.0, weight * t_w)
        sum_wt = sum_wt + sum_w * shift + tl.sum(wt, 1)
        sum_w += tl.sum(weight, 1)
        if DENSE:
            wq = tl.where(left_out, 0.0, weight * q)
            lifted = left_out
            if SMOOTHED:  # the smoothed share of a class of −inf stands in `wt`
                lifted = left_out | (out & (q == 0))
            sum_qt = sum_qt + sum_q * shift + tl.sum(tl.where(lifted, 0.0, wq * t_w), 1)
            sum_q += tl.sum(wq, 1)
    return Lanes(
        max=top, e=s.e * factor + tl.sum(e_, 1), et=et, t=t, n=n, zz=zz, dd=dd, w=sum_w, wt=sum_wt, q=sum_q, qt=sum_qt
    )


@triton.jit
def fold(s, A: tl.constexpr, DEPTH: tl.constexpr):
    """The lanes of a piece, merged."""
    top = tl.max(s.max, 0)
    shift = tl.maximum(s.max - top, lowest(A))
    near = tl.maximum(shift, least_exponent(A))  # where its product with Σ e is finite: 0·∞ would be NaN
    factor = tl.exp(near)
    e = tl.sum(s.e * factor, 0)
    zero = zero_of(e)
    et, t, n, zz, dd, w, wt, q, qt = zero, zero, zero, zero, zero, zero, zero, zero, zero
    if DEPTH >= 1:
        et = tl.sum(factor * (s.et + near * s.e), 0)
        t_ = s.t + s.n * shift
        t = tl.sum(t_, 0)
        n = tl.sum(s.n, 0)
    if DEPTH >= 2:
        zz = tl.sum(s.zz, 0)
    if DEPTH == 3:
        apart = t_ / tl.maximum(s.n, 1.0) - t / tl.maximum(n, 1.0)
        dd = tl.sum(s.dd + tl.where(s.n > 0, s.n * (apart * apart), 0.0), 0)
        w = tl.sum(s.w, 0)
        wt = tl.sum(s.wt + s.w * shift, 0)
        q = tl.sum(s.q, 0)
        qt = tl.sum(s.qt + s.q * shift, 0)
    return Piece(max=top, e=e, before=zero, et=et, t=t, n=n, zz=zz, dd=dd, w=w, wt=wt, q=q, qt=qt)


@triton.jit
def gradient_of(
    z, w, q, g, gain, cap, A: tl.constexpr, DEPTH: tl.constexpr, TRANSFORM: tl.constexpr, MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """dL/dx of elements other than the target and the maximum's place. g broadcasts against z."""
    t = z - g.max
    if DEPTH == 0:
        d = tl.exp(t) * g.exp_1
        if TRANSFORM == 2:
            d *= slope(z, gain, cap, TRANSFORM)
        elif TRANSFORM == 1:
            d *= gain
    else:
        near = tl.maximum(t, least_exponent(A))
        e = tl.exp(near)
        d = e * (g.exp_t * near + g.exp_1) + g.const_1
        finite = z
        if DEPTH >= 2:
            finite = tl.where(z == float("-inf"), 0.0, z)
            d += g.const_z * finite
        if DEPTH == 3:
            d += g.const_t * tl.where(z == float("-inf"), 0.0, tl.where(t < lowest(A), lowest(A), t))
            if WEIGHTED:
                d += g.const_w * w
            if DENSE:
                d += g.const_q * (w * q)
        if TRANSFORM == 2:
            d *= slope(z, gain, cap, TRANSFORM)
        elif TRANSFORM == 1:
            d *= gain
        if MASKED:
            d = tl.where(z == float("-inf"), 0.0, d)
    return d
