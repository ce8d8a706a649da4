"""Objectives over a split vocabulary: rows 14, 24, 25, 26 of other projects' mistakes. Ranks are processes under gloo."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import objkern
from objkern import (
    CrossEntropy,
    Entropy,
    Focal,
    GeneralizedCrossEntropy,
    KLDivergence,
    LogitL2,
    Margin,
    MaxZLoss,
    Objective,
    Poly1,
    Unlikelihood,
    ZLoss,
    custom,
    distributed,
    scale,
)

from .ranks import Ranks, group

ROWS, CLASSES, FEATURES = 13, 37, 8
SPLITS = {  # how many classes each rank holds
    "one": (37,), "two": (19, 18), "uneven": (30, 7), "four": (10, 9, 9, 9), "some have none": (0, 36, 0, 1),
    "a class each": (1, 1, 34, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(4) as started:
        yield started


# ---- one call, whole and in parts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    objective: Objective
    target: str = "labels"  # "probabilities", "none"
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    reference: bool = False
    excluded: bool = False  # some classes have −inf
    learns_scale: bool = False
    weighted_rows: bool = False
    broken: bool = False  # NaN, infinities, rows without classes; of logits alone
    far: bool = False  # some classes have a probability that is 0 in any dtype
    least: bool = False  # some classes are masked by the least number there is


def by_advantage(s: objkern.Statistics, advantage: Tensor) -> Tensor:
    return -advantage * s.logprob.exp().clamp(max=0.5) + 0.1 * s.entropy * s.max_logit


def mixed(s: objkern.Statistics) -> Tensor:
    return s.logit_variance * s.mean_logit + s.mean_logprob * s.target_logit + s.other_logprob * s.lse


def unlabelled(s: objkern.Statistics) -> Tensor:
    return s.logit_variance * s.mean_logit + s.mean_logprob * s.lse + s.mean_square_logit + s.max_logit * s.entropy


WEIGHT = torch.linspace(0.2, 2.0, CLASSES, dtype=torch.float64)
CALLS = {
    "cross-entropy": Call(CrossEntropy()),
    "smoothing": Call(CrossEntropy(label_smoothing=0.1)),
    "class weights": Call(CrossEntropy(WEIGHT)),
    "class weights, smoothing": Call(CrossEntropy(WEIGHT, label_smoothing=0.2), excluded=True),
    "probabilities": Call(CrossEntropy(), target="probabilities"),
    "probabilities, weights, smoothing": Call(CrossEntropy(WEIGHT, label_smoothing=0.2), target="probabilities"),
    "z-loss": Call(ZLoss(), target="none"),
    "max z-loss": Call(MaxZLoss()),
    "max z-loss, no target": Call(MaxZLoss(), target="none"),
    "entropy": Call(Entropy(), excluded=True),
    "focal": Call(Focal(gamma=2.0)),
    "poly-1": Call(Poly1(epsilon=1.0)),
    "generalized": Call(GeneralizedCrossEntropy(q=0.7)),
    "unlikelihood": Call(Unlikelihood()),
    "margin": Call(Margin(m=0.3)),
    "logit L2": Call(LogitL2(), excluded=True),
    "forward KL": Call(KLDivergence(temperature=2.0), target="none", reference=True),
    "reverse KL": Call(KLDivergence("reverse"), target="none", reference=True),
    "both KL, excluded": Call(
        CrossEntropy() + KLDivergence() + 0.5 * KLDivergence("reverse"), reference=True, excluded=True
    ),
    "custom": Call(custom(by_advantage), weighted_rows=True),
    "custom, all statistics": Call(CrossEntropy() + custom(mixed)),
    "custom, no target": Call(custom(unlabelled), target="none"),
    "reverse KL, far": Call(KLDivergence("reverse"), target="none", reference=True, far=True),
    "regularized": Call(
        CrossEntropy(label_smoothing=0.1) + 1e-2 * ZLoss() - 0.1 * Entropy() + 1e-2 * LogitL2() + 0.1 * MaxZLoss(),
        options={"softcap": 5.0}, learns_scale=True,
    ),
    "float32": Call(CrossEntropy(label_smoothing=0.1) - 0.1 * Entropy(), dtype=torch.float32),
    "bfloat16": Call(CrossEntropy(label_smoothing=0.1) + 1e-2 * ZLoss(), dtype=torch.bfloat16),
    "a loss per row": Call(CrossEntropy() + 0.1 * ZLoss(), options={"reduction": "none"}),
    "a sum": Call(CrossEntropy() + 0.1 * ZLoss(), options={"reduction": "sum"}),
    "a normalizer": Call(CrossEntropy(WEIGHT) + 0.1 * ZLoss(), options={"normalizer": 7.0}),
    "broken rows": Call(
        CrossEntropy(label_smoothing=0.1) + 0.1 * ZLoss() - 0.1 * Entropy() + 0.1 * MaxZLoss() + 0.1 * LogitL2(),
        options={"reduction": "none"}, broken=True,
    ),
    "masks": Call(CrossEntropy() - 0.1 * Entropy() + 0.1 * MaxZLoss(), dtype=torch.float32, least=True),
    "masks, float64": Call(CrossEntropy() - 0.1 * Entropy(), least=True),
    "masks, reverse KL": Call(
        KLDivergence("reverse", 0.5) + custom(lambda s: s.lse), target="none", reference=True, dtype=torch.float32,
        least=True,
    ),
    "the second class is ignored": Call(CrossEntropy(label_smoothing=0.1), options={"ignore_index": 1}),
}  # fmt: skip


def inputs(call: Call) -> dict[str, Any]:
    """Of all classes."""
    draw = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(ROWS, CLASSES, generator=draw, dtype=torch.float64)
    z[3, 5] = z[3, 20] = z[3, 36] = 11.0  # a maximum that several ranks hold
    found: dict[str, Any] = {"hidden": torch.randn(ROWS, FEATURES, generator=draw, dtype=torch.float64)}
    found["weight"] = torch.randn(CLASSES, FEATURES, generator=draw, dtype=torch.float64)
    found["bias"] = torch.randn(CLASSES, generator=draw, dtype=torch.float64)
    if call.excluded:
        z[:, 30:] = -torch.inf  # all that a rank has
        z[::2, 4] = -torch.inf
        found["bias"][30:] = -torch.inf
        found["bias"][4] = -torch.inf
    if call.far:
        z[:, 30:] -= 1e4
        found["bias"][30:] -= 1e4
    z[10, 6] = z[10, 36] = 12.0
    if call.least:
        least = torch.finfo(call.dtype).min
        z[:, 30:] = z[1::2, 4] = found["bias"][30:] = least
    if call.broken:
        z[10, :], z[10, 3], z[10, 22] = -torch.inf, 1.0, 2.0  # two classes
        z[0, 8], z[1, 3], z[2, :] = torch.nan, torch.inf, -torch.inf
        z[4, :], z[4, 11] = -torch.inf, 2.0
        z[6, :], z[6, 2] = -torch.inf, 2.0
        z[7, 25] = torch.inf
        z[8, :10] = -torch.inf
    labels = torch.randint(30, (ROWS,), generator=draw)
    labels[3] = 20
    labels[labels == 4] = 3
    labels[:3] = torch.tensor([1, 29, 19])
    labels[10] = 3 if call.broken else 6
    if call.broken:
        labels[4], labels[6], labels[7], labels[8] = 11, 3, 25, 5
    labels[5] = labels[9] = call.options.get("ignore_index", -100)
    found |= {"logits": z.to(call.dtype), "labels": labels, "upstream": torch.rand(ROWS, generator=draw) + 0.5}
    found["probabilities"] = torch.rand(ROWS, CLASSES, generator=draw, dtype=torch.float64).softmax(-1).to(call.dtype)
    found["reference"] = 3 * torch.randn(ROWS, CLASSES, generator=draw, dtype=torch.float64)
    found["reference"][:, 7] = -torch.inf if "reverse" not in repr(call.objective) else 0.0
    found["advantage"] = torch.randn(ROWS, generator=draw, dtype=torch.float64)
    found |= {name: found[name].to(call.dtype) for name in ("hidden", "weight", "bias")}
    return found


def evaluated(name: str, own: slice, kind: str, **options: Any) -> dict[str, Tensor]:
    """The loss, its parts and its gradients for some of the classes."""
    call = CALLS[name]
    given = inputs(call)
    options |= call.options
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=call.learns_scale)
    options["logit_scale"] = scale
    if call.reference:
        options["reference"] = given["reference"][:, own]
    if call.weighted_rows:
        options["rows"] = {"advantage": given["advantage"]}
    target = {"labels": given["labels"], "probabilities": given["probabilities"][:, own], "none": None}[call.target]
    objective = call.objective.to(call.dtype)
    if kind == "logits":
        leaves = {"logits": given["logits"][:, own].requires_grad_()}
        loss, parts = objective(leaves["logits"], target, return_parts=True, **options)
    else:
        leaves = {"hidden": given["hidden"].requires_grad_()}
        leaves |= {name: given[name][own].requires_grad_() for name in ("weight", "bias")}
        loss, parts = objective.linear(
            leaves["hidden"], leaves["weight"], target, leaves["bias"], return_parts=True, **options
        )
    leaves |= {"scale": scale} if call.learns_scale else {}
    upstream = given["upstream"].to(loss) if loss.dim() else torch.tensor(1.7, dtype=loss.dtype)
    gradients = torch.autograd.grad(loss, list(leaves.values()), upstream)
    return {"loss": loss.detach(), **parts} | {f"d {n}": g for n, g in zip(leaves, gradients, strict=True)}


def on_a_rank(names: list[str], split: tuple[int, ...], kind: str) -> dict[str, dict[str, Tensor]] | None:
    rank, of = dist.get_rank(), group(len(split))
    if of is None:
        return None
    own = slice(sum(split[:rank]), sum(split[: rank + 1]))
    at = distributed.shard(of, split[rank])
    assert at.sizes == split
    return {name: evaluated(name, own, kind, process_group=at) for name in names}


def same(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    bound = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 8e-3}[dtype]
    finite = expected.isfinite()
    assert torch.equal(found.isnan(), expected.isnan()), what
    assert torch.equal(found[~finite & ~expected.isnan()], expected[~finite & ~expected.isnan()]), what
    scale = expected[finite].abs().max().item() if finite.any() else 1.0
    error = (found[finite].double() - expected[finite].double()).abs().max().item() if finite.any() else 0.0
    assert error <= bound * max(scale, 1e-3), f"{what}: {error:.1e} of {scale:.1e}"


@pytest.mark.parametrize("kind", ["logits", "linear"])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_a_split_vocabulary_is_a_whole_one(split: tuple[int, ...], kind: str, ranks: Ranks) -> None:
    """14, 25: every term, loss, parts and all gradients, with 1, 2 and 4 ranks."""
    found = [one for one in ranks(on_a_rank, list(CALLS), split, kind) if one is not None]
    assert len(found) == len(split)
    for name, call in CALLS.items():
        expected = evaluated(name, slice(None), kind)
        of_classes = ("d logits", "d weight", "d bias")
        for key, value in expected.items():
            if key in of_classes:
                same(torch.cat([one[name][key] for one in found], dim=1 if key == "d logits" else 0), value,
                     call.dtype, f"{name}: {key}")  # fmt: skip
                continue
            for one in found:
                same(one[name][key], value, call.dtype if key == "d hidden" or call.dtype != torch.bfloat16
                     else torch.float32, f"{name}: {key}")  # fmt: skip
                torch.testing.assert_close(one[name][key], found[0][name][key], rtol=0, atol=0, equal_nan=True,
                                           msg=f"{name}: {key}: ranks differ")  # fmt: skip
        assert set(found[0][name]) == set(expected)


def small_divergence(of: Any = None, own: slice = slice(None), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Both directions, of distributions that differ in the third digit of their logits."""
    draw = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(ROWS, CLASSES, generator=draw)).to(dtype)
    r = z + (1e-3 * torch.randn(ROWS, CLASSES, generator=draw)).to(dtype)
    options = {"reference": r[:, own], "process_group": of, "reduction": "none"}
    return [KLDivergence(which)(z[:, own], **options) for which in ("forward", "reverse")]


