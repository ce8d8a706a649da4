"""What a run writes while it runs, so that others can follow it and do it again.

    provenance()                       the command, versions, commit and machine           ──▶ run.json
    with Recorder(folder) as record:   every record of the loop, as it comes               ──▶ metrics.jsonl
        train(..., log=record)                                                             ──▶ tensorboard/

A line is flushed when it is written, so that a run that is killed leaves all but the line under way.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

import objkern

from .tables import first_line
from .whole import whole_file, writing

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
NUMBER = int | float  # shapes of what files hold, as `check` takes them
SCORE = int | float | None  # null where it's not defined
_RECORD = {"event": ("step", "epoch"), "step": int, "epoch": int}
_PACKAGES = ("transformers", "tokenizers", "safetensors", "peft", "datasets", "accelerate", "scikit-learn", "sacrebleu",
             "numpy", "triton")  # fmt: skip


# ---- where a run comes from -----------------------------------------------------------------------------------------


def provenance(command: Sequence[str] | None = None) -> dict[str, Any]:
    """What one needs to do a run again: command, time, versions, git (None outside a repository), machine.

    Args:
        command: its words; those of this process where it is left out.
    """
    return {
        "command": shlex.join(sys.orig_argv if command is None else command),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": _versions(),
        "git": _commit(),
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "objkern": objkern.__version__, "torch": torch.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> dict[str, Any] | None:
    """Of the folder where the user stands; files that git does not follow, as a run's own, do not make it dirty."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changed)}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):  # no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# ---- while it runs --------------------------------------------------------------------------------------------------


class Recorder:
    """Writes every record to `metrics.jsonl`, and its numbers for TensorBoard where that is installed.

    A resumed run begins at a checkpoint. What the file has of its first step and later comes from after that checkpoint
    and is dropped, since it is about to be done again.

    Args:
        folder: of the run; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[str] | None = None
        self._board: Any = None

    def __enter__(self) -> Recorder:
        return self

    def __call__(self, record: Mapping[str, Any]) -> None:
        if self._file is None:
            self._begin(record)
        assert self._file is not None
        with writing(self.folder / METRICS):
            self._file.write(json.dumps(finite(record), allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            with writing(self.folder / TENSORBOARD):
                self._show(record)

    def _show(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, int | float) and name not in ("step", "epoch"):
                self._board.add_scalar(encodable(f"{record['event']}/{name}"), value, record["step"])
        if record["event"] == "epoch":
            self._board.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as both:  # the second one too if the first can't be
            for part, name in ((self._board, TENSORBOARD), (self._file, METRICS)):
                if part is not None:
                    both.enter_context(writing(self.folder / name))
                    both.callback(part.close)
        self._file = self._board = None

    def _begin(self, first: Mapping[str, Any]) -> None:
        path = self.folder / METRICS
        kept = [json.dumps(record) + "\n" for record in records_of(self.folder) if _place(record) < _place(first)]
        with whole_file(path) as new:
            new.write_text("".join(kept), encoding="utf-8")
        with writing(path):
            self._file = path.open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        # TensorBoard hides what earlier files have of this step and later ones, of all curves. Epochs stand at their
        # last step and not at their number, or the steps of that number would be hidden instead.
        step, is_epoch = _place(first)
        with writing(self.folder / TENSORBOARD):
            self._board = SummaryWriter(str(self.folder / TENSORBOARD), purge_step=step + is_epoch)


def records_of(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, in order; a last line that a killed run left half written is none."""
    path = folder / METRICS
    found: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: {getattr(error, 'msg', error)}") from error
            break
        check(record, _RECORD, f"{path}, line {number}", needed=tuple(_RECORD))
        check({name: record[name] for name in record if name not in _RECORD}, {str: SCORE}, f"{path}, line {number}")
        found.append(record)
    return found


def _place(record: Mapping[str, Any]) -> tuple[int, bool]:
    """In the order of a run: an epoch comes after its last step."""
    return record["step"], record["event"] == "epoch"


# ---- files ----------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Writes all of it or nothing."""
    text = json_text(value)
    with whole_file(path) as new:
        new.write_text(text, encoding="utf-8")


def json_text(value: Any) -> str:
    """What is not finite is null, for JSON has neither NaN nor infinity."""
    return encodable(json.dumps(finite(value), indent=2, allow_nan=False, ensure_ascii=False)) + "\n"


def encodable(text: str) -> str:
    """Text that UTF-8 can hold: halves of surrogate pairs, which it can't, are escaped as JSON has them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def read_json(path: Path, what: str, shape: Any, needed: Sequence[str] = ()) -> Any:
    """The value in a file, if it is as `check` wants it.

    Raises:
        ValueError: it is not, or the file can't be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{what}: {path} can't be read: {first_line(error)}") from error
    check(value, shape, f"{what}: {path}", needed)
    return value


def check(value: Any, shape: Any, where: str, needed: Sequence[str] = ()) -> None:
    """Holds a value of JSON, which anybody may have edited, against its shape.

    Args:
        shape: a type, a tuple of choices, `[the shape of every item]`, `{str: the shape of every value}`, or
            `{"name": the shape of what is called that}`, where names may be missing or null, and others be there too.
        needed: names that must be there.

    Raises:
        ValueError: something in it has another shape; it says where.
    """
    if isinstance(shape, tuple):
        fits = value in shape
    else:
        fits = isinstance(value, type(shape) if isinstance(shape, list | dict) else shape)
        fits = fits and not (isinstance(value, int) and value.bit_length() > 63)  # which is neither a step nor a score
    if not fits:
        raise ValueError(f"{where}: expected {_in_words(shape)} but got {_short(value)}")
    for name, part, its_shape in _parts(value, shape, needed):
        check(part, its_shape, f"{where}, {name}")


def _parts(value: Any, shape: Any, needed: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """Name, value and shape of all that is in a value and has a shape."""
    if isinstance(shape, list):
        return [(f"item {place}", part, shape[0]) for place, part in enumerate(value, 1)]
    if not isinstance(shape, dict):
        return []
    if str in shape:
        return [(name, part, shape[str]) for name, part in value.items()]
    return [(name, value.get(name), of) for name, of in shape.items() if name in needed or value.get(name) is not None]


def _in_words(shape: Any) -> str:
    if isinstance(shape, tuple):
        return f"one of {', '.join(shape)}"
    if isinstance(shape, list | dict):
        return "a list" if isinstance(shape, list) else "an object"
    return {str: "a text", int: "a whole number", bool: "true or false"}.get(shape, "a number")


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def finite(value: Any) -> Any:
    """The same with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_writable(folder: Path, needed_bytes: int) -> None:
    """Makes the folder and sees whether a run fits into it, before hours of training and not after them.

    Raises:
        ValueError: it can't be made or written, or its disk has too little room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(f"folder: {folder} can't be written: {error.strerror}") from error
    if free < needed_bytes:
        raise ValueError(
            f"folder: the disk of {folder} has {in_bytes(free)} free, and a run needs about {in_bytes(needed_bytes)}"
        )


def in_bytes(count: float) -> str:
    """``3 * 2**30`` → ``"3.0 GiB"``"""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
