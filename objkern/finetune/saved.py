"""Models on disk that plain transformers can load, and the way back.

    save(folder, model, task)      config.json, model.safetensors, the tokenizer, objkern.json: what the task knows
    load(folder)                   ──▶ (model, task)
    predict(folder, rows)          ──▶ an answer for every row
    export(run, destination)       the model with a card that the hub understands; as ONNX too, if asked for

Pickle is neither written nor read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import adapters
from .card import README, card_of
from .data import Row, checked
from .onnx import ONNX, require_onnx, write_onnx
from .record import SCORE, json_text, read_json
from .reports import RUN, facts_of
from .tables import first_line
from .tasks import TASKS, Task
from .tasks.sequence_classification import CLASS, NUMBER, SEVERAL
from .whole import whole_folder, writing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["export", "load", "predict", "save"]

ABOUT = "objkern.json"
_OPTIONS = ("problem", "pack", "prefix")  # of some tasks
_SHAPE = {
    "task": tuple(TASKS), "labels": [str], "max_length": int, "metrics": {str: SCORE},
    "problem": (CLASS, SEVERAL, NUMBER), "pack": bool, "prefix": str,
}  # fmt: skip
_NEEDED = ("task", "labels", "max_length")
_TRUTH = ("label", "tags", "answers", "completion", "target")  # columns that rows to be answered do without
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_PLACES = ("", "base", "additional_chat_templates")  # folders of a model's parts
_PARTS = (".safetensors", ".json", ".jinja", ".txt", ".model")  # weights, configurations, templates, vocabularies


def save(folder: Path, model: nn.Module, task: Task, metrics: Mapping[str, float] | None = None) -> None:
    """Writes the model, its tokenizer and what the task knows; the model itself stays as it is.

    Args:
        folder: appears when all of it is written, in the place of one of that name.
        metrics: of the model, to be kept with it.

    Raises:
        ValueError: it can't be written.
    """
    about = {
        "task": task.name, "labels": task.labels, "max_length": task.max_length,
        **{name: getattr(task, name) for name in _OPTIONS if hasattr(task, name)},
        **({} if metrics is None else {"metrics": dict(metrics)}),
    }  # fmt: skip
    with whole_folder(folder) as new:
        with writing(folder, kind=Exception):  # the Rust libraries have errors of their own
            _save_model(new, model, task)
            task.tokenizer.save_pretrained(str(new))
        (new / ABOUT).write_text(json_text(about), encoding="utf-8")


def _save_model(folder: Path, model: Any, task: Task) -> None:
    if hasattr(model, "peft_config"):
        adapters.save(folder, model, task)
    else:
        model.save_pretrained(str(folder))  # an objective that is attached is in none of the files


# ---- the way back ---------------------------------------------------------------------------------------------------


def model_folder(place: Path) -> Path:
    """The folder of the model: this one, or `model/` of a run."""
    place = Path(place)
    return place / "model" if not (place / ABOUT).exists() and (place / "model").is_dir() else place


def load(folder: Path | str, device: torch.device | str = "cpu") -> tuple[PreTrainedModel, Task]:
    """The model, in evaluation mode, and its task, from the folder of a model or of a run.

    Raises:
        ValueError: there is no model that `save` wrote, a part of it is missing or unreadable, or its weights are in a
            format that could run code.
    """
    folder = model_folder(Path(folder))
    about = _about(folder)
    _refuse_pickles(folder)
    options = {name: about[name] for name in _OPTIONS if name in about}
    tokenizer = load_tokenizer(str(folder))
    try:
        task = TASKS[about["task"]](tokenizer, max_length=about["max_length"], labels=about["labels"], **options)
    except TypeError as error:  # an option that another task has
        raise ValueError(f"model: {folder / ABOUT} is not what a run wrote: {first_line(error)}") from error
    model = _with_adapters(folder, task) if adapters.are_in(folder) else _model(str(folder), task, whole=True)
    _same_labels(folder, model, task)
    return model.to(device).eval(), task


def _about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    if not path.exists():
        _refuse_pickles(folder)
        if (folder / RUN).exists():
            raise ValueError(f"model: {folder} is a run that has not finished, and has no model; resume it first")
        if (folder / "search.json").exists():
            raise ValueError(
                f"model: {folder} is a search; its best run is named at the top of {folder / 'search.json'}"
            )
        raise ValueError(f"model: expected a folder that a run wrote, with {ABOUT}, but {folder} has none")
    about = read_json(path, "model", _SHAPE, _NEEDED)
    if about["max_length"] < 1:
        raise ValueError(f"model: {path}, max_length: expected at least 1 but got {about['max_length']}")
    return about


def _refuse_pickles(folder: Path) -> None:
    names = sorted(file.name for file in folder.glob("*")) if folder.is_dir() else []
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if not any(name.endswith(".safetensors") for name in names):
        if pickles:
            raise ValueError(
                f"model: {folder} holds {', '.join(pickles)}, which may be pickles; they can run any code when they "
                "are loaded, and are refused: expected model.safetensors"
            )
        if (folder / ABOUT).exists():
            raise ValueError(f"model: {folder} has no model.safetensors")


def load_tokenizer(name: str, **options: Any) -> Any:
    """Of a folder, or by its name on a hub."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # of many kinds, the Rust library's own among them
        raise ValueError(f"model: no tokenizer can be loaded from {name!r}: {first_line(error)}") from error


