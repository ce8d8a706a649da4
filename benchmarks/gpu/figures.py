"""What a run's measurements say, and the targets that they are held against. No torch: the report needs none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

Result = dict[str, Any]
Entry = dict[str, Any]

# Passes over the logits that no implementation can avoid: read twice and write once, or read once and write once.
PASSES = {"backward": 3, "forward": 2}
OURS = "objkern"  # where a contest has one of them
VOCABULARIES = (32000, 50257, 128256, 151936, 256000)


class Target(NamedTuple):
    meaning: str
    bound: float
    at_least: bool = True

    def __str__(self) -> str:
        return f"{self.meaning} {'≥' if self.at_least else '≤'} {self.bound:g}"


# "the best": of the backends, and where no way is named also of gradient="forward" and gradient="backward".
TARGETS = {
    "fused": Target('`gradient="forward"`, one read and one write: bytes per second / those of a copy', 0.92),
    "both passes": Target("forward and backward, two reads and one write: bytes per second / those of a copy", 0.92),
    "eager": Target("F.cross_entropy in eager torch: its time / the best of objkern", 4.0),
    "compiled": Target("torch.compile of F.cross_entropy: its time / the best of objkern", 2.0),
    "liger": Target("Liger-Kernel: its time / the best of objkern", 1.0),
    "price": Target("four terms: time / that of plain cross-entropy, the same backend and way", 1.03, at_least=False),
    "small": Target("small logits, F.cross_entropy in eager torch: its time / the best of objkern", 1.0),
    "linear": Target("fused linear, forward and backward: time / that of its three GEMMs alone", 1.12, at_least=False),
    "linear, recompute": Target(
        'fused linear, `mode="recompute"`: time / that of its four GEMMs alone', 1.2, at_least=False
    ),
    "linear, rivals": Target(
        "fused linear: the time of the quickest of eager torch, torch.compile, Liger-Kernel, cut-cross-entropy and "
        "torch's chunked op / the best of objkern",
        1.0,
    ),
    "elementwise": Target("elementwise objectives with penalties, eager torch: its time / the best of objkern", 3.0),
    "divergence": Target("KL divergence from a reference, eager torch: its time / the best of objkern", 5.0),
    "penalties": Target("L2SP of 22M weights, the sum over the parameters in eager torch: its time / objkern's", 2.0),
    "finetune step": Target(
        "a whole step of a 91M language model, V = 128256, 2048 tokens: the time of the quickest of transformers' own "
        "loss, eager torch and Liger-Kernel / objkern's",
        1.0,
    ),
    "finetune batch": Target(
        "the largest batch of that model that fits: objkern's / that of transformers' own loss or eager torch", 1.5
    ),
    "host": Target("512 × 32, the host's time for forward and backward / F.cross_entropy's", 1.1, at_least=False),
}


class Finding(NamedTuple):
    target: str
    where: str
    value: float
    by: str

    @property
    def met(self) -> bool:
        target = TARGETS[self.target]
        return self.value >= target.bound if target.at_least else self.value <= target.bound


def entries(result: Result, kind: str) -> list[Entry]:
    return [entry for step in result["steps"].values() for entry in step["entries"] if entry["kind"] == kind]


def copy_ceiling(result: Result) -> float | None:
    """Bytes per second, read and written, of the quickest copy."""
    found = [entry["gb_per_second"] * 1e9 for entry in entries(result, "copy")]
    return max(found, default=None)


def where(entry: Entry) -> str:
    return f"{entry['rows']} × {entry['classes']} {entry['dtype']}"


def own(entry: Entry, *words: str) -> dict[str, float]:
    """Median seconds of objkern's contestants with these words in their names."""
    return {
        name: seconds[1]
        for name, seconds in entry.get("seconds", {}).items()
        if name.startswith("objkern") and not name.endswith(", plain") and all(word in name.split() for word in words)
    }


def best(entry: Entry, *words: str) -> str | None:
    found = own(entry, *words)
    return min(found, key=found.get, default=None)


def findings(result: Result) -> list[Finding]:
    kinds = (bandwidths, speeds, prices, linears, elements, steps, hosts)
    return [finding for kind in kinds for finding in kind(result)]


def bandwidths(result: Result) -> Iterator[Finding]:
    ceiling = copy_ceiling(result)
    for entry in entries(result, "objective"):
        if ceiling is None or entry["workload"] != "plain":
            continue
        for target, way in (("fused", "forward"), ("both passes", "backward")):
            if (name := best(entry, way)) is not None:
                moved = PASSES[way] * entry["bytes"] / entry["seconds"][name][1]
                yield Finding(target, where(entry), moved / ceiling, name)


