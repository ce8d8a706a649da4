"""Writes docs/performance.md and its plot from the files in benchmarks/results; no figure there has another source.

python -m benchmarks.report           # write them (the plot needs matplotlib)
python -m benchmarks.report --check   # exit 1 if they are stale
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import plot, results, tables
from benchmarks.figures import Entry, copy_gb_per_second, disturbed, missed, unsteady

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"

INTRODUCTION = """\
# Performance

Forward and backward pass of an objective on logits: objkern, eager torch and `torch.compile` on the same CPU. Written
by `make docs` from the files in `benchmarks/results`; `make bench` measures anew, `python -m objkern bench SUITE` a
part of it. Of every case the newest measurement on each machine is shown, under the run that it comes from.

## What is compared

- **plain**: `CrossEntropy()` and `torch.nn.functional.cross_entropy`.
- **regularized**: `CrossEntropy(label_smoothing=0.1) + 1e-4*ZLoss() - 0.01*Entropy() + 1e-3*LogitL2()`, and the same
  formula in eager torch, term by term, as training scripts have it (`eager_regularized` in
  `benchmarks/workloads.py`). The **price** is what the regularizers cost: objkern's time over its own time for plain
  cross-entropy.
- **compiled**: `torch.compile` of the eager function, forward and backward, with static shapes, compiled for each
  shape before it is timed.
- For half-precision logits eager torch and `torch.compile` run twice: on the logits as they are, and on
  `logits.float()` (the lines marked so), which is slower in eager torch and as accurate as objkern. objkern reads
  half precision and computes in float32.
- **Gradient in the forward pass**: objkern with `gradient="forward"`, which reads the logits once.
- **Instruction sets**: objkern alone, its kernels for AVX2 and for any processor (`OBJKERN_CPU_CAPABILITY`), as a share
  of the speed of those for AVX-512. A process chooses once; each has its own, and they take turns.
- **The fused linear path**: `objective.linear(hidden, weight, labels)`, in its two modes, against eager torch's
  `F.linear` and the same losses, `torch.compile` of those, torch's own chunked `F.linear_cross_entropy`, and the three
  GEMMs alone; [linear.md](linear.md) says when to use which mode.
- GPUs have a page of their own: [gpu-status.md](gpu-status.md).

## How it is measured

- **In pairs.** Contestants take turns, A B C A B C ..., and only times of the same round are divided. The tables give
  the median of these ratios and its 95 % confidence interval from order statistics, which assumes nothing about the
  distribution; of five rounds or fewer, as some of the older files have, all of their range. Times are medians over the
  rounds.
- **A step** drops the old gradient (`logits.grad = None`), runs forward and runs backward. Before each timed step the
  same contestant takes an untimed one, as in training, where a loss follows itself. Steps of a few microseconds are
  timed by the dozen.
- **The allocator** matters as much as the arithmetic. By default glibc hands large blocks back to the kernel when they
  are freed, and the next step pays for fresh pages: eager and compiled torch pay this for each of their large
  intermediate tensors. objkern's gradient reuses its memory (`objkern.set_buffer_limit`): at most two freed gradients
  are kept, and at most an eighth of the machine's memory; a table shows what that buys and how much is kept. With
  `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000` glibc keeps its pages, so everyone's buffers are reused.
  `make bench` measures the first regime and `make bench-kept-pages` the second, and each section says which one it is
  about. In the second one plain cross-entropy has no target against eager torch but not to be slower.
- **Bytes** are those that no implementation can avoid: with the gradient in the backward pass, logits read twice and
  gradient written once; with `gradient="forward"`, read once and written once. GB/s is their number over objkern's
  time. **Of a copy** is that as a share of the bandwidth of a copy between two buffers of 268 MB that exist already,
  reads and writes counted, which takes its turn in the same rounds. It is given where the logits are 17 MB or more:
  what fits into the caches can exceed it, and what is tiny measures the cost of a call.
