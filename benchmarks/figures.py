"""What the measurements say: ratios that tables show and targets ask for. No torch: the report needs none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

Entry = dict[str, Any]  # one benchmark in a results file
Interval = list[float]  # [low, median, high], in the file

# Passes over the logits that no implementation can avoid: read twice and write once, or read once and write once.
PASSES = {"objkern": 3, "objkern, forward": 2}


class Target(NamedTuple):
    at_least: bool
    meaning: str


TARGETS = {
    "eager": Target(True, "eager torch's time / objkern's"),
    "stock": Target(True, "the time of a model's own loss / objkern's"),
    "torch": Target(True, "the time to import torch alone / that with objkern"),
    "compiled": Target(True, "torch.compile's time / objkern's"),
    "price": Target(False, "objkern's time regularized / plain"),
    "copy": Target(True, "objkern's bytes per second / a copy's"),
    "avx2": Target(True, "speed with AVX2 / with AVX-512"),
    "forward_mb": Target(False, "MB that the forward pass adds"),
    "chunked": Target(True, "the time of torch's chunked op / objkern's"),
    "memory_share": Target(False, "objkern's memory / eager torch's"),
    "beyond_gradients_mb": Target(False, "MB that a step adds beyond the gradients"),
}


def figure(entry: Entry, name: str) -> Interval | None:
    """By a target's name; None where it was not measured."""
    ratio = entry.get("ratio", {})
    if name == "price":
        return inverse(ratio["objkern, plain"]) if "objkern, plain" in ratio else None
    if name == "copy":
        return of_copy(entry) if "copy" in ratio else None
    if name == "avx2":
        return inverse(ratio["avx2"]) if "avx2" in ratio else None
    if name == "forward_mb":
        return [entry["bytes"]["objkern"][0] / 1e6] * 3
    if name == "chunked":
        return ratio.get("torch, chunked")
    if name == "memory_share":
        return [entry["bytes"]["objkern"] / entry["bytes"]["eager"]] * 3
    if name == "beyond_gradients_mb":
        return [beyond_gradients(entry, "objkern") / 1e6] * 3
    return ratio.get(name)


def beyond_gradients(entry: Entry, name: str) -> float:
    """Bytes that a step adds to the gradients of the linear layer and its inputs."""
    return entry["bytes"][name] - entry["gradient_bytes"]


def inverse(interval: Interval) -> Interval:
    return [1 / x for x in reversed(interval)]


def of_copy(entry: Entry) -> Interval:
    """Bytes per second as a share of those of a copy; paired, for both took their turns in the same rounds."""
    moved = PASSES["objkern"] * entry["bytes"] / (2 * entry["copy_bytes"])
    return [moved * x for x in entry["ratio"]["copy"]]


def gb_per_second(entry: Entry, name: str) -> float:
    return PASSES[name] * entry["bytes"] / entry["seconds"][name][1] / 1e9


def copy_gb_per_second(entry: Entry) -> float:
    return 2 * entry["copy_bytes"] / entry["seconds"]["copy"][1] / 1e9


def misses(entry: Entry, name: str, surely: bool = False, slack: float = 0.0) -> bool:
    """Whether the median misses the target; `surely`: the whole interval does, by more than a share `slack`."""
    found, wanted = figure(entry, name), entry.get("targets", {}).get(name)
    if found is None or wanted is None:
        return False
    low, median, high = found
    if TARGETS[name].at_least:
        return (high if surely else median) < wanted * (1 - slack)
    return (low if surely else median) > wanted * (1 + slack)


def bound(entry: Entry, name: str) -> str:
    return f"{'≥' if TARGETS[name].at_least else '≤'} {entry['targets'][name]:.3g}"


def missed(entry: Entry, surely: bool = False, slack: float = 0.0) -> list[str]:
    """The targets that this entry misses, in words."""
    return [
        f"{label(entry)}: {TARGETS[name].meaning} is {figure(entry, name)[1]:.3g}, expected {bound(entry, name)}"
        for name in entry.get("targets", {})
        if misses(entry, name, surely, slack)
    ]


WIDE = 1.3  # high / low of an interval, from which on it says little


def unsteady(entry: Entry) -> list[str]:
    """Ratios of which the rounds say too little to conclude anything about a target, in words."""
    found = []
    for name in entry.get("targets", {}):
        interval = figure(entry, name)
        if (
            interval is not None
            and interval[2] > WIDE * interval[0]
            and interval[0] < entry["targets"][name] < interval[2]
        ):
            low, _, high = interval
            found.append(f"{label(entry)}: {TARGETS[name].meaning} is somewhere in [{low:.3g}, {high:.3g}], which is "
                         f"too wide to tell whether it is {bound(entry, name)}")  # fmt: skip
    return found


def disturbed(entries: list[Entry], cores: float = 0.1) -> list[str]:
    """What was measured while other processes kept more than so many cores busy."""
    return [
        f"{label(entry)}: others kept {entry['others']:.1f} cores busy"
        for entry in entries
        if (entry.get("others") or 0.0) > cores
    ]


def label(entry: Entry) -> str:
    shape = [entry[name] for name in ("rows", "features", "classes") if name in entry]
    words = [" × ".join(map(str, shape)), entry.get("dtype", ""), entry["workload"]]
    return f"{entry['kind']}, {' '.join(filter(None, words))}"


def in_a_line(entry: Entry) -> str:
    """What was measured, as it comes."""
    times = [f"{name} {1e3 * seconds[1]:.3g} ms" for name, seconds in entry.get("seconds", {}).items()]
    sizes = (
        [f"{name} {largest(count) / 1e6:.3g} MB" for name, count in entry.get("bytes", {}).items()] if not times else []
    )
    return f"{label(entry)}: {', '.join(times or sizes)}"


def largest(count: float | Sequence[float]) -> float:
    return max(count) if isinstance(count, Sequence) else count


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Least squares in log-log: the exponent of time ~ size^slope."""
    x, y = [math.log(size) for size in sizes], [math.log(second) for second in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
