"""The two ends of a scalar loss: denominators before the rows are read, and the sum over rows after them.

Both are one program each, in float64, in a fixed order.
"""

import triton
import triton.language as tl

from .elementary import ANYWHERE, RUN_TIME, number


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=ANYWHERE)
def prepare_kernel(
    target, class_weight, coefficient_tensor, normalizer, numbers, scales, rows: tl.int64, ignore_index: tl.int64,
    V: tl.int32, TERMS: tl.constexpr, MEAN: tl.constexpr, EMPTY_ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the epilogue needs of the terms, float64 (3 · terms + 1): coefficient over denominator of each; denominator
    of each; parameter of each; the number of rows that count.

    numbers: parameter and coefficient of each term, in words. A mean divides cross-entropy with labels by the weight
    of the labels, every other term by the number of rows that count; `normalizer` replaces both.
    """
    COUNT: tl.constexpr = len(TERMS)
    counted = rows.to(tl.float64)
    weight_sum = counted
    if target is not None:
        n = tl.zeros((BLOCK,), tl.int64)
        w = tl.zeros((BLOCK,), tl.float64)
        for first in range(0, rows, BLOCK):
            index = first + tl.arange(0, BLOCK).to(tl.int64)
            there = index < rows
            y = tl.load(target + index, mask=there, other=0)
            counts = there & (y != ignore_index)
            n += tl.where(counts, 1, 0).to(tl.int64)
            if class_weight is not None:
                place = tl.where(y < 0, 0, tl.where(y >= V, V - 1, y))  # a bad label makes the loss NaN elsewhere
                w += tl.load(class_weight + place, mask=counts, other=0.0).to(tl.float64)
        counted = tl.sum(n, 0).to(tl.float64)
        weight_sum = counted
        if class_weight is not None:
            weight_sum = tl.sum(w, 0)
    for k in tl.static_range(COUNT):
        coefficient = number(numbers, 2 * k + 1)
        if coefficient_tensor is not None:
            coefficient = coefficient * tl.load(coefficient_tensor + k).to(tl.float64)
        denominator = counted * 0.0 + 1.0
        if normalizer is not None:
            denominator = tl.load(normalizer).to(tl.float64)
        elif MEAN:
            denominator = counted
            if TERMS[k] // 2 == 0:
                denominator = weight_sum
            if EMPTY_ZERO:
                denominator = tl.where(counted == 0, 1.0, denominator)
        tl.store(scales + k, coefficient / denominator)
        tl.store(scales + COUNT + k, denominator)
        tl.store(scales + 2 * COUNT + k, number(numbers, 2 * k))
    tl.store(scales + 3 * COUNT, counted)


@triton.jit(do_not_specialize=RUN_TIME, do_not_specialize_on_alignment=ANYWHERE)
def reduce_kernel(
    values, scales, loss, parts, programs: tl.int64, COUNT: tl.constexpr, PARTS: tl.constexpr, FREE: tl.constexpr,
    FIELDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """values (COUNT + FREE if PARTS, programs) ─▶ loss (), parts (COUNT + FREE + 1).

    Parts: terms over their denominators, free statistics over the number of rows that count, and that number.
    FIELDS: the next power of two.
    """
    field = tl.arange(0, FIELDS)
    SIZE: tl.constexpr = COUNT + FREE if PARTS else COUNT
    total = tl.zeros((FIELDS, BLOCK), tl.float64)
    for first in range(0, programs, BLOCK):
        place = first + tl.arange(0, BLOCK).to(tl.int64)
        mask = (field < SIZE)[:, None] & (place < programs)[None, :]
        total += tl.load(values + field[:, None] * programs + place[None, :], mask=mask, other=0.0)
    sums = tl.sum(total, 1)
    scale = tl.load(scales + field, mask=field < COUNT, other=0.0)
    tl.store(loss, tl.sum(tl.where(field < COUNT, scale * sums, 0.0), 0).to(loss.dtype.element_ty))
    if PARTS:
        counted = tl.load(scales + 3 * COUNT)
        denominator = tl.load(scales + COUNT + field, mask=field < COUNT, other=1.0)
        share = sums / tl.where(field < COUNT, denominator, counted)
        tl.store(parts + field, share.to(parts.dtype.element_ty), mask=field < SIZE)
        tl.store(parts + SIZE, counted.to(parts.dtype.element_ty))
