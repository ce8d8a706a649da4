"""Which places of faults each test reaches: a plugin of pytest that tests/mutants.py loads.

A place in C++ keeps by itself that it was reached, where the number of the fault is negative (tests/faults.py); one in
Python calls what this makes a builtin of, also in the processes that a test starts. What came of it is JSON in the file
that OUT names: seconds and places by test. What is reached before a test begins, or in a process that serves several, is
of none.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .faults import MOST, REACHED

OUT = "OBJKERN_REACHED"
OUTSIDE = "OBJKERN_REACHED_OUTSIDE"  # the file to which processes that tests start add what they reach
IN_PYTHON: set[int] = set()
if OUT in os.environ:  # before anything is imported that calls it
    setattr(builtins, REACHED, IN_PYTHON.add)
    os.environ[OUTSIDE] = f"{os.environ[OUT]}.outside"


class Plugin:
    def __init__(self) -> None:
        self.tests: dict[str, tuple[float, list[int]]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        places = in_cpp()
        if places is not None:
            ctypes.memset(places, 0, MOST)
        IN_PYTHON.clear()
        outside = Path(os.environ[OUTSIDE])
        outside.write_text("")
        begin = time.monotonic()
        try:
            return (yield)
        finally:
            found = set() if places is None else {k for k, there in enumerate(bytes(places)) if there}
            found |= IN_PYTHON | set(map(int, outside.read_text().split()))
            self.tests[item.nodeid] = time.monotonic() - begin, sorted(found)

    def pytest_sessionfinish(self) -> None:
        Path(os.environ[OUT]).write_text(json.dumps(self.tests))


def in_cpp() -> ctypes.Array | None:
    """A byte for each place, if faults are planted in this build."""
    from objkern import _C

    library = None if _C is None else ctypes.CDLL(_C.__file__)
    return (ctypes.c_ubyte * MOST).in_dll(library, REACHED) if hasattr(library, REACHED) else None


def pytest_configure(config: pytest.Config) -> None:
    if OUT in os.environ:
        config.pluginmanager.register(Plugin())
