"""The specification: eager torch on any device and dtype, differentiable any number of times.

Backends are held against it, their double backward goes through it, and row values become a loss here for terms that
no kernel knows. It is written for reading; it allocates freely.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .batch import Batch
from .statistics import Statistics

if TYPE_CHECKING:
    from .objective import Term

# What parts report beside the terms, in the order of the kernels.
FREE_STATISTICS = ("lse", "accuracy", "target_probability")


def objective(batch: Batch, terms: list[tuple[float | Tensor, Term]]) -> tuple[Tensor, list[Tensor]]:
    """The loss of a batch and its parts."""
    return evaluate(statistics(batch), batch, terms)


def transformed(batch: Batch) -> tuple[Tensor, Tensor]:
    """z = c·tanh(s·x / c) in the result's dtype, and where x is −inf; there z is −inf, whatever s and c."""
    x = batch.logits.to(batch.result_dtype)
    counted = batch.counted()
    if counted is not None:  # whatever an ignored row holds, nothing comes of it
        x = x.masked_fill(~counted[:, None], 0.0)
    excluded = x == -torch.inf
    z = x.masked_fill(excluded, 0.0)
    if batch.logit_scale is not None:
        z = z * batch.logit_scale.to(z)
    if batch.softcap:
        z = torch.tanh(z / batch.softcap) * batch.softcap
    excluded = excluded | (z == -torch.inf)  # what the scale sends there
    z = z.masked_fill(z == torch.inf, torch.nan)  # a logit of +inf has no softmax
    return z.masked_fill(excluded, -torch.inf), excluded


def statistics(batch: Batch) -> Statistics:
    """(N) of each statistic, by the centred sums of csrc/objective.h; 0 for ignored rows.

    "Others" are the classes but the target. Where there is none (no target, or a dense one) they are all classes.
    """
    z, excluded = transformed(batch)
    rows, classes = z.shape
    labels, bad = _labels(batch)
    own = torch.zeros_like(excluded) if labels is None else labels[:, None] == torch.arange(classes, device=z.device)

    hidden = own | excluded
    others = z.masked_fill(hidden, -torch.inf)
    maximum = others.detach().amax(-1, keepdim=True)
    maximum = maximum.masked_fill(maximum == -torch.inf, 0.0)
    t = (others - maximum).masked_fill(hidden, 0.0)
    e = t.exp().masked_fill(hidden, 0.0)
    total = e.sum(-1)
    alone = total == 0  # no other class is left
    total = total.masked_fill(alone, 1.0)
    log_s = total.log()
    maximum = maximum.squeeze(-1)

    if labels is None:
        z_target = z.new_full((rows,), -torch.inf)
        d = z.new_full((rows,), torch.inf)  # log-odds against a target that is not there
        has_target = torch.zeros(rows, dtype=torch.bool, device=z.device)
    else:
        # Not z.gather: torch 2.13's inductor fuses the scatter of its gradient with what must come after it.
        z_target = z.masked_fill(~own, 0.0).sum(-1)
        d = (maximum - z_target + log_s).masked_fill(alone & (z_target == z_target), -torch.inf)
        has_target = z_target != -torch.inf

    # −log p_y and −log(1 − p_y). A target that is not there leaves the others no derivative, and 0·∞ is NaN.
    absent = d == torch.inf
    nlp_target = -F.logsigmoid(-d)
    nlp_others = -F.logsigmoid(d.masked_fill(absent, 0.0)).masked_fill(absent, 0.0)
    p_target, p_others = torch.sigmoid(-d), torch.sigmoid(d)
    lse_others = maximum + log_s
    lse = torch.where(d < 0, z_target + nlp_target, lse_others + nlp_others)
    mu = (e * t.clamp(min=-1e30)).sum(-1) / total  # times an upstream gradient finite, and e is 0 there
    # 0·∞ = 0 at p_y = 0, and no NaN in its derivative: the factor is replaced before the product.
    own_entropy = p_target * nlp_target.masked_fill(p_target == 0, 0.0)
    entropy = own_entropy + p_others * (nlp_others.masked_fill(p_others == 0, 0.0) + log_s - mu)

    # Moments over the classes that count, centred on the maximum of the others.
    live = ~excluded if batch.masked else torch.ones_like(excluded)
    n = live.sum(-1).to(z.dtype)
    all_t = (z.masked_fill(excluded, 0.0) - maximum[:, None]).masked_fill(excluded, 0.0)
    mean_t = all_t.sum(-1) / n
    variance = (all_t - mean_t[:, None]).masked_fill(excluded, 0.0).square().sum(-1) / n
    mean_square = z.masked_fill(excluded, 0.0).square().sum(-1) / n

    # log p_j of every class: the others through t, the target through d. As numbers, −inf logits stay −inf.
    numbers = t if batch.masked else (z - maximum[:, None]).masked_fill(own, 0.0)
    logp = numbers - (log_s + nlp_others)[:, None]
    if batch.masked:
        logp = logp.masked_fill(excluded, 0.0)
        own_logp = -nlp_target.masked_fill(~has_target, 0.0)
    else:
        own_logp = -nlp_target
    logp = torch.where(own, own_logp[:, None], logp)
    weight = 1.0 if batch.class_weight is None else batch.class_weight.to(z.dtype)
    mean_logprob = (logp * weight).sum(-1) / n
    logprob = (logp * weight * batch.target.to(z.dtype)).sum(-1) if batch.dense else -nlp_target

    forward_kl, reverse_kl = (None, None) if batch.reference is None else divergences(batch, z, excluded)
    found = Statistics(
        logprob=logprob,
        other_logprob=-nlp_others,
        lse=lse,
        entropy=entropy,
        max_logit=z.max(-1).values,
        mean_logit=maximum + mean_t,
        mean_square_logit=mean_square,
        logit_variance=variance,
        target_logit=z_target,
        mean_logprob=mean_logprob,
        forward_kl=forward_kl,
        reverse_kl=reverse_kl,
    )
    hopeless = excluded.all(-1)  # no class is left, so there is no distribution
    found = found.each(lambda field: field.masked_fill(hopeless, torch.nan))._replace(target_logit=z_target)
    counted = batch.counted()
    if counted is not None:
        found = found.each(lambda field: torch.where(counted, field, torch.zeros_like(field)))
    if bad is not None:
        found = found.each(lambda field: field.masked_fill(bad, torch.nan))
    return found