- **Memory** is the growth of the peak resident set, in a process of its own, after everything was loaded (and
  compiled): of the forward pass while its graph is alive, and of both passes, which includes the gradient itself.
- **Right before fast.** Before it is timed, each contestant's loss and gradient are held against float64; objkern's
  error may be at most twice that of eager torch, plus the rounding of the result.
- Logits are N(0, 3²) and labels random; nobody's work depends on them.

What is expected of each shape stands beside it in `benchmarks/workloads.py`, and holds for every machine below: eager
torch is slower on some, arithmetic on others. The tables mark a median that misses its target: ✗ with the bound.
`make bench` fails if the whole interval misses it; continuous integration runs `--size quick` with three tenths of
slack. `python -m objkern bench compare` tells what became slower from one run to another, by the least times of kernels
on one core.
"""

# Recorded before a file said by itself that its run was interrupted; what is recorded stays as it is.
ENDED = (
    "2026-11-26-amd-epyc-family-25-model-1-2-threads-2.json",
    "2026-11-27-amd-epyc-family-25-model-1-2-threads.json",
)
REMARKS = {
    "Gradient in the forward pass": "Bytes: read once, written once.",
    "The fused linear path": "GEMMs alone: the three products, whole, into memory that exists already.",
    "Memory of the fused linear path": "Growth of the peak resident set in a process of its own. Gradients: those of "
    "hidden states and weight.",
    "Memory of the fused linear path over the number of rows": 'Beyond the gradients, `mode="forward"` / '
    '`mode="recompute"`; 64 features, regularized, float32.',
    "What reuse of the gradient's memory buys": "Fresh pages: `objkern.set_buffer_limit(0)`.",
    "Elementwise objectives": "Penalties: label smoothing, Bernoulli entropy and logit L2 beside binary "
    "cross-entropy; Huber and logit L2 beside the squared error. Eager torch: the formulas in "
    "`benchmarks/workloads.py`.",
    "Divergence from a reference": "`KLDivergence(temperature=2)` against `F.kl_div` of log_softmax and softmax, "
    "batchmean. The compiled one is fused by inductor.",
    "Time over size": "From 2³¹ bfloat16 logits on, the gradient is more than objkern keeps between steps (an eighth "
    "of the machine's memory), so that every step pays for fresh pages. Errors are those of the last three rows.",
    "Six terms": "Cross-entropy with label smoothing, z-loss, entropy, logit L2, focal and poly-1; price: over plain "
    "cross-entropy, both with the gradient in the backward pass.",
    "Terms on parameters": "Value and gradients of all weight matrices of a sentence encoder; eager torch: the sum "
    "over the parameters as training scripts have it.",
    "Whole steps of fine-tuning": "Forward, backward and AdamW in float32. Stock: the loss that transformers computes; "
    "eager: the formula on the model's logits; objkern: attached to the model (causal), or on its logits. Memory: what "
    "a step adds to the resident set once weights and moments are there, gradients included.",
    "Errors against float64": "Relative: of the loss, and of the gradient in the Euclidean norm.",
}


class Run(NamedTuple):
    """A results file, and those of its entries that no later run on the same machine has measured anew."""

    path: Path
    result: dict[str, Any]
    entries: list[Entry]


CASE = ("kind", "rows", "features", "classes", "dtype", "workload", "sweep", "training")  # what an entry is about


def newest(files: list[tuple[Path, dict[str, Any]]]) -> list[list[Run]]:
    """By machine and allocator, all from the newest to the oldest."""
    machines: dict[tuple[Any, ...], list[Run]] = {}
    seen: set[tuple[Any, ...]] = set()
    for path, result in files:
        machine = tuple(result["machine"][name] for name in ("cpu", "cores", "threads", "capability", "keeps_pages"))
        cases = [(machine, *(entry.get(name) for name in CASE)) for entry in result["entries"]]
        entries = [entry for case, entry in zip(cases, result["entries"], strict=True) if case not in seen]
        seen |= set(cases)
        machines.setdefault(machine, []).append(Run(path, result, entries))
    return list(machines.values())


def page(files: list[tuple[Path, dict[str, Any]]]) -> str:
    drawn: dict[Path, set[str]] = {}
    for kind, (path, _) in plotted(files).items():
        drawn.setdefault(path, set()).add(kind)
    machines = newest(files)
    sections = [of_machine([run for run in runs if run.entries], drawn) for runs in machines]
    title, body = INTRODUCTION.strip().split("\n\n## ", 1)
    body = "\n\n".join([f"## {body}", *(sections or ["No result is recorded."]), every_run(machines)])
    return f"{title}\n\n{contents(body)}\n\n{body}\n"


def contents(body: str) -> str:
    """A line for each heading, behind it those below it; the anchors are GitHub's."""
    lines, taken = ["## Contents", ""], Counter(["contents"])
    for marks, heading in re.findall(r"^(###?) (.*)$", body, re.MULTILINE):
        anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        link = f"[{heading}](#{anchor}{f'-{taken[anchor]}' if taken[anchor] else ''})"
        taken[anchor] += 1
        if marks == "##":
            lines.append(f"- {link}")
        else:
            lines[-1] += (", " if "): [" in lines[-1] else ": ") + link
    return "\n".join(lines)


