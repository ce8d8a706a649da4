"""Results files: a header and one benchmark a line, small enough to commit and to read. No torch."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

SCHEMA = 3  # benchmarks/README.md says what is in a file
READ = (2, 3)  # 2: without `times`, so that it can be shown but not compared
RESULTS = Path(__file__).parent / "results"


def path(header: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Named by machine, date and what is special about the allocator; a number follows where there is one already."""
    machine = header["machine"]
    words = [machine["cpu"], f"{machine['threads']}-threads", *(["kept-pages"] if machine["keeps_pages"] else [])]
    name = re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower().replace("(r)", "").replace("(tm)", "")).strip("-")
    stem = f"{header['datetime'][:10]}-{name}"
    names = (f"{stem}{f'-{number}' if number > 1 else ''}.json" for number in itertools.count(1))
    return next(folder / name for name in names if not (folder / name).exists())


def write(path: Path, result: dict[str, Any]) -> None:
    """Floats with four digits; one line for each entry, so that a diff shows which ones changed."""
    head = json.dumps({key: value for key, value in rounded(result).items() if key != "entries"}, indent=1)
    lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in rounded(result["entries"]))
    path.write_text(f'{head.removesuffix("}").rstrip()},\n "entries": [\n{lines}\n]}}\n', encoding="utf-8")


def load(folder: Path = RESULTS) -> list[tuple[Path, dict[str, Any]]]:
    """The results files, newest first; those of GPUs have a form and a page of their own (benchmarks/gpu)."""
    paths = [path for path in folder.glob("*.json") if not path.name.startswith("gpu-")]
    files = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    for path, result in files:
        check(path, result)
    return sorted(files, key=lambda file: (file[1]["datetime"], file[0].name), reverse=True)


def read(path: Path) -> dict[str, Any]:
    """One results file.

    Raises:
        SystemExit: there is none, or it is none.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SystemExit(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SystemExit(f"{path}: no results file, for it is not JSON: {error}") from None
    check(path, result)
    return result


def check(path: Path, result: Any) -> None:
    schema = result.get("schema", 1) if isinstance(result, dict) else None
    whole = schema in READ and isinstance(result.get("entries"), list) and isinstance(result.get("machine"), dict)
    if not whole:
        raise SystemExit(
            f"{path}: this results file has schema {schema} and the report reads {' and '.join(map(str, READ))}: "
            "record it anew with make bench, or delete it"
        )


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
