"""The emulated device as the tests handle it: schedules, kinds of device, launch plans, and what was launched."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import NamedTuple

from objkern import _C

_library = ctypes.CDLL(_C.__file__)
_library.objkern_emulation_seed.argtypes = [ctypes.c_uint64]
_library.objkern_emulation_device.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int]
_library.objkern_emulation_launches.restype = ctypes.c_uint64


class Grid(NamedTuple):
    blocks: int
    threads: int
    cluster: int
    shared_bytes: int


class Plan(NamedTuple):
    """How rows are spread over the device: clusters of blocks that share a row, or lanes of a warp that do."""

    cluster: int = 1
    resident: bool = False
    lanes: int = 0


def seed(number: int) -> None:
    """Another schedule. The same number, and the same launches since, give the same schedule."""
    _library.objkern_emulation_seed(number)


def launches() -> int:
    """Since `seed`."""
    return _library.objkern_emulation_launches()


def last_grid() -> Grid:
    numbers = (ctypes.c_int64 * 4)()
    _library.objkern_emulation_last_grid(numbers)
    return Grid(*numbers)


@contextlib.contextmanager
def plan(forced: Plan | None) -> Iterator[None]:
    _library.objkern_emulation_force_plan(*((0, 0, 0) if forced is None else map(int, forced)))
    try:
        yield
    finally:
        _library.objkern_emulation_force_plan(0, 0, 0)


class Device(NamedTuple):
    multiprocessors: int
    shared_bytes: int  # of a multiprocessor
    clusters: bool


H100 = Device(132, 233472, True)
A100 = Device(108, 167936, False)
SMALL = Device(1, 233472, True)  # so that few rows keep it busy, and its blocks take turns


@contextlib.contextmanager
def device(emulated: Device) -> Iterator[None]:
    _library.objkern_emulation_device(*map(int, emulated))
    try:
        yield
    finally:
        _library.objkern_emulation_device(*map(int, H100))
