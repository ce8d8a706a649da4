"""Forward and backward of an objective on logits: eager torch, torch.compile and objkern in paired rounds.

    python -m pytest benchmarks/test_objective.py -k 1024x32000

What pytest-benchmark times is objkern's step (as often as `Shape.steps` says). Its rivals run in the same round, just
before it; all times, and the ratios round by round, are in the tables at the end. `--benchmark-verbose` shows
pytest-benchmark's own table too.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from . import machine
from .accuracy import assert_as_accurate, errors
from .child import Child
from .contestants import COPY_BYTES, OURS, kept_bytes, losses, steps
from .figures import Entry
from .pairing import paired_ratio, race, summary
from .workloads import SHAPES, WORKLOADS, Shape, Workload

Record = Callable[[Entry], None]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_workload = pytest.mark.parametrize("workload", WORKLOADS.values(), ids=str)


@every_workload
@every_shape
def test_forward_backward(
    shape: Shape, workload: Workload, benchmark: BenchmarkFixture, record: Record, pytestconfig: pytest.Config
) -> None:
    logits, target = shape.inputs()
    found = losses(workload, shape, compile=benchmark.enabled and not pytestconfig.getoption("--no-compile"))
    compared = {name: loss for name, loss in found.items() if not name.startswith("objkern, plain")}
    error = errors(compared, workload.eager, logits, target)
    for name in error:
        if name.startswith("objkern"):
            assert_as_accurate(error[name], error["eager"], shape.dtype)
    timed = steps(found, workload, shape, logits, target)
    rounds = pytestconfig.getoption("--rounds") or shape.rounds
    benchmark.group = str(shape)
    others = machine.Others()
    seconds = race(benchmark, timed, OURS, rounds)
    if benchmark.disabled:  # --benchmark-disable: the accuracy was checked, nothing was timed
        return
    record(
        describe("step", shape, workload)
        | compare(seconds, OURS)
        | {
            "others": others.cores(),
            "targets": shape.expected(workload, machine.keeps_pages()),
            "bytes": shape.bytes,
            "copy_bytes": COPY_BYTES,
            "kept_bytes": kept_bytes(timed[OURS], logits),
            "errors": {name: [error[name]["loss"], error[name]["gradient"]] for name in error},
        }
    )


@every_workload
@every_shape
def test_instruction_sets(
    shape: Shape,
    workload: Workload,
    benchmark: BenchmarkFixture,
    children: dict[str, Child],
    record: Record,
    pytestconfig: pytest.Config,
) -> None:
    """The kernels for AVX2, and those for any processor, against AVX-512; each in a process of its own."""
    if "avx512" not in children or len(children) == 1:
        pytest.skip(f"this build on this processor runs {list(children)}: there is nothing to compare AVX-512 with")
    for child in children.values():
        child.prepare(str(shape), workload.name)
    benchmark.group = f"{shape}, instruction sets"
    rounds = pytestconfig.getoption("--rounds") or min(shape.rounds, 15)
    others = machine.Others([child.process.pid for child in children.values()])
    contestants = {name: child.run for name, child in children.items()}
    seconds = race(benchmark, contestants, "avx512", rounds, warm=False)
    if benchmark.disabled:
        return
    more = {"others": others.cores(), "targets": {"avx2": 0.6}}
    record(describe("instruction set", shape, workload) | compare(seconds, "avx512") | more)


def describe(kind: str, shape: Shape, workload: Workload) -> Entry:
    return {
        "kind": kind,
        "rows": shape.rows,
        "classes": shape.classes,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "workload": workload.name,
        "why": shape.why,
    }


def compare(seconds: dict[str, list[float]], name: str) -> Entry:
    """Everyone's seconds, [20 %, median, 80 %], and their ratio to one's, [low, median, high]."""
    return {
        "rounds": len(seconds[name]),
        "seconds": {who: summary(times) for who, times in seconds.items()},
        "ratio": {who: paired_ratio(times, seconds[name]) for who, times in seconds.items() if who != name},
    }
