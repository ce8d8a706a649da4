"""What the terminal shows of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_NOT_SHOWN = ("event", "score", "epoch", "step", "seconds", "learning_rate", "gradient_norm")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text columns: the first one to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def epoch_table(record: dict[str, Any]) -> str:
    """One line for an epoch: the means of the objective's parts, and the scores on dev."""
    values = [f"{name.removeprefix('dev_')} {value:.4g}" for name, value in record.items() if name.startswith("dev_")]
    parts = [
        f"{name.replace('_', ' ')} {value:.4g}"
        for name, value in record.items()
        if name not in _NOT_SHOWN and not name.startswith(("dev_", "coefficient_"))
    ]
    return f"epoch {record['epoch']}, {record['seconds']:.1f} s: {', '.join(parts)}; on dev: {', '.join(values)}"


def metric_table(result: dict[str, Any]) -> str:
    """The scores of the untrained and the trained model, and by class or kind where there is such a table."""
    splits = [name for name in ("untrained", "dev", "test") if name in result]
    names = list(dict.fromkeys(name for split in splits for name in result[split]))
    text = table(["", *splits], [[name, *(cell(result[split].get(name)) for split in splits)] for name in names])
    if result.get("table"):
        header, *rows = result["table"]
        text += f"\n\n{table([str(name) for name in header], [[cell(value) for value in row] for row in rows])}"
    return text


def cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def mebibytes(size: float) -> str:
    return "not measured" if math.isnan(size) else f"{size / 2**20:.0f} MiB"


def first_line(error: BaseException) -> str:
    """What an error says in one line; its kind where it says nothing."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def reason(error: BaseException) -> str:
    """The same without the name of a file, for who says that already: "No space left on device"."""
    return getattr(error, "strerror", None) or first_line(error)
