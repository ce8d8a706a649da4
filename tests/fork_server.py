"""Runs of pytest in children of a process that has imported torch and transformers already, so that each starts at once.

A request is a line of JSON on the standard input, its answer one on the standard output: `Server.run` sends and reads
them. What is under test is imported in the children alone; whatever they leave running is killed with them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

TIMED_OUT = 124


class Server:
    """Of one environment, for one caller at a time."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self, folder: Path, arguments: Sequence[str], environment: Mapping[str, str], limit: float
    ) -> tuple[int, str]:
        """pytest's status (that of a signal is negative) and what it said; after `limit` seconds TIMED_OUT and ""."""
        request = {
            "folder": str(folder),
            "arguments": list(arguments),
            "environment": dict(environment),
            "limit": limit,
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that forks tests ended with status {self.process.wait()}")
        found = json.loads(answer)
        return found["status"], found["output"]

    def close(self) -> None:
        self.process.communicate()  # which closes its input


def child(request: dict, output: int) -> None:
    import pytest

    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((nothing, output, output)):
        os.dup2(file, number)
    os.environ.update(request["environment"])
    tempfile.tempdir = None  # it is looked up again
    os.chdir(request["folder"])
    sys.path[0] = request["folder"]  # as `python -m pytest` has it
    status = 70
    try:
        # What is imported already is not rewritten for assertions, which pytest says of each plugin.
        options = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        status = int(pytest.main([*options, *request["arguments"]]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    import torch._dynamo
    import torch._inductor.compile_fx
    import torch.testing._internal.optests  # noqa: F401
    import transformers  # noqa: F401

    answers, caller = os.fdopen(os.dup(1), "w"), os.getppid()
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as file:
            process = os.fork()
            if process == 0:
                child(request, file.fileno())
            end = time.monotonic() + request["limit"]
            # Until it ends, it is too late, or nobody waits for it any more.
            while (
                (ended := os.waitpid(process, os.WNOHANG)) == (0, 0)
                and time.monotonic() < end
                and os.getppid() == caller
            ):
                time.sleep(0.02)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            late = ended == (0, 0)
            if late:
                os.waitpid(process, 0)
            status = TIMED_OUT if late else os.waitstatus_to_exitcode(ended[1])
            file.seek(0)
            output = "" if late else file.read().decode(errors="replace")
        answers.write(json.dumps({"status": status, "output": output}) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
