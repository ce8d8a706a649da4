"""Objectives over a split vocabulary: rows 14, 24, 25, 26 of other projects' mistakes. Ranks are processes under gloo."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

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


def by_advantage(s: objkern.Statistics, advantage: Tensor) -> Tensor:
    return -advantage * s.logprob.exp().clamp(max=0.5) + 0.1 * s.entropy * s.max_logit


def mixed(s: objkern.Statistics) -> Tensor:
    return s.logit_variance * s.mean_logit + s.mean_logprob * s.target_logit + s.other_logprob * s.lse


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
    "regularized": Call(
        CrossEntropy(label_smoothing=0.1) + 1e-2 * ZLoss() - 0.1 * Entropy() + 1e-2 * LogitL2() + 0.1 * MaxZLoss(),
        options={"softcap": 5.0}, learns_scale=True,
    ),
    "float32": Call(CrossEntropy(label_smoothing=0.1) - 0.1 * Entropy(), dtype=torch.float32),
    "bfloat16": Call(CrossEntropy(label_smoothing=0.1) + 1e-2 * ZLoss(), dtype=torch.bfloat16),
    "a loss per row": Call(CrossEntropy() + 0.1 * ZLoss(), options={"reduction": "none"}),
    "a sum": Call(CrossEntropy() + 0.1 * ZLoss(), options={"reduction": "sum"}),
    "a normalizer": Call(CrossEntropy(WEIGHT) + 0.1 * ZLoss(), options={"normalizer": 7.0}),
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
    labels = torch.randint(30, (ROWS,), generator=draw)
    labels[3] = 20
    labels[labels == 4] = 3
    labels[:3] = torch.tensor([1, 29, 19])
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
                assert torch.equal(one[name][key], found[0][name][key]), f"{name}: {key}: ranks differ"
        assert set(found[0][name]) == set(expected)
