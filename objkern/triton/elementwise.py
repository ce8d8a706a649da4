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


@triton.jit(
    do_not_specialize=[*RUN_TIME, "elements", "weight_period", "pos_weight_period"],
    do_not_specialize_on_alignment=[*ANYWHERE, "weight", "pos_weight"],
)
def element_kernel(
    x, target, weight, pos_weight, logit_scale, transform, scales, values, loss, gradient, upstream, upstream_stride,
    elements: tl.int64, weight_period: tl.int64, pos_weight_period: tl.int64, programs: tl.int64, A: tl.constexpr,
    TASK: tl.constexpr, KINDS: tl.constexpr, PARTS: tl.constexpr, TRANSFORM: tl.constexpr, UNSCALED: tl.constexpr,
    LIMITS: tl.constexpr, ODDS: tl.constexpr, RESCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """values: (terms, programs) float64 sums, or (terms, elements) of A if PARTS. The gradient goes to `gradient`,
    unless that is None. ODDS: whether a term reads them. RESCALE: nothing is written where the upstream gradient is 1.
    `scales` as `prepare_kernel` has them."""
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
    z = transformed(tl.load(x + i, mask=there, other=0.0).to(A), scale, cap, TRANSFORM)
    y = z
    if target is not None:
        y = tl.load(target + i, mask=there, other=0.0).to(A)
    w = 1.0
    if weight is not None:
        w = tl.load(weight + i % weight_period, mask=there, other=1.0)
    pos_w = 1.0
    if pos_weight is not None:
        pos_w = tl.load(pos_weight + i % pos_weight_period, mask=there, other=1.0)
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
            tl.store(values + k * programs + program, tl.sum(tl.where(there, value, 0.0).to(tl.float64), 0))
        elif TASK == VALUES:
            total += coefficient * value
            if PARTS:
                tl.store(values + k * elements + i, value, mask=there)
    if TASK == VALUES:
        tl.store(loss + i, total, mask=there)
    if gradient is not None:
        gain = scale
        if UNSCALED:
            gain = 1.0
        found = to_z * slope(z, gain, cap, TRANSFORM)
        write = there
        if upstream is not None:
            up = tl.load(upstream + i * upstream_stride, mask=there, other=0.0)
            found = found * up
            if RESCALE:
                write = there & (up != 1.0)
        tl.store(gradient + i, found.to(gradient.dtype.element_ty), mask=write)
