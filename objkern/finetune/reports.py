"""A run as a picture and as a page: curves.png and report.html, from the files that the run wrote.

    metrics.jsonl ──▶ curves.png ──┐
    run.json, result.json ─────────┴──▶ report.html    one file, without scripts, that needs no network

The page is for a colleague who was not there. What a run has not written, because it was interrupted or its task has no
such thing, is left out.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .record import METRICS, NUMBER, SCORE, encodable, read_json, records_of
from .whole import whole_file

Record = dict[str, Any]
RUN, RESULT, CURVES, REPORT = "run.json", "result.json", "curves.png", "report.html"
_SCORES = {str: SCORE}
_RUN = {
    **dict.fromkeys(("name", "task", "model", "objective", "command"), str), "options": {}, "untrained": _SCORES,
    "versions": {}, "git": {"commit": str, "dirty": bool},
}  # fmt: skip
_RESULT = {
    "how": str, "best_epoch": int, "steps": int, "seconds": NUMBER, "device": str, "parameters": int,
    "trained_parameters": int, "untrained": _SCORES, "dev": _SCORES, "test": _SCORES, "table": [[object]],
    "confusion": [[int]], "classes": [object], "samples": [{}],
}  # fmt: skip
_NO_SHARES = ("loss", "perplexity", "mse", "mae")  # metrics that need an axis of their own


def facts_of(folder: Path) -> tuple[Record, Record]:
    """run.json and result.json of a run's folder; empty where it has none.

    Raises:
        ValueError: there is no run in this folder, or one of the two can't be read, or is not what a run writes.
    """
    if not (folder / RUN).exists() and not (folder / METRICS).exists():
        raise ValueError(f"run: expected a run's folder, with {RUN}, but {folder} has none")
    run, result = (
        read_json(folder / name, "run", shape) if (folder / name).exists() else {}
        for name, shape in ((RUN, _RUN), (RESULT, _RESULT))
    )
    return run, {"untrained": run.get("untrained"), **result}


def terms_of(formula: str) -> list[tuple[str, str, str]]:
    """(coefficient, term, the eager line that it equals) of every term; none of a formula that can't be parsed."""
    import objkern

    try:
        weighted = objkern.parse(formula).weighted_terms
    except (TypeError, ValueError):  # custom terms, coefficients that are tensors
        return []
    lines = [(type(term).__doc__ or "").strip().splitlines() or [""] for _, term in weighted]
    return [
        (f"{float(c):g}", term._formula_name(), doc[0].replace("``", ""))
        for (c, term), doc in zip(weighted, lines, strict=True)
    ]


def number(value: Any) -> str:
    """As tables show it: 0.8731, 1,024, 5e-05, and a dash for what is not there."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return json.dumps(value, ensure_ascii=False, default=str)
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.1f} s"


# ---- the picture ----------------------------------------------------------------------------------------------------


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place."""
    found, total = [], 0.0
    for end, value in enumerate(values):
        total += value - (values[end - window] if end >= window else 0.0)
        found.append(total / min(end + 1, window))
    return found


