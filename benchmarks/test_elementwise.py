"""Elementwise objectives against eager torch and torch.compile.

python -m objkern bench elementwise -k binary
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .contest import OURS, Record, checked, compiled, compiles, contest, described, quick, step
from .contestants import FORWARD
from .workloads import ELEMENTWISE, Workload

SHAPE = (4096, 1024)  # 4M elements
# Squares by themselves have next to no arithmetic; eager torch and objkern both pass over memory twice.
TARGETS = {"binary": {"eager": 1.0}, "binary, penalties": {"eager": 3.0}, "squares": {"eager": 0.8},
           "squares, penalties": {"eager": 3.0}}  # fmt: skip


@pytest.mark.parametrize(
    "dtype", [quick(torch.float32), torch.bfloat16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)
@pytest.mark.parametrize("workload", ELEMENTWISE, ids=str)
def test_elementwise(
    workload: Workload, dtype: torch.dtype, benchmark: BenchmarkFixture, record: Record, pytestconfig: pytest.Config
) -> None:
    generator = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(SHAPE, generator=generator)).to(dtype).requires_grad_()
    y = torch.rand(SHAPE, generator=generator).round().to(dtype)
    losses = {"eager": workload.eager}
    if compiles(benchmark, pytestconfig):
        losses["compiled"] = compiled(workload.eager)
    losses |= {FORWARD: lambda z, y: workload.objective(z, y, gradient="forward"), OURS: workload.objective}
    facts = described("elementwise", *SHAPE, dtype, workload.name)
    facts |= {"targets": TARGETS[workload.name]}
    facts |= checked(losses, workload.eager, (z, y))
    contest(benchmark, record, pytestconfig, {name: step(loss, (z, y)) for name, loss in losses.items()}, facts)
