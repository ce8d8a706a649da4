"""A tag for every word. Entities are scored as seqeval and the CoNLL script count them; tags that mark none, such as
parts of speech, one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..data import Column, Row, is_texts, number_of, where
from ..metrics import extract_spans, score_sets, score_spans
from .task import IGNORED, Evaluation, Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TokenClassification(Task):
    """The first sub-word of a word carries its tag. A word that truncation cuts off is predicted as O."""

    name = "token-classification"
    about = "a tag for every word, such as B-person, I-person, O"
    columns = (
        Column("words", lambda value: is_texts(value) and len(value) > 0, "a list of words"),
        Column("tags", is_texts, "a list of tags, one for every word"),
    )
    auto_model = "AutoModelForTokenClassification"
    classes = "tags"

    @property
    def metric(self) -> str:  # type: ignore[override]
        return "f1" if self.marks_entities else "accuracy"

    @property
    def marks_entities(self) -> bool:
        """Whether a tag could be part of an entity: B-person, and not NOUN."""
        return any(extract_spans([tag]) for tag in self.labels)

    def labels_of(self, rows: Sequence[Row], source: str) -> list[str]:
        """The tags of training, and both of a kind of which only one occurs: B- and I-."""
        tags = {tag for row in rows for tag in row["tags"]}
        kinds = {tag[2:] for tag in tags if tag[:2] in ("B-", "I-")}
        tags |= {f"{prefix}-{kind}" for kind in kinds for prefix in "BI"}
        # O first, then the kinds, B- before I-: the order in which tables are read.
        return sorted(tags, key=lambda tag: (tag != "O", tag.partition("-")[2] or tag, tag))

    def examples(self, rows: Sequence[Row], source: str = "data") -> list[Example]:
        for k, row in enumerate(rows):
            if row.get("tags") is not None:
                self._check_tags(row, f"{where(rows, k, source)}, column 'tags'")
        encoding = self.tokenizer(
            [list(row["words"]) for row in rows], is_split_into_words=True, truncation=True, max_length=self.max_length
        )
        places = {tag: k for k, tag in enumerate(self.labels)}
        found = []
        for k, row in enumerate(rows):
            labels, starts, before = [], [], None
            for place, word in enumerate(encoding.word_ids(k)):
                begins = word is not None and word != before
                labels.append(places[row["tags"][word]] if begins and row.get("tags") is not None else IGNORED)
                if begins:
                    starts.append((word, place))
                before = word
            found.append(Example(self.inputs_of(encoding, k), labels, k, [number_of(rows, k)], starts))
        if any(row.get("tags") is not None for row in rows) and not any(map(self.count, found)):
            raise ValueError(f"{source}: nothing is left to learn: no word has a token")
        return found

    def _check_tags(self, row: Row, field: str) -> None:
        tags, words = row["tags"], row["words"]
        if len(tags) != len(words):
            raise ValueError(f"{field}: expected {len(words)} tags, one for every word, but got {len(tags)}")
        for tag in tags:
            if tag not in self.labels:
                raise ValueError(f"{field}: {tag!r} does not occur in training")

    def predict(self, model: PreTrainedModel, rows: Sequence[Row], batch_size: int = 32) -> list[Any]:
        tags = [["O"] * len(row["words"]) for row in rows]
        bare = [{"words": row["words"]} for row in rows]
        for some, outputs in self.outputs(model, self.examples(bare), batch_size):
            best = outputs.logits.argmax(-1).tolist()  # (B, T)
            for example, of_tokens in zip(some, best, strict=True):
                for word, place in example.about:
                    tags[example.row][word] = self.labels[of_tokens[place]]
        return tags

    def evaluate(self, rows: Sequence[Row], predicted: Sequence[Any]) -> Evaluation:
        truth = [row["tags"] for row in rows]
        pairs = [pair for a, b in zip(truth, predicted, strict=True) for pair in zip(a, b, strict=True)]
        metrics = {"accuracy": sum(a == b for a, b in pairs) / max(1, len(pairs))}
        if self.marks_entities:
            scores, heads = score_spans(truth, predicted), ("entity", "entities")
            micro = scores["micro"]
            metrics = {"f1": micro.f1, "precision": micro.precision, "recall": micro.recall, **metrics}
        else:
            by_tag, _ = score_sets([{a} for a, _ in pairs], [{b} for _, b in pairs])
            scores, heads = {tag: by_tag[tag] for tag in self.labels if tag in by_tag}, ("tag", "words")
        table: list[list[Any]] = [[heads[0], "precision", "recall", "f1", heads[1]]]
        table += [[kind, score.precision, score.recall, score.f1, score.support] for kind, score in scores.items()]
        return Evaluation(metrics, table)
