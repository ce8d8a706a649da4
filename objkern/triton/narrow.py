"""Rows of few classes: several rows a program, each whole in registers.

    V ≤ 32      a row a thread: (COLS, ROWS), sums along the class axis 0 cost no exchange, and the row epilogue
                follows in the same kernel
    V ≤ 1024    (ROWS, COLS), sums along axis 1; the row epilogue is a kernel of its own, one row per lane, because
                here all threads of a row would repeat it

COLS is the next power of two. `CLASSES` is the class axis of the tiles.
"""

import triton
import triton.language as tl

from . import epilogue
from .elementary import ANYWHERE, RUN_TIME, exp, lowest, number, zero_of
from .elements import gradient_of, transformed
from .epilogue import label_weight, read_row, read_row_gradient
from .objective import Piece, RowGradient, centre


@triton.jit
def along_rows(v, CLASSES: tl.constexpr):
    """A number per row, to broadcast against a tile."""
    if CLASSES == 0:
        return v[None, :]
    else:
        return v[:, None]


@triton.jit
def along_classes(v, CLASSES: tl.constexpr):
    """A number per class, to broadcast against a tile."""
    if CLASSES == 0:
        return v[:, None]
    else:
        return v[None, :]


@triton.jit
def row_sums(
    z, column, row, w, q, V, A: tl.constexpr, MASKED: tl.constexpr, SMOOTHED: tl.constexpr, EXACT: tl.constexpr,
    CLASSES: tl.constexpr,
):  # fmt: skip
    """A tile of z, −inf past the last class, to the sums over the others, and z_y. What nobody reads is not computed.

    column: the classes, along their axis. w, q: class weights and dense target, or None. EXACT: exp to its last digit,
    because what `tl.exp` drops has little to average out over in a few classes of float32.
    """
    y = along_rows(row.y, CLASSES)
    own = column == y
    # A sum, because a maximum may drop a NaN.
    target = tl.sum(tl.where(own, z, 0.0), CLASSES)
    target = tl.where(row.y >= 0, target, float("-inf"))
    others = tl.where(own, float("-inf"), z)
    out = others == float("-inf")
    top = tl.maximum(tl.max(others, CLASSES), lowest(A))
    apart = others - along_rows(top, CLASSES)
    e = tl.where(out, 0.0, exp(apart) if EXACT else tl.exp(apart))
    t = tl.where(out, 0.0, tl.where(apart < lowest(A), lowest(A), apart))
    n = tl.sum(tl.where(out, 0.0, 1.0).to(A), CLASSES)
    sum_t = tl.sum(t, CLASSES)
    mean = sum_t / tl.maximum(n, 1.0)
    d = tl.where(out, 0.0, t - along_rows(mean, CLASSES))
    finite = tl.where(out, 0.0, others)
    earlier = (others == along_rows(target, CLASSES)) & (column < y) & (out == 0)
    before = tl.max(tl.where(earlier, 1.0, 0.0).to(A), CLASSES)
    zero = zero_of(n)
    sum_w, sum_wt, sum_q, sum_qt = zero, zero, zero, zero
    if w is not None or q is not None:
        if w is None:
            weight = tl.where(out, 1.0, 1.0).to(A)
        else:
            weight = w
        if MASKED:
            left_out = out
            t_w = t
        else:
            left_out = own | (column >= V)
            t_w = tl.where(out & (left_out == 0), float("-inf"), t)
        weight = tl.where(left_out, 0.0, weight)
        sum_w = tl.sum(weight, CLASSES)
        sum_wt = tl.sum(tl.where(left_out, 0.0, weight * t_w), CLASSES)
        if q is not None:
            lifted = left_out
            if SMOOTHED:
                lifted = left_out | (out & (q == 0))
            sum_q = tl.sum(tl.where(left_out, 0.0, weight * q), CLASSES)
            sum_qt = tl.sum(tl.where(lifted, 0.0, weight * q * t_w), CLASSES)
    piece = Piece(
        max=top, e=tl.sum(e, CLASSES), before=before, et=tl.sum(e * t, CLASSES), t=sum_t, n=n,
        zz=tl.sum(finite * finite, CLASSES), dd=tl.sum(d * d, CLASSES), w=sum_w, wt=sum_wt, q=sum_q, qt=sum_qt,
    )  # fmt: skip
    return piece, target


