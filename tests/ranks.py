"""Processes that run functions as the ranks of a process group (gloo), started once for many tests.

    with Ranks(4) as ranks:
        ranks(function, *arguments)     [function(*arguments) of rank 0, of rank 1, ...]; an error there is one here

A function is one of a module's own; within it torch.distributed is initialised, and `group(2)` is that of the first two
ranks, or None on the others.
"""

from __future__ import annotations

import io
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

SECONDS = 120.0  # for a function, before its ranks are taken to hang


class Ranks:
    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, rank, count, self.folder.name), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send_bytes(_packed((function, arguments)))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(SECONDS):
                self.end()
                raise AssertionError(f"rank {rank} hangs in {function.__name__}")
            answers.append(_unpacked(pipe.recv_bytes()))
        for rank, (error, _) in enumerate(answers):
            if error is not None:
                raise AssertionError(f"rank {rank}: {error}")
        return [found for _, found in answers]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end()


def group(count: int) -> Any:
    """Of the first ranks; the same object every time."""
    return _groups[count]


_groups: dict[int, Any] = {}


def _work(pipe: Connection, rank: int, count: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{Path(folder) / 'meet'}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=60),
    )
    for size in range(1, count + 1):
        made = dist.new_group(list(range(size)))
        _groups[size] = made if rank < size else None
    while True:
        try:
            function, arguments = _unpacked(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = None, function(*arguments)
        except Exception:
            answer = traceback.format_exc(), None
        pipe.send_bytes(_packed(answer))


def _packed(value: Any) -> bytes:
    """Tensors by their numbers: the usual way would share memory, which ends with the process."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)
