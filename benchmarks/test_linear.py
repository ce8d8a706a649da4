"""`Objective.linear` against eager torch, torch.compile, torch's own chunked op, and the GEMMs alone; and its memory.

python -m pytest benchmarks/test_linear.py -k 2048x768
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import heads, machine
from .heads import CHUNKED, GEMMS, HEADS, LAW_CLASSES, LAW_FEATURES, LAW_ROWS, MEMORY_HEAD, OURS, RECOMPUTE, Head
from .pairing import race
from .test_objective import Record, compare
from .workloads import PLAIN, WORKLOADS, Workload

every_workload = pytest.mark.parametrize("workload", WORKLOADS.values(), ids=str)


@every_workload
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_linear(
    head: Head, workload: Workload, benchmark: BenchmarkFixture, record: Record, pytestconfig: pytest.Config
) -> None:
    hidden, weight, labels = head.inputs()
    found = heads.losses(workload)
    assert_as_accurate(found, hidden, weight, labels)
    if benchmark.enabled and not pytestconfig.getoption("--no-compile"):
        found = {"compiled": heads.compiled(found["eager"], head), **found}
    timed = {name: heads.step(loss, hidden, weight, labels) for name, loss in found.items()}
    timed[GEMMS] = heads.gemms(hidden, weight)
    benchmark.group = str(head)
    others = machine.Others()
    seconds = race(benchmark, timed, OURS, pytestconfig.getoption("--rounds") or head.rounds)
    if benchmark.disabled:
        return
    record(
        describe("linear", head.rows, head.features, head.classes, head.dtype, workload)
        | compare(seconds, OURS)
        | {"why": head.why, "others": others.cores(), "targets": head.targets.get(workload.name, {})}
    )


def assert_as_accurate(
    found: dict[str, heads.HeadLoss], hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> None:
    """Before anything is timed: on a piece of the rows, at most twice eager torch's error against float64."""
    few = slice(0, 64)
    h, w, y = hidden[few].detach().requires_grad_(), weight, labels[few]
    exact = heads.gradients(
        found["eager"], h.detach().double().requires_grad_(), w.detach().double().requires_grad_(), y
    )
    eager = heads.gradients(found["eager"], h, w, y)
    rounding = 1e-6 if hidden.dtype == torch.float32 else 1e-3
    for name in (OURS, RECOMPUTE):
        for ours, theirs, truth in zip(heads.gradients(found[name], h, w, y), eager, exact, strict=True):
            error, allowed = ((x.double() - truth).norm() / truth.norm() for x in (ours, theirs))
            assert error <= 2 * allowed + rounding, f"{name}: error {error:.1e}, eager torch's {allowed:.1e}"


def describe(
    kind: str, rows: int, features: int, classes: int, dtype: torch.dtype, workload: Workload
) -> dict[str, object]:
    return {
        "kind": kind, "rows": rows, "features": features, "classes": classes,
        "dtype": str(dtype).removeprefix("torch."), "workload": workload.name,
    }  # fmt: skip


@every_workload
def test_linear_memory(workload: Workload, record: Record, pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--benchmark-disable"):
        pytest.skip("nothing is measured")
    head = MEMORY_HEAD
    shape = (head.rows, head.features, head.classes, str(head.dtype).removeprefix("torch."))
    names = ["eager", *([CHUNKED] if CHUNKED in heads.losses(workload) else []), OURS, RECOMPUTE]
    found = {name: heads.measure(workload.name, *shape, name) for name in names}
    record(
        describe("linear memory", *shape[:3], head.dtype, workload)
        | {"bytes": found, "gradient_bytes": 4 * head.features * (head.rows + head.classes)}
        | {"targets": {"memory_share": 0.35} if workload is not PLAIN else {}}
    )


@pytest.mark.parametrize("classes", LAW_CLASSES)
def test_linear_memory_over_rows(classes: int, record: Record, pytestconfig: pytest.Config) -> None:
    """The law: a chunk and the gradients, however many rows there are."""
    if pytestconfig.getoption("--benchmark-disable"):
        pytest.skip("nothing is measured")
    for rows in LAW_ROWS:
        bytes_ = {
            name: heads.measure("regularized", rows, LAW_FEATURES, classes, "float32", name)
            for name in (OURS, RECOMPUTE)
        }
        record(
            describe("linear memory law", rows, LAW_FEATURES, classes, torch.float32, WORKLOADS["regularized"])
            | {"bytes": bytes_, "gradient_bytes": 4 * LAW_FEATURES * (rows + classes)}
            | {"targets": {"beyond_gradients_mb": 300.0}}
        )
