"""One process at a time writes to a folder, or two runs would take each other's files for their own.

    with alone_in(folder): ...      ValueError if somebody else is there

The lock is the kernel's: it goes with the process that has it, however that ends, and nothing has to be cleaned up.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = ".lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds the folder, which exists.

    Raises:
        ValueError: another process does.
    """
    descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"output: another process is at work in {folder}; wait for it, or name another folder"
            ) from error
        yield
    finally:
        os.close(descriptor)
