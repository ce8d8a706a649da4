"""Language models that continue a text: plain text, prompts with completions, and chats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...transformers import attach, is_attached, measuring, parts
from ..data import Column, Row, is_text, number_of, where
from .task import IGNORED, Batch, Evaluation, Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from objkern import Objective


def _is_messages(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(
        isinstance(turn, dict) and is_text(turn.get("role")) and isinstance(turn.get("content"), str) for turn in value
    )  # fmt: skip


Encoded = tuple[list[int], list[int]]  # tokens and labels

# A line with the role, one with the content, and the end of text behind an answer: for tokenizers without a template of
# their own, with which it is saved.
PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ':\\n' + message['content'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)


class CausalLM(Task):
    """What the model is to say counts, and what it is told does not: completions, and the assistant's turns.

    With `pack`, examples stand one behind the other in sequences of `max_length` tokens, so that no padding is
    computed. Positions begin anew with each, by which transformers keeps their attentions apart, and no first token is
    a label. A model that does not keep them apart is refused.

    An answer is written to its end, or to `max_new_tokens`.
    """

    name = "causal-lm"
    about = "continue a text: plain text, prompts and completions, chats"
    columns = (
        Column("text", is_text, "a text", needed=False),
        Column("prompt", lambda value: isinstance(value, str), "a text", needed=False),
        Column("completion", is_text, "a text", needed=False),
        Column("messages", _is_messages, 'a list of {"role": ..., "content": ...}', needed=False),
    )
    auto_model = "AutoModelForCausalLM"
    metric = "loss"
    linear_head = True

    def __init__(self, *arguments: Any, pack: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.pack, self.max_new_tokens = pack, 64

    def labels_of(self, rows: Sequence[Row], source: str) -> list[str]:
        if self.tokenizer.chat_template is None and any(row.get("messages") is not None for row in rows):
            self.tokenizer.chat_template = PLAIN
        return []

    def examples(self, rows: Sequence[Row], source: str = "data") -> list[Example]:
        found = []
        for k, row in enumerate(rows):
            for ids, labels in self._encoded(row, where(rows, k, source)):
                # The first token is no label: nothing precedes it. Long texts go on in further examples.
                for first in range(0, max(1, len(ids) - 1), self.max_length):
                    part, label = ids[first : first + self.max_length], labels[first : first + self.max_length]
                    if any(y != IGNORED for y in label[1:]):
                        inputs = {"input_ids": part, "attention_mask": [1] * len(part)}
                        found.append(Example(inputs, label, k, [number_of(rows, k)]))
        if not found:
            raise ValueError(f"{source}: nothing is left to learn: every token is a prompt's, or texts have one token")
        return self._packed(found) if self.pack else found

    def _encoded(self, row: Row, where: str) -> list[Encoded]:
        if row.get("messages") is not None:
            return self._chat(row["messages"], where)
        if row.get("completion") is not None:
            prompt = self._tokens(row.get("prompt") or "", begins=True)
            answer = self._tokens(row["completion"], ends=True)
            return [(prompt + answer, [IGNORED] * len(prompt) + answer)]
        if row.get("text") is None:
            raise ValueError(
                f"{where}: expected a column text, or prompt and completion, or messages, but got {list(row)}"
            )
        ids = self._tokens(row["text"], begins=True, ends=True)
        return [(ids, list(ids))]

    def _tokens(self, text: str, begins: bool = False, ends: bool = False) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return [*([bos] if begins and bos is not None else []), *ids, *([eos] if ends and eos is not None else [])]

    def _chat(self, messages: Sequence[Row], where: str) -> list[Encoded]:
        """By the tokenizer's own template; an assistant's turn counts, without what announces it.

        One example, unless the template writes earlier turns otherwise once others follow, as those do that leave out
        what an assistant thought: then each of its turns ends one, as the model will see it.
        """
        if self.tokenizer.chat_template in (None, PLAIN):
            return [self._plain_chat(messages)]
        found: list[Encoded] = []
        ids: list[int] = []
        labels: list[int] = []
        for k, turn in enumerate(messages):
            if turn["role"] != "assistant":
                continue
            told, said = self._template(messages[:k], True, where), self._template(messages[: k + 1], False, where)
            if said[: len(told)] != told:
                raise ValueError(
                    f"{where}, column 'messages': the tokenizer's chat template does not put an answer behind what "
                    "announces it, so that nobody can tell whose tokens are whose"
                )
            if told[: len(ids)] != ids:
                found.append((ids, labels))
                ids, labels = [], []
            labels = labels + [IGNORED] * (len(told) - len(ids)) + said[len(told) :]
            ids = said
        return [*found, (ids, labels)]

    def _template(self, messages: Sequence[Row], announce: bool, where: str = "messages") -> list[int]:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=announce)
        except TemplateError as error:
            raise ValueError(
                f"{where}, column 'messages': the tokenizer's chat template refuses it: {error}"
            ) from error
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _plain_chat(self, messages: Sequence[Row]) -> Encoded:
        """As the template PLAIN has it, piece by piece: whose tokens are whose needs not be found out."""
        ids = self._tokens("", begins=True)
        labels = [IGNORED] * len(ids)
        for turn in messages:
            head = self._tokens(f"{turn['role']}:\n")
            ours = turn["role"] == "assistant"
            body = self._tokens(f"{turn['content']}\n", ends=ours)
            ids += head + body
            labels += [IGNORED] * len(head) + (body if ours else [IGNORED] * len(body))
        return ids, labels

    def _packed(self, examples: Sequence[Example]) -> list[Example]:
        """First fit, longest first, so that few places stay empty; the order within a sequence does not matter."""
        room: list[list[Example]] = []
        left: list[int] = []
        for example in sorted(examples, key=lambda example: -example.length):
            place = next((k for k, free in enumerate(left) if free >= example.length), None)
            if place is None:
                room.append([])
                left.append(self.max_length)
                place = len(room) - 1
            room[place].append(example)
            left[place] -= example.length
        return [
            Example(
                {"input_ids": [token for part in parts for token in part.inputs["input_ids"]],
                 "position_ids": [k for part in parts for k in range(part.length)]},
                [y for part in parts for y in (IGNORED, *part.label[1:])], parts[0].row,
                [number for part in parts for number in part.numbers],
            )
            for parts in room
        ]  # fmt: skip

    def count(self, example: Example) -> int:
        return sum(label != IGNORED for label in example.label[1:])

    def collate(self, examples: Sequence[Example]) -> Batch:
        target = self.padded([example.label for example in examples], IGNORED)
        inputs = self.padded_inputs(examples)
        return Batch.of(examples, inputs, target, int((target[:, 1:] != IGNORED).sum()))

    def loss(
        self, model: PreTrainedModel, batch: Batch, objective: Objective, count: int | Tensor, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """By the model's own loss, to which the objective is attached."""
        return attached_loss(model, batch, objective, count, **options)

    def reference(self, model: PreTrainedModel, batch: Batch) -> Any:
        """The model itself: it is run beside the one that trains, and its logits are not computed either."""
        return model

    def predict(self, model: PreTrainedModel, rows: Sequence[Row], batch_size: int = 32) -> list[Any]:
        """What the model says next, greedily: of prompts, of chats without an answer, of texts."""
        texts = [self._prompt(row) for row in rows]
        return generated(self, model, texts, batch_size, cut=True, most=self.max_new_tokens)

    def _prompt(self, row: Row) -> list[int]:
        if row.get("messages") is not None:
            turns = list(row["messages"])
            if turns[-1]["role"] == "assistant":
                turns = turns[:-1]
            if self.tokenizer.chat_template not in (None, PLAIN):
                return self._template(turns, True)
            return self._plain_chat(turns)[0] + self._tokens("assistant:\n")
        return self._tokens(row["text"] if row.get("text") is not None else row.get("prompt") or "", begins=True)

    @torch.no_grad()
    def check(self, model: PreTrainedModel) -> None:
        """Whether what comes later changes what it says of a place: such a model has read what it is to tell."""
        device, classes = next(model.parameters()).device, model.config.get_text_config().vocab_size
        ids = torch.arange(4, device=device)[None] % classes
        later = ids.clone()
        later[0, -1] = (later[0, -1] + 1) % classes
        training = model.training
        model.eval()
        first, second = (model(input_ids=x, attention_mask=torch.ones_like(x)).logits[:, :-1] for x in (ids, later))
        apart = not self.pack or _keeps_apart(model, ids, later)
        model.train(training)
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-4):
            raise ValueError(
                f"model: expected one that reads from left to right but got {type(model).__name__}, which sees the "
                "words that it is to tell"
            )
        if not apart:
            raise ValueError(
                f"pack: texts of one sequence would see each other in {type(model).__name__}, which does not keep "
                "apart what begins at position 0 anew; train it without"
            )

    @torch.no_grad()
    def score(self, model: PreTrainedModel, rows: Sequence[Row], batch_size: int = 32) -> Evaluation:
        """Of the texts themselves."""
        return likelihood(self, model, self.examples(rows), batch_size)


