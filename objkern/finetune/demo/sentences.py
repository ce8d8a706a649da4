"""Sentences for the terminal, with their entities marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..metrics import extract_spans
from .corpus import Sentence


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

    def names(spans: set[Any]) -> str:
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
