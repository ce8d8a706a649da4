"""Span-level precision, recall and F1 of BIO tags, as the CoNLL script and seqeval's default mode count them.

A predicted entity is right when its kind, its first word and its last word are all right; half an entity is nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """One entity: words `start` to `end` (exclusive) of a sentence."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class Score:
    """Precision, recall and F1 (0 where there is nothing to divide by) and the number of true entities."""

    precision: float
    recall: float
    f1: float
    support: int


def extract_spans(tags: Sequence[str]) -> list[Span]:
    """Entities of one sentence, `["B-x", "I-x", "O"]` → `[Span("x", 0, 2)]`.

    B- always opens an entity. I- continues one of its own kind and opens one otherwise (after O, at the start, after
    another kind): a model is not punished twice for a wrong first tag. Every other tag closes what is open.
    """
    spans: list[Span] = []
    kind, start = None, 0
    for position, tag in enumerate((*tags, "O")):  # the sentinel closes an entity that ends with the sentence
        prefix, _, tag_kind = tag.partition("-")
        if prefix == "I" and tag_kind == kind:
            continue
        if kind is not None:
            spans.append(Span(kind, start, position))
        kind, start = (tag_kind, position) if prefix in ("B", "I") else (None, 0)
    return spans


def count_entities(sentences: Iterable[Sequence[str]]) -> int:
    """Number of entities in these tag lists."""
    return sum(len(extract_spans(tags)) for tags in sentences)


def score_spans(truth: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> dict[str, Score]:
    """Scores by kind, sorted, then `"micro"`: all entities pooled. Both arguments hold one tag list per sentence."""
    found: dict[str, list[int]] = {}  # kind → [right, predicted, true]
    for sentence, (true_tags, predicted_tags) in enumerate(zip(truth, predicted, strict=True)):
        if len(true_tags) != len(predicted_tags):
            raise ValueError(
                f"sentence {sentence} has {len(true_tags)} true tags and {len(predicted_tags)} predicted ones"
            )
        true_spans, predicted_spans = set(extract_spans(true_tags)), set(extract_spans(predicted_tags))
        for column, spans in enumerate((true_spans & predicted_spans, predicted_spans, true_spans)):
            for span in spans:
                found.setdefault(span.kind, [0, 0, 0])[column] += 1
    scores = {kind: _score(*found[kind]) for kind in sorted(found)}
    scores["micro"] = _score(*(sum(counts[column] for counts in found.values()) for column in range(3)))
    return scores


def _score(right: int, predicted: int, true: int) -> Score:
    precision = right / predicted if predicted else 0.0
    recall = right / true if true else 0.0
    f1 = 2 * right / (predicted + true) if predicted + true else 0.0
    return Score(precision, recall, f1, true)
