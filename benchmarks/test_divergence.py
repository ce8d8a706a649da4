"""KL divergence from a reference against eager torch and torch.compile, and what six terms cost beside one.

python -m pytest benchmarks/test_divergence.py --record benchmarks/results/NAME.json
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .contestants import FORWARD, OURS, PLAIN_OURS
from .test_elementwise import assert_as_accurate, contest, step
from .test_objective import Record
from .workloads import DIVERGENCE, PLAIN, SIX

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
PLAIN_FORWARD = f"{PLAIN_OURS}, forward"


@DTYPES
@pytest.mark.parametrize(("rows", "classes"), [(1024, 32000), (512, 128256), (8192, 1000)])
def test_divergence(
    rows: int, classes: int, dtype: torch.dtype, benchmark: BenchmarkFixture, record: Record,
    pytestconfig: pytest.Config,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(rows, classes, generator=generator)).to(dtype).requires_grad_()
    r = (z.detach() + torch.randn(rows, classes, generator=generator)).to(dtype)
    assert_as_accurate(DIVERGENCE, z, r)
    losses = {"eager": DIVERGENCE.eager}
    if benchmark.enabled and not pytestconfig.getoption("--no-compile"):
        torch._dynamo.reset()
        losses["compiled"] = torch.compile(DIVERGENCE.eager, dynamic=False, fullgraph=True)
        losses["compiled"](z, r).backward()
    losses |= {FORWARD: lambda z, r: DIVERGENCE.objective(z, r, gradient="forward"), OURS: DIVERGENCE.objective}
    benchmark.group = f"divergence, {rows} x {classes}, {dtype}"
    timed = {name: step(lambda loss=loss: loss(z, r), z) for name, loss in losses.items()}
    entry = {
        "kind": "divergence", "rows": rows, "classes": classes, "dtype": str(dtype)[6:], "workload": "KL, T = 2",
        "targets": {"eager": 5.0},
    }  # fmt: skip
    contest(benchmark, record, pytestconfig.getoption("--rounds") or 15, timed, entry)


@DTYPES
@pytest.mark.parametrize(("rows", "classes"), [(1024, 32000), (512, 128256)])
def test_six_terms(
    rows: int, classes: int, dtype: torch.dtype, benchmark: BenchmarkFixture, record: Record,
    pytestconfig: pytest.Config,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(rows, classes, generator=generator)).to(dtype).requires_grad_()
    y = torch.randint(0, classes, (rows,), generator=generator)
    losses = {
        "eager": SIX.eager, PLAIN_OURS: PLAIN.objective, OURS: SIX.objective,
        FORWARD: lambda z, y: SIX.objective(z, y, gradient="forward"),
        PLAIN_FORWARD: lambda z, y: PLAIN.objective(z, y, gradient="forward"),
    }  # fmt: skip
    benchmark.group = f"six terms, {rows} x {classes}, {dtype}"
    timed = {name: step(lambda loss=loss: loss(z, y), z) for name, loss in losses.items()}
    entry = {
        "kind": "six terms", "rows": rows, "classes": classes, "dtype": str(dtype)[6:], "workload": str(SIX),
        "targets": {"price": 1.15},
    }  # fmt: skip
    contest(benchmark, record, pytestconfig.getoption("--rounds") or 15, timed, entry)