def write_curves(folder: Path) -> Path:
    """Writes curves.png: loss, parts, rate and gradient by step, faint as they are and smoothed; dev by epoch."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ValueError("curves: need matplotlib: pip install matplotlib") from error

    records = records_of(folder)
    steps, epochs = ([r for r in records if r["event"] == event] for event in ("step", "epoch"))
    names = _names(steps, ("seconds", "rows"))
    ends = [name for name in ("learning_rate", "gradient_norm") if name in names]
    begins = ["total"] if "total" in names else []
    middle = [name for name in names if name not in (*begins, *ends)]
    panels = [(name, steps, [name]) for name in (*begins, *middle, *ends)]
    dev = [name for name in _names(epochs) if name.startswith("dev_")]
    shares = [name for name in dev if name.removeprefix("dev_") not in _NO_SHARES]
    panels += [(name, epochs, [name]) for name in dev if name not in shares]
    panels += [("dev" if len(shares) > 1 else shares[0], epochs, shares)] if shares else []

    columns = min(4, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, 2.9 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, some, names) in zip(axes.flat, panels, strict=False):
        is_epoch = some is epochs
        for name in names:
            points = [(r["epoch" if is_epoch else "step"], r[name]) for r in some if r.get(name) is not None]
            if not points:
                continue
            x, y = zip(*points, strict=True)
            label = _in_a_picture(name.removeprefix("dev_"))
            if is_epoch:
                axis.plot(x, y, marker="o", markersize=4, label=label)
            elif name == "learning_rate" or name.startswith("coefficient_"):  # nothing in them is noise
                axis.plot(x, y, label=label)
            else:
                axis.plot(x, y, alpha=0.25, linewidth=1, color="C0")
                axis.plot(x, smoothed(y, max(2, min(50, len(y) // 10))), color="C0", label=label)
        axis.set_title(_in_a_picture(title), fontsize=10)
        axis.set_xlabel("epoch" if is_epoch else "step", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
        if len(names) > 1:
            axis.legend(fontsize=8)
    path = folder / CURVES
    try:
        with whole_file(path) as new:
            figure.savefig(new, dpi=110, format="png")
    finally:
        pyplot.close(figure)
    return path


def _in_a_picture(name: str) -> str:
    """Words that matplotlib draws as they are: dollars begin a formula there, and lone surrogates have no glyph."""
    return encodable(name.replace("_", " ").replace("$", r"\$"))


def _names(records: Iterable[Record], left_out: Sequence[str] = ()) -> list[str]:
    """Every name that some record has, in the order in which they come."""
    names = dict.fromkeys(name for record in records for name in record)
    return [name for name in names if name not in ("event", "step", "epoch", *left_out)]


# ---- the page -------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --text: #1c2330; --faint: #5d6675; --line: #d9dee6; --page: #ffffff; --card: #f5f7fa;
  --accent: 37 99 235; --good: #157f3b; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ef; --faint: #9aa4b2; --line: #343b47; --page: #14171c;
  --card: #1d2229; --accent: 96 150 255; --good: #5fd38a; --bad: #ff8a7a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 68rem;
  margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p, .faint { color: var(--faint); } .faint { font-size: .87em; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem 1rem; }
.tile b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; color: var(--faint); } td:first-child, th:first-child { text-align: left; }
table.text td, table.text th { text-align: left; overflow-wrap: anywhere; white-space: pre-line; }
table.confusion td { text-align: center; border: 1px solid var(--line); min-width: 2.6rem; }
table.confusion td:first-child { text-align: right; } table.confusion small { display: block; color: var(--faint); }
.good { color: var(--good); } .bad { color: var(--bad); }
.word { display: inline-block; margin-right: .35em; } .word sub { font-size: .72em; font-weight: 600; }
pre, code { font: .87em/1.5 ui-monospace, monospace; } pre { background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; padding: .7rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0; }
img { max-width: 100%; background: #fff; border-radius: .5rem; border: 1px solid var(--line); }
"""


def write_report(folder: Path) -> Path:
    """Writes report.html, of whatever the run has written so far; draws the curves where they are not drawn yet."""
    run, result = facts_of(folder)
    records = records_of(folder)
    epochs = [record for record in records if record["event"] == "epoch"]
    if records and not (folder / CURVES).exists():
        write_curves(folder)
    name, curves = str(run.get("name") or folder.name), folder / CURVES
    sections = [
        _head(name, run, result),
        section("Objective", _objective(run)),
        section("Metrics", _metrics(result)),
        _by_class(result.get("table")),
        section("Confusion", _confusion(result.get("confusion"), result.get("classes") or [])),
        section("Curves", picture_of(curves.read_bytes(), "curves of the run") if curves.exists() else ""),
        section("Samples", _samples(result.get("samples") or [])),
        section("Epochs", _epochs(epochs, result.get("best_epoch"))),
        section("Data", _pairs(run.get("data"))),
        section("Options", _pairs(run.get("options"))),
        section("Made by", _made_by(run)),
    ]
    path = folder / REPORT
    write_page(path, name, "".join(sections))
    return path


def write_page(path: Path, title: str, body: str) -> None:
    """A page that needs nothing else, whole or not at all."""
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
    with whole_file(path) as new:
        new.write_text(page, encoding="utf-8", errors="replace")  # a lone surrogate in the data is no reason to fail


