"""The model card, README.md: what the hub reads, then what people read.

Labels, names and commands are data, and anything may stand in them: as texts they are escaped, and what stands between
backticks has more of them around it than in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import adapters
from .reports import data_in_words, number, terms_of
from .tasks import TASKS

Record = dict[str, Any]
README = "README.md"
PIPELINES = {"sequence-classification": "text-classification", "token-classification": "token-classification",
             "question-answering": "question-answering", "causal-lm": "text-generation",
             "seq2seq": "text2text-generation"}  # fmt: skip
_ROWS = {"sequence-classification": {"text": "..."}, "token-classification": {"words": ["..."]},
         "question-answering": {"question": "...", "context": "..."}, "causal-lm": {"text": "..."},
         "seq2seq": {"source": "..."}}  # fmt: skip


def card_of(name: str, about: Record, run: Record, result: Record, folder: Path) -> str:
    """The text of README.md.

    Args:
        name: of the model, unless the run has one.
        about: what the model's folder says about it.
        run, result: what the run's folder says; empty for a model alone.
        folder: of the model.
    """
    return "\n\n".join(part for part in (
        _for_the_hub(about, run, result, folder), f"# {_text(run.get('name') or name)}", _origin(about, run),
        _terms(run), _scores(about, result), _by_class(result), _how_to_load(about, folder), _provenance(run),
    ) if part) + "\n"  # fmt: skip


def _for_the_hub(about: Record, run: Record, result: Record, folder: Path) -> str:
    from huggingface_hub import ModelCardData

    with_adapters = adapters.are_in(folder)
    base = adapters.base_of(folder) if with_adapters else run.get("model") or ""
    scores = result.get("test") or result.get("dev") or about.get("metrics") or {}
    head = ModelCardData(
        library_name="peft" if with_adapters else "transformers",
        pipeline_tag=PIPELINES[about["task"]], base_model=base if adapters.is_hub_name(base) else None,
        metrics=list(dict.fromkeys(re.sub("^(micro|macro)_", "", metric) for metric in scores)) or None,
        tags=["objkern"],
    )  # fmt: skip
    return f"---\n{head.to_yaml()}\n---"


def _origin(about: Record, run: Record) -> str:
    model, data, labels = run.get("model") or "", data_in_words(run), about["labels"]
    text = f"A model for {about['task']}: {TASKS[about['task']].about}."
    text += f" It was trained from {_code(model)}." if adapters.is_hub_name(model) else ""
    text += f" Data: {_text(data)}." if data else ""
    text += f"\n\nLabels: {', '.join(map(_code, labels[:50]))}{', ...' if len(labels) > 50 else ''}." if labels else ""
    return text


def _terms(run: Record) -> str:
    if not run.get("objective"):
        return ""
    text = f"## Objective\n\n{_block(run['objective'])}"
    rows = [(c, *(_code(line).replace("|", "\\|") if line else "" for line in (term, equals)))
            for c, term, equals in terms_of(run["objective"])]  # fmt: skip
    return f"{text}\n\n{_table(('coefficient', 'term', 'equals'), rows)}" if rows else text


def _scores(about: Record, result: Record) -> str:
    by_split = {split: result.get(split) for split in ("untrained", "dev", "test")}
    by_split = {split: found for split, found in by_split.items() if found}
    if not by_split and about.get("metrics"):
        by_split = {"value": about["metrics"]}
    if not by_split:
        return ""
    names = dict.fromkeys(name for found in by_split.values() for name in found)
    rows = [(name.replace("_", " "), *(found.get(name) for found in by_split.values())) for name in names]
    return f"## Metrics\n\n{_table_of_values(('metric', *by_split), rows)}"


def _by_class(result: Record) -> str:
    table = result.get("table")
    if not table or not table[0]:
        return ""
    head, *rows = table
    return f"## By {_text(head[0])}\n\n{_table_of_values(head, rows)}"


def _how_to_load(about: Record, folder: Path) -> str:
    auto = TASKS[about["task"]].auto_model
    plain = f"model = {auto}.from_pretrained(folder)\ntokenizer = AutoTokenizer.from_pretrained(folder)"
    imports = f"from transformers import {auto}, AutoTokenizer"
    if adapters.are_in(folder):
        base = "folder + '/base'" if (folder / "base").is_dir() else repr(adapters.base_of(folder))
        imports += "\nfrom peft import PeftModel"
        plain = plain.replace("from_pretrained(folder)", f"from_pretrained({base})", 1)
        plain = plain.replace("\n", "\nmodel = PeftModel.from_pretrained(model, folder)\n", 1)
    theirs = f"{imports}\n\n{plain}"
    ours = f"from objkern.finetune import saved\n\nsaved.predict(folder, {json.dumps([_ROWS[about['task']]])})"
    return (
        "## How to load it\n\nWith `folder` where this file stands, by transformers:\n\n"
        f"{_block(theirs, 'python')}\n\nWith objkern, from rows to answers:\n\n"
        f"{_block(ours, 'python')}"
    )


def _provenance(run: Record) -> str:
    git = run.get("git") or {}
    lines = [_block(run["command"])] if run.get("command") else []
    if run.get("versions"):
        lines.append(_text(", ".join(f"{package} {version}" for package, version in run["versions"].items())))
    if git.get("commit"):
        lines.append(f"commit {_code(git['commit'])}{' with changes' if git.get('dirty') else ''}")
    return "## How it was made\n\n" + "\n\n".join(lines) if lines else ""


# ---- Markdown -------------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    """A text in one line, of which nothing is taken for Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", escape(" ".join(str(value).split()), quote=False))


def _code(text: str) -> str:
    """A text in one line, as it is."""
    text = " ".join(text.split())
    fence, pad = _fence(text, 1), " " * (text.startswith("`") or text.endswith("`") or not text)
    return f"{fence}{pad}{text}{pad}{fence}"


def _block(text: str, language: str = "") -> str:
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _fence(text: str, least: int) -> str:
    """More backticks than the text has in a row."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _table_of_values(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    return _table(list(map(_text, head)), [[_text(number(value)) for value in row] for row in rows])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Of cells that are Markdown already."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))
