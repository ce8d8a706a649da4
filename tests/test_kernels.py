"""Inside the CPU kernels: the running maximum, rows on their side, stores at odd places, roundings, sums by tile."""

import ctypes
import math
import mmap

import pytest
import torch

import objkern
from objkern import CrossEntropy, Entropy, LogitL2, ZLoss

from .conftest import EVERY_TERM, assert_rounded, random_rows

REGULARIZED = objkern.parse("CrossEntropy(label_smoothing=0.1) + 0.01*ZLoss() - 0.1*Entropy() + 0.1*LogitL2()")


def loss_and_gradient(
    objective: objkern.Objective, z: torch.Tensor, y: torch.Tensor, upstream: torch.Tensor | None = None, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    x = z.clone().requires_grad_()
    loss = objective(x, y, reduction="none", **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), x.grad


def assert_like_float64(
    objective: objkern.Objective, z: torch.Tensor, y: torch.Tensor, rtol: float = 3e-6, **options
) -> None:
    ours = loss_and_gradient(objective, z, y, **options)
    exact = loss_and_gradient(objective, z.double(), y if y.dtype == torch.long else y.double(), backend="reference", **options)  # fmt: skip
    for a, b in zip(ours, exact, strict=True):
        assert_rounded(a, b, rtol)


# ---- the maximum so far ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("classes", [65, 128, 200, 1001, 9000])
def test_the_maximum_may_rise_in_every_block(classes: int, dtype: torch.dtype) -> None:
    """Sums so far are rescaled when a larger logit turns up; an ascending row makes that happen all the time."""
    steps = torch.linspace(-30, 10, classes, dtype=torch.float64)
    z = torch.stack([steps, steps.flip(0), steps * 10, steps + 1e4]).to(dtype)
    y = torch.tensor([classes - 1, 3, classes // 2, 0])
    assert_like_float64(REGULARIZED, z, y)
    s = objkern.row_statistics(z, y)
    exact = objkern.row_statistics(z.double(), y, backend="reference")
    for name in ("mean_logit", "mean_square_logit", "logit_variance", "entropy", "lse", "mean_logprob"):
        torch.testing.assert_close(getattr(s, name).double(), getattr(exact, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("classes", [100, 1000, 20000])
def test_masks_of_the_lowest_number_and_of_minus_infinity(classes: int) -> None:
    """finfo.min in the first blocks is a maximum that is left far behind; a factor of 0 must not meet −inf or NaN."""
    z, y = random_rows(6, classes, torch.float32)
    lowest = torch.finfo(torch.float32).min
    z[0, : classes // 2] = lowest
    z[1, classes // 2 :] = lowest
    z[2, : classes // 2] = -torch.inf
    z[3, 1::2] = -torch.inf
    z[4, :] = -torch.inf
    z[4, -1] = 1.5
    z[5, :] = lowest
    y[:] = torch.tensor([classes - 1, 0, classes - 1, 0, classes - 1, 3])
    for objective in (CrossEntropy(), Entropy()):
        assert_like_float64(objective, z, y)
    assert_like_float64(REGULARIZED, z[2:5], y[2:5])


@pytest.mark.parametrize("first", [torch.finfo(torch.float32).min, -2.0])
@pytest.mark.parametrize("classes", [300, 20000])
def test_a_first_block_with_one_class(classes: int, first: float) -> None:
    """What is rescaled when the maximum rises may be a single exponential."""
    z, _ = random_rows(2, classes, torch.float32)
    z[:, : classes // 2] = -torch.inf
    z[0, 0] = z[1, 7] = first
    y = torch.tensor([classes - 1, classes - 2])
    for objective in (CrossEntropy(), Entropy()) if first < -1e30 else (REGULARIZED,):
        assert_like_float64(objective, z, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [9, 300])
def test_statistics_of_a_row_with_no_class_but_the_target(classes: int, dtype: torch.dtype) -> None:
    z = torch.full((1, classes), -torch.inf, dtype=dtype)
    z[0, 7] = 2.5
    found = objkern.row_statistics(z, torch.tensor([7]))
    exact = objkern.row_statistics(z.double(), torch.tensor([7]), backend="reference")
    for name, ours, truth in zip(found._fields, found, exact, strict=True):
        if truth is not None:
            torch.testing.assert_close(ours.double(), truth, msg=name)


@pytest.mark.parametrize("classes", [9, 300, 16385])
def test_the_maximum_may_stand_anywhere(classes: int) -> None:
    """Its share of a gradient goes to the first class that has it."""
    places = [0, 1, 7, classes // 2, classes - 1]
    z, _ = random_rows(len(places), classes, torch.float32)
    z[torch.arange(len(places)), places] = z[-1, 3] = z[0, 5] = 20.0
    y = torch.tensor([3, 1, 2, 5, classes - 1])
    objective = 0.1 * objkern.MaxZLoss() + CrossEntropy()
    for some in (slice(None), slice(2), slice(3, None)):  # few rows are split among threads
        assert_like_float64(objective, z[some], y[some])
        _, parts = objective(z[some], y[some], reduction="none", return_parts=True)
        assert torch.equal(parts["accuracy"], (z[some].argmax(1) == y[some]).float())
    nothing = torch.tensor(0.0) * objkern.MaxZLoss()
    assert not loss_and_gradient(nothing, z, y)[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_excluded_class_may_stand_anywhere(dtype: torch.dtype) -> None:
    """One −inf in a row, in each place of a block; also where exponentials are kept."""
    rows, classes = 512, 300
    z, y = random_rows(rows, classes, dtype)
    place = torch.arange(rows) % classes
    z[torch.arange(rows), place] = -torch.inf
    y = torch.where(y == place, (y + 1) % classes, y)
    assert_like_float64(REGULARIZED, z[:classes], y[:classes])
    both = [
        torch.autograd.grad(REGULARIZED(x, y, reduction="sum", gradient=gradient), x)[0]
        for gradient in ("forward", "backward")
        for x in [z.clone().requires_grad_()]
    ]
    torch.testing.assert_close(*both, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_target_may_stand_anywhere(dtype: torch.dtype) -> None:
    """Every place in a block, in the last block, and in the order that bfloat16 pairs are taken in."""
    for classes in (67, 150, 300):
        row, _ = random_rows(1, classes, dtype)
        assert_like_float64(REGULARIZED, row.expand(classes, -1), torch.arange(classes))


# ---- exponentials ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [3, 70])
def test_the_exponential_keeps_its_digits_and_ends_in_zero(classes: int) -> None:
    """∂/∂z_2 of log(exp(0) + exp(t)) is exp(t)/(1 + exp(t)): 4 ulp, and neither subnormals nor NaN at the end."""
    t = torch.cat([-torch.linspace(0, 87, 5003), torch.tensor([-88.5, -100.0, -1e4, -1e30, -torch.inf])])
    z = torch.full((len(t), classes), -torch.inf)
    z[:, 1], z[:, 2] = 0.0, t
    x = z.clone().requires_grad_()
    objkern.row_statistics(x).lse.sum().backward()
    exact = torch.exp(t.double()) / (1 + torch.exp(t.double()))
    found = x.grad[:, 2]
    assert ((found[:-5].double() - exact[:-5]).abs() <= 4 * 2.0**-24 * exact[:-5]).all()
    assert (found[-5:] == 0).all()


@pytest.mark.parametrize("classes", [9, 64, 65, 1000])
def test_a_softcap_keeps_its_digits(classes: int) -> None:
    for scale in (0.01, 1.0, 30.0):  # both ways of taking the hyperbolic tangent
        z, y = random_rows(5, classes, torch.float32, scale)
        assert_like_float64(CrossEntropy(), z, y, softcap=20.0)


@pytest.mark.parametrize(
    "options", [{"logit_scale": 0.7}, {"softcap": 6.0}, {"logit_scale": -1.3, "softcap": 6.0}], ids=str
)
@pytest.mark.parametrize("classes", [9, 300])
def test_scale_and_cap(classes: int, options: dict[str, float]) -> None:
    """At every depth of sums; nothing is kept of logits that were transformed."""
    z, y = random_rows(5, classes, torch.float32)
    for objective in (CrossEntropy(), REGULARIZED, REGULARIZED + objkern.MaxZLoss()):
        assert_like_float64(objective, z, y, **options)
    z, y = random_rows(512, classes, torch.float32)
    both = []
    for gradient in ("forward", "backward"):
        x = z.clone().requires_grad_()
        loss = REGULARIZED(x, y, gradient=gradient, **options)
        both += [loss.detach(), *torch.autograd.grad(loss, x)]
    torch.testing.assert_close(both[:2], both[2:], rtol=1e-5, atol=1e-9)


# ---- rounding to bfloat16 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [8, 128])
def test_bfloat16_gradients_are_rounded_to_nearest_even(classes: int) -> None:
    """Rows of zeros: the gradient is upstream / V, exactly, before it is rounded. Ties, subnormals and overflow."""
    bits = torch.arange(0, 1 << 16, 7, dtype=torch.int32)
    patterns = torch.cat([(bits << 16) | low for low in (0, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    upstream = patterns.view(torch.float32)
    upstream = upstream[torch.isfinite(upstream) & ((upstream.abs() > 1e-35) | (upstream == 0))]
    z = torch.zeros(len(upstream), classes, dtype=torch.bfloat16)
    _, gradient = loss_and_gradient(ZLoss() + CrossEntropy(), z, torch.zeros(len(upstream), dtype=torch.long), upstream)
    _, unrounded = loss_and_gradient(
        ZLoss() + CrossEntropy(), z.float(), torch.zeros(len(upstream), dtype=torch.long), upstream
    )
    assert torch.equal(gradient[:, 1:].view(torch.int16), unrounded[:, 1:].to(torch.bfloat16).view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("payload", [0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000])
def test_a_nan_stays_one_whatever_its_bits(payload: int, dtype: torch.dtype) -> None:
    """Rounding adds to the bits: a NaN of ones would carry over into −0."""
    nan = torch.tensor([payload], dtype=torch.int32).view(torch.float32)
    for classes in (9, 200):
        z, y = random_rows(1, classes, dtype)
        assert loss_and_gradient(CrossEntropy(), z, y, nan)[1].isnan().all()
        z[0, 5] = torch.nan
        loss, gradient = loss_and_gradient(CrossEntropy(), z, y)
        assert loss.isnan().all()
        assert gradient.isnan().any()


# ---- stores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("classes", [65, 127, 129, 255, 1003])
def test_rows_that_begin_between_boundaries(classes: int, dtype: torch.dtype) -> None:
    """An odd V puts every row's gradient at another place of a cache line; each equals that of the row alone."""
    z, y = random_rows(40, classes, dtype)
    for objective in (CrossEntropy(), REGULARIZED):
        _, together = loss_and_gradient(objective, z, y)
        for i in range(40):
            _, alone = loss_and_gradient(objective, z[i : i + 1], y[i : i + 1])
            assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize(("rows", "classes"), [(900, 32001), (9600, 3000)])
def test_a_gradient_larger_than_the_caches(rows: int, classes: int) -> None:
    """Written past them, on machines whose last level holds no more than 300 MB; from kept exponentials too."""
    z, y = torch.randn(rows, classes), torch.randint(0, classes, (rows,))
    for gradient in ("backward", "forward"):
        x = z.requires_grad_()
        (whole,) = torch.autograd.grad(CrossEntropy()(x, y, reduction="sum", gradient=gradient), x)
        for i in (0, 1, rows // 2, rows - 1):
            x = z[i : i + 1].detach().requires_grad_()
            (alone,) = torch.autograd.grad(CrossEntropy()(x, y[i : i + 1], reduction="sum", gradient=gradient), x)
            # The gradient of many rows in the forward pass is made of the exponentials of their sums.
            torch.testing.assert_close(whole[i], alone[0], rtol=0 if gradient == "backward" else 1e-6, atol=0)


# ---- rows on their side -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 8, 15, 16, 17, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_narrow_rows_of_every_width(rows: int, dtype: torch.dtype) -> None:
    """Squares of 8 or 16 with what is left over; each row as in a batch of its own, within rounding."""
    for classes in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 50, 63, 64):
        z, y = random_rows(rows, classes, dtype)
        loss, gradient = loss_and_gradient(REGULARIZED, z, y)
        for i in (0, rows - 1):
            alone = loss_and_gradient(REGULARIZED, z[i : i + 1], y[i : i + 1])
            assert torch.equal(loss[i], alone[0][0])
            assert torch.equal(gradient[i], alone[1][0])
        exact = loss_and_gradient(REGULARIZED, z.double(), y, backend="reference")
        torch.testing.assert_close(loss.double(), exact[0], rtol=3e-6, atol=1e-6)
        assert_rounded(gradient, exact[1], 3e-6)


@pytest.mark.parametrize("classes", [2, 9, 33, 64, 300, 9000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_weights_and_dense_targets(
    dtype: torch.dtype, classes: int, smoothing: float, excluded: bool
) -> None:
    generator = torch.Generator().manual_seed(classes)
    z, y = random_rows(19, classes, dtype)
    if excluded:
        z[3, classes - 1] = -torch.inf
        y[3] = 0
    weight = torch.rand(classes, generator=generator) + 0.1
    q = torch.rand(19, classes, generator=generator).softmax(-1)
    every = f"CrossEntropy(label_smoothing={smoothing})"
    weighted = CrossEntropy(weight, smoothing)
    for objective in (weighted, weighted - 0.2 * Entropy() + LogitL2(), weighted + 0.1 * objkern.MaxZLoss()):
        for options in ({}, {"softcap": 4.0}, {"logit_scale": 0.5}):
            assert_like_float64(objective, z, y, **options)
            assert_like_float64(objective, z, q, **options)
    assert_like_float64(objkern.parse(every), z, q)
    assert_like_float64(objkern.parse(every) + 0.1 * objkern.MaxZLoss(), z, q)


# ---- sums by tile -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "classes"), [(1000, 9), (333, 100), (3, 40001), (20, 20000)])
@pytest.mark.parametrize("gradient", ["backward", "forward"])
def test_sums_do_not_depend_on_the_number_of_threads(rows: int, classes: int, gradient: str) -> None:
    z, y = random_rows(rows, classes, torch.float32)
    y[1] = -100
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            x = z.clone().requires_grad_()
            loss, parts = objkern.parse(EVERY_TERM)(x, y, gradient=gradient, return_parts=True)
            loss.backward()
            found.append((loss.detach(), x.grad, parts["lse"], parts["accuracy"], parts["z_loss"]))
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))


@pytest.mark.parametrize("objective", [CrossEntropy(), REGULARIZED], ids=["plain", "regularized"])
def test_gradients_of_the_forward_pass_do_not_depend_on_the_number_of_threads(objective: objkern.Objective) -> None:
    """Where many threads split rows, a single one must not keep exponentials of them."""
    z, y = random_rows(19, 22000, torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 5):
            torch.set_num_threads(threads)
            x = z.clone().requires_grad_()
            found += torch.autograd.grad(objective(x, y, gradient="forward"), x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("classes", [16384, 16385, 24575])
def test_few_long_rows(classes: int) -> None:
    """They are split; an ignored one stays empty."""
    z, y = random_rows(3, classes, torch.float32)
    z[0, -1], y[1], y[2] = 12.0, -100, classes - 1
    for objective in (REGULARIZED, objkern.parse(EVERY_TERM)):
        exact = loss_and_gradient(objective, z.double(), y, backend="reference")
        torch.testing.assert_close(loss_and_gradient(objective, z, y)[1].double(), exact[1], rtol=1e-5, atol=1e-7)
        x = z.clone().requires_grad_()
        loss = objective(x, y, reduction="sum", gradient="forward")
        torch.testing.assert_close(loss.detach().double(), exact[0].sum(), rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0].double(), exact[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("rows", "classes"), [(1, 5), (37, 9), (50, 70)])
def test_sums_are_those_of_the_rows(rows: int, classes: int) -> None:
    """Ignored rows, and lanes past the last row, add to nothing."""
    z, y = random_rows(rows, classes, torch.float32)
    y[rows // 2] = -100
    counted = int((y != -100).sum())
    each, of_rows = REGULARIZED(z, y, reduction="none", return_parts=True)
    total, parts = REGULARIZED(z, y, reduction="sum", return_parts=True)
    assert total.item() == pytest.approx(each.double().sum().item(), rel=1e-6, abs=1e-6)
    for name in ("cross_entropy", "z_loss", "entropy"):
        assert parts[name].item() == pytest.approx(of_rows[name].double().sum().item(), rel=1e-6, abs=1e-6)
    if counted:
        assert parts["lse"].item() == pytest.approx(of_rows["lse"].double().sum().item() / counted, rel=1e-6)
    assert math.isfinite(total.item())


def test_many_labels_are_counted_and_checked() -> None:
    """Labels are looked at in pieces of 8192."""
    z, y = torch.randn(20001, 3), torch.randint(0, 3, (20001,))
    y[::3] = -100
    weight = torch.tensor([0.5, 2.0, 1.0])
    for objective, native in ((CrossEntropy(), None), (CrossEntropy(weight), weight)):
        expected = torch.nn.functional.cross_entropy(z.double(), y, None if native is None else native.double())
        assert objective(z, y).item() == pytest.approx(expected.item(), rel=1e-6)
    y[20000] = 3
    with pytest.raises(IndexError, match="row 20000 holds label 3"):
        CrossEntropy()(z, y)
    y[0] = -1
    with pytest.raises(IndexError, match="row 0 holds label -1"):
        CrossEntropy()(z, y)


# ---- exponentials kept from the sums for the gradient -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("classes", [257, 300, 1003, 9000])
@pytest.mark.parametrize("objective", [CrossEntropy(), REGULARIZED], ids=["plain", "regularized"])
def test_a_gradient_from_kept_exponentials(objective: objkern.Objective, classes: int, dtype: torch.dtype) -> None:
    """With a maximum that rises from block to block, masked classes, and logits far below the others."""
    rows = 512  # fewer do not keep
    z, y = random_rows(rows, classes, dtype)
    z[::3] += torch.linspace(0, 40, classes).to(dtype)
    z[1::3, ::5] = -torch.inf
    z[2::3, ::7] = -300.0
    z[4, 7] = torch.nan
    y[5] = -100
    y[z.gather(1, y.clamp(min=0)[:, None]).squeeze(1) == -torch.inf] = 1
    results = []
    for gradient in ("forward", "backward"):
        x = z.clone().requires_grad_()
        results.append(torch.autograd.grad(objective(x, y, reduction="sum", gradient=gradient), x)[0])
    relative, absolute = {
        torch.float32: (1e-5, 1e-10), torch.float64: (1e-13, 1e-18), torch.bfloat16: (2**-7, 1e-6),
    }[dtype]  # fmt: skip
    for gradient in results:
        assert gradient[4].isnan().any()
        gradient[4] = 0.0
    torch.testing.assert_close(*results, rtol=relative, atol=absolute)


# ---- gradients into a tensor, and of a part of the vocabulary ------------------------------------------------------------

OPS = torch.ops.objkern
TERMS = [0.0, 0.1, 1.0, 2.0, 0.0, 0.1, 3.0, 0.0, 0.2, 9.0, 0.0, 0.3]  # with smoothing, a maximum, an entropy, squares


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("classes", [9, 1003])
def test_a_gradient_into_a_tensor(classes: int, dtype: torch.dtype) -> None:
    """The overloads `into` write what the others return, and nothing else."""
    z, y = random_rows(5, classes, dtype)
    loss, _, kept, gradient = OPS.fused(TERMS, 1, z, y)
    out = torch.full_like(z, torch.nan)
    found = OPS.fused.into(TERMS, 1, z, y, gradient=out)
    assert torch.equal(found[0], loss)
    assert torch.equal(out, gradient)
    upstream = torch.rand(5).to(loss)
    OPS.gradient.into(upstream, kept, False, TERMS, 1, z, y, gradient=out)
    assert torch.equal(out, OPS.gradient(upstream, kept, False, TERMS, 1, z, y))
    statistics, centred = OPS.statistics(z, y)
    OPS.statistics_gradient.into(statistics, centred, False, z, y, gradient=out)
    assert torch.equal(out, OPS.statistics_gradient(statistics, centred, False, z, y))
    for wrong in (out[:4], out[:, 1:], out.t().contiguous().t(), out.to(torch.complex64)):
        with pytest.raises(RuntimeError, match="gradient does not belong to these logits"):
            OPS.fused.into(TERMS, 1, z, y, gradient=wrong)


@pytest.mark.parametrize("objective", ["CrossEntropy()", "CrossEntropy() - 0.1*Entropy()", EVERY_TERM])
@pytest.mark.parametrize(("classes", "parts"), [(30, 3), (1000, 4), (1000, 1)])
def test_the_gradient_of_a_part_of_the_vocabulary(objective: str, classes: int, parts: int) -> None:
    """Labels counted from the part's beginning; what lies outside of it is not the target, nor wrong."""
    z, y = random_rows(6, classes, torch.float32)
    y[2] = 5  # ignored
    weight = torch.rand(classes) + 0.5
    beside = torch.randn(6, classes)
    for options in (
        {}, {"class_weight": weight}, {"softcap": 3.0, "logit_scale": torch.tensor(0.5)},
        {"reference": beside, "temperature": 1.5},
    ):  # fmt: skip
        terms = [x for c, t in objkern.parse(objective).weighted_terms for x in (t.kind, t.parameter, c)]
        if "reference" in options:
            terms += [10.0, 1.5, 0.3, 11.0, 1.5, 0.2]
        row_gradient = OPS.objective(terms, 2, z, y, ignore_index=5, **options)[2]
        centred = OPS.statistics(z, y, ignore_index=5, **options)[1]
        whole = OPS.gradient(torch.tensor(0.7), row_gradient, False, terms, 2, z, y, ignore_index=5, **options)
        f = torch.randn(12, 6, dtype=torch.float64)
        f[4] = 0.0  # more than one part may hold the maximum
        of_statistics = OPS.statistics_gradient(f, centred, False, z, y, ignore_index=5, **options)
        size = classes // parts
        for begin in range(0, classes, size):
            part = slice(begin, begin + size)
            of_part = {**options, "ignore_index": 5 - begin}
            if "class_weight" in options:
                of_part["class_weight"] = weight[part]
            if "reference" in options:
                of_part["reference"] = beside[:, part]
            kept = row_gradient.clone()
            if len(kept) >= 10:
                kept[9] *= z.argmax(1).div(size, rounding_mode="floor") * size == begin
            inside = z[:, part].contiguous()
            found = OPS.gradient(torch.tensor(0.7), kept, False, terms, 2, inside, y - begin, **of_part)
            torch.testing.assert_close(found, whole[:, part], rtol=1e-6, atol=1e-9)
            found = OPS.statistics_gradient(f, centred, False, inside, y - begin, **of_part)
            torch.testing.assert_close(found, of_statistics[:, part], rtol=1e-6, atol=1e-9)


# ---- what lies beside a tensor --------------------------------------------------------------------------------------


def between_walls(x: torch.Tensor, end: bool) -> torch.Tensor:
    """A copy that begins, or ends, beside a page that nobody may read or write."""
    pages = -(-x.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for wall in (0, pages + 1):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + wall * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    offset = (pages + 1) * mmap.PAGESIZE - x.nbytes if end else mmap.PAGESIZE
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view_as(x)
    return copy.copy_(x)


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rows", "classes"), [(3, 9), (9, 33), (8, 96), (5, 203), (2, 16385)])
def test_nothing_beside_a_tensor_is_touched(rows: int, classes: int, dtype: torch.dtype, end: bool) -> None:
    """A step too far, in whatever a call reads or writes, is a crash."""
    z, y = random_rows(rows, classes, dtype)
    y[rows // 2] = -100
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, beside = torch.rand(rows, classes).softmax(1).to(dtype), torch.randn(rows, classes).to(dtype)
    weighted = {"class_weight": (torch.rand(classes) + 0.1).to(wide)}
    upstream = torch.rand(rows).to(wide)
    calls: list[tuple[list[float], torch.Tensor | None, dict]] = [
        ([0.0, 0.0, 1.0], y, {}), (TERMS, y, weighted), (TERMS, q, weighted), (TERMS, q.to(wide), {"softcap": 6.0}),
        ([11.0, 1.0, 1.0], None, {"reference": beside}),
        ([10.0, 1.0, 1.0], None, {"reference": beside.to(wide), "softcap": 6.0}),
        ([*TERMS, 10.0, 1.0, 1.0, 11.0, 1.0, 1.0], y, {"reference": beside}),
    ]  # fmt: skip
    for terms, target, options in calls:
        results = []
        for place in (torch.clone, lambda x: between_walls(x, end)):
            x, t = place(z), None if target is None else place(target)
            o = {name: place(value) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
            fused, later = place(z), place(z)
            OPS.fused.into(terms, 2, x, t, **o, gradient=fused)
            loss, _, kept = OPS.objective(terms, 0, x, t, **o)
            OPS.gradient.into(place(upstream), place(kept), False, terms, 0, x, t, **o, gradient=later)
            s, centred = OPS.statistics(x, t, **o)
            of_statistics = place(z)
            OPS.statistics_gradient.into(place(s), place(centred), False, x, t, **o, gradient=of_statistics)
            results.append([loss, fused.clone(), later.clone(), s, of_statistics.clone()])
        torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (7, 9), (3, 16), (33, 1001)])
def test_nothing_beside_elements_is_touched(shape: tuple[int, ...], dtype: torch.dtype, end: bool) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z, y = torch.randn(shape).to(dtype), torch.rand(shape).to(dtype)
    weights = {"weight": torch.rand(shape[-1:]).to(wide), "pos_weight": torch.rand(shape).to(wide)}
    upstream = torch.rand(shape).to(wide)
    terms = [0.0, 0.1, 1.0, 1.0, 0.0, 0.2, 4.0, 0.5, 0.3]
    for target in (y, y.to(wide)):
        results = []
        for place in (torch.clone, lambda x: between_walls(x, end)):
            x, t = place(z), place(target)
            o = {name: place(value) for name, value in weights.items()}
            results.append([
                *OPS.elementwise(terms, 0, x, t, **o, with_parts=True), *OPS.elementwise_fused(terms, 2, x, t, **o),
                OPS.elementwise_gradient(place(upstream), False, terms, 0, x, t, **o),
            ])  # fmt: skip
        torch.testing.assert_close(*results, rtol=0, atol=0)
