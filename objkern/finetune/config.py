"""What a fine-tuning run needs to know, as a dataclass and as command-line options."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of one run. The sizes describe the small BERT that is built when `model` is None."""

    model: str | None = None  # name or folder of a pretrained model; None builds a small one from scratch
    output: Path = Path("runs/demo")
    device: str = "auto"
    seed: int = 0
    epochs: int = 14
    patience: int = 5  # epochs without a better dev F1 before training stops
    batch_size: int = 16  # sentences
    learning_rate: float | None = None  # None: 1e-3 from scratch, 5e-5 for a pretrained model
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of all steps
    clip: float = 1.0  # largest norm of the gradient
    max_length: int = 256  # sub-words
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    window: int = 16  # words that a local attention layer sees, half on each side
    dropout: float = 0.3
    vocabulary: int = 3000  # sub-words
    sentences: int | None = None  # use only so many of each split

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "batch_size", "layers", "heads", "window", "vocabulary"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        _check(self, "max_length", self.max_length >= 3, "at least 3, for one sub-word between its two marks")
        _check(self, "clip", self.clip > 0, "positive")
        _check(self, "learning_rate", 0 < self.peak_learning_rate < math.inf, "positive")
        for name in ("warmup", "dropout"):
            _check(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        _check(self, "weight_decay", self.weight_decay >= 0, "0 or more")
        _check(self, "seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1")
        _check(self, "hidden_size", self.hidden_size % self.heads == 0, f"a multiple of heads={self.heads}")

    @property
    def peak_learning_rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-3 if self.model is None else 5e-5

    @property
    def torch_device(self) -> torch.device:
        """The device to train on; raises a ValueError for one that isn't there."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # an AssertionError from a torch built without CUDA
            raise ValueError(f"device {self.device!r} can't be used: {str(error).splitlines()[0]}") from error
        return torch.device(self.device)

    def quick(self) -> FinetuneConfig:
        """A tiny run that shows that everything works and learns next to nothing."""
        return replace(self, epochs=2, sentences=160, hidden_size=64, layers=2, heads=2, vocabulary=1000)


def _check(config: FinetuneConfig, name: str, good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"{name} must be {expected}, not {getattr(config, name)!r}")


def add_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """Adds the options that a command line may set; `config_from` reads them."""
    default = FinetuneConfig()
    parser.add_argument(
        "--output", type=Path, default=Path(output), metavar="DIR", help="folder to write (%(default)s)"
    )
    parser.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        help="fine-tune this pretrained model with its own tokenizer, instead of a small BERT from scratch",
    )
    parser.add_argument(
        "--device", default=default.device, help="cpu, cuda, cuda:1, ... (%(default)s: cuda if there is one)"
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="of weights, dropout and order (%(default)s)")
    parser.add_argument("--epochs", type=int, default=default.epochs, help="at most (%(default)s)")
    parser.add_argument(
        "--patience",
        type=int,
        default=default.patience,
        help="stop after so many epochs without a better dev F1 (%(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="sentences (%(default)s)")
    parser.add_argument("--learning-rate", type=float, metavar="RATE", help="at its peak (1e-3; 5e-5 with --model)")
    parser.add_argument("--quick", action="store_true", help="a tiny run of some seconds: does everything work?")


def config_from(arguments: argparse.Namespace) -> FinetuneConfig:
    """The checked settings; raises a ValueError that names the bad option."""
    config = FinetuneConfig(
        model=arguments.model,
        output=arguments.output,
        device=arguments.device,
        seed=arguments.seed,
        epochs=arguments.epochs,
        patience=arguments.patience,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
    )
    return config.quick() if arguments.quick else config
