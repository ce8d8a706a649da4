"""compute-sanitizer over every kernel of both backends: out-of-bounds accesses, races, uninitialised reads, barriers.

Each tensor gets an allocation of its own (PYTORCH_NO_CUDA_MEMORY_CACHING), or an access past its end would land in
another tensor and pass unseen.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from time import monotonic

from .contest import able
from .facts import tool
from .step import Entry, Step, main

ROOT = Path(__file__).parent.parent.parent
PRETENCE = (
    "import subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode;"
    "print('========= ERROR SUMMARY: 0 errors'); sys.exit(code)"
)
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def check(sanitizer: list[str], name: str, device: str, backend: str, quick: bool, limit: float) -> Entry:
    program = [sys.executable, "-m", "benchmarks.gpu.every_kernel", device, backend, *(["quick"] if quick else [])]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    entry: Entry = {"kind": "sanitizer", "tool": name, "backend": backend}
    begin = monotonic()
    try:
        done = subprocess.run(
            [*sanitizer, *program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired as expired:
        return entry | {"status": "timeout", "seconds": limit, "tail": ends(expired.stdout)}
    return entry | verdict(done.returncode, done.stdout + done.stderr) | {"seconds": monotonic() - begin}


def verdict(returncode: int, output: str) -> Entry:
    """From compute-sanitizer's own summary line; without one it did not run to its end."""
    summary = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", output)
    calls = re.search(r"(\d+) calls of", output)
    if "Device not supported" in output or "not supported on" in output:
        return {"status": "unsupported", "tail": ends(output)}
    if not summary or calls is None:
        return {"status": "failed", "returncode": returncode, "tail": ends(output)}
    errors = sum(int(a or b) for a, b in summary)
    status = "errors" if errors else "clean" if returncode == 0 else "failed"  # in the end, at its own exit
    found: Entry = {"status": status, "errors": errors, "calls": int(calls[1])}
    return found | ({} if status == "clean" else {"returncode": returncode, "tail": ends(output)})


def ends(output: str | bytes | None, lines: int = 30) -> str:
    """The first reports, which name the place, and the last lines."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    found = text.strip().splitlines()
    return "\n".join(found if len(found) <= 2 * lines else [*found[:lines], "...", *found[-lines:]])


def run(step: Step) -> int:
    device = step.device()
    path = tool("compute-sanitizer")
    if step.stand_in:  # the program alone, and the reading of a made-up summary
        commands = {"memcheck": [sys.executable, "-c", PRETENCE]}
    elif path is None:
        step.record({"kind": "absent", "why": "compute-sanitizer is neither on PATH nor in CUDA_HOME"})
        return 0
    else:
        commands = {
            name: [path, "--tool", name, "--error-exitcode", "9", "--print-limit", "20"] for name in TOOLS
        }  # fmt: skip
        # Launch plans that do not fit are refused by the driver, and that is no bad access.
        commands["memcheck"] += ["--report-api-errors", "no"]
    runs = [
        (command, name, backend)
        for name, command in commands.items()
        for label, backend in device.backends.items()
        if able(device)[label] is None
    ]
    if not runs:
        step.record({"kind": "absent", "why": "no native backend can run here"})
    failed = 0
    with ThreadPoolExecutor(max(1, len(runs))) as executor:
        jobs = [
            executor.submit(check, command, name, device.name, backend, step.quick, step.left)
            for command, name, backend in runs
        ]
        for job in as_completed(jobs):
            entry = job.result()
            step.record(entry)
            failed += entry["status"] not in ("clean", "unsupported")
    return failed


if __name__ == "__main__":
    main(run)
