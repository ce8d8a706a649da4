"""Before the first step: to build the extension, to import the package, to call a loss for the first time.

python -m objkern bench compile-time
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .contest import OURS, Record, contest, described
from .memory import ROOT, in_a_process
from .pairing import Step, summary


def importing(module: str) -> Step:
    """In a process of its own."""

    def run() -> float:
        begin = perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], cwd=ROOT, check=True)
        return perf_counter() - begin

    return run


def test_import(benchmark: BenchmarkFixture, record: Record, pytestconfig: pytest.Config) -> None:
    """objkern brings torch along: what it adds is the difference."""
    facts = {"kind": "import", "workload": "objkern", "targets": {"torch": 0.8}}
    timed = {"torch": importing("torch"), OURS: importing("objkern")}
    contest(benchmark, record, pytestconfig, timed, facts, warm=False)


@pytest.mark.quick
def test_first_calls(record: Record, pytestconfig: pytest.Config) -> None:
    """Of a regularized objective on 64 x 1000 logits, as objkern, eager torch and torch.compile have it."""
    if pytestconfig.getoption("--benchmark-disable"):
        pytest.skip("nothing is measured")
    rounds = 1 if pytestconfig.getoption("--size") == "quick" else 5
    found = [in_a_process("benchmarks.startup", "first-calls") for _ in range(rounds)]
    record(described("first call", 64, 1000, torch.float32, "regularized", rounds=rounds)
           | {"seconds": {name: summary([one[name] for one in found]) for name in found[0]}})  # fmt: skip


def test_build(tmp_path: Path, record: Record, pytestconfig: pytest.Config) -> None:
    """The extension without CUDA, from nothing, with as many jobs as there are cores."""
    if pytestconfig.getoption("--benchmark-disable"):
        pytest.skip("nothing is measured")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(tmp_path / "temp"),
               "--build-lib", str(tmp_path / "lib")]  # fmt: skip
    begin = perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OBJKERN_CUDA": "0"}, capture_output=True, text=True)
    seconds = perf_counter() - begin
    assert done.returncode == 0, done.stderr[-2000:]
    (library,) = (tmp_path / "lib").rglob("_C*.so")
    record({"kind": "build", "workload": "without CUDA", "seconds": {OURS: [seconds] * 3},
            "library_bytes": library.stat().st_size})  # fmt: skip
