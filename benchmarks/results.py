"""Results files: a header and one benchmark a line, small enough to commit and to read. No torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

SCHEMA = 2
RESULTS = Path(__file__).parent / "results"


def path(header: dict[str, Any]) -> Path:
    """Named by machine, date and what is special about the allocator."""
    machine = header["machine"]
    words = [machine["cpu"], f"{machine['threads']}-threads", *(["kept-pages"] if machine["keeps_pages"] else [])]
    name = re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower().replace("(r)", "").replace("(tm)", "")).strip("-")
    return RESULTS / f"{header['datetime'][:10]}-{name}.json"


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
        if result.get("schema") != SCHEMA:
            raise SystemExit(
                f"{path}: this results file has schema {result.get('schema', 1)} and the report reads {SCHEMA}: "
                "record it anew with make bench, or delete it"
            )
    return sorted(files, key=lambda file: (file[1]["datetime"], file[0].name), reverse=True)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
