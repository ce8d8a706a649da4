"""What the emulated CUDA kernels must get right, whatever plan they are launched with and whoever runs first.

test_cuda_emulation.py runs this file inside a build whose CPU tensors go to the emulated kernels.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import zlib
from typing import NamedTuple

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import objkern
from objkern import CrossEntropy, Entropy, KLDivergence, LogitL2, MaxZLoss, ZLoss, custom
from tests import properties
from tests.conftest import (
    DTYPES,
    EVERY_TERM,
    NATIVE,
    assert_masks_are_no_part_of_a_gradient,
    assert_rounded,
    assert_within_budget,
    masked_sides,
    random_rows,
)

from . import control
from .control import A100, SMALL, Plan

# Around a vector, a warp's vectors, a block's; primes; powers of two.
SIZES = [1, 2, 7, 8, 9, 31, 33, 127, 130, 513, 1023, 1024, 1025, 1031, 4099]
CLUSTERS = [Plan(cluster, resident) for cluster in (1, 2, 4, 8) for resident in (False, True)]
LANES = [Plan(lanes=lanes) for lanes in (1, 2, 4, 8, 16, 32)]
PLANS = [*CLUSTERS, *LANES]
UPSTREAM = 0.7
ROWS = 7  # more than there are teams: each has rows in turn

PLAIN = CrossEntropy()
REGULARIZED = CrossEntropy(label_smoothing=0.1) + 0.01 * ZLoss() - 0.1 * Entropy()
SQUARE = REGULARIZED + 0.1 * LogitL2()
EVERY = objkern.parse(EVERY_TERM.replace("+ 0.2*Unlikelihood() ", ""))  # infinite where V = 1
OBJECTIVES = {"plain": PLAIN, "entropy": REGULARIZED, "square": SQUARE, "every": EVERY}  # of every depth

TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-12, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of gradients
OF_LOSS = {dtype: 1e-12 if dtype == torch.float64 else 4e-6 for dtype in DTYPES}


def name_of(plan: Plan) -> str:
    return f"lanes{plan.lanes}" if plan.lanes else f"cluster{plan.cluster}{'-resident' * plan.resident}"


every_plan = pytest.mark.parametrize("plan", PLANS, ids=name_of)
every_cluster = pytest.mark.parametrize("plan", CLUSTERS, ids=name_of)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _poisoned_outputs(request: pytest.FixtureRequest) -> None:
    """at::empty gives NaN: an element that no thread writes is seen. And every test has schedules of its own."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    control.seed(zlib.crc32(request.node.nodeid.encode()))


class Found(NamedTuple):
    loss: Tensor
    gradient: Tensor
    parts: dict[str, Tensor]
    fused: Tensor | None = None  # the gradient of the forward pass as it was written: that under an upstream of 1


def run(
    objective: objkern.Objective, z: Tensor, y: Tensor | None, plan: Plan | None = None, upstream: float | Tensor = UPSTREAM,
    **options,
) -> Found:  # fmt: skip
    """Loss, gradients and parts, and the logits found as they were.

    Under another upstream gradient than 1 the gradient of the forward pass is computed anew, and what was wrong with it
    would not show: it is asked for first, as it is.
    """
    x = z.detach().requires_grad_()
    before = z.detach().clone()
    fused = None
    with control.plan(plan):
        loss, parts = objective(x, y, return_parts=True, **options)
        if options.get("gradient") == "forward":
            (fused,) = torch.autograd.grad(loss, x, retain_graph=True)
        (gradient,) = torch.autograd.grad(loss, x, torch.as_tensor(upstream, dtype=loss.dtype).expand_as(loss))
    assert torch.equal(z.detach().view(torch.uint8), before.view(torch.uint8)), "the logits were written to"
    return Found(loss.detach(), gradient, parts, fused)


def truth(
    objective: objkern.Objective, z: Tensor, y: Tensor | None, upstream: float | Tensor = UPSTREAM, **options
) -> Found:
    if y is not None and y.is_floating_point():
        y = y.double()
    return run(objective, z.double(), y, None, upstream, backend="reference", **options)


def assert_same(
    found: Found, expected: Found, dtype: torch.dtype, what: object = "", upstream: float = UPSTREAM
) -> None:
    def close(a: Tensor, b: Tensor, name: str) -> None:
        assert_rounded(a, b, OF_LOSS[dtype], lambda m: f"{what} {name}: {m}")

    close(found.loss, expected.loss, "loss")
    close(found.gradient, expected.gradient, "gradient")
    if found.fused is not None:
        close(found.fused, expected.gradient / upstream, "gradient of the forward pass")
    assert found.parts.keys() == expected.parts.keys()
    for name, value in expected.parts.items():
        close(found.parts[name], value, name)


def bits(found: Found) -> list[Tensor]:
    return [
        t.reshape(-1).view(torch.uint8)
        for t in (found.loss, found.gradient, found.fused, *found.parts.values())
        if t is not None
    ]


def same_bits(a: Found, b: Found) -> bool:
    return all(torch.equal(s, t) for s, t in zip(bits(a), bits(b), strict=True))


