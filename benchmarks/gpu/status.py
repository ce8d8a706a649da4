"""Writes docs/gpu-status.md: every claim about GPUs, with the measurement that shows it or without one.

python -m benchmarks.gpu.status           # write it, from benchmarks/results/gpu-*.json
python -m benchmarks.gpu.status --check   # exit 1 if it is stale
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .. import results
from . import figures
from .claims import CLAIMS, NATIVE, REMARKS, SANITIZER, Claim
from .figures import TARGETS, Result, entries, findings
from .run import STEPS
from .suite import ENDED

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "gpu-status.md"
NOTHING = "not yet measured"

INTRODUCTION = """\
# What is known on GPUs

Every claim about a GPU has a row here, with the file and the date of what was measured; a row without one is not yet
measured. A row says what held at the commit of its file, which the list below has; what changed in the kernels since is
held by emulation and by what compilers say until a device is asked again. Written by `make docs` from
`benchmarks/results/gpu-*.json`, which `make gpu` writes on a machine with an NVIDIA GPU. A number in parentheses is
that of the failure, shipped elsewhere, that the test guards against ([tests/gpu](../tests/gpu/README.md) has the list).
"""

File = tuple[Path, Result]
Evidence = Callable[[Result], str | None]


def load(folder: Path = results.RESULTS) -> list[File]:
    """The results of GPUs, newest first; a dry run on a stand-in is none."""
    files = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("gpu-*.json")]
    files = [file for file in files if not file[1]["stand_in"]]
    return sorted(files, key=lambda file: (file[1]["datetime"], file[0].name), reverse=True)


def page(files: list[File]) -> str:
    blocks = [INTRODUCTION.strip(), runs(files)]
    for topic, claims in CLAIMS.items():
        rows = [(claim.text, measured_tests(files, claim)) for claim in claims]
        blocks += [f"## {topic}", table("claim", rows)]
    rows = []
    for name, text in SANITIZER.items():
        found = (f"{b}: {measured(files, lambda r, n=name, b=b: of_sanitizer(n, b, r))}" for b in NATIVE)
        rows.append((text, "; ".join(found)))
    blocks += ["## compute-sanitizer over every kernel", table("claim", rows)]
    blocks += ["## Performance", PERFORMANCE]
    rows = [
        (str(target), measured(files, lambda result, n=name: of_target(n, result))) for name, target in TARGETS.items()
    ]
    blocks += [table("target", rows)]
    blocks += ["## The command", table("claim", [("`make gpu` runs to its end", measured(files, of_command))])]
    return "\n\n".join(block for block in blocks if block) + "\n"


PERFORMANCE = """\
bfloat16 logits of 8192 rows with vocabularies of 32000 to 256000 classes, and float32 ones with 32000; gradients taken
with `torch.autograd.grad`; caches flushed, contestants in turns, the device's own time between events. "The best" is
the quicker of the CUDA and the Triton backend, and where no way is named also of `gradient="forward"` and `"backward"`.
Four terms: label smoothing, z-loss, entropy and logit L2 beside cross-entropy. Liger-Kernel overwrites its input with
the gradient, and gets a fresh copy outside of the timed part. The fused linear path: bfloat16 hidden states and
weights of 4096 × 4096 × 128256 and 8192 × 2304 × 256000 (rows, features, classes). Elementwise objectives: 64 million
elements, binary cross-entropy with smoothing, entropy and logit L2, and squared error with Huber and logit L2. The
divergence: 8192 rows of 32000 classes at T = 2, bfloat16 and float32. Terms on parameters: the weights of a sentence
encoder, float32.
"""


def runs(files: list[File]) -> str:
    """What was measured with what."""
    lines = []
    for path, result in files:
        fact = next(iter(entries(result, "facts")), {})
        lines.append(
            f"- [{path.name}](../benchmarks/results/{path.name}), {result['datetime'][:10]}: {fact.get('device')}, "
            f"driver {fact.get('driver')}, torch {fact.get('torch')}, triton {fact.get('triton')}, nvcc "
            f"{fact.get('nvcc')}, commit {result['commit']}{REMARKS.get(path.name, '')}"
        )
    return "\n".join(lines)


def table(title: str, rows: list[tuple[str, str]]) -> str:
    return "\n".join([f"| {title} | measured |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)])


def measured(files: list[File], evidence: Evidence) -> str:
    """For each device the newest file that says something."""
    found: dict[str, str] = {}
    for path, result in files:
        fact = next(iter(entries(result, "facts")), {})
        device = fact.get("device", "an unknown device")
        if device not in found and (text := evidence(result)) is not None:
            found[device] = f"{text} ({device}, {result['datetime'][:10]}, {path.name})"
    return "; ".join(found.values()) or NOTHING


class Outcome(NamedTuple):
    """How the cases of a claim's tests went on one backend. `cut`: the tests did not come to their end."""

    file: str
    passed: int
    failed: int
    cut: bool


