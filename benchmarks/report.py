"""Writes docs/performance.md from the files in benchmarks/results; no figure on the page has another source.

python benchmarks/report.py           # write the page
python benchmarks/report.py --check   # exit 1 if it is stale
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"

INTRODUCTION = """\
# Performance

Forward and backward pass of an objective on logits, objkern against eager torch on the same CPU. Written by
`make docs` from the files in `benchmarks/results`; `make bench` measures anew.

## What is compared

- **plain**: `CrossEntropy()` and `torch.nn.functional.cross_entropy`.
- **regularized**: `CrossEntropy(label_smoothing=0.1) + 1e-4*ZLoss() - 0.01*Entropy()`, and the same formula in eager
  torch, term by term, as training scripts have it (`eager_regularized` in `benchmarks/workloads.py`).
- For bfloat16 logits eager torch runs twice: on the logits as they are, and on `logits.float()`, which is slower and
  as accurate as objkern. objkern reads bfloat16 and computes in float32.
- Not compared: `torch.compile`, which fuses some of this too, and GPUs.

## How it is measured

- **In pairs.** Contestants take turns in one process, A B A B ..., and only times of the same round are divided. The
  tables give the median of these ratios and its 95 % confidence interval from order statistics, which assumes nothing
  about the distribution. Times are medians over the rounds.
- **A step** drops the old gradient (`logits.grad = None`), runs forward and runs backward. Before each timed step the
  same contestant takes an untimed one, as in training, where a loss follows itself.
- **The allocator** matters as much as the arithmetic. By default glibc hands large blocks back to the kernel when they
  are freed, and the next step pays for fresh pages: eager torch pays this for each of its intermediate tensors.
  objkern's gradient reuses its memory (`objkern.set_buffer_limit`): at most two freed gradients are kept, and at most
  an eighth of the machine's memory. With `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000` glibc keeps its
  pages too. Each section says which of the two it measured.
- **Bytes** are those that no implementation with the gradient in the backward pass can avoid: logits read twice,
  gradient written once. GB/s is their number over objkern's time. The machine's copy bandwidth, reads and writes
  counted, between buffers that exist already, is measured in the same run. Shapes that fit into the caches can exceed
  it; tiny ones measure the cost of a call.
- **Right before fast.** Before it is timed, each contestant's loss and gradient are held against float64; objkern's
  error may be at most twice that of eager torch, plus the rounding of the result.
- Logits are N(0, 3²) and labels random; neither side's work depends on them.

`make bench` fails if at V ≥ 32000 the median ratio is below 1 (plain) or 5 (regularized).
"""


def load() -> list[tuple[Path, dict[str, Any]]]:
    """The result files, newest first."""
    files = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in RESULTS.glob("*.json")]
    return sorted(files, key=lambda file: file[1]["datetime"], reverse=True)


def page() -> str:
    files = load()
    if not files:
        raise SystemExit(f"{RESULTS}: no result file")
    return "\n\n".join([INTRODUCTION.strip(), *(section(path, result) for path, result in files)]) + "\n"


def section(path: Path, result: dict[str, Any]) -> str:
    machine = result["machine_info"]
    entries = [entry["extra_info"] for entry in result["benchmarks"]]
    plain = [entry for entry in entries if entry["price"] is None]
    regularized = [entry for entry in entries if entry["price"] is not None]
    return "\n\n".join([
        f"## {machine['cpu']}, {machine['cores']} cores, {result['datetime'][:10]}: {machine['allocator']}",
        f"{machine['threads']} threads, {machine['capability']}, {machine['memory_gib']} GiB, {machine['system']}; "
        f"Python {machine['python']}, torch {machine['torch']}, objkern {machine['objkern']} "
        f"({machine['objkern_build']['cpu_capability']} kernels). Load average before the run: "
        f"{machine['load_before']:.2f}. Copy bandwidth: {entries[0]['copy_gb_per_second']:.1f} GB/s.",
        f"`{command(result)}`, kept as [{path.name}](../{path.relative_to(ROOT).as_posix()})",
        "### Plain cross-entropy",
        times(plain),
        "### Regularized",
        f"`{regularized[0]['objective']}`. The last column is what the regularizers cost: objkern's time over its own "
        "time for plain cross-entropy, paired in the same rounds.",
        times(regularized, price=True),
        "### Errors against float64",
        "Relative; of the gradient in the Euclidean norm.",
        errors(entries),
    ])  # fmt: skip


def command(result: dict[str, Any]) -> str:
    """What to type to run it again, with the allocator's settings."""
    settings = [word for word in result["machine_info"]["allocator"].split() if "=" in word]
    return " ".join([*settings, result["command"]])


def times(entries: list[dict[str, Any]], price: bool = False) -> str:
    header = ["logits", "from", "against", "its time", "objkern", "ratio", "GB/s", *(["price"] if price else [])]
    return table(header, [
        [
            logits(entry), entry["why"], rival, milliseconds(entry["seconds"][rival]["median"]),
            milliseconds(entry["seconds"]["objkern"]["median"]), interval(ratio), f"{entry['gb_per_second']:.1f}",
            *([interval(entry["price"])] if price else []),
        ]
        for entry in entries for rival, ratio in entry["speedup"].items()
    ])  # fmt: skip


def errors(entries: list[dict[str, Any]]) -> str:
    return table(["logits", "objective", "contestant", "loss", "gradient"], [
        [logits(entry), entry["workload"], name, f"{error['loss']:.0e}", f"{error['gradient']:.0e}"]
        for entry in entries for name, error in entry["errors"].items()
    ])  # fmt: skip


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def logits(entry: dict[str, Any]) -> str:
    return f"{entry['rows']} × {entry['classes']} {entry['dtype']}"


def milliseconds(seconds: float) -> str:
    """Three digits."""
    value = seconds * 1e3
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} ms"


def interval(ratio: dict[str, float]) -> str:
    return f"**{ratio['median']:.2f}** [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def problems() -> list[str]:
    """Why the page is stale; empty if it is not."""
    current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    return [] if page() == current else [f"{PAGE.name} is stale: run make docs"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/performance.md from benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is stale")
    if parser.parse_args().check:
        found = problems()
        print("\n".join(found) or f"{PAGE.name} is up to date")
        return 1 if found else 0
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
