"""The mathematics of csrc/objective.h in Triton, under the same names; see there for what each formula says.

Everything works on numbers of one row or on blocks of them, one row each, in the accumulation type. What an objective
does not read is left out at compile time: `READS` are the bits of `Reads`, `DEPTH` is `Depth` in csrc/objective.h.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .elementary import exp, expm1, least_exponent, log1p_of_unit, lowest, zero_of


class Centred(NamedTuple):
    """Centred sums over the classes other than the target; the order is that of the `centred` tensor."""

    max: tl.tensor
    sum_e: tl.tensor
    sum_et: tl.tensor
    sum_t: tl.tensor
    sum_dd: tl.tensor
    sum_zz: tl.tensor
    sum_w: tl.tensor
    sum_wt: tl.tensor
    sum_q: tl.tensor
    sum_qt: tl.tensor
    classes: tl.tensor
    target: tl.tensor
    target_weight: tl.tensor
    target_is_max: tl.tensor


class Statistics(NamedTuple):
    """The vocabulary of the terms, in the order of objkern.Statistics; or derivatives to it."""

    logprob: tl.tensor
    other_logprob: tl.tensor
    lse: tl.tensor
    entropy: tl.tensor
    max_logit: tl.tensor
    mean_logit: tl.tensor
    mean_square_logit: tl.tensor
    logit_variance: tl.tensor
    target_logit: tl.tensor
    mean_logprob: tl.tensor
    forward_kl: tl.tensor
    reverse_kl: tl.tensor


class Divergence(NamedTuple):
    """What the comparison with a reference found; the order is that of csrc/divergence.h."""

    max_z: tl.tensor
    max_r: tl.tensor
    to_p: tl.tensor
    to_q: tl.tensor
    log_ratio: tl.tensor
    forward: tl.tensor
    reverse: tl.tensor


class Share(NamedTuple):
    """A reference's share of the gradient, f_j (of_p + of_pd d_j) + of_q e_j: the end of RowGradient in csrc."""

    max_z: tl.tensor
    max_r: tl.tensor
    of_p: tl.tensor
    of_pd: tl.tensor
    of_q: tl.tensor


class Odds(NamedTuple):
    d: tl.tensor
    log_s: tl.tensor
    inverse_s: tl.tensor
    p_target: tl.tensor
    p_others: tl.tensor
    nlp_target: tl.tensor
    nlp_others: tl.tensor


class RowGradient(NamedTuple):
    """dL/dz_j = e_j (exp_1 + exp_t t_j) + const_1 + const_t t_j + const_z z_j + const_w w_j + const_q w_j q_j."""

    max: tl.tensor
    target_grad: tl.tensor
    exp_1: tl.tensor
    exp_t: tl.tensor
    const_1: tl.tensor
    const_z: tl.tensor
    const_t: tl.tensor
    const_w: tl.tensor
    const_q: tl.tensor
    max_grad: tl.tensor


# Reads
LOGPROB: tl.constexpr = tl.constexpr(1)
OTHER_LOGPROB: tl.constexpr = tl.constexpr(2)
LSE: tl.constexpr = tl.constexpr(4)
ENTROPY: tl.constexpr = tl.constexpr(8)
MAX_LOGIT: tl.constexpr = tl.constexpr(16)
MEAN_LOGIT: tl.constexpr = tl.constexpr(32)
MEAN_SQUARE_LOGIT: tl.constexpr = tl.constexpr(64)
LOGIT_VARIANCE: tl.constexpr = tl.constexpr(128)
TARGET_LOGIT: tl.constexpr = tl.constexpr(256)
MEAN_LOGPROB: tl.constexpr = tl.constexpr(512)
MEANS: tl.constexpr = tl.constexpr(32 + 64 + 128 + 512)


@triton.jit
def weighted(probability, b):
    """a·b where a is a probability: 0·∞ is the limit 0, as in p·log p."""
    return tl.where(probability == 0, 0.0, probability * b)


@triton.jit
def log_odds(d):
    """log(1 + exp(±d)) and 1 / (1 + exp(∓d)), exact in both tails."""
    e = exp(-tl.abs(d))
    tail = log1p_of_unit(e)
    near = 1.0 / (1.0 + e)
    far = e * near
    negative = d < 0
    softplus_plus = tl.where(negative, tail, d + tail)
    softplus_minus = tl.where(negative, tail - d, tail)
    return softplus_plus, softplus_minus, tl.where(negative, far, near), tl.where(negative, near, far)


