"""What a step adds to the memory: the forward pass alone, and both passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .figures import Entry
from .memory import measure
from .workloads import WORKLOADS, Workload

ROWS, CLASSES = 2048, 32000
CONTESTANTS = {
    "float32": ["eager", "compiled", "objkern", "objkern, forward"],
    "bfloat16": ["eager", "eager, float32", "compiled", "compiled, float32", "objkern", "objkern, forward"],
}


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=str)
@pytest.mark.parametrize("dtype", CONTESTANTS)
def test_memory(dtype: str, workload: Workload, record: Callable[[Entry], None], pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--benchmark-disable"):
        pytest.skip("nothing is measured")
    names = CONTESTANTS[dtype]
    if pytestconfig.getoption("--no-compile"):
        names = [name for name in names if not name.startswith("compiled")]
    record(
        {
            "kind": "memory",
            "rows": ROWS,
            "classes": CLASSES,
            "dtype": dtype,
            "workload": workload.name,
            "bytes": measure(names, workload.name, ROWS, CLASSES, dtype),
            "targets": {"forward_mb": 8.0},
        }
    )
