"""A class, several labels, or a number for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import Column, Row, is_text, is_texts
from .task import Batch, Evaluation, Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from objkern import Objective

CLASS, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"


def _is_label(value: Any) -> bool:
    return is_text(value) or isinstance(value, bool | int | float) or is_texts(value)


class SequenceClassification(Task):
    """The label decides: a text or whole number is a class, a list of texts several labels, a fraction a number."""

    name = "sequence-classification"
    about = "a class, several labels or a number for a text or a pair of texts"
    columns = (
        Column("text", is_text, "a text"),
        Column("text_pair", is_text, "a text", needed=False),
        Column("label", _is_label, "a class (text or whole number), a list of labels, or a fractional number"),
    )
    auto_model = "AutoModelForSequenceClassification"

    def __init__(self, *arguments: Any, problem: str | None = None, **options: Any) -> None:
        rows = options.get("rows") or (arguments[1] if len(arguments) > 1 else ())
        self.problem = problem or _problem(rows, options.get("source", "data"))
        super().__init__(*arguments, **options)

    @property
    def metric(self) -> str:  # type: ignore[override]
        return {CLASS: "accuracy", SEVERAL: "micro_f1", NUMBER: "r2"}[self.problem]

    def labels_of(self, rows: Sequence[Row]) -> list[str]:
        if self.problem == NUMBER:
            return ["value"]
        if self.problem == SEVERAL:
            return sorted({label for row in rows for label in row["label"]})
        labels = {row["label"] for row in rows}
        in_order = sorted(labels, key=lambda label: (isinstance(label, str), label))
        return list(dict.fromkeys(map(str, in_order)))  # 1 and "1" are one class

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
            number = next(k for k, pair in enumerate(pairs, 1) if not pair)
            raise ValueError(f"{source}, row {number}, column 'text_pair': expected a text, as other rows have one")
        texts = [row["text"] for row in rows]
        encoding = self.tokenizer(texts, *([pairs] if any(pairs) else []), truncation=True, max_length=self.max_length)
        return [
            Example(self.inputs_of(encoding, k), self._label(row.get("label"), f"{source}, row {k + 1}"), k)
            for k, row in enumerate(rows)
        ]

    def _label(self, label: Any, where: str) -> Any:
        if label is None:  # a row to be predicted
            return None
        if self.problem == NUMBER:
            if isinstance(label, bool) or not isinstance(label, int | float):
                raise ValueError(f"{where}, column 'label': expected a number, as training has, but got {label!r}")
            return float(label)
        names = list(label) if self.problem == SEVERAL and is_texts(label) else [str(label)]
        for name in names:
            if name not in self.labels:
                raise ValueError(
                    f"{where}, column 'label': {name!r} does not occur in training, which has {', '.join(self.labels)}"
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
        return Batch(self.padded_inputs(examples), target, target.numel(), [example.row for example in examples])

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
        if self.problem == SEVERAL:
            given = [row["label"] if is_texts(row["label"]) else [str(row["label"])] for row in rows]
            truth = [[label in some for label in self.labels] for some in given]
            answers = [[label in some for label in self.labels] for some in predicted]
            exact = metrics.accuracy_score(truth, answers)
        else:
            truth, answers = [str(row["label"]) for row in rows], list(predicted)
            exact = metrics.accuracy_score(truth, answers)
        labels = list(range(len(self.labels))) if self.problem == SEVERAL else self.labels
        by_class = metrics.precision_recall_fscore_support(truth, answers, labels=labels, zero_division=0)
        average = {
            f"{kind}_f1": metrics.f1_score(truth, answers, labels=labels, average=kind, zero_division=0)
            for kind in ("micro", "macro")
        }
        found = {"accuracy": exact, **average}
        table = [["class", "precision", "recall", "f1", "rows"]]
        table += [
            [label, float(p), float(r), float(f), int(n)]
            for label, p, r, f, n in zip(self.labels, *by_class, strict=True)
        ]
        confusion = None
        if self.problem == CLASS:
            confusion = metrics.confusion_matrix(truth, answers, labels=self.labels).tolist()
        return Evaluation({name: float(value) for name, value in found.items()}, table, confusion, self.labels)


def _unlabelled(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "label"}


def _problem(rows: Sequence[Row], source: str) -> str:
    """What the labels are. One fraction makes all of them numbers; a list, all of them lists."""
    kinds = {SEVERAL if is_texts(row.get("label")) else NUMBER if isinstance(row.get("label"), float) else CLASS
             for row in rows}  # fmt: skip
    if SEVERAL in kinds and len(kinds) > 1:
        number = next(k for k, row in enumerate(rows, 1) if not is_texts(row.get("label")))
        raise ValueError(f"{source}, row {number}, column 'label': expected a list of labels, as other rows have")
    return SEVERAL if SEVERAL in kinds else NUMBER if NUMBER in kinds else CLASS
