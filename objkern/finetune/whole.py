"""Files and folders that are there whole or not at all.

    with whole_file(path) as new: ...      what is written to `new` is at `path` when the block has ended
    with whole_folder(path) as new: ...    the same of a folder

    .NAME.objkern-XXXXXXXX/new  ──rename──▶  NAME      while it's written
                          /old                         what NAME was, between two renames

The folder beside NAME is locked for as long as the process that made it lives. So the next one knows what a killed one
left, and removes that and nothing else.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .tables import reason


@contextmanager
def writing(path: Path, what: str = "output", kind: type[Exception] = OSError) -> Iterator[None]:
    """Turns errors of a kind into a ValueError that says what can't be written and why, in one line."""
    try:
        yield
    except kind as error:
        raise ValueError(f"{what}: {path} can't be written: {reason(error)}") from error


@contextmanager
def whole_file(path: Path, what: str = "output", follow: bool = False) -> Iterator[Path]:
    """Where to write a file that is to be in the place of `path`.

    Args:
        follow: a link goes on pointing to what is written. Otherwise it is the link that is replaced: somebody else may
            have put it there, and it may point to anything.

    Raises:
        ValueError: it can't be written; what was there is there still.
    """
    target = Path(os.path.realpath(path)) if follow else path
    with writing(path, what):
        replaceable = target.is_file() or target.is_symlink() or not target.exists()
        if not replaceable:  # a device or a pipe
            yield target
            return
        with _beside(target) as place:
            yield place / "new"
            if target.exists() and not target.is_symlink():
                shutil.copymode(target, place / "new")
            flush(place / "new")
            (place / "new").replace(target)


@contextmanager
def whole_folder(path: Path, what: str = "output") -> Iterator[Path]:
    """An empty folder that is to be in the place of `path`.

    Raises:
        ValueError: it can't be written; what was there is there still.
    """
    with writing(path, what):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _beside(path) as place:
            (place / "new").mkdir()
            yield place / "new"
            for part in (*(place / "new").rglob("*"), place / "new"):
                flush(part)
            if path.exists():
                path.rename(place / "old")
            (place / "new").rename(path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, on the same disk, with a name that nothing else has."""
    mark = f".{path.name}.objkern-"
    for left in path.parent.glob(f"{glob.escape(mark)}????????"):
        with _locked(left) as ours:
            if ours and {part.name for part in left.iterdir()} <= {"new", "old"}:
                _clear(left, path)
    place = Path(tempfile.mkdtemp(prefix=mark, dir=path.parent))
    with _locked(place):
        try:
            yield place
        finally:
            _clear(place, path)


def _clear(place: Path, path: Path) -> None:
    """Removes such a folder; what was to be replaced and has not been is put back."""
    if (place / "old").exists() and not path.exists():
        (place / "old").rename(path)
    shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process holds the folder, and no other one that lives."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # gone by now, or somebody else's
        yield False
        return
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held by another one, or on a disk without locks
        return False
    return True


def flush(path: Path) -> None:
    """Brings a file or a folder to the disk, so that a name given to it afterwards is never one of nothing."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
