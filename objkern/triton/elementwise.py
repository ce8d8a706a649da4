"""Elementwise objectives: the formulas of csrc/elementwise.h under the same names, and a kernel over blocks."""

import triton
import triton.language as tl

from .elementary import ANYWHERE, RUN_TIME, number
from .elements import slope, transformed
from .objective import log_odds, weighted

# Tasks: sums of the values, every value, the gradient alone.
SUMS: tl.constexpr = tl.constexpr(0)
VALUES: tl.constexpr = tl.constexpr(1)


@triton.jit
def element_value(
    KIND: tl.constexpr, PARAMETER: tl.constexpr, p, z, y, weight, pos_weight, odds, scale, LIMITS: tl.constexpr
):
    """The value of a term for every element, and scale · ∂value/∂z. PARAMETER: whether p is not 0."""
    softplus_plus, softplus_minus, sigmoid_plus, sigmoid_minus = odds
    if KIND == 0:  # binary cross-entropy
        smooth = y
        if PARAMETER:
            smooth = y * (1.0 - p) + p * 0.5
        no = 1.0 - smooth
        yes = smooth * pos_weight
        gradient = scale * weight * (no * sigmoid_plus - yes * sigmoid_minus)
        value = weighted(no, softplus_plus) + weighted(yes, softplus_minus)
        if not LIMITS:
            torchs = no * z + (1.0 + (pos_weight - 1.0) * smooth) * softplus_minus
            value = tl.where(tl.abs(z) == float("inf"), torchs, value)
        value = weight * tl.where(z == z, value, z)
    elif KIND == 1:  # Bernoulli entropy
        gradient = -scale * weighted(sigmoid_plus * sigmoid_minus, z)
        value = weighted(sigmoid_plus, softplus_minus) + weighted(sigmoid_minus, softplus_plus)
    elif KIND == 2:  # mean squared error
        d = z - y
        if PARAMETER:
            gradient = scale * 2.0 * weight * d
            value = weight * d * d
        else:
            gradient = scale * 2.0 * d
            value = d * d
    elif KIND == 3:  # mean absolute error
        d = z - y
        value = tl.abs(d)
        gradient = scale * tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d * 0.0))
    elif KIND == 4:  # Huber
        d = z - y
        size = tl.abs(d)
        far = size > p
        gradient = scale * tl.where(far, tl.where(d < 0, -p, p), d)
        value = tl.where(far, p * (size - 0.5 * p), 0.5 * d * d)
    else:  # logit L2
        gradient = scale * 2.0 * z
        value = z * z
    return value, gradient


@triton.jit
def loaded(p, i, there, WHOLE: tl.constexpr, other, ALIGNED: tl.constexpr):
    """A mask that is not the same for a whole vector makes every access as narrow as an element."""
    places = p + i
    if ALIGNED:
        places = tl.multiple_of(places, 16)
    if WHOLE:
        return tl.load(places)
    else:
        return tl.load(places, mask=there, other=other)


@triton.jit
def stored(p, i, value, there, WHOLE: tl.constexpr, ALIGNED: tl.constexpr):
    places = p + i
    if ALIGNED:
        places = tl.multiple_of(places, 16)
    if WHOLE:
        tl.store(places, value.to(p.dtype.element_ty))
    else:
        tl.store(places, value.to(p.dtype.element_ty), mask=there)


