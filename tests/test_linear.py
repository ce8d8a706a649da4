"""The fused linear path: the same values and gradients as the logits path, whatever the mode and the chunks."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

import objkern
from objkern import CrossEntropy, Entropy, LogitL2, MaxZLoss, ZLoss
from objkern.linear import choose_chunk_rows, chunk_bytes, tile_of

from .conftest import DTYPES, EVERY_TERM, NATIVE, assert_within_budget

N, D, V = 252, 123, 507
REGULARIZED = CrossEntropy(label_smoothing=0.1) + 1e-2 * ZLoss() - 0.1 * Entropy() + 1e-2 * LogitL2()
MODES = ["forward", "recompute"]


@pytest.fixture(autouse=True)
def _tiles_of_few_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objkern.linear, "_LEAST_CLASSES", 64)
    monkeypatch.setattr(objkern.linear, "_CLASSES_STEP", 16)


Loss = Callable[..., Tensor]


def inputs(dtype: torch.dtype, rows: int = N, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and labels, the same for every dtype up to rounding; one row in seven is ignored."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, weight, bias = make(rows, D), 3 * make(V, D) / D**0.5, make(V)
    labels = torch.randint(V, (rows,), generator=generator)
    labels[::7] = -100
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels


def upstream_for(loss: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (torch.rand(loss.shape, generator=generator, dtype=torch.float64) + 0.5).to(loss.dtype)


def results(loss: Loss, *tensors: Tensor) -> list[Tensor]:
    """The loss and its gradients under an upstream gradient that is not 1."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream_for(value))]


# Relative, in the Euclidean norm: one rounding to the dtype, and what float32 sums of so many rows lose.
ONE_ROUNDING = {torch.float64: 5e-15, torch.float32: 2e-6, torch.float16: 3.5e-4, torch.bfloat16: 2.5e-3}


def assert_as_logits(objective: objkern.Objective, dtype: torch.dtype, options: dict[str, Any],
                     linear_options: dict[str, Any], target: Tensor | None = None) -> None:  # fmt: skip
    """Within the error budget of the logits path, and whatever that allows, no farther than one rounding of exact."""
    hidden, weight, bias, labels = inputs(dtype)
    labels = labels.masked_fill(labels == -100, options.get("ignore_index", -100)) if target is None else target
    ours = results(lambda h, w, b: objective.linear(h, w, labels, b, **options, **linear_options), hidden, weight, bias)
    eager = results(lambda h, w, b: objective(F.linear(h, w, b), labels, **options), hidden, weight, bias)
    exact = results(
        lambda h, w, b: copy.deepcopy(objective).double()(F.linear(h, w, b), labels, backend="reference", **options),
        hidden.double(), weight.double(), bias.double(),
    )  # fmt: skip
    for name, one, other, truth in zip(("loss", "hidden", "weight", "bias"), ours, eager, exact, strict=True):
        assert_within_budget(one, other, truth, dtype, name)
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2  # what tiny numbers are rounded by
        far, allowed = (one.double() - truth).norm(), ONE_ROUNDING[dtype] * truth.norm() + least * truth.numel() ** 0.5
        assert far <= allowed, f"{name}: an error of {far:.1e} exceeds one rounding, {allowed:.1e}"


def modes_and_reductions() -> list[tuple[str, str]]:
    return [(m, r) for m, r in itertools.product(MODES, ("mean", "sum", "none")) if (m, r) != ("forward", "none")]


# ---- values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "reduction"), modes_and_reductions())
@pytest.mark.parametrize("term", [*NATIVE, EVERY_TERM], ids=lambda text: text if len(text) < 40 else "every term")
def test_every_term(term: str, mode: str, reduction: str, dtype: torch.dtype) -> None:
    assert_as_logits(objkern.parse(term), dtype, {"reduction": reduction}, {"mode": mode, "chunk_rows": 100})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 251, 252, 10_000])
def test_any_chunk(chunk_rows: int, mode: str, dtype: torch.dtype) -> None:
    """8: half-precision sums of the weight's gradient get worse with every chunk."""
    assert_as_logits(REGULARIZED, dtype, {}, {"mode": mode, "chunk_rows": chunk_rows})


class HalfSums(objkern.linear._Head):
    """Sums the weight's gradient in bfloat16."""

    def accumulate(self, g: Tensor, h: Tensor, needs: Any) -> Tensor | None:
        found = super().accumulate(g, h, needs)
        self.weight_sum.copy_(self.weight_sum.bfloat16())
        return found


def denominators_of_a_chunk(rows: Any, count: int, *others: Any) -> Any:
    """Counts the rows of the first chunk alone."""
    few = rows._replace(target=rows.target[:100])
    return DENOMINATORS(few, min(count, 100), *others)


