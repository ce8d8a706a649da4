"""Models on disk that plain transformers can load, and the way back.

    save(folder, model, task)      config.json, model.safetensors, the tokenizer, objkern.json: what the task knows
    load(folder)                   ──▶ (model, task)
    predict(folder, rows)          ──▶ an answer for every row
    export(run, destination)       the model with a card that the hub understands; as ONNX too, if asked for

LoRA adapters are merged into the weights. Prompt vectors can't be, so they are saved as peft has them, beside the name
of their model, or beside the model itself in `base/` if it has none that others could load. Pickle is neither written
nor read.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..transformers import detach
from .data import Row, checked
from .record import write_json
from .reports import RUN, data_in_words, facts_of, number, terms_of
from .tables import first_line
from .tasks import TASKS, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Record = dict[str, Any]
ABOUT = "objkern.json"
_OPTIONS = ("problem", "pack", "prefix")  # of some tasks
_TRUTH = ("label", "tags", "answers", "completion", "target")  # columns that rows to be answered do without
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def save(folder: Path, model: nn.Module, task: Task, metrics: Mapping[str, float] | None = None) -> None:
    """Writes the model, its tokenizer and what the task knows; the model itself stays as it is.

    Args:
        folder: appears when all of it is written, in the place of one of that name.
        metrics: of the model, to be kept with it.
    """
    about = {
        "task": task.name, "labels": task.labels, "max_length": task.max_length,
        **{name: getattr(task, name) for name in _OPTIONS if hasattr(task, name)},
        **({} if metrics is None else {"metrics": dict(metrics)}),
    }  # fmt: skip

    def write(partial: Path) -> None:
        _save_model(partial, model, task)
        task.tokenizer.save_pretrained(str(partial))
        write_json(partial / ABOUT, about)

    _whole(folder, write)


def _save_model(folder: Path, model: nn.Module, task: Task) -> None:
    if not hasattr(model, "peft_config"):
        model.save_pretrained(str(folder))  # an objective that is attached is in none of the files
        return
    if hasattr(model, "merge_and_unload") and not any(c.is_prompt_learning for c in model.peft_config.values()):
        merged = copy.deepcopy(model)
        if task.linear_head:
            detach(merged)
        merged.merge_and_unload().save_pretrained(str(folder))
        return
    base = model.get_base_model()
    name = model.peft_config[model.active_adapter].base_model_name_or_path or ""
    if not _is_hub_name(name):
        # peft keeps a head twice, as it was and as it is trained; the second one goes with the adapter.
        state = {key.replace("original_module.", ""): x for key, x in base.state_dict().items()
                 if "modules_to_save." not in key}  # fmt: skip
        base.save_pretrained(str(folder / "base"), state_dict=state)
    model.save_pretrained(str(folder), save_embedding_layers=False)


def _is_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()


def _whole(folder: Path, write: Callable[[Path], None]) -> None:
    """A folder that is written under another name and then renamed, so that one that has its name is complete."""
    partial, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))
    for place in (partial, old):
        shutil.rmtree(place, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


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
    from transformers import AutoTokenizer

    folder = model_folder(Path(folder))
    about = _about(folder)
    kind = TASKS[about["task"]]
    _refuse_pickles(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # of many kinds, the Rust library's own among them
        raise ValueError(f"model: the tokenizer of {folder} can't be read: {first_line(error)}") from error
    options = {name: about[name] for name in _OPTIONS if name in about}
    task = kind(tokenizer, max_length=about["max_length"], labels=about["labels"], **options)
    if (folder / "adapter_config.json").exists():
        model = _with_adapter(folder, task)
    else:
        model = _model(str(folder), task, whole=True)
    return model.to(device).eval(), task


def _about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    if not path.exists():
        _refuse_pickles(folder)
        if (folder / RUN).exists():
            raise ValueError(f"model: {folder} is a run that has not finished, and has no model; resume it first")
        raise ValueError(f"model: expected a folder that a run wrote, with {ABOUT}, but {folder} has none")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in ("task", "labels", "max_length") if name not in about]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"model: {path} can't be read: {error}") from error
    if missing or about["task"] not in TASKS:
        raise ValueError(f"model: {path}: expected one of {', '.join(TASKS)} as task, labels and max_length")
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


def _model(name: str, task: Task, whole: bool) -> PreTrainedModel:
    """By the task's class of transformers. `whole`: every weight is there; else a head may be new."""
    import transformers

    kind = getattr(transformers, task.auto_model)
    options = {} if whole else task.model_options()
    try:
        model, found = kind.from_pretrained(
            name, use_safetensors=True, weights_only=True, dtype="auto", output_loading_info=True, **options
        )
    except Exception as error:  # of many kinds: no such name, a file cut short, another architecture
        raise ValueError(f"model: {name} can't be loaded: {first_line(error)}") from error
    if whole and found["missing_keys"]:
        raise ValueError(f"model: {name} lacks weights: {', '.join(sorted(found['missing_keys'])[:5])}")
    return model


