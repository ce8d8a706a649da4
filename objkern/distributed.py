"""Objectives over a vocabulary that is split among ranks: each holds some classes of every row.

    logits of a rank's classes ──kernels──▶ centred sums of its part ──all-gather──▶ those of the row, on every rank
    statistics of the row ──terms──▶ loss ──autograd──▶ partial derivatives ──kernels──▶ gradient of its classes

Sums over parts of a row merge as sums over its segments do (csrc/objective.h), and a few of them are all that a loss
knows of a row. So one all-gather of those is all that the forward pass communicates, and the backward pass of logits
communicates nothing: every rank has the same loss, the same derivatives by the statistics, and its own classes.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import linear, ops, reference
from .batch import Batch, describe
from .scale import plan
from .statistics import Statistics

__all__ = ["Shard", "plan", "shard"]

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# ---- who holds which classes ----------------------------------------------------------------------------------------


class Shard(NamedTuple):
    """A rank's part of the vocabulary; the order of the ranks is that of the classes.

    Attributes:
        group: of torch.distributed.
        rank: this one's, in the group.
        sizes: classes of every rank.
    """

    group: ProcessGroup
    rank: int
    sizes: tuple[int, ...]

    @property
    def begin(self) -> int:
        """Its first class, counted from that of rank 0."""
        return sum(self.sizes[: self.rank])

    @property
    def own(self) -> slice:
        """Its classes among all."""
        return slice(self.begin, self.begin + self.sizes[self.rank])

    @property
    def classes(self) -> int:
        """Of all ranks."""
        return sum(self.sizes)

    def owner(self, labels: Tensor) -> Tensor:
        """(N) the rank of each label; that of a label which is none is no matter."""
        found = torch.zeros_like(labels)
        for end in itertools.accumulate(self.sizes[:-1]):  # numbers, which no device has to wait for
            found += labels >= end
        return found

    def local(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Labels counted from the rank's first class: negative, or beyond its last one, where another rank holds them.
        Ignored rows get ``-(2**63)``."""
        return (labels.clamp(-1, self.classes) - self.begin).masked_fill_(labels == ignore_index, IGNORED)


IGNORED = -(2**63)

# By the group and the classes here: this rank, and what a Shard says beside the group, which is not to be kept alive.
_known: weakref.WeakKeyDictionary[Any, dict[int, tuple[int, tuple[int, ...]]]] = weakref.WeakKeyDictionary()


def shard(group: ProcessGroup, classes: int, device: torch.device | str = "cpu") -> Shard:
    """This rank's part of a vocabulary, which may be passed as `process_group`; all ranks of the group have to call it.

    A call with a bare process group makes it by itself, and remembers it by the group and the number of classes here.
    So where one group serves several vocabularies, of which a rank has equal parts and another has not (1000 and 1001
    classes), make one of these for each.

    Args:
        classes: how many this rank holds; none is fine.
        device: of tensors that the group's backend can send.

    Raises:
        TypeError: no process group.
        ValueError: this process is not in it.

    >>> import torch.distributed as dist
    >>> from objkern.distributed import shard
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> part = shard(dist.group.WORLD, 3)
    >>> part.sizes, part.own
    ((3,), slice(0, 3, None))
    >>> CrossEntropy()(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0]), process_group=part)
    tensor(0.4076)
    >>> dist.destroy_process_group()
    """
    import torch.distributed as dist

    if type(classes) is not int or classes < 0:
        raise ValueError(f"classes: expected a whole number of at least 0 but got {describe(classes)}")
    if dist.is_available() and isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group: this process is not in it")
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group: expected a torch.distributed.ProcessGroup but got {describe(group)}")
    everyone = _all_gather(torch.tensor([classes], device=device), dist.get_world_size(group), group)
    return Shard(group, dist.get_rank(group), tuple(everyone.view(-1).tolist()))


def _part_of(group: ProcessGroup | Shard, classes: int, device: torch.device) -> Shard:
    """The shard of a call whose rank has so many classes."""
    if isinstance(group, Shard):
        if group.sizes[group.rank] != classes:
            raise ValueError(
                f"process_group: the part of rank {group.rank} has {group.sizes[group.rank]} classes but got {classes}"
            )
        return group
    import torch.distributed as dist

    known = _known.setdefault(group, {}) if isinstance(group, dist.ProcessGroup) else {}
    if classes not in known:
        found = shard(group, classes, device)
        known[classes] = found.rank, found.sizes
    return Shard(group, *known[classes])


