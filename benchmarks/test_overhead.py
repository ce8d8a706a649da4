"""What a call costs the host: tiny shapes, on which the arithmetic takes next to nothing.

python -m objkern bench overhead
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import objkern
from objkern import L2, CrossEntropy

from .accuracy import Loss
from .contest import OURS, Record, checked, contest, described, quick, step
from .contestants import DROP_IN
from .routes import routes
from .workloads import REGULARIZED

CALLS = 50  # timed together


def logits(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rows, classes, generator=generator).to(dtype).requires_grad_()
    return z, torch.randint(0, classes, (rows,), generator=generator)


def head() -> tuple[Tensor, ...]:
    hidden, labels = logits(32, 16)
    return hidden, torch.randn(9, 16, generator=torch.Generator().manual_seed(1)).requires_grad_(), labels % 9


def pair() -> tuple[Tensor, ...]:
    z, _ = logits(32, 9)
    return z, torch.rand(32, 9, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Call:
    """The same by torch and by objkern, on inputs of next to no size."""

    name: str
    inputs: Callable[[], tuple[Tensor, ...]]
    eager: Loss
    ours: Callable[[tuple[Tensor, ...]], dict[str, Loss]]  # may be made for the inputs
    targets: dict[str, float]
    shared: tuple[int, ...] = ()
    quick: bool = False

    def __str__(self) -> str:
        return self.name


def weights() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(8, 8, generator=generator).requires_grad_() for _ in range(8))


def norms(*theta: Tensor) -> Tensor:
    return sum(0.5 * p.square().sum() for p in theta)


def of_cross_entropy(_: object) -> dict[str, Loss]:
    return {**routes(), DROP_IN: objkern.cross_entropy, OURS: CrossEntropy()}


def of_weights(theta: tuple[Tensor, ...]) -> dict[str, Loss]:
    term = L2(theta)
    return {OURS: lambda *_: term()}


AT_MOST = {"eager": 1 / 1.1}  # a tenth more than torch's own
CALLS_OF = [
    Call("cross_entropy", lambda: logits(32, 9), F.cross_entropy, of_cross_entropy, AT_MOST, quick=True),
    Call("cross_entropy, 512 x 32 bfloat16", lambda: logits(512, 32, torch.bfloat16), F.cross_entropy,
         of_cross_entropy, AT_MOST),
    Call("regularized", lambda: logits(32, 9), REGULARIZED.eager, lambda _: {OURS: REGULARIZED.objective},
         {"eager": 2.0}, quick=True),
    Call("linear", head, lambda h, w, y: F.cross_entropy(F.linear(h, w), y),
         lambda _: {"objkern.linear_cross_entropy": objkern.linear_cross_entropy, OURS: CrossEntropy().linear}, {},
         shared=(1,)),
    Call("binary_cross_entropy_with_logits", pair, F.binary_cross_entropy_with_logits,
         lambda _: {OURS: objkern.binary_cross_entropy_with_logits}, {}),
    Call("mse_loss", pair, F.mse_loss, lambda _: {OURS: objkern.mse_loss}, {}),
    Call("L2 of 8 weights", weights, norms, of_weights, {}, shared=tuple(range(8))),
]  # fmt: skip


@pytest.mark.parametrize("call", [quick(call, when=call.quick) for call in CALLS_OF], ids=str)
def test_overhead(call: Call, benchmark: BenchmarkFixture, record: Record, pytestconfig: pytest.Config) -> None:
    inputs = call.inputs()
    losses = {"eager": call.eager, **call.ours(inputs)}
    facts = described("overhead", *inputs[0].shape, inputs[0].dtype, call.name, targets=call.targets)
    facts |= checked(losses, call.eager, inputs, call.shared)
    contest(benchmark, record, pytestconfig, {name: step(loss, inputs, CALLS) for name, loss in losses.items()}, facts)
