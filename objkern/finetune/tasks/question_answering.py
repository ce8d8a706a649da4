"""The span of a text that answers a question, or that there is none, as SQuAD has it."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import Column, Row, is_text, number_of, where
from .task import Batch, Evaluation, Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from objkern import Objective


_ANSWERS = '{"text": [...], "answer_start": [...]}, places from 0 on; both empty where there is no answer'


def _is_answers(value: Any) -> bool:
    if not isinstance(value, dict) or not {"text", "answer_start"} <= set(value):
        return False
    texts, starts = value["text"], value["answer_start"]
    if not isinstance(texts, list | tuple) or not isinstance(starts, list | tuple):
        return False
    return len(texts) == len(starts) and all(map(is_text, texts)) and all(type(k) is int and k >= 0 for k in starts)


class QuestionAnswering(Task):
    """A long text is cut into windows that overlap; a window without the answer has its first token for an answer."""

    name = "question-answering"
    about = "the span of a text that answers a question"
    columns = (
        Column("question", is_text, "a text"),
        Column("context", is_text, "a text"),
        Column("answers", _is_answers, _ANSWERS),
    )
    auto_model = "AutoModelForQuestionAnswering"
    metric = "f1"
    longest_answer = 30  # tokens

    def examples(self, rows: Sequence[Row], source: str = "data") -> list[Example]:
        questions = [row["question"].strip() for row in rows]
        marks = self.tokenizer.num_special_tokens_to_add(pair=True)
        room = self.max_length - self.max_length // 4 - marks - 1  # windows overlap by a quarter, and must move on
        lengths = self.tokenizer(questions, add_special_tokens=False)["input_ids"]
        for k, row in enumerate(rows):
            if len(lengths[k]) > room:
                raise ValueError(
                    f"{where(rows, k, source)}, column 'question': expected at most {room} tokens, which leave room "
                    f"for the context in {self.max_length}, but got {len(lengths[k])}"
                )
            _check_places(row, where(rows, k, source))
        encoding = self.tokenizer(
            questions, [row["context"] for row in rows], truncation="only_second", max_length=self.max_length,
            stride=self.max_length // 4, return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        found = []
        for k, place in enumerate(encoding["overflow_to_sample_mapping"]):
            of_context = [part == 1 for part in encoding.sequence_ids(k)]
            offsets = [span if inside else None for span, inside in
                       zip(encoding["offset_mapping"][k], of_context, strict=True)]  # fmt: skip
            label = None if rows[place].get("answers") is None else _places(rows[place], offsets)
            found.append(Example(self.inputs_of(encoding, k), label, place, [number_of(rows, place)], offsets))
        return found

    def count(self, example: Example) -> int:
        return 1

    def reference(self, model: PreTrainedModel, batch: Batch) -> Any:
        outputs = model(**batch.inputs)
        return outputs.start_logits, outputs.end_logits

    def collate(self, examples: Sequence[Example]) -> Batch:
        target = torch.tensor([example.label for example in examples])  # (B, 2)
        return Batch.of(examples, self.padded_inputs(examples), target, len(examples))

    def loss(
        self, model: PreTrainedModel, batch: Batch, objective: Objective, count: int | Tensor, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of the two objectives, of starts and of ends."""
        outputs = model(**batch.inputs)
        padding = batch.inputs["attention_mask"] == 0
        both = []
        reference = options.pop("reference", (None, None))
        for logits, y, r in zip(
            (outputs.start_logits, outputs.end_logits), batch.target.unbind(1), reference, strict=True
        ):
            z = logits.masked_fill(padding, -torch.inf)  # no class: a batch's padding is none of the objective's
            r = None if r is None else r.masked_fill(padding, -torch.inf)
            both.append(objective(z, y, normalizer=count, reference=r, return_parts=True, **options))
        (start, of_start), (end, of_end) = both
        parts = {name: (value + of_end[name]) / 2 for name, value in of_start.items()}
        return (start + end) / 2, parts

    def predict(self, model: PreTrainedModel, rows: Sequence[Row], batch_size: int = 32) -> list[Any]:
        """The text of the best span of all windows; "" where every window's best is that there is none."""
        bare = [{"question": row["question"], "context": row["context"]} for row in rows]
        best: list[tuple[float, str]] = [(-torch.inf, "")] * len(rows)
        nothing = [torch.inf] * len(rows)
        for some, outputs in self.outputs(model, self.examples(bare), batch_size):
            starts, ends = outputs.start_logits.float().cpu(), outputs.end_logits.float().cpu()
            for example, start, end in zip(some, starts, ends, strict=True):
                nothing[example.row] = min(nothing[example.row], float(start[0] + end[0]))
                score, text = self._best_span(example, start, end, rows[example.row]["context"])
                if score > best[example.row][0]:
                    best[example.row] = score, text
        return [text if score > none else "" for (score, text), none in zip(best, nothing, strict=True)]

    def _best_span(self, example: Example, start: Tensor, end: Tensor, context: str) -> tuple[float, str]:
        inside = torch.tensor([span is not None for span in example.about])
        n = len(inside)
        start, end = (x[:n].masked_fill(~inside, -torch.inf) for x in (start, end))
        scores = start[:, None] + end[None, :]  # (T, T)
        allowed = torch.ones(n, n).triu().tril(self.longest_answer - 1).bool()
        place = int(scores.masked_fill(~allowed, -torch.inf).argmax())
        i, j = divmod(place, n)
        if not (inside[i] and inside[j]):
            return -torch.inf, ""
        return float(scores[i, j]), context[example.about[i][0] : example.about[j][1]]

    def evaluate(self, rows: Sequence[Row], predicted: Sequence[Any]) -> Evaluation:
        exact = overlap = 0.0
        for row, answer in zip(rows, predicted, strict=True):
            truths = row["answers"]["text"] or [""]
            exact += max(_plain(answer) == _plain(truth) for truth in truths)
            overlap += max(_f1(answer, truth) for truth in truths)
        n = max(1, len(rows))
        return Evaluation({"exact_match": exact / n, "f1": overlap / n})


def _check_places(row: Row, called: str) -> None:
    """Holds every answer against the context: training learns the first, and scores count them all."""
    answers = row.get("answers") or {"text": (), "answer_start": ()}
    for text, begin in zip(answers["text"], answers["answer_start"], strict=True):
        found = row["context"][begin : begin + len(text)]
        if found != text:
            raise ValueError(
                f"{called}, column 'answers': expected {text!r} at place {begin} of the context but got {found!r}"
            )


def _places(row: Row, offsets: Sequence[tuple[int, int] | None]) -> tuple[int, int]:
    """First and last token of the answer; the first of all where this window has none."""
    if not row["answers"]["text"]:
        return 0, 0
    text, begin = row["answers"]["text"][0], row["answers"]["answer_start"][0]
    end = begin + len(text)
    of_context = [k for k, span in enumerate(offsets) if span is not None]
    if not of_context or offsets[of_context[0]][0] > begin or offsets[of_context[-1]][1] < end:
        return 0, 0
    first = max(k for k in of_context if offsets[k][0] <= begin)
    last = min(k for k in of_context if offsets[k][1] >= end)
    return first, last


def _plain(text: str) -> str:
    """As SQuAD's own script compares answers: no case, punctuation, articles or more than one blank."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def _f1(answer: str, truth: str) -> float:
    a, b = _plain(answer).split(), _plain(truth).split()
    if not a or not b:
        return float(a == b)
    common = sum((collections.Counter(a) & collections.Counter(b)).values())
    return 2 * common / (len(a) + len(b))
