"""The command lines for what a run has left: ask its model, give it away, look at it again.

    python -m objkern predict RUN --text "something new"     answers, as JSON lines
    python -m objkern export RUN DESTINATION                 a folder for the hub or a server
    python -m objkern report RUN                             report.html and curves.png anew

Bad input exits with 2 and one line that says what is bad.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .data import Row, read
from .extras import require_finetune_extra
from .record import encodable, finite
from .tables import first_line
from .whole import whole_file

if TYPE_CHECKING:
    from .tasks import Task

TEXTS: dict[str, Callable[[str], Row]] = {  # what --text means to a task
    "sequence-classification": lambda text: {"text": text},
    "token-classification": lambda text: {"words": text.split()},
    "causal-lm": lambda text: {"prompt": text},
    "seq2seq": lambda text: {"source": text},
}


def predict_main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m objkern predict",
        description="Answers of a trained model: the rows as JSON lines, each with a column more, `predicted`.",
    )
    parser.add_argument("model", help="folder of a run, of a model, or of an export", metavar="RUN_OR_MODEL")
    parser.add_argument("--input", help="rows as for training, which need no answers; -: JSON lines of standard input",
                        metavar="FILE")  # fmt: skip
    parser.add_argument("--text", help="a text to be answered; may be given several times", action="append", default=[])
    parser.add_argument("--output", help="where the lines go (standard output)", type=Path, metavar="FILE")
    parser.add_argument("--batch-size", help="rows at a time (%(default)s)", type=int, default=32, metavar="N")
    parser.add_argument("--max-new-tokens", type=int, metavar="N",
                        help="of a written answer (causal-lm: 64, seq2seq: its max_length)")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (%(default)s)", default="cpu")
    return _run(parser, argv, _predict)


def _predict(arguments: argparse.Namespace) -> None:
    from . import saved

    if not arguments.text and arguments.input is None:
        raise ValueError("input: expected --input or --text, and got neither")
    if arguments.batch_size < 1:
        raise ValueError(f"batch_size: expected a whole number of at least 1 but got {arguments.batch_size}")
    most = arguments.max_new_tokens
    if most is not None and most < 1:
        raise ValueError(f"max_new_tokens: expected a whole number of at least 1 but got {most}")
    rows: list[Row] = []  # before the model, for they are quickly read
    if arguments.input is not None:
        rows = _lines_of(sys.stdin) if arguments.input == "-" else read(arguments.input, "test")
    model, task = saved.load(arguments.model, _device(arguments.device))
    if most is not None and not hasattr(task, "max_new_tokens"):
        raise ValueError(f"max_new_tokens: {task.name} writes no texts")
    if most is not None:
        task.max_new_tokens = most
    rows += [_row_of(text, task) for text in arguments.text]
    source = "standard input" if arguments.input == "-" else arguments.input or "text"
    answers = saved.predict((model, task), rows, arguments.batch_size, source)
    text = "".join(_line({**row, "predicted": answer}) for row, answer in zip(rows, answers, strict=True))
    if arguments.output is None:
        sys.stdout.write(text)
        return
    with whole_file(arguments.output, follow=True) as new:  # which may be where the rows come from
        new.write_text(text, encoding="utf-8")


def _line(row: Row) -> str:
    return encodable(json.dumps(finite(row), ensure_ascii=False, default=str)) + "\n"


def _lines_of(file: Any) -> list[Row]:
    try:
        lines = list(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"standard input, line {number}: {getattr(error, 'msg', error)}") from error
        if not isinstance(row, dict):
            raise ValueError(f"standard input, line {number}: expected an object with columns but got {line[:60]!r}")
        rows.append(row)
    return rows


def _row_of(text: str, task: Task) -> Row:
    if task.name not in TEXTS:
        columns = " and ".join(column.name for column in task.columns if column.name != "answers")
        raise ValueError(f"text: {task.name} takes {columns}; give rows with them by --input")
    return TEXTS[task.name](text)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device: {name} is not there; torch sees {torch.cuda.device_count()} GPUs")
        torch.zeros(1, device=device).item()  # "meta" and others are devices that compute nothing
    except (RuntimeError, AssertionError) as error:  # an AssertionError from a torch built without it
        raise ValueError(f"device: expected cpu, cuda or cuda:1 but got {name!r}") from error
    return device


def export_main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m objkern export",
        description="A folder to deploy: the model as transformers loads it, its tokenizer and a model card.",
    )
    parser.add_argument("run", help="folder of a run", metavar="RUN")
    parser.add_argument("destination", help="a new folder", type=Path, metavar="DESTINATION")
    parser.add_argument("--onnx", help="also model.onnx (needs onnx and onnxscript)", action="store_true")
    return _run(parser, argv, _export)


def _export(arguments: argparse.Namespace) -> None:
    from . import saved

    print(f"Written to {saved.export(arguments.run, arguments.destination, arguments.onnx)}")


def report_main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m objkern report", description="Writes a run's report.html and curves.png anew."
    )
    parser.add_argument("run", help="folder of a run", type=Path, metavar="RUN")
    return _run(parser, argv, _report)


def _report(arguments: argparse.Namespace) -> None:
    from . import reports

    reports.facts_of(arguments.run)  # no run, no picture
    reports.write_curves(arguments.run)
    print(f"Written to {reports.write_report(arguments.run)}")


def _run(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, command: Callable[[argparse.Namespace], None]
) -> int:
    arguments = parser.parse_args(argv)
    try:
        require_finetune_extra()
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()  # what is wrong is said in one line
        command(arguments)
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {first_line(error)}\n")
    return 0