def _with_adapter(folder: Path, task: Task) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"model: {folder} holds adapters, which need peft: pip install peft") from error
    own = folder / "base"
    name = str(own) if own.is_dir() else _adapted(folder)
    if own.is_dir():
        _refuse_pickles(own)
    base = _model(name, task, whole=own.is_dir())
    try:
        return peft.PeftModel.from_pretrained(base, str(folder), use_safetensors=True)
    except Exception as error:  # of many kinds, as above
        raise ValueError(f"model: the adapters of {folder} can't be loaded: {first_line(error)}") from error


def _adapted(folder: Path) -> str:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"] or ""


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

PIPELINES = {"sequence-classification": "text-classification", "token-classification": "token-classification",
             "question-answering": "question-answering", "causal-lm": "text-generation",
             "seq2seq": "text2text-generation"}  # fmt: skip


def export(run: Path | str, destination: Path | str, onnx: bool = False) -> Path:
    """Writes a folder to deploy: the model, its tokenizer, a card (README.md), and model.onnx if asked for.

    Args:
        run: its folder, with `model/`.
        destination: a new folder, or an empty one.
        onnx: of one forward pass, from token numbers to logits, for any number of rows and tokens.

    Raises:
        ValueError: there is no model, the destination is taken, or a package is missing.
    """
    run, destination = Path(run), Path(destination)
    folder = model_folder(run)
    about = _about(folder)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"destination: {destination} is there already; name a new folder")
    if onnx:
        _require_onnx(folder)
    facts, result = facts_of(run) if (run / RUN).exists() else ({}, {})  # a model alone is enough

    def write(partial: Path) -> None:
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        (partial / "README.md").write_text(_card(run.name, about, facts, result, partial), encoding="utf-8")
        if onnx:
            _write_onnx(partial)

    _whole(destination.resolve(), write)
    return destination


def _card(name: str, about: Record, run: Record, result: Record, folder: Path) -> str:
    """The text of README.md: what the hub reads, then what people read."""
    from huggingface_hub import ModelCardData

    name = str(run.get("name") or name)
    adapted = _adapted(folder) if (folder / "adapter_config.json").exists() else str(run.get("model") or "")
    scores = result.get("test") or result.get("dev") or about.get("metrics") or {}
    head = ModelCardData(
        library_name="peft" if (folder / "adapter_config.json").exists() else "transformers",
        pipeline_tag=PIPELINES[about["task"]], base_model=adapted if _is_hub_name(adapted) else None,
        metrics=list(dict.fromkeys(re.sub("^(micro|macro)_", "", metric) for metric in scores)) or None,
        tags=["objkern"],
    )  # fmt: skip
    return "\n\n".join(part for part in (
        f"---\n{head.to_yaml()}\n---", f"# {name}", _origin(about, run), _terms(run), _scores(about, result),
        _by_class(result), _how_to_load(about, folder), _provenance(run)) if part) + "\n"  # fmt: skip


def _origin(about: Record, run: Record) -> str:
    model, data = run.get("model"), data_in_words(run)
    text = f"A model for {about['task']}: {TASKS[about['task']].about}."
    text += f" It was trained from `{model}`." if model and _is_hub_name(str(model)) else ""
    text += f" Data: {data}." if data else ""
    if about["labels"]:
        shown = [f"`{label}`" for label in about["labels"][:50]]
        text += f"\n\nLabels: {', '.join(shown)}{', ...' if len(about['labels']) > 50 else ''}."
    return text


def _terms(run: Record) -> str:
    if not run.get("objective"):
        return ""
    text = f"## Objective\n\n```\n{run['objective']}\n```"
    rows = [(c, f"`{term}`", f"`{equals}`" if equals else "") for c, term, equals in terms_of(run["objective"])]
    return f"{text}\n\n{_table(('coefficient', 'term', 'equals'), rows)}" if rows else text


