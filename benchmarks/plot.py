"""Draws docs/images/linearity.svg, time over the number of logits, and linear-memory.svg, memory over the rows."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .figures import Entry, beyond_gradients, slope
from .tables import of_kind

IMAGES = Path(__file__).parent.parent / "docs" / "images"
STYLES = {"eager": "#a0a0a0", "objkern, plain": "#1f4e79", "objkern, regularized": "#c0504d"}
LARGE = 4e6  # logits: from here on the slope is fitted; below, the cost of a call shows
SWEEPS = {"rows": "rows grow, 32000 classes", "classes": "classes grow, 1024 rows"}


def points(entries: list[Entry], sweep: str, name: str) -> list[tuple[int, float]]:
    """(Number of logits, median seconds)."""
    chosen = [entry for entry in of_kind(entries, "linearity") if entry["sweep"] == sweep]
    return sorted((entry["rows"] * entry["classes"], entry["seconds"][name][1]) for entry in chosen)


def slopes(entries: list[Entry]) -> dict[str, dict[str, float]]:
    """Exponents of time ~ size, contestant by sweep, for the large sizes."""
    found = {}
    for name in STYLES:
        large = {sweep: [point for point in points(entries, sweep, name) if point[0] >= LARGE] for sweep in SWEEPS}
        found[name] = {sweep: slope(*zip(*chosen, strict=True)) for sweep, chosen in large.items() if len(chosen) > 1}
    return found


class Plot(NamedTuple):
    """An image of the entries of one kind."""

    name: str
    kind: str
    panels: int
    paint: Callable[[Any, list[Entry]], None]  # onto the panels of a figure

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
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib.figure import Figure

        style = {
            "svg.hashsalt": self.name, "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"], "font.size": 8,
            "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#808080", "axes.linewidth": 0.6,
            "axes.titlesize": 8, "axes.titlelocation": "left", "lines.linewidth": 1.2, "legend.frameon": False,
            "legend.fontsize": 7, "xtick.color": "#404040", "ytick.color": "#404040",
        }  # fmt: skip
        with mpl.rc_context(style):
            figure = Figure(figsize=(6.8, 2.8), layout="constrained")
            self.paint(figure.subplots(1, self.panels, sharey=True, squeeze=False)[0], of_kind(entries, self.kind))
            output = io.StringIO()
            figure.savefig(output, format="svg", metadata={"Date": None, "Creator": None})
        text = re.sub(r"[ \t]+$", "", output.getvalue(), flags=re.MULTILINE)
        return text.rstrip() + f"\n<!-- {self.fingerprint(entries)} -->\n"


def paint_linearity(panels: Any, entries: list[Entry]) -> None:
    for axes, (sweep, title) in zip(panels, SWEEPS.items(), strict=True):
        for name, color in STYLES.items():
            drawn = points(entries, sweep, name)
            axes.loglog(
                [size for size, _ in drawn], [1e3 * seconds for _, seconds in drawn],
                marker="o", markersize=3, color=color, label=name,
                linestyle=(0, (4, 1.5)) if "regularized" in name else "-",
            )  # fmt: skip
        axes.set_title(title)
        axes.set_xlabel("logits, rows × classes")
        axes.grid(color="#e8e8e8", linewidth=0.6)
    panels[0].set_ylabel("forward and backward, ms")
    panels[0].legend(loc="best")


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


PLOTS = {
    "linearity": Plot("linearity", "linearity", 2, paint_linearity),
    "linear memory law": Plot("linear-memory", "linear memory law", 2, paint_memory),
}
