"""tests/gpu, every file and backend in a process of its own: what a kernel breaks on the device breaks no other's.

OBJKERN_GPU_FILES=labels,large    these files only (names without test_ and .py)
OBJKERN_GPU_TESTS=cuda:triton     these backends only
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

from .run import LOGS, ROOT
from .sanitizer import ends
from .step import Entry, Step, main

BACKENDS = ("cuda", "triton", "reference")
FILES = "OBJKERN_GPU_FILES"
TESTS = "OBJKERN_GPU_TESTS"
COMPILES = ("triton",)  # for most of the time, on one core: each test function has a process of its own
ALONE = ("test_large.py",)  # want the device's memory to themselves
FIRST = (
    "test_compile.py",
    "test_precision.py",
    "test_autograd.py",
    "test_demo.py",
)  # the longest, so that nobody waits for them
ENDED = "ended the process, or was ended"
OUTCOME = re.compile(r"^(?:tests/gpu/)?(\w+\.py::.+?) (PASSED|FAILED|SKIPPED|ERROR)\b", re.MULTILINE)
STARTED = re.compile(r"^(?:tests/gpu/)?(\w+\.py::test_\w+)(\[.*\])?")
REASON = re.compile(r"^(?:FAILED|ERROR) (?:tests/gpu/)?(\S+\.py::.+?) - (.*)$", re.MULTILINE)


def files() -> list[str]:
    chosen = os.environ.get(FILES, "").split(",")
    found = sorted(path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py"))
    found = [name for name in found if chosen == [""] or name[5:-3] in chosen]
    return sorted(found, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def functions(file: str) -> list[str]:
    return re.findall(r"^def (test_\w+)", (ROOT / "tests" / "gpu" / file).read_text(encoding="utf-8"), re.MULTILINE)


def test(file: str, function: str | None, device: str, backend: str, quick: bool, limit: float) -> Entry:
    """One file's tests, or one function's of it."""
    name = f"{file}::{function}" if function else file
    command = [sys.executable, "-m", "pytest", f"tests/gpu/{name}", "-vv", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-k", "plain_cross_entropy and (9 or 33) or labels or (any_strides and 9)"] if quick else []
    environment = os.environ | {TESTS: f"{device}:{backend}", "PYTHONUNBUFFERED": "1"}
    begin = monotonic()
    LOGS.mkdir(parents=True, exist_ok=True)
    # What was printed stays, whatever ends the process. A cache of its own: others may clear the shared one.
    with (
        (LOGS / f"{'-'.join(filter(None, [Path(file).stem, function, backend]))}.log").open(
            "w+", encoding="utf-8"
        ) as log,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache,
    ):
        environment["TORCHINDUCTOR_CACHE_DIR"] = cache
        try:
            code: int | str = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            code = "timeout"
        log.seek(0)
        output = log.read()
    entry = {"kind": "tests", "file": file, "backend": backend, "seconds": monotonic() - begin, "exit": code}
    done = code in (0, 1, 5)  # 5: nothing was collected, for no test there concerns the backend
    found = outcomes(output.partition("Fatal Python error")[0], ended=not done)
    return entry | {"tests": found} | ({} if done else {"tail": ends(output)})


def outcomes(output: str, ended: bool = False) -> dict[str, Entry]:
    """By test function: how many of its cases passed, failed and were skipped, and the first failures' messages.

    Args:
        ended: before its time, by a fault or a limit: then the test that was running failed.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for name, outcome in OUTCOME.findall(output):
        counts[name.partition("[")[0]][outcome.lower().replace("error", "failed")] += 1
    found: dict[str, Entry] = {name: dict(count) for name, count in counts.items()}
    last = output.rstrip().splitlines()[-1:] if ended else []
    if last and (started := STARTED.match(last[0])) and not OUTCOME.match(last[0]):
        entry = found.setdefault(started[1], {})
        entry["failed"] = entry.get("failed", 0) + 1
        entry["messages"] = [f"{started[0].removeprefix('tests/gpu/')}: {ENDED}"]
    for name, message in REASON.findall(output):
        entry = found.setdefault(name.partition("[")[0], {"failed": 1})
        if len(entry.setdefault("messages", [])) < 5:
            entry["messages"].append(f"{name}: {message}"[:300])
    return found


def run(step: Step) -> int:
    device, _, names = os.environ.get(TESTS, "cpu:cpu" if step.stand_in else f"cuda:{','.join(BACKENDS)}").partition(
        ":"
    )
    # By backend: Triton compiles for long, and what a time limit cuts off is at the end.
    jobs = [
        (file, function, backend)
        for backend in names.split(",")
        for file in files()
        for function in (functions(file) if backend in COMPILES and file not in ALONE else [None])
    ]
    failed = 0

    def go(job: tuple[str, str | None, str]) -> int:
        file, function, backend = job
        entry = test(file, function, device, backend, step.quick, max(5.0, step.left))
        step.record(entry)
        return entry["exit"] not in (0, 5)

    with ThreadPoolExecutor(max(1, min(12, 3 * (os.cpu_count() or 2) // 4))) as executor:
        failed += sum(executor.map(go, [job for job in jobs if job[0] not in ALONE]))
    failed += sum(go(job) for job in jobs if job[0] in ALONE)
    return min(failed, 100)


if __name__ == "__main__":
    main(run)
