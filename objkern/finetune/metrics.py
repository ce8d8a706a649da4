"""Precision, recall and F1: of labels, and of the entities that BIO tags mark.

Entities are counted as the CoNLL script and seqeval's default mode count them: a predicted one is right when its kind,
its first word and its last word are all right; half an entity is nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Span(NamedTuple):
    """One entity: words `start` to `end` (exclusive) of a sentence."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class Score:
    """Precision, recall and F1 (0 where there is nothing to divide by) and the number of true ones."""

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
    true_spans, predicted_spans = [], []
    for sentence, (true_tags, predicted_tags) in enumerate(zip(truth, predicted, strict=True)):
        if len(true_tags) != len(predicted_tags):
            raise ValueError(
                f"sentence {sentence} has {len(true_tags)} true tags and {len(predicted_tags)} predicted ones"
            )
        true_spans.append(set(extract_spans(true_tags)))
        predicted_spans.append(set(extract_spans(predicted_tags)))
    scores, pooled = score_sets(true_spans, predicted_spans, lambda span: span.kind)
    return {**{kind: scores[kind] for kind in sorted(scores)}, "micro": pooled}


def score_sets(
    truth: Iterable[set[Any]], predicted: Iterable[set[Any]], kind_of: Callable[[Any], Hashable] = lambda found: found
) -> tuple[dict[Any, Score], Score]:
    """Scores by kind, and of all kinds pooled. Both arguments hold one set per row: of labels, of spans."""
    right: Counter[Any] = Counter()
    told: Counter[Any] = Counter()
    true: Counter[Any] = Counter()
    for a, b in zip(truth, predicted, strict=True):
        for counter, found in ((right, a & b), (told, b), (true, a)):
            counter.update(map(kind_of, found))
    scores = {kind: _score(right[kind], told[kind], true[kind]) for kind in (told | true)}
    return scores, _score(right.total(), told.total(), true.total())


NOTHING = Score(0.0, 0.0, 0.0, 0)  # of a kind that neither occurs nor is predicted


def _score(right: int, predicted: int, true: int) -> Score:
    precision = right / predicted if predicted else 0.0
    recall = right / true if true else 0.0
    f1 = 2 * right / (predicted + true) if predicted + true else 0.0
    return Score(precision, recall, f1, true)