# ---- sums of parts --------------------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """Sums over some classes but the target, relative to their own maximum: float64, (N), or (parts, N).

    The names are those of Centred in csrc/objective.h.
    """

    max: Tensor
    sum_e: Tensor
    sum_et: Tensor
    sum_t: Tensor
    sum_dd: Tensor
    sum_zz: Tensor
    sum_w: Tensor
    sum_wt: Tensor
    sum_q: Tensor
    sum_qt: Tensor
    classes: Tensor  # that count and are not the target


def merged(parts: Sums) -> Sums:
    """(N) from (parts, N): as over all their classes at once, in the order of the parts."""
    there = parts.classes > 0
    maximum = parts.max.masked_fill(~there, -torch.inf).amax(0)
    maximum = maximum.masked_fill(maximum == -torch.inf, 0.0)
    shift = (parts.max - maximum).masked_fill(~there, 0.0)  # t of the whole is t of the part and this
    factor = shift.exp()
    classes = parts.classes.sum(0)
    sum_t = (parts.sum_t + parts.classes * shift).sum(0)
    apart = (parts.sum_t / parts.classes + shift - sum_t / classes).masked_fill(~there, 0.0)  # of the means
    return Sums(
        max=maximum,
        sum_e=(factor * parts.sum_e).sum(0),
        sum_et=torch.where(factor == 0, 0.0, factor * (parts.sum_et + shift * parts.sum_e)).sum(0),
        sum_t=sum_t,
        sum_dd=(parts.sum_dd + parts.classes * apart * apart).sum(0),
        sum_zz=parts.sum_zz.sum(0),
        sum_w=parts.sum_w.sum(0),
        sum_wt=(parts.sum_wt + parts.sum_w * shift).sum(0),
        sum_q=parts.sum_q.sum(0),
        sum_qt=(parts.sum_qt + parts.sum_q * shift).sum(0),
        classes=classes,
    )


class Divergence(NamedTuple):
    """What is known of a reference beside some classes; the names are those of csrc/divergence.h."""

    max_z: Tensor
    max_r: Tensor
    to_p: Tensor
    to_q: Tensor
    log_ratio: Tensor
    forward: Tensor
    reverse: Tensor


def merged_divergence(parts: Divergence, there: Tensor, temperature: float) -> Divergence:
    """(N) from (parts, N): by the chain rule, a divergence is that of the parts' shares and the mean of the parts' own.

    KL(q ‖ p) = Σ_k a_k log(a_k / b_k) + Σ_k a_k KL(q_k ‖ p_k), a_k and b_k the shares of part k in q and p.

    Args:
        there: (parts, N) whether a part has a class that counts.
    """
    in_r = there & parts.to_q.isfinite()  # the reference excludes whole parts
    max_z, log_f, shares_p = _shares(parts.max_z, parts.to_p, there, temperature)
    max_r, log_e, shares_q = _shares(parts.max_r, parts.to_q, in_r, temperature)
    log_b, log_a = log_f - log_f.logsumexp(0), log_e - log_e.logsumexp(0)
    apart = (log_a - log_b).masked_fill(~in_r, 0.0)
    # a log(a/b) − a + b ≥ 0 for every part, and the sum of −a + b over all is 0.
    forward = torch.where(in_r, shares_q * apart - shares_q + shares_p, shares_p).sum(0)
    reverse = torch.where(in_r, -shares_p * apart - shares_p + shares_q, 0.0).sum(0)
    forward = forward + torch.where(shares_q == 0, 0.0, shares_q * parts.forward).masked_fill(~in_r, 0.0).sum(0)
    reverse = reverse + torch.where(shares_p == 0, 0.0, shares_p * parts.reverse).masked_fill(~in_r, 0.0).sum(0)
    reverse = reverse.masked_fill(((shares_p > 0) & there & ~in_r).any(0), torch.inf)
    log_e_sum, log_f_sum = (
        x.logsumexp(0) - m / temperature for x, m in ((log_e, max_r), (log_f, max_z))
    )  # relative to the maxima
    return Divergence(
        max_z, max_r, to_p=(-log_f_sum).exp() / temperature, to_q=(-log_e_sum).exp() / temperature,
        log_ratio=log_e_sum - log_f_sum, forward=forward, reverse=reverse,
    )  # fmt: skip


def _shares(maximum: Tensor, to: Tensor, there: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum of all parts; log Σ exp(·/T) of each; their shares. `to` is 1 / (T Σ exp((· − maximum)/T))."""
    of_all = maximum.masked_fill(~there, -torch.inf).amax(0)
    of_all = of_all.masked_fill(of_all == -torch.inf, 0.0)
    log_sums = (maximum / temperature - (to * temperature).log()).masked_fill(~there, -torch.inf)
    return of_all, log_sums, log_sums.softmax(0).masked_fill(~there, 0.0)


