"""Rows of many classes: whole rows, or pieces of them, by one program, in tiles of 16-byte vectors.

Where a row begins is anybody's guess (an odd V, a stride), so a row is

    head        the at most E − 1 elements before the first 16-byte boundary of its address
    body        vectors of E elements from there: 128-bit accesses, whatever V and stride are
    tail        the at most E − 1 elements after the last whole vector

For E = 8 (bfloat16) and a row of 1003 elements that begins 6 bytes past a boundary: head 5, body 124 vectors, tail 6.
Head and tail are one small tile of their own, the "ends".
"""

import triton
import triton.language as tl

from . import epilogue
from .compare import share_at
from .elementary import ANYWHERE, RUN_TIME, lowest, number, zero_of
from .elements import add, add_carefully, fold, gradient_of, no_lanes, slope, transformed
from .epilogue import label_weight, read_row, read_row_gradient, read_share, target_logit
from .narrow import read_scale
from .objective import Piece, centre, merge


@triton.jit
def head_of(p, E: tl.constexpr):
    """How many elements lie before the first 16-byte boundary at or after p."""
    SIZE: tl.constexpr = 16 // E
    return (((16 - (p.to(tl.int64) & 15)) & 15) // SIZE).to(tl.int32)


@triton.jit
def place_in_ends(k, head, V, E: tl.constexpr):
    """The class of element k of the ends (E for the head, E for the tail), and V where there is none."""
    tail = (V - head) // E * E + head  # where the tail begins
    last = tail + k - E
    return tl.where(k < E, tl.where((k < head) & (k < V), k, V), tl.where(last < V, last, V))


@triton.jit
def tile_places(tile, R: tl.constexpr, E: tl.constexpr):
    """(R, 1) vectors and (R, E) elements of a tile, counted from the body's beginning."""
    vector = tile * R + tl.arange(0, R)
    return vector[:, None], vector[:, None] * E + tl.arange(0, E)[None, :]


@triton.jit
def weights_at(class_weight, dense_row, j, mask, A: tl.constexpr):
    """w_j and q_j of classes j; 1 where there is none."""
    one = tl.where(mask, 1.0, 1.0).to(A)
    w, q = one, one
    if class_weight is not None:
        w = tl.load(class_weight + j, mask=mask, other=0.0).to(A)
    if dense_row is not None:
        q = tl.load(dense_row + j, mask=mask, other=0.0).to(A)
    return w, q


@triton.jit
def collect_vectors(
    body, head, first, last, vectors, y, class_weight, dense_row, scale, cap, A: tl.constexpr, DEPTH: tl.constexpr,
    TRANSFORM: tl.constexpr, MASKED: tl.constexpr, SMOOTHED: tl.constexpr, CAREFUL: tl.constexpr, R: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """The sums over tiles [first, last) of the body, of which some vectors of the last may not exist.

    All but the target's tile and an unfinished one go the short way, and those two go the careful one after them.
    """
    WEIGHTED: tl.constexpr = class_weight is not None
    DENSE: tl.constexpr = dense_row is not None
    s = no_lanes(R, A)
    full = tl.minimum(last, vectors // R)
    own = tl.where(y >= head, (y - head) // (R * E), -1)  # the target's tile
    if CAREFUL == 0:
        for tile in range(first, full):
            if tile != own:
                _, element = tile_places(tile, R, E)
                s = add(s, transformed(tl.load(body + element).to(A), scale, cap, TRANSFORM), A, DEPTH)
        # Tile `own` if it is among the full ones, then the unfinished one if it is ours.
        begin = tl.where((own >= first) & (own < full), 0, 1)
        end = tl.where((full >= first) & (full < last), 2, 1)
    else:
        begin = first
        end = last
    for i in range(begin, end):
        tile = i
        if CAREFUL == 0:
            tile = tl.where(i == 0, own, full)
        vector, element = tile_places(tile, R, E)
        here = vector < vectors
        x = tl.load(body + element, mask=here, other=float("-inf")).to(A)
        z = transformed(x, scale, cap, TRANSFORM)
        there = here & (element + head != y)
        z = tl.where(there, z, float("-inf"))
        w, q = weights_at(class_weight, dense_row, element + head, there, A)
        s = add_carefully(s, z, w, q, there, A, DEPTH, MASKED, WEIGHTED, DENSE, SMOOTHED)
    return fold(s, A, DEPTH)


@triton.jit
def collect_ends(
    row_x, head, y, class_weight, dense_row, scale, cap, V, A: tl.constexpr, DEPTH: tl.constexpr,
    TRANSFORM: tl.constexpr, MASKED: tl.constexpr, SMOOTHED: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    j = place_in_ends(tl.arange(0, 2 * E), head, V, E)[None, :]
    there = (j < V) & (j != y)
    z = transformed(tl.load(row_x + j, mask=there, other=float("-inf")).to(A), scale, cap, TRANSFORM)
    w, q = weights_at(class_weight, dense_row, j, there, A)
    s = add_carefully(
        no_lanes(1, A), z, w, q, there, A, DEPTH, MASKED, class_weight is not None, dense_row is not None, SMOOTHED
    )
    return fold(s, A, DEPTH)


@triton.jit
def first_place(
    row_x, head, y, z, scale, cap, V, A: tl.constexpr, TRANSFORM: tl.constexpr, R: tl.constexpr, E: tl.constexpr
):
    """The first class other than y whose logit is z; 2³¹ − 1 if there is none. For the rare row that asks."""
    body = tl.multiple_of(row_x + head, 16)
    vectors = (V - head) // E
    found = tl.full((R, E), 2147483647, tl.int32)
    for tile in range(0, (vectors + R - 1) // R):
        vector, element = tile_places(tile, R, E)
        x = tl.load(body + element, mask=vector < vectors, other=float("nan")).to(A)
        same = (transformed(x, scale, cap, TRANSFORM) == z) & (element + head != y)
        found = tl.minimum(found, tl.where(same, element + head, 2147483647))
    j = place_in_ends(tl.arange(0, 2 * E), head, V, E)
    x = tl.load(row_x + j, mask=j < V, other=float("nan")).to(A)
    same = (transformed(x, scale, cap, TRANSFORM) == z) & (j != y)
    return tl.minimum(tl.min(tl.min(found, 1), 0), tl.min(tl.where(same, j, 2147483647), 0))


@triton.jit
def collect(
    row_x, y, z_y, class_weight, dense_row, scale, cap, piece_index, pieces, V, A: tl.constexpr, DEPTH: tl.constexpr,
    TRANSFORM: tl.constexpr, MASKED: tl.constexpr, SMOOTHED: tl.constexpr, PLACES: tl.constexpr, R: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """The sums over piece `piece_index` of `pieces` of a row; the last one has the row's ends.

    PLACES: somebody asks whether the target is the first maximum.
    """
    head = tl.minimum(head_of(row_x, E), V)
    body = tl.multiple_of(row_x + head, 16)
    vectors = (V - head) // E
    tiles = (vectors + R - 1) // R
    share = (tiles + pieces - 1) // pieces
    first = tl.minimum(piece_index * share, tiles)
    last = tl.minimum(first + share, tiles)
    CAREFUL: tl.constexpr = DEPTH == 3
    class_weight = class_weight if DEPTH == 3 else None  # read for every element at full depth alone
    found = collect_vectors(
        body, head, first, last, vectors, y, class_weight, dense_row, scale, cap, A, DEPTH, TRANSFORM, MASKED, SMOOTHED,
        CAREFUL, R, E,
    )  # fmt: skip
    if DEPTH == 1 or DEPTH == 2:
        if (found.t > lowest(A)) == 0:  # there was −inf, or NaN
            found = collect_vectors(
                body, head, first, last, vectors, y, class_weight, dense_row, scale, cap, A, DEPTH, TRANSFORM, MASKED,
                SMOOTHED, True, R, E,
            )  # fmt: skip
    if piece_index == pieces - 1:
        ends = collect_ends(
            row_x, head, y, class_weight, dense_row, scale, cap, V, A, DEPTH, TRANSFORM, MASKED, SMOOTHED, E
        )
        found = merge(found, ends, A)
    before = found.before
    if PLACES:
        if z_y == found.max:
            place = first_place(row_x, head, y, z_y, scale, cap, V, A, TRANSFORM, R, E)
            before = tl.where(place < y, 1.0, 0.0).to(A)
    return Piece(
        max=found.max, e=found.e, before=before, et=found.et, t=found.t, n=found.n, zz=found.zz, dd=found.dd,
        w=found.w, wt=found.wt, q=found.q, qt=found.qt,
    )  # fmt: skip


@triton.jit
def write_row(
    row_x, row_out, y, ignored, class_weight, dense_row, row_r, share, by, g, z_y, scale, gain, cap, first, last, V,
    A: tl.constexpr, DEPTH: tl.constexpr, TRANSFORM: tl.constexpr, MASKED: tl.constexpr, ALIGNED: tl.constexpr,
    R: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Tiles [first, last) of a row's gradient; the ends belong to tile 0.

    row_r: the same row of a reference, whose share of the gradient is `share`, or None.
    ALIGNED: logits and gradient begin equally many elements from a boundary of E of theirs; else the stores are
    narrower than the loads.
    """
    class_weight = class_weight if DEPTH == 3 else None  # read for every element at full depth alone
    WEIGHTED: tl.constexpr = class_weight is not None
    DENSE: tl.constexpr = dense_row is not None
    head = tl.minimum(head_of(row_x, E), V)
    body = tl.multiple_of(row_x + head, 16)
    out = row_out + head
    T: tl.constexpr = row_out.dtype.element_ty
    if ALIGNED:
        out = tl.multiple_of(out, E * T.primitive_bitwidth // 8)
    vectors = (V - head) // E
    last = tl.minimum(last, (vectors + R - 1) // R)
    j_ends = place_in_ends(tl.arange(0, 2 * E), head, V, E)[None, :]
    if ignored:
        for tile in range(first, last):
            vector, element = tile_places(tile, R, E)
            tl.store(out + element, tl.zeros((R, E), T), mask=vector < vectors)
        if first == 0:
            tl.store(row_out + j_ends, tl.zeros((1, 2 * E), T), mask=j_ends < V)
    else:
        own_d = g.target_grad * slope(z_y, gain, cap, TRANSFORM) if TRANSFORM != 0 else g.target_grad
        if row_r is not None:
            if y >= 0:
                own_d += share_at(share, z_y, tl.load(row_r + y).to(A), by, gain, cap, A, TRANSFORM)
        if MASKED:
            own_d = tl.where(z_y == float("-inf"), 0.0, own_d)
        max_place = y
        max_extra = g.max_grad
        if DEPTH == 3:
            if g.max_grad != 0:
                max_place = first_place(row_x, head, y, g.max, scale, cap, V, A, TRANSFORM, R, E)
                if TRANSFORM != 0:
                    max_extra = g.max_grad * slope(g.max, gain, cap, TRANSFORM)
        for tile in range(first, last):
            vector, element = tile_places(tile, R, E)
            here = vector < vectors
            z = transformed(tl.load(body + element, mask=here, other=0.0).to(A), scale, cap, TRANSFORM)
            w, q = z, z
            if WEIGHTED or DENSE:
                w, q = weights_at(class_weight, dense_row, element + head, here & (element >= 0), A)
            d = gradient_of(z, w, q, g, gain, cap, A, DEPTH, TRANSFORM, MASKED, WEIGHTED, DENSE)
            if row_r is not None:
                r = tl.load(row_r + element + head, mask=here & (element >= 0), other=0.0).to(A)
                own = share_at(share, z, r, by, gain, cap, A, TRANSFORM)
                d += tl.where(z == float("-inf"), 0.0, own)
            if DEPTH == 3:
                d = tl.where(element + head == max_place, d + max_extra, d)
            begin = tile * (R * E) + head
            if (y >= begin) & (y < begin + R * E):
                d = tl.where(element + head == y, own_d, d)
            tl.store(out + element, d.to(T), mask=here)
        if first == 0:
            there = j_ends < V
            z = transformed(tl.load(row_x + j_ends, mask=there, other=0.0).to(A), scale, cap, TRANSFORM)
            w, q = weights_at(class_weight, dense_row, j_ends, there, A)
            d = gradient_of(z, w, q, g, gain, cap, A, DEPTH, TRANSFORM, MASKED, WEIGHTED, DENSE)
            if row_r is not None:
                r = tl.load(row_r + j_ends, mask=there, other=0.0).to(A)
                own = share_at(share, z, r, by, gain, cap, A, TRANSFORM)
                d += tl.where(z == float("-inf"), 0.0, own)
            if DEPTH == 3:
                d = tl.where(j_ends == max_place, d + max_extra, d)
            d = tl.where(j_ends == y, own_d, d)
            tl.store(row_out + j_ends, d.to(T), mask=there)


# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=ANYWHERE)
def collect_kernel(
    x, target, dense, class_weight, logit_scale, transform, pieces, rows: tl.int64, row_stride: tl.int64,
    dense_stride: tl.int64, ignore_index: tl.int64, V: tl.int32, A: tl.constexpr, DEPTH: tl.constexpr,
    TRANSFORM: tl.constexpr, MASKED: tl.constexpr, SMOOTHED: tl.constexpr, PLACES: tl.constexpr, R: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """Program (row, piece) ─▶ pieces (fields, pieces, rows) of type A: the fields of Piece that the depth has."""
    row = read_row(tl.program_id(0).to(tl.int64), rows, target, ignore_index, V)
    count = tl.num_programs(1)
    if row.ignored == 0:
        scale, cap = read_scale(logit_scale, transform, A)
        z_y = target_logit(row, x, row_stride, scale, cap, A, TRANSFORM)
        dense_row = dense + row.index * dense_stride if dense is not None else None
        found = collect(
            x + row.index * row_stride, row.y, z_y, class_weight, dense_row, scale, cap, tl.program_id(1), count, V,
            A, DEPTH, TRANSFORM, MASKED, SMOOTHED, PLACES, R, E,
        )  # fmt: skip
        epilogue.put_piece(pieces + tl.program_id(1) * rows + row.index, count * rows, True, found, DEPTH)


@triton.jit
def read_piece(pieces, k, count, row, rows, A: tl.constexpr, DEPTH: tl.constexpr):
    p = pieces + k * rows + row.index
    field = count * rows
    mask = row.there & (row.ignored == 0)
    zero = tl.where(mask, 0.0, 0.0).to(A)
    et, t, n, zz, dd, w, wt, q, qt = zero, zero, zero, zero, zero, zero, zero, zero, zero
    if DEPTH >= 1:
        et = tl.load(p + 3 * field, mask=mask, other=0.0)
        t = tl.load(p + 4 * field, mask=mask, other=0.0)
        n = tl.load(p + 5 * field, mask=mask, other=1.0)
    if DEPTH >= 2:
        zz = tl.load(p + 6 * field, mask=mask, other=0.0)
    if DEPTH == 3:
        dd = tl.load(p + 7 * field, mask=mask, other=0.0)
        w = tl.load(p + 8 * field, mask=mask, other=0.0)
        wt = tl.load(p + 9 * field, mask=mask, other=0.0)
        q = tl.load(p + 10 * field, mask=mask, other=0.0)
        qt = tl.load(p + 11 * field, mask=mask, other=0.0)
    return Piece(
        max=tl.load(p, mask=mask, other=0.0), e=tl.load(p + field, mask=mask, other=1.0),
        before=tl.load(p + 2 * field, mask=mask, other=0.0), et=et, t=t, n=n, zz=zz, dd=dd, w=w, wt=wt, q=q, qt=qt,
    )  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=ANYWHERE)
def epilogue_kernel(
    x, target, class_weight, logit_scale, transform, pieces, divergence, scales, values, loss, row_gradient,
    rows: tl.int64, row_stride: tl.int64, ignore_index: tl.int64, V: tl.int32, count: tl.int32, A: tl.constexpr,
    TASK: tl.constexpr, TERMS: tl.constexpr, READS: tl.constexpr, DEPTH: tl.constexpr, TRANSFORM: tl.constexpr,
    MASKED: tl.constexpr, DENSE: tl.constexpr, PER_ROW: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Merges the pieces of rows in their order, one row per lane; TASK as in `few_kernel`, but for 1."""
    WEIGHTED: tl.constexpr = class_weight is not None
    program = tl.program_id(0)
    row = read_row(program.to(tl.int64) * ROWS + tl.arange(0, ROWS), rows, target, ignore_index, V)
    scale, cap = read_scale(logit_scale, transform, A)
    z_y = target_logit(row, x, row_stride, scale, cap, A, TRANSFORM)
    piece = read_piece(pieces, 0, count, row, rows, A, DEPTH)
    for k in range(1, count):
        piece = merge(piece, read_piece(pieces, k, count, row, rows, A, DEPTH), A)
    row_weight = label_weight(row, class_weight, A)
    c = centre(piece, z_y, row.y >= 0, row_weight, V, MASKED, (WEIGHTED or DENSE) and DEPTH == 3)
    if TASK == 2:
        epilogue.statistics(c, divergence, row, rows, values, loss, DENSE)
    else:
        epilogue.objective(
            c, divergence, row, row_weight, rows, program, tl.num_programs(0), scales, values, loss, row_gradient,
            TERMS, READS, DEPTH, DENSE, WEIGHTED, PER_ROW, PARTS, True,
        )  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=ANYWHERE)
def fused_kernel(
    x, target, dense, class_weight, logit_scale, transform, scales, values, row_gradient, gradient, rows: tl.int64,
    row_stride: tl.int64, dense_stride: tl.int64, ignore_index: tl.int64, V: tl.int32, A: tl.constexpr,
    TERMS: tl.constexpr, READS: tl.constexpr, DEPTH: tl.constexpr, TRANSFORM: tl.constexpr, MASKED: tl.constexpr,
    SMOOTHED: tl.constexpr, PARTS: tl.constexpr, ALIGNED: tl.constexpr, R: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """A row a program: sums, epilogue, and the gradient from a second look at the logits, cached by then."""
    DENSE: tl.constexpr = dense is not None
    WEIGHTED: tl.constexpr = class_weight is not None
    row = read_row(tl.program_id(0).to(tl.int64), rows, target, ignore_index, V)
    row_x = x + row.index * row_stride
    dense_row = dense + row.index * dense_stride if dense is not None else None
    scale, cap = read_scale(logit_scale, transform, A)
    z_y = target_logit(row, x, row_stride, scale, cap, A, TRANSFORM)
    PLACES: tl.constexpr = PARTS or (READS & 16) != 0
    found = collect(
        row_x, row.y, z_y, class_weight, dense_row, scale, cap, 0, 1, tl.where(row.ignored, 0, V), A, DEPTH,
        TRANSFORM, MASKED, SMOOTHED, PLACES, R, E,
    )  # fmt: skip
    row_weight = label_weight(row, class_weight, A)
    c = centre(found, z_y, row.y >= 0, row_weight, V, MASKED, (WEIGHTED or DENSE) and DEPTH == 3)
    g = epilogue.objective(
        c, None, row, row_weight, rows, tl.program_id(0), rows, scales, values, None, row_gradient, TERMS, READS, DEPTH,
        DENSE, WEIGHTED, False, PARTS, False,
    )  # fmt: skip
    write_row(
        row_x, gradient + row.index * V, row.y, row.ignored, class_weight, dense_row, None, None, 1.0, g, z_y, scale,
        scale, cap, 0, 2147483647, V, A, DEPTH, TRANSFORM, MASKED, ALIGNED, R, E,
    )  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=ANYWHERE)
def gradient_kernel(
    x, target, dense, class_weight, reference, logit_scale, transform, temperature, row_gradient, upstream, gradient,
    rows: tl.int64, row_stride: tl.int64, dense_stride: tl.int64, reference_stride: tl.int64,
    upstream_stride: tl.int64, ignore_index: tl.int64, V: tl.int32, A: tl.constexpr, DEPTH: tl.constexpr,
    TRANSFORM: tl.constexpr, MASKED: tl.constexpr, UNSCALED: tl.constexpr, RESCALE: tl.constexpr,
    ALIGNED: tl.constexpr, TILES: tl.constexpr, R: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Program (row, TILES tiles of it). RESCALE: the gradient is there already where the upstream one is 1."""
    if RESCALE:
        if tl.load(upstream).to(A) == 1.0:
            return
    row = read_row(tl.program_id(0).to(tl.int64), rows, target, ignore_index, V)
    scale, cap = read_scale(logit_scale, transform, A)
    z_y = target_logit(row, x, row_stride, scale, cap, A, TRANSFORM)
    u = tl.load(upstream + row.index * upstream_stride).to(A)
    g = read_row_gradient(row_gradient, row, rows, u, A, DEPTH)
    gain = scale
    if UNSCALED:
        gain = zero_of(scale) + 1.0
    first = tl.program_id(1) * TILES
    dense_row = dense + row.index * dense_stride if dense is not None else None
    row_r = reference + row.index * reference_stride if reference is not None else None
    share = read_share(row_gradient, row, rows, u) if reference is not None else None
    by = number(temperature, 0).to(A)
    write_row(
        x + row.index * row_stride, gradient + row.index * V, row.y, row.ignored, class_weight, dense_row, row_r, share,
        by, g, z_y, scale, gain, cap, first, first + TILES, V, A, DEPTH, TRANSFORM, MASKED, ALIGNED, R, E,
    )  # fmt: skip
