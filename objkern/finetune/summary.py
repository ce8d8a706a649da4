"""The demo's summary as JSON: what ran, on what, and what came out."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

import objkern

from .comparison import Check
from .config import FinetuneConfig
from .corpus import Sentence
from .extras import FINETUNE_EXTRA
from .metrics import Score, count_entities
from .run import RunResult
from .scale import Measurement


def save_summary(
    config: FinetuneConfig,
    command: str,
    splits: dict[str, list[Sentence]],
    baseline: Score,
    runs: Sequence[RunResult],
    scale: Sequence[Measurement],
    checks: Sequence[Check],
) -> None:
    """Writes `summary.json`; the steps themselves are in the runs' JSON lines."""
    versions = {"python": platform.python_version(), "objkern": objkern.__version__, "torch": torch.__version__}
    summary = {
        "command": command,
        "config": asdict(config) | {"output": str(config.output), "learning_rate": config.peak_learning_rate},
        "versions": versions | {package: version(package) for package in FINETUNE_EXTRA},
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "corpus": {
            split: {"sentences": len(part), "entities": count_entities(sentence.tags for sentence in part)}
            for split, part in splits.items()
        },
        "baseline": asdict(baseline),
        "runs": [_without_steps(asdict(run)) for run in runs],
        "scale": [asdict(measurement) for measurement in scale],
        "checks": [asdict(check) for check in checks],
        "passed": all(check.holds for check in checks),
    }
    with open(config.output / "summary.json", "w", encoding="utf-8") as file:
        json.dump(_without_nan(summary), file, indent=2, allow_nan=False)
        file.write("\n")


def _without_steps(run: dict[str, Any]) -> dict[str, Any]:
    return run | {"training": {name: value for name, value in run["training"].items() if name != "steps"}}


def _without_nan(value: Any) -> Any:
    # JSON has no NaN: what was not measured is null.
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
