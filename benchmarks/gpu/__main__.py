"""The command: python -m benchmarks.gpu"""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import sys
import warnings
from pathlib import Path

from .. import machine
from ..results import RESULTS
from . import wheels
from .run import STEPS, Run, say, write

SCHEMA = 1


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if not arguments.stand_in and (why := no_device()) is not None:
        print(f"There is no CUDA device here: {why}. Nothing was built, tested or measured.")
        return 0
    chosen = [step for step in STEPS if step.name == "facts" or step.name in (arguments.only or names())]
    chosen = [step for step in chosen if step.name not in arguments.skip]
    brought = wheels.importable(arguments.wheels) if arguments.wheels else []
    header = {
        "schema": SCHEMA,
        "kind": "gpu",
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)]),
        "commit": arguments.commit or machine.commit(),
        "stand_in": arguments.stand_in,
        "wheels": brought,
    }
    say(f"{len(chosen)} steps, about {sum(step.about for step in chosen):.0f} s, at most {arguments.budget:.0f}")
    run = Run(header, None, arguments.budget, arguments.quick, arguments.stand_in)
    run.steps(chosen[:1])  # the facts, whose device names the file
    run.path = fresh(arguments.out, str(run.facts.get("device", "unknown device")), header["datetime"][:10])
    write(run.path, run.result)
    run.steps(chosen[1:])

    from . import summary

    print(f"\n{summary.every(run.result)}\n")
    say(f"written to {run.path}; in benchmarks/results it is read by make docs")
    return 1 if summary.failed(run.result) else 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Build, test, check and measure on a CUDA device; one JSON file. No setting of the device changes.",
        epilog="Steps: " + "; ".join(f"{step.name} (about {step.about:.0f} s): {step.what}" for step in STEPS),
    )
    found.add_argument("--only", action="append", choices=names(), metavar="STEP", help="this step; may be repeated")
    found.add_argument("--skip", action="append", choices=names(), default=[], metavar="STEP", help="not this step")
    found.add_argument("--quick", action="store_true", help="few shapes and repetitions: does everything run?")
    found.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the file (%(default)s)")
    found.add_argument(
        "--wheels",
        type=Path,
        metavar="DIR",
        help="folder of other libraries' wheels (Liger-Kernel, ...), to take part without being installed",
    )
    found.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="for everything (%(default)s)")
    found.add_argument("--commit", help="to be recorded, where git cannot be asked")
    found.add_argument("--stand-in", action="store_true", help=argparse.SUPPRESS)  # a dry run on the CPU
    return found


def names() -> list[str]:
    return [step.name for step in STEPS]


def no_device() -> str | None:
    """Why there is none; None if there is one."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available() and torch.version.cuda:
            return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return str(caught[0].message).splitlines()[0] if caught else "torch sees none"


def fresh(folder: Path, device: str, date: str) -> Path:
    """Named by device and date; a second one of a day has a number."""
    name = "gpu-" + re.sub(r"[^a-z0-9]+", "-", f"{device} {date}".lower()).strip("-")
    paths = [folder / f"{name}{suffix}.json" for suffix in ("", *(f"-{n}" for n in range(2, 100)))]
    return next(path for path in paths if not path.exists())


if __name__ == "__main__":
    sys.exit(main())
