"""Whole steps of fine-tuning in paired rounds: seconds, tokens a second and memory, against stock and plain losses.

python -m pytest benchmarks/test_steps.py --record benchmarks/results/NAME.json
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("transformers")

from . import steps
from .steps import NATIVE, OURS, TRAININGS, Training
from .test_elementwise import contest
from .test_objective import Record
from .workloads import WORKLOADS, Workload

# What a loss can save is its share of the step. With nine tags it is next to nothing, and must cost nothing either: a
# ratio of 1, from which medians of steps of a second stray by a twentieth.
TARGETS = {
    ("causal-lm", "plain"): {"eager": 1.3, "stock": 1.1}, ("causal-lm", "regularized"): {"eager": 2.0},
    ("token-classification", "plain"): {"eager": 0.92, "stock": 0.92},
    ("token-classification", "regularized"): {"eager": 0.92},
}  # fmt: skip


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=str)
@pytest.mark.parametrize("training", TRAININGS.values(), ids=str)
def test_step(
    training: Training, workload: Workload, benchmark: BenchmarkFixture, record: Record, pytestconfig: pytest.Config
) -> None:
    assert_as_accurate(training, workload)
    names = list(steps.losses(training, workload))
    benchmark.group = f"{training}, {workload}"
    entry = {
        "kind": "finetune step", "rows": training.tokens, "classes": training.classes, "dtype": "float32",
        "workload": workload.name, "training": training.name, "why": training.why,
        "targets": TARGETS[training.name, workload.name],
        "bytes": {} if benchmark.disabled else
        {name: steps.measure(training.name, workload.name, name) for name in names},
    }  # fmt: skip
    timed = {name: steps.step(training, workload, name) for name in names}
    for run in timed.values():
        run()  # moments, threads
    contest(benchmark, record, pytestconfig.getoption("--rounds") or 9, timed, entry)


def assert_as_accurate(training: Training, workload: Workload) -> None:
    """Before anything is timed: loss and gradients at most twice as far from float64 as plain torch's, norm-wise."""
    truth = steps.gradients(training, workload, NATIVE, torch.float64)
    ours, native = (steps.gradients(training, workload, name, torch.float32) for name in (OURS, NATIVE))
    for a, b, c in zip(ours, native, truth, strict=True):
        error, allowed = ((x.double() - c).norm().item() for x in (a, b))
        assert error <= 2 * allowed + 1e-6 * c.norm().item(), f"error {error:.1e}, plain torch's {allowed:.1e}"
