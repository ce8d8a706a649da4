"""One run from start to end: data, model, training, test; and the files it leaves."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from ..ops import NATIVE, why_not
from .config import FinetuneConfig
from .corpus import Sentence, load_corpus
from .loop import ObjectiveLike, Training, finetune
from .memory import peak_resident_bytes
from .metrics import Score, score_spans
from .schedules import Schedule
from .token_classification import build_model, encode, load_tokenizer, predict, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RunResult:
    """What is worth knowing of a finished run. `test` has a score per kind of entity and `"micro"`."""

    name: str
    objective: str
    device: str
    parameters: int
    training: Training
    untrained: Score
    test: dict[str, Score]
    seconds: float  # training with its dev scores, without loading and testing
    peak_bytes: float

    @property
    def losses(self) -> list[float]:
        return [step["total"] for step in self.training.steps]

    @property
    def step_seconds(self) -> float:
        return median(step["seconds"] for step in self.training.steps)


def load_splits(config: FinetuneConfig) -> dict[str, list[Sentence]]:
    """The corpus, cut to `config.sentences` of each split if that is set."""
    return {split: sentences[: config.sentences] for split, sentences in load_corpus().items()}


def model_folder(config: FinetuneConfig) -> Path:
    """Where the tokenizer is from the start and the model at the end."""
    return config.output / "model"


def prepare(config: FinetuneConfig, splits: dict[str, list[Sentence]]) -> None:
    """Makes the output folder, puts the tokenizer there, and finds out what can't work before training starts."""
    try:
        model_folder(config).mkdir(parents=True, exist_ok=True)
        (config.output / "summary.json").unlink(missing_ok=True)  # an old one would speak for a run that fails
        tempfile.TemporaryFile(dir=config.output).close()
    except OSError as error:
        raise ValueError(f"output folder {str(config.output)!r} can't be written: {error.strerror}") from error
    if config.model is None:
        tokenizer = train_tokenizer(splits["train"], config.vocabulary, config.max_length)
    else:
        tokenizer = load_tokenizer(config.model)
    build_model(config, tokenizer).to(config.torch_device)
    tokenizer.save_pretrained(model_folder(config))


def run(
    config: FinetuneConfig, objective: ObjectiveLike, name: str, save: bool = True, schedules: Sequence[Schedule] = ()
) -> RunResult:
    """Trains and tests after `prepare`; writes `NAME.jsonl`, and the model if `save`. `schedules`: see `finetune`."""
    _hide_loading_bars()
    splits = load_splits(config)
    tokenizer = load_tokenizer(str(model_folder(config)))
    examples = {split: encode(sentences, tokenizer, config.max_length) for split, sentences in splits.items()}
    torch.manual_seed(config.seed)  # weights
    model = build_model(config, tokenizer).to(config.torch_device)
    described = str(objective) if isinstance(objective, torch.nn.Module) else getattr(objective, "__name__", name)
    if isinstance(objective, torch.nn.Module):
        objective = objective.to(config.torch_device)
        device = config.torch_device
        if all(why_not(name, device.type, device.index) for name in NATIVE):  # no kernels there
            objective, described = partial(objective, backend="reference"), f"{described} (reference backend)"

    def evaluate(split: str) -> dict[str, Score]:
        predicted = predict(model, splits[split], examples[split], tokenizer.pad_token_id)
        return score_spans([sentence.tags for sentence in splits[split]], predicted)

    untrained = evaluate("test")["micro"]
    with open(config.output / f"{name}.jsonl", "w", encoding="utf-8", buffering=1) as file:

        def log(record: dict[str, Any]) -> None:
            print(json.dumps(record), file=file)

        began = time.perf_counter()
        training = finetune(
            model,
            objective,
            examples["train"],
            lambda: evaluate("dev")["micro"],
            tokenizer.pad_token_id,
            config,
            log,
            name,
            schedules,
        )
        seconds = time.perf_counter() - began
    if save:
        model.save_pretrained(model_folder(config))
    return RunResult(
        name=name,
        objective=described,
        device=str(config.torch_device),
        parameters=model.num_parameters(),
        training=training,
        untrained=untrained,
        test=evaluate("test"),
        seconds=seconds,
        peak_bytes=_peak_bytes(config.torch_device),
    )


def predict_with_saved(config: FinetuneConfig, sentences: list[Sentence]) -> list[list[str]]:
    """Tags from the model as it was written to the output folder."""
    _hide_loading_bars()
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would stand among the sentences
    folder = str(model_folder(config))
    tokenizer = load_tokenizer(folder)
    model: PreTrainedModel = build_model(replace(config, model=folder), tokenizer)
    return predict(model, sentences, encode(sentences, tokenizer, config.max_length), tokenizer.pad_token_id)


def _hide_loading_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # a small model is read in milliseconds


def _peak_bytes(device: torch.device) -> float:
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_resident_bytes()