@triton.jit
def odds_of(c):
    log_s = tl.log(c.sum_e)
    inverse_s = tl.where(c.sum_e == 0, 0.0, 1.0 / c.sum_e)  # 0: the others are impossible
    d = (c.max - c.target) + log_s
    nlp_target, nlp_others, p_others, p_target = log_odds(d)
    return Odds(
        d=d, log_s=log_s, inverse_s=inverse_s, p_target=p_target, p_others=p_others, nlp_target=nlp_target,
        nlp_others=nlp_others,
    )  # fmt: skip


@triton.jit
def no_target(c):
    return c.target == float("-inf")


@triton.jit
def target_t(c):
    return tl.where(no_target(c), 0.0, c.target - c.max)


@triton.jit
def finite_target(c):
    return tl.where(no_target(c), 0.0, c.target)


@triton.jit
def weighted_nlp(c, o):
    """−Σ w_j log p_j over all classes."""
    others = tl.where(c.sum_e == 0, 0.0, weighted(c.sum_w, o.nlp_others + o.log_s))
    return weighted(c.target_weight, o.nlp_target) + others - c.sum_wt


@triton.jit
def derive(c, o, v, DENSE: tl.constexpr, READS: tl.constexpr):
    """The statistics in `READS`; those made of log-probabilities are there anyway."""
    zero = zero_of(c.sum_e)
    lse, entropy, max_logit, mean_logit = zero, zero, zero, zero
    mean_square, variance, mean_logprob, inverse_n = zero, zero, zero, zero
    if MEANS & READS:
        inverse_n = 1.0 / c.classes
    if DENSE:
        logprob = c.sum_qt - c.sum_q * o.log_s
    else:
        logprob = -o.nlp_target
    if LSE & READS:
        lse = tl.where(o.d < 0, c.target + o.nlp_target, c.max + o.log_s + o.nlp_others)
    if ENTROPY & READS:
        mu = c.sum_et * o.inverse_s
        entropy = weighted(o.p_target, o.nlp_target) + weighted(o.p_others, o.nlp_others + o.log_s - mu)
    if MAX_LOGIT & READS:
        larger = tl.where(c.target < c.max, c.max, c.target)  # NaN if the target's logit is
        only = tl.where(no_target(c), float("nan"), c.target)
        max_logit = tl.where(c.sum_e == 0, only, tl.where(c.max == c.max, larger, c.max))
    if MEAN_LOGIT & READS:
        mean_logit = c.max + (c.sum_t + target_t(c)) * inverse_n
    if MEAN_SQUARE_LOGIT & READS:
        z = finite_target(c)
        mean_square = tl.where(c.max == c.max, (c.sum_zz + z * z) * inverse_n, c.max)  # NaN beside +inf, as all others
    if LOGIT_VARIANCE & READS:  # the target joins the others as a second sample of size 1
        others = c.classes - tl.where(no_target(c), 0.0, 1.0)
        apart = target_t(c) - tl.where(others == 0, 0.0, c.sum_t / others)
        joined = tl.where(no_target(c), 0.0, apart * apart * others * inverse_n)
        variance = (c.sum_dd + joined) * inverse_n
    if MEAN_LOGPROB & READS:
        mean_logprob = -weighted_nlp(c, o) * inverse_n
    return Statistics(
        logprob=logprob, other_logprob=-o.nlp_others, lse=lse, entropy=entropy, max_logit=max_logit,
        mean_logit=mean_logit, mean_square_logit=mean_square, logit_variance=variance, target_logit=c.target,
        mean_logprob=mean_logprob, forward_kl=v.forward, reverse_kl=v.reverse,
    )  # fmt: skip


@triton.jit
def share_of(v, f):
    """(p_j − q_j) / T for KL(q ‖ p), p_j (log p_j − log q_j − KL) / T for KL(p ‖ q)."""
    return Share(
        max_z=v.max_z, max_r=v.max_r, of_p=v.to_p * (f.forward_kl + weighted(f.reverse_kl, v.log_ratio - v.reverse)),
        of_pd=-v.to_p * f.reverse_kl, of_q=-v.to_q * f.forward_kl,
    )  # fmt: skip