@functools.cache
def batch(classes: int, dtype: torch.dtype, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """With the label at both ends of rows, and an ignored row."""
    z, y = random_rows(rows, classes, dtype)
    y[0], y[1] = 0, classes - 1
    if rows > 2:
        y[2] = -100
    return z, y


@functools.cache
def expected(name: str, classes: int, dtype: torch.dtype, reduction: str) -> Found:
    return truth(OBJECTIVES[name], *batch(classes, dtype), reduction=reduction)


# ---- sizes ------------------------------------------------------------------------------------------------------------


@every_plan
@every_dtype
def test_every_size_under_every_plan(dtype: torch.dtype, plan: Plan) -> None:
    """Heads, tails, a last tile that is short or empty, threads without a class, and rows that take turns."""
    for classes in SIZES:
        if (plan.lanes and classes > 1031) or (plan.cluster > 2 and classes in (2, 8, 31, 513, 1023)):
            continue
        z, y = batch(classes, dtype)
        for name in ("plain", "every") if classes in (7, 130, 1031, 4099) else ("every",):
            fused = run(OBJECTIVES[name], z, y, plan, gradient="forward")
            assert_same(fused, expected(name, classes, dtype, "mean"), dtype, (name, classes, "fused"))


@every_dtype
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("plan", [Plan(1, False), Plan(2, True), Plan(4, False), Plan(lanes=8)], ids=name_of)
def test_every_depth(plan: Plan, name: str, dtype: torch.dtype) -> None:
    """Each is kernels of its own; and unreduced, where the gradient comes from the coefficients that were kept."""
    for classes in (9, 130, 1031):
        z, y = batch(classes, dtype)
        for reduction, gradient in (("mean", "forward"), ("sum", "backward"), ("none", "backward")):
            found = run(OBJECTIVES[name], z, y, plan, reduction=reduction, gradient=gradient)
            assert_same(found, expected(name, classes, dtype, reduction), dtype, (name, classes, reduction))


@every_dtype
def test_plans_of_its_own(dtype: torch.dtype) -> None:
    """What a launch chooses by itself on either kind of device, and segments of long rows."""
    for device in (A100, SMALL, control.H100):
        with control.device(device):
            for classes, rows in ((1000, 9), (5000, 3), (33000, 2)):
                z, y = batch(classes, dtype, rows)
                for objective in (PLAIN, SQUARE):
                    for gradient in ("forward", "backward"):
                        found = run(objective, z, y, gradient=gradient)
                        assert_same(found, truth(objective, z, y), dtype, (device, classes, gradient))
                        assert control.last_grid().cluster == 1 or device.clusters


def test_the_plan_is_what_it_says() -> None:
    """The tests of a path prove nothing if the launch took another."""
    z, y = batch(60000, torch.bfloat16, 2)
    for plan, clusters, least in ((None, {8}, 15000), (Plan(2, True), {2}, 60000), (Plan(4, False), {4}, 0)):
        with control.plan(plan):
            control.seed(0)
            found = PLAIN(z.detach().requires_grad_(), y, gradient="forward")
            grid = control.last_grid()
        assert control.launches() > 0
        assert grid.cluster in clusters
        assert least <= grid.shared_bytes <= least + 4000
        assert found.item() == pytest.approx(PLAIN(z.double(), y, backend="reference").item(), rel=1e-6)


@pytest.mark.parametrize("lanes", [1, 4, 32])
def test_many_rows(lanes: int) -> None:
    """Several turns of every block, labels counted by several blocks, and a last turn that is not full."""
    rows = 5003
    z, y = random_rows(rows, 9, torch.float32)
    y[::3] = -100
    weight = torch.rand(9) + 0.5
    for objective in (PLAIN, CrossEntropy(weight, 0.1)):
        found = run(objective, z, y, Plan(lanes=lanes), gradient="forward")
        assert_same(found, truth(objective, z, y), torch.float32)


def test_so_many_labels_that_a_warp_adds_up_their_counts_twice() -> None:
    """2048 labels a block, and more blocks than a warp has lanes."""
    z, y = random_rows(70_000, 3, torch.float32)
    y[::3] = -100
    weight = torch.tensor([0.5, 1.0, 2.0])
    for objective in (PLAIN, CrossEntropy(weight)):
        found = objective(z, y)
        torch.testing.assert_close(found.double(), objective(z.double(), y, backend="reference"), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("rows", "plan"), [(70, Plan(2, True)), (70, Plan(1)), (603, Plan(lanes=32))], ids=str)
def test_so_many_blocks_that_several_warps_add_up_their_sums(rows: int, plan: Plan) -> None:
    z, y = random_rows(rows, 9, torch.float32)
    with control.device(control.H100._replace(multiprocessors=4000)):
        for number in range(3):
            control.seed(number)
            found = run(REGULARIZED, z, y, plan, gradient="forward")
            assert_same(found, truth(REGULARIZED, z, y), torch.float32)


def test_as_many_terms_as_there_may_be() -> None:
    """More than there are lanes in a warp, or warps in a block."""
    z, y = batch(9, torch.float32)
    rows = [CrossEntropy(), ZLoss(), Entropy(), LogitL2()]
    elements = [objkern.MeanSquaredError(), objkern.MeanAbsoluteError(), objkern.Huber(), objkern.BinaryCrossEntropy()]
    probabilities = torch.rand(z.shape, generator=torch.Generator().manual_seed(0))
    for terms, target in ((rows, y), (elements, probabilities)):
        many = sum((k + 1) / 64 * terms[k % 4] for k in range(64))
        for plan in (Plan(1), Plan(lanes=2)):
            found = run(many, z, target, plan, gradient="forward")
            assert_same(found, truth(many, z, target), torch.float32)
        with pytest.raises(ValueError, match="at most 64"):
            run(many + terms[0], z, target)


def test_a_gradient_whose_blocks_take_turns() -> None:
    upstream = torch.linspace(-1, 2, 70)
    with control.device(SMALL):
        for classes in (9, 600, 1025):
            z, y = random_rows(70, classes, torch.float32)
            y[5] = -100
            for objective in (SQUARE, SQUARE + MaxZLoss()):
                found = run(objective, z, y, upstream=upstream, reduction="none")
                exact = truth(objective, z, y, upstream.double(), reduction="none")
                assert_same(found, exact, torch.float32)


# ---- schedules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan", [Plan(1, False), Plan(2, True), Plan(8, True), Plan(4, False), Plan(lanes=4), Plan(lanes=32)], ids=name_of
)
def test_bits_do_not_depend_on_who_runs_first(plan: Plan) -> None:
    """30: a missing barrier, a sum in the order of arrival, a last block that is not the last."""
    z, y = batch(1031, torch.float32)
    for name in ("plain", "every"):
        first = None
        for number in (1, 1, *range(2, 14)):
            control.seed(number)
            found = run(OBJECTIVES[name], z, y, plan, gradient="forward")
            if first is None:
                first = found
                assert_same(found, expected(name, 1031, torch.float32, "mean"), torch.float32)
            assert same_bits(found, first), f"schedule {number} gives other bits"


@pytest.mark.parametrize("classes", [9, 1031])
def test_statistics_and_their_gradient_in_any_order(classes: int) -> None:
    z, y = batch(classes, torch.float32)
    results = []
    for number in range(5):
        control.seed(number)
        x = z.clone().requires_grad_()
        s = objkern.row_statistics(x, y, reference=beside(z, torch.float32).clamp(min=-9.0))
        weights = torch.linspace(-1, 2, s.lse.numel(), dtype=torch.float64)
        (gradient,) = torch.autograd.grad(sum((f.nan_to_num(0, 0, 0) * weights).sum() for f in s), x)
        results.append([*(f.detach() for f in s), gradient])
    r = beside(z, torch.float32).clamp(min=-9.0)
    exact = objkern.row_statistics(z.double(), y, reference=r, backend="reference")
    for found in results[1:]:
        assert all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(found, results[0], strict=True))
    for name, value in zip(exact._fields, results[0], strict=False):
        torch.testing.assert_close(value.double(), getattr(exact, name), rtol=4e-6, atol=4e-6, equal_nan=True)


@every_plan
def test_statistics_under_every_plan(plan: Plan) -> None:
    objective = CrossEntropy() + custom(lambda s: s.entropy * s.lse + s.logit_variance + s.max_logit)
    for classes in (5, 130, 1031):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            z, y = batch(classes, dtype)
            upstream = torch.linspace(-1, 2, ROWS)
            found = run(objective, z, y, plan, upstream, reduction="none")
            assert_same(found, truth(objective, z, y, upstream.double(), reduction="none"), dtype, classes)


# ---- masks --------------------------------------------------------------------------------------------------------------


@every_plan
def test_masked_tiles(plan: Plan) -> None:
    """16: NaN when a warp, a block's tile or everything but one logit is −inf."""
    classes = 1031 if plan.lanes == 0 else 130
    for dtype in (torch.float32, torch.bfloat16):
        z, _ = random_rows(ROWS, classes, dtype)
        third = classes // 3
        z[0, :third] = -torch.inf
        z[1, third:] = -torch.inf
        z[2, 1:] = -torch.inf
        z[3, :-1] = -torch.inf
        z[4, ::2] = -torch.inf
        z[5, : 2 * third] = -torch.inf
        y = torch.tensor([classes - 1, 0, 0, classes - 1, 1, classes - 1, 5])
        for objective in (PLAIN, SQUARE, EVERY, MaxZLoss()):
            found = run(objective, z, y, plan, gradient="forward")
            assert_same(found, truth(objective, z, y), dtype)
        spread = custom(lambda s: s.logit_variance + s.mean_logit)
        assert_same(run(spread, z, None, plan), truth(spread, z, None), dtype, "variance")
        z[6] = -torch.inf
        with control.plan(plan):
            loss = PLAIN(z, y, reduction="none")
        assert loss.isnan().tolist() == [False] * 6 + [True]


