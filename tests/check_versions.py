"""objkern builds and passes its quick tests with other torches and Pythons: `make check-versions`.

    python -m tests.check_versions [--python PATH ...] [--torch VERSION ...] [--every-pair] [--keep]

Torches: the oldest that pyproject.toml takes, the one of constraints.txt, and the newest that pip gives here. Pythons:
those of PYTHONS on PATH and in pyenv's folder, or those that are named. Each torch is tried with this Python, and each
Python with the torch of constraints.txt; `--every-pair` tries all. For each pair a fresh environment and a copy of the
sources in build/versions: pip installs torch, the CPU kernels are built, and TESTS run. Minutes and gigabytes each.

What ran, what passed, and what could not be had goes to the screen and to tests/results/versions-DATE.json.

Exit status: 0 what could be had passes; 1 something does not; 77 nothing could be had.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from benchmarks import machine

from .check_oldest_torch import NOT_CHECKED, oldest_torch
from .faults import ROOT

RESULTS = Path(__file__).parent / "results"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NEWEST = "newest"
# What depends on torch's version: the ops and their derivatives, the short way to them, compilation, torch's own calls.
TESTS = [
    f"tests/test_{name}.py" for name in ("terms", "default_call", "functional", "elementwise", "penalties", "torch")
]
TOOLS = ["numpy", "setuptools>=77", "wheel", "ninja", "pytest", "expecttest", "hypothesis"]
SOURCES = [
    "csrc",
    "objkern",
    "tests",
    "setup.py",
    "build_cuda.py",
    "build_sbom.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
]
BUILD = {"OBJKERN_CUDA": "0", "OBJKERN_CPU_CAPABILITIES": "default,avx2"}
LIMIT = 3600  # seconds of one step


def pinned_torch() -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.removeprefix("torch==") for line in lines if line.startswith("torch=="))


def version_of(python: str) -> str | None:
    """Major and minor version, or None where it does not run."""
    code = "import sys; print('.'.join(map(str, sys.version_info[:2])))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def interpreters() -> dict[str, str]:
    """Of each version of PYTHONS one: this one, that on PATH, or pyenv's newest."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for version in PYTHONS:
        places = [sys.executable] if version == version_of(sys.executable) else []
        places += filter(None, [shutil.which(f"python{version}")])
        places += sorted(map(str, pyenv.glob(f"{version}.*/bin/python")), reverse=True)
        place = next((place for place in places if version_of(place) == version), None)
        if place is not None:
            found[version] = place
    return found


def pairs(pythons: list[str], torches: list[str], every: bool) -> list[tuple[str, str]]:
    here, pinned = version_of(sys.executable), pinned_torch()
    return [
        (python, torch)
        for python in pythons
        for torch in torches
        if every or python == here or torch == pinned or here not in pythons or pinned not in torches
    ]


class StepFailed(Exception):  # noqa: N818  an outcome, not an error
    """A step of a pair, with the end of what it printed."""


def step(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT, **options
        )
    except subprocess.TimeoutExpired as late:
        raise StepFailed(f"took more than {LIMIT} s") from late
    if done.returncode:
        raise StepFailed(done.stdout.strip()[-3000:])
    return done


def counts(report: Path) -> dict[str, int]:
    suite = ET.parse(report).getroot().find("testsuite")
    total, failed, skipped = (
        sum(int(suite.get(name)) for name in names) for names in (["tests"], ["failures", "errors"], ["skipped"])
    )
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}