@triton.jit
def add_term(TERM: tl.constexpr, parameter, row_weight, scale, s, f):
    """The value of a term, and `f` with scale · ∂value/∂s added. TERM: 2·kind + (is the parameter not 0?).

    The formulas stand in objkern/terms.py.
    """
    KIND: tl.constexpr = TERM // 2
    HAS_PARAMETER: tl.constexpr = TERM % 2 == 1
    logprob, other_logprob, lse, entropy = f.logprob, f.other_logprob, f.lse, f.entropy
    max_logit, mean_square, mean_logprob = f.max_logit, f.mean_square_logit, f.mean_logprob
    forward_kl, reverse_kl = f.forward_kl, f.reverse_kl
    if KIND == 0:  # cross-entropy; parameter: label smoothing
        hard = (1.0 - parameter) * row_weight
        value = -hard * s.logprob
        logprob -= scale * hard
        if HAS_PARAMETER:
            value -= parameter * s.mean_logprob
            mean_logprob -= scale * parameter
    elif KIND == 1:  # z-loss
        value = s.lse * s.lse
        lse += scale * 2.0 * s.lse
    elif KIND == 2:  # max-z
        value = s.max_logit * s.max_logit
        max_logit += scale * 2.0 * s.max_logit
    elif KIND == 3:
        value = s.entropy
        entropy += scale
    elif KIND == 4:  # focal; parameter: γ
        if HAS_PARAMETER:
            focus = exp(parameter * s.other_logprob)
            value = -weighted(focus, s.logprob)
            logprob -= scale * focus
            other_logprob -= scale * weighted(focus, parameter * s.logprob)
        else:
            value = -s.logprob
            logprob -= scale
    elif KIND == 5:  # poly-1; parameter: ε
        others = parameter * exp(s.other_logprob)
        value = others - s.logprob
        logprob -= scale
        other_logprob += scale * others
    elif KIND == 6:  # generalized cross-entropy; parameter: q
        value = -expm1(parameter * s.logprob) / parameter
        logprob -= scale * exp(parameter * s.logprob)
    elif KIND == 7:  # unlikelihood
        value = -s.other_logprob
        other_logprob -= scale
    elif KIND == 8:  # margin; parameter: m
        value, _, others, _ = log_odds(s.other_logprob - s.logprob + parameter)
        logprob -= scale * others
        other_logprob += scale * others
    elif KIND == 9:
        value = s.mean_square_logit
        mean_square += scale
    elif KIND == 10:  # divergences; parameter: T
        value = parameter * parameter * s.forward_kl
        forward_kl += scale * (parameter * parameter)
    else:
        tl.static_assert(KIND == 11, "a term that is not known")
        value = parameter * parameter * s.reverse_kl
        reverse_kl += scale * (parameter * parameter)
    return value, Statistics(
        logprob=logprob, other_logprob=other_logprob, lse=lse, entropy=entropy, max_logit=max_logit,
        mean_logit=f.mean_logit, mean_square_logit=mean_square, logit_variance=f.logit_variance,
        target_logit=f.target_logit, mean_logprob=mean_logprob, forward_kl=forward_kl, reverse_kl=reverse_kl,
    )  # fmt: skip


@triton.jit
def chain(c, o, s, f, READS: tl.constexpr, DENSE: tl.constexpr, WEIGHTED: tl.constexpr):
    """From the partial derivatives of the row's value to the coefficients of its gradient."""
    zero = zero_of(c.sum_e)
    r = o.p_others * o.inverse_s  # p_j = r e_j
    target_grad, exp_1, exp_t, const_1, const_z = zero, zero, zero, zero, zero
    const_t, const_w, const_q, max_grad, inverse_n = zero, zero, zero, zero, zero
    if MEANS & READS:
        inverse_n = 1.0 / c.classes
    if LOGPROB & READS:
        if DENSE:
            exp_1 -= f.logprob * c.sum_q * r
            const_q += f.logprob
        else:
            exp_1 -= f.logprob * r
            target_grad += f.logprob * o.p_others
    if OTHER_LOGPROB & READS:
        own = weighted(o.p_target, f.other_logprob)
        exp_1 += own * o.inverse_s
        target_grad -= own
    if LSE & READS:
        exp_1 += f.lse * r
        target_grad += f.lse * o.p_target
    if ENTROPY & READS:
        mu = c.sum_et * o.inverse_s
        exp_1 -= weighted(r, f.entropy * (s.entropy - o.log_s - o.nlp_others))
        exp_t -= f.entropy * r
        target_grad -= f.entropy * weighted(o.p_target * o.p_others, o.log_s - mu - o.d)
    if MAX_LOGIT & READS:
        target_grad += tl.where(c.target_is_max > 0, f.max_logit, 0.0)
        max_grad = tl.where(c.target_is_max > 0, 0.0, f.max_logit)
    if MEAN_LOGIT & READS:
        const_1 += f.mean_logit * inverse_n
        target_grad += f.mean_logit * inverse_n
    if MEAN_SQUARE_LOGIT & READS:
        twice = 2.0 * f.mean_square_logit * inverse_n
        const_z += twice
        target_grad += twice * finite_target(c)
    if LOGIT_VARIANCE & READS:
        twice = 2.0 * f.logit_variance * inverse_n
        mean_t = (c.sum_t + target_t(c)) * inverse_n
        const_t += twice
        # Logits of −3e38 that mask classes have no finite mean, which is nothing to a gradient that is not of it.
        const_1 -= weighted(twice, mean_t)
        target_grad += weighted(twice, target_t(c) - mean_t)
    if TARGET_LOGIT & READS:
        target_grad += f.target_logit
    if MEAN_LOGPROB & READS:
        share = f.mean_logprob * inverse_n
        exp_1 -= share * (c.sum_w + c.target_weight) * r
        if WEIGHTED:
            const_w += share
        else:
            const_1 += share
        target_grad += share * (c.target_weight * o.p_others - c.sum_w * o.p_target)
    exp_1 = tl.where(c.sum_e == 0, 0.0, exp_1)  # no other class is left: it may be NaN
    return RowGradient(
        max=c.max, target_grad=target_grad, exp_1=exp_1, exp_t=exp_t, const_1=const_1, const_z=const_z,
        const_t=const_t, const_w=const_w, const_q=const_q, max_grad=max_grad,
    )  # fmt: skip


