"""What the loop asks of a task, and what most tasks share.

    rows ──examples──▶ token numbers and labels ──collate──▶ a batch ──loss──▶ a number;  ──predict──▶ answers

A task knows its columns, its kind of model, what its labels are and which rows of a batch count. It knows nothing of
optimizers, devices or files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..data import Column, Row, checked

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from objkern import Objective

IGNORED = -100  # a label that counts for nothing


@dataclass(frozen=True)
class Example:
    """One encoded row, or one window of a long one.

    Attributes:
        inputs: of the model, by name, a number for every token: input_ids, attention_mask, ...
        label: what the task makes of it: a number, or one for every token, or several.
        row: its place among the rows that were encoded.
        numbers: what its row is called in its source, or its rows where texts share a sequence: from 1 on.
        about: what turns predictions back into answers, such as where words begin.
    """

    inputs: dict[str, list[int]]
    label: Any
    row: int
    numbers: list[int]
    about: Any = None

    @property
    def length(self) -> int:
        return len(self.inputs["input_ids"])


@dataclass(frozen=True)
class Batch:
    """Tensors of some examples.

    Attributes:
        target: the labels as the objective wants them.
        count: how many of them count.
        rows: their numbers in their source, for errors.
    """

    inputs: dict[str, Tensor]
    target: Any
    count: int
    rows: list[int]

    def to(self, device: torch.device) -> Batch:
        def moved(x: Any) -> Any:
            return tuple(map(moved, x)) if isinstance(x, tuple) else x.to(device, non_blocking=True)

        return Batch({k: moved(x) for k, x in self.inputs.items()}, moved(self.target), self.count, self.rows)

    @classmethod
    def of(cls, examples: Sequence[Example], inputs: dict[str, Tensor], target: Any, count: int) -> Batch:
        return cls(inputs, target, count, [number for example in examples for number in example.numbers])


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and a table of them by class or kind: its heads first."""

    metrics: dict[str, float]
    table: list[list[Any]] = field(default_factory=list)
    confusion: list[list[int]] | None = None  # true classes down, predicted ones across
    classes: list[str] = field(default_factory=list)


class Task(ABC):
    """One of the five.

    Args:
        tokenizer: a fast one.
        rows: of training, from which labels are learned; none of a task that is loaded with its model.
        max_length: of an example, in tokens.
        labels: those that a saved model knows, in its order.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]
    auto_model: ClassVar[str]  # the class of transformers that makes the model
    metric: ClassVar[str]  # that says which epoch was best
    classes: ClassVar[str | None] = None  # the column of those that each must occur among the rows of training
    linear_head: ClassVar[bool] = False  # whether the loss comes from the model, an objective attached to it

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row] = (), max_length: int = 512,
        labels: Sequence[str] | None = None, source: str = "data",
    ) -> None:  # fmt: skip
        self.tokenizer, self.max_length = tokenizer, min(max_length, tokenizer.model_max_length)
        if rows:
            checked(rows, self.columns, source)
        self.labels = list(labels) if labels is not None else self.labels_of(rows, source)

    def labels_of(self, rows: Sequence[Row], source: str) -> list[str]:
        """The classes that occur in training, in order; none where a task has none."""
        return []

    def check(self, model: PreTrainedModel) -> None:  # noqa: B027  most have nothing against any
        """Raises a ValueError for a model, or for labels, that no training could mean."""

    def formula(self) -> str:
        """The objective that is taken unless another is asked for."""
        return "CrossEntropy()"

    @property
    def elementwise(self) -> bool:
        """Whether the loss compares element by element, and not a class with all others."""
        return False

    def model_options(self) -> dict[str, Any]:
        """For the configuration of the model."""
        if not self.labels:
            return {}
        return {"num_labels": len(self.labels), "id2label": dict(enumerate(self.labels)),
                "label2id": {label: k for k, label in enumerate(self.labels)}}  # fmt: skip

    @abstractmethod
    def examples(self, rows: Sequence[Row], source: str = "data") -> list[Example]:
        """The rows encoded; ValueErrors name the row."""

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A batch of them, padded to the longest; here one with a label for every token."""
        target = self.padded([example.label for example in examples], IGNORED)
        count = int((target != IGNORED).sum())
        return Batch.of(examples, self.padded_inputs(examples), target, count)

    def loss(
        self, model: PreTrainedModel, batch: Batch, objective: Objective, count: int | Tensor, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over the rows that count, divided by `count`, of which there may be more in other batches: and parts.

        `options` are those of an objective: `reference`, `backend`.
        """
        logits = model(**batch.inputs).logits
        return objective(logits, batch.target, normalizer=count, return_parts=True, **options)

    def count(self, example: Example) -> int:
        """How many labels of an example count: what sums over a window are divided by."""
        return sum(label != IGNORED for label in example.label)

    def reference(self, model: PreTrainedModel, batch: Batch) -> Any:
        """A frozen model's logits for the batch, as `loss` takes them."""
        return model(**batch.inputs).logits

    @abstractmethod
    def predict(self, model: PreTrainedModel, rows: Sequence[Row], batch_size: int = 32) -> list[Any]:
        """An answer for every row, which need not have labels."""

    def evaluate(self, rows: Sequence[Row], predicted: Sequence[Any]) -> Evaluation:
        """How good the answers are."""
        raise NotImplementedError(f"{self.name}: answers are not compared with a truth; see `score`")

    def score(self, model: PreTrainedModel, rows: Sequence[Row], batch_size: int = 32) -> Evaluation:
        """How good the model is on rows with labels: what early stopping watches, by `metric`."""
        return self.evaluate(rows, self.predict(model, rows, batch_size))

    def test(self, model: PreTrainedModel, rows: Sequence[Row], batch_size: int = 32) -> Evaluation:
        """All there is to say of a finished model: `score`, and more where that takes long."""
        return self.score(model, rows, batch_size)

    # -- for all of them

    def padded(self, lists: Sequence[Sequence[Any]], value: Any, multiple: int = 1) -> Tensor:
        longest = max(len(part) for part in lists)
        longest += -longest % multiple
        return torch.tensor([[*part, *[value] * (longest - len(part))] for part in lists])

    def padded_inputs(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Every input of the examples; token numbers are padded with the tokenizer's, everything else with zeros."""
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = self.tokenizer.eos_token_id or 0
        return {
            name: self.padded([example.inputs[name] for example in examples], pad if name.endswith("input_ids") else 0)
            for name in examples[0].inputs
        }

    def inputs_of(self, encoding: Any, k: int) -> dict[str, list[int]]:
        names = ("input_ids", "attention_mask", "token_type_ids")
        return {name: encoding[name][k] for name in names if name in encoding}

    @torch.no_grad()
    def outputs(
        self, model: PreTrainedModel, examples: Sequence[Example], batch_size: int
    ) -> Iterator[tuple[Any, Any]]:
        """(examples, outputs) of batches of about equal lengths, by a model that evaluates."""
        training = model.training
        model.eval()
        try:
            for places in by_length(examples, batch_size):
                some = [examples[place] for place in places]
                inputs = {k: x.to(model.device) for k, x in self.padded_inputs(some).items()}
                yield some, model(**inputs)
        finally:
            model.train(training)


def by_length(examples: Sequence[Example], batch_size: int) -> Iterator[list[int]]:
    order = sorted(range(len(examples)), key=lambda place: examples[place].length)
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]
