"""Two runs that differ in the objective's implementation only: their table, and what must hold between them."""

from __future__ import annotations

from dataclasses import dataclass

from .metrics import Score
from .report import mebibytes, percent, table
from .run import RunResult
from .scale import Measurement

FIRST_STEPS = 50
LOSS_LIMIT = 1e-4  # relative, over the first steps; later on rounding differences grow, as between any two programs
F1_LIMIT = 0.005
ERROR_LIMIT = 1e-5  # relative to float64; float32 rounds at 6e-8


@dataclass(frozen=True)
class Check:
    """Something that must hold for the demo to count as passed."""

    claim: str
    measured: str
    holds: bool

    def __str__(self) -> str:
        return f"{'ok    ' if self.holds else 'FAILED'}  {self.claim}: {self.measured}"


def check_agreement(fused: RunResult, native: RunResult) -> list[Check]:
    """Both runs saw the same weights, batches and dropout masks, so what differs comes from the objective."""
    pairs = list(zip(fused.losses, native.losses, strict=False))[:FIRST_STEPS]
    difference = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    f1, native_f1 = fused.test["micro"].f1, native.test["micro"].f1
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


def check_learning(fused: RunResult, baseline: Score) -> Check:
    """A model that doesn't beat a table of words has learned nothing worth comparing."""
    f1 = fused.test["micro"].f1
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


def comparison_table(*runs: RunResult) -> str:
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
        micro = run.test["micro"]
        losses = [f"{run.losses[position]:.6f}" for position in (0, step - 1, -1)]
        scores = [percent(share) for share in (micro.precision, micro.recall, micro.f1)]
        times = [f"{run.seconds:.1f}", f"{1e3 * run.step_seconds:.1f}"]
        rows.append([run.name, *losses, str(run.training.best_epoch), *scores, *times, mebibytes(run.peak_bytes)])
    peak = (
        "highest of torch's allocator on the GPU"
        if runs[0].device.startswith("cuda")
        else "highest resident set of the run's own process, Python and libraries included"
    )
    return f"{table([*header, 'peak memory'], rows)}\nSeconds: training with its dev scores. Peak memory: {peak}."
