"""Rows of training data from files, folders and hubs, with errors that name the first bad row and field.

A source is one of

    train.jsonl, data.csv, data.tsv, data.parquet     a file; .json is a list of rows, an object that has one as its
                                                      "data", or rows line by line
    folder/                                           of files called train.*, validation.*, test.*, whole or in pieces
                                                      (train-00000-of-00002.*); or what `datasets.save_to_disk` wrote
    squad, "glue:mrpc"                                a name on a hub, with a configuration behind a colon

What a row must have is a task's business: it lists its columns, and `checked` holds rows against them. A row knows
where it was found: errors name it as its own file numbers it, whichever rows are held out or left away.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .tables import first_line

__all__ = ["Column", "read", "read_all"]

Row = dict[str, Any]

SPLITS = {"train": ("train", "training"), "dev": ("validation", "valid", "dev", "val"), "test": ("test", "testing")}
_NUMBERS = ("label",)  # columns of a table that may be numbers
_WHOLE = ""  # the name of what is one split by itself
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_PIECE = re.compile(r"-\d+-of-(?P<count>\d+)$")  # as hubs name the files of a split that has several


class FoundRow(dict[str, Any]):
    """A row that knows its source, and its number there, from 1 on."""

    __slots__ = ("number", "source")

    def __init__(self, row: Row, source: str, number: int) -> None:
        super().__init__(row)
        self.source, self.number = source, number


def number_of(rows: Sequence[Row], place: int) -> int:
    """The number of a row where it was found; of one that was made here, its place, from 1 on."""
    return getattr(rows[place], "number", place + 1)


def where(rows: Sequence[Row], place: int, source: str) -> str:
    """What errors call a row; `source` is that of rows that were made here."""
    return f"{getattr(rows[place], 'source', source)}, row {number_of(rows, place)}"


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


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and one of those that a float can be; True and False are none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # of a whole number with hundreds of digits
        return False


def read(source: str | Path, split: str = "train") -> list[Row]:
    """The rows of a split of a source; a file is a split by itself.

    Raises:
        ValueError: there is no such source or split, or a file cannot be read; it says which, and on which line.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from objkern.finetune.data import read
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "train.jsonl"
    ...     _ = path.write_text('{"text": "Where is my parcel?", "label": "complaint"}')
    ...     read(path)
    [{'text': 'Where is my parcel?', 'label': 'complaint'}]
    """
    parts = _parts_of(source)
    name = _name_in(parts, split, source)
    if name is None:
        raise _without(split, source, parts)
    return parts[name]()


def read_all(source: str | Path) -> dict[str, list[Row]]:
    """The rows of every split that a source has, of "train", "dev" and "test"; a file is "train".

    Raises:
        ValueError: as `read` does; and where there is nothing to train on.
    """
    parts = _parts_of(source)
    if _WHOLE in parts:
        return {"train": parts[_WHOLE]()}
    names = {split: _name_in(parts, split, source) for split in SPLITS}
    if names["train"] is None:
        raise _without("train", source, parts)
    return {split: parts[name]() for split, name in names.items() if name is not None}


Parts = dict[str, Callable[[], list[Row]]]  # what a source consists of, by its own names, read when called


def _name_in(parts: Parts, split: str, source: str | Path) -> str | None:
    """What the source calls the split; None where it has none."""
    found = [name for name in (_WHOLE, *SPLITS[split]) if name in parts]
    if len(found) > 1:
        raise ValueError(f"data: {str(source)!r}: expected one {split} split but got {' and '.join(found)}")
    return found[0] if found else None


def _without(split: str, source: str | Path, parts: Parts) -> ValueError:
    names, found, folder = " or ".join(SPLITS[split]), list(parts), Path(source)
    if folder.is_dir():
        names = f"{names} ({', '.join(_SUFFIXES)})"
        found = sorted(f"{file.name}/" if file.is_dir() else file.name for file in folder.iterdir())
    listed = ", ".join(found[:20]) + (", ..." if len(found) > 20 else "")
    return ValueError(
        f"data: {str(source)!r} has no {split} split: expected one called {names} but found {listed or 'nothing'}"
    )


def _parts_of(source: str | Path) -> Parts:
    path = Path(source)
    try:
        if path.is_file():
            return {_WHOLE: lambda: _rows_of_file(path)}
        if path.is_dir():
            return _parts_of_folder(path)
        if path.exists():
            raise ValueError(f"data: {str(source)!r}: expected a file or a folder but got a pipe or a device")
        if path.is_symlink():
            raise ValueError(f"data: {str(source)!r} is a link to {str(path.readlink())!r}, which does not exist")
    except OSError as error:
        raise ValueError(f"data: {str(source)!r} can't be read: {error.strerror}") from error
    if path.suffix in _SUFFIXES or path.is_absolute() or str(source).startswith("."):
        raise ValueError(f"data: {str(source)!r} does not exist")
    name, _, configuration = str(source).partition(":")
    return _parts_of_datasets(str(source), "load_dataset", name, *([configuration] if configuration else []))


def _parts_of_folder(folder: Path) -> Parts:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _parts_of_datasets(str(folder), "load_from_disk", folder)
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in _SUFFIXES and file.is_file():
            files.setdefault(_PIECE.sub("", file.stem), []).append(file)
    return {name: lambda pieces=pieces: _rows_of_pieces(pieces) for name, pieces in files.items()}


def _rows_of_pieces(files: Sequence[Path]) -> list[Row]:
    """The rows of a split: of its one file, or of the pieces that it was cut into."""
    found = {(file.suffix, int(piece["count"]) if (piece := _PIECE.search(file.stem)) else 1) for file in files}
    if found != {(files[0].suffix, len(files))}:
        names = " and ".join(file.name for file in files)
        raise ValueError(
            f"data: {files[0].parent}: expected one file for a split, or all of its pieces, but got {names}"
        )
    return [row for file in files for row in _rows_of_file(file)]


def _rows_of_file(path: Path) -> list[Row]:
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"data: {path}: expected a file ending in {', '.join(_SUFFIXES)}")
    try:
        if path.suffix == ".parquet":
            rows = _rows_of_parquet(path)
        elif path.suffix in (".csv", ".tsv"):
            rows = _rows_of_table(path)
        else:
            rows = _rows_of_json(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {path} is not UTF-8: {error}") from error
    except OSError as error:
        raise ValueError(f"data: {path} can't be read: {error.strerror}") from error
    return _found(rows, str(path))


def _found(rows: Iterable[Row], source: str) -> list[Row]:
    return [FoundRow(row, source, number) for number, row in enumerate(rows, 1)]


# ---- JSON -----------------------------------------------------------------------------------------------------------


def _rows_of_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json" and not _is_lines(text):
        return _rows_of_document(text, f"data: {path}")
    return list(rows_of_lines(text.split("\n"), f"data: {path}"))  # other line ends may stand within a text


def _is_lines(text: str) -> bool:
    """Whether it is rows line by line, and not one document: more follows the first line's value."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return first.startswith("{") and bool(rest.strip())


