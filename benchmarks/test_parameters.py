"""Terms on parameters: value and gradients in one pass, against the sum that training scripts have.

python -m objkern bench parameters
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from objkern import L2, L2SP

from .contest import OURS, Record, checked, contest, described, quick, step

VOCABULARY, WIDTH, LAYERS = 30522, 384, 6  # of a sentence encoder with 22M parameters


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    block = [(WIDTH, WIDTH)] * 4 + [(4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]
    shapes = [(VOCABULARY, WIDTH), (512, WIDTH), *(block * LAYERS)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("name", ["L2", quick("L2SP")])
def test_penalties(name: str, benchmark: BenchmarkFixture, record: Record, pytestconfig: pytest.Config) -> None:
    theta = parameters()
    origins = [p.detach().clone() for p in theta]
    term = {"L2": L2, "L2SP": L2SP}[name](theta)
    with torch.no_grad():  # a way from there
        for p in theta:
            p.add_(torch.randn_like(p), alpha=0.1)

    def eager(*theta: Tensor) -> Tensor:
        if name == "L2":
            return sum(0.5 * p.square().sum() for p in theta)
        return sum(0.5 * (p - origin).square().sum() for p, origin in zip(theta, origins, strict=True))

    losses = {"eager": eager, OURS: lambda *theta: term()}
    facts = described("penalty", 1, sum(p.numel() for p in theta), torch.float32, name, targets={"eager": 2.0})
    facts |= checked(losses, eager, theta, shared=range(len(theta)))
    contest(benchmark, record, pytestconfig, {who: step(loss, theta) for who, loss in losses.items()}, facts)
