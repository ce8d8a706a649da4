"""What the terminal shows: tables, and sentences with their entities marked."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .corpus import Sentence
from .loop import Training
from .metrics import Score, extract_spans

STATISTICS = ("total", "cross_entropy", "z_loss", "entropy", "accuracy", "target_probability", "rows")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text columns: the first one to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def epoch_table(training: Training) -> str:
    """One row per epoch: the means over its steps of every part that the objective gave, then the dev scores."""
    parts = [name for name in STATISTICS if name in training.epochs[0]]
    header = ["epoch", *(name.replace("_", " ") for name in parts), "dev P", "dev R", "dev F1", "seconds"]
    rows = []
    for number, epoch in enumerate(training.epochs, start=1):
        best = "*" if number == training.best_epoch else ""
        scores = [percent(epoch[f"dev_{name}"]) for name in ("precision", "recall", "f1")]
        values = [f"{epoch[name]:.0f}" if name == "rows" else f"{epoch[name]:.4f}" for name in parts]
        rows.append([f"{number}{best}", *values, *scores, f"{epoch['seconds']:.1f}"])
    return table(header, rows) + "\n(* the best epoch, whose weights are kept)"


def score_table(scores: dict[str, Score]) -> str:
    """Precision, recall and F1 in percent, and the number of true entities, by kind and for all together."""
    rows = [
        [
            "all (micro)" if kind == "micro" else kind,
            percent(score.precision),
            percent(score.recall),
            percent(score.f1),
            str(score.support),
        ]
        for kind, score in scores.items()
    ]
    return table(["entity", "precision", "recall", "F1", "support"], rows)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def mebibytes(size: float) -> str:
    return "not measured" if math.isnan(size) else f"{size / 2**20:.0f} MiB"


def mark_entities(sentence: Sentence, tags: Sequence[str]) -> str:
    """The sentence with every entity in brackets: `Use [len()|builtin] here.`"""
    text, end = "", 0
    for kind, first, last in extract_spans(tags):
        start = sentence.offsets[first][0]
        text += sentence.text[end:start]
        end = sentence.offsets[last - 1][1]
        text += f"[{sentence.text[start:end]}|{kind}]"
    return text + sentence.text[end:]


def judge(sentence: Sentence, tags: Sequence[str]) -> str:
    """Which entities of the sentence are right, missed and invented."""
    true, predicted = set(extract_spans(sentence.tags)), set(extract_spans(tags))

    def names(spans: set) -> str:
        return ", ".join(
            f"[{sentence.text[sentence.offsets[start][0] : sentence.offsets[end - 1][1]]}|{kind}]"
            for kind, start, end in sorted(spans, key=lambda span: span.start)
        )

    verdict = f"{len(true & predicted)} of {len(true)} right"
    verdict += f"; missed {names(true - predicted)}" if true - predicted else ""
    return verdict + (f"; wrong {names(predicted - true)}" if predicted - true else "")


def pick_sentences(sentences: Sequence[Sentence], count: int) -> list[Sentence]:
    """The first sentences worth a look, by what they are and not by how they went: two kinds, short, one to a topic."""
    chosen: dict[str, Sentence] = {}
    for sentence in sentences:
        kinds = {span.kind for span in extract_spans(sentence.tags)}
        if len(kinds) >= 2 and len(sentence.text) <= 160:
            chosen.setdefault(sentence.topic, sentence)
    return list(chosen.values())[:count]
