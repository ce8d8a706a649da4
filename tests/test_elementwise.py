"""Elementwise objectives: against eager torch and float64, the drop-ins against PyTorch's own samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import (
    module_inputs_torch_nn_BCEWithLogitsLoss,
    module_inputs_torch_nn_MSELoss,
)

import objkern
from objkern import (
    L2,
    BinaryCrossEntropy,
    CrossEntropy,
    Entropy,
    Huber,
    LogitL2,
    MeanSquaredError,
    Objective,
    ZLoss,
    elementwise,
)

from .conftest import DTYPES, assert_within_budget

# Each term as people write it, from predictions and targets to the value of each element.
EAGER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "BinaryCrossEntropy()": lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="none"),
    "BinaryCrossEntropy(label_smoothing=0.1)": lambda z, y: F.binary_cross_entropy_with_logits(
        z, 0.9 * y + 0.05, reduction="none"
    ),
    "BernoulliEntropy()": lambda z, y: torch.distributions.Bernoulli(logits=z).entropy(),
    "MeanSquaredError()": lambda z, y: F.mse_loss(z, y, reduction="none"),
    "MeanAbsoluteError()": lambda z, y: F.l1_loss(z, y, reduction="none"),
    "Huber()": lambda z, y: F.huber_loss(z, y, reduction="none"),
    "Huber(delta=0.3)": lambda z, y: F.huber_loss(z, y, reduction="none", delta=0.3),
    "LogitL2()": lambda z, y: z.square(),
}
ALONE = [name for name in EAGER if name != "LogitL2()"]  # alone it is a term on rows
ALL = (
    "BinaryCrossEntropy(label_smoothing=0.1) - 0.1*BernoulliEntropy() + 0.5*MeanSquaredError() + "
    "0.25*MeanAbsoluteError() + 2.0*Huber(delta=0.3) + 0.01*LogitL2()"
)
ALL_EAGER = {
    "BinaryCrossEntropy(label_smoothing=0.1)": 1.0, "BernoulliEntropy()": -0.1, "MeanSquaredError()": 0.5,
    "MeanAbsoluteError()": 0.25, "Huber(delta=0.3)": 2.0, "LogitL2()": 0.01,
}  # fmt: skip
ELEMENTS = [0.0, 0.1, 1.0, 2.0, 0.0, 0.5]  # two terms, as the ops take them
SHAPES = [(), (1,), (7,), (31,), (3, 5), (33, 129), (2, 40_000)]
REDUCE = {"mean": Tensor.mean, "sum": Tensor.sum, "none": lambda x: x}


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return z.to(dtype), torch.rand(shape, generator=generator, dtype=torch.float64).round(decimals=1).to(dtype)


def results(loss: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """The loss and its gradients under an upstream gradient that is not 1."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    value = loss(*leaves)
    generator = torch.Generator().manual_seed(7)
    upstream = (torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.5).to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def eager(formula: dict[str, float], reduction: str) -> Callable[..., Tensor]:
    return lambda z, y: REDUCE[reduction](sum(c * EAGER[name](z, y) for name, c in formula.items()))


def objective(text: str) -> Objective:
    return objkern.parse(text)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gradient", ["backward", "forward"])
