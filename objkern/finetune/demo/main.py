"""`make demo`: trains a small encoder with a fused objective and with the same formula in plain torch, and compares.

Act 1 finds the names of code in the prose of Python's manual; act 2 takes the same objective to logits of
language-model size. Exits with 1 if the two don't agree.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..data import Row
from ..extras import require_finetune_extra
from ..metrics import count_entities, score_spans
from ..small import SmallModel
from ..tables import cell, mebibytes, percent, table
from ..training import TrainingOptions
from .baseline import most_frequent_tags
from .comparison import Trained, check_accuracy, check_agreement, check_learning, comparison_table
from .corpus import Sentence, load_corpus
from .curves import save_curves
from .native import Native, fused_objective
from .scale import measure, scale_table
from .sentences import judge, mark_entities, pick_sentences

LARGE = (1024, 32_000)  # rows, classes
LARGE_QUICK = (64, 4_000)
TRAINING = TrainingOptions(epochs=14, patience=5, learning_rate=1e-3)
MODEL = SmallModel(hidden_size=128, layers=3, heads=4, dropout=0.3)
QUICK_SENTENCES = 160  # of each split


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; 0 if every check holds, 1 if not; bad options exit with 2."""
    arguments = _parser().parse_args(argv)
    command = ["python", "-m", "objkern.finetune.demo", *(sys.argv[1:] if argv is None else argv)]
    try:
        require_finetune_extra()
        from ..record import check_writable, provenance, write_json
        from ..run import RunOptions, device_of

        training, sizes = TRAINING, MODEL
        if arguments.quick:
            training = replace(training, epochs=2)
            sizes = replace(sizes, hidden_size=64, layers=2, heads=2, vocabulary=1000)
        options = RunOptions(
            task="token-classification", train="Python's manual", output=arguments.output, device=arguments.device,
            new_model=sizes, training=replace(training, seed=arguments.seed),
        )  # fmt: skip
        device = device_of(options.device)
        check_writable(arguments.output, 2**28)
    except (ImportError, ValueError) as error:
        print(f"python -m objkern.finetune.demo: error: {error}", file=sys.stderr)
        return 2
    (arguments.output / "summary.json").unlink(missing_ok=True)  # an old one would speak for a run that fails
    sentences = {split: part[: QUICK_SENTENCES if arguments.quick else None] for split, part in load_corpus().items()}

    heading("Act 1: find the names of code in the prose of Python's manual")
    print(corpus_table(sentences))
    truth = [sentence.tags for sentence in sentences["test"]]
    baseline = score_spans(truth, most_frequent_tags(sentences["train"], sentences["test"]))["micro"]
    objective = fused_objective()
    print(f"\nobjective: {objective}", flush=True)

    # Each in a process of its own, so that neither warms up or fills memory for the other.
    rows = {split: rows_of(part) for split, part in sentences.items()}
    fused = in_own_process(train_one, options, rows, objective, "fused", command)
    print(f"model: {fused.result['parameters']:,} parameters, on {fused.result['device']}")
    print(f"\nFused:\n{epochs_table(fused)}", flush=True)
    native = in_own_process(train_one, options, rows, Native(), "native", command)
    print(f"\nNative, the same formula in plain torch:\n{epochs_table(native)}")

    header, *by_kind = fused.result["table"]
    print(f"\nTest split, fused:\n{table(header, [[cell(value) for value in row] for row in by_kind])}")
    print(
        f"For comparison: F1 {percent(fused.result['untrained']['f1'])} before training, {percent(baseline.f1)} by "
        "giving every word its most frequent tag in the train split."
    )
    print(f"\nFused against native, seed {arguments.seed}:\n{comparison_table(fused, native)}")
    print("\nThe saved model on sentences it has never seen, [entity|kind]:")
    show_predictions(arguments.output / "fused" / "model", sentences["test"])

    rows_, classes = LARGE_QUICK if arguments.quick else LARGE
    heading(f"Act 2: the same objective, forward and backward, on {rows_} x {classes} float32 logits")
    scale = measure(device, rows_, classes, compiled=not arguments.quick)
    print(scale_table(scale))
    print(f"Extra peak: above what was in use before the call; the gradient alone is {mebibytes(4 * rows_ * classes)}.")
    print("Errors: relative, against the native formula in float64.")

    heading("Checks")
    checks = [*check_agreement(fused, native), *check_accuracy(scale[0])]
    if not arguments.quick:  # the quick run is too short to learn anything
        checks.append(check_learning(fused, baseline))
    print(*checks, sep="\n")
    save_curves([fused, native], arguments.output / "curves.png")
    passed = all(check.holds for check in checks)
    write_json(arguments.output / "summary.json", {
        **provenance(command), "shell": shlex.join(command), "sentences": {k: len(v) for k, v in sentences.items()},
        "baseline": asdict(baseline), "runs": {run.name: run.result for run in (fused, native)},
        "scale": [asdict(measurement) for measurement in scale], "checks": [asdict(check) for check in checks],
        "passed": passed,
    })  # fmt: skip
    print(f"\nWritten to {arguments.output}: curves.png, summary.json; fused/ and native/ with report.html and model/")
    return 0 if passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m objkern.finetune.demo",
        description="Fine-tune a small encoder twice on the same task, with a fused objective and with the same "
        "formula in plain torch, and see whether they learn the same; then compare both on logits of language-model "
        "size. `python -m objkern finetune` is the same loop for your own data.",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, dropout and order (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny run of some seconds: does everything work?")
    return parser


def rows_of(sentences: Sequence[Sentence]) -> list[Row]:
    return [{"words": list(sentence.words), "tags": list(sentence.tags)} for sentence in sentences]


def train_one(options: Any, splits: dict[str, list[Row]], objective: Any, name: str, command: Sequence[str]) -> Trained:
    """One of the two runs, in the place of an earlier one of that name."""
    from ..run import run

    folder = options.output / name
    shutil.rmtree(folder, ignore_errors=True)
    run(replace(options, output=folder), command=command, objective=objective, splits=splits)
    return Trained.read(folder)


def in_own_process(function: Callable[..., Trained], *arguments: Any) -> Trained:
    """The function's result from a fresh interpreter; its exceptions come back too."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def heading(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}\n", flush=True)


def corpus_table(splits: dict[str, list[Sentence]]) -> str:
    rows = []
    for split, sentences in splits.items():
        words = sum(len(sentence.words) for sentence in sentences)
        entities = count_entities(sentence.tags for sentence in sentences)
        rows.append([split, str(len(sentences)), str(words), str(entities)])
    return table(["split", "sentences", "words", "entities"], rows)


def epochs_table(run: Trained) -> str:
    """One row per epoch: the means over its steps of every part that the objective gave, then the dev scores."""
    parts = [name for name in ("total", "cross_entropy", "z_loss", "entropy", "accuracy") if name in run.epochs[0]]
    header = ["epoch", *(name.replace("_", " ") for name in parts), "dev P", "dev R", "dev F1", "seconds"]
    rows = []
    for epoch in run.epochs:
        best = "*" if epoch["epoch"] == run.result["best_epoch"] else ""
        scores = [percent(epoch[f"dev_{name}"]) for name in ("precision", "recall", "f1")]
        values = [f"{epoch[name]:.4f}" for name in parts]
        rows.append([f"{epoch['epoch']}{best}", *values, *scores, f"{epoch['seconds']:.1f}"])
    return table(header, rows) + "\n(* the best epoch, whose weights are kept)"


def show_predictions(folder: Path, sentences: list[Sentence]) -> None:
    from transformers.utils import logging

    from ..saved import load

    logging.disable_progress_bar()  # it would stand among the sentences
    model, task = load(folder)
    chosen = pick_sentences(sentences, 3)
    for sentence, tags in zip(chosen, task.predict(model, rows_of(chosen)), strict=True):
        print(f"  {mark_entities(sentence, tags)}\n      {judge(sentence, tags)} (topic {sentence.topic!r})")
