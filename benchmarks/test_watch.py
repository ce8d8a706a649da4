"""The least time of kernels on one core, which `bench compare` compares: benchmarks/watch.py says why the least.

python -m objkern bench watch
"""

from __future__ import annotations

import pytest

from .compare import KIND
from .contest import Record, compared, described
from .memory import in_a_process
from .watch import WATCHED

PROCESSES = 8  # memory lies elsewhere in each of them
SECONDS = 0.2  # for each kernel in each process


def test_floors(record: Record, pytestconfig: pytest.Config) -> None:
    if pytestconfig.getoption("--benchmark-disable"):
        pytest.skip("nothing is measured")
    runs = [in_a_process("benchmarks.watch", SECONDS) for _ in range(PROCESSES)]
    for place, one in enumerate(WATCHED):
        times = {name: [run[place][name] for run in runs] for name in runs[0][place]}
        record(described(KIND, one.rows, one.classes, one.dtype, one.workload) | compared(times))