@pytest.mark.parametrize("name", [*ALONE, ALL])
def test_values_and_gradients(name: str, gradient: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    z, y = inputs(shape, dtype)
    formula = ALL_EAGER if name == ALL else {name: 1.0}
    ours = objective(name)
    for reduction in ("mean", "sum", "none") if gradient == "backward" else ("mean", "sum"):
        before = z.clone()
        found = results(lambda z: ours(z, y, reduction=reduction, gradient=gradient), z)  # noqa: B023
        native = results(lambda z: eager(formula, reduction)(z, y), z)  # noqa: B023
        truth = results(lambda z: eager(formula, reduction)(z, y.double()), z.double())  # noqa: B023
        assert torch.equal(z, before)
        assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert found[0].shape == truth[0].shape
        assert found[1].dtype == dtype
        for got, theirs, exact in zip(found, native, truth, strict=True):
            assert_within_budget(got, theirs, exact, dtype, f"{name} {reduction}")


@pytest.mark.parametrize(
    ("first", "second"), [pair for pair in itertools.product(EAGER, EAGER) if set(pair) != {"LogitL2()"}]
)
def test_terms_in_any_order(first: str, second: str) -> None:
    """What one of them reads is there, whichever stands before it."""
    z, y = inputs((3, 41), torch.float64)
    found = results(lambda z: objective(f"{first} + 0.3*{second}")(z, y, reduction="none"), z)
    native = results(lambda z: EAGER[first](z, y) + 0.3 * EAGER[second](z, y), z)
    torch.testing.assert_close(found, native)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_closed_form_of_the_binary_gradient(dtype: torch.dtype) -> None:
    """(σ(z) − y)/N, to the last digits also where σ(z) rounds to y."""
    z = torch.tensor([-100.0, -80.0, -20.0, -1.0, 0.0, 1.0, 20.0, 40.0, 80.0], dtype=dtype).repeat(2)
    y = torch.cat([torch.zeros(9), torch.ones(9)]).to(dtype)
    found = results(lambda z: BinaryCrossEntropy()(z, y, reduction="sum"), z)
    upstream = float(torch.rand((), generator=torch.Generator().manual_seed(7), dtype=torch.float64)) + 0.5
    x = z.double()
    exact = torch.where(y.double() == 1.0, -torch.sigmoid(-x), torch.sigmoid(x)) * upstream
    torch.testing.assert_close(found[1].double(), exact, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=1e-37)
    mean = BinaryCrossEntropy()(z.requires_grad_(), y)
    (gradient,) = torch.autograd.grad(mean, z)
    torch.testing.assert_close(gradient, (torch.sigmoid(z) - y) / 18)


@pytest.mark.parametrize("name", ["MeanSquaredError()", "MeanAbsoluteError()", "Huber()"])
def test_a_prediction_that_is_right_has_no_gradient(name: str) -> None:
    value, gradient = results(lambda z: objective(name)(z, torch.arange(40.0), reduction="none"), torch.arange(40.0))
    assert not value.any()
    assert not gradient.any()


def test_parts_are_there_where_they_are_asked_for() -> None:
    z, y = inputs((3, 5), torch.float32)
    for asked in (False, True):
        assert torch.ops.objkern.elementwise(ELEMENTS, 0, z, y, with_parts=asked)[1].shape == (2 * asked, 3, 5)
        assert torch.ops.objkern.elementwise(ELEMENTS, 1, z, y, with_parts=asked)[1].shape == (2 * asked,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (1,), (1, 5), (7, 1), (7, 5), ()], ids=str)
