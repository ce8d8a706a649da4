"""The state of a run on disk: whole or not at all, and nothing in it that could run.

    checkpoints/step-00000120/tensors.safetensors    weights, optimizer moments
                              state.json             where the run stood; what it was asked for
    checkpoints/best/...                             the weights of the best epoch

A folder is written under another name, flushed, and renamed, so one that has its name is complete. Pickle is neither
written nor read: what safetensors and JSON cannot hold is not in a checkpoint.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .whole import flush

_STEP = re.compile(r"step-(\d{8})")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def save(folder: Path, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Writes a checkpoint under its name, in the place of one that has it."""
    from safetensors.torch import save_file

    partial, final = folder / f".{name}.partial", folder / name
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    whole, aliases = _apart(tensors)
    with _as_os_error(partial):
        save_file(whole, str(partial / "tensors.safetensors"))
    about = {**state, "aliases": aliases, "tensors": len(whole)}
    (partial / "state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    for path in (partial / "tensors.safetensors", partial / "state.json", partial):
        flush(path)
    old = folder / f".{name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():  # only "best" is ever replaced; between the two renames the old one has another name
        final.rename(old)
    partial.rename(final)
    flush(folder)
    shutil.rmtree(old, ignore_errors=True)
    return final


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of a checkpoint.

    Raises:
        ValueError: it is not complete, or is of a format that could run code.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors, state = path / "tensors.safetensors", path / "state.json"
    if not tensors.exists() or not state.exists():
        pickles = sorted(file.name for file in path.glob("*") if file.suffix in _PICKLES)
        if pickles:
            raise ValueError(
                f"checkpoint: {path} holds {', '.join(pickles)}, which may be pickles; they can run any code when they "
                "are loaded, and are refused"
            )
        raise ValueError(f"checkpoint: {path} has no tensors.safetensors and state.json")
    try:
        found, numbers = load_file(str(tensors)), json.loads(state.read_text(encoding="utf-8"))
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"checkpoint: {path} can't be read: {error}") from error
    try:
        aliases, count = dict(numbers.pop("aliases")), numbers.pop("tensors")
        if len(found) != count:
            raise ValueError(f"{count} tensors were written, {len(found)} are there")
        return found | {name: found[original] for name, original in aliases.items()}, numbers
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"checkpoint: {path} is not what a run wrote: {error}") from error


@contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """A disk that is full, as safetensors says it, in the way of everything else that is written."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error


def newest(folder: Path) -> Path | None:
    """The checkpoint of the latest step, or None."""
    found = [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return max(found, default=None, key=lambda path: path.name)


def keep_newest(folder: Path, count: int = 1) -> None:
    """Removes all but the latest steps, and what an interrupted run left half written."""
    steps = sorted(path for path in folder.glob("step-*") if _STEP.fullmatch(path.name))
    for path in [*steps[:-count], *folder.glob(".*.partial"), *folder.glob(".*.old")]:
        shutil.rmtree(path, ignore_errors=True)


def restore_interrupted(folder: Path) -> None:
    """A "best" that was being replaced when the run ended: the old one is put back."""
    for old in folder.glob(".*.old"):
        final = folder / old.name[1 : -len(".old")]
        if not final.exists():
            old.rename(final)


def _apart(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors with memory of their own, and which names share: tied weights are stored once."""
    whole: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        whole[name] = tensor.detach().cpu().contiguous().clone()
    return whole, aliases


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments of every parameter, by its place: ``optimizer.3.exp_avg``."""
    found = {}
    for place, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if value is not None:
                found[f"optimizer.{place}.{name}"] = torch.as_tensor(value)
    return found


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, place, what = name.split(".", 2)
            state.setdefault(int(place), {})[what] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