def excluded_divergence(of: Any = None, own: slice = slice(None)) -> Tensor:
    """From a reference that excludes what has a probability, the classes of a rank."""
    z = torch.arange(74.0).view(2, 37).sin()
    r = z.cos()
    r[0, 20:] = -torch.inf
    return KLDivergence("reverse")(z[:, own], reference=r[:, own], process_group=of, reduction="none")


def excluded_divergence_on_a_rank() -> Tensor | None:
    of, rank = group(2), dist.get_rank()
    return None if of is None else excluded_divergence(of, slice(0, 20) if rank == 0 else slice(20, CLASSES))


def test_a_reference_that_excludes_the_classes_of_a_rank(ranks: Ranks) -> None:
    expected = excluded_divergence()
    assert expected[0] == torch.inf
    for found in ranks(excluded_divergence_on_a_rank)[:2]:
        torch.testing.assert_close(found, expected)


def of_any_shape(kind: str) -> Tensor | None:
    """Rows in two dimensions, on two ranks of which one has no classes."""
    of, rank = group(2), dist.get_rank()
    if of is None:
        return None
    z, own = torch.arange(24.0).view(2, 3, 4).sin(), slice(0, 4 if rank else 0)
    y = torch.tensor([[0, 3, 1], [-100, 2, 0]])
    if kind == "logits":
        return CrossEntropy()(z[..., own], y, process_group=of)
    return CrossEntropy().linear(z, torch.eye(4)[own], y, process_group=of)