@pytest.mark.parametrize("plan", [Plan(1, True), Plan(4, True), Plan(8, False), Plan(lanes=8)], ids=name_of)
def test_one_finite_logit_at_every_position(plan: Plan) -> None:
    """16, wherever a tile, a vector or a thread's share begins."""
    classes = 71 if plan.lanes or plan.cluster == 1 else 40 * plan.cluster + 3
    tile = (classes + plan.cluster - 1) // plan.cluster
    places = [j for j in range(classes) if classes == 71 or j % tile < 3 or j % tile > tile - 3 or j > classes - 3]
    y = torch.tensor(places)
    z = torch.full((len(places), classes), -torch.inf).scatter_(1, y[:, None], 2.5)
    with control.plan(plan):
        x = z.clone().requires_grad_()
        loss = EVERY(x, y, gradient="forward")
        loss.backward(torch.tensor(2.0))
    per_row = 2.5**2 * (0.5 + 0.3 + 0.9)
    assert loss.item() == pytest.approx(per_row, rel=1e-6)
    wanted = torch.zeros_like(z).scatter_(1, y[:, None], 2 * 2 * 2.5 * (0.5 + 0.3 + 0.9) / len(places))
    torch.testing.assert_close(x.grad, wanted, rtol=1e-6, atol=0)


@every_plan
def test_a_maximum_that_rises_and_a_maximum_twice(plan: Plan) -> None:
    """Sums rescaled to a larger maximum, also by its last digit; of equal maxima the first one has the gradient of
    max-z, in whatever tile."""
    z = torch.linspace(-30, 10, 1031).repeat(5, 1)
    z[1] = z[0].flip(0)
    z[2] = 0.0
    z[3, [200, 500, 900]] = 20.0
    z[4] -= 9.8
    z[4, -1] = torch.nextafter(z[4, -2], torch.tensor(torch.inf))
    y = torch.tensor([5, 6, 7, 8, 9])
    for dtype in (torch.float32, torch.bfloat16):
        found = run(EVERY, z.to(dtype), y, plan, gradient="forward")
        assert_same(found, truth(EVERY, z.to(dtype), y), dtype)
    found = run(MaxZLoss(), z, y, plan, gradient="forward")
    for written in (found.gradient, found.fused):
        assert written[3].nonzero().tolist() == [[200]]
        assert not written[2].any()
    # A later class may be with an earlier thread: those behind the last vector are.
    first = torch.arange(930, 1028, 7)
    twice = torch.zeros(len(first), 1031)
    twice[range(len(first)), first] = twice[:, -1] = 20.0
    found = run(MaxZLoss(), twice, torch.zeros_like(first), plan, gradient="forward")
    for written in (found.gradient, found.fused):
        assert torch.equal(written.nonzero()[:, 1], first)


@pytest.mark.parametrize("plan", [None, Plan(1), Plan(2, True), Plan(lanes=2)], ids=str)
def test_the_maximum_at_every_place(plan: Plan | None) -> None:
    """Its gradient, which is exactly 1 where it is 1/2, is found by whatever thread, and by the next launch."""
    for classes in (9, 130, 1031):
        places = torch.arange(0, classes, 1 if classes < 1031 else 17)
        z = torch.full((len(places), classes), -3.0).scatter_(1, places[:, None], 0.5)
        y = (places + 1) % classes
        expected = torch.zeros_like(z).scatter_(1, places[:, None], 1.0)
        for gradient in ("forward", "backward"):
            found = run(MaxZLoss(), z, y, plan, upstream=2.0, reduction="sum", gradient=gradient)
            assert torch.equal(found.gradient, 2 * expected)
            assert found.fused is None or torch.equal(found.fused, expected)


@pytest.mark.parametrize("plan", [Plan(1), Plan(2, True), Plan(lanes=1), Plan(lanes=4)], ids=name_of)
def test_of_equal_maxima_the_first_is_predicted(plan: Plan) -> None:
    pairs = torch.combinations(torch.arange(11))
    z = torch.zeros(len(pairs), 11).scatter_(1, pairs, 3.0)
    for objective in (PLAIN, REGULARIZED, MaxZLoss()):
        for label, accuracy in ((0, 1.0), (1, 0.0)):
            found = run(objective, z, pairs[:, label].contiguous(), plan, reduction="none")
            assert (found.parts["accuracy"] == accuracy).all()


# ---- labels -------------------------------------------------------------------------------------------------------------


@every_plan
@pytest.mark.parametrize("gradient", ["forward", "backward"])
def test_all_rows_ignored(gradient: str, plan: Plan) -> None:
    """12, and what is stored where nothing is computed."""
    z, _ = random_rows(ROWS, 130, torch.bfloat16)
    y = torch.full((ROWS,), -100)
    for reduction, empty, value in (("mean", "nan", torch.nan), ("mean", "zero", 0.0), ("sum", "nan", 0.0)):
        found = run(SQUARE, z, y, plan, gradient=gradient, reduction=reduction, empty=empty)
        torch.testing.assert_close(found.loss, torch.tensor(value), equal_nan=True)
        assert not found.gradient.any()
        assert found.fused is None or not found.fused.any()
        assert found.parts["rows"] == 0
    found = run(SQUARE, z, y, plan, reduction="none")
    assert not found.loss.any()
    assert not found.gradient.any()


@every_plan
@pytest.mark.parametrize("label", [-1, 130, 131, 2**31, 2**40 + 3, 2**63 - 1, -(2**63)])
def test_a_bad_label_is_a_row_of_nan(label: int, plan: Plan) -> None:
    """13: read out of bounds, or a loss of 0. The sanitized run would see the read."""
    z, y = batch(130, torch.float32)
    y = y.clone()
    y[3] = label
    good = [0, 1, 4, 5, 6]
    for objective in (PLAIN, EVERY, PLAIN + custom(lambda s: s.lse)):
        found = run(objective, z, y, plan, reduction="none", validate=False)
        assert found.loss[3].isnan()
        assert found.gradient[3].isnan().all()
        if "accuracy" in found.parts:
            assert found.parts["accuracy"][3] == 0
            assert found.parts["lse"][3].isnan()
            assert found.parts["target_probability"][3].isnan()
        without = y.clone()
        without[3] = -100
        expected = truth(objective, z, without, reduction="none")
        torch.testing.assert_close(found.loss[good].double(), expected.loss[good], rtol=4e-6, atol=4e-6)
        torch.testing.assert_close(found.gradient[good].double(), expected.gradient[good], rtol=4e-6, atol=4e-6)
    found = run(PLAIN, z, y, plan, gradient="forward", validate=False)
    assert found.loss.isnan()
    weight = torch.rand(130) + 0.5
    assert run(CrossEntropy(weight), z, y, plan, gradient="forward", validate=False).loss.isnan()


