"""Elementwise objectives, and terms on parameters, against eager torch and torch.compile, in paired rounds.

python -m pytest benchmarks/test_elementwise.py -k binary
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from objkern import L2, L2SP

from . import machine
from .contestants import FORWARD, OURS
from .figures import Entry
from .pairing import Step, race
from .test_objective import Record, compare
from .workloads import ELEMENTWISE, Workload

SHAPE = (4096, 1024)  # 4M elements


def step(loss: Callable[[], Tensor], *leaves: Tensor) -> Step:
    """Drop the old gradients, forward, backward."""

    def run() -> float:
        start = perf_counter()
        for leaf in leaves:
            leaf.grad = None
        loss().backward()
        return perf_counter() - start

    return run


def contest(benchmark: BenchmarkFixture, record: Record, rounds: int, timed: dict[str, Step], entry: Entry) -> None:
    """Paired rounds, recorded as `entry` with the times and their ratios to objkern's."""
    others = machine.Others()
    seconds = race(benchmark, timed, OURS, rounds)
    if not benchmark.disabled:
        record(entry | compare(seconds, OURS) | {"others": others.cores()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("workload", ELEMENTWISE, ids=str)
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
    timed = {name: step(lambda loss=loss: loss(z, y), z) for name, loss in losses.items()}
    entry = {
        "kind": "elementwise", "rows": SHAPE[0], "classes": SHAPE[1], "dtype": str(dtype)[6:],
        "workload": workload.name,
        "targets": {"eager": 3.0} if "penalties" in workload.name else {"eager": 1.0},
    }  # fmt: skip
    contest(benchmark, record, pytestconfig.getoption("--rounds") or 31, timed, entry)


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


@pytest.mark.parametrize("name", ["L2", "L2SP"])
def test_penalties(name: str, benchmark: BenchmarkFixture, record: Record, pytestconfig: pytest.Config) -> None:
    """A penalty's value and gradients, against the sum over the parameters as training scripts have it."""
    theta = parameters()
    origins = [p.detach().clone() for p in theta]

    def naive() -> Tensor:
        if name == "L2":
            return sum(0.5 * p.square().sum() for p in theta)
        return sum(0.5 * (p - origin).square().sum() for p, origin in zip(theta, origins, strict=True))

    term = {"L2": L2, "L2SP": L2SP}[name](theta)
    torch.testing.assert_close(term(), naive(), rtol=1e-5, atol=0.0)
    timed = {"eager": step(naive, *theta), OURS: step(term, *theta)}
    benchmark.group = name
    entry = {
        "kind": "penalty", "rows": 1, "classes": sum(p.numel() for p in theta), "dtype": "float32", "workload": name,
        "targets": {"eager": 2.0},
    }  # fmt: skip
    contest(benchmark, record, pytestconfig.getoption("--rounds") or 31, timed, entry)