@triton.jit
def element_block(
    x, target, weight, pos_weight, logit_scale, transform, scales, values, loss, gradient, upstream, upstream_stride,
    elements, weight_period, pos_weight_period, programs, A: tl.constexpr, TASK: tl.constexpr, KINDS: tl.constexpr,
    PARTS: tl.constexpr, TRANSFORM: tl.constexpr, UNSCALED: tl.constexpr, LIMITS: tl.constexpr, ODDS: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The block of this program. WHOLE: there is an element for each of its places."""
    COUNT: tl.constexpr = len(KINDS)
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    there = i < elements
    scale = 1.0
    if TRANSFORM != 0:
        scale = number(transform, 0).to(A)
        if logit_scale is not None:
            scale = tl.load(logit_scale).to(A)
    cap = 0.0
    if TRANSFORM == 2:
        cap = number(transform, 1).to(A)
    z = transformed(loaded(x, i, there, WHOLE, 0.0, ALIGNED).to(A), scale, cap, TRANSFORM)
    y = tl.zeros((BLOCK,), A)
    if target is not None:
        y = loaded(target, i, there, WHOLE, 0.0, ALIGNED).to(A)
    w = 1.0
    if weight is not None:
        w = loaded(weight, i % weight_period, there, WHOLE, 1.0, False)
    pos_w = 1.0
    if pos_weight is not None:
        pos_w = loaded(pos_weight, i % pos_weight_period, there, WHOLE, 1.0, False)
    odds = (z, z, z, z)
    if ODDS:
        odds = log_odds(z)
    to_z = tl.zeros((BLOCK,), A)
    total = tl.zeros((BLOCK,), A)
    for k in tl.static_range(COUNT):
        coefficient = tl.load(scales + k).to(A)
        p = tl.load(scales + 2 * COUNT + k).to(A)
        value, own = element_value(
            KINDS[k] // 2, KINDS[k] % 2 == 1, p, z, y, w, pos_w, odds, coefficient, LIMITS
        )  # fmt: skip
        to_z += own
        if TASK == SUMS:
            if not WHOLE:
                value = tl.where(there, value, 0.0)
            tl.store(values + k * programs + program, tl.sum(value.to(tl.float64), 0))
        elif TASK == VALUES:
            total += coefficient * value
            if PARTS:
                stored(values + k * elements, i, value, there, WHOLE, False)
    if TASK == VALUES:
        stored(loss, i, total, there, WHOLE, True)
    if gradient is not None:
        gain = scale
        if UNSCALED:
            gain = 1.0
        found = to_z * slope(z, gain, cap, TRANSFORM)
        if upstream is not None:
            found = found * loaded(upstream, i * upstream_stride, there, WHOLE, 0.0, False)
        stored(gradient, i, found, there, WHOLE, ALIGNED)


@triton.jit(
    do_not_specialize=[*RUN_TIME, "elements", "weight_period", "pos_weight_period"],
    do_not_specialize_on_alignment=[*ANYWHERE, "weight", "pos_weight"],
)
def element_kernel(
    x, target, weight, pos_weight, logit_scale, transform, scales, values, loss, gradient, upstream, upstream_stride,
    elements: tl.int64, weight_period: tl.int64, pos_weight_period: tl.int64, programs: tl.int64, A: tl.constexpr,
    TASK: tl.constexpr, KINDS: tl.constexpr, PARTS: tl.constexpr, TRANSFORM: tl.constexpr, UNSCALED: tl.constexpr,
    LIMITS: tl.constexpr, ODDS: tl.constexpr, RESCALE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """values: (terms, programs) float64 sums, or (terms, elements) of A if PARTS. The gradient goes to `gradient`,
    unless that is None. ODDS: whether a term reads them. RESCALE: nothing is done where the upstream gradient, which is
    one number then, is 1. ALIGNED: prediction, target and gradient begin at multiples of 16 bytes. `scales` as
    `prepare_kernel` has them."""
    if RESCALE:
        if tl.load(upstream) == 1.0:
            return
    if (tl.program_id(0).to(tl.int64) + 1) * BLOCK <= elements:
        element_block(
            x, target, weight, pos_weight, logit_scale, transform, scales, values, loss, gradient, upstream,
            upstream_stride, elements, weight_period, pos_weight_period, programs, A, TASK, KINDS, PARTS, TRANSFORM,
            UNSCALED, LIMITS, ODDS, ALIGNED, BLOCK, True,
        )  # fmt: skip
    else:
        element_block(
            x, target, weight, pos_weight, logit_scale, transform, scales, values, loss, gradient, upstream,
            upstream_stride, elements, weight_period, pos_weight_period, programs, A, TASK, KINDS, PARTS, TRANSFORM,
            UNSCALED, LIMITS, ODDS, ALIGNED, BLOCK, False,
        )  # fmt: skip
