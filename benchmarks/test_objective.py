"""Forward and backward of an objective on logits, objkern against eager torch, in paired rounds.

    python -m pytest benchmarks --benchmark-json=benchmarks/results/NAME.json

The time of an entry in pytest-benchmark's table is objkern's. Its rivals run in the same round, just before it; their
times, and the ratios round by round, are in the entry's extra_info.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .accuracy import assert_as_accurate, errors
from .pairing import Rivals, paired_ratio, summary
from .workloads import OBJKERN_PLAIN, PLAIN, REGULARIZED, SHAPES, Shape, Workload, contestants, step

LARGE_VOCABULARY = 32000


@pytest.mark.parametrize("workload", [PLAIN, REGULARIZED], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_backward(
    shape: Shape, workload: Workload, benchmark: BenchmarkFixture, copy_bandwidth: float, request: pytest.FixtureRequest
) -> None:
    logits, target = shape.inputs()
    losses = contestants(workload, shape)
    comparable = {name: loss for name, loss in losses.items() if name != OBJKERN_PLAIN}
    found = errors(comparable, workload.eager, logits, target)
    assert_as_accurate(found["objkern"], found["eager"], shape.dtype)

    steps = {name: step(loss, logits, target) for name, loss in losses.items()}
    ours = steps.pop("objkern")
    rivals, rounds = Rivals(steps, ours), request.config.getoption("--rounds") or shape.rounds
    benchmark.group = str(shape)
    benchmark.pedantic(ours, setup=rivals, rounds=rounds, warmup_rounds=1)
    if benchmark.disabled:  # --benchmark-disable: the accuracy was checked, nothing was timed
        return

    own = list(benchmark.stats.stats.data)
    times = {name: seconds[-rounds:] for name, seconds in rivals.seconds.items()} | {"objkern": own}
    plain = times.get(OBJKERN_PLAIN)
    speedup = {name: paired_ratio(times[name], own) for name in steps if name != OBJKERN_PLAIN}
    benchmark.extra_info |= {
        "workload": workload.name,
        "objective": repr(workload.objective),
        "rows": shape.rows,
        "classes": shape.classes,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "why": shape.why,
        "rounds": rounds,
        "seconds": {name: summary(seconds) for name, seconds in times.items()},
        "speedup": speedup,  # each rival's time / objkern's
        "price": plain and paired_ratio(own, plain),  # objkern's time / its time for plain cross-entropy
        "errors": found,
        "bytes": shape.bytes,
        "gb_per_second": shape.bytes / summary(own)["median"] / 1e9,
        "copy_gb_per_second": copy_bandwidth,
    }
    if shape.classes >= LARGE_VOCABULARY:
        ratio = speedup["eager"]["median"]
        assert ratio >= workload.floor, f"eager torch / objkern: {ratio:.2f}, expected at least {workload.floor}"
