"""What became slower from one results file to another: python -m objkern bench compare A.json B.json

A time by itself says as much about the machine's mood as about the kernel. Compared are floors, which the suite `watch`
measures in several processes of each run: the least time of a kernel, over that of a yardstick which never changes.

    floor     log(the least of all processes' times / the least of the yardstick's)
    change    floor in B − floor in A
    error     how much each least time depends on which processes there happened to be: its standard deviation if as
              many were drawn from these, with replacement (Efron's bootstrap, of which the least value has a formula)
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import results, tables
from .figures import Entry, label

KIND, OURS, YARDSTICK = "floor", "objkern", "yardstick"

SIGMAS = 2.5  # that a change has to be away from none: of its error, which is twice what changes of nothing scatter by
LEAST = 0.05  # and this much slower: less than that is nobody's business
SCATTER = 0.008  # of a change between two runs of the same code, at the least


class Change(NamedTuple):
    """Of one kernel: log of the ratio of B to A, and its standard error."""

    where: str
    log_ratio: float
    error: float

    @property
    def sigmas(self) -> float:
        return self.log_ratio / self.error

    @property
    def slower(self) -> bool:
        return self.sigmas > SIGMAS and self.log_ratio > math.log1p(LEAST)

    @property
    def quicker(self) -> bool:
        return self.sigmas < -SIGMAS and self.log_ratio < -math.log1p(LEAST)


def main(arguments: Sequence[str]) -> int:
    found = argparse.ArgumentParser(
        prog="python -m objkern bench compare",
        description="What became slower from one run to another, by the floors that the suite watch measures.",
        epilog="Exit status: 0 nothing became slower, 1 something did, 2 the files cannot be compared.",
    )
    found.add_argument("before", type=Path, metavar="A.json")
    found.add_argument("after", type=Path, metavar="B.json")
    options = found.parse_args(arguments)
    try:
        before, after = results.read(options.before), results.read(options.after)
    except SystemExit as error:
        found.error(str(error))
    if reasons := differences(before, after):
        found.error(f"these runs cannot be compared: {'; '.join(reasons)}")
    changes = changes_of(before["entries"], after["entries"])
    if not changes:
        found.error("these runs have no floors in common: make them with python -m objkern bench watch")
    print(report(changes))
    return 1 if any(one.slower for one in changes) else 0


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What makes the yardstick another one in one file than in the other."""
    names = ("cpu", "torch", "allocator")
    return [
        f"{name}: {before['machine'].get(name)} and {after['machine'].get(name)}"
        for name in names if before["machine"].get(name) != after["machine"].get(name)
    ]  # fmt: skip


def changes_of(before: list[Entry], after: list[Entry]) -> list[Change]:
    """An error that happens to be less than most are is taken to be as they are: few processes tell little about it."""
    then = {label(entry): entry for entry in before if entry["kind"] == KIND}
    found = []
    for entry in after:
        if entry["kind"] == KIND and (earlier := then.get(label(entry))):
            (a, e), (b, f) = floor(earlier["times"]), floor(entry["times"])
            found.append(Change(label(entry).removeprefix(f"{KIND}, "), b - a, math.hypot(e, f, SCATTER)))
    usual = statistics.median(one.error for one in found) if found else 0.0
    return [one._replace(error=max(one.error, usual)) for one in found]


def floor(times: dict[str, list[float]]) -> tuple[float, float]:
    """log(least of ours / least of the yardstick's), and its standard error."""
    (ours, e), (yardstick, f) = least(times[OURS]), least(times[YARDSTICK])
    return ours - yardstick, math.hypot(e, f)


def least(times: Sequence[float]) -> tuple[float, float]:
    """log of the least, and the standard deviation of that if as many are drawn from these, with replacement."""
    logs, n = sorted(map(math.log, times)), len(times)
    chances = [((n - k) / n) ** n - ((n - k - 1) / n) ** n for k in range(n)]  # that the k-th is the least one drawn
    mean = sum(p * x for p, x in zip(chances, logs, strict=True))
    return logs[0], math.sqrt(sum(p * (x - mean) ** 2 for p, x in zip(chances, logs, strict=True)))


# ---- in words -------------------------------------------------------------------------------------------------------


def report(changes: Sequence[Change]) -> str:
    lines = []
    for one in sorted(changes, key=lambda one: -one.log_ratio):
        low, high = (one.log_ratio + side * 2 * one.error for side in (-1, 1))
        lines.append([one.where, percent(one.log_ratio), f"[{percent(low)}, {percent(high)}]",
                      f"{one.sigmas:+.1f}", "SLOWER" if one.slower else "quicker" if one.quicker else ""])  # fmt: skip
    count = sum(one.slower for one in changes)
    words = f"{count} of {len(changes)} became slower" if count else "nothing became slower"
    noticed = max(math.log1p(LEAST), SIGMAS * max(one.error for one in changes))
    words += f"; of every kernel {percent(noticed)} of its time would have been noticed"
    return f"{tables.table(['kernel, on one core', 'time', '95 %', 'sigmas', ''], lines)}\n\n{words}"


def percent(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):+.1f} %"
