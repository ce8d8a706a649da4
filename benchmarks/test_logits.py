"""Forward and backward of an objective on logits: eager torch, torch.compile, other libraries and objkern.

    python -m objkern bench logits -k 1024x32000

What pytest-benchmark times is objkern's step (as often as `Shape.steps` says). Its rivals run in the same round, just
before it; all times, and the ratios round by round, are in the tables at the end. `--benchmark-verbose` shows
pytest-benchmark's own table too.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import machine
from .accuracy import Loss
from .child import Child
from .contest import OURS, Record, checked, compiled, compiles, contest, described, quick, step
from .contestants import COPY_BYTES, FORWARD, PLAIN_OURS, contestants, kept_bytes, steps
from .figures import Entry
from .workloads import ADDED, DIVERGENCE, PLAIN, SHAPES, SIX, WORKLOADS, Shape, Workload

every_shape = pytest.mark.parametrize("shape", [quick(shape, when=shape.quick) for shape in SHAPES], ids=str)
every_workload = pytest.mark.parametrize("workload", WORKLOADS.values(), ids=str)
LARGE = [(1024, 32000), (512, 128256)]


def in_dtypes(*sizes: tuple[int, int]) -> pytest.MarkDecorator:
    """Of each size float32 and bfloat16 logits."""
    cases = [(*size, dtype) for size in sizes for dtype in (torch.float32, torch.bfloat16)]
    return pytest.mark.parametrize(("rows", "classes", "dtype"), cases, ids=lambda v: str(v).removeprefix("torch."))


@every_workload
@every_shape
def test_forward_backward(
    shape: Shape, workload: Workload, benchmark: BenchmarkFixture, record: Record, pytestconfig: pytest.Config
) -> None:
    inputs = shape.inputs()
    found = contestants(workload, shape, compiles(benchmark, pytestconfig, shape.large))
    of_workload = {name: one.on_a_copy() for name, one in found.items() if name != PLAIN_OURS}
    facts = described("step", shape.rows, shape.classes, shape.dtype, workload.name, why=shape.why)
    facts |= checked(of_workload, workload.eager, inputs)
    timed = steps(found, workload, shape, *inputs)
    facts |= {
        "targets": shape.expected(workload, machine.keeps_pages()), "bytes": shape.bytes, "copy_bytes": COPY_BYTES,
        "kept_bytes": kept_bytes(timed[OURS], inputs[0]),
    }  # fmt: skip
    contest(benchmark, record, pytestconfig, timed, facts)


@every_workload
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_instruction_sets(
    shape: Shape, workload: Workload, benchmark: BenchmarkFixture, children: dict[str, Child], record: Record,
    pytestconfig: pytest.Config,
) -> None:  # fmt: skip
    """The kernels for AVX2, and those for any processor, against AVX-512; each in a process of its own."""
    if "avx512" not in children or len(children) == 1:
        pytest.skip(f"this build on this processor runs {list(children)}: there is nothing to compare AVX-512 with")
    for child in children.values():
        child.prepare(str(shape), workload.name)
    facts = described("instruction set", shape.rows, shape.classes, shape.dtype, workload.name, why=shape.why)
    timed = {name: child.run for name, child in children.items()}
    contest(
        benchmark, record, pytestconfig, timed, facts | {"targets": {"avx2": 0.6}},
        children=[child.process.pid for child in children.values()], warm=False, ours="avx512",
    )  # fmt: skip


# ---- a reference, and more and more terms ---------------------------------------------------------------------------


@in_dtypes(*LARGE, (8192, 1000))
def test_divergence(
    rows: int, classes: int, dtype: torch.dtype, benchmark: BenchmarkFixture, record: Record,
    pytestconfig: pytest.Config,
) -> None:  # fmt: skip
    """KL divergence from a reference's logits."""
    generator = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(rows, classes, generator=generator)).to(dtype).requires_grad_()
    r = (z.detach() + torch.randn(rows, classes, generator=generator)).to(dtype)
    losses = {"eager": DIVERGENCE.eager}
    if compiles(benchmark, pytestconfig):
        losses["compiled"] = compiled(DIVERGENCE.eager)
    losses |= {FORWARD: lambda z, r: DIVERGENCE.objective(z, r, gradient="forward"), OURS: DIVERGENCE.objective}
    facts = described("divergence", rows, classes, dtype, "KL, T = 2", targets={"eager": 5.0})
    facts |= checked(losses, DIVERGENCE.eager, (z, r))
    contest(benchmark, record, pytestconfig, {name: step(loss, (z, r)) for name, loss in losses.items()}, facts)


@in_dtypes(*LARGE)
def test_six_terms(
    rows: int, classes: int, dtype: torch.dtype, benchmark: BenchmarkFixture, record: Record,
    pytestconfig: pytest.Config,
) -> None:  # fmt: skip
    inputs = Shape(rows, classes, dtype, "").inputs()
    losses = {"eager": SIX.eager, OURS: SIX.objective, FORWARD: in_forward(SIX)}
    facts = described("six terms", rows, classes, dtype, SIX.name, targets={"price": 1.15})
    facts |= checked(losses, SIX.eager, inputs)
    losses |= {PLAIN_OURS: PLAIN.objective, f"{PLAIN_OURS}, forward": in_forward(PLAIN)}
    contest(benchmark, record, pytestconfig, {name: step(loss, inputs) for name, loss in losses.items()}, facts)


def in_forward(workload: Workload) -> Loss:
    return lambda z, y: workload.objective(z, y, gradient="forward")


@pytest.mark.quick
def test_added_terms(benchmark: BenchmarkFixture, record: Record, pytestconfig: pytest.Config) -> None:
    """What each further term costs: cross-entropy, then one more and one more."""
    inputs = Shape(128, 32000, torch.float32, "").inputs()
    facts = described("added terms", 128, 32000, torch.float32, "one by one", terms=[w.name for w in ADDED])
    timed = {}
    errors: Entry = {}
    for number, workload in enumerate(ADDED, 1):
        losses = {"eager": workload.eager, OURS: workload.objective}
        errors |= {
            f"{name}, {number}": error for name, error in checked(losses, workload.eager, inputs)["errors"].items()
        }
        timed |= {f"{name}, {number}": step(loss, inputs) for name, loss in losses.items()}
    contest(benchmark, record, pytestconfig, timed, facts | {"errors": errors}, ours=f"{OURS}, 1")