@pytest.mark.parametrize("which", ["weight", "pos_weight"])
def test_weights_that_broadcast(which: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    z, y = inputs((7, 5), dtype)
    w = torch.rand(shape, dtype=torch.float64).to(dtype)
    term = BinaryCrossEntropy(**{which: w})
    found = results(lambda z: term(z, y), z)
    native = results(lambda z: F.binary_cross_entropy_with_logits(z, y, **{which: w}), z)
    truth = results(lambda z: F.binary_cross_entropy_with_logits(z, y.double(), **{which: w.double()}), z.double())
    for got, theirs, exact in zip(found, native, truth, strict=True):
        assert_within_budget(got, theirs, exact, dtype)


def test_weights_move_and_are_saved() -> None:
    term = BinaryCrossEntropy(weight=torch.rand(5), pos_weight=torch.rand(5))
    assert set(term.state_dict()) == {"weight", "pos_weight"}
    assert term.double().weight.dtype == torch.float64
    assert repr(term) == "BinaryCrossEntropy(weight=<tensor of 5>, pos_weight=<tensor of 5>)"
    with pytest.raises(ValueError, match="cannot be parsed"):
        objkern.parse(repr(term))
    with pytest.raises(ValueError, match="share weight and pos_weight"):
        (term + BinaryCrossEntropy())(torch.zeros(5), torch.zeros(5))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_parts(reduction: str, backend: str) -> None:
    z, y = inputs((6, 9), torch.float32)
    loss, parts = objective(ALL)(z, y, reduction=reduction, return_parts=True, backend=backend)
    names = ["binary_cross_entropy", "bernoulli_entropy", "mean_squared_error", "mean_absolute_error", "huber",
             "logit_l2"]  # fmt: skip
    assert list(parts) == [*names, "total"]
    torch.testing.assert_close(parts["total"], loss)
    for name, text in zip(names, ALL_EAGER, strict=True):
        torch.testing.assert_close(parts[name], eager({text: 1.0}, reduction)(z, y))


def test_scale_cap_and_learned_numbers() -> None:
    z, y = inputs((6, 9), torch.float64)
    scale, coefficient = torch.tensor(1.7, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)

    def fused(z: Tensor, s: Tensor, c: Tensor, backend: str = "auto") -> Tensor:
        whole = BinaryCrossEntropy() + c * MeanSquaredError()
        return whole(z, y, logit_scale=s, softcap=4.0, backend=backend)

    def plain(z: Tensor, s: Tensor, c: Tensor) -> Tensor:
        x = 4.0 * torch.tanh(s * z / 4.0)
        return F.binary_cross_entropy_with_logits(x, y) + c * F.mse_loss(x, y)

    expected = results(plain, z, scale, coefficient)
    torch.testing.assert_close(results(fused, z, scale, coefficient), expected)
    torch.testing.assert_close(results(lambda *x: fused(*x, backend="reference"), z, scale, coefficient), expected)


def test_a_schedule_without_a_new_objective() -> None:
    z, y = inputs((6, 9), torch.float32)
    coefficient = torch.tensor(0.0)
    whole = MeanSquaredError() + coefficient * LogitL2()
    torch.testing.assert_close(whole(z, y), F.mse_loss(z, y))
    coefficient.fill_(2.0)
    torch.testing.assert_close(whole(z, y), F.mse_loss(z, y) + 2.0 * z.square().mean())


@pytest.mark.parametrize("normalizer", [11, torch.tensor(11.0)], ids=str)
def test_normalizer(normalizer: Any) -> None:
    z, y = inputs((6, 9), torch.float32)
    torch.testing.assert_close(MeanSquaredError()(z, y, normalizer=normalizer), F.mse_loss(z, y, reduction="sum") / 11)


def test_nothing() -> None:
    z = torch.empty(0, 3, requires_grad=True)
    for backend in ("cpu", "reference"):
        assert MeanSquaredError()(z, z.detach(), backend=backend).isnan()
        zero = MeanSquaredError()(z, z.detach(), empty="zero", backend=backend)
        assert zero == 0.0
        zero.backward()


def test_gradient_to_the_target() -> None:
    z, y = inputs((6, 9), torch.float64)
    for reduction in ("mean", "none"):
        found = results(lambda z, y: objective(ALL)(z, y, reduction=reduction), z, y)  # noqa: B023
        torch.testing.assert_close(found, results(eager(ALL_EAGER, reduction), z, y))


def test_any_strides() -> None:
    z, y = inputs((8, 6, 10), torch.float32)
    views = [
        lambda x: x.transpose(0, 2),
        lambda x: x[::2, :, 1::3],
        lambda x: x.flip(1),
        lambda x: x[:1].expand(5, 6, 10),
    ]
    for view in views:
        found = results(lambda z: objective(ALL)(view(z), view(y)), z)  # noqa: B023
        torch.testing.assert_close(found, results(lambda z: eager(ALL_EAGER, "mean")(view(z), view(y)), z))  # noqa: B023


@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_target_of_another_dtype(dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    z, y = inputs((6, 9), dtype)
    y = y.to(target_dtype)
    found = results(lambda z: MeanSquaredError()(z, y), z)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = results(lambda z: F.mse_loss(z.to(wide), y.to(wide)), z)
    torch.testing.assert_close(found, expected)


def test_the_same_bits_for_any_number_of_threads() -> None:
    z, y = inputs((300, 1001), torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(lambda z: objective(ALL)(z, y), z))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    "text", ["BinaryCrossEntropy()", "BernoulliEntropy()", "BinaryCrossEntropy(label_smoothing=0.5)"]
)
def test_limits(text: str) -> None:
    """An infinite prediction has the limit as its value; the reference has the same."""
    z = torch.tensor([torch.inf, -torch.inf, torch.inf, -torch.inf, 3.0])
    y = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5])
    values = objective(text)(z, y, reduction="none")
    torch.testing.assert_close(objective(text)(z, y, reduction="none", backend="reference"), values)
    far = objective(text)(z.clamp(-3e38, 3e38), y, reduction="none")
    assert torch.equal(values.isinf() | (values > 1e37), far.isinf() | (far > 1e37))
    near = far < 1e37
    torch.testing.assert_close(values[near], far[near])


