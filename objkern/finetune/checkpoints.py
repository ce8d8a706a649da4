"""The state of a run on disk: whole or not at all, and nothing in it that could run.

    checkpoints/step-00000120/tensors.safetensors    weights, optimizer moments
                              parts/*.safetensors    in the place of that: of every rank its own (DTensors)
                              state.json             where the run stood; what it was asked for
    checkpoints/best/...                             the weights of the best epoch

A folder is written under another name, flushed, and renamed, so one that has its name is complete. Pickle is neither
written nor read: what safetensors and JSON cannot hold is not in a checkpoint. Parts are written and read by
torch.distributed.checkpoint in the format that it has for safetensors; any number of ranks can read them, or one alone.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import is_dtensor, own
from .tables import first_line
from .whole import flush

_STEP = re.compile(r"step-(\d{8})")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def save(folder: Path, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Writes a checkpoint under its name, in the place of one that has it.

    With DTensors among them all ranks have to call it.

    Raises:
        OSError: it can't be written; on all ranks, whichever's part it is.
    """
    partial, final = folder / f".{name}.partial", folder / name
    whole, aliases = _apart(tensors)
    in_parts = is_dtensor(*whole.values())
    first = not in_parts or dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    if in_parts:
        dist.barrier()
        _save_parts(partial / PARTS, whole)
    else:
        _save_whole(partial / WHOLE, whole)
    if not first:
        return final
    written = [path for path in partial.rglob("*") if path.is_file()]
    about = {**state, "aliases": aliases, "tensors": len(whole)}
    if in_parts:
        about["parts"] = {path.name: path.stat().st_size for path in written}
    (partial / "state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    for path in (*partial.rglob("*"), partial):
        flush(path)
    old = folder / f".{name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():  # only "best" is ever replaced; between the two renames the old one has another name
        final.rename(old)
    partial.rename(final)
    flush(folder)
    shutil.rmtree(old, ignore_errors=True)
    return final


WHOLE, PARTS = "tensors.safetensors", "parts"


def _save_whole(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}, str(path))
    except SafetensorError as error:  # a disk that is full, in the way of everything else that is written
        raise OSError(errno.EIO, str(error), str(path)) from error


def _save_parts(folder: Path, tensors: dict[str, Tensor]) -> None:
    import torch.distributed.checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _failures(lambda why: OSError(errno.EIO, why, str(folder))):
        dcp.save({name: x.detach() for name, x in tensors.items()}, storage_writer=writer)


Like = Callable[[str, torch.Size], Tensor | None]


def load(path: Path, like: Like = lambda name, shape: None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of a checkpoint.

    Args:
        like: of parts, by name and whole shape what to read them into; None for a whole tensor. With process groups all
            ranks have to call.

    Raises:
        ValueError: it is not complete, or is of a format that could run code.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = path / "state.json"
    if not state.exists() or not ((path / WHOLE).exists() or (path / PARTS).is_dir()):
        pickles = sorted(file.name for file in path.glob("*") if file.suffix in _PICKLES)
        if pickles:
            raise ValueError(
                f"checkpoint: {path} holds {', '.join(pickles)}, which may be pickles; they can run any code when they "
                "are loaded, and are refused"
            )
        raise ValueError(f"checkpoint: {path} has no {WHOLE} (or {PARTS}) and state.json")
    try:
        in_parts = not (path / WHOLE).exists()
        found, numbers = {} if in_parts else load_file(str(path / WHOLE)), json.loads(state.read_text(encoding="utf-8"))
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"checkpoint: {path} can't be read: {error}") from error
    try:
        if in_parts:
            found = _load_parts(path / PARTS, numbers.pop("parts"), like)
        aliases, count = dict(numbers.pop("aliases")), numbers.pop("tensors")
        if len(found) != count:
            raise ValueError(f"{count} tensors were written, {len(found)} are there")
        return found | {name: found[original] for name, original in aliases.items()}, numbers
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise ValueError(f"checkpoint: {path} is not what a run wrote: {error}") from error


def _load_parts(folder: Path, sizes: Mapping[str, int], like: Like) -> dict[str, Tensor]:
    import torch.distributed.checkpoint as dcp

    if more := sorted({path.name for path in folder.iterdir()} - set(sizes)):
        raise ValueError(f"{more[0]}: nobody wrote it")
    for name, size in sizes.items():  # one that is missing would leave zeros
        there = (folder / name).stat().st_size if (folder / name).is_file() else None
        if there != size:
            raise ValueError(f"{name}: {size} bytes were written, {there or 'none'} are there")
    reader = dcp.HuggingFaceStorageReader(str(folder))
    found: dict[str, Tensor] = {}
    metadata = reader.read_metadata()
    for name, about in metadata.state_dict_metadata.items():
        place = like(name, about.size)
        found[name] = torch.zeros(about.size, dtype=about.properties.dtype) if place is None else place
    for index, part in metadata.storage_data.items():  # numbers of another kind would be converted
        if part.dtype != found[index.fqn].dtype:
            raise ValueError(f"{index.fqn}: expected {found[index.fqn].dtype} but got {part.dtype}")
    with _failures(ValueError), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one rank reads them alone
        dcp.load(found, storage_reader=reader, no_dist=not dist.is_initialized())
    return found


@contextmanager
def _failures(kind: Callable[[str], Exception]) -> Iterator[None]:
    """What went wrong on one of the ranks, as an exception of another kind, on all."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:  # which is no Exception
        rank, (why, _) = next(iter(error.failures.items()))
        raise kind(f"rank {rank}: {first_line(why)}") from error


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
        key = (own(tensor).data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        whole[name] = tensor
    return whole, aliases
