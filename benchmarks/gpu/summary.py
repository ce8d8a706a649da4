"""The tables at the end of a run: steps, times, and every target with what was found."""

from __future__ import annotations

from ..tables import milliseconds, table
from .figures import PASSES, TARGETS, Result, copy_ceiling, entries, findings, where, wrong


def steps(result: Result) -> str:
    rows = [
        [name, step["status"], f"{step.get('seconds', 0):.0f} s", counts(name, step)]
        for name, step in result["steps"].items()
    ]
    return table(["step", "status", "took", ""], rows)


def counts(name: str, step: Result) -> str:
    if name == "tests":
        total = dict.fromkeys(("passed", "failed", "skipped"), 0)
        for entry in step["entries"]:
            for test in entry.get("tests", {}).values():
                for outcome in total:
                    total[outcome] += test.get(outcome, 0)
        return ", ".join(f"{count} {outcome}" for outcome, count in total.items())
    if name == "sanitizer":
        return "; ".join(
            f"{entry['tool']} {entry['backend']}: {entry['status']}"
            for entry in step["entries"] if entry["kind"] == "sanitizer"
        )  # fmt: skip
    return step.get("why", "")


def times(result: Result) -> str:
    """Medians of the large logits: everyone's milliseconds, and objkern's share of a copy's bandwidth."""
    ceiling = copy_ceiling(result)
    rows = []
    for entry in entries(result, "objective"):
        for name, seconds in entry.get("seconds", {}).items():
            if name.endswith(", plain"):
                continue
            way = name.split()[-1]
            share = ""
            if name.startswith("objkern") and ceiling:
                share = f"{100 * PASSES[way] * entry['bytes'] / seconds[1] / ceiling:.0f} %"
            rows.append([where(entry), entry["workload"], name, milliseconds(seconds[1]), share])
    return table(["logits", "objective", "contestant", "forward and backward", "of a copy"], rows)


def targets(result: Result) -> str:
    rows, found = [], findings(result)
    for name, target in TARGETS.items():
        chosen = [finding for finding in found if finding.target == name]
        if not chosen:
            rows.append([str(target), "", "", "", "not measured"])
        for finding in chosen:
            verdict = "met" if finding.met else "MISSED"
            rows.append([str(target), finding.where, f"{finding.value:.3g}", finding.by, verdict])
    return table(["target", "logits", "found", "by", ""], rows)


def every(result: Result) -> str:
    blocks = [steps(result)]
    if entries(result, "objective"):
        blocks.append(times(result))
    if lines := wrong(result):
        blocks.append("\n".join(["WRONG RESULTS, whose times mean nothing:", *lines]))
    return "\n\n".join([*blocks, targets(result)])


def failed(result: Result) -> bool:
    bad = any(step["status"] in ("failed", "timeout") for step in result["steps"].values())
    return bad or bool(wrong(result)) or any(not finding.met for finding in findings(result))
