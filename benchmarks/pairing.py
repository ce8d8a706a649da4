"""Paired timing: contestants take turns within a round, and only times of one round are compared.

A shared machine drifts by tens of percent within a minute. Two medians taken one after the other compare the machine
at two times; the ratio within a round compares the contestants.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

Step = Callable[[], float]  # runs once and returns the seconds that it took
Interval = list[float]  # [low, median, high]


class Round:
    """One round: the rivals one after the other, then the contestant that the benchmark is about.

    Args:
        warm: who takes an untimed step first, as in training, where a loss follows itself: what the one before left in
            caches and allocator is its own. Without: everyone.
    """

    def __init__(
        self, rivals: dict[str, Step], name: str, step: Step, warm: Collection[str] | None = None
    ) -> None:  # fmt: skip
        self.rivals, self.name, self.step = rivals, name, step
        self.warm = [*rivals, name] if warm is None else warm
        self.seconds: dict[str, list[float]] = {rival: [] for rival in [*rivals, name]}

    def before(self) -> None:
        for name, step in self.rivals.items():
            if name in self.warm:
                step()
            self.seconds[name].append(step())
        if self.name in self.warm:
            self.step()

    def run(self) -> None:
        self.seconds[self.name].append(self.step())


def race(
    benchmark: BenchmarkFixture, steps: dict[str, Step], name: str, rounds: int, warm: Collection[str] | None = None
) -> dict[str, list[float]]:
    """The seconds of every contestant, round by round; the entry in pytest-benchmark's own table is ``steps[name]``."""
    this = Round({rival: step for rival, step in steps.items() if rival != name}, name, steps[name], warm)
    benchmark.pedantic(this.run, setup=this.before, rounds=rounds, warmup_rounds=bool(this.warm))
    return {rival: seconds[-rounds:] for rival, seconds in this.seconds.items()}


def summary(seconds: Sequence[float]) -> Interval:
    """20th percentile, median, 80th percentile."""
    if len(seconds) == 1:
        return [*seconds] * 3
    quintiles = statistics.quantiles(seconds, n=5, method="inclusive")
    return [quintiles[0], statistics.median(seconds), quintiles[-1]]


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Interval:
    """Median of the ratios of each round, within its 95 % confidence interval."""
    ratios = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    rank = median_rank(len(ratios))
    return [ratios[rank], statistics.median(ratios), ratios[-1 - rank]]


def median_rank(n: int, confidence: float = 0.95) -> int:
    """How many order statistics to leave out at each end of the confidence interval for a median.

    The number of samples below the median is Binomial(n, 1/2), whatever their distribution. Below six samples no
    interval reaches 95 %; the range is given.
    """
    rank, below = 0, 0.5**n
    while below <= (1 - confidence) / 2:
        rank += 1
        below += math.comb(n, rank) * 0.5**n
    return max(0, rank - 1)
