"""What is timed: shapes that people train on with the speed that is expected there, and the objectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from objkern import (
    BernoulliEntropy,
    BinaryCrossEntropy,
    CrossEntropy,
    Entropy,
    Focal,
    Huber,
    KLDivergence,
    LogitL2,
    MeanSquaredError,
    Objective,
    Poly1,
    ZLoss,
)

Loss = Callable[..., Tensor]
Targets = dict[str, float]  # what each number means: figures.TARGETS


@dataclass(frozen=True)
class Workload:
    """One objective, as objkern and as eager torch compute it."""

    name: str
    objective: Objective | Beside
    eager: Loss

    def __str__(self) -> str:
        return self.name


def eager_plain(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def eager_regularized(logits: Tensor, target: Tensor) -> Tensor:
    """The formula term by term, as it stands in most training scripts."""
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    z_loss = logits.logsumexp(-1).square().mean()
    l2 = logits.square().mean()
    return F.cross_entropy(logits, target, label_smoothing=0.1) + 1e-4 * z_loss - 0.01 * entropy + 1e-3 * l2


PLAIN = Workload("plain", CrossEntropy(), eager_plain)
REGULARIZED = Workload(
    "regularized",
    CrossEntropy(label_smoothing=0.1) + 1e-4 * ZLoss() - 0.01 * Entropy() + 1e-3 * LogitL2(),
    eager_regularized,
)
SIX = Workload(
    "six terms", REGULARIZED.objective + 0.1 * Focal(gamma=2.0) + 0.1 * Poly1(epsilon=1.0),
    lambda logits, target: eager_regularized(logits, target) + eager_focal_and_poly(logits, target),
)  # fmt: skip


def eager_focal(nll: Tensor) -> Tensor:
    return ((1 - (-nll).exp()).square() * nll).mean()


def eager_poly(nll: Tensor) -> Tensor:
    return (nll + 1 - (-nll).exp()).mean()


def eager_focal_and_poly(logits: Tensor, target: Tensor) -> Tensor:
    nll = F.cross_entropy(logits, target, reduction="none")
    return 0.1 * eager_focal(nll) + 0.1 * eager_poly(nll)


WORKLOADS = {workload.name: workload for workload in (PLAIN, REGULARIZED)}


def one_by_one() -> list[Workload]:
    """Cross-entropy, and then a term more and a term more, as objkern and as the sum of the usual formulas."""
    objective, eager = CrossEntropy(), [eager_plain]
    found = [Workload("CrossEntropy", objective, eager_plain)]
    for term, formula in (
        (1e-4 * ZLoss(), lambda z, y: 1e-4 * z.logsumexp(-1).square().mean()),
        (-0.01 * Entropy(), lambda z, y: 0.01 * (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()),
        (1e-3 * LogitL2(), lambda z, y: 1e-3 * z.square().mean()),
        (0.1 * Focal(gamma=2.0), lambda z, y: 0.1 * eager_focal(F.cross_entropy(z, y, reduction="none"))),
        (0.1 * Poly1(epsilon=1.0), lambda z, y: 0.1 * eager_poly(F.cross_entropy(z, y, reduction="none"))),
    ):
        objective, eager = objective + term, [*eager, formula]
        found.append(Workload(
            f"+ {type(term.weighted_terms[0][1]).__name__}", objective,
            lambda z, y, formulas=eager: sum(formula(z, y) for formula in formulas),
        ))  # fmt: skip
    return found


def eager_binary(z: Tensor, y: Tensor) -> Tensor:
    loss = F.binary_cross_entropy_with_logits(z, y * 0.9 + 0.05)
    return loss - 0.01 * torch.distributions.Bernoulli(logits=z).entropy().mean() + 1e-4 * z.square().mean()


def eager_squares(z: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(z, y) + 0.1 * F.huber_loss(z, y) + 1e-4 * z.square().mean()


# On predictions and targets of one shape.
ELEMENTWISE = [
    Workload("binary", BinaryCrossEntropy(), F.binary_cross_entropy_with_logits),
    Workload(
        "binary, penalties",
        BinaryCrossEntropy(label_smoothing=0.1) - 0.01 * BernoulliEntropy() + 1e-4 * LogitL2(), eager_binary,
    ),
    Workload("squares", MeanSquaredError(), F.mse_loss),
    Workload("squares, penalties", MeanSquaredError() + 0.1 * Huber() + 1e-4 * LogitL2(), eager_squares),
]  # fmt: skip


class Beside:
    """A divergence as a function of two logits, the second those of a reference."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def __call__(self, z: Tensor, r: Tensor, **options: Any) -> Tensor:
        return self.objective(z, reference=r, **options)


