"""What is timed: shapes that people train on, objectives, and who computes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from objkern import CrossEntropy, Entropy, Objective, ZLoss

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """(N, V) logits of a dtype, why they are worth measuring, and how many rounds make a steady median."""

    rows: int
    classes: int
    dtype: torch.dtype
    why: str
    rounds: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.classes}-{str(self.dtype).removeprefix('torch.')}"

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Logits N(0, 3²), about the spread of a language model's, and random labels."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(self.rows, self.classes, generator=generator).mul_(3).to(self.dtype)
        return logits.requires_grad_(), torch.randint(0, self.classes, (self.rows,), generator=generator)

    @property
    def bytes(self) -> int:
        """What a forward and backward pass cannot do without: read the logits twice, write the gradient once.

        Labels and numbers per row are not counted.
        """
        return 3 * self.rows * self.classes * self.dtype.itemsize


SHAPES = [
    Shape(1024, 32000, torch.float32, "vocabulary of T5 and LLaMA-2", 15),
    Shape(1024, 32000, torch.bfloat16, "the same in half precision", 11),
    Shape(512, 128256, torch.float32, "vocabulary of Llama-3", 11),
    Shape(8192, 1000, torch.float32, "ImageNet", 31),
    Shape(65536, 10, torch.float32, "many rows of few classes", 51),
    Shape(4096, 9, torch.float32, "token classification (CoNLL-2003)", 301),
]


@dataclass(frozen=True)
class Workload:
    """One objective, as objkern and as eager torch compute it."""

    name: str
    objective: Objective
    eager: Loss
    floor: float  # least median ratio eager / objkern that passes at V >= 32000

    def __str__(self) -> str:
        return self.name


def eager_regularized(logits: Tensor, target: Tensor) -> Tensor:
    """The formula term by term, as it stands in most training scripts."""
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    z_loss = logits.logsumexp(-1).square().mean()
    return F.cross_entropy(logits, target, label_smoothing=0.1) + 1e-4 * z_loss - 0.01 * entropy


PLAIN = Workload("plain", CrossEntropy(), F.cross_entropy, floor=1.0)
REGULARIZED = Workload(
    "regularized", CrossEntropy(label_smoothing=0.1) + 1e-4 * ZLoss() - 0.01 * Entropy(), eager_regularized, floor=5.0
)


def step(loss: Loss, logits: Tensor, target: Tensor) -> Callable[[], None]:
    """A training step's share: drop the old gradient, forward, backward."""

    def run() -> None:
        logits.grad = None
        loss(logits, target).backward()

    return run


def upcast(loss: Loss) -> Loss:
    """Half-precision logits go through float32, as Transformers does."""
    return lambda logits, target: loss(logits.float(), target)


OBJKERN_PLAIN = "objkern, plain"  # beside regularized objectives, for what the regularizers cost


def contestants(workload: Workload, shape: Shape) -> dict[str, Loss]:
    """Name -> loss; the last is the one that the benchmark is about."""
    found: dict[str, Loss] = {"eager": workload.eager}
    if shape.dtype.itemsize < 4:
        found["eager, float32"] = upcast(workload.eager)
    if workload is not PLAIN:
        found[OBJKERN_PLAIN] = PLAIN.objective
    return {**found, "objkern": workload.objective}