class Part(NamedTuple):
    """What a rank tells of its classes: (N) each, float64."""

    sums: Sums
    target: Tensor  # the label's z; −inf where it is elsewhere, or there is none
    is_first_maximum: Tensor  # 1 where the label is here, and the first maximum of the part
    beside: Divergence | None  # the reference

    def packed(self) -> Tensor:
        return torch.stack([*self.sums, self.target, self.is_first_maximum, *(self.beside or ())])

    @classmethod
    def unpacked(cls, numbers: Tensor) -> Part:
        """From (parts, fields, N) to fields of (parts, N)."""
        fields, size = numbers.unbind(1), len(Sums._fields)
        beside = fields[size + 2 :]
        return cls(Sums(*fields[:size]), fields[size], fields[size + 1], Divergence(*beside) if beside else None)


_FIELDS = (
    "max", "sum_e", "sum_et", "sum_t", "sum_dd", "sum_zz", "sum_w", "sum_wt", "sum_q", "sum_qt", "classes", "target",
    "target_weight", "target_is_max",
)  # fmt: skip  # of Centred in csrc/objective.h, before those of the divergence


def _part(centred: Tensor, elsewhere: Tensor | None, with_reference: bool) -> Part:
    """From the centred sums of a kernel, whose label is the first class where the label is `elsewhere`: that class
    then joins the others again."""
    found = dict(zip(_FIELDS, centred.unbind(0), strict=False))
    has_target = (found["target"] != -torch.inf).to(centred.dtype)
    others = Sums(**{name: found[name] for name in Sums._fields})._replace(classes=found["classes"] - has_target)
    target, first = found["target"], found["target_is_max"]
    if elsewhere is not None:
        zero, joins = torch.zeros_like(target), elsewhere & (target != -torch.inf)
        z = target.masked_fill(~joins, 0.0)
        one = joins.to(centred.dtype)
        alone = Sums(z, one, zero, zero, zero, z * z, found["target_weight"] * one, zero, zero, zero, one)
        others = merged(Sums(*(torch.stack(pair) for pair in zip(others, alone, strict=True))))
        target, first = target.masked_fill(elsewhere, -torch.inf), first.masked_fill(elsewhere, 0.0)
    beside = Divergence(*centred[len(_FIELDS) :].unbind(0)) if with_reference else None
    return Part(others, target, first, beside)


def _nothing(rows: int, with_reference: bool, like: Tensor) -> Part:
    """Of a rank without classes."""
    zero = like.new_zeros(rows, dtype=torch.float64)
    beside = Divergence(*[zero] * len(Divergence._fields)) if with_reference else None
    return Part(Sums(*[zero] * len(Sums._fields)), zero - torch.inf, zero, beside)


# ---- from the sums of a row to its statistics -----------------------------------------------------------------------


class _Whole(NamedTuple):
    """Of every row, on every rank: (CENTRED, N) sums as kernels take them, (statistics, N), and of this rank, whether
    the row's first maximum but the label is its own."""

    centred: Tensor
    statistics: Tensor
    holds_maximum: Tensor


def _whole(parts: Part, at: Shard, labels: Tensor | None, counted: Tensor | None, dense: bool, weight: Tensor | None,
           temperature: float) -> _Whole:  # fmt: skip
    """From the parts of all ranks.

    Args:
        labels: (N) of all classes.
        weight: (N) class weights of the labels, or None for 1.
    """
    c = merged(parts.sums)
    target = parts.target.amax(0)
    has_target = target != -torch.inf
    one = torch.ones_like(target)
    target_weight = torch.where(has_target, one if weight is None else weight.to(target), 0.0)
    ranks = torch.arange(len(at.sizes), device=target.device)[:, None]
    there = parts.sums.classes > 0
    # Ties go to the first class: of the others, to the first rank that holds the maximum; a label in the midst of the
    # ranks has to exceed those before it, and to equal those after it.
    holds = there & (parts.sums.max == c.max)
    holder = torch.where(holds, ranks, len(at.sizes)).amin(0)
    is_max = torch.zeros_like(target)
    if labels is not None:
        owner = at.owner(labels)
        beaten = torch.where(ranks < owner, parts.sums.max < target, parts.sums.max <= target) | ~there
        is_max = ((beaten | (ranks == owner)).all(0) & (parts.is_first_maximum.amax(0) > 0)).to(target)
    beside = None
    if parts.beside is not None:
        # A part of which only the label counts is beside the reference too.
        beside = merged_divergence(parts.beside, there | (parts.target != -torch.inf), temperature)
    centred = torch.stack([
        *c[:10], c.classes + has_target.to(target), target, target_weight, is_max,
        *(beside or [torch.zeros_like(target)] * len(Divergence._fields)),
    ])  # fmt: skip
    statistics = derived(c, target, target_weight, beside, dense)
    if counted is not None:
        centred, statistics = (torch.where(counted, x, 0.0) for x in (centred, statistics))
        bad = counted & ((labels < 0) | (labels >= at.classes))
        statistics = statistics.masked_fill(bad, torch.nan)
    return _Whole(centred, statistics, holder == at.rank)