def speeds(result: Result) -> Iterator[Finding]:
    for kind in ("objective", "small"):
        for entry in entries(result, kind):
            name = best(entry)
            if entry["workload"] != "plain" or name is None:
                continue
            for rival in ("eager", "compiled", "liger"):
                ratio = entry["ratio"].get(f"{rival} / {name}")
                if ratio is None:
                    continue
                if kind == "objective" and entry["dtype"] == "bfloat16":
                    yield Finding(rival, where(entry), ratio[1], name)
                if kind == "small" and rival == "eager" and entry["rows"] * entry["classes"] < 50_000:
                    yield Finding("small", where(entry), ratio[1], name)


def prices(result: Result) -> Iterator[Finding]:
    for entry in entries(result, "objective"):
        for way in PASSES if entry["workload"] == "regularized" else ():
            name = best(entry, way)
            ratio = entry["ratio"].get(f"{name}, plain / {name}") if name else None
            if ratio is not None:
                yield Finding("price", f"{where(entry)}, {way}", 1 / ratio[1], name)


def linears(result: Result) -> Iterator[Finding]:
    for entry in entries(result, "linear"):
        if "seconds" not in entry:
            continue
        place = f"{entry['rows']} × {entry['features']} × {entry['classes']} {entry['workload']}"
        for target, way, gemms in (
            ("linear", "forward", "three GEMMs"), ("linear, recompute", "recompute", "four GEMMs"),
        ):  # fmt: skip
            name = best(entry, way)
            if name is not None and (ratio := entry["ratio"].get(f"{gemms} / {name}")) is not None:
                yield Finding(target, place, 1 / ratio[1], name)
        name = best(entry)
        others = [
            ratio[1] for pair, ratio in entry["ratio"].items() if pair.endswith(f" / {name}") and "GEMM" not in pair
        ]
        if name is not None and others:
            yield Finding("linear, rivals", place, min(others), name)


def elements(result: Result) -> Iterator[Finding]:
    for kind in ("elementwise", "divergence"):
        for entry in entries(result, kind):
            name = best(entry)
            if name is not None and (ratio := entry["ratio"].get(f"eager / {name}")) is not None:
                yield Finding(kind, f"{where(entry)} {entry['workload']}", ratio[1], name)
    for entry in entries(result, "penalty"):
        if (ratio := entry.get("ratio", {}).get("eager / objkern L2SP")) is not None:
            yield Finding("penalties", f"{entry['weights']} weights", ratio[1], "objkern L2SP")


def steps(result: Result) -> Iterator[Finding]:
    for entry in entries(result, "finetune step"):
        if OURS not in entry.get("seconds", {}):
            continue
        place = f"{where(entry)} {entry['workload']}"
        others = [ratio[1] for pair, ratio in entry["ratio"].items() if pair.endswith(f" / {OURS}")]
        if others:
            yield Finding("finetune step", place, min(others), OURS)
        native = [batch for name, batch in entry["largest_batch"].items() if name in ("stock", "eager")]
        if native:
            yield Finding("finetune batch", place, entry["largest_batch"][OURS] / max(native), OURS)


def hosts(result: Result) -> Iterator[Finding]:
    for entry in entries(result, "host"):
        if entry["what"] != "forward and backward":
            continue
        calls = {name: r[1] for name, r in entry["ratio"].items() if name.startswith("objkern")}
        found = {name: value for name, value in calls.items() if name.split()[-1] != "op"}  # which checks nothing
        if found:
            name = min(found, key=found.get)
            yield Finding("host", f"{where(entry)}", found[name], name)


def wrong(result: Result) -> list[str]:
    """Contestants whose gradient is much further from float64 than eager torch's: their times mean nothing."""
    found = []
    for kind in ("objective", "small", "linear"):
        for entry in entries(result, kind):
            errors = entry.get("errors", {})
            eager = errors.get("eager")
            for name, error in errors.items():
                if not name.startswith("objkern") or not isinstance(eager, list) or name.endswith(", plain"):
                    continue
                if isinstance(error, str):
                    found.append(f"{where(entry)} {entry['workload']}, {name}: {error}")
                elif not error[1] <= 2 * eager[1] + 1e-4:
                    found.append(f"{where(entry)} {entry['workload']}, {name}: gradient off by {error[1]:.1e}")
    return found
