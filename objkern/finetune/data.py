"""Rows of training data from files, folders and hubs, with errors that name the first bad row and field.

A source is one of

    train.jsonl, data.csv, data.tsv, data.parquet     a file; .json is a list of rows, or rows line by line
    folder/                                           of files called train.*, validation.*, test.*, or one that
                                                      `datasets.save_to_disk` wrote
    squad, "glue:mrpc"                                a name on a hub, with a configuration behind a colon

What a row must have is a task's business: it lists its columns, and `checked` holds rows against them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]

SPLITS = {"train": ("train", "training"), "dev": ("validation", "valid", "dev", "val"), "test": ("test", "testing")}
_NUMBERS = ("label",)  # columns of a table that may be numbers
_WHOLE = ""  # the name of what is one split by itself
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


class Column(NamedTuple):
    """A column that a task reads.

    Attributes:
        holds: whether a value is of the right kind.
        expected: what that is, for errors and for the help: "a text".
        needed: whether every row must have it.
    """

    name: str
    holds: Callable[[Any], bool]
    expected: str
    needed: bool = True


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(part, str) for part in value)


def read(source: str | Path, split: str = "train") -> list[Row]:
    """The rows of a split of a source; a file is a split by itself.

    Raises:
        ValueError: there is no such source or split, or a file cannot be read; it says which, and on which line.
    """
    parts = _parts_of(source)
    for name in (_WHOLE, *SPLITS[split]):
        if name in parts:
            return parts[name]()
    raise ValueError(
        f"data: {str(source)!r} has no {split} split: expected one called {' or '.join(SPLITS[split])} but found "
        f"{', '.join(parts) or 'none'}"
    )


def read_all(source: str | Path) -> dict[str, list[Row]]:
    """The rows of every split that a source has, of "train", "dev" and "test"; a file is "train".

    Raises:
        ValueError: as `read` does.
    """
    parts = _parts_of(source)
    if _WHOLE in parts:
        return {"train": parts[_WHOLE]()}
    first = {split: next((name for name in names if name in parts), None) for split, names in SPLITS.items()}
    return {split: parts[name]() for split, name in first.items() if name is not None}


def _parts_of(source: str | Path) -> dict[str, Callable[[], list[Row]]]:
    """What a source consists of, by its own names, read when called."""
    path = Path(source)
    if path.is_file():
        return {_WHOLE: lambda: list(_rows_of_file(path))}
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return _parts_of_datasets(str(path), "load_from_disk", path)
        files = [file for file in sorted(path.iterdir()) if file.suffix in _SUFFIXES]
        return {file.stem: lambda file=file: list(_rows_of_file(file)) for file in files}
    if path.suffix in _SUFFIXES or path.is_absolute() or str(source).startswith("."):
        raise ValueError(f"data: {str(source)!r} does not exist")
    name, _, configuration = str(source).partition(":")
    return _parts_of_datasets(str(source), "load_dataset", name, *([configuration] if configuration else []))


def _rows_of_file(path: Path) -> Iterator[Row]:
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"data: {path}: expected a file ending in {', '.join(_SUFFIXES)}")
    try:
        if path.suffix == ".parquet":
            yield from _rows_of_parquet(path)
        elif path.suffix in (".csv", ".tsv"):
            yield from _rows_of_table(path)
        else:
            yield from _rows_of_json(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8: {error}") from error
    except OSError as error:
        raise ValueError(f"data: {path} can't be read: {error.strerror}") from error


def _rows_of_json(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"data: {path}, line {error.lineno}: {error.msg}") from error
        yield from (_row(path, f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):  # other line ends may stand within a text
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"data: {path}, line {number}: {error.msg}") from error
        yield _row(path, f"line {number}", row)


def _row(path: Path, place: str, row: Any) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"data: {path}, {place}: expected an object with columns but got {str(row)[:60]!r}")
    return row


def _rows_of_table(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                beyond = row.pop(None, [])
                if beyond or None in row.values():
                    count = sum(value is not None for value in row.values()) + len(beyond)
                    raise ValueError(
                        f"data: {path}, line {reader.line_num}: expected the {len(reader.fieldnames)} columns of the "
                        f"first line but got {count}"
                    )
                yield {name: _number(value) if name in _NUMBERS else value or None for name, value in row.items()}
        except csv.Error as error:
            raise ValueError(f"data: {path}, line {reader.line_num}: {error}") from error


def _number(value: str) -> Any:
    """Cells of a table are texts; a label that is nothing but a number is one, as it is in every other format."""
    for kind in (int, float):
        try:
            return kind(value) if value == value.strip() and "_" not in value else value
        except ValueError:
            continue
    return value


def _rows_of_parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"data: {path}: Parquet needs pyarrow: pip install pyarrow") from error
    try:
        return parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(f"data: {path}: {str(error).splitlines()[0]}") from error


def _parts_of_datasets(source: str, loader: str, *arguments: Any) -> dict[str, Callable[[], list[Row]]]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"data: {source!r} needs the package datasets: pip install datasets") from error
    try:
        found = getattr(datasets, loader)(*arguments)
    except Exception as error:  # of many kinds: no network, no such name, no such configuration
        raise ValueError(f"data: {source!r} can't be loaded: {str(error).strip().splitlines()[0]}") from error
    if isinstance(found, datasets.Dataset):
        return {_WHOLE: lambda: _with_names(found)}
    return {name: lambda table=table: _with_names(table) for name, table in found.items()}


def _with_names(table: Any) -> list[Row]:
    """Rows of a dataset, whose class labels are the names that the dataset gives to its numbers."""
    rows = table.to_list()
    for column, feature in table.features.items():
        inner = getattr(feature, "feature", feature)  # of a sequence
        names = getattr(inner, "names", None)
        if not names:
            continue
        for row in rows:
            value = row[column]
            row[column] = [_name(names, k) for k in value] if isinstance(value, list) else _name(names, value)
    return rows


def _name(names: Sequence[str], number: int | None) -> str | None:
    """None where there is no label, for which datasets have −1 as well."""
    return None if number is None or number < 0 else names[number]


def checked(rows: Sequence[Row], columns: Iterable[Column], source: str = "data") -> Sequence[Row]:
    """The rows, if every one has what a task needs.

    Raises:
        ValueError: there is none, or one has not; it names the first bad row, from 1 on, and its field.
    """
    if not rows:
        raise ValueError(f"{source}: there are no rows")
    for number, row in enumerate(rows, 1):
        for column in columns:
            value = row.get(column.name)
            if value is None and not column.needed:
                continue
            if value is None or not column.holds(value):
                have = f"got {_short(value)}" if column.name in row else f"there are only {', '.join(map(str, row))}"
                raise ValueError(
                    f"{source}, row {number}, column {column.name!r}: expected {column.expected} but {have}"
                )
    return rows


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
