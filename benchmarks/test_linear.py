"""`Objective.linear` against eager torch, torch.compile, torch's own chunked op, other libraries, and the GEMMs alone.

python -m objkern bench linear -k 2048x768
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import heads
from .contest import OURS, Record, checked, compiled, compiles, contest, described, quick, step
from .heads import CHUNKED, GEMMS, HEADS, LAW_CLASSES, LAW_FEATURES, LAW_ROWS, MEMORY_HEAD, RECOMPUTE, Head
from .workloads import PLAIN, WORKLOADS, Workload

every_workload = pytest.mark.parametrize("workload", WORKLOADS.values(), ids=str)


@every_workload
@pytest.mark.parametrize("head", [quick(head, when=head.quick) for head in HEADS], ids=str)
def test_linear(
    head: Head, workload: Workload, benchmark: BenchmarkFixture, record: Record, pytestconfig: pytest.Config
) -> None:
    if head.dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no products of bfloat16 numbers: torch's, in software, take minutes")
    inputs = head.inputs()
    found = heads.losses(workload)
    if compiles(benchmark, pytestconfig):
        found = {"compiled": compiled(found["eager"]), **found}
    facts = described(
        "linear", head.rows, head.classes, head.dtype, workload.name, features=head.features, why=head.why
    )
    facts |= checked(found, found["eager"], inputs, shared=(1,))
    facts |= {
        "targets": head.targets.get(workload.name, {}), "flops": heads.flops(head.rows, head.features, head.classes)
    }  # fmt: skip
    timed = {name: step(loss, inputs) for name, loss in found.items()}
    timed[GEMMS] = heads.gemms(*inputs[:2])
    contest(benchmark, record, pytestconfig, timed, facts)


@every_workload
def test_linear_memory(workload: Workload, record: Record, pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--benchmark-disable"):
        pytest.skip("nothing is measured")
    head = MEMORY_HEAD
    names = ["eager", *([CHUNKED] if CHUNKED in heads.losses(workload) else []), OURS, RECOMPUTE]
    sizes = (head.rows, head.features, head.classes)
    found = {name: heads.measure(workload.name, *sizes, "float32", name) for name in names}
    record(
        described("linear memory", head.rows, head.classes, head.dtype, workload.name, features=head.features)
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
            described("linear memory law", rows, classes, torch.float32, "regularized", features=LAW_FEATURES)
            | {"bytes": bytes_, "gradient_bytes": 4 * LAW_FEATURES * (rows + classes)}
            | {"targets": {"beyond_gradients_mb": 300.0}}
        )
