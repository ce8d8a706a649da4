"""Plots of a run: for docs/images as SVG that says what it was drawn from, and for a folder as SVG and PNG."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .figures import Entry, beyond_gradients, of_copy, slope
from .tables import logits_bytes, of_kind

IMAGES = Path(__file__).parent.parent / "docs" / "images"
STYLES = {"eager": "#a0a0a0", "objkern, plain": "#1f4e79", "objkern, regularized": "#c0504d"}
LARGE = 4e6  # logits: from here on the slope is fitted; below, the cost of a call shows
SWEEPS = {
    "rows": "rows grow, 32000 classes", "classes": "classes grow, 1024 rows",
    "widest": "rows grow, 262144 classes, bfloat16: past 2³¹",
}  # fmt: skip


def points(entries: list[Entry], sweep: str, name: str) -> list[tuple[int, float]]:
    """(Number of logits, median seconds)."""
    chosen = [e for e in of_kind(entries, "linearity") if e["sweep"] == sweep and name in e["seconds"]]
    return sorted((entry["rows"] * entry["classes"], entry["seconds"][name][1]) for entry in chosen)


def slopes(entries: list[Entry]) -> dict[str, dict[str, float]]:
    """Exponents of time ~ size, contestant by sweep, for the large sizes."""
    found = {}
    for name in STYLES:
        large = {sweep: [point for point in points(entries, sweep, name) if point[0] >= LARGE] for sweep in SWEEPS}
        found[name] = {sweep: slope(*zip(*chosen, strict=True)) for sweep, chosen in large.items() if len(chosen) > 1}
    return found


class Plot(NamedTuple):
    """An image of the entries of one kind.

    Attributes:
        table: the title of the table that it illustrates.
        panels: how many, for the entries; 0: they make no image.
    """

    name: str
    table: str
    kind: str
    panels: Callable[[list[Entry]], int]
    paint: Callable[[Any, list[Entry]], None]  # onto the panels of a figure
    shared: bool = True  # the vertical axis

    @property
    def path(self) -> Path:
        return IMAGES / f"{self.name}.svg"

    def fingerprint(self, entries: list[Entry]) -> str:
        """Of what is drawn and how. It stands in the image, which so can be checked without drawing it anew."""
        data = json.dumps(of_kind(entries, self.kind), sort_keys=True) + Path(__file__).read_text(encoding="utf-8")
        return hashlib.sha256(data.encode()).hexdigest()

    def is_current(self, entries: list[Entry]) -> bool:
        return self.path.exists() and f"<!-- {self.fingerprint(entries)} -->" in self.path.read_text(encoding="utf-8")

    def draw(self, entries: list[Entry]) -> str:
        """The image as text, the same for the same measurements (and the same matplotlib)."""
        output = io.StringIO()
        self._save(entries, output, format="svg", metadata={"Date": None, "Creator": None})
        text = re.sub(r"[ \t]+$", "", output.getvalue(), flags=re.MULTILINE)
        return text.rstrip() + f"\n<!-- {self.fingerprint(entries)} -->\n"

    def png(self, entries: list[Entry]) -> bytes:
        output = io.BytesIO()
        self._save(entries, output, format="png", dpi=160, metadata={"Software": None})
        return output.getvalue()

    def _save(self, entries: list[Entry], output: Any, **options: Any) -> None:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib.figure import Figure

        style = {
            "svg.hashsalt": self.name, "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"], "font.size": 8,
            "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#808080", "axes.linewidth": 0.6,
            "axes.titlesize": 8, "axes.titlelocation": "left", "lines.linewidth": 1.2, "legend.frameon": False,
            "legend.fontsize": 7, "xtick.color": "#404040", "ytick.color": "#404040",
        }  # fmt: skip
        chosen = of_kind(entries, self.kind)
        with mpl.rc_context(style):
            panels = self.panels(chosen)
            figure = Figure(figsize=(max(3.6, 3.4 * panels), 2.8), layout="constrained", facecolor="white")
            self.paint(figure.subplots(1, panels, sharey=self.shared, squeeze=False)[0], chosen)
            figure.savefig(output, **options)


def save(entries: list[Entry], folder: Path) -> list[Plot]:
    """Every plot that the entries make, as NAME.svg and NAME.png."""
    drawn = drawable(entries)
    for one in drawn:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{one.name}.svg").write_text(one.draw(entries), encoding="utf-8")
        (folder / f"{one.name}.png").write_bytes(one.png(entries))
    return drawn


def sweeps_of(entries: list[Entry]) -> list[str]:
    return [sweep for sweep in SWEEPS if any(entry["sweep"] == sweep for entry in entries)]


def paint_linearity(panels: Any, entries: list[Entry]) -> None:
    for axes, sweep in zip(panels, sweeps_of(entries), strict=True):
        for name, color in STYLES.items():
            if drawn := points(entries, sweep, name):
                axes.loglog(
                    [size for size, _ in drawn], [1e3 * seconds for _, seconds in drawn],
                    marker="o", markersize=3, color=color, label=name,
                    linestyle=(0, (4, 1.5)) if "regularized" in name else "-",
                )  # fmt: skip
        axes.set_title(SWEEPS[sweep])
        axes.set_xlabel("logits, rows × classes")
        axes.grid(color="#e8e8e8", linewidth=0.6)
    panels[0].set_ylabel("forward and backward, ms")
    panels[0].legend(loc="best")


def paint_memory_over_classes(panels: Any, entries: list[Entry]) -> None:
    (axes,) = panels
    chosen = sorted(entries, key=lambda entry: entry["classes"])
    classes = [entry["classes"] for entry in chosen]
    for name, color in (("eager", STYLES["eager"]), ("objkern", STYLES["objkern, regularized"])):
        axes.plot(classes, [entry["bytes"][name][1] / 1e6 for entry in chosen], marker="o", markersize=3, color=color,
                  label=name)  # fmt: skip
    axes.plot(classes, [logits_bytes(entry) / 1e6 for entry in chosen], color="#808080", linestyle=(0, (1, 2)),
              label="the gradient alone")  # fmt: skip
    axes.set_xlabel(f"classes, of {chosen[0]['rows']} rows in {chosen[0]['dtype']}")
    axes.set_ylabel("MB that a step adds")
    axes.set_ylim(bottom=0)
    axes.grid(color="#e8e8e8", linewidth=0.6)
    axes.legend(loc="best")


def with_copy(entries: list[Entry]) -> list[Entry]:
    return [entry for entry in entries if "copy" in entry["ratio"] and entry["workload"] == "plain"]


def paint_ceiling(panels: Any, entries: list[Entry]) -> None:
    """A bar for each shape: the bytes that objkern cannot avoid, per second, against those of a copy."""
    (axes,) = panels
    chosen = with_copy(entries)[::-1]
    medians = [100 * of_copy(entry)[1] for entry in chosen]
    axes.barh(range(len(chosen)), medians, color="#9dc3e6", height=0.7)
    for place, (entry, median) in enumerate(zip(chosen, medians, strict=True)):
        low, _, high = (100 * x for x in of_copy(entry))
        axes.plot([low, high], [place, place], color="#1f4e79", linewidth=1)
        axes.annotate(f"{median:.0f}", (1, place), va="center", fontsize=7, color="#1f4e79")
    axes.set_yticks(range(len(chosen)), [f"{e['rows']} × {e['classes']} {e['dtype']}" for e in chosen], fontsize=7)
    axes.axvline(100, color="#808080", linewidth=0.8)
    axes.set_xlabel("% of a copy's bytes per second")
    axes.set_ylim(-0.8, len(chosen) - 0.2)
    axes.figure.set_size_inches(5.0, 0.9 + 0.22 * len(chosen))


def paint_added_terms(panels: Any, entries: list[Entry]) -> None:
    for axes, entry in zip(panels, entries, strict=True):
        numbers = range(1, len(entry["terms"]) + 1)
        for name, color in (("eager", STYLES["eager"]), ("objkern", STYLES["objkern, regularized"])):
            drawn = [1e3 * entry["seconds"][f"{name}, {number}"][1] for number in numbers]
            axes.plot(list(numbers), drawn, marker="o", markersize=3, color=color, label=name)
        axes.set_xticks(list(numbers), entry["terms"], rotation=30, ha="right", fontsize=7)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{entry['rows']} × {entry['classes']} {entry['dtype']}")
        axes.set_ylabel("forward and backward, ms")
        axes.grid(color="#e8e8e8", linewidth=0.6)
        axes.legend(loc="best")


def paint_memory(panels: Any, entries: list[Entry]) -> None:
    """A line for each number of classes; dotted, what one tensor of all logits would take."""
    classes = sorted({entry["classes"] for entry in entries})
    for axes, name in zip(panels, ("objkern", "objkern, recompute"), strict=True):
        for number, color in zip(classes, ("#9dc3e6", "#2e75b6", "#1f4e79", "#c0504d"), strict=False):
            drawn = sorted((e["rows"], beyond_gradients(e, name) / 1e6) for e in entries if e["classes"] == number)
            rows = [n for n, _ in drawn]
            axes.loglog(rows, [size for _, size in drawn], marker="o", markersize=3, color=color, label=f"V = {number}")
            axes.loglog(rows, [4e-6 * n * number for n in rows], color=color, linestyle=(0, (1, 2)), linewidth=0.8)
        axes.set_title(name + "; dotted: float32 logits of all rows")
        axes.set_xlabel("rows")
        axes.grid(color="#e8e8e8", linewidth=0.6)
    panels[0].set_ylabel("MB beyond the gradients")
    panels[0].legend(loc="best")


PLOTS = {one.kind: one for one in (
    Plot("linearity", "Time over size", "linearity", lambda es: len(sweeps_of(es)), paint_linearity),
    Plot("added-terms", "One term more, and one more", "added terms", len, paint_added_terms, shared=False),
    Plot("ceiling", "Plain", "step", lambda es: min(1, len(with_copy(es))), paint_ceiling),
    Plot("memory", "Memory over the number of classes", "memory over classes", lambda es: min(1, len(es)),
         paint_memory_over_classes),
    Plot("linear-memory", "Memory of the fused linear path over the number of rows", "linear memory law",
         lambda es: 2, paint_memory),
)}  # fmt: skip


def drawable(entries: list[Entry]) -> list[Plot]:
    return [one for one in PLOTS.values() if (chosen := of_kind(entries, one.kind)) and one.panels(chosen)]
