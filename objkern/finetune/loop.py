"""The training loop: AdamW, warm-up and linear decay, clipping, early stopping on the dev split."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .config import FinetuneConfig
from .metrics import Score
from .schedules import Schedule
from .token_classification import Example, batches, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ObjectiveLike(Protocol):
    """What the loop calls: an objkern.Objective, or anything with its signature."""

    def __call__(
        self, logits: torch.Tensor, target: torch.Tensor, *, return_parts: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...


class EarlyStopping:
    """Remembers the best weights, and says when `patience` epochs in a row brought nothing better."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best_score = -math.inf
        self.best_epoch = 0
        self._weights: dict[str, torch.Tensor] = {}

    def should_stop(self, epoch: int, score: float, model: torch.nn.Module) -> bool:
        """To be called after each epoch. An equal score isn't better: the earlier epoch stays."""
        if score > self.best_score:
            self.best_score, self.best_epoch = score, epoch
            self._weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        return epoch - self.best_epoch >= self.patience

    def restore(self, model: torch.nn.Module) -> None:
        """Puts the best weights back."""
        model.load_state_dict(self._weights)


@dataclass
class Training:
    """What the loop saw: one dict per step and one per epoch, as they are written to the log."""

    best_epoch: int = 0
    steps: list[dict[str, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms, which are all vectors, don't."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def rate_at(step: int, total: int, warmup: float) -> float:
    """Share of the peak learning rate at `step` of `total`: up in a line, then down in a line to (nearly) nothing."""
    rising = max(1, round(warmup * total))
    return min((step + 1) / rising, (total - step) / max(1, total - rising))


def finetune(
    model: PreTrainedModel,
    objective: ObjectiveLike,
    examples: Sequence[Example],
    evaluate: Callable[[], Score],
    pad_token_id: int,
    config: FinetuneConfig,
    log: Callable[[dict[str, Any]], None],
    name: str = "training",
    schedules: Sequence[Schedule] = (),
) -> Training:
    """Trains `model` in place, restores the weights of the best dev F1 and returns the history.

    `schedules` set coefficients of the objective before every step; what they are is logged as
    `coefficient_0`, `coefficient_1`, ...

    Everything random comes from `config.seed`, so two runs that differ in the objective's implementation only see the
    same batches and the same dropout masks.
    """
    from tqdm import tqdm

    torch.manual_seed(config.seed)  # dropout
    order = torch.Generator().manual_seed(config.seed)
    steps_per_epoch = math.ceil(len(examples) / config.batch_size)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.peak_learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_at(step, config.epochs * steps_per_epoch, config.warmup)
    )
    stopping = EarlyStopping(config.patience)
    training = Training()

    for epoch in range(1, config.epochs + 1):
        epoch_began = time.perf_counter()
        model.train()
        first_step = len(training.steps)
        # disable=None: no bar where nobody watches, such as a log file.
        for numbers in tqdm(
            batches(examples, config.batch_size, order),
            f"{name} epoch {epoch}",
            steps_per_epoch,
            leave=False,
            disable=None,
            unit="step",
        ):
            step_began = time.perf_counter()
            inputs, target = collate([examples[number] for number in numbers], pad_token_id, model.device)
            for scheduled in schedules:
                scheduled.set(len(training.steps), config.epochs * steps_per_epoch)
            loss, parts = objective(model(**inputs).logits, target, return_parts=True)
            loss.backward()
            gradient_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # One transfer for all the numbers of a step: on a GPU each costs a synchronisation.
            values = torch.stack([value.float() for value in (*parts.values(), gradient_norm)]).tolist()
            record = dict(zip((*parts, "gradient_norm"), values, strict=True))
            record["learning_rate"] = schedule.get_last_lr()[0]
            for number, scheduled in enumerate(schedules):
                record[f"coefficient_{number}"] = float(scheduled.coefficient)
            record["seconds"] = time.perf_counter() - step_began
            schedule.step()
            training.steps.append(record)
            log({"event": "step", "step": len(training.steps), "epoch": epoch, **record})
            if not math.isfinite(record["total"]):
                raise FloatingPointError(f"the loss is {record['total']} at step {len(training.steps)}: {record}")

        dev = evaluate()
        steps = training.steps[first_step:]
        means = {part: sum(step[part] for step in steps) / len(steps) for part in parts}
        summary = {**means, "dev_precision": dev.precision, "dev_recall": dev.recall, "dev_f1": dev.f1}
        summary["seconds"] = time.perf_counter() - epoch_began
        training.epochs.append(summary)
        log({"event": "epoch", "epoch": epoch, **summary})
        if stopping.should_stop(epoch, dev.f1, model):
            break

    stopping.restore(model)
    training.best_epoch = stopping.best_epoch
    return training