def eager_divergence(z: Tensor, r: Tensor) -> Tensor:
    """As in most distillation scripts."""
    return 4.0 * F.kl_div((z / 2.0).log_softmax(-1), (r / 2.0).softmax(-1), reduction="batchmean")


DIVERGENCE = Workload("divergence", Beside(KLDivergence(temperature=2.0)), eager_divergence)


@dataclass(frozen=True)
class Shape:
    """(N, V) logits of a dtype, why they are worth measuring, and how fast objkern has to be on them."""

    rows: int
    classes: int
    dtype: torch.dtype
    why: str
    targets: dict[str, Targets] = field(default_factory=dict, hash=False)  # by workload; without: no slower than eager
    steps: int = 1  # timed together: the clock and the change of turns would weigh on a single small one
    quick: bool = False  # `--size quick` has it

    def __str__(self) -> str:
        return f"{self.rows}x{self.classes}-{str(self.dtype).removeprefix('torch.')}"

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Logits N(0, 3²), about the spread of a language model's, and random labels."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(self.rows, self.classes, generator=generator).mul_(3).to(self.dtype)
        return logits.requires_grad_(), torch.randint(0, self.classes, (self.rows,), generator=generator)

    def expected(self, workload: Workload, keeps_pages: bool) -> Targets:
        """Where glibc keeps its pages, eager torch's buffers are reused like objkern's: the least is not to be slower.

        That concerns plain cross-entropy; what regularizers cost eager torch is arithmetic and passes over memory.
        """
        targets = self.targets.get(workload.name, {"eager": 1.0})
        return targets | {"eager": 1.0} if keeps_pages and workload is PLAIN else targets

    @property
    def bytes(self) -> int:
        """Of the logits, and of their gradient. Labels and numbers per row are not counted anywhere."""
        return self.rows * self.classes * self.dtype.itemsize

    @property
    def large(self) -> bool:
        """Memory is what it costs: pages of fresh buffers, bandwidth."""
        return self.bytes >= 1 << 24

    @property
    def vocabulary(self) -> bool:
        return self.large and self.classes >= 32000


PLAIN_VOCABULARY = {"eager": 3.0, "compiled": 1.5}
REGULARIZED_VOCABULARY = {"eager": 12.0, "compiled": 2.5, "price": 1.08}
VOCABULARY = {"plain": PLAIN_VOCABULARY, "regularized": REGULARIZED_VOCABULARY}
STREAMING = VOCABULARY | {"plain": {"eager": 5.0, "compiled": 1.5, "copy": 0.35}}

SHAPES = [
    Shape(
        256,
        32000,
        torch.float32,
        "T5, Llama-2: a small batch",
        {
            "plain": {"eager": 2.0},
            "regularized": {"eager": 10.0, "price": 1.15},
        },
        quick=True,
    ),
    Shape(1024, 32000, torch.float32, "T5, Llama-2", STREAMING),
    Shape(1024, 32000, torch.bfloat16, "the same in bfloat16", VOCABULARY),
    Shape(1024, 32000, torch.float16, "the same in float16"),
    Shape(4096, 32000, torch.float32, "a gradient of 524 MB", VOCABULARY),
    Shape(1024, 30522, torch.float32, "BERT: rows that fill no whole vectors", VOCABULARY),
    Shape(1024, 50257, torch.float32, "GPT-2: an odd number of classes", VOCABULARY),
    Shape(512, 128256, torch.float32, "Llama-3", STREAMING),
    Shape(512, 128256, torch.bfloat16, "the same in bfloat16", VOCABULARY),
    Shape(256, 151936, torch.bfloat16, "Qwen", VOCABULARY),
    Shape(256, 256000, torch.bfloat16, "Gemma", VOCABULARY),
    Shape(8, 128256, torch.float32, "few long rows"),
    Shape(64, 50257, torch.float32, "a small batch of GPT-2"),
    Shape(8192, 1000, torch.float32, "ImageNet", {"plain": {"eager": 3.5}}),
    Shape(16384, 129, torch.float32, "rows of an odd size"),
    Shape(65536, 10, torch.float32, "many rows of few classes", {"plain": {"eager": 1.0, "compiled": 1.2}}),
    Shape(4096, 9, torch.float32, "token classification (CoNLL-2003)", {"plain": {"eager": 1.0}}, steps=10, quick=True),
    Shape(4096, 9, torch.bfloat16, "the same in bfloat16", steps=10),
    Shape(32, 9, torch.float32, "the cost of a call", {"plain": {"eager": 1 / 1.1}}, steps=50),
]
ADDED = one_by_one()