def measured_tests(files: list[File], claim: Claim) -> str:
    """For each device and backend the newest run that came to its end, or else the newest of all."""
    devices = dict.fromkeys(device_of(result) for _, result in files)
    found = []
    for device in devices:
        own = [file for file in files if device_of(file[1]) == device]
        words: dict[str, list[str]] = {}
        for backend in claim.backends or ("",):
            runs = [run for path, result in own if (run := outcome(claim, path, result, backend)) is not None]
            best = next((run for run in runs if not run.cut), runs[0] if runs else None)
            if best is not None and best.failed and not runs[0].failed:  # since repaired, as far as it came
                best = runs[0]
            prefix = f"{backend}: " if backend else ""
            if best is None:
                words.setdefault("", []).append(prefix + NOTHING)
            else:
                words.setdefault(best.file, []).append(prefix + went(best.passed, best.failed, best.cut))
        if set(words) != {""}:
            found += [", ".join(texts) + (f" ({device}, {name})" if name else "") for name, texts in words.items()]
    return "; ".join(found) or NOTHING


def device_of(result: Result) -> str:
    return next(iter(entries(result, "facts")), {}).get("device", "an unknown device")


def outcome(claim: Claim, path: Path, result: Result, backend: str) -> Outcome | None:
    """None if nothing ran. backend "": any."""
    names = {f"test_{file}.py::test_{function}" for file, _, function in (t.partition("::") for t in claim.tests)}
    passed = failed = 0
    cut = False
    for entry in entries(result, "tests"):
        chosen = [counts for name, counts in entry["tests"].items() if name in names]
        if not chosen or (backend and entry["backend"] != backend):
            continue
        passed += sum(counts.get("passed", 0) for counts in chosen)
        failed += sum(counts.get("failed", 0) for counts in chosen)
        if entry["exit"] not in (0, 1, 5):
            cut = True
        if entry["exit"] == "timeout":  # the one that was running is none that failed
            failed -= sum(any(ENDED in text for text in counts.get("messages", [])) for counts in chosen)
    return Outcome(path.name, passed, failed, cut) if passed or failed else None


def went(passed: int, failed: int, cut: bool) -> str:
    rest = ", others were not reached" if cut else ""
    if failed:
        return f"**{failed} of {passed + failed} cases fail**{rest}"
    return (f"{passed} cases hold" if passed > 1 else "holds") + rest


def of_sanitizer(tool: str, backend: str, result: Result) -> str | None:
    for entry in entries(result, "sanitizer"):
        if (entry.get("tool"), entry.get("backend")) != (tool, backend):
            continue
        if entry["status"] == "clean":
            return f"clean, {entry['calls']} calls"
        if entry.get("errors", 0) > 0:
            return f"**{entry['errors']} reports**"
        early = entry.get("tail", "").count("========= Error: ") if entry["status"] == "timeout" else 0
        if early:
            return f"**{early} reports** before its time was up"
    return None


def of_target(name: str, result: Result) -> str | None:
    found = [finding for finding in findings(result) if finding.target == name]
    if not found:
        return None
    words = [f"{finding.where}: {finding.value:.3g}{'' if finding.met else ' ✗'}" for finding in found]
    missed = sum(not finding.met for finding in found)
    wrong = " (with wrong results)" if figures.wrong(result) else ""
    return ("met: " if not missed else f"**missed {missed} of {len(found)}**: ") + ", ".join(words) + wrong


def of_command(result: Result) -> str | None:
    if {step.name for step in STEPS} - set(result["steps"]):  # it was asked for some of them
        return None
    bad = [f"{name} {step['status']}" for name, step in result["steps"].items() if step["status"] != "ok"]
    seconds = sum(step.get("seconds", 0) for step in result["steps"].values())
    return f"{len(result['steps'])} steps, {seconds:.0f} s" + (f", but {', '.join(bad)}" if bad else "")


def problems() -> list[str]:
    current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    return [] if page(load()) == current else [f"{PAGE.name} is stale: run make docs"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/gpu-status.md from benchmarks/results/gpu-*.json.")
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is stale")
    if parser.parse_args().check:
        found = problems()
        print("\n".join(found) or f"{PAGE.name} is up to date")
        return 1 if found else 0
    PAGE.write_text(page(load()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