@triton.jit
def coefficients_along_rows(g, CLASSES: tl.constexpr):
    return RowGradient(
        max=along_rows(g.max, CLASSES), target_grad=along_rows(g.target_grad, CLASSES),
        exp_1=along_rows(g.exp_1, CLASSES), exp_t=along_rows(g.exp_t, CLASSES),
        const_1=along_rows(g.const_1, CLASSES), const_z=along_rows(g.const_z, CLASSES),
        const_t=along_rows(g.const_t, CLASSES), const_w=along_rows(g.const_w, CLASSES),
        const_q=along_rows(g.const_q, CLASSES), max_grad=along_rows(g.max_grad, CLASSES),
    )  # fmt: skip


@triton.jit
def row_gradients(
    z, column, row, w, q, g, gain, cap, A: tl.constexpr, DEPTH: tl.constexpr, TRANSFORM: tl.constexpr,
    MASKED: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """A tile of dL/dx."""
    own = column == along_rows(row.y, CLASSES)
    g = coefficients_along_rows(g, CLASSES)
    if w is None:
        weight = tl.where(own, 1.0, 1.0).to(A)
    else:
        weight = w
    if q is None:
        dense = weight
    else:
        dense = q
    if DEPTH == 3:  # the first maximum of the others
        best = (z == g.max) & (own == 0)
        first = tl.min(tl.where(best, column, 2147483647), CLASSES)
        extra = tl.where(column == along_rows(first, CLASSES), g.max_grad, 0.0)
        if TRANSFORM == 2:
            ratio = g.max / cap
            extra = extra * (gain * (1.0 - ratio * ratio))
        elif TRANSFORM == 1:
            extra = extra * gain
    d = gradient_of(z, weight, dense, g, gain, cap, A, DEPTH, TRANSFORM, MASKED, w is not None, q is not None)
    if DEPTH == 3:
        d = d + extra
    own_d = g.target_grad
    if TRANSFORM == 2:
        ratio = z / cap
        own_d = own_d * tl.where(z == float("-inf"), gain, gain * (1.0 - ratio * ratio))
    elif TRANSFORM == 1:
        own_d = own_d * gain
    if MASKED:
        own_d = tl.where(z == float("-inf"), 0.0, own_d)
    d = tl.where(own, own_d, d)
    return tl.where(along_rows(row.ignored, CLASSES), 0.0, d)


@triton.jit
def read_rows(x, row, row_stride, class_stride, column, V, A: tl.constexpr, PAD: tl.constexpr, CLASSES: tl.constexpr):
    """class_stride is 1. As a number that the compiler does not know, at class axis 0, it leaves a row to a thread,
    whose loads meet in the first-level cache; known, neighbours in a row would go to neighbouring threads.
    """
    index, there = along_rows(row.index, CLASSES), along_rows(row.there, CLASSES)
    place = x + index * row_stride
    if CLASSES == 0:
        place += column * class_stride
    else:
        place += column
    return tl.load(place, mask=there & (column < V), other=PAD).to(A)


@triton.jit
def read_weights(class_weight, column, V, A: tl.constexpr):
    return tl.load(class_weight + column, mask=column < V, other=0.0).to(A)


@triton.jit
def write_rows(gradient, row, column, V, d, CLASSES: tl.constexpr):
    place = gradient + along_rows(row.index, CLASSES) * V + column
    mask = along_rows(row.there, CLASSES) & (column < V)
    tl.store(place, d.to(gradient.dtype.element_ty), mask=mask)


@triton.jit
def read_scale(logit_scale, transform, A: tl.constexpr):
    """The logit scale, from the device or from the call, and the cap."""
    if logit_scale is None:
        scale = number(transform, 0).to(A)
    else:
        scale = tl.load(logit_scale).to(A)
    return scale, number(transform, 1).to(A)


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=ANYWHERE)
def few_kernel(
    x, target, dense, class_weight, logit_scale, transform, scales, values, loss, row_gradient, gradient,
    rows: tl.int64, row_stride: tl.int64, dense_stride: tl.int64, class_stride: tl.int64, ignore_index: tl.int64,
    V: tl.int32, A: tl.constexpr, TASK: tl.constexpr, TERMS: tl.constexpr, READS: tl.constexpr, DEPTH: tl.constexpr,
    TRANSFORM: tl.constexpr, MASKED: tl.constexpr, SMOOTHED: tl.constexpr, PER_ROW: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """TASK 0: values and row gradient; 1: and the gradient; 2: statistics to `values` and centred sums to `loss`."""
    DENSE: tl.constexpr = dense is not None
    WEIGHTED: tl.constexpr = class_weight is not None
    program = tl.program_id(0)
    row = read_row(program.to(tl.int64) * ROWS + tl.arange(0, ROWS), rows, target, ignore_index, V)
    column = along_classes(tl.arange(0, COLS), 0)
    scale, cap = read_scale(logit_scale, transform, A)
    x_ = read_rows(x, row, row_stride, class_stride, column, V, A, float("-inf"), 0)
    z = transformed(x_, scale, cap, TRANSFORM)
    w = read_weights(class_weight, column, V, A) if class_weight is not None else None
    q = read_rows(dense, row, dense_stride, class_stride, column, V, A, 0.0, 0) if dense is not None else None
    EXACT: tl.constexpr = x.dtype.element_ty == tl.float32
    piece, z_y = row_sums(z, column, row, w, q, V, A, MASKED, SMOOTHED, EXACT, 0)
    row_weight = label_weight(row, class_weight, A)
    c = centre(piece, z_y, row.y >= 0, row_weight, V, MASKED, (WEIGHTED or DENSE) and DEPTH == 3)
    if TASK == 2:
        epilogue.statistics(c, None, row, rows, values, loss, DENSE)
    else:
        g = epilogue.objective(
            c, None, row, row_weight, rows, program, tl.num_programs(0), scales, values, loss, row_gradient, TERMS,
            READS, DEPTH, DENSE, WEIGHTED, PER_ROW, PARTS, True,
        )  # fmt: skip
        if TASK == 1:
            d = row_gradients(z, column, row, w, q, g, scale, cap, A, DEPTH, TRANSFORM, MASKED, 0)
            write_rows(gradient, row, column, V, d, 0)


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=ANYWHERE)
def narrow_collect_kernel(
    x, target, dense, class_weight, logit_scale, transform, pieces, rows: tl.int64, row_stride: tl.int64,
    dense_stride: tl.int64, ignore_index: tl.int64, V: tl.int32, A: tl.constexpr, DEPTH: tl.constexpr,
    TRANSFORM: tl.constexpr, MASKED: tl.constexpr, SMOOTHED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Pieces (fields, 1, rows) of type A, as those of `collect_kernel` in wide.py."""
    row = read_row(tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), rows, target, ignore_index, V)
    column = along_classes(tl.arange(0, COLS), 1)
    scale, cap = read_scale(logit_scale, transform, A)
    z = transformed(read_rows(x, row, row_stride, 1, column, V, A, float("-inf"), 1), scale, cap, TRANSFORM)
    w = read_weights(class_weight, column, V, A) if class_weight is not None else None
    q = read_rows(dense, row, dense_stride, 1, column, V, A, 0.0, 1) if dense is not None else None
    piece, _ = row_sums(z, column, row, w, q, V, A, MASKED, SMOOTHED, False, 1)
    epilogue.put_piece(pieces + row.index, rows, row.there, piece, DEPTH)


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=ANYWHERE)
def narrow_gradient_kernel(
    x, target, dense, class_weight, logit_scale, transform, row_gradient, upstream, gradient, rows: tl.int64,
    row_stride: tl.int64, dense_stride: tl.int64, class_stride: tl.int64, upstream_stride: tl.int64,
    ignore_index: tl.int64, V: tl.int32, A: tl.constexpr, DEPTH: tl.constexpr, TRANSFORM: tl.constexpr,
    MASKED: tl.constexpr, UNSCALED: tl.constexpr, RESCALE: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """The gradient under `upstream` (one number for all rows at stride 0). RESCALE: where that is 1, it is there."""
    if RESCALE:
        if tl.load(upstream).to(A) == 1.0:
            return
    row = read_row(tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), rows, target, ignore_index, V)
    column = along_classes(tl.arange(0, COLS), CLASSES)
    scale, cap = read_scale(logit_scale, transform, A)
    x_ = read_rows(x, row, row_stride, class_stride, column, V, A, float("-inf"), CLASSES)
    z = transformed(x_, scale, cap, TRANSFORM)
    w = read_weights(class_weight, column, V, A) if class_weight is not None else None
    q = read_rows(dense, row, dense_stride, class_stride, column, V, A, 0.0, CLASSES) if dense is not None else None
    u = tl.load(upstream + row.index * upstream_stride, mask=row.there, other=0.0).to(A)
    g = read_row_gradient(row_gradient, row, rows, u, A, DEPTH)
    gain = scale
    if UNSCALED:
        gain = zero_of(scale) + 1.0
    d = row_gradients(z, column, row, w, q, g, gain, cap, A, DEPTH, TRANSFORM, MASKED, CLASSES)
    write_rows(gradient, row, column, V, d, CLASSES)