@pytest.mark.parametrize("kind", ["logits", "linear"])
def test_rows_of_any_shape_where_a_rank_has_no_classes(kind: str, ranks: Ranks) -> None:
    z, y = torch.arange(24.0).view(2, 3, 4).sin(), torch.tensor([[0, 3, 1], [-100, 2, 0]])
    for found in ranks(of_any_shape, kind)[:2]:
        torch.testing.assert_close(found, F.cross_entropy(z.flatten(0, 1), y.flatten()))


def after_a_change() -> list[str] | None:
    """What the backward pass says of tensors that were changed since the forward pass."""
    of = group(1)
    if of is None:
        return None
    said = []
    for kind in ("reference", "target"):
        z = torch.randn(4, 6, requires_grad=True)
        beside = torch.rand(4, 6).softmax(-1)
        given = {"reference": beside} if kind == "reference" else {"target": beside}
        loss = (KLDivergence() if kind == "reference" else CrossEntropy())(z, **given, process_group=of)
        beside.mul_(0.5)
        try:
            loss.backward()
            said.append("nothing")
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_what_was_changed_since_the_forward_pass_is_an_error(ranks: Ranks) -> None:
    said = ranks(after_a_change)[0]
    assert len(said) == 2
    assert all("modified by an inplace operation" in words for words in said)


def kept_alive() -> list[bool] | None:
    """Hidden states after the backward pass, while the loss is still there, and a group after its end."""
    of = group(1)
    if of is None:
        return None
    hidden = torch.randn(4, 5, requires_grad=True) * 1.0
    alive = weakref.ref(hidden)
    loss = CrossEntropy().linear(hidden, torch.randn(6, 5), torch.tensor([0, 1, 2, 3]), process_group=of)
    loss.backward()
    del hidden
    gc.collect()
    found = [alive() is not None]
    own = dist.new_group([0], use_local_synchronization=True)
    CrossEntropy()(torch.randn(2, 6), torch.tensor([0, 3]), process_group=own)
    alive = weakref.ref(own)
    dist.destroy_process_group(own)
    del own
    gc.collect()
    return [*found, alive() is not None]


