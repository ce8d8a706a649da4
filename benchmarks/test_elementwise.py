"""Elementwise objectives, and terms on parameters, against eager torch and torch.compile, in paired rounds.

python -m pytest benchmarks/test_elementwise.py -k binary
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import objkern
from objkern import L2, L2SP

from . import machine
from .contestants import FORWARD, OURS
from .pairing import Step, race
from .test_objective import Record, compare
from .workloads import Workload

SHAPE = (4096, 1024)  # 4M elements


def binary(z: Tensor, y: Tensor) -> Tensor:
    loss = F.binary_cross_entropy_with_logits(z, y * 0.9 + 0.05)
    return loss - 0.01 * torch.distributions.Bernoulli(logits=z).entropy().mean() + 1e-4 * z.square().mean()


def squares(z: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(z, y) + 0.1 * F.huber_loss(z, y) + 1e-4 * z.square().mean()


WORKLOADS = [
    Workload("binary", objkern.parse("BinaryCrossEntropy()"), F.binary_cross_entropy_with_logits),
    Workload(
        "binary, penalties",
        objkern.parse("BinaryCrossEntropy(label_smoothing=0.1) - 0.01*BernoulliEntropy() + 0.0001*LogitL2()"), binary,
    ),
    Workload("squares", objkern.parse("MeanSquaredError()"), F.mse_loss),
    Workload("squares, penalties", objkern.parse("MeanSquaredError() + 0.1*Huber() + 0.0001*LogitL2()"), squares),
]  # fmt: skip


def step(loss: Callable[[], Tensor], *leaves: Tensor) -> Step:
    """Drop the old gradients, forward, backward."""

    def run() -> float:
        start = perf_counter()
        for leaf in leaves:
            leaf.grad = None
        loss().backward()
        return perf_counter() - start

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_elementwise(
    workload: Workload, dtype: torch.dtype, benchmark: BenchmarkFixture, record: Record, pytestconfig: pytest.Config
) -> None:
    generator = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(SHAPE, generator=generator)).to(dtype).requires_grad_()
    y = torch.rand(SHAPE, generator=generator).round().to(dtype)
    losses = {"eager": workload.eager}
    if benchmark.enabled and not pytestconfig.getoption("--no-compile"):
        torch._dynamo.reset()
        losses["compiled"] = torch.compile(workload.eager, dynamic=False, fullgraph=True)
        losses["compiled"](z, y).backward()
    losses |= {FORWARD: lambda z, y: workload.objective(z, y, gradient="forward"), OURS: workload.objective}
    assert_as_accurate(workload, z, y)
    benchmark.group = f"{workload}, {dtype}"
    others = machine.Others()
    timed = {name: step(lambda loss=loss: loss(z, y), z) for name, loss in losses.items()}
    seconds = race(benchmark, timed, OURS, pytestconfig.getoption("--rounds") or 31)
    if benchmark.disabled:
        return
    record(
        {"kind": "elementwise", "rows": SHAPE[0], "classes": SHAPE[1], "dtype": str(dtype)[6:],
         "workload": workload.name}
        | compare(seconds, OURS)
        | {"others": others.cores(), "targets": {"eager": 3.0} if "penalties" in workload.name else {"eager": 1.0}}
    )  # fmt: skip


def assert_as_accurate(workload: Workload, z: Tensor, y: Tensor) -> None:
    """Before anything is timed: on a piece, at most twice eager torch's error against float64."""
    z, y = z.detach()[:64], y[:64]
    found = []
    for loss, x in ((workload.objective, z), (workload.eager, z), (workload.eager, z.double())):
        leaf = x.clone().requires_grad_()
        value = loss(leaf, y.to(x))
        found.append((value.detach().double(), torch.autograd.grad(value, leaf)[0].double()))
    rounding = 1e-6 if z.dtype == torch.float32 else 4e-3
    for ours, theirs, truth in zip(*found, strict=True):
        error, allowed = ((x - truth).norm() / truth.norm() for x in (ours, theirs))
        assert error <= 2 * allowed + rounding, f"error {error:.1e}, eager torch's {allowed:.1e}"


# ---- terms on parameters --------------------------------------------------------------------------------------------

VOCABULARY, WIDTH, LAYERS = 30522, 384, 6  # of a sentence encoder with 22M parameters


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    block = [(WIDTH, WIDTH)] * 4 + [(4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]
    shapes = [(VOCABULARY, WIDTH), (512, WIDTH), *(block * LAYERS)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def pull(p: Tensor, origin: Tensor) -> Tensor:
    return 0.5 * (p - origin).square().sum()


@pytest.mark.parametrize("name", ["L2", "L2SP"])
def test_penalties(name: str, benchmark: BenchmarkFixture, record: Record, pytestconfig: pytest.Config) -> None:
    """A penalty's value and gradients, against the sum over the parameters as training scripts have it."""
    theta = parameters()
    origins = [p.detach().clone() for p in theta]
    if name == "L2":
        term, naive = L2(theta), lambda: sum(0.5 * p.square().sum() for p in theta)
    else:
        term = L2SP(theta)
        naive = lambda: sum(pull(p, o) for p, o in zip(theta, origins, strict=True))  # noqa: E731
    torch.testing.assert_close(term(), naive(), rtol=1e-5, atol=0.0)
    timed = {"eager": step(naive, *theta), OURS: step(term, *theta)}
    benchmark.group = name
    others = machine.Others()
    seconds = race(benchmark, timed, OURS, pytestconfig.getoption("--rounds") or 31)
    if benchmark.disabled:
        return
    record(
        {"kind": "penalty", "rows": 1, "classes": sum(p.numel() for p in theta), "dtype": "float32", "workload": name}
        | compare(seconds, OURS)
        | {"others": others.cores(), "targets": {"eager": 2.0}}
    )
