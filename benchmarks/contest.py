"""One benchmark: its contestants are checked against float64, then take turns, and all of it becomes an entry.

found = checked(losses, truth, inputs)             errors; who failed, and why
timed = {name: step(loss, inputs) for ...}
contest(benchmark, record, config, timed, facts | found)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from time import perf_counter

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from . import accuracy, machine, switches
from .accuracy import Loss
from .figures import Entry
from .pairing import Step, paired_ratio, race, summary

OURS = "objkern"
Record = Callable[[Entry], None]

LEAST, MOST, MOST_STEPS = 6, 101, 15  # rounds, and steps of a contestant in one
LONG = 0.5  # seconds of a step, in which what was in the caches before it has no weight


def checked(losses: dict[str, Loss], truth: Loss, inputs: Sequence[Tensor], shared: Sequence[int] = ()) -> Entry:
    """`errors` and `failed` of an entry (see `accuracy.errors`); objkern's have to be as small as they should."""
    errors, failed = accuracy.errors(losses, truth, inputs, shared)
    accuracy.assert_as_accurate(errors, next(x.dtype for x in inputs if x.requires_grad))
    return {"errors": errors, "failed": failed}


def compiled(loss: Loss) -> Loss:
    """By torch.compile, at its first call, for the one shape that it is going to see."""
    return torch.compile(loss, dynamic=False, fullgraph=True)


def compiles(benchmark: BenchmarkFixture, config: pytest.Config, important: bool = False) -> bool:
    """Whether torch.compile takes part: in a quick run, whose time it would be, only where it is important."""
    wanted = important or config.getoption("--size") != "quick"
    return benchmark.enabled and wanted and not config.getoption("--no-compile")


def quick(*values: object, when: bool = True) -> object:
    """A parameter of a benchmark, marked if `--size quick` has it."""
    return pytest.param(*values, marks=pytest.mark.quick if when else ())


def step(loss: Loss, inputs: Sequence[Tensor], repeat: int = 1, overwrites: bool = False) -> Step:
    """A training step's share: drop the old gradients, forward, backward.

    Args:
        repeat: so many steps are timed together.
        overwrites: the first input, which is restored outside of the time.
    """
    leaves = [x for x in inputs if x.requires_grad]
    pristine = inputs[0].detach().clone() if overwrites else None

    def run() -> float:
        seconds = 0.0
        for _ in range(repeat):
            if pristine is not None:
                inputs[0].data.copy_(pristine)
            start = perf_counter()
            for leaf in leaves:
                leaf.grad = None
            loss(*inputs).backward()
            seconds += perf_counter() - start
        return seconds / repeat

    def together() -> float:
        start = perf_counter()
        for _ in range(repeat):
            for leaf in leaves:
                leaf.grad = None
            loss(*inputs).backward()
        return (perf_counter() - start) / repeat

    return run if overwrites else together


def contest(
    benchmark: BenchmarkFixture, record: Record, config: pytest.Config, timed: dict[str, Step], facts: Entry,
    children: Sequence[int] = (), warm: bool = True, ours: str = OURS, share: float = 1.0,
) -> None:  # fmt: skip
    """Paired rounds, recorded as `facts` with everyone's times and their ratios to objkern's.

    Args:
        children: process ids that take part.
        warm: everyone whose step is not long takes an untimed one before the timed one.
        ours: the contestant that the others are compared with.
        share: of the time that a benchmark has for its rounds.
    """
    timed = {name: run for name, run in timed.items() if name not in facts.get("failed", {})}
    timed = switches.slowed(timed)
    benchmark.group = benchmark.group or f"{facts['kind']}, {facts['workload']}"
    rounds, short = config.getoption("--rounds"), None if warm else ()
    if rounds is None and benchmark.enabled:
        timed, rounds, short = planned(share * config.getoption("--seconds"), timed, warm)
    others = machine.Others(children)
    seconds = race(benchmark, timed, ours, rounds or LEAST, short)
    if benchmark.enabled:
        record(facts | compared(seconds, ours) | {"others": others.cores()})


def planned(limit: float, timed: dict[str, Step], warm: bool) -> tuple[dict[str, Step], int, list[str]]:
    """The steps, several of them in a round for who is quick; as many rounds as fit; who needs to be warm.

    The slowest decides how many rounds there are; in each, the others may take a fifth of its time.
    """
    once = {name: settled_once(run) for name, run in timed.items()}
    slowest = max(once.values())
    repeats = {name: max(1, min(MOST_STEPS, int(0.2 * slowest / seconds))) for name, seconds in once.items()}
    short = [name for name, seconds in once.items() if warm and seconds < LONG]
    a_round = sum((1 + (name in short)) * repeats[name] * seconds for name, seconds in once.items())
    rounds = max(LEAST, min(MOST, int(limit / a_round)))
    return {name: middle(run, repeats[name]) for name, run in timed.items()}, rounds, short


def settled_once(run: Step) -> float:
    """Seconds of a step, and if it is not long then of the next: the first one brings in code and memory."""
    first = timed_once(run)
    return first if first > 4 * LONG else timed_once(run)


def timed_once(run: Step) -> float:
    begin = perf_counter()
    run()
    return perf_counter() - begin


def middle(run: Step, repeats: int) -> Step:
    """The median of so many steps, one after the other."""
    return run if repeats == 1 else lambda: statistics.median(run() for _ in range(repeats))


def compared(seconds: dict[str, list[float]], ours: str = OURS) -> Entry:
    """Everyone's seconds, as [20 %, median, 80 %] and round by round; their ratios to ours, as [low, median, high]."""
    return {
        "rounds": len(seconds[ours]),
        "seconds": {who: summary(times) for who, times in seconds.items()},
        "ratio": {who: paired_ratio(times, seconds[ours]) for who, times in seconds.items() if who != ours},
        "times": seconds,
    }


def described(kind: str, rows: int, classes: int, dtype: torch.dtype, workload: str, **more: object) -> Entry:
    return {"kind": kind, "rows": rows, "classes": classes, "dtype": str(dtype).removeprefix("torch."),
            "workload": workload, **more}  # fmt: skip
