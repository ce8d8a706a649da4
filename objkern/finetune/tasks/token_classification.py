"""A tag for every word: names, parts of speech. Entities are scored as seqeval and the CoNLL script count them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..data import Column, Row, is_texts
from ..metrics import score_spans
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
    metric = "f1"

    def labels_of(self, rows: Sequence[Row]) -> list[str]:
        """The tags of training, and both of a kind of which only one occurs: B- and I-."""
        tags = {tag for row in rows for tag in row["tags"]}
        kinds = {tag[2:] for tag in tags if tag[:2] in ("B-", "I-")}
        tags |= {f"{prefix}-{kind}" for kind in kinds for prefix in "BI"}
        # O first, then the kinds, B- before I-: the order in which tables are read.
        return sorted(tags, key=lambda tag: (tag != "O", tag.partition("-")[2] or tag, tag))

    def examples(self, rows: Sequence[Row], source: str = "data") -> list[Example]:
        for number, row in enumerate(rows, 1):
            tags = row.get("tags")
            if tags is None:
                continue
            if len(tags) != len(row["words"]):
                raise ValueError(
                    f"{source}, row {number}, column 'tags': expected {len(row['words'])} tags, one for every word, "
                    f"but got {len(tags)}"
                )
            for tag in tags:
                if tag not in self.labels:
                    raise ValueError(f"{source}, row {number}, column 'tags': {tag!r} does not occur in training")
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
            found.append(Example(self.inputs_of(encoding, k), labels, k, starts))
        return found

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
        scores = score_spans(truth, predicted)
        pairs = [pair for a, b in zip(truth, predicted, strict=True) for pair in zip(a, b, strict=True)]
        micro = scores["micro"]
        metrics = {"f1": micro.f1, "precision": micro.precision, "recall": micro.recall,
                   "accuracy": sum(a == b for a, b in pairs) / max(1, len(pairs))}  # fmt: skip
        table: list[list[Any]] = [["entity", "precision", "recall", "f1", "entities"]]
        table += [[kind, score.precision, score.recall, score.f1, score.support] for kind, score in scores.items()]
        return Evaluation(metrics, table)