def _keeps_apart(model: PreTrainedModel, text: Tensor, other: Tensor) -> bool:
    """Whether a text says the same behind either of the two, packed as `CausalLM` packs them."""
    count = text.shape[1]
    positions = torch.arange(count, device=text.device).repeat(2)[None]
    try:
        first, second = (
            model(input_ids=torch.cat((x, text), 1), position_ids=positions, use_cache=False).logits[:, count:]
            for x in (text, other)
        )
    except TypeError:  # it takes no positions
        return False
    return torch.allclose(first, second, rtol=1e-3, atol=1e-4)


def attached_loss(
    model: PreTrainedModel, batch: Batch, objective: Objective, count: int | Tensor, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a model that has the objective, with the parts of that call."""
    reference = options.pop("reference", None)
    if not is_attached(model, objective, reference):
        attach(model, objective, reference=reference, **options)
    # No cache, because nobody reads it, and because beside one transformers does not keep packed examples apart.
    loss = model(
        **batch.inputs, labels=batch.target, num_items_in_batch=torch.as_tensor(count), use_cache=False
    ).loss  # fmt: skip
    return loss, parts(model)


def likelihood(task: Task, model: PreTrainedModel, examples: Sequence[Example], batch_size: int) -> Evaluation:
    """Mean negative log-likelihood of the labels, perplexity, and the share of labels that are the best guess; without
    logits, as in training."""
    from objkern import CrossEntropy

    from .task import by_length

    training, plain = model.training, CrossEntropy()
    model.eval()
    total, right, count = 0.0, 0.0, 0
    try:
        with measuring(model, plain):
            for places in by_length(examples, batch_size):
                batch = task.collate([examples[place] for place in places]).to(model.device)
                if batch.count == 0:
                    continue
                loss, found = attached_loss(model, batch, plain, batch.count)
                total, count = total + loss.item() * batch.count, count + batch.count
                right += found["accuracy"].item() * batch.count
    finally:
        model.train(training)
    mean = total / max(1, count)
    metrics = {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "accuracy": right / max(1, count)}
    return Evaluation(metrics)


def _places(model: PreTrainedModel) -> int | None:
    """How many tokens it takes, beside the vectors that a prompt strategy puts before them; None: any number."""
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    vectors = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    return None if places is None else places - vectors


@torch.no_grad()
def generated(
    task: Task, model: PreTrainedModel, prompts: Sequence[list[int]], batch_size: int, cut: bool, most: int
) -> list[str]:
    """Greedy continuations of up to `most` tokens, as far as the model has places; `cut`: the prompt stands before them
    and is taken off. One without a token begins as texts do, or else behind the end of another."""
    begin = task.tokenizer.bos_token_id
    begin = begin if begin is not None else task.tokenizer.eos_token_id
    prompts = [prompt or [begin if begin is not None else task.tokenizer.pad_token_id or 0] for prompt in prompts]
    if (room := _places(model)) is not None:
        most = min(most, room // 2 if cut else room - 1)
        prompts = [prompt[-(room - most) :] for prompt in prompts] if cut else prompts
    training = model.training
    model.eval()
    answers: list[str] = [""] * len(prompts)
    pad = task.tokenizer.pad_token_id
    pad = pad if pad is not None else task.tokenizer.eos_token_id or 0
    try:
        order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            longest = max(len(prompts[k]) for k in places)
            # Causal models go on behind the last token, so their padding stands on the left.
            padding = [[pad] * (longest - len(prompts[k])) for k in places]
            ids = torch.tensor([
                empty + prompts[k] if cut else prompts[k] + empty for k, empty in zip(places, padding, strict=True)
            ])  # fmt: skip
            lengths = torch.tensor([len(prompts[k]) for k in places])[:, None]
            place = torch.arange(longest)[None, :]
            mask = (place >= longest - lengths if cut else place < lengths).long()
            out = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=most,
                do_sample=False, num_beams=1, pad_token_id=pad,
            )  # fmt: skip
            texts = task.tokenizer.batch_decode(out[:, longest:] if cut else out, skip_special_tokens=True)
            for k, text in zip(places, texts, strict=True):
                answers[k] = text.strip()
    finally:
        model.train(training)
    return answers
