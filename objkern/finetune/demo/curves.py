"""A picture of the two runs: loss, parts, dev F1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .comparison import Trained

PARTS = ("cross_entropy", "z_loss", "entropy")
STYLES = ("-", "--")  # two equal curves can be seen as two


def smooth(values: Sequence[float], window: int = 20) -> list[float]:
    """Mean of the last `window` values at each place."""
    return [sum(part) / len(part) for end in range(1, len(values) + 1) if (part := values[max(0, end - window) : end])]


def save_curves(runs: Sequence[Trained], path: Path) -> None:
    """Writes a PNG; the first run is drawn solid, the second dashed over it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss, *parts, f1) = pyplot.subplots(1, 2 + len(PARTS), figsize=(20, 4), layout="constrained")
    for run, style in zip(runs, STYLES, strict=True):
        loss.plot(smooth(run.losses), style, label=run.name)
        for axis, part in zip(parts, PARTS, strict=True):
            axis.plot(smooth([step[part] for step in run.steps]), style, label=run.name)
        numbers = [epoch["epoch"] for epoch in run.epochs]
        f1.plot(numbers, [100 * epoch["dev_f1"] for epoch in run.epochs], style, marker="o", label=run.name)
    for axis, title in zip((loss, *parts, f1), ("loss (mean of 20 steps)", *PARTS, "dev F1, %"), strict=True):
        axis.set_title(title.replace("_", " "))
        axis.set_xlabel("epoch" if axis is f1 else "step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
