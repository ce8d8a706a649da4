"""Paired timing: contestants take turns within a round, and only times of one round are compared.

A shared machine drifts by tens of percent within a minute. Two medians taken one after the other compare the machine
at two times; the ratio within a round compares the contestants.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from time import perf_counter


class Rivals:
    """Runs and times the rivals, one after the other; called before each timed round of pytest-benchmark.

    With ``benchmark.pedantic(ours, setup=rivals)`` the order of execution is A B ours A B ours ... Everyone takes an
    untimed step first, as in training, where a loss follows itself: what the one before left in caches and allocator
    is its own.
    """

    def __init__(self, steps: dict[str, Callable[[], None]], ours: Callable[[], None]) -> None:
        self.steps, self.ours = steps, ours
        self.seconds: dict[str, list[float]] = {name: [] for name in steps}

    def __call__(self) -> None:
        for name, step in self.steps.items():
            step()
            start = perf_counter()
            step()
            self.seconds[name].append(perf_counter() - start)
        self.ours()


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    quintiles = statistics.quantiles(seconds, n=5, method="inclusive")
    return {"median": statistics.median(seconds), "p20": quintiles[0], "p80": quintiles[-1]}


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median of the ratios of each round, with a 95 % confidence interval."""
    ratios = sorted(a / b for a, b in zip(numerator, denominator, strict=True))
    rank = median_rank(len(ratios))
    return {"median": statistics.median(ratios), "low": ratios[rank], "high": ratios[-1 - rank]}


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