def test_nothing_is_kept_alive(ranks: Ranks) -> None:
    assert ranks(kept_alive)[0] == [False, False]


def bad_labels() -> Tensor | None:
    """Where nobody looks for them, as on a GPU."""
    of, rank = group(2), dist.get_rank()
    if of is None:
        return None
    z = torch.arange(20.0).view(4, 5).sin()[:, slice(0, 2) if rank == 0 else slice(2, 5)]
    check, distributed.reference.check_labels = distributed.reference.check_labels, lambda *_: None
    try:
        return CrossEntropy()(z, torch.tensor([0, 5, -3, -100]), process_group=of, reduction="none")
    finally:
        distributed.reference.check_labels = check


def test_bad_labels_that_nobody_looks_for_have_no_loss(ranks: Ranks) -> None:
    for found in ranks(bad_labels)[:2]:
        assert found.isnan().tolist() == [False, True, True, False]
        assert found[3] == 0


def test_a_sum_that_is_under_way_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Work:
        def wait(self) -> None:
            said.append("waited")

    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: said.append("begun") or Work())
    reduction = distributed._Reduction(distributed.Shard(None, 0, (3,)))
    reduction.wait()
    reduction.begin(torch.ones(2))
    reduction.wait()
    assert said == ["begun", "waited"]


def small_divergence_on_a_rank() -> list[Tensor] | None:
    of, rank = group(2), dist.get_rank()
    return None if of is None else small_divergence(of, slice(0, 20) if rank == 0 else slice(20, CLASSES))


def test_a_small_divergence_keeps_its_digits(ranks: Ranks) -> None:
    """1e-6 in float32, whose shares of the parts are no better known than that."""
    truth = small_divergence(dtype=torch.float64)
    assert all(0 < value.max() < 1e-5 for value in truth)
    for found in ranks(small_divergence_on_a_rank)[:2]:
        for ours, exact in zip(found, truth, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=2e-3, atol=0)


# ---- what is communicated -------------------------------------------------------------------------------------------