# ---- pieces of a row ------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Sums over a piece of the others, relative to the piece's own maximum; of nothing: `lowest` and zeros.

    `before`: 1 if a class before the target has its logit, known where that logit is the piece's maximum.
    """

    max: tl.tensor
    e: tl.tensor
    before: tl.tensor
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
def merge(a, b, A: tl.constexpr):
    """The sums over two pieces: t = t_piece + shift, e = e_piece · exp(shift)."""
    top = tl.maximum(a.max, b.max)
    shift_a = tl.maximum(a.max - top, lowest(A))
    shift_b = tl.maximum(b.max - top, lowest(A))
    near_a = tl.maximum(shift_a, least_exponent(A))  # where its product with Σ e is finite: 0·∞ would be NaN
    near_b = tl.maximum(shift_b, least_exponent(A))
    factor_a, factor_b = tl.exp(near_a), tl.exp(near_b)
    t_a, t_b = a.t + a.n * shift_a, b.t + b.n * shift_b
    n = a.n + b.n
    apart = t_a / tl.maximum(a.n, 1.0) - t_b / tl.maximum(b.n, 1.0)  # of the two means
    return Piece(
        max=top, e=a.e * factor_a + b.e * factor_b, before=tl.maximum(a.before, b.before),
        et=factor_a * (a.et + near_a * a.e) + factor_b * (b.et + near_b * b.e), t=t_a + t_b, n=n, zz=a.zz + b.zz,
        dd=a.dd + b.dd + tl.where((a.n == 0) | (b.n == 0), 0.0, apart * apart * (a.n * (b.n / tl.maximum(n, 1.0)))),
        w=a.w + b.w, wt=(a.wt + a.w * shift_a) + (b.wt + b.w * shift_b), q=a.q + b.q,
        qt=(a.qt + a.q * shift_a) + (b.qt + b.q * shift_b),
    )  # fmt: skip


@triton.jit
def centre(piece, target, has_label, label_weight, V, MASKED: tl.constexpr, SUMS: tl.constexpr):
    """From the merged sums of a row to its centred sums. target: z_y, −inf where there is none.

    Not MASKED: −inf logits are numbers, which make Σ log p_j infinite, and a row of nothing else has no softmax.
    SUMS: the `w` and `q` sums were taken, because there are class weights or a dense target.
    """
    alone = piece.e == 0
    own = tl.where(has_label, 1.0, 0.0).to(piece.e.dtype)
    top = tl.where(alone, 0.0, piece.max)
    absent = target == float("-inf")
    first = (target == piece.max) & (piece.before == 0) & (absent == 0)
    is_max = has_label & (piece.e == piece.e) & (target < float("inf")) & ((target > piece.max) | first)
    sum_e, sum_wt = piece.e, piece.t
    if MASKED:
        classes = piece.n + tl.where(absent, 0.0, 1.0)
        sum_w = piece.n
        label_weight = tl.where(has_label & (absent == 0), label_weight, 0.0)
    else:
        classes = zero_of(piece.n) + V
        sum_w = classes - own
        label_weight = tl.where(has_label, label_weight, 0.0)
        sum_wt = tl.where(piece.n + own != classes, float("-inf"), sum_wt)
        sum_e = tl.where(alone & absent, float("nan"), sum_e)
    if SUMS:
        sum_w, sum_wt = piece.w, piece.wt
    return Centred(
        max=tl.where(sum_e == sum_e, top, float("nan")), sum_e=sum_e, sum_et=piece.et, sum_t=piece.t,
        sum_dd=piece.dd, sum_zz=piece.zz, sum_w=sum_w, sum_wt=sum_wt, sum_q=piece.q, sum_qt=piece.qt,
        classes=classes, target=tl.where(target == float("inf"), float("nan"), target), target_weight=label_weight,
        target_is_max=tl.where(is_max, 1.0, 0.0),
    )  # fmt: skip
