"""Time over the size: rows grow, or classes do; and past 2³¹ logits, where memory allows.

python -m objkern bench scaling
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from .contest import Record, contest, described, quick, step
from .contestants import PLAIN_OURS
from .machine import available_bytes
from .workloads import PLAIN, REGULARIZED

CLASSES, ROWS = 32000, 1024
SIZES = [(4**i, CLASSES) for i in range(8)] + [(ROWS, 10 * 4**i) for i in range(8)] + [(ROWS, 524288)]
OURS = "objkern, regularized"
WIDEST = 1 << 18  # classes; with 2¹³ rows 2³¹ logits, the first that 32 bits do not count
SMALL = 10**7  # logits, below which `--size quick` goes


@pytest.fixture(scope="module")
def numbers() -> Iterator[list[Tensor]]:
    """Random numbers enough for the sizes so far: making them anew would take longer than the benchmark."""
    held: list[Tensor] = []
    yield held
    held.clear()


def some(held: list[Tensor], count: int) -> Tensor:
    if not held or held[0].numel() < count:
        held[:] = [torch.empty(max(count, SMALL)).normal_(0, 3, generator=torch.Generator().manual_seed(0))]
    return held[0][:count]


@pytest.mark.parametrize(("rows", "classes"), [quick(n, v, when=n * v < SMALL) for n, v in SIZES])
def test_linearity(
    rows: int, classes: int, benchmark: BenchmarkFixture, record: Record, pytestconfig: pytest.Config,
    numbers: list[Tensor],
) -> None:  # fmt: skip
    if benchmark.disabled:
        pytest.skip("nothing is measured")
    logits = some(numbers, rows * classes).view(rows, classes).requires_grad_()
    inputs = (logits, torch.randint(0, classes, (rows,)))
    losses = {"eager": PLAIN.eager, PLAIN_OURS: PLAIN.objective, OURS: REGULARIZED.objective}
    repeat = max(1, 10**6 // (rows * classes))
    facts = described(
        "linearity", rows, classes, torch.float32, "both", sweep="rows" if classes == CLASSES else "classes"
    )
    timed = {name: step(loss, inputs, repeat) for name, loss in losses.items()}
    contest(benchmark, record, pytestconfig, timed, facts, ours=OURS, share=0.3)


@pytest.mark.parametrize("rows", [1 << k for k in (2, 6, 10, 13, 14)])
def test_past_31_bits(rows: int, benchmark: BenchmarkFixture, record: Record, pytestconfig: pytest.Config) -> None:
    """Of the last rows, whose places no 32 bits hold, the gradient is held against float64."""
    needed, free = 4 * rows * WIDEST, available_bytes()
    if benchmark.disabled or free < needed + (2 << 30):
        pytest.skip(f"logits and gradient take {needed / 2**30:.0f} GiB, of {free / 2**30:.0f} that are free")
    pattern = torch.empty(1 << 22).normal_(0, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits = torch.empty(rows * WIDEST, dtype=torch.bfloat16)
    for part in logits.split(pattern.numel()):
        part.copy_(pattern[: part.numel()])
    logits = logits.view(rows, WIDEST).requires_grad_()
    labels = torch.randint(0, WIDEST, (rows,), generator=torch.Generator().manual_seed(0))
    losses = {PLAIN_OURS: PLAIN.objective, OURS: REGULARIZED.objective}
    formulas = {PLAIN_OURS: PLAIN.eager, OURS: REGULARIZED.eager}
    errors = {name: [0.0, error_of_last(losses[name], logits, labels, formulas[name])] for name in losses}
    assert all(error < 4e-3 for _, error in errors.values()), errors  # of rounding to bfloat16: 2⁻⁸ at most
    facts = described("linearity", rows, WIDEST, torch.bfloat16, "both", sweep="widest", errors=errors)
    timed = {name: step(loss, (logits, labels)) for name, loss in losses.items()}
    contest(benchmark, record, pytestconfig, timed, facts, ours=OURS, share=0.3)


def error_of_last(loss: object, logits: Tensor, labels: Tensor, exact: object, count: int = 3) -> float:
    (gradient,) = torch.autograd.grad(loss(logits, labels), logits)
    last = logits.detach()[-count:].double().requires_grad_()
    value = exact(last, labels[-count:]) * (len(last) / len(logits))
    (truth,) = torch.autograd.grad(value, last)
    return ((gradient[-count:].double() - truth).norm() / truth.norm()).item()