class Counts(TorchDispatchMode):
    """The collectives within it: by name, bytes of the tensor that the rank hands over."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace in ("c10d", "_c10d_functional") and not any(x in op._schema.name for x in ("wait", "wrap")):
            tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)]
            own = tensors[-1]  # what is gathered or scattered comes after where it goes
            self.found.append((op._schema.name.partition("::")[2], own.numel() * own.element_size()))
        return op(*args, **(kwargs or {}))

    def taken(self) -> list[tuple[str, int]]:
        found, self.found = self.found, []
        return found


def counted(kind: str, known: bool, learns_scale: bool) -> list[list[tuple[str, int]]] | None:
    """What the forward and the backward pass send."""
    of = group(2)
    if of is None:
        return None
    draw = torch.Generator().manual_seed(0)
    own = 19 if dist.get_rank() == 0 else 18
    z, y = torch.randn(ROWS, own, generator=draw), torch.randint(37, (ROWS,), generator=draw)
    hidden, weight = torch.randn(ROWS, FEATURES), torch.randn(own, FEATURES, requires_grad=True)
    scale = torch.tensor(1.5, requires_grad=learns_scale)
    objective = CrossEntropy(label_smoothing=0.1) + 1e-2 * ZLoss()
    distributed._known.clear()

    def loss() -> Tensor:
        if kind == "logits":
            return objective(z.requires_grad_(), y, process_group=of, logit_scale=scale)
        return objective.linear(hidden.requires_grad_(), weight, y, process_group=of, logit_scale=scale)

    if known:
        loss()
    found = []
    with Counts() as counts:
        value = loss()
        found.append(counts.taken())
        value.backward()
        found.append(counts.taken())
    return found


@pytest.mark.parametrize("kind", ["logits", "linear"])
def test_one_all_gather_is_all_that_the_forward_pass_sends(kind: str, ranks: Ranks) -> None:
    """And the backward pass of logits nothing; hidden states are summed once, a scale that learns once."""
    sums = scale.ROW_BYTES * ROWS
    hidden = [4 * ROWS * FEATURES] if kind == "linear" else []
    for known, learns in ((True, False), (True, True), (False, False)):
        for forward, backward in ranks(counted, kind, known, learns)[:2]:
            assert [sent for _, sent in forward] == ([] if known else [8]) + [sums]
            assert all("allgather" in name for name, _ in forward)
            assert [sent for _, sent in backward] == hidden + ([4] if learns else [])
            assert all("allreduce" in name for name, _ in backward)


PLANNED = (64, 16, 96)  # rows, features, classes
STRATEGIES = {
    "data parallel": "data parallel", "sharded weight": "sharded weight", "logits": "vocab-parallel logits",
    "linear": "vocab-parallel linear", "sequence": "sequence- and vocab-parallel",
}  # fmt: skip


def sent(strategy: str, count: int) -> tuple[int, int] | None:
    """Bytes that this rank hands to collectives in the forward and in the backward pass of a step, float32."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard

    of = group(count)
    if of is None:
        return None
    rows, features, classes = PLANNED
    rank, objective = dist.get_rank(), CrossEntropy(label_smoothing=0.1)
    draw = torch.Generator().manual_seed(0)
    hidden, labels = torch.randn(rows, features, generator=draw), torch.randint(classes, (rows,), generator=draw)
    own = slice(rank * rows // count, (rank + 1) * rows // count)
    part = torch.randn(classes // count, features, requires_grad=True)
    buckets: list[int] = []
    if strategy in ("data parallel", "sharded weight"):
        head = torch.nn.Linear(features, classes, bias=False)
        x = hidden[own].requires_grad_()
        if strategy == "sharded weight":
            head = fully_shard(head, mesh=DeviceMesh.from_group(of, "cpu"), reshard_after_forward=True)
        elif count > 1:
            head = torch.nn.parallel.DistributedDataParallel(head, process_group=of)

            def summed(_, bucket):  # torch looks at annotations
                buckets.append(bucket.buffer().numel() * bucket.buffer().element_size())
                return (
                    dist.all_reduce(bucket.buffer(), group=of, async_op=True).get_future().then(lambda f: f.value()[0])
                )

            head.register_comm_hook(None, summed)

        def loss() -> Tensor:
            return objective(head(x), labels[own])
    elif strategy == "logits":
        at = distributed.shard(of, len(part))

        def loss() -> Tensor:
            return objective((hidden @ part.t()), labels, process_group=at)
    elif strategy == "linear":
        at = distributed.shard(of, len(part))

        def loss() -> Tensor:
            return objective.linear(hidden.requires_grad_(), part, labels, process_group=at)
    else:
        mesh = DeviceMesh.from_group(of, "cpu")
        x = DTensor.from_local(hidden[own], mesh, [Shard(0)]).requires_grad_()
        weight = DTensor.from_local(part.detach(), mesh, [Shard(0)]).requires_grad_()

        def loss() -> Tensor:
            return objective.linear(x, weight, labels)

    with Counts() as counts:
        value = loss()
        forward = sum(size for _, size in counts.taken())
        value.backward()
        backward = sum(buckets) or sum(size for _, size in counts.taken())
    return forward, backward


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_plan_says_what_is_sent(strategy: str, ranks: Ranks) -> None:
    """Within 5 %, for 1, 2 and 4 ranks; behind logits the sum of the hidden gradients is the caller's."""
    for count in (1, 2, 4):
        planned = distributed.plan(*PLANNED, count, torch.float32)[STRATEGIES[strategy]]
        for forward, backward in ranks(sent, strategy, count)[:count]:
            assert forward == pytest.approx(planned.sent_forward, rel=0.05), count
            assert backward == pytest.approx(0 if strategy == "logits" else planned.sent_backward, rel=0.05), count


def test_a_plan_by_hand() -> None:
    found = distributed.plan(8, 4, 100, 4, torch.float32, machine=scale.Machine(flops=1.0, memory=1.0, link=1.0))
    one = found["data parallel"]
    assert (one.sent_forward, one.sent_backward, one.wire) == (0, 1600, 2400)  # 3/4 of 1600, to and fro
    assert one.seconds == 2 * 3 * 2 * 100 * 4 + 2 * 100 * (3 * 8 + 4) + 2400
    split = found["vocab-parallel linear"]
    assert (split.sent_forward, split.sent_backward, split.wire) == (8 * 104, 128, 3 * 832 + 192)
    assert split.memory == 4 * 25 * 4 + 4 * 25 * 4 + 8 * 4 * 8 + 8 * 25 * 8
    assert "8 rows x 4 features x 100 classes, float32, 4 ranks" in repr(found)
    with pytest.raises(ValueError, match="ranks: expected a positive int but got 0"):
        distributed.plan(8, 4, 100, 0)


def test_the_plan_in_the_docs_is_current() -> None:
    page = (Path(__file__).parent.parent / "docs" / "scale.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- plan -->")[2].partition("<!-- /plan -->")[0]
    assert shown.strip() == f"```\n{distributed.plan(8192, 4096, 128256, 8)!r}\n```"


# ---- labels, padding, empty batches ---------------------------------------------------------------------------------


def padded() -> list[Tensor] | None:
    """Three classes a rank, the last of the second a padding of −inf; a label that is ignored inside the vocabulary."""
    of, rank = group(2), dist.get_rank()
    if of is None:
        return None
    z = torch.arange(15.0).view(3, 5).sin() * 3
    z = torch.cat([z, torch.full((3, 1), -torch.inf)], 1)[:, 3 * rank : 3 * rank + 3].requires_grad_()
    objective = CrossEntropy(label_smoothing=0.1) + 0.1 * Entropy() + 0.1 * LogitL2()
    loss = objective(z, torch.tensor([4, 2, 0]), process_group=of, ignore_index=2)
    loss.backward()
    return [loss.detach(), z.grad]


def test_padding_and_an_ignored_label_inside_the_vocabulary(ranks: Ranks) -> None:
    """14: a padded column is no class, and no row's label."""
    z = (torch.arange(15.0).view(3, 5).sin() * 3).requires_grad_()
    objective = CrossEntropy(label_smoothing=0.1) + 0.1 * Entropy() + 0.1 * LogitL2()
    loss = objective(z, torch.tensor([4, 2, 0]), ignore_index=2)
    loss.backward()
    (first, a), (second, b) = ranks(padded)[:2]
    torch.testing.assert_close(first, loss.detach())
    assert torch.equal(first, second)
    assert torch.equal(b[:, 2], torch.zeros(3))
    torch.testing.assert_close(torch.cat([a, b[:, :2]], 1), z.grad)


def all_ignored(kind: str, empty: str) -> list[Tensor] | None:
    of = group(2)
    if of is None:
        return None
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    y = torch.full((3,), -100)
    objective = CrossEntropy() + 0.1 * ZLoss()
    if kind == "logits":
        loss = objective(x, y, process_group=of, empty=empty)
    else:
        loss = objective.linear(x, w, y, process_group=of, empty=empty)
    loss.backward()
    return [loss.detach(), x.grad, *([w.grad] if kind == "linear" else [])]


@pytest.mark.parametrize("kind", ["logits", "linear"])
def test_all_rows_ignored(kind: str, ranks: Ranks) -> None:
    """12, on all ranks: nobody waits for another, and the graph is kept."""
    for empty, value in (("nan", torch.tensor(torch.nan)), ("zero", torch.tensor(0.0))):
        for loss, *gradients in ranks(all_ignored, kind, empty)[:2]:
            torch.testing.assert_close(loss, value, equal_nan=True)
            assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def compiled(kind: str) -> list[list[Tensor]] | None:
    """The same call by torch.compile and by itself; some labels are ignored. Hidden gradients are summed while other work
    is done, which no graph of torch's can say: there it breaks."""
    of = group(2)
    if of is None:
        return None
    draw = torch.Generator().manual_seed(dist.get_rank())
    part = torch.randn(7, 9, generator=draw) if kind == "logits" else torch.randn(9, 4, generator=draw)
    hidden = torch.randn(7, 4, generator=torch.Generator().manual_seed(2))
    y = torch.tensor([0, -100, 17, 8, 9, -100, 3])
    objective = CrossEntropy(label_smoothing=0.1) + 0.1 * ZLoss()

    def loss(x: Tensor, h: Tensor) -> Tensor:
        if kind == "logits":
            return objective(x, y, process_group=of) + 0.0 * h.sum()
        return objective.linear(h, x, y, process_group=of)

    loss(part, hidden)  # which asks for the sizes
    found = []
    for function in (torch.compile(loss, fullgraph=kind == "logits", backend="aot_eager"), loss):
        leaves = [x.clone().requires_grad_() for x in (part, hidden)]
        value = function(*leaves)
        value.backward()
        found.append([value.detach(), *(x.grad for x in leaves)])
    return found


@pytest.mark.parametrize("kind", ["logits", "linear"])
def test_compiled(kind: str, ranks: Ranks) -> None:
    """18, on ranks that share the classes."""
    for ours, theirs in ranks(compiled, kind)[:2]:
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def policy(kind: str) -> list[Tensor] | None:
    """A clipped ratio of probabilities, and the entropy, from row statistics."""
    of, rank = group(2), dist.get_rank()
    if of is None:
        return None
    return policy_loss(kind, slice(0, 20) if rank == 0 else slice(20, CLASSES), of)


def policy_loss(kind: str, own: slice, of: Any) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, FEATURES, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(CLASSES, FEATURES, generator=draw, dtype=torch.float64)[own].requires_grad_()
    y, old = torch.randint(CLASSES, (ROWS,), generator=draw), -3 - torch.rand(ROWS, generator=draw)
    y[2] = -100  # whose statistics are 0
    advantage = torch.randn(ROWS, generator=draw)
    if kind == "logits":
        s = objkern.row_statistics(hidden @ weight.t(), y, process_group=of)
    else:
        s = objkern.linear_row_statistics(hidden, weight, y, process_group=of)
    ratio = (s.logprob - old).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean() - 0.1 * s.entropy.mean()
    loss.backward()
    return [loss.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("kind", ["logits", "linear"])
def test_a_policy_loss_on_row_statistics(kind: str, ranks: Ranks) -> None:
    """26: the gradients of classes that another rank holds."""
    expected = policy_loss(kind, slice(None), None)
    (loss, of_hidden, first), (other_loss, other, second) = ranks(policy, kind)[:2]
    assert torch.equal(loss, other_loss)
    torch.testing.assert_close(loss, expected[0])
    # Behind logits the caller's own product is split, whose hidden gradients are parts of a sum.
    torch.testing.assert_close(of_hidden + other if kind == "logits" else of_hidden, expected[1])
    torch.testing.assert_close(torch.cat([first, second]), expected[2])


# ---- DTensors -------------------------------------------------------------------------------------------------------


def dtensor_call(kind: str) -> tuple[Call, dict[str, Any]]:
    call = Call(CrossEntropy(label_smoothing=0.1) + 0.1 * ZLoss() - 0.1 * Entropy())
    if "reference" in kind:
        call = Call(call.objective + KLDivergence(), reference=True)
    given = inputs(call)
    if kind == "few classes":
        given |= {"weight": given["weight"][:5], "bias": given["bias"][:5]}
        given["labels"] = given["labels"].where(given["labels"] < 0, given["labels"] % 5)
    return call, given


def of_dtensors(hidden_placement: str, kind: str) -> dict[str, Tensor]:
    """On four ranks, 37 classes as torch splits them: 10, 10, 10, 7; or 5, as 2, 2, 1, 0."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (4,))
    call, given = dtensor_call(kind)
    rows = [Shard(0)] if hidden_placement == "sequence" else [Replicate()]
    hidden = distribute_tensor(given["hidden"], mesh, rows).requires_grad_()
    weight, bias = (distribute_tensor(given[name], mesh, [Shard(0)]).requires_grad_() for name in ("weight", "bias"))
    target = distribute_tensor(given["labels"], mesh, [Replicate()])
    options: dict[str, Any] = {}
    if kind == "reference":
        options["reference"] = distribute_tensor(given["reference"], mesh, [Shard(1)])
    if kind == "reference head":
        head = given["hidden"], given["weight"].flip(0)
        options["reference"] = tuple(
            distribute_tensor(x, mesh, [how]) for x, how in zip(head, (Replicate(), Shard(0)), strict=True)
        )
    if hidden_placement == "plain":
        hidden, target = given["hidden"].requires_grad_(), given["labels"]
        options["process_group"] = distributed.shard(mesh.get_group(), len(weight.to_local()))
    if kind == "logits":
        logits = distribute_tensor(given["logits"], mesh, [Shard(1)]).requires_grad_()
        loss = call.objective(logits, given["labels"])
    elif kind == "probabilities":
        logits = distribute_tensor(given["logits"], mesh, [Shard(1)]).requires_grad_()
        loss = call.objective(logits, distribute_tensor(given["probabilities"], mesh, [Shard(-1)]))
    else:
        loss = call.objective.linear(hidden, weight, target, bias, **options)
    (loss * 1.7).backward()
    of_logits = kind in ("logits", "probabilities")
    leaves = {"logits": logits} if of_logits else {"hidden": hidden, "weight": weight, "bias": bias}
    found = {"loss": loss.detach()}
    for name, x in leaves.items():
        found[name] = x.grad.full_tensor() if hasattr(x.grad, "full_tensor") else x.grad
        found[f"placement of {name}"] = getattr(x.grad, "placements", None)
    return found


@pytest.mark.parametrize(
    ("kind", "hidden"), [
        ("logits", "replicated"), ("probabilities", "replicated"), ("linear", "replicated"), ("linear", "sequence"),
        ("linear", "plain"), ("few classes", "replicated"), ("reference", "replicated"), ("reference head", "sequence"),
    ],
)  # fmt: skip
def test_dtensors_as_they_come(kind: str, hidden: str, ranks: Ranks) -> None:
    from torch.distributed.tensor import Replicate, Shard

    call, given = dtensor_call(kind)
    of_logits = kind in ("logits", "probabilities")
    leaves = {
        name: given[name].requires_grad_() for name in (("logits",) if of_logits else ("hidden", "weight", "bias"))
    }
    if of_logits:
        loss = call.objective(leaves["logits"], given["labels" if kind == "logits" else kind])
    else:
        head = given["hidden"].detach(), given["weight"].detach().flip(0)
        options = {"reference": given[kind] if kind == "reference" else head} if call.reference else {}
        loss = call.objective.linear(leaves["hidden"], leaves["weight"], given["labels"], leaves["bias"], **options)
    (loss * 1.7).backward()
    for found in ranks(of_dtensors, hidden, kind):
        same(found["loss"], loss.detach(), torch.float64, "loss")
        for name, leaf in leaves.items():
            same(found[name], leaf.grad, torch.float64, name)
        if not of_logits:
            assert found["placement of weight"] == (Shard(0),)
            placement = {"sequence": (Shard(0),), "replicated": (Replicate(),), "plain": None}[hidden]
            assert found["placement of hidden"] == placement


# ---- what cannot be served ------------------------------------------------------------------------------------------


def refusals() -> dict[str, str]:
    """What each call says."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    of = dist.group.WORLD
    ce, mesh = CrossEntropy(), init_device_mesh("cpu", (4,))
    z, y, w = torch.randn(3, 5), torch.tensor([0, 1, 2]), torch.randn(5, 4)
    sharded = distribute_tensor(torch.randn(20, 4), mesh, [Shard(0)])
    summed = DTensor.from_local(z, mesh, [Partial()]).requires_grad_()
    whole = distribute_tensor(z, mesh, [Replicate()])
    alone = [dist.new_group([k]) for k in range(4)][dist.get_rank()]
    square = init_device_mesh("cpu", (2, 2))
    hidden = distribute_tensor(torch.randn(3, 4), mesh, [Replicate()])
    bias = distribute_tensor(torch.randn(20), mesh, [Replicate()])
    calls = {
        "no group": lambda: ce(z, y, process_group="tp"),
        "label": lambda: ce(z, torch.tensor([0, 20, 2]), process_group=of),
        "class weight": lambda: CrossEntropy(torch.ones(5))(z, y, process_group=of),
        "forward": lambda: ce(z, y, process_group=of, gradient="forward"),
        "mode": lambda: ce.linear(torch.randn(3, 4), w, y, process_group=of, mode="forward"),
        "eager": lambda: ce(z, y, process_group=of, backend="reference"),
        "probabilities that learn": lambda: ce(z, torch.rand(3, 5, requires_grad=True), process_group=of),
        "rows": lambda: ce(distribute_tensor(torch.randn(4, 5), mesh, [Shard(0)]), y),
        "partial": lambda: ce(summed, y),
        "FSDP or classes": lambda: ce.linear(torch.randn(3, 4), sharded, y),
        "features": lambda: ce.linear(
            distribute_tensor(torch.randn(3, 4), mesh, [Shard(1)]), sharded, distribute_tensor(y, mesh, [Replicate()])
        ),
        "plain beside": lambda: ce(z, distribute_tensor(y, mesh, [Replicate()]), process_group=of),
        "plain weight": lambda: ce.linear(hidden, w, y, process_group=of),
        "plain weight and reference": lambda: ce.linear(torch.randn(3, 4), w, y, process_group=of, reference=whole),
        "no tensor": lambda: ce([1.0], y, process_group=of),
        "no weight": lambda: ce.linear(torch.randn(3, 4), None, y, process_group=of),
        "no dimension": lambda: ce(torch.tensor(1.0), y, process_group=of),
        "replicated": lambda: ce(whole, y, process_group=of),
        "another group": lambda: ce.linear(torch.randn(3, 4), sharded, y, process_group=alone),
        "another mesh": lambda: ce.linear(
            distribute_tensor(torch.randn(3, 4), square, [Replicate()] * 2), sharded, y
        ),
        "bias": lambda: ce.linear(hidden, sharded, y, bias),
        "sharded target": lambda: ce.linear(hidden, sharded, distribute_tensor(torch.arange(4), mesh, [Shard(0)])),
        "summed parameter": lambda: objkern.L2([summed])(),
        "summed parameter, in place": lambda: objkern.L2([summed]).accumulate_(),
        "another size": lambda: ce(torch.randn(3, 6), y, process_group=distributed.shard(of, 5)),
        "elements": lambda: objkern.MeanSquaredError()(z, z, process_group=of),
        "elements in parts": lambda: objkern.MeanSquaredError()(sharded, sharded),
        "classes": lambda: distributed.shard(of, -3),
        "not in it": lambda: distributed.shard(dist.GroupMember.NON_GROUP_MEMBER, 3),
    }  # fmt: skip
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "nothing"
        except (ValueError, TypeError, IndexError, NotImplementedError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def test_what_cannot_be_served_says_so_on_every_rank(ranks: Ranks) -> None:
    expected = {
        "no group": "TypeError: process_group: expected a torch.distributed.ProcessGroup but got 'tp' (str)",
        "label": "IndexError: target: row 1 holds label 20, which is neither in [0, 20) nor ignore_index",
        "class weight": "ValueError: class weight: expected shape (20,), that of all ranks' classes, but got (5,)",
        "forward": 'ValueError: gradient (or mode): "forward" is not for classes that are split among ranks',
        "mode": 'ValueError: gradient (or mode): "forward" is not for classes that are split among ranks',
        "eager": 'NotImplementedError: backend: "reference" needs all classes of a row',
        "probabilities that learn": "NotImplementedError: target: one that requires grad cannot be split among ranks",
        "rows": "ValueError: logits: S(0) on dimension 0 of the mesh cannot be served: expected Shard(1)",
        "partial": "ValueError: logits: P(sum) on dimension 0 of the mesh cannot be served: expected Shard(1)",
        "FSDP or classes": "TypeError: weight: a DTensor beside hidden states that are none may be split by FSDP",
        "features": "ValueError: hidden: S(1) on dimension 0 of the mesh cannot be served",
        "plain beside": "TypeError: target: a DTensor beside the logits, a plain tensor",
        "plain weight": "TypeError: hidden: a DTensor beside the weight, a plain tensor",
        "plain weight and reference": "TypeError: reference: a DTensor beside the weight, a plain tensor",
        "no tensor": "TypeError: logits: expected a tensor but got [1.0]",
        "no weight": "TypeError: weight: expected a tensor but got None",
        "no dimension": "ValueError: logits: expected a tensor with a dimension for classes but got a 0-dim one",
        "replicated": "ValueError: process_group: its ranks hold all classes each",
        "another group": "ValueError: process_group: another than that of the mesh's dimension",
        "another mesh": "ValueError: hidden: expected the weight's mesh",
        "bias": "ValueError: bias: R on dimension 0 of its mesh cannot be served: expected Shard(0)",
        "sharded target": "ValueError: target: S(0) on dimension 0 of its mesh cannot be served: expected Replicate()",
        "summed parameter": "ValueError: parameters: P(sum), of which each rank has a summand",
        "summed parameter, in place": "ValueError: parameters: P(sum), of which each rank has a summand",
        "another size": "ValueError: process_group: the part of rank 0 has 5 classes but got 6",
        "elements": "NotImplementedError: process_group: terms that compare element by element have no classes",
        "elements in parts": "NotImplementedError: process_group: terms that compare element by element",
        "classes": "ValueError: classes: expected a whole number of at least 0 but got -3",
        "not in it": "ValueError: process_group: this process is not in it",
    }  # fmt: skip
    for rank, found in enumerate(ranks(refusals)):
        for name, message in expected.items():
            message = message.replace("rank 0", f"rank {rank}")
            assert found[name].startswith(message), f"{name}: {found[name]}"
