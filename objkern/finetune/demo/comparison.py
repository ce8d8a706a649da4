"""Two runs that differ in the objective's implementation only: their table, and what must hold between them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ..metrics import Score
from ..tables import mebibytes, percent, table
from .scale import Measurement

FIRST_STEPS = 50
LOSS_LIMIT = 1e-4  # relative, over the first steps; later on rounding differences grow, as between any two programs
F1_LIMIT = 0.005
ERROR_LIMIT = 1e-5  # relative to float64; float32 rounds at 6e-8


@dataclass(frozen=True)
class Trained:
    """One of the two runs, as its folder has it."""

    name: str
    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    result: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Trained:
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps, epochs = ([r for r in records if r["event"] == event] for event in ("step", "epoch"))
        return cls(folder.name, steps, epochs, json.loads((folder / "result.json").read_text(encoding="utf-8")))

    @property
    def losses(self) -> list[float]:
        return [step["total"] for step in self.steps]

    @property
    def step_seconds(self) -> float:
        return median(step["seconds"] for step in self.steps)


@dataclass(frozen=True)
class Check:
    """Something that must hold for the demo to count as passed."""

    claim: str
    measured: str
    holds: bool

    def __str__(self) -> str:
        return f"{'ok    ' if self.holds else 'FAILED'}  {self.claim}: {self.measured}"


def check_agreement(fused: Trained, native: Trained) -> list[Check]:
    """Both runs saw the same weights, batches and dropout masks, so what differs comes from the objective."""
    pairs = list(zip(fused.losses, native.losses, strict=False))[:FIRST_STEPS]
    difference = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    f1, native_f1 = fused.result["test"]["f1"], native.result["test"]["f1"]
    return [
        Check(
            f"loss over the first {len(pairs)} steps, fused against native, within {LOSS_LIMIT:.0e}",
            f"largest relative difference {difference:.1e}",
            difference <= LOSS_LIMIT,
        ),
        Check(
            f"test F1, fused against native, within {percent(F1_LIMIT)} points",
            f"{100 * f1:.2f} and {100 * native_f1:.2f}",
            abs(f1 - native_f1) <= F1_LIMIT,
        ),
    ]


def check_learning(fused: Trained, baseline: Score) -> Check:
    """A model that doesn't beat a table of words has learned nothing worth comparing."""
    f1 = fused.result["test"]["f1"]
    return Check(
        "test F1 above that of the most frequent tag of each word",
        f"{percent(f1)} against {percent(baseline.f1)}",
        f1 > baseline.f1,
    )


def check_accuracy(fused: Measurement) -> list[Check]:
    """The fused loss and gradient at language-model size against float64."""
    return [
        Check(
            f"fused {name} at language-model size, relative error within {ERROR_LIMIT:.0e}",
            f"{error:.1e}",
            error <= ERROR_LIMIT,
        )
        for name, error in (("loss", fused.loss_error), ("gradient", fused.gradient_error))
    ]


def comparison_table(*runs: Trained) -> str:
    """One row per run, with what is measured below."""
    step = min(FIRST_STEPS, len(runs[0].losses))
    header = [
        "objective",
        "loss, step 1",
        f"step {step}",
        "last",
        "best epoch",
        "test P",
        "R",
        "F1",
        "seconds",
        "ms/step",
    ]
    rows = []
    for run in runs:
        test = run.result["test"]
        losses = [f"{run.losses[position]:.6f}" for position in (0, step - 1, -1)]
        scores = [percent(test[name]) for name in ("precision", "recall", "f1")]
        times = [f"{run.result['seconds']:.1f}", f"{1e3 * run.step_seconds:.1f}"]
        rows.append(
            [
                run.name,
                *losses,
                str(run.result["best_epoch"]),
                *scores,
                *times,
                mebibytes(run.result["peak_bytes"] or math.nan),
            ]
        )
    peak = (
        "highest of torch's allocator on the GPU"
        if runs[0].result["device"].startswith("cuda")
        else "highest resident set of the run's own process, Python and libraries included"
    )
    return f"{table([*header, 'peak memory'], rows)}\nSeconds: training with its dev scores. Peak memory: {peak}."