DENOMINATORS = objkern.linear._denominators
FAULTS = {
    "_Head": HalfSums,
    "_denominators": denominators_of_a_chunk,
    "_scaled": lambda g, upstream, dtype: g.to(dtype),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error budget is tight enough to see it."""
    options = {"mode": "forward", "chunk_rows": 20}
    assert_as_logits(REGULARIZED, torch.bfloat16, {}, options)
    monkeypatch.setattr(objkern.linear, name, FAULTS[name])
    with pytest.raises(AssertionError, match="exceeds"):
        assert_as_logits(REGULARIZED, torch.bfloat16, {}, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [
    {"softcap": 5.0},
    {"logit_scale": 0.7},
    {"logit_scale": torch.tensor(-1.3), "softcap": 20.0},
    {"ignore_index": 3},
    {"normalizer": 17.0},
    {"normalizer": torch.tensor(3.5)},
    {"empty": "zero"},
], ids=str)  # fmt: skip
def test_options(options: dict[str, Any], mode: str, dtype: torch.dtype) -> None:
    assert_as_logits(REGULARIZED, dtype, options, {"mode": mode, "chunk_rows": 90})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk_rows", [50, 100])  # tiles of the backward pass have all classes, or some
def test_class_weights(chunk_rows: int, mode: str, reduction: str) -> None:
    """The weights' sum is that of the whole batch, not of a chunk."""
    objective = CrossEntropy(weight=torch.rand(V) + 0.1, label_smoothing=0.1) + 1e-2 * ZLoss()
    assert_as_logits(objective, torch.float32, {"reduction": reduction}, {"mode": mode, "chunk_rows": chunk_rows})


@pytest.mark.parametrize("mode", MODES)
def test_probability_targets(mode: str) -> None:
    target = torch.randn(N, V).softmax(-1)
    objective = CrossEntropy(label_smoothing=0.1) + 1e-2 * ZLoss()
    for chunk_rows in (50, 100):  # tiles of the backward pass have all classes, or some
        assert_as_logits(objective, torch.float32, {}, {"mode": mode, "chunk_rows": chunk_rows}, target)

    hidden, weight, _, _ = inputs(torch.float32)
    ours, theirs = (
        results(loss, hidden, weight, target)
        for loss in (lambda h, w, q: objective.linear(h, w, q, mode=mode), lambda h, w, q: objective(F.linear(h, w), q))
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mode", MODES)
def test_coefficients_that_learn(mode: str) -> None:
    hidden, weight, bias, labels = inputs(torch.float32)
    a, b = torch.tensor(0.7), torch.tensor(0.2)

    def loss(linear: bool) -> Loss:
        def run(h: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
            objective = a * CrossEntropy() - 0.5 * b * Entropy()
            if linear:
                return objective.linear(h, w, labels, bias, mode=mode, chunk_rows=60)
            return objective(F.linear(h, w, bias), labels)

        return run

    torch.testing.assert_close(results(loss(True), hidden, weight, a, b), results(loss(False), hidden, weight, a, b))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_logit_scale_that_learns(reduction: str) -> None:
    hidden, weight, bias, labels = inputs(torch.float32)

    def loss(linear: bool) -> Loss:
        def run(h: Tensor, w: Tensor, s: Tensor) -> Tensor:
            options = {"logit_scale": s, "softcap": 8.0, "reduction": reduction}
            if linear:
                return REGULARIZED.linear(h, w, labels, bias, chunk_rows=60, **options)
            return REGULARIZED(F.linear(h, w, bias), labels, **options)

        return run

    scale = torch.tensor(0.6)
    torch.testing.assert_close(results(loss(True), hidden, weight, scale), results(loss(False), hidden, weight, scale),
                               rtol=1e-4, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_custom_terms(reduction: str) -> None:
    def surprise(s: objkern.Statistics, advantage: Tensor) -> Tensor:
        return advantage * s.logprob.exp() + 0.1 * s.max_logit

    objective = CrossEntropy() + 0.3 * objkern.custom(surprise, needs=("logprob", "max_logit"))
    rows = {"advantage": torch.randn(N, dtype=torch.float64).float()}
    hidden, weight, bias, labels = inputs(torch.float32)
    ours, theirs = (
        results(loss, hidden, weight, bias)
        for loss in (
            lambda h, w, b: objective.linear(h, w, labels, b, rows=rows, reduction=reduction, chunk_rows=70),
            lambda h, w, b: objective(F.linear(h, w, b), labels, rows=rows, reduction=reduction),
        )
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_statistics(dtype: torch.dtype) -> None:
    """A policy loss on top: every statistic is differentiable, with an upstream gradient of each row's own."""
    hidden, weight, bias, labels = inputs(dtype)
    factors = torch.randn(12, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    beside = torch.randn(N, V, generator=torch.Generator().manual_seed(4))

    def loss(statistics: Callable[..., objkern.Statistics]) -> Loss:
        def run(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
            found = statistics(h, w, b)
            return sum((f.to(x) * x).sum() for f, x in zip(factors, found, strict=True))

        return run

    ours = results(loss(lambda h, w, b: objkern.linear_row_statistics(h, w, labels, bias=b, chunk_rows=80,
                                                                      reference=beside)),
                   hidden, weight, bias)  # fmt: skip

    def direct(h: Tensor, w: Tensor, b: Tensor, **more: Any) -> objkern.Statistics:
        return objkern.row_statistics(F.linear(h, w, b), labels, reference=beside, **more)

    eager = results(loss(direct), hidden, weight, bias)
    exact = results(loss(functools.partial(direct, backend="reference")),
                    hidden.double(), weight.double(), bias.double())  # fmt: skip
    for one, other, truth in zip(ours, eager, exact, strict=True):
        assert_within_budget(one, other, truth, dtype)


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_scale_of_row_statistics_learns(create_graph: bool) -> None:
    """It has its gradient beside frozen tensors, by the op's own derivative and by that which has one itself."""
    hidden, weight, bias, labels = inputs(torch.float64)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def gradient(statistics: objkern.Statistics) -> Tensor:
        loss = statistics.lse.square().sum() - statistics.logprob.sum()
        return torch.autograd.grad(loss, scale, create_graph=create_graph)[0]

    z = F.linear(hidden, weight, bias) * scale
    own = objkern.linear_row_statistics(hidden, weight, labels, bias=bias, chunk_rows=80, logit_scale=scale)
    exact = gradient(objkern.row_statistics(z, labels, backend="reference"))
    torch.testing.assert_close(gradient(own), exact, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("scale", [None, 0.7, -1.3])
@pytest.mark.parametrize("chunk_rows", [40, 64, 1000])
def test_the_maximum_keeps_its_place(chunk_rows: int, scale: float | None) -> None:
    """Of equal maxima the first, whatever tile it lies in, and the target if that is it. Logits that are computed anew
    may be the last digit off, and the place is one of those that are equal to the maximum.
    """
    hidden, weight, bias, labels = inputs(torch.float32)
    weight[300], bias[300] = weight[200], bias[200]  # twice the same class
    hidden[:60] = weight[200] * 5 * (-1 if scale == -1.3 else 1)  # which is the largest of these rows
    labels[1:20:7], labels[2:20:7] = 200, 300
    options = {"logit_scale": scale} if scale is not None else {}
    loss = lambda z, **o: 0.1 * MaxZLoss()(z, labels, reduction="none", **options, **o)  # noqa: E731
    exact = results(
        lambda h, w, b: loss(F.linear(h, w, b), backend="reference"), *(x.double() for x in (hidden, weight, bias))
    )
    objective = 0.1 * MaxZLoss()
    of_terms = results(lambda h, w, b: objective.linear(h, w, labels, b, reduction="none", chunk_rows=chunk_rows, **options),
                       hidden, weight, bias)  # fmt: skip
    of_statistics = results(
        lambda h, w, b: 0.1 * objkern.linear_row_statistics(h, w, labels, bias=b, chunk_rows=chunk_rows, **options)
        .max_logit.square().masked_fill(labels == -100, 0.0), hidden, weight, bias,
    )  # fmt: skip
    for found in (of_terms, of_statistics):
        torch.testing.assert_close([x.double() for x in found], exact, rtol=1e-5, atol=1e-5)


def test_the_first_maximum() -> None:
    for rows, classes in ((3, 1), (4, 127), (5, 128), (6, 300), (2, 1000)):
        z = torch.randint(4, (rows, classes)).float()
        z[0] = -torch.inf
        assert torch.equal(objkern.linear._first_maximum(z).squeeze(1), z.argmax(1))


# ---- half precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_half_precision_weight_of_many_classes(mode: str) -> None:
    """It is widened in panels of some thousands of classes."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 7, generator=generator).bfloat16() for n in (5, 9001))
    labels = torch.tensor([0, 4095, 4096, 8192, 9000])
    found = results(lambda h, w: REGULARIZED.linear(h, w, labels, mode=mode), hidden, weight)
    exact = results(lambda h, w: REGULARIZED(F.linear(h, w), labels), hidden.double(), weight.double())
    for ours, truth in zip(found, exact, strict=True):
        assert (ours.double() - truth).norm() <= ONE_ROUNDING[torch.bfloat16] * truth.norm()


@pytest.fixture
def half_precision_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels round the gradient of float32 logits, as on a GPU."""

    def rounding(op: Any) -> SimpleNamespace:
        def into(*arguments: Any, gradient: Tensor, **options: Any) -> Any:
            wide = gradient.new_empty(gradient.shape, dtype=torch.float32)
            found = op.into(*arguments, **options, gradient=wide)
            gradient.copy_(wide)
            return found

        return SimpleNamespace(into=into, default=op.default)

    names = ("fused", "gradient", "objective", "statistics", "statistics_gradient")
    kernels = SimpleNamespace(**{name: rounding(getattr(torch.ops.objkern, name)) for name in names})
    monkeypatch.setattr(objkern.linear, "_family", lambda name: kernels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", [*MODES, "none", "statistics", "scale"])
@pytest.mark.parametrize("least_classes", [12, V])  # tiles of all rows and some classes, or of all classes
@pytest.mark.usefixtures("half_precision_gemms", "half_precision_gradients", "small_tiles")
def test_gemms_of_half_precision_numbers(
    least_classes: int, mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: logits in float32, their gradient in half precision, where float16 does not lose small ones."""
    monkeypatch.setattr(objkern.linear, "_LEAST_CLASSES", least_classes)
    hidden, weight, bias, labels = inputs(dtype, rows=40)
    options = {"reduction": "none"} if mode in ("none", "statistics") else {}
    chosen = {"mode": mode} if mode in MODES else {}
    more = [torch.tensor(0.7, dtype=torch.float64)] if mode == "scale" else []
    objective = torch.tensor(2.0**-40) * LogitL2() + REGULARIZED + 1e-2 * MaxZLoss()

    def run(linear: bool, size: float, *tensors: Tensor) -> list[Tensor]:
        """Loss and gradients of size · objective, over `size`."""

        def loss(h: Tensor, w: Tensor, b: Tensor, *scale: Tensor) -> Tensor:
            scaled = {"logit_scale": scale[0]} if scale else {}
            if mode == "statistics":
                s = (
                    objkern.linear_row_statistics(h, w, labels, bias=b, chunk_rows=2)
                    if linear else objkern.row_statistics(F.linear(h, w, b), labels)
                )  # fmt: skip
                return size * (s.lse - s.target_logit + 0.1 * s.max_logit)
            if linear:
                return (size * objective).linear(h, w, labels, b, chunk_rows=2, **scaled, **options, **chosen)
            return (size * objective)(F.linear(h, w, b), labels, **scaled, **options)

        leaves = [x.clone().requires_grad_() for x in (*tensors, *more)]
        value = loss(*leaves)
        upstream = upstream_for(value)
        gradients = [torch.autograd.grad(value, leaves, upstream * 2.0**7 / size, retain_graph=True) for _ in range(2)]
        return [value.detach() / size, *gradients[0], *gradients[1]]

    exact = run(False, 1.0, hidden.double(), weight.double(), bias.double())
    for size in (1.0, 2.0**-20):
        found = run(True, size, hidden, weight, bias)
        for place, (one, truth) in enumerate(zip(found, exact, strict=True)):
            assert (one.double() - truth).norm() <= 1.2 * ONE_ROUNDING[dtype] * truth.norm(), (place, size)


def test_products_with_wider_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of half-precision tensors on a GPU, where torch's products take the dtype of their sums."""
    mm, addmm = torch.mm, torch.addmm
    monkeypatch.setattr(torch, "mm", lambda a, b, *, out_dtype, out: mm(a.to(out_dtype), b.to(out_dtype), out=out))
    monkeypatch.setattr(
        torch, "addmm", lambda x, a, b, *, out_dtype, out: addmm(x, a.to(out_dtype), b.to(out_dtype), out=out)
    )
    a, b = torch.randn(3, 4).bfloat16(), torch.randn(4, 5).bfloat16()
    found = objkern.linear._multiply(a, b, torch.full((3, 5), 7.0))
    torch.testing.assert_close(found, a.float() @ b.float())
    torch.testing.assert_close(objkern.linear._multiply(a, b, torch.ones(3, 5), add=True), found + 1)


# ---- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_sequences_and_shift(mode: str) -> None:
    hidden, weight, bias, labels = inputs(torch.float32)
    hidden, labels = hidden.view(4, 63, D), labels.view(4, 63)
    ours, theirs = (
        results(loss, hidden, weight, bias)
        for loss in (
            lambda h, w, b: REGULARIZED.linear(h, w, labels, b, shift=1, mode=mode, chunk_rows=50),
            lambda h, w, b: REGULARIZED(F.linear(h, w, b)[:, :-1], labels[:, 1:]),
        )
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    loss = REGULARIZED.linear(hidden, weight, labels, bias, reduction="none")
    assert loss.shape == labels.shape


def test_one_row_and_no_row() -> None:
    hidden, weight, _, labels = inputs(torch.float32)
    torch.testing.assert_close(CrossEntropy().linear(hidden[1], weight, labels[1]),
                               F.cross_entropy(F.linear(hidden[1], weight), labels[1]))  # fmt: skip
    for reduction, expected in (("mean", torch.nan), ("sum", 0.0)):
        h, w = hidden[:0].clone().requires_grad_(), weight.clone().requires_grad_()
        loss = CrossEntropy().linear(h, w, labels[:0], reduction=reduction)
        torch.testing.assert_close(loss.detach(), torch.tensor(expected), equal_nan=True)
        loss.backward()
        assert h.grad.shape == (0, D)
        assert not w.grad.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("empty", "expected"), [("nan", torch.nan), ("zero", 0.0)])
def test_all_ignored(empty: str, expected: float, mode: str) -> None:
    """12: a documented value, zero gradients, and the graph is kept."""
    hidden, weight, bias, labels = (x.clone() for x in inputs(torch.float32))
    labels[:] = -100
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    loss, parts = REGULARIZED.linear(hidden, weight, labels, bias, empty=empty, mode=mode, return_parts=True)
    torch.testing.assert_close(loss.detach(), torch.tensor(expected), equal_nan=True)
    assert parts["rows"] == 0
    loss.backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_strided_hidden_states() -> None:
    """11: transposed, sliced and expanded hidden states and weights."""
    hidden, weight, _, labels = inputs(torch.float32)
    plain = results(lambda h, w: REGULARIZED.linear(h, w, labels), hidden, weight)
    wide = torch.zeros(N, 2 * D)
    wide[:, ::2] = hidden
    turned = weight.t().contiguous().t()
    for h, w in ((hidden.t().contiguous().t(), weight), (wide[:, ::2], weight), (hidden, turned)):
        found = results(lambda h, w: REGULARIZED.linear(h, w, labels), h, w)
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)
    one = hidden[:1].expand(N, D)
    torch.testing.assert_close(REGULARIZED.linear(one, weight, labels), REGULARIZED(F.linear(one, weight), labels))


# ---- which gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)), ids=str)
def test_who_requires_grad(needs: tuple[bool, ...], mode: str) -> None:
    """23: frozen weights get no gradient and no memory for one; frozen hidden states do not cut the weight off."""
    hidden, weight, bias, labels = inputs(torch.float32)
    tensors = (hidden, weight, bias)
    expected = results(lambda h, w, b: REGULARIZED(F.linear(h, w, b), labels), *tensors)[1:]
    leaves = [x.clone().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
    loss = REGULARIZED.linear(leaves[0], leaves[1], labels, leaves[2], mode=mode)
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward(upstream_for(loss))
    for leaf, need, gradient in zip(leaves, needs, expected, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)), ids=str)
def test_nothing_is_allocated_for_the_frozen(needs: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        """The shapes of everything that an op returns."""

        shapes: ClassVar[set[tuple[int, ...]]] = set()

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = op(*args, **(kwargs or {}))
            for x in found if isinstance(found, (tuple, list)) else (found,):
                if isinstance(x, Tensor) and x._base is None:
                    Largest.shapes.add(tuple(x.shape))
            return found

    hidden, weight, bias, labels = inputs(torch.float32)
    arguments = (
        None,
        None,
        -100,
        0.0,
        True,
        None,
        1.0,
        None,
        None,
        [0.0, 0.0, 1.0],
        1,
        None,
        None,
        False,
        False,
        list(needs),
        50,
        True,
        True,
    )
    Largest.shapes = set()
    with Largest():
        torch.ops.objkern.linear_objective("objkern", hidden, weight, bias, labels, *arguments)
    for shape, need in zip(((N, D), (V, D), (V,)), needs, strict=True):
        assert (shape in Largest.shapes) == need, shape


@pytest.mark.parametrize("mode", MODES)
def test_tied_embeddings(mode: str) -> None:
    labels = torch.randint(V, (60,))
    tokens = torch.randint(V, (60,))
    weight = torch.randn(V, D) / D**0.5

    def loss(linear: bool) -> Loss:
        def run(w: Tensor) -> Tensor:
            h = torch.tanh(F.embedding(tokens, w))
            return REGULARIZED.linear(h, w, labels, mode=mode) if linear else REGULARIZED(F.linear(h, w), labels)

        return run

    torch.testing.assert_close(results(loss(True), weight), results(loss(False), weight), rtol=1e-4, atol=1e-6)


# ---- the backward pass ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_several_backward_passes(mode: str, dtype: torch.dtype) -> None:
    """2: the gradient of the forward pass is scaled in place once, and not once more."""
    hidden, weight, bias, labels = inputs(dtype)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    loss = REGULARIZED.linear(hidden, weight, labels, bias, mode=mode)
    found = [torch.autograd.grad(loss, leaves, torch.tensor(u), retain_graph=True) for u in (1.0, 4.0, -0.5, 1.0)]
    for factor, gradients in zip((1.0, 4.0, -0.5, 1.0), found, strict=True):
        for one, first in zip(gradients, found[0], strict=True):
            torch.testing.assert_close(one, first * factor)


@pytest.mark.parametrize("mode", MODES)
def test_bitwise_the_same_and_inputs_unchanged(mode: str) -> None:
    """Pitfalls 1 and 30."""
    tensors = inputs(torch.float32)
    before = [x.clone() for x in tensors]
    run = lambda: results(lambda h, w, b: REGULARIZED.linear(h, w, tensors[3], b, mode=mode), *tensors[:3])  # noqa: E731
    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_float16_under_loss_scaling(mode: str) -> None:
    """The upstream gradient of a scaler comes before the rounding: gradients of 1e-9 do not underflow."""
    hidden, weight, _, labels = inputs(torch.float16)
    h = hidden.clone().requires_grad_()
    loss = 1e-6 * CrossEntropy()
    loss.linear(h, weight, labels, mode=mode).backward(torch.tensor(2.0**16))
    exact = hidden.double().requires_grad_()
    (2.0**16 * 1e-6 * F.cross_entropy(F.linear(exact, weight.double()), labels)).backward()
    assert (exact.grad.abs() / 2**16 < 2.0**-25).all()  # without the scaling everything would be 0
    torch.testing.assert_close(h.grad.double(), exact.grad, rtol=2e-2, atol=1e-7)


def test_a_changed_weight_is_noticed() -> None:
    hidden, weight, _, labels = inputs(torch.float32)
    loss = CrossEntropy().linear(hidden.requires_grad_(), weight, labels, mode="recompute")
    weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_graph_holds_the_gradients() -> None:
    """No cycle: what the forward pass made is freed with the loss, not by the garbage collector."""
    import gc
    import weakref

    hidden, weight, _, labels = inputs(torch.float32)
    gc.collect()
    gc.disable()
    try:
        loss = CrossEntropy().linear(hidden.requires_grad_(), weight.requires_grad_(), labels)
        node = weakref.ref(loss.grad_fn)
        finished = [weakref.ref(g) for g in loss.grad_fn.finished]
        del loss
        assert node() is None
        assert all(g() is None for g in finished)
    finally:
        gc.enable()


def test_second_derivatives() -> None:
    hidden, weight, bias, labels = (x.double() if x.is_floating_point() else x for x in inputs(torch.float64, rows=6))
    weight, bias = weight[:9, :].clone(), bias[:9].clone()
    labels = labels.clamp(max=8)
    for mode in MODES:
        run = lambda h, w, b, m=mode: (REGULARIZED + 0.1 * MaxZLoss()).linear(h, w, labels, b, mode=m, chunk_rows=4)  # noqa: E731
        leaves = [x.clone().requires_grad_() for x in (hidden[:, :5].contiguous(), weight[:, :5].contiguous(), bias)]
        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves)


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("custom", [False, True])
def test_parts(custom: bool, reduction: str) -> None:
    """27: detached, and those of the logits path."""
    objective = REGULARIZED + 0.1 * objkern.custom(lambda s: s.entropy, name="mine") if custom else REGULARIZED
    hidden, weight, bias, labels = inputs(torch.float32)
    _, ours = objective.linear(hidden.requires_grad_(), weight, labels, bias, reduction=reduction, return_parts=True,
                               chunk_rows=40)  # fmt: skip
    _, theirs = objective(F.linear(hidden, weight, bias), labels, reduction=reduction, return_parts=True)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert not ours[name].requires_grad
        torch.testing.assert_close(ours[name], theirs[name], msg=name)


# ---- backends and torch ---------------------------------------------------------------------------------------------


def test_the_reference_backend() -> None:
    hidden, weight, bias, labels = inputs(torch.float32)
    for objective in (REGULARIZED, REGULARIZED + 0.1 * objkern.custom(lambda s: s.entropy)):
        ours, theirs = (
            results(lambda h, w, b, o=objective, n=name: o.linear(h, w, labels, b, backend=n), hidden, weight, bias)
            for name in ("cpu", "reference")
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode: str, with_bias: bool, hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """19: the dtypes of F.linear under autocast; the loss is float32, gradients have their leaves' dtypes."""
    hidden, weight, bias, labels = inputs(torch.float32)
    leaves = [hidden.to(hidden_dtype), weight.to(weight_dtype), *([bias.to(weight_dtype)] if with_bias else [])]
    rounded = [x.to(torch.bfloat16) for x in leaves]
    exact = results(lambda h, w, *b: REGULARIZED(F.linear(h, w, *b), labels), *(x.double() for x in rounded))
    with torch.autocast("cpu", torch.bfloat16):
        found = results(lambda h, w, *b: REGULARIZED.linear(h, w, labels, *b, mode=mode), *leaves)
        eager = results(lambda h, w, *b: REGULARIZED(F.linear(h, w, *b), labels), *leaves)
    assert found[0].dtype == torch.float32
    for ours, theirs, truth, leaf in zip(found[1:], eager[1:], exact[1:], leaves, strict=True):
        assert ours.dtype == leaf.dtype
        assert_within_budget(ours, theirs, truth, torch.bfloat16)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_without_a_break(mode: str, reduction: str) -> None:
    if (mode, reduction) == ("forward", "none"):
        return
    hidden, weight, bias, labels = inputs(torch.float32, rows=30)

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return REGULARIZED.linear(2.0 * h, w, labels, b, mode=mode, reduction=reduction).square()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, hidden, weight, bias), results(loss, hidden, weight, bias))


@pytest.mark.parametrize("mode", ["auto", "recompute", "statistics"])
def test_compiled_once_more_when_the_number_of_rows_varies(mode: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    _, weight, _, labels = inputs(torch.float32)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def loss(h: Tensor, y: Tensor) -> Tensor:
        if mode == "statistics":
            return objkern.linear_row_statistics(h, weight, y).logprob.sum()
        return REGULARIZED.linear(h, weight, y, mode=mode)

    for rows in (33, 20, 25, 28, 11, 12):
        hidden = torch.randn(rows, D, requires_grad=True)
        loss(hidden, labels[:rows]).backward()
    assert counter.frame_count <= 2


def test_opcheck() -> None:
    hidden, weight, bias, labels = inputs(torch.float32, rows=20)
    h, w, b = (x.requires_grad_() for x in (hidden, weight, bias))
    rows = (None, None, -100, 0.0, True, torch.randn(20, 4), 1.5, torch.randn(V, 4), torch.randn(V))
    terms = ([0.0, 0.1, 1.0, 1.0, 0.0, 0.01], 1, None, None, False, True)
    for needs, in_forward in (([True] * 3, True), ([True] * 3, False), ([False, True, False], True)):
        torch.library.opcheck(torch.ops.objkern.linear_objective.default,
                              ("objkern", h, w, b, labels, *rows, *terms, needs, 8, True, in_forward))  # fmt: skip
    torch.library.opcheck(torch.ops.objkern.linear_statistics.default, ("objkern", h, w, b, labels, *rows, 8, True))
    with torch.no_grad():
        found = torch.ops.objkern.linear_objective(
            "objkern", h, w, b, labels, *rows, *terms, [True] * 3, 8, True, False
        )
        statistics, centred, maximum = torch.ops.objkern.linear_statistics("objkern", h, w, b, labels, *rows, 8, True)
        torch.library.opcheck(
            torch.ops.objkern.linear_objective_gradient.default,
            (torch.tensor(2.0), found[2], found[3], "objkern", h.detach(), w.detach(), b.detach(), labels, *rows, terms[0],
             [True] * 3, 8, True, False),
        )  # fmt: skip
        torch.library.opcheck(
            torch.ops.objkern.linear_statistics_gradient.default,
            (torch.randn_like(statistics), centred, maximum, "objkern", h.detach(), w.detach(), b.detach(), labels,
             *rows, [True] * 3, 8, True, False),
        )  # fmt: skip


def test_torch_func() -> None:
    """vmap works, and torch.autograd through it; the derivatives of torch.func say that they are not implemented."""
    hidden, weight, _, labels = inputs(torch.float32, rows=24)
    batches = hidden.view(4, 6, D), labels.view(4, 6)
    each = lambda h, w: torch.func.vmap(lambda h, y: CrossEntropy().linear(h, w, y))(h, batches[1])  # noqa: E731
    expected = [CrossEntropy()(F.linear(h, weight), y) for h, y in zip(*batches, strict=True)]
    torch.testing.assert_close(each(batches[0], weight), torch.stack(expected))
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda h: CrossEntropy().linear(h, weight, labels))(hidden)


@pytest.mark.parametrize("mode", MODES)
def test_checkpointed(mode: str) -> None:
    from torch.utils.checkpoint import checkpoint

    hidden, weight, bias, labels = inputs(torch.float32)
    loss = lambda h, w, b: REGULARIZED.linear(torch.tanh(h), w, labels, b, mode=mode)  # noqa: E731
    kept = results(lambda *x: checkpoint(loss, *x, use_reentrant=False), hidden, weight, bias)
    torch.testing.assert_close(kept, results(loss, hidden, weight, bias))


@pytest.mark.parametrize("base", [12.25, 14.0, 18.25])
@pytest.mark.parametrize("of", ["term", "statistic"])
def test_a_cap_that_makes_two_maxima(of: str, base: float) -> None:
    """The label's logit is the larger by one digit, and after the cap the first class has the same: it is the first
    maximum then, and gets the gradient, though its tile does not hold the largest logit."""
    hidden, weight = torch.ones(200, 1, dtype=torch.float64), torch.zeros(2100, 1, dtype=torch.float64)
    weight[0], weight[2000] = base, math.nextafter(base, math.inf)
    labels, cap = torch.full((200,), 2000), 7.0
    if of == "term":
        fused = lambda h, w: MaxZLoss().linear(  # noqa: E731
            h, w, labels, mode="recompute", chunk_rows=64, softcap=cap, reduction="sum"
        )
        plain = lambda h, w: MaxZLoss()(F.linear(h, w), labels, softcap=cap, reduction="sum")  # noqa: E731
    else:
        fused = lambda h, w: (  # noqa: E731
            objkern.linear_row_statistics(h, w, labels, chunk_rows=64, softcap=cap).max_logit.sum()
        )
        plain = lambda h, w: objkern.row_statistics(F.linear(h, w), labels, softcap=cap).max_logit.sum()  # noqa: E731
    expected = results(plain, hidden, weight)
    assert expected[2][0] > 1.0
    assert expected[2][2000] == 0.0
    torch.testing.assert_close(results(fused, hidden, weight), expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ignore_index", [-(2**63), -(2**63) + 50, 2**63 - 1, 3])
def test_any_ignore_index(ignore_index: int, mode: str) -> None:
    hidden, weight, _, labels = inputs(torch.float64)
    kept = labels != -100
    marked = torch.where(kept, labels, ignore_index)
    expected = results(lambda h, w: CrossEntropy()(F.linear(h, w), marked, ignore_index=ignore_index), hidden, weight)
    found = results(
        lambda h, w: CrossEntropy().linear(h, w, marked, ignore_index=ignore_index, mode=mode, chunk_rows=80),
        hidden, weight,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weight_of", [math.nan, math.inf])
@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_the_class_weight_of_a_row_that_does_not_count(ignore_index: int, weight_of: float) -> None:
    """As torch: it is not looked at, whatever it is. (-100 is clamped to class 0 for the look-up.)"""
    hidden, weight, _, labels = inputs(torch.float64)
    place = max(ignore_index, 0)
    labels = torch.where(labels == -100, ignore_index, labels.clamp(min=1)).masked_fill(labels == place, ignore_index)
    class_weight = torch.ones(V, dtype=torch.float64)
    class_weight[place] = weight_of
    expected = F.cross_entropy(F.linear(hidden, weight), labels, class_weight, ignore_index=ignore_index)
    term, options = CrossEntropy(class_weight), {"ignore_index": ignore_index}
    assert expected.isfinite()
    for found in (
        term.linear(hidden, weight, labels, **options),
        term(F.linear(hidden, weight), labels, **options),
        term(F.linear(hidden, weight), labels, backend="reference", **options),
        objkern.linear_cross_entropy(hidden, weight, labels, weight=class_weight, **options),
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", MODES)
def test_several_upstream_gradients_at_once(mode: str) -> None:
    hidden, weight, _, labels = inputs(torch.float64)
    hidden.requires_grad_()
    loss = CrossEntropy().linear(hidden, weight, labels, mode=mode)
    upstream = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    (found,) = torch.autograd.grad(loss, hidden, upstream, is_grads_batched=True)
    (once,) = torch.autograd.grad(CrossEntropy().linear(hidden, weight, labels, mode=mode), hidden)
    torch.testing.assert_close(found, upstream[:, None, None] * once)


def test_hidden_states_of_no_features() -> None:
    hidden, weight, bias = torch.empty(2, 5, 0), torch.empty(9, 0), torch.randn(9)
    labels = torch.randint(9, (2, 5))
    torch.testing.assert_close(
        CrossEntropy().linear(hidden, weight, labels, bias), CrossEntropy()(bias.expand(2, 5, 9), labels)
    )


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_forward_mode_is_refused() -> None:
    """Autograd would take a tangent that nobody computes for zero."""
    hidden, weight, _, labels = inputs(torch.float32)
    for call in (
        lambda h: CrossEntropy().linear(h, weight, labels),
        lambda h: objkern.linear_row_statistics(h, weight, labels).lse,
    ):
        with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
            torch.func.jvp(call, (hidden,), (hidden,))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
            call(torch.autograd.forward_ad.make_dual(hidden, hidden))


def test_torch_func_of_what_is_not_a_layer() -> None:
    hidden, weight, _, labels = inputs(torch.float32)
    for loss in (
        lambda c: (c * CrossEntropy()).linear(hidden, weight, labels),
        lambda s: CrossEntropy().linear(hidden, weight, labels, logit_scale=s),
        lambda c: CrossEntropy().linear(hidden, weight, (c * F.linear(hidden, weight)).softmax(-1)),
    ):
        with pytest.raises(NotImplementedError, match=r"torch\.func"):
            torch.func.grad(loss)(torch.tensor(1.0))
    found = torch.func.grad(lambda h: objkern.linear_cross_entropy(h, weight, labels))(hidden)
    expected = torch.func.grad(lambda h: F.cross_entropy(F.linear(h, weight), labels))(hidden)
    torch.testing.assert_close(found, expected)


def test_numbers_on_meta_are_refused() -> None:
    """One of them would send the whole call to the fake ops, and the loss would be memory that nobody wrote."""
    hidden, weight, _, labels = inputs(torch.float32)
    number = torch.tensor(2.0, device="meta")
    with pytest.raises(
        ValueError, match="logit_scale: expected a tensor on cpu, as the other tensors, but got one on meta"
    ):
        CrossEntropy().linear(hidden, weight, labels, logit_scale=number)
    with pytest.raises(ValueError, match="normalizer: expected a tensor on cpu"):
        CrossEntropy().linear(hidden, weight, labels, normalizer=number)
    with pytest.raises(ValueError, match="coefficient: expected a tensor on cpu"):
        (number * CrossEntropy()).linear(hidden, weight, labels)
    with pytest.raises(ValueError, match="logit_scale: expected a tensor on cpu"):
        objkern.linear_row_statistics(hidden, weight, labels, logit_scale=number)


def test_a_bad_label_in_compiled_code_and_under_shift() -> None:
    hidden, weight, _, labels = inputs(torch.float32)
    labels[:150], labels[201] = -100, V
    with pytest.raises(IndexError, match="row 201 holds label 507"):
        torch.compile(lambda h: CrossEntropy().linear(h, weight, labels, chunk_rows=50))(hidden)
    with pytest.raises(IndexError, match=r"row 200 holds label 507.*row t holds the label at t \+ 1"):
        CrossEntropy().linear(hidden, weight, labels, shift=1)


def test_a_bad_label_is_named() -> None:
    """13: by its row in the batch, not in a chunk."""
    hidden, weight, _, labels = inputs(torch.float32)
    for bad in (-1, V, V + 1, 2**62, -(2**63)):
        labels[201] = bad
        with pytest.raises(IndexError, match=f"row 201 holds label {bad}"):
            CrossEntropy().linear(hidden, weight, labels, chunk_rows=50)
        with pytest.raises(IndexError, match="row 201"):
            objkern.linear_row_statistics(hidden, weight, labels, chunk_rows=50)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"hidden": [1.0]}, TypeError, "hidden: expected a tensor"),
    ({"hidden": torch.zeros(())}, ValueError, "hidden: expected shape"),
    ({"hidden": torch.zeros(4, D, dtype=torch.int64), "weight": torch.zeros(V, D, dtype=torch.int64)}, TypeError, "int64"),
    ({"weight": None}, TypeError, "weight: expected a tensor"),
    ({"weight": torch.zeros(V, D + 1)}, ValueError, r"weight: expected shape \(V, 123\)"),
    ({"weight": torch.zeros(D)}, ValueError, "weight: expected shape"),
    ({"weight": torch.zeros(0, D)}, ValueError, "at least one class"),
    ({"weight": torch.zeros(0)}, ValueError, "FSDP or ZeRO-3"),
    ({"weight": torch.zeros(V, D, dtype=torch.float64)}, TypeError, "weight: expected torch.float32"),
    ({"bias": torch.zeros(V + 1)}, ValueError, r"bias: expected shape \(507,\)"),
    ({"bias": torch.zeros(V, dtype=torch.float16)}, TypeError, "bias: expected torch.float32"),
    ({"weight": torch.zeros(V, D, device="meta")}, ValueError, "weight: expected a tensor on cpu"),
    ({"target": torch.zeros(N - 1, dtype=torch.int64)}, ValueError, "target: expected"),
    ({"target": None}, ValueError, "target: .* needs one"),
    ({"mode": "fastest"}, ValueError, "mode: expected"),
    ({"mode": "forward", "reduction": "none"}, ValueError, "scalar reduction"),
    ({"mode": "recompute", "gradient": "forward"}, ValueError, "contradicts"),
    ({"mode": "forward", "logit_scale": torch.tensor(1.0, requires_grad=True)}, ValueError, "logit scale that requires"),
    ({"chunk_rows": 0}, ValueError, "chunk_rows: expected a positive int"),
    ({"chunk_rows": 2.5}, ValueError, "chunk_rows: expected a positive int"),
    ({"memory_budget": 100}, ValueError, "memory_budget: expected at least"),
    ({"memory_budget": 10**6, "chunk_rows": 4}, ValueError, "give one of them"),
    ({"backend": "cuda"}, ValueError, "cannot run on cpu"),
    ({"weight": torch.zeros(V, D).to_sparse()}, TypeError, "weight: expected a dense tensor but got a sparse_coo one"),
    ({"hidden": torch.zeros(N, D).to_mkldnn()}, TypeError, "hidden: expected a dense tensor but got a _mkldnn one"),
    ({"hidden": SimpleNamespace(last_hidden_state=torch.zeros(N, D))}, TypeError, r"pass its \.last_hidden_state"),
    ({"mode": "forward", "reduction": "none"}, ValueError, 'mode="forward" needs a scalar reduction'),
], ids=str)  # fmt: skip
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    hidden, weight, bias, labels = inputs(torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "target": labels, "bias": bias, **change}
    with pytest.raises(error, match=message):
        CrossEntropy().linear(**arguments)


# ---- the choice of chunks -------------------------------------------------------------------------------------------

H200 = {"multiprocessors": 132, "logits_bytes": 4, "gradient_bytes": 2}


@pytest.mark.parametrize(("features", "trains_weight", "expected"), [
    (2304, True, 1792),  # one wave
    (4096, True, 2048),  # two waves, of which an eighth of a row of blocks is idle
    (768, True, 5632),  # one wave
    (4096, False, 1024),  # one wave
    (16384, True, 1792),  # seven
])  # fmt: skip
def test_chunks_fill_waves(features: int, trains_weight: bool, expected: int) -> None:
    found = choose_chunk_rows(features, 128256, trains_weight=trains_weight, **H200)
    assert found == expected
    blocks = found / 128 * -(-features // 256)
    assert blocks % 132 == 0 or 132 - blocks % 132 < -(-features // 256)  # less than a row of blocks is idle


@pytest.mark.parametrize(("rows", "classes", "chunk_rows", "expected"), [
    (8192, 128256, 2048, (8192, 32000)),  # a quarter of the rows: a quarter of the classes, rounded down
    (2048, 32000, 512, (2048, 7936)),
    (1 << 20, 32000, 512, (16000, 1024)),  # so many rows that few classes would be left
    (100, 32000, 512, (100, 32000)),  # one chunk
    (100, 32001, 512, (100, 32001)),  # of which nothing is rounded down
    (8192, 128256, 63, (63, 128256)),
    (3, 5, 1, (1, 5)),
    (0, 5, 1, (1, 5)),
])  # fmt: skip
def test_tiles_have_no_more_elements_than_chunks(
    rows: int, classes: int, chunk_rows: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # as they are, not small
    assert tile_of(rows, classes, chunk_rows) == expected
    for n, v, c in itertools.product((1, 9, 250, 5000), (1, 9, 700, 1024, 40000), (1, 20, 900)):
        tile = tile_of(n, v, c)
        assert 1 <= tile[0] <= n
        assert 1 <= tile[1] <= v
        assert tile[0] * tile[1] <= c * v


def test_chunks_keep_to_the_budget() -> None:
    kwargs = {"features": 4096, "classes": 128256, "trains_weight": True, **H200}
    for budget in (1 << 20, 1 << 24, 1 << 30):
        rows = choose_chunk_rows(memory_budget=budget, **kwargs)
        assert chunk_bytes(rows, 128256, 4, 2) <= budget < chunk_bytes(rows + 1, 128256, 4, 2) or rows == 2048
    assert choose_chunk_rows(memory_budget=769536, **kwargs) == 1
    with pytest.raises(ValueError, match="expected at least 769536 bytes"):
        choose_chunk_rows(memory_budget=769535, **kwargs)


# ---- the drop-in ----------------------------------------------------------------------------------------------------

OPINFOS = [op for op in op_db if op.name == "nn.functional.linear_cross_entropy"]
needs_torch_2_13 = pytest.mark.skipif(
    not OPINFOS, reason="torch.nn.functional.linear_cross_entropy came with torch 2.13"
)


@needs_torch_2_13
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opinfo_samples(dtype: torch.dtype) -> None:
    count = 0
    for op in OPINFOS:
        for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
            count += 1
            with warnings.catch_warnings():  # torch says where its own chunked path does not go
                warnings.simplefilter("ignore", UserWarning)
                assert_same(op.op, (sample.input, *sample.args), sample.kwargs, dtype)
    assert count >= 100


def assert_same(function: Loss, arguments: tuple[Tensor, ...], options: dict[str, Any], dtype: torch.dtype) -> None:
    """Value, dtype, shape and gradients as torch's; in half precision as near to float64 as torch is."""

    def run(loss: Loss, cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves: list[Tensor] = []

        def leaf(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            copied = cast(x.detach().clone()).requires_grad_(x.requires_grad)
            leaves.extend([copied] if x.requires_grad else [])
            return copied

        value = loss(*map(leaf, arguments), **{name: leaf(x) for name, x in options.items()})
        upstream = upstream_for(value.to(dtype)).to(value.dtype)
        found = torch.autograd.grad(value, leaves, upstream, allow_unused=True)
        return [value.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))]

    ours, theirs = run(objkern.linear_cross_entropy, lambda x: x), run(function, lambda x: x)
    whole = lambda *x, options=None, **kwargs: function(*x, **kwargs)  # noqa: E731  torch's chunks know no float64 here
    exact = run(whole, Tensor.double) if dtype == torch.bfloat16 else theirs
    for one, other, truth in zip(ours, theirs, exact, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        if dtype == torch.bfloat16 and torch.isfinite(truth).all():
            assert_within_budget(one, other, truth, dtype)
        else:
            torch.testing.assert_close(one, other, equal_nan=True)


@needs_torch_2_13
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_module_inputs(dtype: torch.dtype) -> None:
    """The samples of torch.nn.LinearCrossEntropyLoss, a thousand for each dtype."""
    from torch.testing._internal import common_modules

    make = common_modules.module_inputs_torch_nn_LinearCrossEntropyLoss
    count = 0
    for sample in make(None, "cpu", dtype, requires_grad=True, training=True):
        count += 1
        module = torch.nn.LinearCrossEntropyLoss(*sample.constructor_input.args, **sample.constructor_input.kwargs)
        weight, *bias = (p.detach() for p in module.parameters())
        shape = (module.num_classes, *module.out_features)
        hidden, target = sample.forward_input.args
        options = {
            "linear_bias": bias[0].reshape(shape).requires_grad_() if bias else None, "weight": module.weight,
            "reduction": module.reduction, "ignore_index": module.ignore_index,
            "label_smoothing": module.label_smoothing, "options": module.options,
        }  # fmt: skip
        arguments = (hidden, weight.reshape(*shape, -1).requires_grad_(), target)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            assert_same(F.linear_cross_entropy, arguments, options, dtype)
    assert count >= 300


@needs_torch_2_13
def test_module_error_inputs() -> None:
    from torch.testing._internal import common_modules

    count = 0
    make = common_modules.module_error_inputs_torch_nn_LinearCrossEntropyLoss
    for sample in make(None, "cpu", torch.float32, requires_grad=False, training=True):
        inputs_ = sample.module_error_input
        if sample.error_on != common_modules.ModuleErrorEnum.FORWARD_ERROR:
            continue
        count += 1
        module = torch.nn.LinearCrossEntropyLoss(*inputs_.constructor_input.args, **inputs_.constructor_input.kwargs)
        hidden, target = inputs_.forward_input.args
        with pytest.raises(sample.error_type, match=sample.error_regex):
            objkern.linear_cross_entropy(hidden, module.linear.weight.detach(), target)
    assert count >= 3


@needs_torch_2_13
def test_opinfo_errors() -> None:
    count = 0
    for op in OPINFOS:
        for sample in op.error_inputs("cpu"):
            count += 1
            wrong = sample.sample_input
            with pytest.raises(sample.error_type, match=sample.error_regex):
                objkern.linear_cross_entropy(wrong.input, *wrong.args, **wrong.kwargs)
    assert count >= 3


@pytest.mark.skipif(not OPINFOS, reason="torch.nn.functional.linear_cross_entropy came with torch 2.13")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_row_whose_label_has_a_dimension(reduction: str) -> None:
    hidden, weight = torch.randn(4), torch.randn(5, 4)
    for label in (torch.tensor([2]), torch.tensor(2)):
        ours, theirs = (
            call(hidden, weight, label, reduction=reduction)
            for call in (objkern.linear_cross_entropy, F.linear_cross_entropy)
        )
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs)


def test_bad_arguments_of_the_drop_in() -> None:
    hidden, weight, bias, labels = inputs(torch.float32)
    with pytest.raises(RuntimeError, match="linear_weight to have the same dtype as input"):
        objkern.linear_cross_entropy(hidden, weight.double(), labels)
    with pytest.raises(RuntimeError, match="linear_bias to have the same dtype as input"):
        objkern.linear_cross_entropy(hidden, weight, labels, linear_bias=bias.half())
    with pytest.raises(RuntimeError, match="input of a floating-point dtype"):
        objkern.linear_cross_entropy(hidden.int(), weight.int(), labels)
    for options in (3, "x", {}):
        with pytest.raises(TypeError, match=r"options: expected torch\.nn\.LinearCrossEntropyOptions or None"):
            objkern.linear_cross_entropy(hidden, weight, labels, options=options)


def test_the_drop_in_with_regularizers() -> None:
    hidden, weight, bias, labels = inputs(torch.float32)
    ours, theirs = (
        results(loss, hidden, weight, bias)
        for loss in (
            lambda h, w, b: objkern.linear_cross_entropy(h, w, labels, linear_bias=b, z_loss=0.1, entropy=-0.2),
            lambda h, w, b: objkern.cross_entropy(F.linear(h, w, b), labels, z_loss=0.1, entropy=-0.2),
        )
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# ---- language models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_causal_language_model(tied: bool) -> None:
    """docs/linear.md: one line in the place of a Hugging Face model's head and loss."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    input_ids = torch.randint(97, (3, 11))
    labels = input_ids.clone()
    labels[0, :6] = -100
    gradients = []
    for ours in (False, True):
        model.zero_grad()
        if ours:
            hidden = model.model(input_ids).last_hidden_state
            loss = CrossEntropy().linear(hidden, model.lm_head.weight, labels, shift=1)
        else:
            loss = model(input_ids, labels=labels).loss
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
