"""The divergence of rows from those of a reference: csrc/divergence.h under the same names, and a kernel over rows."""

import triton
import triton.language as tl

from .elementary import ANYWHERE, RUN_TIME, least_exponent, number
from .elements import slope, transformed
from .epilogue import put, read_row
from .narrow import read_scale
from .objective import weighted


@triton.jit
def g_of_minus(d):
    """exp(−d) − 1 + d for |d| < 1/2, by its series."""
    LAST: tl.constexpr = 14 if d.dtype == tl.float64 else 8
    total = tl.zeros_like(d)
    for i in tl.static_range(LAST - 1):
        total = 1.0 - total * d * (1.0 / (LAST + 1 - i))
    return d * d * 0.5 * total


@triton.jit
def log1p(x):
    """For |x| < 1/2, in float64."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def divergence_of(first, second, ratio):
    """Σ w d / W + log(ratio): by the second-order sum where that is small."""
    x = second - first
    near = (second < 0.5) & (tl.abs(ratio - 1.0) < 0.5)
    x = tl.where(near, x, 0.0)
    return tl.where(near, second + (log1p(x) - x), first + tl.log(ratio))


@triton.jit
def apart(z, r, max_z, max_r, by, A: tl.constexpr):
    """(e, f, d) of classes."""
    e = tl.exp(tl.maximum((r - max_r) * by, least_exponent(A)))
    f = tl.exp(tl.maximum((z - max_z) * by, least_exponent(A)))
    e = tl.where(r == r, e, r)  # a NaN, which a maximum may lose
    # Beside each other where the maxima are near, else each beside its own: csrc/divergence.h.
    far = tl.abs(max_r - max_z) > 16.0
    d = tl.where(far, (r - max_r) - (z - max_z), (r - z) - (max_r - max_z))
    return tl.where(r == float("-inf"), 0.0, e), tl.where(z == z, f, z), d * by


@triton.jit
def share_at(share, z, r, by, gain, cap, A: tl.constexpr, TRANSFORM: tl.constexpr):
    """What a reference adds to the gradient of classes; finite where d is not."""
    e, f, d = apart(z, r, share.max_z, share.max_r, by, A)
    d = tl.minimum(tl.maximum(d, -1e30), 1e30)  # a NaN is in e or f
    return (f * (share.of_p + share.of_pd * d) + share.of_q * e) * slope(z, gain, cap, TRANSFORM)


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=ANYWHERE)
def compare_kernel(
    x, target, reference, logit_scale, transform, temperature, found, rows: tl.int64, row_stride: tl.int64,
    reference_stride: tl.int64, ignore_index: tl.int64, V: tl.int32, A: tl.constexpr, TRANSFORM: tl.constexpr,
    REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row a program: its maxima, then the sums relative to them, then `Divergence`, (7, rows) of A."""
    row = read_row(tl.program_id(0).to(tl.int64), rows, target, ignore_index, V)
    row_x = x + row.index * row_stride
    row_r = reference + row.index * reference_stride
    scale, cap = read_scale(logit_scale, transform, A)
    by = number(temperature, 0).to(A)
    LOW: tl.constexpr = float("-inf")
    if row.ignored == 0:
        high_z = tl.full((BLOCK,), LOW, A)
        high_r = tl.full((BLOCK,), LOW, A)
        for begin in range(0, V, BLOCK):
            j = begin + tl.arange(0, BLOCK)
            z = transformed(tl.load(row_x + j, mask=j < V, other=LOW).to(A), scale, cap, TRANSFORM)
            r = tl.load(row_r + j, mask=j < V, other=LOW).to(A)
            high_z = tl.maximum(high_z, z)
            high_r = tl.maximum(high_r, tl.where(z == LOW, LOW, r))
        max_z = tl.max(high_z, 0)
        max_r = tl.max(high_r, 0)
        max_z = tl.where(max_z == LOW, 0.0, max_z).to(A)
        max_r = tl.where(max_r == LOW, 0.0, max_r).to(A)
        zero = tl.zeros((BLOCK,), A)
        sum_e, sum_f, sum_ed, sum_eg, sum_fd, sum_fg = zero, zero, zero, zero, zero, zero
        for begin in range(0, V, BLOCK):
            j = begin + tl.arange(0, BLOCK)
            z = transformed(tl.load(row_x + j, mask=j < V, other=LOW).to(A), scale, cap, TRANSFORM)
            r = tl.load(row_r + j, mask=j < V, other=LOW).to(A)
            out = z == LOW
            e, f, d = apart(tl.where(out, max_z, z), tl.where(out, max_r, r), max_z, max_r, by, A)
            e, f = tl.where(out, 0.0, e), tl.where(out, 0.0, f)
            d = tl.where(out, 0.0, d)
            ed = weighted(e, d)
            small = tl.abs(d) < 0.5
            series = e * g_of_minus(tl.where(small, d, 0.0))
            sum_e += e
            sum_f += f
            sum_ed += ed
            sum_eg += tl.where(small, series, f - e + ed)
            if REVERSE:
                fd = weighted(f, d)
                sum_fd += fd
                sum_fg += tl.where(small, (ed - series) * d - series, e - f - fd)
        e, f = tl.sum(sum_e.to(tl.float64), 0), tl.sum(sum_f.to(tl.float64), 0)
        by_d = number(temperature, 0)
        ed, fd = tl.sum(sum_ed.to(tl.float64), 0) / e, tl.sum(sum_fd.to(tl.float64), 0) / f
        eg, fg = tl.sum(sum_eg.to(tl.float64), 0) / e, tl.sum(sum_fg.to(tl.float64), 0) / f
        y_ = fg + fd
        near = (fg < 0.5) & (tl.abs(y_) < 0.5)
        put(found, 0, row, rows, max_z)
        put(found, 1, row, rows, max_r)
        put(found, 2, row, rows, by_d / f)
        put(found, 3, row, rows, by_d / e)
        put(found, 4, row, rows, tl.where(near, log1p(tl.where(near, y_, 0.0)), tl.log(e / f)))
        put(found, 5, row, rows, divergence_of(ed, eg, f / e))
        put(found, 6, row, rows, divergence_of(-fd, fg, e / f))
