"""How well `bench compare` tells a slower kernel from a noisy machine, by runs of the same code and runs held up.

python -m benchmarks.tries 20 --slowed 0.1    # about half an hour: runs of the suite watch, one held up after each
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from . import compare, results
from .memory import ROOT
from .switches import SLOWED
from .tables import table


def run(folder: Path, slowed: float = 0.0) -> Path:
    environment = os.environ | {SLOWED: str(slowed)}
    command = [sys.executable, "-m", "objkern", "bench", "watch", "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return folder / "results.json"


def slower(before: Path, after: Path) -> list[str]:
    changes = compare.changes_of(results.read(before)["entries"], results.read(after)["entries"])
    return [change.where for change in changes if change.slower]


def main() -> None:
    found = argparse.ArgumentParser(prog="python -m benchmarks.tries")
    found.add_argument("tries", type=int)
    found.add_argument("--slowed", type=float, default=0.1)
    options = found.parse_args()
    alarms = flagged = 0
    of_kernels: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = run(folder / "0")
        kernels = [compare.label(entry).partition(", ")[2] for entry in results.read(before)["entries"]]
        for number in range(1, options.tries + 1):
            same, held_up = run(folder / f"{number}"), run(folder / f"{number}-slowed", options.slowed)
            alarms += bool(slower(before, same))
            names = slower(before, held_up)
            flagged += bool(names)
            of_kernels.update(names)
            before = same
            print(f"try {number}: {alarms} false alarms, {flagged} of the slowed found", flush=True)
    print(table(["kernel", "found slower"], [[name, f"{of_kernels[name]} of {options.tries}"] for name in kernels]))


if __name__ == "__main__":
    main()