@every_plan
@pytest.mark.parametrize("label", [0, 64, 129])
def test_rows_without_a_finite_logit(label: int, plan: Plan) -> None:
    """No class is left: the loss is NaN, nothing is accurate, and excluded classes have no gradient."""
    z, _ = batch(130, torch.float32)
    z = z.clone()
    z[1] = -float("inf")
    y = torch.full((ROWS,), label)
    z[3, label] = 50.0
    for objective in (PLAIN, REGULARIZED, SQUARE):
        found = run(objective, z, y, plan, reduction="none")
        assert found.loss.isnan().tolist() == [row == 1 for row in range(ROWS)]
        assert not found.gradient[1].any()
        assert found.parts["accuracy"][1] == 0
        assert found.parts["accuracy"][3] == 1


@every_plan
def test_accuracy_of_rows_with_nan(plan: Plan) -> None:
    z = torch.tensor([[3.0, 1.0, 2.0, float("nan")]] * 3)
    found = run(PLAIN, z, torch.tensor([0, 3, 1]), plan, reduction="none")
    assert found.parts["accuracy"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("mode", ["forward", "recompute"])
@pytest.mark.parametrize("name", [*OBJECTIVES, "custom"])
def test_the_linear_path(name: str, mode: str) -> None:
    """Chunks of logits go to the same kernels."""
    objective = OBJECTIVES.get(name, PLAIN + 0.1 * custom(lambda s: s.lse * s.entropy))
    if (name, mode) == ("custom", "forward"):
        mode = "auto"
    hidden, weight = torch.randn(11, 6), torch.randn(37, 6)
    labels = torch.randint(37, (11,))
    labels[4] = -100

    def results(h: Tensor, w: Tensor, **options) -> list[Tensor]:
        leaves = [h.clone().requires_grad_(), w.clone().requires_grad_()]
        loss = objective.linear(leaves[0], leaves[1], labels, **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.tensor(UPSTREAM, dtype=loss.dtype))]

    control.seed(1)
    found = results(hidden, weight, mode=mode, chunk_rows=4)
    assert control.launches() > 0
    for ours, exact in zip(found, results(hidden.double(), weight.double(), backend="reference"), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", [Plan(1), Plan(1, True), Plan(2, True), Plan(8)], ids=name_of)
def test_half_precision_gradients_of_float32_logits(plan: Plan, dtype: torch.dtype) -> None:
    """Each is the float32 gradient, rounded once: in the forward pass and from what it kept, at any alignment."""
    ops = torch.ops.objkern
    for name, objective in OBJECTIVES.items():
        terms = [x for c, t in objective.weighted_terms for x in (t.kind, t.parameter, c)]
        for classes, offset in ((1, 0), (7, 1), (130, 0), (1031, 3), (1040, 0)):
            if name == "every" and classes == 1:
                continue
            z, y = batch(classes, torch.float32, 4)
            z = at_offset(z, offset, offset)
            for options in ({}, {"softcap": 20.0}) if classes < 1031 else ({},):
                with control.plan(plan):
                    _, _, kept, wide = ops.fused(terms, 1, z, y, **options)
                    out = torch.full(z.shape, torch.nan, dtype=dtype)
                    loss = ops.fused.into(terms, 1, z, y, **options, gradient=out)[0]
                    assert_nearest(out, wide)
                    assert torch.equal(loss, ops.fused(terms, 1, z, y, **options)[0])
                upstream = torch.rand(4)
                wide = ops.gradient(upstream, kept, False, terms, 1, z, y, **options)
                for place in (0, 1):  # of the gradient in memory
                    out = torch.full((z.numel() + place,), torch.nan, dtype=dtype)[place:].view(z.shape)
                    ops.gradient.into(upstream, kept, False, terms, 1, z, y, **options, gradient=out)
                    assert_nearest(out, wide)


def assert_nearest(half: Tensor, wide: Tensor) -> None:
    """To nearest, up to the last digit of float32, which the two kernels may have computed in different orders."""
    slack = wide.abs() * 2.0**-22
    assert ((half == (wide - slack).to(half.dtype)) | (half == (wide + slack).to(half.dtype))).all()


def test_a_half_precision_gradient_is_for_float32_logits() -> None:
    z, y = batch(9, torch.float16, 3)
    for dtype in (torch.bfloat16, torch.float32):
        with pytest.raises(RuntimeError, match="gradient does not belong"):
            torch.ops.objkern.fused.into([0.0, 0.0, 1.0], 1, z, y, gradient=z.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["forward", "recompute", "none"])
@pytest.mark.usefixtures("half_precision_gemms", "small_tiles")
def test_the_linear_path_in_half_precision(mode: str, dtype: torch.dtype) -> None:
    """Logits in float32 and their gradient in half precision, as GEMMs take it; float16 does not lose small ones."""
    hidden, weight = torch.randn(23, 16).to(dtype), torch.randn(37, 16).to(dtype) / 2
    labels = torch.randint(37, (23,))
    labels[4] = -100
    options = {"reduction": "none"} if mode == "none" else {}
    upstream = torch.rand(23) + 0.1 if mode == "none" else torch.tensor(1.0)

    def results(objective: objkern.Objective, linear: bool, size: float, *tensors: Tensor) -> list[Tensor]:
        """Loss and gradients of size · objective, over `size`."""
        leaves = [x.clone().requires_grad_() for x in tensors]
        if linear:
            mode_ = {} if mode == "none" else {"mode": mode}
            loss = (size * objective).linear(*leaves, labels, chunk_rows=6, **options, **mode_)
        else:
            loss = (size * objective)(torch.nn.functional.linear(*leaves), labels, backend="reference", **options)
        return [loss.detach() / size, *torch.autograd.grad((loss * upstream).sum() * 2.0**7 / size, leaves)]

    for objective in (REGULARIZED, OBJECTIVES["every"]):
        exact = results(objective, False, 1.0, hidden.double(), weight.double())
        eager = results(objective, False, 1.0, hidden, weight)
        for size in (1.0, 1e-6):
            for one, other, truth in zip(results(objective, True, size, hidden, weight), eager, exact, strict=True):
                assert_within_budget(one, other, truth, dtype)


DIVERGENT = CrossEntropy(label_smoothing=0.1) + 0.3 * KLDivergence("forward", 1.7) + 0.2 * KLDivergence("reverse", 1.7)


def beside(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of a reference, which excludes a class of its own in the first row."""
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(4))
    r = (z.float() * 0.9 + noise).to(dtype)
    if z.shape[1] > 4:
        r[0, 3] = -torch.inf
    return r


@pytest.mark.parametrize("classes", [1, 9, 130, 1031])
@pytest.mark.parametrize("plan", [Plan(1), Plan(2, True), Plan(8), Plan(lanes=4), Plan(lanes=32)], ids=name_of)
@every_dtype
def test_the_divergence_from_a_reference(dtype: torch.dtype, plan: Plan, classes: int) -> None:
    z, y = batch(classes, dtype)
    y[5] = -100
    forward = CrossEntropy(label_smoothing=0.1) + 0.3 * KLDivergence("forward", 1.7)
    for r in (beside(z, dtype), beside(z, torch.float64 if dtype == torch.float64 else torch.float32)):
        r[5] = torch.nan  # of an ignored row nothing is read
        options = {"reference": r, "gradient": "forward"}
        assert_same(run(forward, z, y, plan, **options), truth(forward, z, y, **options), dtype, "forward")
        both = {"reference": r[:, :].masked_fill(r == -torch.inf, -9.0), "reduction": "none", "softcap": 20.0}
        up = torch.linspace(-1.0, 2.0, len(z))
        assert_same(run(DIVERGENT, z, y, plan, up, **both), truth(DIVERGENT, z, y, up, **both), dtype, "both")


@every_dtype
@pytest.mark.parametrize("classes", [9, 130, 1031])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_divergence_alone(direction: str, classes: int, dtype: torch.dtype) -> None:
    """Nothing else is summed, and the gradient has a loop of its own; classes that the logits exclude have no part."""
    z, y = batch(classes, dtype)
    z[0, ::3] = -torch.inf
    z[1, 5:] = -torch.inf
    up = torch.linspace(-1.0, 2.0, len(z))
    term = KLDivergence(direction, 1.7)
    for r in (beside(z, dtype), beside(z, torch.float64 if dtype == torch.float64 else torch.float32)):
        r = r.masked_fill(r == -torch.inf, 1000.0)  # which a class that is excluded must not show
        for options in (
            {"reduction": "none"}, {"gradient": "forward"}, {"gradient": "forward", "softcap": 1.0},
            {"gradient": "forward", "logit_scale": torch.tensor(2.0, dtype=torch.float64)},
        ):  # fmt: skip
            arguments = (up,) if "reduction" in options else ()
            options["reference"] = r
            assert_same(
                run(term, z, y, None, *arguments, **options), truth(term, z, y, *arguments, **options), dtype, direction
            )


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(("size", "offset"), [(1e-3, 0.0), (1e-5, 0.0), (0.1, 4000.0)])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1.0), (torch.bfloat16, 0.5)], ids=str)
def test_a_small_divergence_keeps_its_digits(
    dtype: torch.dtype, scale: float, size: float, offset: float, direction: str
) -> None:
    """And so does its gradient, also where an offset lies between the two. That of KL(q ‖ p) is p − q."""
    z, _ = batch(1031, dtype)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    r = z.float() * scale + size * noise + offset
    options = {"reference": r, "reduction": "none", "logit_scale": scale}
    found = run(KLDivergence(direction), z, None, None, 1.0, **options)
    exact = truth(KLDivergence(direction), z, None, 1.0, **options)
    assert (exact.loss < 10 * size**2).all()
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=2e-4, atol=0.0)
    tolerance = 1e-4 if dtype == torch.float32 else TOLERANCE[dtype]
    bound = tolerance * exact.gradient.abs().max().item() if direction == "reverse" else 2e-7
    torch.testing.assert_close(found.gradient.double(), exact.gradient, rtol=tolerance, atol=bound)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("classes", [16, 1031, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_masks_of_the_least_number(dtype: torch.dtype, classes: int, temperature: float) -> None:
    """Over T < 1 they are −∞ after all, and so are differences times an upstream gradient of 65536."""
    for direction, z, r in masked_sides(2, classes, dtype):
        options, up = {"reduction": "none"}, torch.tensor([65536.0, 0.5])
        term, live = KLDivergence(direction, temperature), [x.double().clamp(min=-1e30) for x in (z, r)]
        found = run(term, z, None, None, up, reference=r, **options)
        assert_same(found, truth(term, live[0], None, up, reference=live[1], **options), dtype, direction)


@pytest.mark.parametrize("classes", [9, 130, 1031])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_statistics_beside_masks_of_the_least_number(dtype: torch.dtype, classes: int) -> None:
    assert_masks_are_no_part_of_a_gradient("auto", classes, dtype)


@every_dtype
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_divergence_whose_maxima_stand_anywhere(direction: str, dtype: torch.dtype) -> None:
    """So far above all else that exp overflows if one of them is overlooked; more rows than there are blocks."""
    for classes in (130, 1031):
        places = torch.arange(0, classes, 1 if classes < 1031 else 13)
        z = torch.zeros(len(places), classes, dtype=dtype)
        r = z.scatter(1, (7 * places[:, None]) % classes, 300.0)
        z = z.scatter(1, places[:, None], 300.0)
        term = KLDivergence(direction, 1.7)
        up = torch.linspace(-1.0, 2.0, len(z))
        options = {"reference": r, "reduction": "none"}
        found, exact = run(term, z, None, None, up, **options), truth(term, z, None, up, **options)
        torch.testing.assert_close(found.loss.double(), exact.loss, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(found.gradient.double(), exact.gradient, rtol=TOLERANCE[dtype], atol=1e-4)


def test_a_divergence_alone_without_parts() -> None:
    """Nothing of a row but its gradient is asked for: no sums, and every class is written."""
    for classes in (9, 130, 1031):
        z, y = batch(classes, torch.float32)
        r = beside(z, torch.float32)
        gradients = []
        for x, options in ((z, {"gradient": "forward"}), (z.double(), {"backend": "reference"})):
            leaf = x.clone().requires_grad_()
            loss = KLDivergence("forward")(leaf, y, reference=r, **options)
            gradients += [g.double() for g in torch.autograd.grad(loss, leaf)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", [None, Plan(1), Plan(2, True)], ids=str)
def test_half_precision_gradients_of_a_divergence(plan: Plan | None, dtype: torch.dtype) -> None:
    for objective in (KLDivergence("forward"), KLDivergence("reverse"), CrossEntropy() + KLDivergence("forward")):
        terms = [x for c, t in objkern.parse(repr(objective)).weighted_terms for x in (t.kind, t.parameter, c)]
        for classes in (9, 130, 1040):
            z, y = batch(classes, torch.float32, 4)
            r = beside(z, torch.float32).clamp(min=-9.0)
            with control.plan(plan):
                wide = torch.ops.objkern.fused(terms, 1, z, y, reference=r)[3]
                out = torch.full(z.shape, torch.nan, dtype=dtype)
                torch.ops.objkern.fused.into(terms, 1, z, y, reference=r, gradient=out)
            assert_nearest(out, wide)


@pytest.mark.parametrize("rows", [0, 1, 129])
def test_statistics_and_divergences_of_few_rows_and_of_many(rows: int) -> None:
    """As many as there are threads in the block that makes coefficients of derivatives, and one more."""
    z, y = random_rows(rows, 9, torch.float32)
    term = PLAIN + 0.5 * KLDivergence("forward") + custom(lambda s: s.lse * s.entropy)
    options = {"reference": beside(z, torch.float32).clamp(min=-9.0) if rows else z, "reduction": "none"}
    for objective in (PLAIN, KLDivergence("forward"), term):
        more = options if objective is not PLAIN else {"reduction": "none"}
        assert_same(run(objective, z, y, **more), truth(objective, z, y, **more), torch.float32)


def test_statistics_beside_a_reference() -> None:
    z, y = batch(130, torch.float32)
    r = beside(z, torch.float32)
    r[0, 3] = 0.0
    found, exact = (
        objkern.row_statistics(x.requires_grad_(), y, reference=r, temperature=2.0, backend=backend)
        for x, backend in ((z.clone(), "auto"), (z.double(), "reference"))
    )
    for name in ("forward_kl", "reverse_kl", "lse"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(exact, name), rtol=1e-5, atol=1e-6)


def test_no_rows() -> None:
    z, y = torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)
    for plan in (None, Plan(2, True), Plan(lanes=4)):
        found = run(SQUARE, z, y, plan, gradient="forward")
        assert found.loss.isnan()
        assert run(SQUARE, z, y, plan, reduction="sum").loss == 0
        assert run(SQUARE, z, y, plan, reduction="none").loss.shape == (0,)


# ---- memory -------------------------------------------------------------------------------------------------------------


def at_offset(z: Tensor, offset: int, gap: int) -> Tensor:
    """The same numbers `offset` elements into memory whose last byte is the last logit's."""
    rows, classes = z.shape
    stride = classes + gap
    memory = torch.full((offset + (rows - 1) * stride + classes,), torch.nan, dtype=z.dtype)
    view = memory.as_strided((rows, classes), (stride, 1), offset)
    view.copy_(z)
    return view


@every_dtype
@pytest.mark.parametrize("plan", [*CLUSTERS, Plan(lanes=4), Plan(lanes=32)], ids=name_of)
def test_rows_that_begin_anywhere(plan: Plan, dtype: torch.dtype) -> None:
    """11: a load of 16 bytes at a place that is no multiple of 16, or one that reaches out of the row."""
    for classes in (5, 131, 1030):
        z, y = batch(classes, dtype, 4)
        wanted = run(SQUARE, z, y, plan, gradient="forward")
        assert_same(wanted, truth(SQUARE, z, y), dtype)
        for offset, gap in ((0, 1), (1, 0), (2, 1), (3, 6), (5, 0), (7, 3), (8, 0)):
            found = run(SQUARE, at_offset(z, offset, gap), y, plan, gradient="forward")
            assert_same(found, wanted, dtype, (classes, offset, gap))


def test_rows_farther_apart_than_32_bits_can_tell() -> None:
    """10: the last rows were read from elsewhere. Pages of the 10 GB that nobody touches take no memory."""
    rows, classes, stride = 6, 33, (1 << 30) + 3
    memory = torch.frombuffer(mmap.mmap(-1, 2 * ((rows - 1) * stride + classes)), dtype=torch.bfloat16)
    z, y = batch(classes, torch.bfloat16, rows)
    far = memory.as_strided((rows, classes), (stride, 1)).copy_(z)
    for plan in (Plan(2, True), Plan(1, False), Plan(lanes=4)):
        for gradient in ("forward", "backward"):
            x = far.detach().requires_grad_()
            with control.plan(plan):
                loss = SQUARE(x, y, gradient=gradient)
                (found,) = torch.autograd.grad(0.7 * loss, x)
            assert_same(Found(loss.detach(), found, {}), truth(SQUARE, z, y)._replace(parts={}), torch.bfloat16)


def test_a_row_that_is_every_row() -> None:
    z, y = batch(131, torch.float16)
    for plan in (Plan(2, True), Plan(lanes=8)):
        row = z[:1].expand(ROWS, -1)
        found = run(SQUARE, row, y, plan, gradient="forward")
        assert_same(found, truth(SQUARE, row.contiguous(), y), torch.float16)


# ---- options ------------------------------------------------------------------------------------------------------------


@every_plan
def test_options(plan: Plan) -> None:
    """Numbers that are read from memory, class weights, probabilities, caps: the deepest kernels."""
    generator = torch.Generator().manual_seed(3)
    for classes in (9, 131, 1030):
        for dtype in (torch.float32, torch.bfloat16):
            z, y = batch(classes, dtype)
            weight = torch.rand(classes, generator=generator) + 0.1
            probabilities = torch.rand(ROWS, classes, generator=generator).softmax(-1)
            cases: list[tuple[objkern.Objective, Tensor, dict]] = [
                (SQUARE, y, {"logit_scale": torch.tensor(0.7), "softcap": 5.0}),
                (CrossEntropy(weight, 0.1) + 0.1 * ZLoss(), y, {"normalizer": torch.tensor(3.0)}),
                (CrossEntropy(weight) - 0.1 * Entropy(), probabilities, {}),
                (torch.tensor(0.3) * PLAIN + 0.5 * LogitL2(), y, {}),
                (ZLoss() + LogitL2(), None, {"softcap": 3.0}),
            ]
            for objective, target, options in cases:
                found = run(objective, z, target, plan, gradient="forward", **options)
                exact = objkern_of_doubles(objective, options)
                assert_same(found, truth(exact[0], z, target, **exact[1]), dtype, (classes, repr(objective)))


def objkern_of_doubles(objective: objkern.Objective, options: dict) -> tuple[objkern.Objective, dict]:
    return objective, {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}


def test_a_logit_scale_learns() -> None:
    z, y = batch(131, torch.float32)
    for plan in (Plan(2, True), Plan(lanes=8), None):
        found = []
        for backend, x in (("auto", z), ("reference", z.double())):
            scale = torch.tensor(0.7, dtype=x.dtype, requires_grad=True)
            with control.plan(plan):
                loss = SQUARE(x.clone().requires_grad_(), y, logit_scale=scale, softcap=9.0, backend=backend)
                found.append(torch.autograd.grad(loss, scale)[0].double())
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


@every_dtype
@pytest.mark.parametrize("upstream", [1.0, 0.7, 0.0, torch.inf])
def test_the_gradient_of_the_forward_pass_in_place(upstream: float, dtype: torch.dtype) -> None:
    """2 and 4: left as it is under an upstream gradient of 1, and written anew under any other."""
    for classes in (9, 1031):
        z, y = batch(classes, dtype)
        found = []
        for gradient in ("forward", "backward"):
            x = z.clone().requires_grad_()
            loss = SQUARE(x, y, gradient=gradient)
            found += torch.autograd.grad(loss, x, torch.tensor(upstream, dtype=loss.dtype))
        tolerance = TOLERANCE[dtype] * 0.1 if dtype in (torch.float32, torch.float64) else TOLERANCE[dtype]
        torch.testing.assert_close(*found, rtol=tolerance, atol=1e-9, equal_nan=True)
        assert not found[0][2].any()


def test_a_gradient_under_an_upstream_of_one_is_left_as_it_is() -> None:
    z, y = batch(9, torch.float32)
    ops, terms = torch.ops.objkern, [0.0, 0.0, 1.0]
    _, _, kept = ops.objective(terms, 1, z, y)
    x = torch.rand(z.shape)
    for upstream in (1.0, 2.0):
        given, of_elements = torch.full_like(z, 5.0), torch.full_like(z, 5.0)
        ops.rescale(given, torch.tensor(upstream), kept, terms, 1, z, y)
        ops.elementwise_rescale(of_elements, torch.tensor(upstream), [2.0, 0.0, 1.0], 1, z, x)
        for gradient, expected in (
            (given, ops.gradient(torch.tensor(upstream), kept, False, terms, 1, z, y)),
            (of_elements, 2 * upstream * (z - x) / z.numel()),
        ):
            torch.testing.assert_close(gradient, torch.full_like(z, 5.0) if upstream == 1 else expected)


def test_what_an_earlier_op_did_not_make_is_refused() -> None:
    z, y = batch(9, torch.float32)
    x, ops, terms = torch.rand(z.shape), torch.ops.objkern, [0.0, 0.0, 1.0]
    one, of_elements = torch.ones(()), ([2.0, 0.0, 1.0], 1, z, x)
    _, _, kept = ops.objective(terms, 1, z, y)
    _, centred = ops.statistics(z, y)
    for call, message in (
        (lambda: ops.gradient(torch.ones(ROWS + 1), kept, False, terms, 1, z, y), r"expected \(\) or"),
        (lambda: ops.gradient(torch.ones(ROWS, 1), kept, False, terms, 1, z, y), r"expected \(\) or"),
        (lambda: ops.gradient(one, kept[1:], False, terms, 1, z, y), "row_gradient does not belong"),
        (lambda: ops.rescale(torch.empty_like(z), one, kept[1:], terms, 1, z, y), "row_gradient does not belong"),
        (lambda: ops.rescale(torch.empty_like(z).half(), one, kept, terms, 1, z, y), "gradient does not belong"),
        (lambda: ops.rescale(torch.empty_like(z), torch.ones(ROWS), kept, terms, 1, z, y), "0-dim"),
        (lambda: ops.statistics_gradient(centred[1:12], centred, False, z, y), "partials"),
        (lambda: ops.elementwise_gradient(torch.ones(3), False, *of_elements), r"expected \(\) or"),
        (lambda: ops.elementwise_rescale(torch.empty_like(z), torch.ones(ROWS), *of_elements), "0-dim"),
        (lambda: ops.elementwise_rescale(torch.empty_like(z).half(), one, *of_elements), "does not belong"),
        (lambda: ops.elementwise_rescale(torch.empty_like(z)[1:], one, *of_elements), "does not belong"),
        (lambda: ops.elementwise_rescale(torch.empty(9, ROWS).t(), one, *of_elements), "does not belong"),
        (lambda: ops.objective(terms, 1, torch.empty(0, 2**31), y[:0]), r"fewer than 2\^31 classes"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    for bad in (torch.empty(5), torch.empty(3).half(), torch.empty(6)[::2]):
        with pytest.raises(RuntimeError, match="expected contiguous ones"):
            ops.multi_penalty_accumulate_([torch.empty(3), bad], one.double(), [torch.ones(3)] * 2, [], [], 0.1, 0.1)


def test_parts_that_nobody_asked_for_are_not_made() -> None:
    z, y = batch(9, torch.float32)
    for reduction in (0, 1):
        assert torch.ops.objkern.objective([0.0, 0.0, 1.0], reduction, z, y)[1].numel() == 0
        assert torch.ops.objkern.elementwise([2.0, 0.0, 1.0], reduction, z, z)[1].numel() == 0


def test_a_plan_that_does_not_fit_is_an_error() -> None:
    z, y = batch(4099, torch.float64)
    with pytest.raises(RuntimeError, match="plan does not fit"):
        run(PLAIN, z.repeat(1, 9), y, Plan(1, True), gradient="forward")
    with control.device(A100), pytest.raises(RuntimeError, match="plan does not fit"):
        run(PLAIN, z, y, Plan(2, False))


@pytest.mark.parametrize("seed", range(20))
def test_the_odds_are_rounded_once(seed: int) -> None:
    """29: p_y^q of a float32 log p_y is as good as its last digit, and two roundings were one too many."""
    z, y = random_rows(11, 515, torch.float32, 10.0, seed)
    upstream = torch.randn(11, dtype=torch.float64)
    formula = "GeneralizedCrossEntropy(q=0.7)"
    results = []
    for loss, logits in ((objkern.parse(formula), z), (NATIVE[formula], z), (NATIVE[formula], z.double())):
        x = logits.clone().requires_grad_()
        rows = loss(x, y, reduction="none") if isinstance(loss, objkern.Objective) else loss(x, y)
        rows.backward(upstream.to(x.dtype))
        results.append(x.grad)
    assert_within_budget(*results, torch.float32)


# ---- elementwise objectives -----------------------------------------------------------------------------------------

ELEMENTWISE = objkern.parse(
    "BinaryCrossEntropy(label_smoothing=0.1) - 0.1*BernoulliEntropy() + 0.5*MeanSquaredError() + "
    "0.25*MeanAbsoluteError() + 2.0*Huber(delta=0.3) + 0.01*LogitL2()"
)


@every_dtype
@pytest.mark.parametrize("shape", [(1,), (7,), (9,), (3, 16), (103, 5), (2, 1031)], ids=str)
def test_elementwise(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Blocks that take turns, tails, weights that repeat; each element has an upstream gradient of its own. The sums
    and whatever is read do not hang on who runs first."""
    generator = torch.Generator().manual_seed(len(shape))
    make = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    z, y = (6 * make(*shape) - 3).to(dtype), make(*shape).round(decimals=1).to(dtype)
    term = objkern.BinaryCrossEntropy(weight=make(shape[-1]), pos_weight=make(shape[-1]))
    for objective in (ELEMENTWISE, term + 0.1 * objkern.MeanSquaredError()):
        for reduction in ("none", "mean"):
            upstream = make(*shape) if reduction == "none" else torch.tensor(UPSTREAM)
            exact = elements_of(objective, z.double(), y.double(), upstream, reduction, backend="reference")
            for gradient in ("backward", "forward") if reduction == "mean" else ("backward",):
                for seed in (1, 2):
                    control.seed(seed)
                    found = elements_of(objective, z, y, upstream, reduction, gradient=gradient)
                    for ours, truth in zip(found, exact, strict=True):
                        assert_rounded(ours, truth, OF_LOSS[dtype])


def elements_of(
    objective: objkern.Objective, z: Tensor, y: Tensor, upstream: Tensor, reduction: str, **options: str
) -> tuple[Tensor, Tensor]:
    leaf = z.clone().requires_grad_()
    loss = objective(leaf, y, reduction=reduction, **options)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))
    return loss.detach(), gradient


def test_elementwise_terms_in_another_order() -> None:
    z, y, upstream = torch.rand(300), torch.rand(300), torch.rand(300)
    for text in ("0.5*MeanSquaredError() + BinaryCrossEntropy()", "Huber() - BernoulliEntropy() + MeanSquaredError()"):
        objective = objkern.parse(text)
        found = elements_of(objective, z, y, upstream, "none")
        exact = elements_of(objective, z.double(), y.double(), upstream, "none", backend="reference")
        # The terms are numbers below 1, each of them rounded, and may cancel.
        torch.testing.assert_close([x.double() for x in found], list(exact), rtol=4e-6, atol=2e-7)


def test_so_many_elements_that_blocks_take_turns() -> None:
    z, y = torch.rand(20, 1031), torch.rand(20, 1031)
    found = elements_of(ELEMENTWISE, z, y, torch.tensor(UPSTREAM), "mean")
    exact = elements_of(ELEMENTWISE, z.double(), y.double(), torch.tensor(UPSTREAM), "mean", backend="reference")
    torch.testing.assert_close([x.double() for x in found], list(exact), rtol=4e-6, atol=1e-10)


def test_options_of_elements() -> None:
    z, y = 4 * torch.rand(300) - 2, torch.rand(300)
    for options in ({"softcap": 1.0}, {"logit_scale": torch.tensor(2.0)}, {"empty": "zero"}):
        found = elements_of(ELEMENTWISE, z, y, torch.tensor(UPSTREAM), "mean", **options)
        exact = elements_of(
            ELEMENTWISE, z.double(), y.double(), torch.tensor(UPSTREAM), "mean", backend="reference", **options
        )
        torch.testing.assert_close([x.double() for x in found], list(exact), rtol=4e-6, atol=1e-8)


def test_elementwise_from_anywhere() -> None:
    """A prediction, a target or an upstream gradient that begins between boundaries."""
    z, y, upstream = torch.rand(300), torch.rand(300), torch.rand(300)
    found, exact = (
        elements_of(ELEMENTWISE, a, b, upstream[1:291], "none", backend=backend)[1].double()
        for a, b, backend in ((z[:290], y[:290], "auto"), (z[:290].double(), y[:290].double(), "reference"))
    )
    torch.testing.assert_close(found, exact, rtol=4e-6, atol=1e-7)
    for a, b in ((1, 0), (0, 3), (2, 2)):
        found = elements_of(ELEMENTWISE, z[a : a + 290], y[b : b + 290], torch.tensor(UPSTREAM), "mean")
        exact = elements_of(
            ELEMENTWISE, z[a : a + 290].double(), y[b : b + 290].double(), torch.tensor(UPSTREAM), "mean",
            backend="reference",
        )  # fmt: skip
        torch.testing.assert_close([x.double() for x in found], list(exact), rtol=4e-6, atol=1e-8)


# ---- penalties on parameters ----------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize(("l1", "l2"), [(0.3, 0.0), (0.0, 0.7), (0.3, 0.7)])
@pytest.mark.parametrize(("with_origin", "with_weight"), [(False, False), (True, False), (True, True)])
def test_many_parameters(with_origin: bool, with_weight: bool, l1: float, l2: float, dtype: torch.dtype) -> None:
    """More of them than a launch takes, of one block, of several and of none; not all begin at a vector's boundary; one
    is of another dtype, one has an origin of another. Gradients are written, and added to what is there, rounded once."""
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    theta = [make(k % 7 * 40 + k % 3).to(dtype) for k in range(70)]
    if dtype != torch.float64:
        theta[10] = theta[10].double()
    theta += [make(1001).to(dtype)[1:], make(20, 30).t().to(dtype), make(1).to(dtype)[0], torch.zeros(3, dtype=dtype)]
    origins = [p + make(*p.shape).to(p.dtype) for p in theta] if with_origin else []
    if with_origin and dtype != torch.float64:
        origins[5] = origins[5].float() + 2.0**-12 * make(*theta[5].shape)
    weights = [make(*p.shape).abs() for p in theta] if with_weight else []
    numbers = theta, origins, weights, l1, l2
    exact = torch.zeros((), dtype=torch.float64)
    upstream = torch.tensor(1.7, dtype=torch.float64)
    found = torch.ops.objkern.multi_penalty_gradient(upstream, *numbers)
    added = [torch.full_like(p, 0.5, memory_format=torch.contiguous_format) for p in theta]
    torch.ops.objkern.multi_penalty_accumulate_(added, upstream, *numbers)
    for k, p in enumerate(theta):
        d = p.double() - (origins[k].double() if origins else 0.0)
        f = weights[k].double() if weights else torch.ones_like(d)
        exact += l1 * d.abs().sum() + 0.5 * l2 * (f * d * d).sum()
        gradient = 1.7 * (l1 * d.sign() + l2 * f * d)
        eps = torch.finfo(p.dtype).eps
        bound = 2 * max(eps, torch.finfo(torch.float32).eps if p.dtype != torch.float64 else 0.0)
        for ours, truth in ((found[k], gradient), (added[k], gradient + 0.5)):
            assert ours.dtype == p.dtype
            assert ours.shape == p.shape
            torch.testing.assert_close(ours.double(), truth, rtol=eps / 2 + bound / 4, atol=bound)
    value = torch.ops.objkern.multi_penalty(*numbers)
    torch.testing.assert_close(value, exact, rtol=1e-12 if dtype == torch.float64 else 4e-7, atol=1e-300)
    for seed in range(3):
        control.seed(seed)
        assert torch.equal(torch.ops.objkern.multi_penalty(*numbers), value)
        again = torch.ops.objkern.multi_penalty_gradient(upstream, *numbers)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@every_dtype
def test_parameters_between_boundaries(dtype: torch.dtype) -> None:
    """All that a parameter has lies there; its gradient is that of one at a boundary, bit for bit."""
    numbers = [torch.randn(1001, dtype=torch.float64).to(dtype) for _ in range(4)]
    if dtype != torch.float64:
        numbers[2] = numbers[2].float()
    found = []
    for begin in (1, 0):  # 1: views; 0: copies of them
        theta, origin, weight, gradient = ([x.clone()[1:] if begin else x[1:].clone()] for x in numbers)
        torch.ops.objkern.multi_penalty_accumulate_(gradient, torch.tensor(1.7), theta, origin, weight, 0.3, 0.7)
        found.append(gradient[0])
    assert not torch.equal(found[0], numbers[3][1:])
    assert torch.equal(*found)


@pytest.mark.parametrize("count", [0, 1, 50])
def test_a_penalty_on_one_parameter(count: int) -> None:
    theta, one = [torch.randn(count)], torch.ones((), dtype=torch.float64)
    value = torch.ops.objkern.multi_penalty(theta, [], [], 0.0, 0.5)
    (gradient,) = torch.ops.objkern.multi_penalty_gradient(one, theta, [], [], 0.0, 0.5)
    torch.testing.assert_close(value, 0.25 * theta[0].double().square().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, 0.5 * theta[0])


def test_a_penalty_takes_all_parameters_at_once() -> None:
    theta = [torch.randn(50, generator=torch.Generator().manual_seed(k)).requires_grad_() for k in range(3)]
    term = objkern.ElasticNet(theta, 0.3, 0.7)
    term()  # which finds out that it can
    before = control.launches()
    term().backward()
    assert control.launches() == before + 3  # sums, total, gradient
    expected = [p.grad.clone() for p in theta]
    term.accumulate_()
    assert control.launches() == before + 4
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(theta, expected, strict=True))


def test_no_elements() -> None:
    nothing = torch.empty(0, 3)
    assert objkern.MeanSquaredError()(nothing, nothing).isnan()
    assert objkern.MeanSquaredError()(nothing, nothing, empty="zero") == 0.0
    assert objkern.MeanSquaredError()(nothing, nothing, reduction="none").shape == (0, 3)


# ---- random calls ---------------------------------------------------------------------------------------------------


def test_random_objectives() -> None:
    """60 tiny ones, or as many as OBJKERN_CASES says, under any plan."""

    @properties.settings(60)
    @hypothesis.given(properties.cases(most_rows=5, most_classes=150), st.sampled_from([None, *PLANS]))
    def each(case: properties.Case, plan: Plan | None) -> None:
        with control.plan(plan) if plan is not None and case.linear is None else contextlib.nullcontext():
            properties.check(case)

    each()
