"""Which places of faults each test reaches: a plugin of pytest that tests/mutants.py loads.

A place in C++ keeps by itself that it was reached, where the number of the fault is negative (tests/faults.py). Of
Python, the lines are traced of the files in the folder that FOLDER names. What came of it is JSON in the file that OUT
names: seconds and places by test. What is reached before a test begins, or in another process, is of none.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from .faults import MOST, REACHED

OUT, FOLDER = "OBJKERN_REACHED", "OBJKERN_REACHED_FOLDER"


class Lines:
    """Those that are run of files in a folder, by all threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = f"{folder}/"
        self.found: set[tuple[str, int]] = set()
        self.of_interest: dict[str, bool] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        name = frame.f_code.co_filename
        if name not in self.of_interest:
            self.of_interest[name] = name.startswith(self.folder)
        return self.line if self.of_interest[name] else None

    def line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "line":
            self.found.add((frame.f_code.co_filename, frame.f_lineno))
        return self.line


class Plugin:
    def __init__(self) -> None:
        self.tests: dict[str, tuple[float, list[int | str]]] = {}
        self.lines = Lines(Path.cwd() / os.environ[FOLDER]) if FOLDER in os.environ else None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        from objkern import _C

        places = None
        if _C is not None and _C.__file__:
            try:
                places = (ctypes.c_ubyte * MOST).in_dll(ctypes.CDLL(_C.__file__), REACHED)
            except ValueError:  # a build without faults
                places = None
        if places is not None:
            ctypes.memset(places, 0, MOST)
        if self.lines is not None:
            self.lines.found.clear()
            threading.settrace(self.lines)
            sys.settrace(self.lines)
        begin = time.monotonic()
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            found: list[int | str] = [] if places is None else [k for k, there in enumerate(bytes(places)) if there]
            if self.lines is not None:
                found += [f"{Path(file).relative_to(Path.cwd())}:{line}" for file, line in sorted(self.lines.found)]
            self.tests[item.nodeid] = time.monotonic() - begin, found

    def pytest_sessionfinish(self) -> None:
        Path(os.environ[OUT]).write_text(json.dumps(self.tests))


def pytest_configure(config: pytest.Config) -> None:
    if OUT in os.environ:
        config.pluginmanager.register(Plugin())
