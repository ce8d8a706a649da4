"""The row epilogue: from centred sums to values, statistics and the coefficients of the gradient.

It serves one row (numbers) and many rows (blocks) alike, and is called by the kernels of narrow.py and wide.py.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .elementary import ANYWHERE, RUN_TIME, zero_of
from .elements import transformed
from .objective import Centred, Divergence, RowGradient, Share, Statistics, add_term, chain, derive, odds_of, share_of


class Row(NamedTuple):
    """A row's place and label: y is −1 where there is none; a bad one is a label, and nothing is read by it."""

    index: tl.tensor
    there: tl.tensor
    y: tl.tensor
    ignored: tl.tensor
    bad: tl.tensor


@triton.jit
def read_row(index, rows, target, ignore_index, V):
    """Row `index` of `rows`; target: (rows) int64 labels or None."""
    there = index < rows
    if target is None:
        never = index < 0
        return Row(index=index, there=there, y=tl.where(there, -1, -1).to(tl.int32), ignored=never, bad=never)
    else:
        label = tl.load(target + index, mask=there, other=0)
        ignored = label == ignore_index
        good = (label >= 0) & (label < V)
        return Row(
            index=index, there=there, y=tl.where(good & (ignored == 0), label, -1).to(tl.int32), ignored=ignored,
            bad=(ignored == 0) & (good == 0),
        )  # fmt: skip


@triton.jit
def of_a_part(row):
    """The row where the classes may be a part of the vocabulary: a label outside of it is that of another part, and
    what was kept of a bad one is NaN already.
    """
    return Row(index=row.index, there=row.there, y=row.y, ignored=row.ignored, bad=row.index < 0)


@triton.jit
def target_logit(row, x, row_stride, scale, cap, A: tl.constexpr, TRANSFORM: tl.constexpr):
    """z_y, and −inf where there is no label."""
    has = row.there & (row.y >= 0)
    place = x + row.index * row_stride + tl.where(has, row.y, 0)
    z = tl.load(place, mask=has, other=float("-inf")).to(A)
    return tl.where(has, transformed(z, scale, cap, TRANSFORM), float("-inf"))


@triton.jit
def label_weight(row, class_weight, A: tl.constexpr):
    """w_y, and 1 where there are no weights or no label."""
    has = row.there & (row.y >= 0)
    if class_weight is None:
        return tl.where(has, 1.0, 1.0).to(A)
    else:
        return tl.load(class_weight + tl.where(has, row.y, 0), mask=has, other=1.0).to(A)


@triton.jit
def kept(row, value):
    """0 in ignored rows, NaN where the label is bad."""
    return tl.where(row.bad, float("nan"), tl.where(row.ignored, 0.0, value))


@triton.jit
def put(out, field, row, rows, value):
    """Field `field` of (fields, rows)."""
    tl.store(out + field * rows + row.index, kept(row, value).to(out.dtype.element_ty), mask=row.there)


@triton.jit
def put_sum(out, field, program, programs, row, value, BLOCK: tl.constexpr):
    """The sum over the program's rows, float64, to (fields, programs)."""
    value = tl.where(row.there, kept(row, value), 0.0).to(tl.float64)
    if BLOCK:
        value = tl.sum(value, 0)
    tl.store(out + field * programs + program, value)


@triton.jit
def read_divergence(divergence, row, rows, like):
    """What `compare_kernel` left of rows, and zeros without a reference."""
    if divergence is None:
        zero = zero_of(like)
        return Divergence(
            max_z=zero, max_r=zero, to_p=zero, to_q=zero, log_ratio=zero, forward=zero, reverse=zero
        )  # fmt: skip
    else:
        p = divergence + row.index
        mask = row.there & (row.ignored == 0)
        A: tl.constexpr = like.dtype
        return Divergence(
            max_z=tl.load(p, mask=mask, other=0.0).to(A),
            max_r=tl.load(p + rows, mask=mask, other=0.0).to(A),
            to_p=tl.load(p + 2 * rows, mask=mask, other=0.0).to(A),
            to_q=tl.load(p + 3 * rows, mask=mask, other=0.0).to(A),
            log_ratio=tl.load(p + 4 * rows, mask=mask, other=0.0).to(A),
            forward=tl.load(p + 5 * rows, mask=mask, other=0.0).to(A),
            reverse=tl.load(p + 6 * rows, mask=mask, other=0.0).to(A),
        )  # fmt: skip


@triton.jit
def put_share(out, row, rows, share):
    """The last five fields of RowGradient in csrc/objective.h."""
    for k in tl.static_range(5):
        put(out, 10 + k, row, rows, share[k])


@triton.jit
def read_share(kept_, row, rows, upstream):
    p = kept_ + 10 * rows + row.index
    return Share(
        max_z=tl.load(p), max_r=tl.load(p + rows), of_p=tl.load(p + 2 * rows) * upstream,
        of_pd=tl.load(p + 3 * rows) * upstream, of_q=tl.load(p + 4 * rows) * upstream,
    )  # fmt: skip


