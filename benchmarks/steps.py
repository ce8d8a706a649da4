"""A whole step of fine-tuning, optimizer included: the loss as transformers and plain torch have it, and objkern's.

python -m benchmarks.steps causal-lm regularized objkern    # bytes that a step adds, in a process of its own
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import objkern
from objkern.transformers import attach

from .contest import OURS
from .memory import forget_peak, in_a_process, status
from .pairing import Step
from .workloads import WORKLOADS, Workload

NATIVE, STOCK = "eager", "stock"
TAGS = 9


@dataclass(frozen=True)
class Training:
    """A model that is made from a configuration, and the size of its batches."""

    name: str
    why: str
    batch: int
    length: int
    classes: int  # of the head
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    causal: bool
    tied: bool = False  # the head's weight is that of the embedding
    quick: bool = False  # `--size quick` has it

    def __str__(self) -> str:
        return self.name

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def model(self) -> nn.Module:
        import transformers

        torch.manual_seed(0)
        sizes = {"vocab_size": self.vocabulary, "hidden_size": self.hidden, "num_hidden_layers": self.layers,
                 "num_attention_heads": self.heads, "max_position_embeddings": self.length}  # fmt: skip
        if self.causal:
            config = transformers.LlamaConfig(
                intermediate_size=8 * self.hidden // 3, tie_word_embeddings=self.tied, **sizes
            )  # fmt: skip
            return transformers.LlamaForCausalLM(config).train()
        config = transformers.BertConfig(
            intermediate_size=4 * self.hidden, num_labels=self.classes, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, **sizes,
        )  # fmt: skip
        return transformers.BertForTokenClassification(config).train()

    def inputs(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Tokens and labels, a tenth of which do not count."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocabulary, (self.batch, self.length), generator=generator)
        labels = ids if self.causal else torch.randint(self.classes, ids.shape, generator=generator)
        labels = labels.masked_fill(torch.rand(ids.shape, generator=generator) < 0.1, -100)
        return ids.to(device), labels.to(device)


TRAININGS = {training.name: training for training in (
    Training("causal-lm", "a small Llama, 24M parameters", 4, 256, 32000, 32000, 320, 4, 5, True),
    Training("tiny-causal-lm", "a Llama of one layer, 4M parameters", 2, 128, 32000, 32000, 64, 1, 2, True, quick=True),
    Training("token-classification", "a small BERT, 17M parameters", 16, 128, TAGS, 30522, 384, 4, 6, False),
)}  # fmt: skip


def losses(training: Training, workload: Workload) -> dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]]:
    """Of a model, tokens and labels. `stock` is what transformers computes by itself, which is plain cross-entropy."""
    objective = workload.objective

    def native(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=ids).logits
        if training.causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        logits, labels = logits.flatten(0, 1), labels.flatten()
        return workload.eager(logits[labels != -100], labels[labels != -100])

    def ours(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
        if training.causal:  # by the objective that is attached to it
            return model(input_ids=ids, labels=labels, use_cache=False).loss
        return objective(model(input_ids=ids).logits, labels)

    found: dict[str, Any] = {NATIVE: native, OURS: ours}
    if workload.name == "plain":
        found[STOCK] = lambda model, ids, labels: model(input_ids=ids, labels=labels).loss
    return found


def prepared(
    training: Training, workload: Workload, name: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    model = training.model().to(device, dtype)
    if name == OURS and training.causal:
        attach(model, workload.objective)
    return model


def step(training: Training, workload: Workload, name: str) -> Step:
    """Forward, backward, AdamW, on a model of its own; how many seconds that took."""
    run = whole_step(losses(training, workload)[name], prepared(training, workload, name), *training.inputs())

    def timed() -> float:
        start = perf_counter()
        run()
        return perf_counter() - start

    return timed


def whole_step(loss: Any, model: nn.Module, ids: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def run() -> None:
        loss(model, ids, labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def gradients(training: Training, workload: Workload, name: str, dtype: torch.dtype) -> list[Tensor]:
    """The loss, and the gradient of every parameter, of a first step."""
    model = prepared(training, workload, name, dtype=dtype)
    loss = losses(training, workload)[name](model, *training.inputs())
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


# ---- memory ---------------------------------------------------------------------------------------------------------


def measure(training: str, workload: str, contestant: str) -> int:
    """Bytes that a step adds to the peak of the resident set once weights and moments are there: the gradients too."""
    return in_a_process("benchmarks.steps", training, workload, contestant)


def main(training: str, workload: str, contestant: str) -> None:
    run = step(TRAININGS[training], WORKLOADS[workload], contestant)
    run()  # brings in code, threads and the optimizer's moments
    objkern.release_buffers()
    forget_peak()
    before = status("VmRSS")
    run()
    print(json.dumps(status("VmHWM") - before))


if __name__ == "__main__":
    main(*sys.argv[1:])
