"""What became slower from one results file to another: python -m objkern bench compare A.json B.json

A time by itself says as much about the machine's mood as about the kernel, so what is compared is objkern's time over
the times of everybody else in the same round, whose code is the same in both files:

    level     the median over the rounds of log(objkern / the geometric mean of the others)
    change    level in B − level in A, with the error of both medians

Two runs of the same code differ by more than their rounds do: memory lies elsewhere, a neighbour came or went. How much
is read off the changes themselves, from how they scatter about their median; what all of them share is judged apart.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import results, tables
from .figures import Entry, label

SIGMAS = 4.0  # that a change has to be away from none; of two dozen changes one is so in a thousand comparisons
LEAST = 0.03  # and this much slower: less than that is nobody's business
SCATTER = 0.01  # between two runs, at the least


class Change(NamedTuple):
    """Of one contestant in one benchmark: log of the ratio B / A, and its standard error from the rounds."""

    where: str
    log_ratio: float
    error: float


def main(arguments: Sequence[str]) -> int:
    found = argparse.ArgumentParser(
        prog="python -m objkern bench compare",
        description="What became slower from one run to another, measured against what both have in common.",
        epilog="Exit status: 0 nothing became slower, 1 something did, 2 the files cannot be compared.",
    )
    found.add_argument("before", type=Path, metavar="A.json")
    found.add_argument("after", type=Path, metavar="B.json")
    options = found.parse_args(arguments)
    before, after = results.read(options.before), results.read(options.after)
    if reasons := differences(before, after):
        found.error(f"these runs cannot be compared: {'; '.join(reasons)}")
    changes = list(changes_of(before["entries"], after["entries"]))
    if not changes:
        found.error("these runs have no benchmark in common that timed objkern beside something else")
    print(report(changes))
    return 1 if any(slower(one, changes) for one in [common(changes), *changes]) else 0


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What makes ratios to torch's own times another thing in one file than in the other."""
    names = ("cpu", "threads", "torch", "allocator")
    return [
        f"{name}: {before['machine'][name]} and {after['machine'][name]}"
        for name in names if before["machine"][name] != after["machine"][name]
    ]  # fmt: skip


# ---- changes --------------------------------------------------------------------------------------------------------


def changes_of(before: list[Entry], after: list[Entry]) -> Iterator[Change]:
    then = {label(entry): entry for entry in before if "times" in entry}
    for entry in after:
        earlier = then.get(label(entry))
        if earlier is None or "times" not in entry:
            continue
        both = [name for name in entry["times"] if name in earlier["times"]]
        others = [name for name in both if not is_ours(name)]
        for name in both if others else []:
            if is_ours(name):
                (a, e), (b, f) = (level(one["times"], name, others) for one in (earlier, entry))
                yield Change(f"{label(entry)}: {name}", b - a, math.hypot(e, f))


def is_ours(name: str) -> bool:
    return name.startswith("objkern") or name in ROUTES


ROUTES = ("C++ autograd", "autograd.Function", "register_autograd")  # to objkern's ops


def level(times: dict[str, list[float]], name: str, others: Sequence[str]) -> tuple[float, float]:
    """The median of the rounds, and its standard error, from how the rounds scatter."""
    rounds = [
        math.log(own) - statistics.fmean(math.log(times[other][k]) for other in others)
        for k, own in enumerate(times[name])
    ]
    return statistics.median(rounds), 1.2533 * scale(rounds) / math.sqrt(len(rounds))


def scale(values: Sequence[float]) -> float:
    """Standard deviation as the median tells it, which a few strays do not change."""
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(value - middle) for value in values)


def common(changes: Sequence[Change]) -> Change:
    """What all have in common: their median, and how well that is known."""
    logs, rounds = [one.log_ratio for one in changes], statistics.median(one.error for one in changes)
    error = 1.2533 * math.hypot(scatter(changes), rounds) / math.sqrt(len(logs))
    return Change("all of them", statistics.median(logs), math.hypot(error, SCATTER / 2))


def scatter(changes: Sequence[Change]) -> float:
    """How much more the changes scatter than their rounds explain: that is from run to run."""
    rounds = statistics.median(one.error for one in changes)
    return math.sqrt(max(SCATTER**2, scale([one.log_ratio for one in changes]) ** 2 - rounds**2))


def sigmas(change: Change, changes: Sequence[Change]) -> float:
    spread = 0.0 if change.where == "all of them" else scatter(changes)
    return change.log_ratio / math.hypot(change.error, spread)


def slower(change: Change, changes: Sequence[Change]) -> bool:
    return sigmas(change, changes) > SIGMAS and change.log_ratio > math.log1p(LEAST)


def quicker(change: Change, changes: Sequence[Change]) -> bool:
    return sigmas(change, changes) < -SIGMAS and change.log_ratio < -math.log1p(LEAST)


# ---- in words -------------------------------------------------------------------------------------------------------


def report(changes: Sequence[Change]) -> str:
    lines = []
    for one in [common(changes), *sorted(changes, key=lambda one: -one.log_ratio)]:
        verdict = "SLOWER" if slower(one, changes) else "quicker" if quicker(one, changes) else ""
        low, high = (one.log_ratio + side * 2 * math.hypot(one.error, scatter(changes)) for side in (-1, 1))
        lines.append([one.where, percent(one.log_ratio), f"[{percent(low)}, {percent(high)}]",
                      f"{sigmas(one, changes):+.1f}", verdict])  # fmt: skip
    count = sum(slower(one, changes) for one in changes)
    words = f"{count} of {len(changes)} became slower" if count else "nothing by itself became slower"
    if slower(common(changes), changes):
        words += f"; all of them together did, by {percent(common(changes).log_ratio)}"
    return f"{tables.table(['objkern against the others', 'time', '95 %', 'sigmas', ''], lines)}\n\n{words}"


def percent(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):+.1f} %"
