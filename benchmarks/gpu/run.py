"""Steps as processes: each with its own time limit, log and entry in the results, which are written after every one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from ..results import rounded

ROOT = Path(__file__).parent.parent.parent
LOGS = ROOT / "build" / "gpu"

Result = dict[str, Any]


@dataclass(frozen=True)
class Step:
    name: str
    what: str
    limit: float  # seconds after which it is ended
    about: float  # seconds that it is planned to take
    module: str | None = None  # of this package
    times: bool = True  # whether others at work on the device would spoil it


# In the order in which they run; neighbours that measure no times run side by side.
STEPS = [
    Step("facts", "device, driver, versions, clocks as found", 60, 10, "facts"),
    Step("build", "the extension, for the device's architecture", 240, 60),
    Step("tests", "tests/gpu, each file and backend by itself", 180, 120, "suite", times=False),
    Step("sanitizer", "compute-sanitizer over every kernel", 180, 60, "sanitizer", times=False),
    Step("ceilings", "copy bandwidth, matrix products", 40, 10, "ceilings"),
    Step("objectives", "large logits against eager, compiled, Liger-Kernel", 170, 75, "objectives"),
    Step("linear", "the fused linear path against everyone and the bare GEMMs", 80, 45, "linear"),
    Step("small", "small logits", 60, 30, "small"),
    Step("elementwise", "elementwise objectives, divergence, terms on parameters", 80, 35, "elementwise"),
    Step("finetune", "whole steps of a language model: tokens/s, memory, largest batch", 90, 45, "finetune"),
    Step("host", "what a call costs the host", 60, 30, "host"),
    Step("variants", "forward, gradient and fused apart", 45, 20, "variants"),
    Step("plans", "every way to launch, for the tables", 65, 40, "plans"),
]


def batches(steps: list[Step]) -> list[list[Step]]:
    """Steps that run one after the other, and within a batch side by side."""
    found: list[list[Step]] = []
    for step in steps:
        if found and not step.times and not found[-1][0].times:
            found[-1].append(step)
        else:
            found.append([step])
    return found


class Run:
    """The results so far, and where they are written.

    Args:
        seconds: for everything; what is not begun by then is not begun.
    """

    def __init__(self, header: Result, path: Path | None, seconds: float, quick: bool, stand_in: bool) -> None:
        self.result: Result = {**header, "steps": {}}
        self.path, self.quick, self.stand_in = path, quick, stand_in
        self.deadline = monotonic() + seconds
        self.lock = threading.Lock()

    def steps(self, chosen: list[Step]) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        for batch in batches(chosen):
            with ThreadPoolExecutor(len(batch)) as executor:
                list(executor.map(self.step, batch))

    def step(self, step: Step) -> None:
        left = self.deadline - monotonic()
        if left < 5:
            self._keep(step, {"status": "not run", "why": "the time for the whole run was spent", "entries": []})
            return
        limit = left if self.stand_in else min(step.limit, left)  # a dry run may be on a busy machine
        say(f"{step.name}: {step.what} (about {step.about:.0f} s, at most {limit:.0f})")
        lines = Path(tempfile.mkstemp(suffix=".jsonl")[1])
        command, environment = self._command(step, lines, limit)
        begin = monotonic()
        log = LOGS / f"{step.name}.log"
        code = limited(command, environment, log, limit) if command else 0
        entries = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if complete(line)]
        lines.unlink()
        found: Result = {"status": status(code, entries), "seconds": monotonic() - begin, "limit": limit}
        if code not in (0, None) and command:
            found |= {"exit": code, "tail": tail(log)}
        self._keep(step, found | {"entries": entries})
        say(f"{step.name}: {found['status']} after {found['seconds']:.0f} s; log: {log.relative_to(ROOT)}")

    def _command(self, step: Step, lines: Path, limit: float) -> tuple[list[str], dict[str, str]]:
        environment = dict(os.environ)
        if step.module is None:
            if self.stand_in:
                return [], environment  # a dry run takes what is built
            environment["OBJKERN_CUDA"] = environment.get("OBJKERN_CUDA", "1")
            if (capability := self.facts.get("capability")) and not environment.get("TORCH_CUDA_ARCH_LIST"):
                environment["TORCH_CUDA_ARCH_LIST"] = capability
            return [sys.executable, "setup.py", "build_ext", "--inplace"], environment
        aim = limit - 5 if not step.times else min(step.about, limit - 5)
        command = [sys.executable, "-m", f"benchmarks.gpu.{step.module}", "--lines", str(lines), "--seconds", str(aim)]
        command += ["--quick"] if self.quick else []
        return command + (["--stand-in"] if self.stand_in else []), environment | {"PYTHONUNBUFFERED": "1"}

    @property
    def facts(self) -> Result:
        entries = self.result["steps"].get("facts", {}).get("entries", [])
        return entries[0] if entries else {}

    def _keep(self, step: Step, found: Result) -> None:
        with self.lock:
            self.result["steps"][step.name] = found
            if self.path is not None:
                write(self.path, self.result)


def limited(command: list[str], environment: dict[str, str], log: Path, limit: float) -> int | str:
    """The exit status, or "timeout": then the process and all that it started are ended."""
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=5)
            return "timeout"


def status(code: int | str, entries: list[Result]) -> str:
    if code == "timeout":
        return "timeout"
    if any(entry["kind"] == "absent" for entry in entries):
        return "absent"
    return "ok" if code == 0 else "failed"


def complete(line: str) -> bool:
    """Whether a line was written to its end before its process was ended."""
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def tail(log: Path, count: int = 40) -> list[str]:
    return [line[:300] for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]]


def write(path: Path, result: Result) -> None:
    """An entry a line, so that a diff shows which ones changed; by way of a second file, so that it is always whole."""
    steps = []
    for name, step in rounded(result["steps"]).items():
        head = json.dumps({key: value for key, value in step.items() if key != "entries"})
        entries = ",\n".join("   " + json.dumps(entry, separators=(",", ":")) for entry in step["entries"])
        steps.append(f'  {json.dumps(name)}: {head[:-1]}, "entries": [\n{entries}\n  ]}}')
    top = json.dumps({key: value for key, value in rounded(result).items() if key != "steps"}, indent=1)
    text = f'{top[:-1].rstrip()},\n "steps": {{\n' + ",\n".join(steps) + "\n }\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def say(what: str) -> None:
    print(f"==> {what}", flush=True)
