"""The benchmarks' command line: python -m objkern bench.

bench [SUITE ...] --size quick     run, and leave tables and plots in runs/bench/
bench compare A.json B.json        what became slower from one run to the other
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import os
import shutil
import sys
from pathlib import Path

from . import compare, results
from .suites import SUITES

ROOT = Path(__file__).parent.parent


def parser() -> argparse.ArgumentParser:
    suites = "\n".join(f"  {name:15}{suite.what}" for name, suite in SUITES.items())
    found = argparse.ArgumentParser(
        prog="python -m objkern bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compare objkern with eager torch, torch.compile and other libraries on this machine: every\n"
        "contestant is held against float64 before it is timed, and they take turns.",
        epilog=f"suites (without: all of them):\n{suites}\n\nbench compare A.json B.json: what became slower from A to "
        "B; bench compare --help\nOther options are pytest's: -k 1024x32000 runs what has this in its name.",
    )
    found.add_argument("suites", nargs="*", metavar="SUITE", help="what to run; see below")
    found.add_argument("--size", choices=("quick", "full"), default="full",
                       help="quick: about two minutes on two cores; full: more than an hour (default)")  # fmt: skip
    found.add_argument("--seconds", type=float, help="for the rounds of each benchmark (quick: 2, full: 10)")
    found.add_argument("--rounds", type=int, help="so many rounds, in the place of seconds")
    found.add_argument("--slack", type=float, metavar="SHARE", help="by which a target may be missed (0)")
    found.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it needs a C++ compiler)")
    found.add_argument("--out", type=Path, metavar="DIR", help="folder for results, tables and plots (runs/bench/TIME)")
    found.add_argument("--record", action="store_true",
                       help="also keep the results in benchmarks/results, which the docs are made from")  # fmt: skip
    return found


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["compare"]:
        return compare.main(arguments[1:])
    options, rest = parser().parse_known_args(arguments)
    for name in options.suites:
        if name not in SUITES:
            parser().error(f"SUITE: expected some of {', '.join(SUITES)} but got {name!r}")
    if options.seconds is not None and not 0.0 < options.seconds < math.inf:
        parser().error(f"--seconds: expected a positive number but got {options.seconds}")
    if options.rounds is not None and options.rounds < 1:
        parser().error(f"--rounds: expected a positive number but got {options.rounds}")
    if options.slack is not None and not 0.0 <= options.slack < math.inf:
        parser().error(f"--slack: expected a number of at least 0 but got {options.slack}")
    import pytest

    now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    folder = (options.out or ROOT / "runs" / "bench" / now).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser().error(f"--out: {folder} cannot be made: {error.strerror}")
    path = folder / "results.json"
    if path.exists():
        parser().error(f"--out: {path} exists already; results are never overwritten")
    files = [f"benchmarks/{file}" for name in options.suites or SUITES for file in SUITES[name].files]
    words = ["-q", "--size", options.size, "--record", str(path), *rest]
    for name, value in (("--seconds", options.seconds), ("--rounds", options.rounds), ("--slack", options.slack)):
        words += [name, str(value)] if value is not None else []
    words += ["--no-compile"] if options.no_compile else []
    os.chdir(ROOT)
    status = int(pytest.main([*files, *words]))
    if path.exists():
        report(path, folder, options.record)
    else:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()
        if status == pytest.ExitCode.NO_TESTS_COLLECTED:
            print(
                "nothing was measured: no benchmark of these suites and this size has that in its name", file=sys.stderr
            )
    return 2 if status == pytest.ExitCode.USAGE_ERROR else status


def report(path: Path, folder: Path, keep: bool) -> None:
    from . import report

    result = results.read(path)
    try:
        print(f"tables and plots: {shown(report.folder(path, result, folder))}")
    except ImportError as error:
        print(f"no plots and no page: {error} (pip install matplotlib)")
    if keep:
        kept = results.path(result)
        shutil.copyfile(path, kept)
        print(f"kept as {shown(kept)}; make docs brings docs/performance.md up to date")


def shown(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
