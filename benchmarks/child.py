"""objkern in a process of its own, which takes turns with others.

The instruction set is chosen once per process, so a comparison of two needs two processes. Only one of them may run
at a time, or they would share the cores: the parent asks the children in turn, over a pipe, to run a step, and each
answers with the seconds that it took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pairing import Step

ROOT = Path(__file__).parent.parent


class Child:
    """The parent's end.

    Args:
        capability: "default", "avx2" or "avx512"; what the child really runs is ``self.capability``, None if this
            build or this processor has no such kernels.
    """

    def __init__(self, capability: str) -> None:
        environment = os.environ | {"OBJKERN_CPU_CAPABILITY": capability}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.child"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.capability: str | None = self._answer()

    def prepare(self, shape: str, workload: str) -> None:
        self._ask(f"prepare {shape} {workload}")

    def run(self) -> float:
        """Seconds of one step, after untimed ones."""
        return self._ask("run")

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()

    def _ask(self, request: str) -> float | None:
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> float | str | None:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the child process ended with status {self.process.wait()}; see its message above")
        return json.loads(line)


def main() -> None:
    """The child's end: one line in, one line of JSON out."""
    from objkern import _C

    from .contest import step
    from .workloads import SHAPES, WORKLOADS

    capability = _C.build_info()["cpu_capability"]
    answer("default" if capability == "baseline" else capability)
    shapes = {str(shape): shape for shape in SHAPES}
    run = None
    for line in sys.stdin:
        match line.split():
            case ["prepare", shape, workload]:
                run = None  # before the next logits are made
                chosen = shapes[shape]
                run = settled(step(WORKLOADS[workload].objective, chosen.inputs(), chosen.steps))
                answer(None)
            case ["run"]:
                answer(run())
            case _:
                raise ValueError(f'expected "prepare SHAPE WORKLOAD" or "run" but got {line!r}')


def settled(run: Step) -> Step:
    """The step after so much untimed work that the others' threads, which spin for a while, have gone to sleep."""

    def after_a_while() -> float:
        begin = perf_counter()
        while perf_counter() - begin < 0.015:
            run()
        return run()

    return after_a_while


def answer(value: float | str | None) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
