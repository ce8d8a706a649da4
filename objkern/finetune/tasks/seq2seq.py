"""A text from a text: translation, summaries, by models with an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import Column, Row, is_text, number_of
from .causal_lm import attached_loss, generated, likelihood
from .task import Batch, Evaluation, Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from objkern import Objective


class Seq2Seq(Task):
    """`prefix` stands before every source, as T5's "translate English to German: ".

    An answer is written to its end, or to `max_new_tokens`: as many as targets may have, `max_length`.
    """

    name = "seq2seq"
    about = "a text from a text: translation, summaries"
    columns = (Column("source", is_text, "a text"), Column("target", is_text, "a text"))
    auto_model = "AutoModelForSeq2SeqLM"
    metric = "loss"
    linear_head = True

    def __init__(self, *arguments: Any, prefix: str = "", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.prefix, self.max_new_tokens = prefix, self.max_length

    def examples(self, rows: Sequence[Row], source: str = "data") -> list[Example]:
        texts = [self.prefix + row["source"] for row in rows]
        encoding = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        labels = self.tokenizer(
            text_target=[row.get("target") or "" for row in rows], truncation=True, max_length=self.max_length
        )["input_ids"]
        return [
            Example(self.inputs_of(encoding, k), labels[k], k, [number_of(rows, k)]) for k in range(len(rows))
        ]  # fmt: skip

    def inputs_of(self, encoding: Any, k: int) -> dict[str, list[int]]:
        return {name: encoding[name][k] for name in ("input_ids", "attention_mask")}

    def loss(
        self, model: PreTrainedModel, batch: Batch, objective: Objective, count: int | Tensor, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """By the model's own loss, to which the objective is attached."""
        return attached_loss(model, batch, objective, count, **options)

    def reference(self, model: PreTrainedModel, batch: Batch) -> Any:
        """The model itself: it is run beside the one that trains, and its logits are not computed either."""
        return model

    def predict(self, model: PreTrainedModel, rows: Sequence[Row], batch_size: int = 32) -> list[Any]:
        prompts = [example.inputs["input_ids"] for example in self.examples([{"source": r["source"]} for r in rows])]
        return generated(self, model, prompts, batch_size, cut=False, most=self.max_new_tokens)

    def evaluate(self, rows: Sequence[Row], predicted: Sequence[Any]) -> Evaluation:
        """Of texts that the model wrote: BLEU and chrF, as sacrebleu has them."""
        import sacrebleu

        truth = [[row["target"] for row in rows]]
        return Evaluation({
            "bleu": sacrebleu.corpus_bleu(list(predicted), truth).score,
            "chrf": sacrebleu.corpus_chrf(list(predicted), truth).score,
            "exact_match": sum(a == row["target"] for a, row in zip(predicted, rows, strict=True)) / max(1, len(rows)),
        })  # fmt: skip

    @torch.no_grad()
    def score(self, model: PreTrainedModel, rows: Sequence[Row], batch_size: int = 32) -> Evaluation:
        """Of the targets themselves, which is quick and what training lowers; `evaluate` is of what a model writes."""
        return likelihood(self, model, self.examples(rows), batch_size)

    def test(self, model: PreTrainedModel, rows: Sequence[Row], batch_size: int = 32) -> Evaluation:
        """`score`, and `evaluate` of what the model writes."""
        written = self.evaluate(rows, self.predict(model, rows, batch_size))
        return Evaluation(self.score(model, rows, batch_size).metrics | written.metrics)