def of_machine(runs: list[Run], drawn: dict[Path, set[str]]) -> str:
    """The newest measurements of a machine: by table, each under the run that it comes from.

    Args:
        drawn: by file, the kinds of entries whose plot shows it.
    """
    machine, entries = runs[0].result["machine"], [entry for run in runs for entry in run.entries]
    blocks = [f"## {place_of(machine)}", f"{hardware(machine)}. Measured in:"]
    blocks.append("\n".join(
        f"- {source(run)}: " + " ".join([versions(run.result, run.entries), *warnings(run.path, run.result)])
        for run in runs
    ))  # fmt: skip
    blocks += [*absent([run.result for run in runs]), *notes(entries)]
    found: dict[str, list[str]] = {title: [] for title in tables.TITLES}
    for run in runs:
        for title, parts in illustrated(run.entries, drawn.get(run.path, set()), "images/{}.svg"):
            found[title] += [f"{source(run)}:", *parts]
    for title, parts in found.items():
        if parts:
            blocks += [f"### {title}", *([REMARKS[title]] if title in REMARKS else []), *parts]
    return "\n\n".join(blocks)


def source(run: Run) -> str:
    return f"[{day(run.result)}, commit {run.result['commit']}](../benchmarks/results/{run.path.name})"


def day(result: dict[str, Any]) -> str:
    return result["datetime"][:10]


def every_run(machines: list[list[Run]]) -> str:
    runs = sorted((run for runs in machines for run in runs), key=lambda run: run.result["datetime"], reverse=True)
    lines = [
        [f"[{run.path.name}](../benchmarks/results/{run.path.name})", day(run.result), run.result["commit"],
         place_of(run.result["machine"]), f"{len(run.entries)} of {len(run.result['entries'])}"]
        for run in runs
    ]  # fmt: skip
    return "\n\n".join([
        "## Every run",
        "What a later run on the same machine has repeated is not shown above; it stays in its file. The files say by "
        "which command each was recorded, with paths of the machine that it ran on; commands of older files no longer "
        "exist, and where a GPU's machine had no git, the commit was entered afterwards. `python -m objkern bench "
        "SUITE --record` repeats a table.",
        tables.table(["file", "date", "commit", "machine", "shown above"], lines),
    ])  # fmt: skip