def derived(c: Sums, target: Tensor, target_weight: Tensor, beside: Divergence | None, dense: bool) -> Tensor:
    """(statistics, N): `derive` of csrc/objective.h, which says what each line is."""
    has_target = target != -torch.inf
    number = has_target.to(target)
    n = c.classes + number
    log_s = c.sum_e.log()
    d = c.max - target + log_s
    nlp_target, nlp_others = -F.logsigmoid(-d), -F.logsigmoid(d)
    p_target, p_others = torch.sigmoid(-d), torch.sigmoid(d)
    mu = torch.where(c.sum_e == 0, 0.0, c.sum_et / c.sum_e)
    t_target, z_target = (torch.where(has_target, x, 0.0) for x in (target - c.max, target))
    others = torch.where(c.sum_e == 0, 0.0, _times(c.sum_w, nlp_others + log_s))
    weighted_nlp = _times(target_weight, nlp_target) + others - c.sum_wt
    apart = t_target - torch.where(c.classes == 0, 0.0, c.sum_t / c.classes)
    largest = torch.where(target < c.max, c.max, target)
    largest = torch.where(c.max == c.max, largest, c.max)
    zero = torch.zeros_like(target)
    found = Statistics(
        logprob=c.sum_qt - c.sum_q * log_s if dense else -nlp_target,
        other_logprob=-nlp_others,
        lse=torch.where(d < 0, target + nlp_target, c.max + log_s + nlp_others),
        entropy=_times(p_target, nlp_target) + _times(p_others, nlp_others + log_s - mu),
        max_logit=torch.where(c.sum_e == 0, torch.where(has_target, target, torch.nan), largest),
        mean_logit=c.max + (c.sum_t + t_target) / n,
        mean_square_logit=torch.where(c.max == c.max, (c.sum_zz + z_target * z_target) / n, c.max),
        logit_variance=(c.sum_dd + apart * apart * c.classes * number / n) / n,
        target_logit=target,
        mean_logprob=-weighted_nlp / n,
        forward_kl=zero if beside is None else beside.forward,
        reverse_kl=zero if beside is None else beside.reverse,
    )
    return torch.stack(list(found))


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a·b, and 0 where a is, whatever b is."""
    return torch.where(a == 0, 0.0, a * b)


# ---- a rank's own work ----------------------------------------------------------------------------------------------


class _Own(NamedTuple):
    """What a rank knows of the rows of its classes, without the tensors that have gradients; the arguments of ops."""

    family: str
    target: Tensor | None  # labels counted from its first class, see `Shard.local`; or probabilities of its classes
    class_weight: Tensor | None
    softcap: float
    reference: Tensor | None
    temperature: float
    reference_weight: Tensor | None = None  # of the last layer of a reference, whose hidden states `reference` are
    reference_bias: Tensor | None = None

    def tensors(self) -> list[Tensor | None]:
        return [getattr(self, name) for name in _TENSORS]

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> _Own:
        return self._replace(**dict(zip(_TENSORS, tensors, strict=True)))

    @property
    def labelled(self) -> bool:
        return self.target is not None and not self.target.is_floating_point()

    def elsewhere(self, classes: int) -> Tensor | None:
        """(N) rows that count, and whose label another rank holds."""
        if not self.labelled:
            return None
        labels = self.target
        return (labels != IGNORED) & ((labels < 0) | (labels >= classes))

    def options(self, logit_scale: Tensor | None) -> dict[str, Any]:
        found: dict[str, Any] = {
            "logit_scale": logit_scale, "class_weight": self.class_weight, "ignore_index": IGNORED,
            "softcap": self.softcap,
        }  # fmt: skip
        if self.reference is not None:
            found |= {"reference": self.reference, "temperature": self.temperature}
        return found


_TENSORS = ("target", "class_weight", "reference", "reference_weight", "reference_bias")


class _Logits(NamedTuple):
    """A rank's logits: tensors are (logits, logit_scale)."""

    own: _Own

    @property
    def ops(self) -> Any:
        return getattr(torch.ops, self.own.family)

    def collect(self, logits: Tensor, scale: Tensor | None) -> tuple[Part, Tensor | None]:
        rows, classes = logits.shape
        if classes == 0:
            return _nothing(rows, self.own.reference is not None, logits), None
        target, elsewhere = self.own.target, self.own.elsewhere(classes)
        if self.own.labelled:
            target = linear.with_first_elsewhere(target, classes, IGNORED)
        _, centred = self.ops.statistics(logits, target, **self.own.options(scale))
        return _part(centred, elsewhere, self.own.reference is not None), None

    def gradients(self, partials: Tensor, centred: Tensor, _: Tensor | None, needs: Sequence[bool], at: Shard,
                  logits: Tensor, scale: Tensor | None) -> tuple[Tensor | None, ...]:  # fmt: skip
        if logits.shape[1] == 0:
            g, of_scale = torch.zeros_like(logits), None if scale is None else torch.zeros_like(scale)
        else:
            g = self.ops.statistics_gradient(
                partials, centred, needs[1], logits, self.own.target, **self.own.options(scale)
            )
            of_scale = None
            if needs[1]:  # what has no gradient (an excluded class) may be infinite
                of_scale = torch.where(g == 0, 0.0, g.to(torch.float64) * logits).sum().to(scale)
                g = g * scale.to(g)
        if needs[1]:
            _reduce(of_scale, at)
        return g if needs[0] else None, of_scale


