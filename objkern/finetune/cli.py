"""`python -m objkern finetune`: token classification with an objective given as a formula."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import objkern

from .config import add_arguments, config_from
from .corpus import TAGS
from .extras import require_finetune_extra
from .report import epoch_table, score_table
from .run import load_splits, model_folder, prepare, run

NAME = "training"


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, tests, saves; returns 0. Bad options exit with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m objkern finetune",
        description="Fine-tune a model to find the names of code in the prose of Python's manual.",
        epilog="Writes every step and epoch (JSON lines) and the model with its tokenizer (safetensors).",
    )
    parser.add_argument(
        "--objective",
        default="CrossEntropy()",
        metavar="FORMULA",
        help='such as "CrossEntropy(label_smoothing=0.1) + 1e-4*ZLoss() - 0.01*Entropy()" (%(default)s)',
    )
    add_arguments(parser, output="runs/finetune")
    arguments = parser.parse_args(argv)
    try:
        require_finetune_extra()
        config = config_from(arguments)
        objective = objkern.parse(arguments.objective)
        # One row now, so that a formula that needs more than logits and a target doesn't fail after the loading.
        objective(torch.zeros(1, len(TAGS)), torch.zeros(1, dtype=torch.long))
        prepare(config, load_splits(config))
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")

    print(f"objective: {objective}", flush=True)
    result = run(config, objective, NAME)
    print(f"model: {result.parameters:,} parameters, on {result.device}, {result.seconds:.1f} s")
    print(f"\n{epoch_table(result.training)}\n\nTest split:\n{score_table(result.test)}")
    print(f"\nWritten to {config.output}: {NAME}.jsonl, {model_folder(config).name}/")
    return 0