def divergences(batch: Batch, z: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """(N) KL(q ‖ p) and KL(p ‖ q), q of the reference; see csrc/divergence.h."""
    r = cast(Tensor, batch.reference).to(z.dtype)
    counted = batch.counted()
    if counted is not None:  # whatever an ignored row holds, nothing comes of it
        r = r.masked_fill(~counted[:, None], 0.0)
    log_p = (z / batch.temperature).log_softmax(-1).masked_fill(excluded, 0.0)
    log_q = (r.masked_fill(excluded, -torch.inf) / batch.temperature).log_softmax(-1)
    p = log_p.exp().masked_fill(excluded, 0.0)
    absent = excluded | (log_q == -torch.inf)  # of q
    q = log_q.exp().masked_fill(absent, 0.0)
    # Σ q (log q − log p) as Σ q g(log p − log q), g(t) = exp(t) − 1 − t, which is never negative; q g is
    # p − q + q (log q − log p), and for small differences a series.
    more = (log_q.masked_fill(absent, 0.0) - log_p).masked_fill(absent, 0.0)
    # At a high temperature both are nearly uniform, and d = (r − z)/T is lost in the difference of two logarithms:
    # log q − log p = d − log Σ p exp(d), for small d by expm1 and log1p.
    d = ((r.masked_fill(absent, 0.0) - z.masked_fill(absent, 0.0)) / batch.temperature).masked_fill(absent, 0.0)
    d = (d - (p * d).detach().sum(-1, keepdim=True)).masked_fill(absent, 0.0)
    near = (d.abs().amax(-1, keepdim=True) < 0.5) & (absent == excluded).all(-1, keepdim=True)
    d = d.masked_fill(~near, 0.0)
    more = torch.where(near & ~absent, d - (p * d.expm1()).sum(-1, keepdim=True).log1p(), more)
    small = more.abs() < 0.5
    little, much = more.masked_fill(~small, 0.0), more.masked_fill(small, 0.0)
    # Where a mask of −3e38, over T, is −∞ after all, the other's probability decides whether that counts.
    forward = torch.where(small, q * _g(-little), p - q + q * much.masked_fill(q == 0, 0.0))
    reverse = torch.where(small, p * _g(little), q - p - p * much.masked_fill(p == 0, 0.0))
    forward = torch.where(absent, p, forward).sum(-1)
    reverse = reverse.masked_fill(absent, 0.0).sum(-1)
    return forward, reverse.masked_fill(((p > 0) & absent).any(-1), torch.inf)


def _g(t: Tensor) -> Tensor:
    """exp(t) − 1 − t for |t| < 1/2, by its series, where the formula would be all cancellation."""
    series = torch.ones_like(t)
    for k in range(15, 2, -1):
        series = 1.0 + series * t / k
    return 0.5 * t * t * series


def _labels(batch: Batch) -> tuple[Tensor | None, Tensor | None]:
    """(N) labels that are safe to gather with, and which rows hold a bad one (their loss becomes NaN)."""
    if batch.target is None or batch.dense:
        return None, None
    target, classes = batch.target, batch.logits.shape[1]
    if batch.validate:
        check_labels(target, classes, batch.ignore_index)
    return target.clamp(0, classes - 1), _bad_labels(target, classes, batch.ignore_index)


def _bad_labels(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    return (target != ignore_index) & ((target < 0) | (target >= classes))


def check_labels(target: Tensor | None, classes: int, ignore_index: int) -> None:
    """Raise an IndexError that names the first bad label and its row; this waits for the device."""
    # A graph cannot stop to look: there the row's loss is NaN.
    if target is None or target.is_floating_point() or _has_no_numbers(target):
        return
    bad = _bad_labels(target, classes, ignore_index)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"target: row {row} holds label {int(target[row])}, which is neither in [0, {classes}) nor ignore_index "
            f"({ignore_index})"
        )


def _has_no_numbers(x: Tensor) -> bool:
    """Whether x stands for tensors to come: compiled, traced, fake, or one of a batch under vmap."""
    return (
        torch.compiler.is_compiling()
        or x.is_meta
        or is_fake(x)
        or get_proxy_mode() is not None
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def evaluate(
    s: Statistics, batch: Batch, terms: list[tuple[float | Tensor, Term]], first_maximum: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """From statistics to the loss: each term's rows, reduced over its own denominator, times its coefficient.

    first_maximum: (N) bool, whether the label is the first maximum of its row; by default the logits tell.

    Returns the loss, 0-dim or (N), and the parts: every term, the free statistics, and the number of rows that count
    (not for ``reduction="none"``).
    """
    counted = batch.counted()
    rows = batch.logits.shape[0]
    number = s.lse.new_full((), rows) if counted is None else counted.sum().to(s.lse.dtype)
    weight = batch.row_weight()
    if counted is not None and isinstance(weight, Tensor):
        weight = torch.where(counted, weight, torch.zeros_like(weight))
    weight_sum = weight.sum().to(s.lse.dtype) if isinstance(weight, Tensor) else number

    parts, loss = [], s.lse.new_zeros(rows if batch.reduction == "none" else ())
    for coefficient, term in terms:
        value = term.value(s, batch)
        if counted is not None:
            value = torch.where(counted, value, torch.zeros_like(value))
        if batch.reduction != "none":
            value = value.sum()
        if batch.normalizer is not None:
            value = value / batch.normalizer.detach().to(value)
        elif batch.reduction == "mean":
            denominator = weight_sum if term.reads_class_weight else number
            if batch.empty_zero:
                denominator = torch.where(number == 0, torch.ones_like(denominator), denominator)
            value = value / denominator
        parts.append(value)
        loss = loss + coefficient * value

    if first_maximum is None:
        first_maximum = is_first_maximum(batch)
    free = (s.lse, first_maximum.to(s.lse.dtype), s.logprob.exp())
    if counted is not None:
        free = tuple(torch.where(counted, value, torch.zeros_like(value)) for value in free)
    if batch.reduction == "none":
        parts += free
    else:
        parts += [value.sum() / number for value in free] + [number]
    dtype = batch.result_dtype
    return loss.to(dtype), [part.to(dtype) for part in parts]


def is_first_maximum(batch: Batch) -> Tensor:
    """(N) whether the label is the first maximum of its row; False where there is no label."""
    if batch.target is None or batch.dense:
        return torch.zeros(batch.logits.shape[0], dtype=torch.bool, device=batch.logits.device)
    with torch.no_grad():
        z, _ = transformed(batch)
        return (z.argmax(-1) == batch.target) & (z.amax(-1) > -torch.inf) & batch.counted()