def check(interpreter: str, torch: str, folder: Path) -> dict[str, Any]:
    """One pair: its outcome, and how far it came."""
    found: dict[str, Any] = {"outcome": "could not be had"}
    python = str(folder / "venv/bin/python")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | BUILD
    source = folder / "objkern-source"
    try:
        step([interpreter, "-m", "venv", str(folder / "venv")])
        requirement = "torch" if torch == NEWEST else f"torch=={torch}"
        step([python, "-m", "pip", "install", "-q", "--prefer-binary", requirement, *TOOLS])
        # A torch that is installed and cannot be imported could not be had either.
        found["torch"] = step([python, "-c", "import torch; print(torch.__version__)"]).stdout.split()[-1]
        for name in SOURCES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
            else:
                source.mkdir(exist_ok=True)
                shutil.copy(ROOT / name, source)
        found["outcome"] = "does not build"
        start = time.perf_counter()
        step([python, "setup.py", "-q", "build_ext", "--inplace"], cwd=source, env=environment)
        found |= {"outcome": "fails", "build_seconds": round(time.perf_counter() - start)}
        start, report = time.perf_counter(), folder / "report.xml"
        tests = [python, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS]
        done = subprocess.run(tests, cwd=source, env=environment, capture_output=True, text=True, timeout=LIMIT)
        found |= counts(report) | {"test_seconds": round(time.perf_counter() - start)}
        if done.returncode == 0:
            found["outcome"] = "passes"
        else:
            said = done.stdout.replace(str(folder), "").splitlines()
            found["why"] = "\n".join(line for line in said if line.startswith(("FAILED", "E   ")))[-6000:]
    except (StepFailed, subprocess.TimeoutExpired) as failure:
        lines = str(failure).replace(str(ROOT), "").splitlines()
        found["why"] = lines[-1] if found["outcome"] == "could not be had" else "\n".join(lines)
    return found


def table(results: list[dict[str, Any]]) -> str:
    lines = ["| Python | torch | outcome | tests passed | failed | skipped |", "| --- | --- | --- | --- | --- | --- |"]
    for r in results:
        numbers = " | ".join(str(r.get(name, "")) for name in ("passed", "failed", "skipped"))
        lines.append(f"| {r['python']} | {r['torch']} | {r['outcome']} | {numbers} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.check_versions", description=__doc__.partition("\n")[0])
    parser.add_argument("--python", action="append", help="an interpreter; several times for several")
    parser.add_argument("--torch", action="append", help=f'a version, or "{NEWEST}"; several times for several')
    parser.add_argument("--every-pair", action="store_true", help="every Python with every torch")
    parser.add_argument(
        "--keep", action="store_true", help="keep the environments in build/versions, also of what passes"
    )
    options = parser.parse_args(arguments)
    named = {version_of(python) or python: python for python in options.python or ()} or interpreters()
    missing = [] if options.python else [version for version in PYTHONS if version not in named]
    torches = options.torch or [oldest_torch(), pinned_torch(), NEWEST]
    results = []
    for python, torch in pairs(list(named), torches, options.every_pair):
        print(f"Python {python}, torch {torch}:", end=" ", flush=True)
        parent = ROOT / "build/versions"
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"python{python}-torch{torch}-", dir=parent))
        results.append({"python": python, "torch": torch} | check(named[python], torch, folder))
        print(results[-1]["outcome"], results[-1].get("why", ""), flush=True)
        if options.keep or results[-1]["outcome"] in ("does not build", "fails"):
            print(f"its environment is in {folder.relative_to(ROOT)}", flush=True)
        else:
            shutil.rmtree(folder)
    results += [
        {"python": version, "torch": pinned_torch(), "outcome": "could not be had", "why": "no such interpreter"}
        for version in missing
    ]
    now = datetime.datetime.now(datetime.timezone.utc)
    result = {"datetime": now.isoformat(timespec="seconds"), "commit": machine.commit(), "machine": machine.describe()}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"versions-{now:%Y-%m-%d-%H%M%S}.json"
    path.write_text(json.dumps(result | {"tests": TESTS, "results": results}, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    print(f"results: {path.relative_to(ROOT)}")
    outcomes = {r["outcome"] for r in results}
    return NOT_CHECKED if outcomes <= {"could not be had"} else int(bool(outcomes & {"fails", "does not build"}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
