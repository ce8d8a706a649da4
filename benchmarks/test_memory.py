"""What a step adds to the memory: the forward pass alone, and both passes; over the number of classes too.

python -m objkern bench memory
"""

from __future__ import annotations

import pytest
import torch

from .contest import Record, described, quick
from .memory import measure
from .workloads import WORKLOADS, Workload

ROWS, CLASSES = 2048, 32000
CONTESTANTS = {
    "float32": ["eager", "compiled", "objkern", "objkern, forward"],
    "bfloat16": ["eager", "eager, float32", "compiled", "compiled, float32", "objkern", "objkern, forward"],
}
OVER = [quick(30522), 50257, quick(128256), 151936, 256000]  # BERT, GPT-2, Llama-3, Qwen, Gemma


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=str)
@pytest.mark.parametrize("dtype", CONTESTANTS)
def test_memory(dtype: str, workload: Workload, record: Record, pytestconfig: pytest.Config) -> None:
    names = CONTESTANTS[dtype]
    if pytestconfig.getoption("--no-compile"):
        names = [name for name in names if not name.startswith("compiled")]
    measured("memory", workload, ROWS, CLASSES, dtype, names, record, pytestconfig)


@pytest.mark.parametrize("classes", OVER)
def test_memory_over_classes(classes: int, record: Record, pytestconfig: pytest.Config) -> None:
    names = ["eager", "objkern"]
    measured("memory over classes", WORKLOADS["regularized"], 512, classes, "float32", names, record, pytestconfig)


def measured(
    kind: str, workload: Workload, rows: int, classes: int, dtype: str, names: list[str], record: Record,
    config: pytest.Config,
) -> None:  # fmt: skip
    if config.getoption("--benchmark-disable"):
        pytest.skip("nothing is measured")
    found = measure(names, workload.name, rows, classes, dtype)
    record(
        described(kind, rows, classes, getattr(torch, dtype), workload.name, bytes=found, targets={"forward_mb": 8.0})
    )