def section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}\n" if body else ""


def _cell(value: Any, tag: str = "td") -> str:
    return f"<{tag}>{escape(number(value))}</{tag}>"


def table_of(head: Sequence[Any], rows: Iterable[Sequence[Any]], kind: str = "") -> str:
    """Nothing where there are no rows."""
    lines = [f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows]
    if not lines:
        return ""
    heads = f"<tr>{''.join(_cell(str(word).replace('_', ' '), 'th') for word in head)}</tr>" if head else ""
    return f'<div class="wide"><table class="{kind}">\n{heads}\n' + "\n".join(lines) + "\n</table></div>"


def _by_class(table: Sequence[Sequence[Any]] | None) -> str:
    """By class or entity, as the table's first head says."""
    return section(f"By {table[0][0]}", table_of(table[0], table[1:])) if table and table[0] else ""


def _head(name: str, run: Record, result: Record) -> str:
    facts = [run.get("task"), run.get("model"), data_in_words(run)]
    line = " · ".join(escape(number(fact)) for fact in facts if fact)
    how = result.get("how")
    state = [f"{how}" if how else "not finished: what follows is of the part that is done"]
    if result.get("best_epoch"):
        state.append(f"best epoch {result['best_epoch']}")
    state += [f"{result['steps']:,} steps"] if result.get("steps") else []
    state += [duration(result["seconds"])] if result.get("seconds") else []
    if result.get("parameters"):
        trained = result.get("trained_parameters") or result["parameters"]
        state.append(f"{result['parameters']:,} parameters, of which {trained:,} trained")
    state += [f"on {result['device']}"] if result.get("device") else []
    before = result.get("untrained") or {}
    split = "test" if result.get("test") else "dev"
    tiles = [
        f'<div class="tile"><span class="faint">{escape(split)} {escape(metric.replace("_", " "))}</span>'
        f"<b>{escape(number(value))}</b>"
        + (f'<span class="faint">untrained {escape(number(before[metric]))}</span>' if metric in before else "")
        + "</div>"
        for metric, value in (result.get(split) or {}).items()
    ]
    return (
        f"<h1>{escape(name)}</h1>\n<p>{line}<br>{escape(', '.join(state))}</p>\n"
        + (f'<div class="tiles">{"".join(tiles)}</div>\n' if tiles else "")
    )  # fmt: skip


def data_in_words(run: Record) -> str:
    """Where the rows come from, and how many there are: "reviews.jsonl (train 900, dev 100)"."""
    data, asked = run.get("data"), run.get("options") or {}
    if not isinstance(data, Mapping):
        return str(data or "")
    counts = ", ".join(f"{name} {number(count)}" for name, count in data.items() if isinstance(count, int))
    source = asked.get("train") or data.get("train")
    if not isinstance(source, str):
        return counts
    return f"{source} ({counts})" if counts else source


def _objective(run: Record) -> str:
    if not run.get("objective"):
        return ""
    formula = str(run["objective"])
    terms = table_of(("coefficient", "term", "equals"), terms_of(formula), "text")
    return f"<pre>{escape(formula)}</pre>\n{terms}"


def _metrics(result: Record) -> str:
    splits = [split for split in ("untrained", "dev", "test") if result.get(split)]
    names = dict.fromkeys(name for split in splits for name in result[split])
    return table_of(
        ("metric", *splits),
        [[name.replace("_", " "), *(result[split].get(name) for split in splits)] for name in names],
    )


def _confusion(counts: Sequence[Sequence[int]] | None, classes: Sequence[str]) -> str:
    """True classes down, predicted ones across; the shade is the share of the row."""
    if not counts:
        return ""
    names = [escape(str(classes[k] if k < len(classes) else k)) for k in range(len(counts))]
    lines = ["<tr><th>true \\ predicted</th>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"]
    for name, row in zip(names, counts, strict=True):
        total = sum(row)
        cells = []
        for count in row:
            share = count / total if total else 0.0
            shade = f' style="background: rgb(var(--accent) / {0.6 * share:.2f})"' if count else ""
            cells.append(f"<td{shade}>{count:,}<small>{100 * share:.0f}%</small></td>")
        lines.append(f"<tr><td>{name}</td>{''.join(cells)}</tr>")
    return '<div class="wide"><table class="confusion">\n' + "\n".join(lines) + "\n</table></div>"


