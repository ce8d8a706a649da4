"""The Triton kernels, interpreted on the CPU, against the reference. Run by tests/test_triton.py, with
TRITON_INTERPRET=1 in the environment before triton is imported.

The interpreter is slow, so shapes are tiny, and the table of launches is replaced by one of tiny programs: every loop
runs several times. Its casts to bfloat16 cut digits off instead of rounding, an error of up to 2^-7 instead of 2^-8.
"""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from triton.runtime import interpreter

import objkern
import objkern.triton
from objkern import BinaryCrossEntropy, CrossEntropy, Entropy, KLDivergence, LogitL2, MaxZLoss, ZLoss, custom
from objkern.triton import launch

from ..conftest import (
    EVERY_NATIVE,
    EVERY_TERM,
    NATIVE,
    assert_masks_are_no_part_of_a_gradient,
    assert_rounded,
    assert_within_budget,
    masked_sides,
    native_objective,
    random_rows,
)
from ..properties import Case, cases, check, settings

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of the infinities that kernels make

beside_native_kernels = pytest.mark.skipif(objkern.native._C is None, reason="compares with the kernels of the CPU")

INF = float("inf")
KINDS = ["few", "narrow", "wide"]  # "pieces": wide, and rows are split; for tests of sums
REGULARIZED = objkern.parse("CrossEntropy(label_smoothing=0.1) + 0.01*ZLoss() - 0.1*Entropy() + 0.1*LogitL2()")
WITHOUT_UNLIKELIHOOD = objkern.parse(EVERY_TERM.replace(" + 0.2*Unlikelihood()", ""))
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 2**-7, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    assert objkern.triton.why_not("cpu") is None  # which registers the ops
    monkeypatch.setattr(launch, "FEW_ROWS", 4)
    monkeypatch.setattr(launch, "EPILOGUE_ROWS", 4)
    monkeypatch.setattr(launch, "MOST_NARROW_ROWS", 2)
    monkeypatch.setattr(launch, "REDUCE_ELEMENTS", 8)
    monkeypatch.setattr(launch, "COUNT_ROWS", 2)
    monkeypatch.setattr(launch, "WIDE", ((0, launch.WideLaunch(vectors=8, warps=4, tiles=2)),))


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels read and write what they were given, from its first element to its last, and where they call an address
    a multiple it is one. On a GPU the one goes wrong rarely, the other always.
    """
    given: list[tuple[int, int]] = []
    called: dict[Any, set[int]] = {}  # multiples that are none, by program: nothing may be there
    begin = interpreter.GridExecutor._init_args_hst
    set_attribute = interpreter.TensorHandle.set_attr

    def begin_watched(self: Any, arguments: Any, options: Any) -> Any:
        found = begin(self, arguments, options)
        called.clear()
        given[:] = [
            (
                x.data_ptr(),
                x.data_ptr() + x.element_size() * sum((n - 1) * d for n, d in zip(x.shape, x.stride(), strict=True)),
            )
            for x in (*found[0], *found[1].values())
            if isinstance(x, torch.Tensor) and x.numel()
        ]
        return found

    def check(addresses: Any, mask: Any) -> None:
        reached = addresses[mask]
        if reached.size:
            low, high = int(reached.min()), int(reached.max())
            assert any(first <= low and high <= last for first, last in given), "an access outside of every tensor"
            wrong = called.get(interpreter.interpreter_builder.grid_idx, set())
            assert not wrong.intersection(reached.flat), "an access that is not aligned as it was said to be"

    def check_attribute(self: Any, key: str, values: list[int]) -> None:
        if key == "tt.divisibility" and int(self.data.flat[0]) % values[-1] != 0:
            called.setdefault(interpreter.interpreter_builder.grid_idx, set()).add(int(self.data.flat[0]))
        set_attribute(self, key, values)

    for name, place in (("load", 1), ("store", 2)):  # of the mask
        plain = getattr(interpreter._interpreter, name)

        def access(*arguments: Any, plain: Any = plain, place: int = place) -> Any:
            check(arguments[0], arguments[place])
            return plain(*arguments)

        monkeypatch.setattr(interpreter._interpreter, name, access)
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", begin_watched)
    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", check_attribute)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernels run, whatever V is."""
    choose(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=[*KINDS, "pieces"])
def every_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    choose(request.param, monkeypatch)
    return request.param


def choose(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "FEW", 10**9 if kind == "few" else 0)
    monkeypatch.setattr(launch, "NARROW", 0 if kind in ("wide", "pieces") else 10**9)
    monkeypatch.setattr(launch, "PROGRAMS", 10**9 if kind == "pieces" else 0)
    monkeypatch.setattr(launch, "MOST_PIECES", 3)


def run(
    objective: objkern.Objective, z: torch.Tensor, y: torch.Tensor | None, upstream: torch.Tensor | None = None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    x = z.detach().requires_grad_()  # a clone would lie elsewhere
    loss = objective(x, y, **{"backend": "triton", **options})
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), x.grad


