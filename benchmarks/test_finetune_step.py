"""Whole steps of fine-tuning: seconds, tokens a second and memory, against stock and plain losses.

python -m objkern bench finetune-step
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("transformers")

from . import steps
from .accuracy import Errors, assert_as_accurate
from .contest import Record, contest, described, quick
from .steps import NATIVE, TRAININGS, Training
from .workloads import WORKLOADS, Workload

# What a loss can save is its share of the step. With nine tags it is next to nothing, and must cost nothing either: a
# ratio of 1, from which medians of steps of a second stray by a twentieth.
TARGETS = {
    ("causal-lm", "plain"): {"eager": 1.3, "stock": 1.1}, ("causal-lm", "regularized"): {"eager": 2.0},
    ("tiny-causal-lm", "plain"): {"eager": 1.3, "stock": 1.1}, ("tiny-causal-lm", "regularized"): {"eager": 2.0},
    ("token-classification", "plain"): {"eager": 0.92, "stock": 0.92},
    ("token-classification", "regularized"): {"eager": 0.92},
}  # fmt: skip


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=str)
@pytest.mark.parametrize("training", [quick(t, when=t.quick) for t in TRAININGS.values()], ids=str)
def test_step(
    training: Training, workload: Workload, benchmark: BenchmarkFixture, record: Record, pytestconfig: pytest.Config
) -> None:
    names = list(steps.losses(training, workload))
    found = errors(training, workload, names)
    assert_as_accurate(found, torch.float32)
    measured = {}
    if benchmark.enabled and pytestconfig.getoption("--size") != "quick":
        measured = {name: steps.measure(training.name, workload.name, name) for name in names}
    facts = described(
        "finetune step", training.tokens, training.classes, torch.float32, workload.name, training=training.name,
        why=training.why, targets=TARGETS[training.name, workload.name], errors=found, bytes=measured,
    )  # fmt: skip
    contest(benchmark, record, pytestconfig, {name: steps.step(training, workload, name) for name in names}, facts)


def errors(training: Training, workload: Workload, names: list[str]) -> Errors:
    """Of the loss, and of the gradient of all parameters together."""
    truth = steps.gradients(training, workload, NATIVE, torch.float64)
    found = {}
    for name in names:
        loss, *gradients = steps.gradients(training, workload, name, torch.float32)
        squares = sum((a.double() - b).square().sum() for a, b in zip(gradients, truth[1:], strict=True))
        norm = sum(b.square().sum() for b in truth[1:])
        found[name] = [abs(loss.double() / truth[0] - 1).item(), (squares / norm).sqrt().item()]
    return found