@triton.jit
def objective(
    c, divergence, row, row_weight, rows, program, programs, scales, values, loss, row_gradient, TERMS: tl.constexpr,
    READS: tl.constexpr, DEPTH: tl.constexpr, DENSE: tl.constexpr, WEIGHTED: tl.constexpr, PER_ROW: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores values and row gradient of rows, and returns the latter.

    scales: see `prepare` in reduce.py. values: (terms + free statistics, rows) if PER_ROW, else float64 sums
    (.., programs); the free statistics if PARTS, the terms if PARTS or not PER_ROW. loss: (rows) if PER_ROW.
    """
    A: tl.constexpr = c.sum_e.dtype
    COUNT: tl.constexpr = len(TERMS)
    READS_ALL: tl.constexpr = (READS | 4) if PARTS else READS
    o = odds_of(c)
    zero = zero_of(c.sum_e)
    v = read_divergence(divergence, row, rows, zero)
    s = derive(c, o, v, DENSE, READS_ALL)
    f = Statistics(
        logprob=zero, other_logprob=zero, lse=zero, entropy=zero, max_logit=zero, mean_logit=zero,
        mean_square_logit=zero, logit_variance=zero, target_logit=zero, mean_logprob=zero, forward_kl=zero,
        reverse_kl=zero,
    )  # fmt: skip
    total = zero.to(tl.float64)
    for k in tl.static_range(COUNT):
        scale = tl.load(scales + k)
        parameter = tl.load(scales + 2 * COUNT + k).to(A)
        value, f = add_term(TERMS[k], parameter, row_weight, scale.to(A), s, f)
        if PER_ROW:
            total += scale * value.to(tl.float64)
            if PARTS:
                put(values, k, row, rows, value)
        else:
            put_sum(values, k, program, programs, row, value, BLOCK)
    if PER_ROW:
        put(loss, 0, row, rows, total)
    if PARTS:
        if PER_ROW:
            put(values, COUNT, row, rows, s.lse)
            put(values, COUNT + 1, row, rows, c.target_is_max)
            put(values, COUNT + 2, row, rows, o.p_target)
        else:
            put_sum(values, COUNT, program, programs, row, s.lse, BLOCK)
            put_sum(values, COUNT + 1, program, programs, row, c.target_is_max, BLOCK)
            put_sum(values, COUNT + 2, program, programs, row, o.p_target, BLOCK)
    g = chain(c, o, s, f, READS, DENSE, WEIGHTED)
    put_row_gradient(row_gradient, row, rows, g, DEPTH)
    if divergence is not None:
        put_share(row_gradient, row, rows, share_of(v, f))
    poison = tl.where(row.bad, float("nan"), 0.0).to(A)
    return RowGradient(
        max=g.max + poison, target_grad=g.target_grad, exp_1=g.exp_1 + poison, exp_t=g.exp_t,
        const_1=g.const_1 + poison, const_z=g.const_z, const_t=g.const_t, const_w=g.const_w, const_q=g.const_q,
        max_grad=g.max_grad,
    )  # fmt: skip


@triton.jit
def put_row_gradient(out, row, rows, g, DEPTH: tl.constexpr):
    """As many fields as the depth has, `kFieldsOfDepth` of csrc/objective.h."""
    put(out, 0, row, rows, g.max)
    put(out, 1, row, rows, g.target_grad)
    put(out, 2, row, rows, g.exp_1)
    if DEPTH >= 1:
        put(out, 3, row, rows, g.exp_t)
        put(out, 4, row, rows, g.const_1)
    if DEPTH >= 2:
        put(out, 5, row, rows, g.const_z)
    if DEPTH == 3:
        put(out, 6, row, rows, g.const_t)
        put(out, 7, row, rows, g.const_w)
        put(out, 8, row, rows, g.const_q)
        put(out, 9, row, rows, g.max_grad)


@triton.jit
def read_row_gradient(kept_, row, rows, upstream, A: tl.constexpr, DEPTH: tl.constexpr):
    """The coefficients of rows, times the upstream gradient; 0 where the depth has none."""
    p = kept_ + row.index
    top = tl.load(p, mask=row.there, other=0.0)
    zero = tl.where(row.there, 0.0, 0.0).to(A)
    target_grad = tl.load(p + rows, mask=row.there, other=0.0) * upstream
    exp_1 = tl.load(p + 2 * rows, mask=row.there, other=0.0) * upstream
    exp_t, const_1, const_z, const_t, const_w, const_q, max_grad = zero, zero, zero, zero, zero, zero, zero
    if DEPTH >= 1:
        exp_t = tl.load(p + 3 * rows, mask=row.there, other=0.0) * upstream
        const_1 = tl.load(p + 4 * rows, mask=row.there, other=0.0) * upstream
    if DEPTH >= 2:
        const_z = tl.load(p + 5 * rows, mask=row.there, other=0.0) * upstream
    if DEPTH == 3:
        const_t = tl.load(p + 6 * rows, mask=row.there, other=0.0) * upstream
        const_w = tl.load(p + 7 * rows, mask=row.there, other=0.0) * upstream
        const_q = tl.load(p + 8 * rows, mask=row.there, other=0.0) * upstream
        max_grad = tl.load(p + 9 * rows, mask=row.there, other=0.0) * upstream
    return RowGradient(
        max=top, target_grad=target_grad, exp_1=exp_1, exp_t=exp_t, const_1=const_1, const_z=const_z,
        const_t=const_t, const_w=const_w, const_q=const_q, max_grad=max_grad,
    )  # fmt: skip


@triton.jit
def put_piece(p, field, mask, piece, DEPTH: tl.constexpr):
    """Stores as many fields of a piece as the depth has, `field` apart."""
    FIELDS: tl.constexpr = 12 if DEPTH == 3 else (3 if DEPTH == 0 else 5 + DEPTH)
    for k in tl.static_range(FIELDS):
        tl.store(p + k * field, piece[k], mask=mask)


@triton.jit
def statistics(c, divergence, row, rows, out, centred, DENSE: tl.constexpr):
    """Stores the statistics (12, rows) and the centred sums (21, rows), both float64."""
    v = read_divergence(divergence, row, rows, zero_of(c.sum_e))
    s = derive(c, odds_of(c), v, DENSE, 1023)
    for k in tl.static_range(12):
        put(out, k, row, rows, s[k])
    for k in tl.static_range(14):
        put(centred, k, row, rows, c[k])
    for k in tl.static_range(7):
        put(centred, 14 + k, row, rows, v[k])


@triton.jit
def read_centred(centred, row, rows, A: tl.constexpr):
    p = centred + row.index
    return Centred(
        max=tl.load(p, mask=row.there, other=0.0).to(A),
        sum_e=tl.load(p + rows, mask=row.there, other=1.0).to(A),
        sum_et=tl.load(p + 2 * rows, mask=row.there, other=0.0).to(A),
        sum_t=tl.load(p + 3 * rows, mask=row.there, other=0.0).to(A),
        sum_dd=tl.load(p + 4 * rows, mask=row.there, other=0.0).to(A),
        sum_zz=tl.load(p + 5 * rows, mask=row.there, other=0.0).to(A),
        sum_w=tl.load(p + 6 * rows, mask=row.there, other=0.0).to(A),
        sum_wt=tl.load(p + 7 * rows, mask=row.there, other=0.0).to(A),
        sum_q=tl.load(p + 8 * rows, mask=row.there, other=0.0).to(A),
        sum_qt=tl.load(p + 9 * rows, mask=row.there, other=0.0).to(A),
        classes=tl.load(p + 10 * rows, mask=row.there, other=1.0).to(A),
        target=tl.load(p + 11 * rows, mask=row.there, other=0.0).to(A),
        target_weight=tl.load(p + 12 * rows, mask=row.there, other=0.0).to(A),
        target_is_max=tl.load(p + 13 * rows, mask=row.there, other=0.0).to(A),
    )


@triton.jit
def read_partials(partials, row, rows, A: tl.constexpr):
    p = partials + row.index
    return Statistics(
        logprob=tl.load(p, mask=row.there, other=0.0).to(A),
        other_logprob=tl.load(p + rows, mask=row.there, other=0.0).to(A),
        lse=tl.load(p + 2 * rows, mask=row.there, other=0.0).to(A),
        entropy=tl.load(p + 3 * rows, mask=row.there, other=0.0).to(A),
        max_logit=tl.load(p + 4 * rows, mask=row.there, other=0.0).to(A),
        mean_logit=tl.load(p + 5 * rows, mask=row.there, other=0.0).to(A),
        mean_square_logit=tl.load(p + 6 * rows, mask=row.there, other=0.0).to(A),
        logit_variance=tl.load(p + 7 * rows, mask=row.there, other=0.0).to(A),
        target_logit=tl.load(p + 8 * rows, mask=row.there, other=0.0).to(A),
        mean_logprob=tl.load(p + 9 * rows, mask=row.there, other=0.0).to(A),
        forward_kl=tl.load(p + 10 * rows, mask=row.there, other=0.0).to(A),
        reverse_kl=tl.load(p + 11 * rows, mask=row.there, other=0.0).to(A),
    )


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=ANYWHERE)
def chain_kernel(
    row_gradient, centred, partials, target, rows: tl.int64, ignore_index: tl.int64, V: tl.int32, A: tl.constexpr,
    DENSE: tl.constexpr, WEIGHTED: tl.constexpr, BESIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Centred sums and ∂L/∂statistics ─▶ the coefficients of the gradient; one row per lane. BESIDE: a reference."""
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = of_a_part(read_row(index, rows, target, ignore_index, V))
    c = read_centred(centred, row, rows, A)
    o = odds_of(c)
    v = read_divergence(centred + 14 * rows if BESIDE else None, row, rows, zero_of(c.sum_e))
    s = derive(c, o, v, DENSE, 1023)
    f = read_partials(partials, row, rows, A)
    put_row_gradient(row_gradient, row, rows, chain(c, o, s, f, 1023, DENSE, WEIGHTED), 3)
    if BESIDE:
        put_share(row_gradient, row, rows, share_of(v, f))