def _rows_of_document(text: str, source: str) -> list[Row]:
    found = _parsed(text, source)
    if isinstance(found, dict):
        found = found["data"] if isinstance(found.get("data"), list) else [found]
    if not isinstance(found, list):
        raise ValueError(f"{source}: expected a list of rows but got {_short(found)}")
    return [_object(row, f"{source}, row {number}") for number, row in enumerate(found, 1)]


def rows_of_lines(lines: Iterable[str], source: str) -> Iterator[Row]:
    """A row for every line of JSON that isn't blank; ValueErrors name the line."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _object(_parsed(line, source, number), f"{source}, line {number}")


def _object(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object with columns but got {str(row)[:60]!r}")
    return row


def _parsed(text: str, source: str, line: int = 1) -> Any:
    """What the text says, which begins on that line of the source."""
    try:
        return json.loads(text, object_pairs_hook=_object_of, parse_int=_whole_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}, line {line + error.lineno - 1}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"{source}, line {line}: expected brackets less deep within each other") from error
    except ValueError as error:
        raise ValueError(f"{source}, line {line}: {error}") from error


def _object_of(pairs: list[tuple[str, Any]]) -> Row:
    _check_names([name for name, _ in pairs])
    return dict(pairs)


def _check_names(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        ((name, count),) = Counter(names).most_common(1)
        raise ValueError(f"expected one {name!r} but got {count}")


def _whole_number(digits: str) -> int:
    try:
        return int(digits)
    except ValueError as error:  # more digits than Python reads
        raise ValueError(f"expected a number of some thousand digits at most but got {len(digits)}") from error


# ---- tables ---------------------------------------------------------------------------------------------------------


def _rows_of_table(path: Path) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # a cell may be a book
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            _check_names([name for name in reader.fieldnames or () if name])  # a table may end in empty columns
            rows = [_cells(row, len(reader.fieldnames or ())) for row in reader]
        except UnicodeDecodeError:
            raise
        except (csv.Error, ValueError) as error:
            raise ValueError(f"data: {path}, line {reader.line_num}: {error}") from error
    for name in _NUMBERS:
        _read_numbers(rows, name, str(path))
    return rows


def _cells(row: dict[Any, Any], width: int) -> Row:
    """Cells of a table are texts, and empty ones are none."""
    beyond = row.pop(None, [])
    if beyond or None in row.values():
        count = sum(value is not None for value in row.values()) + len(beyond)
        raise ValueError(f"expected the {width} columns of the first line but got {count}")
    return {name: value or None for name, value in row.items()}


_DECIMAL = re.compile(r"(?P<whole>-?(0|[1-9][0-9]*))(\.[0-9]+)?([eE][+-][0-9]{2,})?")  # 7, -0.5, 1e-05; not 007, 1e5


def _read_numbers(rows: Sequence[Row], column: str, source: str) -> None:
    """Makes a column numbers if every cell is one as programs write them; what means more to others stays a text."""
    cells = [(number, row[column]) for number, row in enumerate(rows, 1) if row.get(column) is not None]
    for number, cell in cells:
        if not _is_finite(cell):
            field = f"data: {source}, row {number}, column {column!r}"
            raise ValueError(f"{field}: expected a class or a finite number but got {_short(cell)}")
    matches = [_DECIMAL.fullmatch(cell) for _, cell in cells]
    if all(matches):
        for (number, cell), match in zip(cells, matches, strict=True):
            rows[number - 1][column] = int(cell) if match["whole"] == cell else float(cell)


def _is_finite(cell: str) -> bool:
    """False of nan, inf and numbers beyond every float; a text is no such thing."""
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return True


def _rows_of_parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"data: {path}: Parquet needs pyarrow: pip install pyarrow") from error
    try:
        return parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(f"data: {path}: {str(error).splitlines()[0]}") from error


def _parts_of_datasets(source: str, loader: str, *arguments: Any) -> Parts:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"data: {source!r} needs the package datasets: pip install datasets") from error
    try:
        found = getattr(datasets, loader)(*arguments)
    except Exception as error:  # of many kinds: no network, no such name, no such configuration
        what = f"datasets.{loader}: {type(error).__name__}: {first_line(error)}"
        raise ValueError(f"data: {source!r} can't be loaded by {what}") from error
    if isinstance(found, datasets.Dataset):
        return {_WHOLE: lambda: _found(_with_names(found), source)}
    return {
        name: lambda name=name, table=table: _found(_with_names(table), f"{source} ({name})")
        for name, table in found.items()
    }


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
        ValueError: there is none, or one has not; it names the first bad row and its field.
    """
    if not rows:
        raise ValueError(f"{source}: there are no rows")
    for place, row in enumerate(rows):
        for column in columns:
            if (problem := _problem(row, column)) is not None:
                raise ValueError(f"{where(rows, place, source)}, column {column.name!r}: expected {problem}")
    return rows


def _problem(row: Row, column: Column) -> str | None:
    """What was expected of a row's field, and what it has in its place; None where it is well."""
    value = row.get(column.name)
    if value is None and not column.needed:
        return None
    if value is None or not column.holds(value):
        have = f"got {_short(value)}" if column.name in row else f"there are only {_short(list(row))}"
        return f"{column.expected} but {have}"
    broken = next((text for text in _texts_in(value) if not _is_unicode(text)), None)
    return None if broken is None else f"whole characters but got half of one in {_short(broken)}"


def _texts_in(value: Any) -> Iterator[str]:
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list | tuple):
            left.extend(value.values() if isinstance(value, dict) else value)


def _is_unicode(text: str) -> bool:
    """Not of a lone surrogate, which JSON can escape and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
