"""`make demo`: fine-tunes a small BERT with a fused objective and with the same formula in plain torch, and compares.

Act 1 finds the names of code in the prose of Python's manual; act 2 takes the same objective to logits of
language-model size. Exits with 1 if the two don't agree.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from .baseline import most_frequent_tags
from .comparison import check_accuracy, check_agreement, check_learning, comparison_table
from .config import FinetuneConfig, add_arguments, config_from
from .corpus import Sentence
from .curves import save_curves
from .extras import require_finetune_extra
from .metrics import count_entities, score_spans
from .native import fused_objective, native_objective
from .report import epoch_table, judge, mark_entities, mebibytes, percent, pick_sentences, score_table, table
from .run import RunResult, load_splits, model_folder, predict_with_saved, prepare, run
from .scale import measure, scale_table
from .summary import save_summary

LARGE = (1024, 32_000)  # rows, classes
LARGE_QUICK = (64, 4_000)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; 0 if every check holds, 1 if not; bad options exit with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m objkern.finetune.demo",
        description="Fine-tune a small BERT twice on the same task, with a fused objective and with the same formula "
        "in plain torch, and see whether they learn the same; then compare both on logits of language-model size.",
        epilog="Writes curves (PNG), every step and epoch (JSON lines), a summary (JSON) and the model (safetensors).",
    )
    add_arguments(parser, output="runs/demo")
    arguments = parser.parse_args(argv)
    try:
        require_finetune_extra()
        config = config_from(arguments)
        splits = load_splits(config)
        prepare(config, splits)
    except (ImportError, ValueError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")

    heading("Act 1: find the names of code in the prose of Python's manual")
    print(corpus_table(splits))
    truth = [sentence.tags for sentence in splits["test"]]
    baseline = score_spans(truth, most_frequent_tags(splits["train"], splits["test"]))["micro"]
    objective = fused_objective()
    print(f"\nobjective: {objective}", flush=True)

    # Each in a process of its own, so that neither warms up or fills memory for the other.
    fused = in_own_process(run, config, objective, "fused", True)
    print(f"model: {fused.parameters:,} parameters, on {fused.device}")
    print(f"\nFused:\n{epoch_table(fused.training)}", flush=True)
    native = in_own_process(run, config, native_objective, "native", False)
    print(f"\nNative, the same formula in plain torch:\n{epoch_table(native.training)}")

    print(f"\nTest split, fused:\n{score_table(fused.test)}")
    print(
        f"For comparison: F1 {percent(fused.untrained.f1)} before training, {percent(baseline.f1)} by giving every ",
        end="",
    )
    print("word its most frequent tag in the train split.")
    print(f"\nFused against native, seed {config.seed}:\n{comparison_table(fused, native)}")
    print("\nThe saved model on sentences it has never seen, [entity|kind]:")
    show_predictions(config, splits["test"])

    rows, classes = LARGE_QUICK if arguments.quick else LARGE
    heading(f"Act 2: the same objective, forward and backward, on {rows} x {classes} float32 logits")
    scale = measure(config.torch_device, rows, classes, compiled=not arguments.quick)
    print(scale_table(scale))
    print(f"Extra peak: above what was in use before the call; the gradient alone is {mebibytes(4 * rows * classes)}.")
    print("Errors: relative, against the native formula in float64.")

    heading("Checks")
    checks = [*check_agreement(fused, native), *check_accuracy(scale[0])]
    if not arguments.quick:  # the quick run is too short to learn anything
        checks.append(check_learning(fused, baseline))
    print(*checks, sep="\n")
    save_curves([fused, native], config.output / "curves.png")
    command = shlex.join(["python", "-m", "objkern.finetune.demo", *(sys.argv[1:] if argv is None else argv)])
    save_summary(config, command, splits, baseline, [fused, native], scale, checks)
    files = ("curves.png", "fused.jsonl", "native.jsonl", "summary.json", f"{model_folder(config).name}/")
    print(f"\nWritten to {config.output}: {', '.join(files)}")
    return 0 if all(check.holds for check in checks) else 1


def in_own_process(function: Callable[..., RunResult], *arguments: Any) -> RunResult:
    """The function's result from a fresh interpreter; its exceptions come back too."""
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


def show_predictions(config: FinetuneConfig, sentences: list[Sentence]) -> None:
    chosen = pick_sentences(sentences, 3)
    for sentence, tags in zip(chosen, predict_with_saved(config, chosen), strict=True):
        print(f"  {mark_entities(sentence, tags)}\n      {judge(sentence, tags)} (topic {sentence.topic!r})")


if __name__ == "__main__":
    sys.exit(main())
