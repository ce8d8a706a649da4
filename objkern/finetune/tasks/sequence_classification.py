"""A class, several labels, or a number for a text or a pair of texts."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..data import Column, Row, is_number, is_text, is_texts, number_of, where
from ..metrics import NOTHING, score_sets
from .task import Batch, Evaluation, Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from objkern import Objective

CLASS, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"


_LABEL = "a class (text or whole number), a list of labels, or a fractional number (below 1e308)"


def _is_label(value: Any) -> bool:
    return is_text(value) or isinstance(value, bool) or is_number(value) or is_texts(value)


class SequenceClassification(Task):
    """The label decides: a text or whole number is a class, a list of texts several labels, a fraction a number."""

    name = "sequence-classification"
    about = "a class, several labels or a number for a text or a pair of texts"
    columns = (
        Column("text", is_text, "a text"),
        Column("text_pair", is_text, "a text", needed=False),
        Column("label", _is_label, _LABEL),
    )
    auto_model = "AutoModelForSequenceClassification"
    classes = "label"

    def __init__(self, *arguments: Any, problem: str | None = None, **options: Any) -> None:
        self.problem = problem
        super().__init__(*arguments, **options)
        self.problem = self.problem or CLASS

    @property
    def metric(self) -> str:  # type: ignore[override]
        return {CLASS: "accuracy", SEVERAL: "micro_f1", NUMBER: "r2"}[self.problem]

    def labels_of(self, rows: Sequence[Row], source: str) -> list[str]:
        """The labels, which say what the problem is where nobody has said it."""
        self.problem = self.problem or _problem(rows, source)
        if self.problem == NUMBER:
            return ["value"]
        if self.problem == SEVERAL:
            names = sorted({label for row in rows for label in row["label"]})
            if not names:
                raise ValueError(f"{source}, column 'label': expected a label in some row but every list is empty")
            return names
        labels = {row["label"] for row in rows}
        in_order = sorted(labels, key=lambda label: (isinstance(label, str), label))
        return list(dict.fromkeys(map(str, in_order)))  # 1 and "1" are one class

    def check(self, model: PreTrainedModel) -> None:
        if self.problem == CLASS and len(self.labels) < 2:
            raise ValueError(f"column 'label': expected at least two classes but every row has {self.labels[0]!r}")

    def formula(self) -> str:
        return {CLASS: "CrossEntropy()", SEVERAL: "BinaryCrossEntropy()", NUMBER: "MeanSquaredError()"}[self.problem]

    @property
    def elementwise(self) -> bool:
        return self.problem != CLASS

    def model_options(self) -> dict[str, Any]:
        return super().model_options() | {"problem_type": self.problem}

    def examples(self, rows: Sequence[Row], source: str = "data") -> list[Example]:
        pairs = [row.get("text_pair") for row in rows]
        if any(pairs) and not all(pairs):
            row = where(rows, next(k for k, pair in enumerate(pairs) if not pair), source)
            raise ValueError(f"{row}, column 'text_pair': expected a text, as other rows have one")
        texts = [row["text"] for row in rows]
        encoding = self.tokenizer(texts, *([pairs] if any(pairs) else []), truncation=True, max_length=self.max_length)
        return [
            Example(self.inputs_of(encoding, k), self._label(row.get("label"), where(rows, k, source)), k,
                    [number_of(rows, k)])
            for k, row in enumerate(rows)
        ]  # fmt: skip

    def _label(self, label: Any, row: str) -> Any:
        if label is None:  # a row to be predicted
            return None
        if self.problem == NUMBER:
            if not is_number(label):
                raise ValueError(f"{row}, column 'label': expected a number, as training has, but got {label!r}")
            return float(label)
        names = list(label) if self.problem == SEVERAL and is_texts(label) else [str(label)]
        for name in names:
            if name not in self.labels:
                raise ValueError(
                    f"{row}, column 'label': {name!r} does not occur in training, which has {', '.join(self.labels)}"
                )
        if self.problem == SEVERAL:
            return [float(name in names) for name in self.labels]
        return self.labels.index(names[0])

    def count(self, example: Example) -> int:
        return len(self.labels) if self.problem == SEVERAL else 1

    def reference(self, model: PreTrainedModel, batch: Batch) -> Any:
        logits = model(**batch.inputs).logits
        return logits.squeeze(-1) if self.problem == NUMBER else logits

    def collate(self, examples: Sequence[Example]) -> Batch:
        target = torch.tensor([example.label for example in examples])
        return Batch.of(examples, self.padded_inputs(examples), target, target.numel())

    def loss(
        self, model: PreTrainedModel, batch: Batch, objective: Objective, count: int | Tensor, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(**batch.inputs).logits
        logits = logits.squeeze(-1) if self.problem == NUMBER else logits
        return objective(logits, batch.target, normalizer=count, return_parts=True, **options)

    def predict(self, model: PreTrainedModel, rows: Sequence[Row], batch_size: int = 32) -> list[Any]:
        answers: list[Any] = [None] * len(rows)
        for some, outputs in self.outputs(model, self.examples([_unlabelled(row) for row in rows]), batch_size):
            for example, logits in zip(some, outputs.logits.float().cpu(), strict=True):
                if self.problem == NUMBER:
                    answers[example.row] = logits[0].item()
                elif self.problem == SEVERAL:
                    answers[example.row] = [self.labels[k] for k in (logits > 0).nonzero().flatten().tolist()]
                else:
                    answers[example.row] = self.labels[int(logits.argmax())]
        return answers

    def evaluate(self, rows: Sequence[Row], predicted: Sequence[Any]) -> Evaluation:
        from sklearn import metrics

        if self.problem == NUMBER:
            truth = [row["label"] for row in rows]
            found = {"mse": metrics.mean_squared_error(truth, predicted),
                     "mae": metrics.mean_absolute_error(truth, predicted),
                     "r2": metrics.r2_score(truth, predicted)}  # fmt: skip
            return Evaluation({name: float(value) for name, value in found.items()})
        truth, answers = [self._names(row["label"]) for row in rows], [self._names(answer) for answer in predicted]
        by_class, pooled = score_sets(truth, answers)
        scores = [by_class.get(label, NOTHING) for label in self.labels]
        found = {"accuracy": sum(map(operator.eq, truth, answers)) / max(1, len(rows)), "micro_f1": pooled.f1,
                 "macro_f1": sum(score.f1 for score in scores) / len(scores)}  # fmt: skip
        table: list[list[Any]] = [["class", "precision", "recall", "f1", "rows"]]
        table += [
            [label, score.precision, score.recall, score.f1, score.support]
            for label, score in zip(self.labels, scores, strict=True)
        ]
        confusion = None
        if self.problem == CLASS:
            confusion = metrics.confusion_matrix(
                [name for (name,) in truth], [name for (name,) in answers], labels=self.labels
            ).tolist()
        return Evaluation(found, table, confusion, self.labels)

    def _names(self, label: Any) -> set[str]:
        """The classes of a row or an answer: one, or where a row has several labels, some."""
        return set(label) if self.problem == SEVERAL and is_texts(label) else {str(label)}


def _unlabelled(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "label"}


class _Kind(NamedTuple):
    """Labels that must be all of a kind if one of them tells it."""

    problem: str
    tells: Callable[[Any], bool]
    fits: Callable[[Any], bool]
    expected: str


_KINDS = (
    _Kind(SEVERAL, is_texts, is_texts, "a list of labels"),
    _Kind(NUMBER, lambda label: isinstance(label, float), is_number, "a number"),
    _Kind(CLASS, lambda label: isinstance(label, bool), lambda label: isinstance(label, bool), "true or false"),
)


def _problem(rows: Sequence[Row], source: str) -> str:
    """What the labels are. One fraction makes all of them numbers; a list, all of them lists."""
    labels = [row["label"] for row in rows]
    for kind in _KINDS:
        telling = next((k for k, label in enumerate(labels) if kind.tells(label)), None)
        if telling is None:
            continue
        for k, label in enumerate(labels):
            if not kind.fits(label):
                raise ValueError(
                    f"{where(rows, k, source)}, column 'label': expected {kind.expected}, as row "
                    f"{number_of(rows, telling)} has, but got {label!r}"
                )
        return kind.problem
    return CLASS