def assert_same(
    objective: objkern.Objective, z: torch.Tensor, y: torch.Tensor | None, upstream: torch.Tensor | None = None,
    **options,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Loss and gradient as the reference's on the same numbers in float64; unreduced unless said otherwise."""
    options.setdefault("reduction", "none")
    found = run(objective, z, y, upstream, **options)
    options.pop("gradient", None)
    exact_y = y if y is None or y.dtype == torch.long else y.double()
    exact = run(objective, z.double(), exact_y, upstream, **{**options, "backend": "reference"})
    for ours, truth in zip(found, exact, strict=True):
        assert_rounded(ours, truth, 1e-13 if z.dtype == torch.float64 else 3e-6)
    return found


# ---- values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 7, 9, 17, 31, 33, 67, 130])
def test_every_term_at_ragged_sizes(classes: int, every_kind: str) -> None:
    """A wrong tail, a padding that counts, a target among the others: heads and tails of every length."""
    z, y = random_rows(3, classes, torch.float32)
    y[1] = -100
    objective = objkern.parse(EVERY_TERM) if classes > 1 else WITHOUT_UNLIKELIHOOD
    if every_kind != "wide" or classes == 67:
        assert_same(objective, z, y)
    if every_kind != "pieces":
        assert_same(objective, z, y, gradient="forward", reduction="mean")


@pytest.mark.parametrize("classes", [513, 1031])
def test_longer_rows_plain_and_regularized(classes: int, every_kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "WIDE", ((0, launch.WideLaunch(vectors=32, warps=4, tiles=2)),))
    z, y = random_rows(3, classes, torch.bfloat16)
    for objective in (CrossEntropy(), REGULARIZED):
        assert_same(objective, z, y, gradient="forward", reduction="sum")


@pytest.mark.parametrize("name", NATIVE)
def test_each_term_alone(name: str, kind: str) -> None:
    """A term compiled out with one that it shares sums with."""
    z, y = random_rows(2, 21, torch.float64)
    if kind == "narrow":
        assert_same(objkern.parse(name), z, y)
    else:
        assert_same(objkern.parse(name), z, y, torch.tensor(-0.7).double(), gradient="forward", reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype(dtype: torch.dtype, kind: str) -> None:
    z, y = random_rows(2, 67, dtype)
    found = assert_same(objkern.parse(EVERY_TERM), z, y, gradient="forward", reduction="mean")
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found[1].dtype == dtype


def test_the_error_budget(kind: str) -> None:
    z, y = random_rows(4, 67, torch.float32)
    ours = run(objkern.parse(EVERY_TERM), z, y, reduction="none")
    results = []
    for x in (z.clone(), z.double()):
        x.requires_grad_()
        loss = native_objective(x, y, EVERY_NATIVE)
        loss.sum().backward()
        results.append((loss, x.grad))
    for k, what in enumerate(("loss", "gradient")):
        assert_within_budget(ours[k], results[0][k], results[1][k], torch.float32, what)


@pytest.mark.parametrize("margin", [5.0, 20.0, 40.0, 80.0, -100.0])
def test_digits_survive_large_margins(margin: float, kind: str) -> None:
    """lse − z_y and p_y − 1 have no digits left at a margin of 20; offsets of 1e7 cancel in raw sums."""
    for offset in (0.0, 1e7):
        z = (torch.randn(2, 17) * 2).round()
        y = torch.tensor([3, 16])
        z[[0, 1], y] = z.amax() + margin
        z += offset
        for objective in (CrossEntropy(), CrossEntropy() + Entropy()):
            found = run(objective, z, y, reduction="none")
            exact = run(objective, z.double(), y, reduction="none", backend="reference")
            for ours, truth in zip(found, exact, strict=True):
                torch.testing.assert_close(ours.double(), truth, rtol=5e-6, atol=1e-36)


@pytest.mark.parametrize("every_kind", ["wide", "pieces"], indirect=True)
def test_every_class_as_the_target_and_as_the_maximum(every_kind: str) -> None:
    """In the head, first and last of a tile, in the tail; rows begin at two places of a vector."""
    z, _ = random_rows(70, 70, torch.float32)
    place = torch.arange(70)
    assert_same(REGULARIZED, z, place)
    z[place, place] = 30.0
    assert_same(MaxZLoss(), z, place.roll(1), gradient="forward", reduction="sum")


@pytest.mark.parametrize("margin", [150.0, 300.0])
def test_far_classes_keep_their_share_in_float64(margin: float, kind: str) -> None:
    """exp(−150) is a number there, and all that is left of the loss and of its gradient."""
    z = torch.linspace(-1.0, 0.0, 21, dtype=torch.float64).repeat(2, 1) - margin
    z[:, 4] = z[1, 9] = 0.0  # the others are far from the target, and from each other
    for objective in (CrossEntropy(), CrossEntropy() + 0.5 * Entropy()):
        found = run(objective, z, torch.tensor([4, 4]), reduction="none")
        exact = run(objective, z, torch.tensor([4, 4]), reduction="none", backend="reference")
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=0.0)


def test_focal_loss_without_its_focus(kind: str) -> None:
    z, y = random_rows(3, 21, torch.float64)
    assert_same(objkern.Focal(gamma=0.0), z, y)


# ---- what rows may hold ---------------------------------------------------------------------------------------------


def test_excluded_classes(every_kind: str) -> None:
    """−inf − (−inf) and 0·(−inf): alone, in whole tiles, around the target, as the target."""
    z, y = random_rows(7, 67, torch.float32)
    z[0, ::3] = -INF
    z[1, :40] = -INF
    z[2, 30:] = -INF
    z[3] = -INF
    z[3, 66] = 1.5
    z[4] = -INF
    z[4, 2:4] = 0.5
    z[5, 4] = -INF
    z[6] = torch.finfo(torch.float32).min
    y[:] = torch.tensor([1, 66, 2, 66, 3, 5, 0])
    for objective in (CrossEntropy() - Entropy() + MaxZLoss(), REGULARIZED):
        assert_same(objective, z[:6], y[:6])
    assert_same(CrossEntropy(), z, y)
    loss, gradient = run(Entropy(), z[6:], y[6:])  # 67 equal logits: log 67, and nothing to gain
    assert loss.item() == pytest.approx(4.2046926, rel=1e-6)
    assert gradient.abs().max() < 1e-7
    # The target itself excluded: an infinite loss, no NaN in the gradient of the others.
    assert run(CrossEntropy(), z[:1], torch.tensor([3]), reduction="none")[0].item() == INF
    assert_same(Entropy() + ZLoss(), z[:1], torch.tensor([3]))
    _, gradient = run(REGULARIZED, z[:3], y[:3], gradient="forward")
    assert not gradient[z[:3] == -INF].any()


@beside_native_kernels
def test_minus_infinity_as_a_number(every_kind: str) -> None:
    """The drop-in follows torch: infinite smoothed losses, NaN where torch has it."""
    z, y = random_rows(4, 35, torch.float32)
    z[0, 3] = -INF
    z[1, 20:] = -INF
    z[2] = -INF
    y[:] = torch.tensor([1, 4, 0, 34])
    weight = torch.rand(35) + 0.1
    weight[4] = 0.0
    for options in ({"label_smoothing": 0.1}, {"weight": weight, "label_smoothing": 0.1}):
        found = []
        for backend in ("triton", "cpu"):
            x = z.clone().requires_grad_()
            term = CrossEntropy(options.get("weight"), options.get("label_smoothing", 0.0))
            batch = objkern.batch.flatten(x, y, reduction="none", class_weight=options.get("weight"), masked=False)
            run_ = objkern.ops.backend_for(backend, x)
            loss, _ = run_.objective(batch, objkern.ops.Program.of([(1.0, term)]), False, False)
            loss.sum().backward()
            found.append((loss.detach(), x.grad))
        for ours, native in zip(*found, strict=True):
            torch.testing.assert_close(ours, native, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_nan_and_infinity_are_not_lost(kind: str) -> None:
    z = torch.zeros(4, 35)
    z[0, 34] = float("nan")
    z[1, 20] = INF
    z[2] = -INF
    z[2, 30] = float("nan")
    for objective in (CrossEntropy() - Entropy(), MaxZLoss(), ZLoss()):
        for label in (0, 34):
            loss = objective(z, torch.full((4,), label), reduction="none", backend="triton")
            assert loss.isnan().tolist() == [True, True, True, False], (objective, label)


def test_ignored_rows_and_all_of_them(kind: str) -> None:
    z, y = random_rows(4, 35, torch.float32)
    z[3] = float("nan")
    y[[0, 3]] = -100
    for gradient in ("forward", "backward"):
        loss, parts = REGULARIZED(z, y, return_parts=True, gradient=gradient, backend="triton")
        assert loss.isfinite()
        assert parts["rows"] == 2
        _, found = run(REGULARIZED, z, y, torch.tensor(INF), gradient=gradient)
        assert not found[[0, 3]].any()
    assert_same(REGULARIZED, z[:3], y[:3], reduction="mean")
    y[:] = -100
    for empty, expected in (("nan", torch.nan), ("zero", 0.0)):
        loss, found = run(REGULARIZED, z, y, torch.tensor(3.0), empty=empty, gradient="forward")
        torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True)
        assert torch.equal(found, torch.zeros_like(z))
    assert_same(CrossEntropy(), z[:2], torch.tensor([34, 3]), ignore_index=34)
    assert run(REGULARIZED, z[:0], y[:0], reduction="sum")[0] == 0


@pytest.mark.parametrize("label", [-1, 35, 10**6, 2**32 + 3, 2**63 - 1, -(2**63)])
def test_bad_labels_are_nan_in_their_row_alone(label: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An out-of-bounds read (a label of 2^32 + 3 is 3 in 32 bits), or loss 0 with a gradient."""
    z, y = random_rows(3, 35, torch.float32)
    y[1] = label
    with pytest.raises(IndexError, match=rf"row 1 holds label {label}\b"):
        REGULARIZED(z, y, backend="triton")
    with pytest.raises(IndexError, match=rf"row 1 holds label {label}\b"):
        objkern.row_statistics(z, y, backend="triton")
    monkeypatch.setattr(objkern.reference, "check_labels", lambda *_: None)  # as on a GPU
    gradient = "forward" if label < 0 else "backward"
    loss, found = run(REGULARIZED, z, y, reduction="sum", gradient=gradient)
    assert loss.isnan()
    assert found[1].isnan().all()
    _, others = run(REGULARIZED, z[::2], y[::2], reduction="sum", gradient=gradient)
    torch.testing.assert_close(found[::2], others, rtol=1e-5, atol=1e-7)
    assert objkern.row_statistics(z, y, backend="triton").lse.isnan().tolist() == [False, True, False]


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_and_probability_targets(smoothing: float, every_kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    z, y = random_rows(2, 101, torch.float32)
    weight = torch.rand(101, generator=generator) + 0.1
    q = torch.rand(2, 101, generator=generator).softmax(-1)
    z[1, 5] = -INF
    y[1] = 0
    assert_same(CrossEntropy(weight, smoothing), z, y, reduction="mean", gradient="forward")
    assert_same(CrossEntropy(weight, smoothing), z, q)
    mixed = CrossEntropy(weight, smoothing) - 0.2 * Entropy() + MaxZLoss()
    assert_same(mixed, z, y)
    assert_same(mixed, z, q, reduction="mean", gradient="forward")
    if smoothing:
        assert_same(CrossEntropy(None, smoothing), z.half(), q.half())
    else:
        assert_same(CrossEntropy(None, smoothing), z.half(), q)


@pytest.mark.parametrize("scale", [0.01, 30.0])
def test_softcap_and_logit_scale(scale: float, kind: str) -> None:
    z, y = random_rows(2, 35, torch.float32, scale)
    z[0, 7] = -INF
    y[0] = 1
    assert_same(CrossEntropy(), z, y, logit_scale=0.7)
    assert_same(CrossEntropy(), z, y, softcap=20.0)
    assert_same(CrossEntropy() + 0.1 * MaxZLoss(), z, y, logit_scale=torch.tensor(-1.3))
    assert_same(REGULARIZED, z, y, softcap=20.0, logit_scale=0.7, gradient="forward", reduction="sum")
    assert_same(CrossEntropy() + 0.1 * MaxZLoss(), z.double(), y, softcap=20.0)


def test_a_learned_scale(kind: str) -> None:
    z, y = random_rows(3, 35, torch.float32)
    y[1] = -100
    found = []
    for backend in ("triton", "reference"):
        s = torch.tensor(1.3, requires_grad=True)
        loss = REGULARIZED(z.clone().requires_grad_(), y, logit_scale=s, softcap=20.0, backend=backend)
        found.append(torch.autograd.grad(loss, s)[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_normalizers_and_upstream_gradients(reduction: str, kind: str) -> None:
    z, y = random_rows(4, 19, torch.float64)
    y[2] = -100
    weight = torch.linspace(0.1, 3.0, 19, dtype=torch.float64)
    objective = CrossEntropy(weight) + torch.tensor(0.3) * ZLoss()
    if reduction == "none":
        upstream = torch.tensor([0.0, -1.0, 2.5, -40.0], dtype=torch.float64)
        assert_same(objective, z, y, upstream)
        assert_same(objective, z, y, upstream[:1].expand(4))
        return
    for gradient, upstream in (
        ("forward", 1.0),
        ("forward", -0.25),
        ("backward", 0.5),
        ("forward", 0.0),
        ("forward", 2.0),
    ):
        assert_same(objective, z, y, torch.tensor(upstream).double(), reduction=reduction, gradient=gradient)
    if reduction == "mean":
        assert_same(objective, z, y, reduction="mean", normalizer=7)
        assert_same(objective, z, y, reduction="mean", normalizer=torch.tensor(2.5))


def test_float16_does_not_underflow_under_loss_scaling(kind: str) -> None:
    x = torch.zeros(2, 5, dtype=torch.float16)
    x[:, 0] = 20
    x.requires_grad_()
    y = torch.tensor([0, -100])
    loss = lambda g: CrossEntropy()(x, y, gradient=g, backend="triton") * 65536  # noqa: E731
    both = [torch.autograd.grad(loss(g), x)[0] for g in ("forward", "backward")]
    assert torch.equal(*both)
    assert both[0][0].abs().min() > 1e-5


def test_coefficients_that_are_tensors(kind: str) -> None:
    z, y = random_rows(3, 19, torch.float32)
    found = []
    for backend in ("triton", "reference"):
        c = torch.tensor(0.5, requires_grad=True)
        loss, parts = (CrossEntropy() + c * ZLoss())(z, y, backend=backend, return_parts=True)
        (grad,) = torch.autograd.grad(loss, c)
        torch.testing.assert_close(grad, parts["z_loss"])
        found.append(grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_parts(reduction: str, every_kind: str) -> None:
    z, y = random_rows(5, 21, torch.float32)
    z[0, 3], z[0, 8] = 50.0, 50.0  # ties go to the first
    z[1, 3], z[1, 8] = 50.0, 50.0
    y[:] = torch.tensor([3, 8, -100, 2, 20])
    z[4, 20] = 60.0
    both = [
        objkern.parse(EVERY_TERM.replace("+ 0.3*MaxZLoss()", ""))(
            z, y, reduction=reduction, return_parts=True, backend=backend
        )[1]
        for backend in ("triton", "reference")
    ]
    assert both[0].keys() == both[1].keys()
    for name, value in both[0].items():
        torch.testing.assert_close(value, both[1][name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_ties_of_the_maximum_go_to_the_first(kind: str) -> None:
    z = torch.zeros(4, 37)
    z[0, [5, 20]] = 3.0
    z[1, [5, 20]] = 3.0
    z[2, [5, 20]] = 3.0
    y = torch.tensor([5, 20, 7, 36])
    assert_same(custom(lambda s: s.max_logit), z, y)
    for objective in (MaxZLoss(), MaxZLoss() + CrossEntropy()):
        assert_same(objective, z, y)
        assert_same(objective, z, y, gradient="forward", reduction="sum")


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "gradient"), [(torch.float32, "backward"), (torch.bfloat16, "forward")])
def test_rows_that_begin_anywhere(dtype: torch.dtype, gradient: str, kind: str) -> None:
    """A store that needs a boundary at an address that is none; strides mixed up; bytes around the rows written."""
    classes = 45
    z, y = random_rows(3, classes, dtype)
    _, expected = run(REGULARIZED, z, y, gradient=gradient)
    for offset, stride in ((1, 45), (5, 46), (0, 48), (2, 61)):
        storage = torch.full((400,), 1e4, dtype=dtype)
        x = storage.as_strided((3, classes), (stride, 1), offset)
        x.copy_(z)
        before = storage.clone()
        _, found = run(REGULARIZED, x, y, gradient=gradient)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 0.1)
        assert torch.equal(storage, before)
    for x in (z.t().contiguous().t(), z[:1].expand(3, classes), z[:, :2].t().contiguous().t()):
        labels = y % x.shape[1] if x.stride(0) else y[:1].expand(3)
        assert_same(REGULARIZED, x, labels, gradient=gradient, reduction="sum")


@pytest.mark.parametrize("offset", [1, 3])
def test_the_rescaled_gradient_may_lie_anywhere(offset: int, kind: str) -> None:
    z, y = random_rows(3, 45, torch.float32)
    arguments = ([0.0, 0.0, 1.0], 1, z, y)
    ops = torch.ops.objkern_triton
    _, _, row_gradient, gradient = ops.fused(*arguments)
    out = torch.zeros(200).as_strided((3, 45), (45, 1), offset)
    out.copy_(gradient)
    ops.rescale(out.fill_(7.0), torch.tensor(1.0), row_gradient, *arguments)
    assert (out == 7.0).all()  # nothing is to be done
    ops.rescale(out, torch.tensor(-2.0), row_gradient, *arguments)
    torch.testing.assert_close(out, -2 * gradient, rtol=1e-6, atol=1e-9)


def test_inputs_are_not_written_and_results_repeat(kind: str) -> None:
    z, y = random_rows(2, 70, torch.float32)
    x, version = z.clone().requires_grad_(), None
    results = []
    for _ in range(2):
        x.grad, version = None, x._version
        loss = REGULARIZED(x, y, gradient="forward", backend="triton")
        loss.backward(torch.tensor(0.7))
        results.append((loss.detach(), x.grad))
        assert x._version == version
    assert torch.equal(x.detach(), z)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["labels", "none", "dense"])
def test_row_statistics_and_their_derivatives(target: str, every_kind: str) -> None:
    for dtype in (torch.float32, torch.float64):
        z, y = random_rows(4, 37, dtype)
        z[0, 5] = -INF
        y[:] = torch.tensor([1, -100, 36, 7])
        given = {"labels": y, "none": None, "dense": torch.rand(4, 37, dtype=dtype)}[target]
        found = []
        for backend, x, t in (("triton", z, given), ("reference", z.double(), given)):
            x = x.clone().requires_grad_()
            t = t.double() if t is not None and t.is_floating_point() and backend == "reference" else t
            s = objkern.row_statistics(x, t, backend=backend)
            values = [v for v in s if v is not None]
            factors = torch.linspace(0.3, 1.7, len(values) * 4).reshape(len(values), 4).double()
            total = sum(
                (torch.where(v.isfinite(), v.double(), torch.zeros(())) * f).sum()
                for v, f in zip(values, factors, strict=True)
            )
            total.backward()
            found.append(([v.detach().double() for v in values], x.grad.double()))
        for ours, exact in zip(found[0][0], found[1][0], strict=True):
            torch.testing.assert_close(ours, exact, rtol=2e-5, atol=2e-5, equal_nan=True)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


def test_the_spread_of_few_classes(every_kind: str) -> None:
    """A mean of one class, of none; lanes and pieces of a row that hold one or nothing; more rows than a program's."""
    for dtype in (torch.float32, torch.float64):
        z, y = random_rows(9, 70, dtype)
        z[:6][torch.rand(6, 70, generator=torch.Generator().manual_seed(2)) < 0.6] = -INF
        z[torch.arange(6), y[:6]] = 1.5
        z[6:8] = -INF
        z[6, 69], y[6] = 0.5, 69
        z[7, 30], z[7, 31], y[7] = 0.5, -2.0, 30
        z[8] = -INF
        z[8, [3, 40]], y[8] = torch.tensor([2.0, -1.0], dtype=dtype), 5
        for rows in (slice(0, 9), slice(0, 1)):
            found = []
            for backend, x in (("triton", z[rows].clone()), ("reference", z[rows].double())):
                s = objkern.row_statistics(x.requires_grad_(), y[rows], backend=backend)
                (s.logit_variance + s.mean_logit * s.entropy).sum().backward()
                found.append((s.logit_variance.detach().double(), s.mean_logit.detach().double(), x.grad.double()))
            for ours, exact in zip(*found, strict=True):
                torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def test_custom_terms_and_second_derivatives(kind: str) -> None:
    z, y = random_rows(3, 19, torch.float64)
    assert_same(CrossEntropy() + custom(lambda s: s.lse * s.entropy + s.logit_variance + s.max_logit), z, y)
    x = z.clone().requires_grad_()
    loss = (CrossEntropy() + LogitL2())(x, y, backend="triton")
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    again = z.clone().requires_grad_()
    loss = (CrossEntropy() + LogitL2())(again, y, backend="reference")
    (first,) = torch.autograd.grad(loss, again, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(first.square().sum(), again)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("classes", [5, 37, 130])
def test_the_divergence_from_a_reference(classes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "COMPARE_CLASSES", 32)
    z, y = random_rows(5, classes, dtype, 3)
    y[3] = -100
    r = (0.9 * z.double() + torch.randn(z.shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    r[3] = torch.nan  # of an ignored row nothing is read
    up = torch.linspace(-1, 2, 5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    both = 0.3 * KLDivergence("forward", 1.7) + 0.2 * KLDivergence("reverse", 1.7)
    assert_same(CrossEntropy(label_smoothing=0.1) + both, z, y, up, reference=r, softcap=20.0, logit_scale=0.9)
    assert_same(both, z, y, reduction="mean", reference=r.float(), gradient="forward")
    r[0, 2] = -torch.inf  # q excludes a class
    z[1, 4] = z[2, -1] = -torch.inf  # z does
    r[2, -1] = 1000.0
    assert_same(KLDivergence(), z, y, up, reference=r)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_divergence_between_rows_far_apart(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing overflows: each is beside its own maximum, which may be the first class, and nobody else's."""
    monkeypatch.setattr(launch, "COMPARE_CLASSES", 32)
    far = 1000.0
    z, y = random_rows(6, 37, dtype)
    r = z + torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    z[[0, 1]] += far
    r[[1, 2]] += far
    z[3, 0] = r[3, 0] = far
    r[4] = z[4]
    y[5] = 0
    around = [torch.full((6, 50), 2e4, dtype=dtype) for _ in range(2)]
    for whole, x in zip(around, (z, r), strict=True):
        whole[:, 5:42] = x
    x, beside = (whole[:, 5:42] for whole in around)
    both = 0.3 * KLDivergence("forward", 1.7) + 0.2 * KLDivergence("reverse", 1.7)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12  # of 1000, whose digits are fewer
    found = run(both, x, y, reduction="none", reference=beside)
    exact = run(both, z.double(), y, reduction="none", reference=r.double(), backend="reference")
    for ours, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=tolerance, atol=tolerance)
    same = run(both, x[4:5], y[4:5], reduction="none", reference=beside[4:5])
    assert same[0].item() == 0.0
    assert not same[1].any()


def test_an_infinite_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference excludes a class that the logits do not."""
    z, _ = random_rows(2, 37, torch.float32)
    r = z.clone()
    r[1, 2] = -INF
    found = KLDivergence("reverse")(z, reference=r, reduction="none", backend="triton")
    assert found.tolist() == [0.0, INF]


def test_a_small_divergence_keeps_its_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "COMPARE_CLASSES", 32)
    z, _ = random_rows(4, 130, torch.float32, 3)
    r = z + 1e-3 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    for direction in ("forward", "reverse"):
        found = KLDivergence(direction)(z, reference=r, reduction="none", backend="triton")
        exact = KLDivergence(direction)(z.double(), reference=r, reduction="none", backend="reference")
        assert (exact < 1e-5).all()
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_statistics_beside_a_reference(temperature: float) -> None:
    z, y = random_rows(4, 37, torch.float32, 3)
    r = z + torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for x, backend in ((z.clone(), "triton"), (z.double(), "reference")):
        s = objkern.row_statistics(x.requires_grad_(), y, reference=r, temperature=temperature, backend=backend)
        (s.forward_kl.square() + s.reverse_kl * s.lse).sum().backward()
        found.append((s.forward_kl.detach(), s.reverse_kl.detach(), x.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_of_the_least_number(dtype: torch.dtype, temperature: float) -> None:
    for direction, z, r in masked_sides(2, 37, dtype):
        term, up = KLDivergence(direction, temperature), torch.tensor([65536.0, 0.5])
        found = run(term, z, None, up, reference=r, reduction="none")
        live = [x.double().clamp(min=-1e30) for x in (z, r)]
        exact = run(term, live[0], None, up, reference=live[1], reduction="none", backend="reference")
        for ours, truth in zip(found, exact, strict=True):
            assert_rounded(ours, truth, 1e-12 if dtype == torch.float64 else 4e-6)


def test_statistics_beside_masks_of_the_least_number(every_kind: str) -> None:
    for dtype in (torch.float32, torch.float64):
        assert_masks_are_no_part_of_a_gradient("triton", 37, dtype)


def test_rows_without_a_finite_logit(kind: str) -> None:
    """No class is left: the loss is NaN, nothing is accurate, and excluded classes have no gradient."""
    z, _ = random_rows(4, 9, torch.float32)
    z[1] = -INF
    z[2, 5] = float("nan")
    z[3, 8] = 50.0
    for label in (0, 8):
        y = torch.full((4,), label)
        for objective in (CrossEntropy(), REGULARIZED):
            loss, parts = objective(z, y, reduction="none", backend="triton", return_parts=True)
            assert loss.isnan().tolist() == [False, True, True, False]
            assert parts["accuracy"][1:].tolist() == [0.0, 0.0, float(label == 8)]
            _, gradient = run(objective, z, y, reduction="none")
            assert not gradient[1].any()


@pytest.mark.parametrize("mode", ["forward", "recompute"])
def test_the_linear_path(mode: str) -> None:
    """Chunks of logits go to the same kernels."""
    hidden, weight, y = torch.randn(5, 3), torch.randn(9, 3), torch.tensor([0, 8, -100, 3, 3])
    results = []
    for dtype, options in (
        (torch.float32, {"mode": mode, "chunk_rows": 2, "backend": "triton"}),
        (torch.float64, {"backend": "reference"}),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        loss = REGULARIZED.linear(*leaves, y, **options)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves, torch.tensor(0.7, dtype=loss.dtype))])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_half_precision_gradients_of_float32_logits(kind: str) -> None:
    """Each is the float32 gradient, rounded: in the forward pass and from what it kept, at any alignment."""
    ops = torch.ops.objkern_triton
    terms = [x for c, t in REGULARIZED.weighted_terms for x in (t.kind, t.parameter, c)]
    z, y = random_rows(3, 43, torch.float32)
    for rows in (z, torch.cat([z, z], 1)[:, 1:44]):
        _, _, kept, wide = ops.fused(terms, 1, rows, y)
        for place in (0, 1):
            out = torch.full((z.numel() + place,), torch.nan, dtype=torch.float16)[place:].view(z.shape)
            ops.fused.into(terms, 1, rows, y, gradient=out)
            torch.testing.assert_close(out, wide.half(), rtol=2**-10, atol=2**-24)
            ops.gradient.into(torch.tensor(1.0), kept, False, terms, 1, rows, y, gradient=out.fill_(torch.nan))
            torch.testing.assert_close(out, wide.half(), rtol=2**-10, atol=2**-24)
    with pytest.raises(RuntimeError, match="gradient does not belong"):
        ops.fused.into(terms, 1, z.half(), y, gradient=z.clone())


def test_the_gradient_of_a_part_of_the_vocabulary(kind: str) -> None:
    """Labels counted from the part's beginning; what lies outside of it is not the target, nor wrong."""
    ops = torch.ops.objkern_triton
    terms = [x for c, t in REGULARIZED.weighted_terms for x in (t.kind, t.parameter, c)]
    z, _ = random_rows(4, 30, torch.float32)
    y = torch.tensor([3, 29, 5, 14])
    kept = ops.objective(terms, 2, z, y, ignore_index=5)[2]
    statistics, centred = ops.statistics(z, y, ignore_index=5)
    whole = ops.gradient(torch.tensor(0.7), kept, False, terms, 2, z, y, ignore_index=5)
    of_statistics = ops.statistics_gradient(statistics, centred, False, z, y, ignore_index=5)
    for begin in (0, 15):
        part = slice(begin, begin + 15)
        arguments = (z[:, part].contiguous(), y - begin)
        found = ops.gradient(torch.tensor(0.7), kept, False, terms, 2, *arguments, ignore_index=5 - begin)
        torch.testing.assert_close(found, whole[:, part], rtol=1e-6, atol=1e-9)
        f = statistics.clone()
        f[4] *= (z.argmax(1) // 15 * 15 == begin) | (centred[13] == 1)
        found = ops.statistics_gradient(f, centred, False, *arguments, ignore_index=5 - begin)
        torch.testing.assert_close(found, of_statistics[:, part], rtol=1e-6, atol=1e-9)


@beside_native_kernels
@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("with_parts", [False, True])
def test_results_have_the_shapes_of_native_ones(reduction: int, with_parts: bool, kind: str) -> None:
    terms = [0.0, 0.1, 1.0, 1.0, 0.0, 0.5, 3.0, 0.0, -0.1]
    z, y = random_rows(3, 19, torch.float32)
    shapes = []
    for ops in (torch.ops.objkern_triton, torch.ops.objkern):
        options = {"with_parts": True} if with_parts else {}
        found = [*ops.objective(terms, reduction, z, y, **options), *ops.statistics(z, y)]
        found += ops.elementwise([0.0, 0.0, 1.0, 2.0, 0.0, 0.5], reduction, z, z.sigmoid(), **options)
        shapes.append([(x.shape, x.dtype) for x in found])
    assert shapes[0] == shapes[1]


def test_what_does_not_belong_together_is_refused() -> None:
    """Read by kernels it would be read out of bounds."""
    ops, one = torch.ops.objkern_triton, torch.tensor(1.0)
    terms, z, y = [0.0, 0.0, 1.0], torch.zeros(3, 5), torch.tensor([0, 1, 2])
    _, _, kept, gradient = ops.fused(terms, 1, z, y)
    sums = ops.statistics(z, y)[1]
    partials = torch.zeros(12, 3)
    turned = torch.zeros(5, 3).t()
    divergence = [10.0, 1.0, 1.0]
    calls = {
        "term kind 0.5 is not known": lambda: ops.objective([0.5, 0.0, 1.0], 1, z, y),
        "term kind 12 is not known": lambda: ops.objective([12.0, 0.0, 1.0], 1, z, y),
        "zip": lambda: ops.objective([0.0, 0.0, 1.0, 1.0], 1, z, y),
        "logits: expected": lambda: ops.objective(terms, 1, z[0], y),
        "at least one class": lambda: ops.objective(terms, 1, z[:, :0], y),
        r"expected \(3\) labels": lambda: ops.objective(terms, 1, z, y[:2]),
        "expected probabilities": lambda: ops.objective(terms, 1, z, z[:2]),
        "class weight: expected": lambda: ops.objective(terms, 1, z, y, class_weight=torch.ones(4)),
        "reference: expected logits": lambda: ops.objective(divergence, 1, z, y, reference=z[:2]),
        "have to be excluded": lambda: ops.objective(divergence, 1, z, y, reference=z, masked=False),
        "needs one but got None": lambda: ops.objective(divergence, 1, z, y),
        "target: a term needs one": lambda: ops.objective(terms, 1, z),
        "upstream: expected": lambda: ops.gradient(torch.ones(2), kept, False, terms, 0, z, y),
        "fused: the gradient of unreduced": lambda: ops.fused(terms, 0, z, y),
        "row_gradient does not belong": lambda: ops.gradient(one, kept[:2], False, terms, 1, z, y),
        "row_gradient does not": lambda: ops.gradient(one, kept.double(), False, terms, 1, z, y),
        "row_gradient does": lambda: ops.rescale(gradient, one, kept[:, :2], terms, 1, z, y),
        "gradient does not belong to these": lambda: ops.rescale(turned, one, kept, terms, 1, z, y),
        "gradient does not belong": lambda: ops.rescale(gradient.half(), one, kept, terms, 1, z, y),
        "centred sums": lambda: ops.statistics_gradient(partials, sums[:14], False, z, y),
        "centred sums do not": lambda: ops.statistics_gradient(partials, sums.float(), False, z, y),
        "partials: expected": lambda: ops.statistics_gradient(partials[:, :2], sums, False, z, y),
        "term kind 6": lambda: ops.elementwise([6.0, 0.0, 1.0], 1, z, z),
        "term kind 2.5": lambda: ops.elementwise([2.5, 0.0, 1.0], 1, z, z),
        "target: expected the shape": lambda: ops.elementwise([2.0, 0.0, 1.0], 1, z, z[:2]),
        "a term needs one but got None": lambda: ops.elementwise([2.0, 0.0, 1.0], 1, z),
        "upstream: expected \\(\\) or": lambda: ops.elementwise_gradient(torch.ones(2), False, [2.0, 0.0, 1.0], 0, z, z),
        "elementwise_fused: the gradient": lambda: ops.elementwise_fused([2.0, 0.0, 1.0], 0, z, z),
        "gradient does not belong to this": lambda: ops.elementwise_rescale(turned, one, [2.0, 0.0, 1.0], 1, z, z),
    }  # fmt: skip
    for said, call in calls.items():
        with pytest.raises((RuntimeError, ValueError), match=said):
            call()


def test_memory_that_is_gone_is_an_error() -> None:
    """FSDP and offloading free it, and keep the tensor."""
    z, y = random_rows(3, 35, torch.float32)
    q = z.sigmoid()
    gone = z.clone()
    gone.untyped_storage().resize_(0)
    lost = torch.tensor(2.0)
    lost.untyped_storage().resize_(0)
    for name, call in {
        "logits": lambda: CrossEntropy()(gone, y, backend="triton"),
        "target": lambda: CrossEntropy()(z, gone, backend="triton"),
        "reference": lambda: KLDivergence()(z, reference=gone, backend="triton"),
        "logit_scale": lambda: CrossEntropy()(z, y, logit_scale=lost, backend="triton"),
        "normalizer": lambda: CrossEntropy()(z, y, normalizer=lost, backend="triton"),
        "input": lambda: BinaryCrossEntropy()(gone, q, backend="triton"),
        "weight": lambda: BinaryCrossEntropy(weight=gone)(z, q, backend="triton"),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: its memory has been freed"):
            call()


@beside_native_kernels
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_excluded_classes_of_probability_zero_as_numbers(smoothing: float, every_kind: str) -> None:
    """The drop-in with probabilities: 0·(−∞) is NaN in torch, and a smoothed share is infinite."""
    z, _ = random_rows(3, 35, torch.float32)
    q = torch.rand(3, 35).softmax(-1)
    z[0, 3] = z[1, 7] = -INF
    q[0, 3] = 0.0
    for weight in (None, torch.rand(35) + 0.1):
        found = []
        for backend in ("triton", "cpu"):
            x = z.clone().requires_grad_()
            batch = objkern.batch.flatten(x, q, reduction="none", class_weight=weight, masked=False)
            program = objkern.ops.Program.of([(1.0, CrossEntropy(weight, smoothing))])
            loss, _ = objkern.ops.backend_for(backend, x).objective(batch, program, False, False)
            loss.sum().backward()
            found.append((loss.detach(), x.grad))
        for ours, native in zip(*found, strict=True):
            torch.testing.assert_close(ours, native, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_bad_labels_read_no_class_weight(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objkern.reference, "check_labels", lambda *_: None)
    for classes, label in ((35, 35), (35, -1), (1, -1), (1, 5)):
        weight = torch.ones(classes)
        loss = CrossEntropy(weight)(torch.zeros(2, classes), torch.tensor([0, label]), backend="triton")
        assert loss.isnan()


# ---- elementwise objectives -----------------------------------------------------------------------------------------

ELEMENTWISE = (
    "BinaryCrossEntropy(label_smoothing=0.1) - 0.1*BernoulliEntropy() + 0.5*MeanSquaredError() + "
    "0.25*MeanAbsoluteError() + 2.0*Huber(delta=0.3) + 0.01*LogitL2()"
)


def elements(dtype: torch.dtype, shape: tuple[int, ...] = (3, 7)) -> tuple[torch.Tensor, torch.Tensor]:
    z = 3 * torch.randn(shape, dtype=torch.float64)
    return z.to(dtype), torch.rand(shape, dtype=torch.float64).round(decimals=1).to(dtype)


@pytest.fixture
def few_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "ELEMENTS", 8)


@pytest.mark.usefixtures("few_elements")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_elementwise(reduction: str, dtype: torch.dtype) -> None:
    z, y = elements(dtype)
    objective = objkern.parse(ELEMENTWISE)
    upstream = torch.rand(3, 7) if reduction == "none" else torch.tensor(-0.7)
    assert_same(objective, z, y, upstream, reduction=reduction)
    if reduction != "none":
        assert_same(objective, z, y, upstream, reduction=reduction, gradient="forward")
        assert_same(objective, z, y, reduction=reduction, gradient="forward")
        assert_same(objective, z, y, torch.tensor(2.0), reduction=reduction, gradient="forward")


@pytest.mark.usefixtures("few_elements")
def test_elements_that_begin_anywhere() -> None:
    z, y = elements(torch.float32, (30,))
    w = torch.rand(30)
    objective = objkern.BinaryCrossEntropy(weight=w[3:]) + objkern.MeanSquaredError()
    for reduction in ("none", "sum"):
        upstream = torch.rand(30)[3:] if reduction == "none" else torch.tensor(0.7)
        assert_same(objective, z[3:], y[3:], upstream, reduction=reduction)
        assert_same(objective, z[:27], y[3:], upstream, reduction=reduction)


@pytest.mark.usefixtures("few_elements")
def test_elements_at_their_target_and_without_one() -> None:
    z, y = elements(torch.float64)
    z[0] = y[0]
    assert_same(objkern.MeanAbsoluteError(), z, y)
    assert_same(objkern.BernoulliEntropy() + 0.1 * LogitL2(), z, None, softcap=2.0)
    pair = objkern.BinaryCrossEntropy(weight=torch.rand(2))
    assert_same(pair, *elements(torch.float64, (3, 2)))


@pytest.mark.usefixtures("few_elements")
@pytest.mark.parametrize("text", ELEMENTWISE.replace(" - ", " + ").split(" + ")[:-1])
def test_each_elementwise_term_alone(text: str) -> None:
    z, y = elements(torch.float64)
    assert_same(objkern.parse(text), z, y)


@pytest.mark.usefixtures("few_elements")
def test_elementwise_options() -> None:
    z, y = elements(torch.float32)
    for shape in ((), (7,), (1, 7), (3, 1), (3, 7)):
        term = objkern.BinaryCrossEntropy(weight=torch.rand(shape), pos_weight=torch.rand(shape))
        assert_same(term + 0.1 * objkern.MeanSquaredError(), z, y, logit_scale=torch.tensor(1.7), softcap=2.0)
    whole = objkern.parse(ELEMENTWISE)
    loss, parts = whole(z, y, return_parts=True, backend="triton", normalizer=torch.tensor(5.0))
    exact, exact_parts = whole(z, y, return_parts=True, backend="reference", normalizer=torch.tensor(5.0))
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(parts, exact_parts)
    coefficient, scale = torch.tensor(0.3, requires_grad=True), torch.tensor(1.7, requires_grad=True)
    found = []
    for backend in ("triton", "reference"):
        loss = (objkern.BinaryCrossEntropy() + coefficient * objkern.Huber())(z, y, logit_scale=scale, backend=backend)
        found.append((loss.detach(), *torch.autograd.grad(loss, (coefficient, scale))))
    torch.testing.assert_close(*found)
    nothing = torch.empty(0, 3)
    assert objkern.MeanSquaredError()(nothing, nothing, backend="triton").isnan()
    assert objkern.MeanSquaredError()(nothing, nothing, backend="triton", empty="zero") == 0.0


@beside_native_kernels
@pytest.mark.usefixtures("few_elements")
@pytest.mark.parametrize("limits", [True, False])
def test_elementwise_infinities(limits: bool) -> None:
    z = torch.tensor([INF, -INF, INF, -INF, float("nan"), 3.0, -INF, -INF])
    y = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.9, 0.9])
    for pos_weight in (None, torch.tensor([1.0] * 6 + [0.0, 3.0])):
        options = {"pos_weight": pos_weight, "limits": limits, "with_parts": True}
        found = [
            ops.elementwise([0.0, 0.0, 1.0, 1.0, 0.0, 1.0], 0, z, y, **options)
            for ops in (torch.ops.objkern_triton, torch.ops.objkern)
        ]
        torch.testing.assert_close(*found, equal_nan=True)


# ---- random calls ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_elements")
def test_random_objectives(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 tiny ones, or as many as OBJKERN_CASES says; the kernels for few, some and many classes take turns."""

    @settings(60)
    @hypothesis.given(cases(most_rows=4, most_classes=40, linear=False), st.sampled_from([*KINDS, "pieces"]))
    def each(case: Case, kind: str) -> None:
        # The interpreter cuts digits off where it should round to bfloat16, and has no float16 subnormals to speak of.
        if case.dtype in (torch.bfloat16, torch.float16):
            case.dtype = torch.float32
        choose(kind, monkeypatch)
        check(case, backend="triton")

    each()