def picture_of(png: bytes, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'


def _samples(samples: Sequence[Record]) -> str:
    """What went in, the truth and the answer, green or red."""
    lines = []
    for sample in samples:
        given = sample.get("input", "")
        words = given.get("words") if isinstance(given, Mapping) else None
        truth, answer = sample.get("truth"), sample.get("predicted")
        if words and all(isinstance(part, list) for part in (words, truth, answer)) and (
            len(words) == len(truth) == len(answer)
        ):  # fmt: skip
            cells = [_tagged(words, truth, truth), _tagged(words, answer, truth)]
            lines.append(f"<tr><td>{cells[0]}</td><td>{cells[1]}</td></tr>")
            continue
        answered = f'<td class="{_judged(truth, answer)}">{escape(_text(answer))}</td>'
        lines.append(f"<tr><td>{escape(_short(_text(given)))}</td><td>{escape(_text(truth))}</td>{answered}</tr>")
    if not lines:
        return ""
    heads = ("truth", "predicted") if all(line.count("<td") == 2 for line in lines) else ("input", "truth", "predicted")
    head = "".join(f"<th>{word}</th>" for word in heads)
    return f'<div class="wide"><table class="text">\n<tr>{head}</tr>\n' + "\n".join(lines) + "\n</table></div>"


def _judged(truth: Any, answer: Any) -> str:
    """Whether an answer is right; nothing of numbers, which are only near, and where no truth is known."""
    if truth is None or isinstance(answer, float):
        return ""
    texts = truth.get("text") if isinstance(truth, Mapping) else None
    rights = (texts or [""]) if isinstance(texts, list) else [truth]
    return "good" if _in_order(answer) in map(_in_order, rights) else "bad"


def _in_order(answer: Any) -> str:
    """An answer to be compared; labels in any order are the same ones."""
    return str(sorted(map(str, answer)) if isinstance(answer, list) else answer)


def _tagged(words: Sequence[str], tags: Sequence[Any], truth: Sequence[Any]) -> str:
    """Every word with its tag, but for O; a word without one is red where it ought to have one."""
    found = []
    for word, tag, right in zip(words, tags, truth, strict=True):
        kind = "good" if tag == right else "bad"
        mark = "" if tag == right == "O" else f'<sub class="{kind}">{escape(str(tag))}</sub>'
        found.append(f'<span class="word">{escape(str(word))}{mark}</span>')
    return "".join(found)


def _text(value: Any) -> str:
    """As a reader wants it: of an answer in a text its words alone, of several columns each with its name."""
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        value = value["text"]
    if isinstance(value, Mapping):
        named = len(value) > 1
        return "\n".join(f"{name}: {_text(item)}" if named else _text(item) for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "(none)"
    return number(value)


def _short(text: str, most: int = 800) -> str:
    return text if len(text) <= most else f"{text[:most]} …"


def _epochs(epochs: Sequence[Record], best: int | None) -> str:
    names = [name for name in _names(epochs, ("rows", "learning_rate")) if name != "seconds"]
    heads = ["epoch", "step", *names, "seconds"]
    rows = [
        [f"{record['epoch']}{' (best)' if record['epoch'] == best else ''}", *(record.get(name) for name in heads[1:])]
        for record in epochs
    ]
    return table_of(heads, rows)


def _pairs(values: Any) -> str:
    """Names and values, those of groups within under `group.name`."""
    return table_of((), _flat(values), "text") if isinstance(values, Mapping) else ""


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        value = f"{value:g}" if isinstance(value, float) else value  # as it was given
        found += _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else [(f"{before}{name}", value)]
    return found


def _made_by(run: Record) -> str:
    command = f"<pre>{escape(run['command'])}</pre>\n" if run.get("command") else ""
    facts = {name: run[name] for name in ("time", "git", "machine", "versions") if run.get(name)}
    return command + _pairs(facts)