@pytest.mark.parametrize("text", [*ALONE, ALL])
def test_second_derivatives(text: str) -> None:
    z, y = inputs((3, 4), torch.float64)
    z, y = (z + 0.03).requires_grad_(), y.requires_grad_()
    whole = objective(text)
    for reduction in ("mean", "none"):
        assert torch.autograd.gradgradcheck(lambda z, y: whole(z, y, reduction=reduction), (z, y))  # noqa: B023


def test_opcheck() -> None:
    z, y = inputs((5, 6), torch.float32)
    z.requires_grad_()
    terms = [0.0, 0.1, 1.0, 2.0, 0.0, 0.5]
    options = {"weight": torch.rand(6), "softcap": 3.0, "with_parts": True}
    for reduction in (0, 1):
        torch.library.opcheck(torch.ops.objkern.elementwise.default, (terms, reduction, z, y), options)
    torch.library.opcheck(torch.ops.objkern.elementwise_fused.default, (terms, 1, z, y), options)
    upstream = torch.rand((), requires_grad=True)
    torch.library.opcheck(torch.ops.objkern.elementwise_gradient.default, (upstream, False, terms, 1, z, y), options)


def test_compiled() -> None:
    z, y = inputs((5, 6), torch.float32)
    whole = objective(ALL)
    for options in ({}, {"reduction": "none"}, {"gradient": "forward"}):
        compiled = torch.compile(lambda z: whole(z, y, **options), fullgraph=True)  # noqa: B023
        torch.testing.assert_close(results(compiled, z), results(lambda z: whole(z, y, **options), z))  # noqa: B023


def test_torch_func() -> None:
    z, y = inputs((5, 6), torch.float64)
    loss = lambda z, y: objective(ALL)(z, y)  # noqa: E731
    plain = eager(ALL_EAGER, "mean")
    torch.testing.assert_close(torch.func.grad(loss)(z, y), torch.func.grad(plain)(z, y))
    torch.testing.assert_close(torch.func.vmap(loss)(z, y), torch.func.vmap(plain)(z, y))
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(loss))(z, y), torch.func.vmap(torch.func.grad(plain))(z, y)
    )