class _Layer(NamedTuple):
    """A rank's part of the last layer: tensors are (hidden, weight, bias, logit_scale)."""

    own: _Own
    chunk_rows: int
    skip_ignored: bool
    reduces: bool  # the gradient of the hidden states is summed over the ranks here

    def arguments(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> tuple[Any, ...]:
        own = self.own
        return (
            own.family, hidden, weight, bias, own.target, scale, own.class_weight, IGNORED, own.softcap, True,
            own.reference, own.temperature, own.reference_weight, own.reference_bias,
        )  # fmt: skip

    def collect(self, *tensors: Any) -> tuple[Part, Tensor | None]:
        hidden, weight, *_ = tensors
        if len(weight) == 0:
            return _nothing(len(hidden), self.own.reference is not None, hidden), hidden.new_zeros(2, len(hidden))
        elsewhere = self.own.elsewhere(len(weight))
        _, centred, maximum = linear.without_autocast(linear.collect)(
            *self.arguments(*tensors), self.chunk_rows, self.skip_ignored, True
        )
        return _part(centred, elsewhere, self.own.reference is not None), maximum

    def gradients(self, partials: Tensor, centred: Tensor, maximum: Tensor | None, needs: Sequence[bool], at: Shard,
                  *tensors: Any) -> tuple[Tensor | None, ...]:  # fmt: skip
        scale, needs_scale = tensors[3], needs[3]
        reduction = _Reduction(at) if self.reduces and needs[0] else None
        found = list(linear.without_autocast(linear.gradients_of_statistics)(
            partials, centred, maximum, *self.arguments(*tensors), list(needs[:3]), self.chunk_rows,
            self.skip_ignored, needs_scale, reduction,
        ))  # fmt: skip
        if needs_scale:
            found[3] = found[3].to(scale)
            _reduce(found[3], at)
        return tuple(g if need else None for g, need in zip(found, needs, strict=True))


class _Reduction:
    """The sum of a tensor over the ranks, under way while other work is done."""

    def __init__(self, at: Shard) -> None:
        self.at, self.work = at, None

    def begin(self, x: Tensor) -> None:
        import torch.distributed as dist

        self.work = dist.all_reduce(x, group=self.at.group, async_op=True)

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()


def _reduce(x: Tensor, at: Shard) -> None:
    import torch.distributed as dist

    dist.all_reduce(x, group=at.group)


# ---- autograd -------------------------------------------------------------------------------------------------------


class _Statistics(torch.autograd.Function):
    """(statistics, N) float64 and (N) whether the label is the first maximum, the same on every rank."""

    @staticmethod
    def forward(
        ctx: Any, work: Any, at: Shard, whole: Callable[[Part], _Whole], *tensors: Any
    ) -> tuple[Tensor, Tensor]:
        part, maximum = work.collect(*tensors)
        found = whole(_gathered(part, at))
        # All tensors are saved as such: what was changed since is an error, and they are free after the backward pass.
        constants = work.own.tensors()
        ctx.work, ctx.at = work._replace(own=work.own.with_tensors([None] * len(constants))), at
        ctx.save_for_backward(found.centred, found.holds_maximum, maximum, *constants, *tensors)
        first = found.centred[_FIELDS.index("target_is_max")] > 0
        ctx.mark_non_differentiable(first)
        return found.statistics, first

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, partials: Tensor, _: Tensor) -> tuple[Any, ...]:
        centred, holds_maximum, maximum, *rest = ctx.saved_tensors
        constants, tensors = rest[: len(_TENSORS)], rest[len(_TENSORS) :]
        work = ctx.work._replace(own=ctx.work.own.with_tensors(constants))
        partials = partials.contiguous().clone()
        of_max = Statistics._fields.index("max_logit")
        at_target = centred[_FIELDS.index("target_is_max")] > 0
        partials[of_max].masked_fill_(~(holds_maximum | at_target), 0.0)  # another rank holds it
        needs = ctx.needs_input_grad[3:]
        return None, None, None, *work.gradients(partials, centred, maximum, needs, ctx.at, *tensors)