def folder(path: Path, result: dict[str, Any], into: Path) -> Path:
    """One run as a folder that needs nothing else: report.md, and its plots as SVG and PNG. Returns the page."""
    drawn = plot.save(result["entries"], into)
    (into / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    text = section(path, result, {one.kind for one in drawn})
    page = into / "report.md"
    # What the words mean is said there, not here: the same text, whose links begin in another folder.
    reading = INTRODUCTION[INTRODUCTION.index("- **plain**") :].strip()
    reading = re.sub(r"\[([^]]*)\]\((\w[\w-]*\.md)\)", r"`docs/\2`", reading)
    page.write_text(f"# Benchmarks\n\n{text}\n\n# How to read this\n\n{reading}\n", encoding="utf-8")
    return page


def section(path: Path, result: dict[str, Any], drawn: set[str]) -> str:
    """One run, in a folder with its file and its plots."""
    machine, entries = result["machine"], result["entries"]
    blocks = [
        f"## {place_of(machine)}, {day(result)}",
        f"{hardware(machine)}; commit {result['commit']}, {versions(result, entries)}",
        f"`{command(result)}`, kept as [{path.name}]({path.name})",
        *absent([result]),
        *warnings(path, result),
        *notes(entries),
    ]
    for title, parts in illustrated(entries, drawn, "{}.png"):
        blocks += [f"### {title}", *([REMARKS[title]] if title in REMARKS else []), *parts]
    return "\n\n".join(blocks)


def place_of(machine: dict[str, Any]) -> str:
    regime = "glibc keeps its pages" if machine["keeps_pages"] else "the system's allocator as it is"
    return f"{machine['cpu']}, {machine['cores']} cores: {regime}"


def hardware(machine: dict[str, Any]) -> str:
    return (
        f"{machine['threads']} threads, {machine['capability']}, {machine['memory_gib']} GiB, {machine['system']}, "
        f"transparent huge pages: {machine['huge_pages']}; allocator: {machine['allocator']}"
    )


def versions(result: dict[str, Any], entries: list[Entry]) -> str:
    """What the run was made of, and the load before it."""
    machine = result["machine"]
    return (
        f"Python {machine['python']}, torch {machine['torch']}, objkern {machine['objkern']} "
        f"({machine['objkern_build']['cpu_capability']} kernels). Load average before the run: "
        f"{machine['load_before']:.2f}.{copy_bandwidth(entries)}"
    )


def absent(results: list[dict[str, Any]]) -> list[str]:
    found = {name: why for result in results for name, why in result.get("absent", {}).items()}
    text = "; ".join(f"{name}: {why}" for name, why in found.items())
    return [f"Other libraries that are absent: {text}."] if found else []


def warnings(path: Path, result: dict[str, Any]) -> list[str]:
    found = []
    if result.get("interrupted") or path.name in ENDED:
        found.append("**The run was interrupted: this is the part of it that had been measured.**")
    if result["machine"]["load_before"] > 1:
        found.append("**Other processes were busy when this run began; its times may be off.**")
    return found


def notes(entries: list[Entry]) -> list[str]:
    """What is to be known of the entries before their tables."""
    return [
        "\n".join([heading, "", *(f"- {line}" for line in lines)])
        for heading, lines in (
            ("Measured while other processes were busy:", disturbed(entries)),
            ("Too unsteady to conclude:", [line for entry in entries for line in unsteady(entry)]),
            ("Missed targets:", [line for entry in entries for line in missed(entry)]),
        )
        if lines
    ]


def illustrated(entries: list[Entry], drawn: set[str], image: str) -> Iterator[tuple[str, list[str]]]:
    """Title and blocks of every table.

    Args:
        drawn: the kinds of entries whose plot shows these.
        image: where the page has the plot of a name.
    """
    for title, table in tables.every(entries):
        parts = [
            f"![{title.lower()}]({image.format(one.name)})"
            for one in plot.PLOTS.values() if one.table == title and one.kind in drawn
        ]  # fmt: skip
        if title == "Time over size" and (lines := exponents(entries)):
            parts.append(lines)
        yield title, [*parts, table]


def copy_bandwidth(entries: list[Entry]) -> str:
    found = sorted(copy_gb_per_second(entry) for entry in entries if "copy" in entry.get("ratio", {}))
    return f" Copy bandwidth: {found[0]:.1f} to {found[-1]:.1f} GB/s, by shape." if found else ""


def command(result: dict[str, Any]) -> str:
    """What to type to run it again, with the allocator's settings."""
    settings = [word for word in result["machine"]["allocator"].split() if "=" in word]
    return " ".join([*settings, result["command"]])


def exponents(entries: list[Entry]) -> str:
    lines = [
        f"- {name}: " + ", ".join(f"{value:.2f} where {plot.SWEEPS[sweep]}" for sweep, value in found.items())
        for name, found in plot.slopes(entries).items() if found
    ]  # fmt: skip
    words = f"Fitted exponents (1 is linear) of the time over the number of logits, from {plot.LARGE:.0e} logits on:"
    return "\n".join([words, "", *lines]) if lines else ""


def plotted(files: list[tuple[Path, dict[str, Any]]]) -> dict[str, tuple[Path, list[Entry]]]:
    """By the kind of entries that a plot shows: the newest run that has them."""
    found: dict[str, tuple[Path, list[Entry]]] = {}
    for path, result in files:
        for one in plot.drawable(result["entries"]):
            found.setdefault(one.kind, (path, result["entries"]))
    return found


# ---- README's figure ------------------------------------------------------------------------------------------------

README = ROOT / "README.md"
BEGIN, END = "<!-- written by make docs from benchmarks/results -->\n", "<!-- end -->\n"


def headline(files: list[tuple[Path, dict[str, Any]]]) -> str:
    """Plain and regularized cross-entropy on logits of one shape, from the newest run that has both."""
    for path, result in files:
        found = {
            entry["workload"]: {who: seconds[1] * 1e3 for who, seconds in entry["seconds"].items()}
            for entry in tables.of_kind(result["entries"], "step")
            if (entry["rows"], entry["classes"], entry["dtype"]) == (1024, 32000, "float32")
        }
        machine = result["machine"]
        if {"plain", "regularized"} <= found.keys() and not machine["keeps_pages"] and "compiled" in found["plain"]:
            plain, regularized = found["plain"], found["regularized"]
            text = (
                f"On {machine['cores']} cores of an {machine['cpu'].partition(' (')[0]}, forward and backward of "
                f"1024 × 32000 float32 logits: cross-entropy takes {plain['objkern']:.0f} ms where eager torch takes "
                f"{plain['eager']:.0f} and `torch.compile` {plain['compiled']:.0f}; with label smoothing, z-loss, "
                f"entropy and logit L2 it takes {regularized['objkern']:.0f} ms, where eager torch takes "
                f"{regularized['eager']:.0f} and `torch.compile` {regularized['compiled']:.0f} "
                f"([measured](benchmarks/results/{path.name}), [all figures](docs/performance.md))."
            )
            return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n"
    return "No result is recorded.\n"


def readme(files: list[tuple[Path, dict[str, Any]]]) -> str:
    """README as it is, with the figure as it should be."""
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + headline(files) + END + rest.split(END, 1)[1]


def problems() -> list[str]:
    """Why page or plot are stale; empty if they are not."""
    files = results.load()
    current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    found = [] if page(files) == current else [f"{PAGE.name} is stale: run make docs"]
    if readme(files) != README.read_text(encoding="utf-8"):
        found.append(f"{README.name} is stale: run make docs")
    for kind, (_, entries) in plotted(files).items():
        if not plot.PLOTS[kind].is_current(entries):
            found.append(f"{plot.PLOTS[kind].path.name} is stale: run make docs")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/performance.md from benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="exit 1 if the page or its plot is stale")
    if parser.parse_args().check:
        found = problems()
        print("\n".join(found) or f"{PAGE.name} is up to date")
        return 1 if found else 0
    files = results.load()
    PAGE.write_text(page(files), encoding="utf-8")
    README.write_text(readme(files), encoding="utf-8")
    for kind, (_, entries) in plotted(files).items():
        plot.PLOTS[kind].path.write_text(plot.PLOTS[kind].draw(entries), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