def test_autocast_and_float16_under_loss_scaling() -> None:
    z, y = inputs((50, 60), torch.float16)
    for gradient in ("backward", "forward"):
        leaf = z.clone().requires_grad_()
        (2.0**14 * BinaryCrossEntropy()(leaf, y, gradient=gradient)).backward()
        exact = (torch.sigmoid(z.double()) - y.double()) / 3000 * 2.0**14
        torch.testing.assert_close(leaf.grad.double(), exact, rtol=1e-3, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert BinaryCrossEntropy()(z.float(), y.float()).dtype == torch.float32


# ---- mixed with others ----------------------------------------------------------------------------------------------


def test_with_terms_on_rows_and_on_parameters() -> None:
    z, y = inputs((6, 9), torch.float32)
    parameter = torch.rand(4, requires_grad=True)
    whole = BinaryCrossEntropy() + 0.1 * ZLoss() + 0.5 * L2([parameter]) - 0.2 * Entropy() + 0.3 * LogitL2()
    loss, parts = whole(z, y, return_parts=True)
    expected = {
        "binary_cross_entropy": F.binary_cross_entropy_with_logits(z, y), "z_loss": z.logsumexp(-1).square().mean(),
        "l2": 0.5 * parameter.detach().square().sum(),
        "entropy": torch.distributions.Categorical(logits=z).entropy().mean(), "logit_l2": z.square().mean(),
    }  # fmt: skip
    assert list(parts) == [*expected, "total"]
    torch.testing.assert_close({name: parts[name] for name in expected}, expected)
    torch.testing.assert_close(
        loss.detach(), sum(c * v for c, v in zip((1.0, 0.1, 0.5, -0.2, 0.3), expected.values(), strict=True))
    )


@pytest.mark.parametrize(("arguments", "options", "error", "message"), [
    ((torch.zeros(3), torch.zeros(3, dtype=torch.int64)), {}, TypeError, "target: expected floating-point values"),
    ((torch.zeros(3), torch.zeros(4)), {}, ValueError, r"target: expected the prediction's shape \(3,\)"),
    ((torch.zeros(3), None), {}, ValueError, "target: .* needs one"),
    ((torch.zeros(3, dtype=torch.int64), torch.zeros(3)), {}, TypeError, "prediction: expected float32"),
    (([1.0], torch.zeros(3)), {}, TypeError, "prediction: expected a tensor"),
    ((torch.zeros(3), torch.zeros(3).to_sparse()), {}, TypeError, "target: expected a dense tensor"),
    ((torch.zeros(3), torch.zeros(3, device="meta")), {}, ValueError, "target: expected a tensor on cpu"),
    ((torch.zeros(3), torch.zeros(3)), {"ignore_index": 7}, ValueError, "ignore_index: has no meaning"),
    ((torch.zeros(3), torch.zeros(3)), {"shift": 1}, ValueError, "shift: has no meaning"),
    ((torch.zeros(3), torch.zeros(3)), {"rows": {"a": torch.zeros(3)}}, ValueError, "rows: has no meaning"),
    ((torch.zeros(3), torch.zeros(3)), {"reduction": "median"}, ValueError, "reduction: expected"),
    ((torch.zeros(3), torch.zeros(3)), {"softcap": -1.0}, ValueError, "softcap: expected"),
    ((torch.zeros(3), torch.zeros(3)), {"reduction": "sum", "normalizer": 3}, ValueError, "normalizer: replaces"),
    ((torch.zeros(3), torch.zeros(3)), {"gradient": "forward", "reduction": "none"}, ValueError, "scalar reduction"),
    ((torch.zeros(3), torch.zeros(3)), {"gradient": "sideways"}, ValueError, "gradient: expected"),
    ((torch.zeros(3), torch.zeros(3)), {"backend": "cuda"}, ValueError, "cannot run on cpu"),
    ((torch.zeros(3), torch.zeros(3)), {"logit_scale": torch.tensor(1.0, device="meta")}, ValueError, "logit_scale"),
], ids=str)  # fmt: skip
def test_errors(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MeanSquaredError()(*arguments, **options)


def test_errors_of_terms() -> None:
    z, y = torch.zeros(2, 3), torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match=r"MeanSquaredError\(\) compares element by element and CrossEntropy\(\) reads"
    ):
        (MeanSquaredError() + CrossEntropy())(z, y)
    with pytest.raises(ValueError, match="one for each row"):
        (MeanSquaredError() + ZLoss())(z, y, reduction="none")
    with pytest.raises(NotImplementedError, match="element by element are not fused"):
        MeanSquaredError().linear(z, torch.zeros(4, 3), torch.zeros(2, 4))
    for bad in (0.0, -1.0, math.nan, "1"):
        with pytest.raises((ValueError, TypeError), match="delta: expected"):
            Huber(bad)
    with pytest.raises(ValueError, match="weight: expected a shape that broadcasts"):
        BinaryCrossEntropy(weight=torch.rand(4))(z, y)
    with pytest.raises(TypeError, match="pos_weight: expected a floating-point tensor"):
        BinaryCrossEntropy(pos_weight=2.0)
    assert objkern.parse(repr(objective(ALL))).__repr__() == ALL


# ---- the drop-ins ---------------------------------------------------------------------------------------------------

DROP_INS = {"nn.functional.mse_loss": objkern.mse_loss,
            "nn.functional.binary_cross_entropy_with_logits": objkern.binary_cross_entropy_with_logits}  # fmt: skip
NATIVE = {
    "nn.functional.mse_loss": F.mse_loss,
    "nn.functional.binary_cross_entropy_with_logits": F.binary_cross_entropy_with_logits,
}


def assert_same(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Value, dtype, shape and the gradients of all tensors that are differentiable in torch."""
    found = []
    for function in (DROP_INS[name], NATIVE[name]):
        leaves = [x.detach().clone().requires_grad_() for x in arguments]
        loss = function(*leaves, **options)
        upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(7)).to(loss.dtype)
        loss.backward(upstream)
        found.append([loss.detach(), *(x.grad for x in leaves)])
    if all(x.dtype not in (torch.bfloat16, torch.float16) for x in arguments):
        torch.testing.assert_close(*found, equal_nan=True)
        return
    doubles = [x.detach().double().requires_grad_() for x in arguments]
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    truth = NATIVE[name](*doubles, **wide)
    truth.backward(upstream.double())
    for ours, theirs, exact in zip(*found, (truth, *(x.grad for x in doubles)), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert_within_budget(ours, theirs, exact, ours.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", DROP_INS)
def test_opinfo_samples(name: str, dtype: torch.dtype) -> None:
    info = next(op for op in op_db if op.name == name)
    samples = list(info.sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) >= 6
    for sample in samples:
        assert_same(name, (sample.input, *sample.args), sample.kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "inputs_of"), [
    ("nn.functional.mse_loss", module_inputs_torch_nn_MSELoss),
    ("nn.functional.binary_cross_entropy_with_logits", module_inputs_torch_nn_BCEWithLogitsLoss),
])  # fmt: skip
def test_module_inputs(name: str, inputs_of: Callable[..., list[Any]], dtype: torch.dtype) -> None:
    samples = inputs_of(None, "cpu", dtype, requires_grad=True, training=True)
    assert len(samples) >= 4
    for sample in samples:
        assert_same(name, sample.forward_input.args, sample.constructor_input.kwargs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shapes", list(itertools.product([(), (5,), (4, 1), (4, 5)], repeat=2)), ids=str)
def test_binary_weights_that_broadcast_with_the_input(shapes: tuple[tuple[int, ...], ...], reduction: str) -> None:
    """They have gradients, which torch refuses."""
    z, y = inputs((4, 5), torch.float64)
    weight, pos_weight = (torch.rand(shape, dtype=torch.float64) for shape in shapes)

    def fused(z: Tensor, y: Tensor, w: Tensor, p: Tensor) -> Tensor:
        return objkern.binary_cross_entropy_with_logits(z, y, w, pos_weight=p, reduction=reduction)

    def plain(z: Tensor, y: Tensor, w: Tensor, p: Tensor) -> Tensor:
        return REDUCE[reduction](-w * (p * y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)))

    torch.testing.assert_close(
        fused(z, y, weight, pos_weight),
        F.binary_cross_entropy_with_logits(z, y, weight, pos_weight=pos_weight, reduction=reduction),
    )
    torch.testing.assert_close(results(fused, z, y, weight, pos_weight), results(plain, z, y, weight, pos_weight))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weighted_mean_squares(reduction: str) -> None:
    z, y = inputs((4, 5), torch.float64)
    weight = torch.rand(4, 5, dtype=torch.float64)
    found = results(lambda z, y, w: objkern.mse_loss(z, y, reduction=reduction, weight=w), z, y, weight)
    torch.testing.assert_close(
        found, results(lambda z, y, w: F.mse_loss(z, y, reduction=reduction, weight=w), z, y, weight)
    )
    torch.testing.assert_close(
        objkern.mse_loss(z, y, reduction=reduction, weight=weight), F.mse_loss(z, y, reduction=reduction, weight=weight)
    )


@pytest.mark.parametrize("z", [torch.inf, -torch.inf, torch.nan, 0.0, 3e38])
@pytest.mark.parametrize("y", [0.0, 1.0, 0.5, torch.nan])
@pytest.mark.parametrize("pos_weight", [None, 0.0, 2.0])
def test_the_numbers_of_torch_where_they_are_infinite(z: float, y: float, pos_weight: float | None) -> None:
    prediction, target = torch.tensor([z, 1.0]), torch.tensor([y, 1.0])
    options = {"reduction": "none", "pos_weight": None if pos_weight is None else torch.tensor(pos_weight)}
    torch.testing.assert_close(
        objkern.binary_cross_entropy_with_logits(prediction, target, **options),
        F.binary_cross_entropy_with_logits(prediction, target, **options), equal_nan=True,
    )  # fmt: skip
    e = elementwise.checked(
        prediction, target, (None, options["pos_weight"]), reduction="none", normalizer=None, logit_scale=1.0,
        softcap=None, empty="nan", limits=False,
    )  # fmt: skip
    torch.testing.assert_close(
        elementwise.reference(e, [(1.0, objkern.BinaryCrossEntropy())])[0],
        F.binary_cross_entropy_with_logits(prediction, target, **options), equal_nan=True,
    )  # fmt: skip
    torch.testing.assert_close(objkern.mse_loss(prediction, target), F.mse_loss(prediction, target), equal_nan=True)


def test_regularized_drop_in() -> None:
    z, y = inputs((4, 5), torch.float32)
    found = objkern.binary_cross_entropy_with_logits(z, y, label_smoothing=0.1, entropy=-0.2, logit_l2=0.3)
    expected = F.binary_cross_entropy_with_logits(z, 0.9 * y + 0.05) + 0.3 * z.square().mean()
    expected = expected - 0.2 * torch.distributions.Bernoulli(logits=z).entropy().mean()
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", DROP_INS)
@pytest.mark.parametrize(("arguments", "options"), [
    ((torch.zeros(3), torch.zeros(3)), {"reduction": "median"}),
    ((torch.zeros(3).int(), torch.zeros(3).int()), {}),
    ((torch.zeros(3), torch.zeros(4)), {}),
    ((torch.zeros(3), torch.zeros(3)), {"weight": torch.zeros(5)}),
    ((torch.zeros(3), torch.zeros(3)), {"weight": torch.zeros(2, 3)}),
], ids=str)  # fmt: skip
def test_drop_ins_raise_as_torch(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"\w") as theirs:
        NATIVE[name](*arguments, **options)
    with pytest.raises(theirs.type):
        DROP_INS[name](*arguments, **options)


def test_warnings_of_the_drop_ins() -> None:
    with pytest.warns(UserWarning, match="different to the input size"):
        torch.testing.assert_close(objkern.mse_loss(torch.ones(2, 3), torch.zeros(3)), torch.tensor(1.0))
    with pytest.warns(UserWarning, match="size_average and reduce"):
        objkern.mse_loss(torch.zeros(3), torch.zeros(3), size_average=False)