def _gathered(part: Part, at: Shard) -> Part:
    """The parts of all ranks, in their order."""
    return Part.unpacked(_all_gather(part.packed(), len(at.sizes), at.group))


def _all_gather(own: Tensor, ranks: int, group: ProcessGroup) -> Tensor:
    """(ranks, ...) of everyone's."""
    import torch.distributed as dist

    everyone = own.new_empty(ranks * own.shape[0], *own.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name since torch 2.13
    gather(everyone, own, group=group)
    return everyone.view(ranks, *own.shape)


# ---- calls ----------------------------------------------------------------------------------------------------------


def statistics(
    run: ops.Backend, at: Shard, batch: Batch, layer: linear.Layer | None = None, reduces: bool = True,
    in_forward: bool = False,
) -> tuple[Statistics, Tensor]:  # fmt: skip
    """The statistics of every row, and whether its label is the first maximum.

    Args:
        batch: labels and class weights of all classes; logits, probabilities and reference of the rank's own.
        layer: the rank's part of the last layer, in the place of logits.
        reduces: whether the gradient of the hidden states is summed over the ranks here.
        in_forward: whether the gradient was asked for with the loss.

    Raises:
        ValueError: it was, or the class weight is not that of all classes.
        NotImplementedError: a derivative, or a backend, that there is not for a part of the classes.
    """
    if in_forward:
        raise ValueError(
            'gradient (or mode): "forward" is not for classes that are split among ranks: what a row is as a whole is '
            "only known once all have looked at their parts"
        )
    if run.family is None:
        raise NotImplementedError(
            'backend: "reference" needs all classes of a row; gather them, or take a backend with kernels'
        )
    for name, x in (("target", batch.target), ("reference", batch.reference)):
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{name}: one that requires grad cannot be split among ranks; detach it")
    labels = None if batch.dense else batch.target
    if batch.validate:
        reference.check_labels(labels, at.classes, batch.ignore_index)
    class_weight = batch.class_weight
    if class_weight is not None:
        if class_weight.shape != (at.classes,):
            raise ValueError(
                f"class weight: expected shape ({at.classes},), that of all ranks' classes, but got "
                f"{tuple(class_weight.shape)}"
            )
        class_weight = class_weight[at.own].contiguous()
    own = _Own(
        run.family, at.local(labels, batch.ignore_index) if labels is not None else batch.target, class_weight,
        batch.softcap, batch.reference, batch.temperature,
        *(() if layer is None else (layer.reference_weight, layer.reference_bias)),
    )  # fmt: skip
    weight = batch.row_weight()

    def whole(parts: Part) -> _Whole:
        of_rows = weight if isinstance(weight, Tensor) else None
        return _whole(parts, at, labels, batch.counted(), batch.dense, of_rows, batch.temperature)

    if layer is None:
        found, first = _Statistics.apply(_Logits(own), at, whole, batch.logits, batch.logit_scale)
    else:
        tensors = (layer.hidden, layer.weight, layer.bias, batch.logit_scale)
        work = _Layer(own, layer.chunk_rows, layer.skip_ignored, reduces)
        found, first = _Statistics.apply(work, at, whole, *tensors)
    return ops.named_statistics(found, batch), first


# ---- DTensors, and what comes with a process group ------------------------------------------------------------------


def is_dtensor(*tensors: object) -> bool:
    """Whether one of them is a torch.distributed.tensor.DTensor."""
    return any(type(x) not in _PLAIN and isinstance(x, Tensor) and hasattr(x, "device_mesh") for x in tensors)


_PLAIN = (Tensor, torch.nn.Parameter)


def of_logits(
    logits: Tensor, target: Tensor | None, reference: Tensor | None, group: ProcessGroup | Shard | None, class_dim: int
) -> tuple[Shard | None, Tensor, Tensor | None, Tensor | None]:
    """The shard, or None if the rank has all classes; and the rank's own tensors.

    Raises:
        ValueError: a placement that cannot be served, by its name.
    """
    _of_torch("logits", logits)
    if not is_dtensor(logits):
        for name, x in (("target", target), ("reference", reference)):
            _plain(name, x, "the logits")
        return _part_of(group, logits.shape[class_dim], logits.device), logits, target, reference
    split = _split("logits", logits, class_dim)
    reference = _beside("reference", reference, logits, class_dim)
    dense = isinstance(target, Tensor) and target.is_floating_point()
    target = _beside("target", target, logits, class_dim if dense else None)
    return _of_mesh(logits, split, class_dim, group), logits.to_local(), target, reference


def of_layer(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None, reference: Any,
    group: ProcessGroup | Shard | None,
) -> tuple[Shard | None, bool, tuple[Tensor, Tensor, Tensor | None], Tensor | None, Any]:  # fmt: skip
    """The shard, or None if the rank has all classes; whether the gradient of the hidden states is still to be summed;
    the rank's own tensors.

    Raises:
        ValueError: a placement that cannot be served, by its name.
        TypeError: DTensors beside tensors of which nobody knows how they are spread.
    """
    from torch.distributed.tensor import Partial, Replicate
    from torch.distributed.tensor import Shard as Sharded

    for name, x in (("hidden", hidden), ("weight", weight)):
        _of_torch(name, x)
    if not is_dtensor(weight):
        for name, x in (("hidden", hidden), ("bias", bias), ("target", target)):
            _plain(name, x, "the weight")
        if not isinstance(reference, (tuple, list)):
            reference = (reference,)
            _plain("reference", reference[0], "the weight")
            reference = reference[0]
        return _part_of(group, weight.shape[0], weight.device), True, (hidden, weight, bias), target, reference
    if not is_dtensor(hidden) and group is None:
        raise TypeError(
            "weight: a DTensor beside hidden states that are none may be split by FSDP, each rank with rows of its "
            "own, or by class, all with the same rows. Within the forward pass of its module FSDP's is whole; for "
            "classes, pass process_group, or hidden states as DTensor"
        )
    split = _split("weight", weight, 0)
    bias = _beside("bias", bias, weight, 0)
    target = _beside("target", target, weight, None)
    if isinstance(reference, (tuple, list)) and len(reference) > 1:
        given, *head = reference
        reference = (_beside("reference: hidden", given, weight, None),
                     *(_beside("reference: weight and bias", x, weight, 0) for x in head))  # fmt: skip
    elif isinstance(reference, Tensor):
        reference = _beside("reference", reference, weight, -1)
    reduces = True
    if is_dtensor(hidden):
        if hidden.device_mesh != weight.device_mesh:
            raise ValueError(f"hidden: expected the weight's mesh {weight.device_mesh} but got {hidden.device_mesh}")
        for place, placement in enumerate(hidden.placements):
            rows = type(placement) is Sharded and placement.dim % hidden.dim() != hidden.dim() - 1 and place == split
            if not (placement.is_replicate() or rows):
                raise ValueError(
                    f"hidden: {placement} on dimension {place} of the mesh cannot be served: expected Replicate(), or "
                    "on the dimension that splits the classes Shard of a dimension of the rows"
                )
            reduces = reduces and not rows
        if reduces:
            hidden = hidden.to_local()
        else:  # gathered; its gradient, of which each rank has a part, is scattered as it is summed
            everywhere = [Replicate()] * hidden.device_mesh.ndim
            parts = [Partial() if place == split else Replicate() for place in range(hidden.device_mesh.ndim)]
            hidden = hidden.redistribute(placements=everywhere).to_local(grad_placements=parts)
    at = _of_mesh(weight, split, 0, group)
    return at, reduces, (hidden, weight.to_local(), bias), target, reference


def _of_torch(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor but got {describe(x)}")
    if x.dim() == 0:
        raise ValueError(f"{name}: expected a tensor with a dimension for classes but got a 0-dim one")


def _plain(name: str, x: object, beside: str) -> None:
    if is_dtensor(x):
        raise TypeError(f"{name}: a DTensor beside {beside}, a plain tensor; expected the rank's own part")


def _split(name: str, x: Any, dim: int) -> int | None:
    """The dimension of the mesh that splits the classes, or None; every other one has to replicate."""
    from torch.distributed.tensor import Shard as Sharded

    found = None
    for place, placement in enumerate(x.placements):
        if placement.is_replicate():
            continue
        if type(placement) is not Sharded or placement.dim % x.dim() != dim % x.dim() or found is not None:
            raise ValueError(
                f"{name}: {placement} on dimension {place} of the mesh cannot be served: expected "
                f"Shard({dim % x.dim()}) on one dimension of the mesh, which splits the classes, and Replicate() on "
                "all others"
            )
        found = place
    return found


def _beside(name: str, x: Any, other: Any, dim: int | None) -> Any:
    """The rank's own part of a tensor beside another that is split by class; `dim`: the classes of this one, if any."""
    if not is_dtensor(x):
        return x
    of_classes = any(not placement.is_replicate() for placement in other.placements)
    for place, placement in enumerate(x.placements):
        wanted = dim is not None and of_classes and not other.placements[place].is_replicate()
        right = getattr(placement, "dim", None) is not None and placement.dim % x.dim() == (dim or 0) % x.dim()
        if x.device_mesh != other.device_mesh or (not right if wanted else not placement.is_replicate()):
            expected = f"Shard({dim % x.dim()})" if wanted else "Replicate()"
            raise ValueError(
                f"{name}: {placement} on dimension {place} of its mesh cannot be served: expected {expected} on the "
                "mesh of the tensor that is split by class"
            )
    return x.to_local()


def _of_mesh(x: Any, split: int | None, dim: int, group: ProcessGroup | Shard | None) -> Shard | None:
    """Of a DTensor, whose parts are as long as `torch.chunk` makes them."""
    import torch.distributed as dist

    if split is None:
        if group is not None:
            raise ValueError("process_group: its ranks hold all classes each, as DTensors that are replicated")
        return None
    own = x.device_mesh.get_group(split)
    group = group.group if isinstance(group, Shard) else group
    if group is not None and dist.get_process_group_ranks(group) != dist.get_process_group_ranks(own):
        raise ValueError("process_group: another than that of the mesh's dimension that splits the classes")
    count, classes = dist.get_world_size(own), x.shape[dim]
    step = -(-classes // count)
    sizes = tuple(max(0, min(classes, (rank + 1) * step) - rank * step) for rank in range(count))
    return Shard(own, dist.get_rank(own), sizes)


# ---- weights of which each rank has a part --------------------------------------------------------------------------


def own(x: Tensor) -> Tensor:
    """The rank's own part of a DTensor, or the tensor."""
    return x.to_local() if is_dtensor(x) else x


def spread(x: Any) -> tuple[Any, tuple[int, ...]] | None:
    """The mesh of a DTensor and those of its dimensions that split it; None of a plain tensor.

    Raises:
        ValueError: a placement that cannot be served.
    """
    if not is_dtensor(x):
        return None
    for placement in x.placements:
        if placement.is_partial():
            raise ValueError(f"parameters: {placement}, of which each rank has a summand, cannot be served")
    return x.device_mesh, tuple(k for k, placement in enumerate(x.placements) if not placement.is_replicate())


def gradient_of(parameter: Tensor) -> Tensor | None:
    """The rank's own part of its gradient, which is brought to be spread as the parameter is, if it is otherwise."""
    spread(parameter)  # raises for what cannot be served
    g = parameter.grad
    if is_dtensor(g) and is_dtensor(parameter) and g.placements != parameter.placements:
        g = parameter.grad = g.redistribute(parameter.device_mesh, parameter.placements)
    return None if g is None else own(g)


def spread_like(part: Tensor, x: Any) -> Tensor:
    """The DTensor of which this is the rank's own part, as `x` is spread; the part itself if that is plain."""
    if not is_dtensor(x):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
    )  # fmt: skip


def part_of(whole: Tensor, x: Any) -> Tensor:
    """A whole tensor, which every rank has, spread as `x` is; of one that is spread, the same spread so."""
    if not is_dtensor(x):
        return whole
    if is_dtensor(whole):
        same = whole.placements == x.placements and whole.device_mesh == x.device_mesh
        return whole if same else whole.redistribute(x.device_mesh, x.placements)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, x.device_mesh, x.placements, src_data_rank=None).clone()


class _OfAllParts(torch.autograd.Function):
    """The sum of a number over the ranks: the same on each, and each has the derivative by its own."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, mesh: Any, dims: tuple[int, ...]) -> Tensor:
        import torch.distributed as dist

        total = value.clone()
        for dim in dims:
            dist.all_reduce(total, group=mesh.get_group(dim))
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        return upstream, None, None


def of_all_parts(value: Tensor, where: tuple[Any, tuple[int, ...]] | None) -> Tensor:
    """The value of the whole from that of the rank's own part, with `where` as `spread` gives it."""
    return value if where is None else _OfAllParts.apply(value, *where)


def shard_of(weight: Any) -> Shard | None:
    """The rank's part of a weight that is split by class; None if it is not."""
    return _of_mesh(weight, _split("weight", weight, 0), 0, None) if is_dtensor(weight) else None


def whole_logits(hidden: Tensor, weight: Any, bias: Any = None) -> Tensor:
    """``F.linear(hidden, weight, bias)`` on every rank, of a weight that is split by class or whole."""
    if not is_dtensor(weight):
        return F.linear(hidden, weight, bias)
    from torch.distributed.tensor import DTensor, Replicate

    hidden = DTensor.from_local(
        hidden, weight.device_mesh, [Replicate()] * weight.device_mesh.ndim, run_check=False
    )  # fmt: skip
    return F.linear(hidden, weight, bias).full_tensor()
