"""Time over the number of logits, from 10⁴ to 5·10⁸: rows grow, or classes do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from .contestants import step
from .figures import Entry
from .machine import Others
from .pairing import race, summary
from .workloads import PLAIN, REGULARIZED

CLASSES, ROWS = 32000, 1024
SIZES = [(4**i, CLASSES) for i in range(8)] + [(ROWS, 10 * 4**i) for i in range(8)] + [(ROWS, 524288)]
LARGEST = max(rows * classes for rows, classes in SIZES)


@pytest.fixture(scope="module")
def memory() -> Tensor:
    """Random numbers enough for every size: making them anew would take longer than the benchmark."""
    return torch.empty(LARGEST).normal_(0, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("rows", "classes"), SIZES)
def test_linearity(
    rows: int,
    classes: int,
    benchmark: BenchmarkFixture,
    record: Callable[[Entry], None],
    pytestconfig: pytest.Config,
    request: pytest.FixtureRequest,
) -> None:
    if benchmark.disabled:
        pytest.skip("nothing is measured")
    logits = request.getfixturevalue("memory")[: rows * classes].view(rows, classes).requires_grad_()
    target = torch.randint(0, classes, (rows,))
    size = rows * classes
    repeat = max(1, 10**6 // size)
    losses = {
        "eager": PLAIN.eager, "objkern, plain": PLAIN.objective, "objkern, regularized": REGULARIZED.objective
    }  # fmt: skip
    rounds = pytestconfig.getoption("--rounds") or (
        31 if rows * classes < 10**7 else 7 if rows * classes < 10**8 else 3
    )
    benchmark.group = "linearity"
    steps = {name: step(loss, logits, target, repeat) for name, loss in losses.items()}
    others = Others()
    seconds = race(benchmark, steps, "objkern, regularized", rounds)
    record(
        {
            "kind": "linearity",
            "rows": rows,
            "classes": classes,
            "dtype": "float32",
            "workload": "both",
            "sweep": "rows" if classes == CLASSES else "classes",
            "rounds": rounds,
            "others": others.cores(),
            "seconds": {name: summary(times) for name, times in seconds.items()},
        }
    )