def _scores(about: Record, result: Record) -> str:
    by_split = {split: result.get(split) for split in ("untrained", "dev", "test")}
    by_split = {split: found for split, found in by_split.items() if found}
    if not by_split and about.get("metrics"):
        by_split = {"value": about["metrics"]}
    if not by_split:
        return ""
    names = dict.fromkeys(name for found in by_split.values() for name in found)
    rows = [(name.replace("_", " "), *(number(found.get(name)) for found in by_split.values())) for name in names]
    return f"## Metrics\n\n{_table(('metric', *by_split), rows)}"


def _by_class(result: Record) -> str:
    if not result.get("table"):
        return ""
    head, *rows = result["table"]
    return f"## By {head[0]}\n\n{_table(head, [[number(value) for value in row] for row in rows])}"


def _table(head: Sequence[Any], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


_ROWS = {"sequence-classification": {"text": "..."}, "token-classification": {"words": ["..."]},
         "question-answering": {"question": "...", "context": "..."}, "causal-lm": {"text": "..."},
         "seq2seq": {"source": "..."}}  # fmt: skip


def _how_to_load(about: Record, folder: Path) -> str:
    auto = TASKS[about["task"]].auto_model
    plain = f"model = {auto}.from_pretrained(folder)\ntokenizer = AutoTokenizer.from_pretrained(folder)"
    imports = f"from transformers import {auto}, AutoTokenizer"
    if (folder / "adapter_config.json").exists():
        base = "folder + '/base'" if (folder / "base").is_dir() else repr(_adapted(folder))
        imports += "\nfrom peft import PeftModel"
        plain = plain.replace("from_pretrained(folder)", f"from_pretrained({base})", 1)
        plain = plain.replace("\n", "\nmodel = PeftModel.from_pretrained(model, folder)\n", 1)
    rows = json.dumps([_ROWS[about["task"]]])
    ours = f"from objkern.finetune import saved\n\nsaved.predict(folder, {rows})"
    return (
        "## How to load it\n\nWith `folder` where this file stands, by transformers:\n\n"
        f"```python\n{imports}\n\n{plain}\n```\n\nWith objkern, from rows to answers:\n\n```python\n{ours}\n```"
    )


def _provenance(run: Record) -> str:
    lines = [f"```\n{run['command']}\n```"] if run.get("command") else []
    if run.get("versions"):
        lines.append(", ".join(f"{package} {version}" for package, version in run["versions"].items()))
    if run.get("git"):
        lines.append(f"commit `{run['git']['commit']}`{' with changes' if run['git'].get('dirty') else ''}")
    return "## How it was made\n\n" + "\n\n".join(lines) if lines else ""


# ---- ONNX -----------------------------------------------------------------------------------------------------------


class _Logits(nn.Module):
    """The forward pass as ONNX wants it: tensors in by their places, tensors out."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, list(inputs), list(outputs)
        self.options = {"use_cache": False} if hasattr(model, "generation_config") else {}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**dict(zip(self.inputs, tensors, strict=True)), **self.options)
        return tuple(getattr(found, name) for name in self.outputs)


def _require_onnx(folder: Path) -> None:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ValueError(f"onnx: needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if (folder / "adapter_config.json").exists():
        raise ValueError("onnx: a model with prompt vectors can't be written; train with full or lora instead")


def _write_onnx(folder: Path) -> None:
    model, task = load(folder)
    outputs = ["start_logits", "end_logits"] if task.name == "question-answering" else ["logits"]
    ids = torch.tensor([[1, 2, 3], [2, 3, 4]]) % model.config.get_text_config().vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "token_type_ids" in task.tokenizer.model_input_names:
        inputs["token_type_ids"] = torch.zeros_like(ids)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :2]
    rows, tokens, answer = (torch.export.Dim(name) for name in ("rows", "tokens", "answer_tokens"))
    sizes = [{0: rows, 1: answer if name.startswith("decoder") else tokens} for name in inputs]
    size = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")  # torch can't trace T5's fused attention for every number of tokens
    try:
        torch.onnx.export(
            _Logits(model, list(inputs), outputs), tuple(inputs.values()), str(folder / "model.onnx"), dynamo=True,
            input_names=list(inputs), output_names=outputs, dynamic_shapes=(tuple(sizes),),
            external_data=size > 2**30, verbose=False,  # a file of ONNX holds no more than 2 GiB
        )  # fmt: skip
    except Exception as error:  # of many kinds: whatever torch can't trace
        raise ValueError(f"onnx: {type(model).__name__} can't be written: {first_line(error)}") from error
