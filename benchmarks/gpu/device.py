"""Time and memory on a CUDA device; and a stand-in on the CPU, on which everything else can be tried."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any, ClassVar, Protocol
from weakref import WeakKeyDictionary

import torch

Run = Callable[[], Any]


class Device(Protocol):
    name: str  # torch's
    backends: dict[str, str]  # what the tables call a backend -> what objkern calls it
    scale: int  # by which a stand-in divides numbers of rows

    def seconds(self, run: Run, repeat: int = 1, prepare: Run | None = None, flush: bool = True) -> float: ...
    def synchronize(self) -> None: ...
    def free_bytes(self) -> float: ...
    def growth(self, run: Run) -> tuple[Any, int]: ...


class Cuda:
    """Between two events on the stream, behind a kernel that only waits.

    While that one waits the host enqueues the whole step, so that gaps of the host are not taken for the device's
    time; what the host takes is measured in host.py. Before that a buffer larger than the L2 cache is written, so that
    everyone finds it cold.
    """

    name = "cuda"
    backends: ClassVar = {"cuda": "cuda", "triton": "triton"}
    scale = 1

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self.buffer = torch.empty(max(4 * properties.L2_cache_size, 1 << 28), dtype=torch.uint8, device="cuda")
        self.cycles_per_second = 2e9  # about the clock; the wait need only be long enough
        self.host: WeakKeyDictionary[Run, float] = WeakKeyDictionary()  # seconds that enqueueing a step takes

    def seconds(self, run: Run, repeat: int = 1, prepare: Run | None = None, flush: bool = True) -> float:
        if run not in self.host:
            self.host[run] = self._enqueueing(run, prepare)
        kept = prepare() if prepare is not None else None
        if flush:
            self.buffer.zero_()
        wait = min(0.05, 2e-4 + 1.5 * repeat * self.host[run])
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(wait * self.cycles_per_second))
        start.record()
        for _ in range(repeat):
            run()
        end.record()
        end.synchronize()
        del kept
        return start.elapsed_time(end) / 1e3 / repeat

    def _enqueueing(self, run: Run, prepare: Run | None) -> float:
        found = []
        for _ in range(3):
            if prepare is not None:
                prepare()
            torch.cuda.synchronize()
            begin = perf_counter()
            run()
            found.append(perf_counter() - begin)
        torch.cuda.synchronize()
        return statistics.median(found)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free_bytes(self) -> float:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def growth(self, run: Run) -> tuple[Any, int]:
        """What a call returns, and by how many bytes it raised the peak of allocated memory."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = run()
        torch.cuda.synchronize()
        return found, torch.cuda.max_memory_allocated() - before


class StandIn:
    """The same on the CPU, small, for trying the code; its figures are nothing that anyone should read."""

    name = "cpu"
    backends: ClassVar = {"cuda": "cpu", "triton": "reference"}
    scale = 512

    def seconds(self, run: Run, repeat: int = 1, prepare: Run | None = None, flush: bool = True) -> float:
        if prepare is not None:
            prepare()
        begin = perf_counter()
        for _ in range(repeat):
            run()
        return (perf_counter() - begin) / repeat

    def synchronize(self) -> None:
        pass

    def free_bytes(self) -> float:
        return 2.0**30

    def growth(self, run: Run) -> tuple[Any, int]:
        return run(), 0