def _model(name: str, task: Task, whole: bool) -> PreTrainedModel:
    """By the task's class of transformers. `whole`: every weight is there; else a head may be new."""
    import transformers

    kind = getattr(transformers, task.auto_model)
    options = {} if whole else task.model_options()
    try:
        model, found = kind.from_pretrained(
            name,
            trust_remote_code=False,
            use_safetensors=True,
            weights_only=True,
            dtype="auto",
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # of many kinds: no such name, a file cut short, another architecture
        raise ValueError(f"model: {name} can't be loaded: {first_line(error)}") from error
    if whole and found["missing_keys"]:
        raise ValueError(f"model: {name} lacks weights: {', '.join(sorted(found['missing_keys'])[:5])}")
    return model


def _with_adapters(folder: Path, task: Task) -> Any:
    from importlib.util import find_spec

    if find_spec("peft") is None:
        raise ValueError(f"model: {folder} holds adapters, which need peft: pip install peft")
    own = (folder / "base").is_dir()
    if own:
        _refuse_pickles(folder / "base")
    return adapters.load(folder, _model(adapters.base_of(folder), task, whole=own))


def _same_labels(folder: Path, model: Any, task: Task) -> None:
    """A head without a name for each of its logits has answers that nobody could name."""
    has_labels = any(column.name in ("label", "tags") for column in task.columns)
    count = model.config.num_labels if has_labels else 0
    if len(task.labels) != count:
        raise ValueError(
            f"model: {folder / ABOUT}, labels: expected {count}, as the model has, but got {len(task.labels)}"
        )


# ---- answers --------------------------------------------------------------------------------------------------------


def predict(
    model: Path | str | tuple[nn.Module, Task], rows: Sequence[Row], batch_size: int = 32, source: str = "rows"
) -> list[Any]:
    """An answer for every row: a class, tags, a text, ...

    Args:
        model: a folder as `load` takes it, or what `load` gave.
        rows: with the columns of the task; those that say what is right may be left out, and are not looked at.

    Raises:
        ValueError: a row lacks what the task reads; it names the row and the column.
    """
    if isinstance(model, Path | str):
        model = load(model)
    model, task = model
    columns = [column for column in task.columns if column.name not in _TRUTH]
    checked(rows, columns, source)
    if not any(column.needed for column in columns):
        rows = [_prompt(row, f"{source}, row {place}") for place, row in enumerate(rows, 1)]
    return task.predict(model, rows, batch_size)


def _prompt(row: Row, where: str) -> Row:
    """What a language model is to continue, by the one name under which it looks for it."""
    if row.get("messages") is not None:
        return {"messages": row["messages"]}
    text = row.get("prompt") if row.get("prompt") is not None else row.get("text")
    if text is None:
        raise ValueError(f"{where}: expected a column prompt, text or messages but got {list(row)}")
    return {"text": text}


# ---- to give away ---------------------------------------------------------------------------------------------------


def export(run: Path | str, destination: Path | str, onnx: bool = False) -> Path:
    """Writes a folder to deploy: the model, its tokenizer, a card (README.md), and model.onnx if asked for.

    Args:
        run: its folder, with `model/`.
        destination: a new folder, or an empty one.
        onnx: of one forward pass, from token numbers to logits, for any number of rows and tokens.

    Raises:
        ValueError: there is no model that `load` loads, the destination is taken or can't be written, or a package is
            missing.
    """
    run, destination = Path(run), Path(destination)
    folder = model_folder(run)
    about = _about(folder)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"destination: {destination} is there already; name a new folder")
    if onnx:
        require_onnx(folder)
    facts, result = facts_of(run) if (run / RUN).exists() else ({}, {})  # a model alone is enough
    model, task = load(folder)
    text = card_of(run.resolve().name, about, facts, result, folder)
    with whole_folder(destination.resolve(), "destination") as new:
        for part in _parts_of(folder):
            (new / part).parent.mkdir(exist_ok=True)
            copyfile(folder / part, new / part)
        (new / README).write_text(text, encoding="utf-8", errors="replace")
        if onnx:
            write_onnx(new / ONNX, model, task)
    return destination


def _parts_of(folder: Path) -> Iterator[Path]:
    """Where in the folder the files are that loading reads; what else lies there is nobody else's business."""
    for place in _PLACES:
        for path in sorted((folder / place).glob("*")):
            if path.suffix in _PARTS and path.is_file():
                yield path.relative_to(folder)
