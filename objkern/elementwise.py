"""Elementwise objectives: terms that compare a prediction with a target of its shape, element by element.

The same algebra, and the same way as for rows: terms in plain arithmetic here, their twins in csrc/elementwise.h, and
eager torch on these formulas as the specification.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops, without_core
from .batch import (
    DTYPES,
    REDUCTIONS,
    check_dense,
    check_normalizer,
    check_same_device,
    checked_softcap,
    describe,
    scalar_tensor,
    shown,
)
from .native import _C
from .objective import Term
from .terms import checked_number

# ---- the terms ------------------------------------------------------------------------------------------------------


class BinaryCrossEntropy(Term):
    """``F.binary_cross_entropy_with_logits(logits, y * (1 - label_smoothing) + label_smoothing / 2, weight,
    pos_weight=pos_weight)``

    −w (a y' log σ(z) + (1 − y') log(1 − σ(z))) with y' = (1 − ε) y + ε/2 and pos_weight a.

    Args:
        weight: w, of a shape that broadcasts to the prediction's; a buffer.
        pos_weight: a, the weight of the positive side, of a shape that broadcasts to the prediction's; a buffer.
        label_smoothing: ε in [0, 1]: targets move towards ½.

    Source: Cox 1958, "The Regression Analysis of Binary Sequences"; Szegedy et al. 2015 for smoothing.

    >>> logits, target = torch.tensor([2.0, -1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0])
    >>> BinaryCrossEntropy(pos_weight=torch.tensor(3.0))(logits, target)
    tensor(0.9245)
    >>> F.binary_cross_entropy_with_logits(logits, target, pos_weight=torch.tensor(3.0))
    tensor(0.9245)
    """

    name, element_kind, target = "binary_cross_entropy", 0, "elements"

    def __init__(
        self, weight: Tensor | None = None, pos_weight: Tensor | None = None, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.parameter = checked_number("label_smoothing", label_smoothing, 0.0, 1.0)
        for name, w in (("weight", weight), ("pos_weight", pos_weight)):
            if w is not None and not (isinstance(w, Tensor) and w.is_floating_point()):
                raise TypeError(f"{name}: expected a floating-point tensor or None but got {describe(w)}")
            self.register_buffer(name, w)

    @staticmethod
    def element_formula(z: Tensor, y: Tensor, parameter: float, weight: Any, pos_weight: Any) -> Tensor:
        y = y * (1.0 - parameter) + 0.5 * parameter if parameter != 0.0 else y
        no, yes = 1.0 - y, y * pos_weight
        return weight * (_product(no, -F.logsigmoid(-z)) + _product(yes, -F.logsigmoid(z)))

    def _arguments(self) -> str:
        weights = [
            f"{name}=<tensor of {w.numel()}>"
            for name, w in (("weight", self.weight), ("pos_weight", self.pos_weight))
            if w is not None
        ]
        return ", ".join([*weights, *([f"label_smoothing={self.parameter!r}"] if self.parameter else [])])


class BernoulliEntropy(Term):
    """``torch.distributions.Bernoulli(logits=logits).entropy()``

    −p log p − (1 − p) log(1 − p), p = σ(z). Subtract it for the confidence penalty on independent labels.

    Source: Shannon 1948, "A Mathematical Theory of Communication"; Pereyra et al. 2017 for the penalty.

    >>> BernoulliEntropy()(torch.tensor([0.0, 2.0, 5.0]), reduction="none")  # at most log 2
    tensor([0.6931, 0.3653, 0.0402])
    """

    name, element_kind = "bernoulli_entropy", 1

    @staticmethod
    def element_formula(z: Tensor, y: Tensor, parameter: float, weight: Any, pos_weight: Any) -> Tensor:
        return _product(torch.sigmoid(z), -F.logsigmoid(z)) + _product(torch.sigmoid(-z), -F.logsigmoid(-z))


def _product(probability: Tensor, x: Tensor) -> Tensor:
    """0·∞ is the limit 0, as in p·log p."""
    return (probability * x).masked_fill((probability == 0) & x.isinf(), 0.0)


class MeanSquaredError(Term):
    """``F.mse_loss(prediction, y)``

    (z − y)². Source: Legendre 1805, "Nouvelles méthodes pour la détermination des orbites des comètes".

    >>> MeanSquaredError()(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]))
    tensor(2.5000)
    """

    name, element_kind, target = "mean_squared_error", 2, "elements"

    @staticmethod
    def element_formula(z: Tensor, y: Tensor, parameter: float, weight: Any, pos_weight: Any) -> Tensor:
        square = (z - y).square()
        return square * weight if parameter != 0.0 else square  # weighted in torch's function only


class MeanAbsoluteError(Term):
    """``F.l1_loss(prediction, y)``

    ``|z − y|``; its subgradient at 0 is 0. Source: Laplace 1793, "Sur quelques points du système du monde".

    >>> MeanAbsoluteError()(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]))
    tensor(1.5000)
    """

    name, element_kind, target = "mean_absolute_error", 3, "elements"

    @staticmethod
    def element_formula(z: Tensor, y: Tensor, parameter: float, weight: Any, pos_weight: Any) -> Tensor:
        return (z - y).abs()


class Huber(Term):
    """``F.huber_loss(prediction, y, delta=delta)``

    ½ d² for d = z − y within ±δ, and ``δ (|d| − ½ δ)`` beyond: outliers pull no harder than δ.

    Args:
        delta: δ > 0.

    Source: Huber 1964, "Robust Estimation of a Location Parameter".

    >>> Huber(delta=1.0)(torch.tensor([0.5, 3.0]), torch.tensor([0.0, 0.0]), reduction="none")
    tensor([0.1250, 2.5000])
    """

    name, element_kind, target = "huber", 4, "elements"

    def __init__(self, delta: float = 1.0) -> None:
        super().__init__()
        self.parameter = checked_number("delta", delta, 0.0)
        if self.parameter == 0.0:
            raise ValueError("delta: expected a number > 0 but got 0")

    @staticmethod
    def element_formula(z: Tensor, y: Tensor, parameter: float, weight: Any, pos_weight: Any) -> Tensor:
        d = z - y
        size = d.abs()
        return torch.where(size > parameter, parameter * (size - 0.5 * parameter), 0.5 * d.square())

    def _arguments(self) -> str:
        return "" if self.parameter == 1.0 else f"delta={self.parameter!r}"


# ---- a call's arguments ---------------------------------------------------------------------------------------------


class Elements(NamedTuple):
    """A prediction, and what stands beside each of its elements."""

    input: Tensor
    target: Tensor | None  # of the input's shape
    weight: Tensor | None  # broadcasts to it
    pos_weight: Tensor | None
    normalizer: Tensor | None  # 0-dim
    logit_scale: Tensor | None  # 0-dim; None is 1
    softcap: float  # 0 is none
    reduction: str
    empty_zero: bool
    limits: bool  # infinite predictions have the limit as their value; False: torch's number

    @property
    def result_dtype(self) -> torch.dtype:
        return torch.float64 if self.input.dtype == torch.float64 else torch.float32


def checked(
    input: Tensor, target: Tensor | None, weights: tuple[Tensor | None, Tensor | None], *, reduction: str,
    normalizer: float | Tensor | None, logit_scale: float | Tensor, softcap: float | None, empty: str, limits: bool,
) -> Elements:  # fmt: skip
    """The elements of a call, checked; see `Objective.forward` for the meaning of the options."""
    if not isinstance(input, Tensor):
        raise TypeError(f"prediction: expected a tensor but got {describe(input)}")
    check_dense("prediction", input)
    if input.dtype not in DTYPES:
        raise TypeError(f"prediction: expected float32, float64, bfloat16 or float16 but got {describe(input)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction: expected "mean", "sum" or "none" but got {shown(reduction)}')
    if empty not in ("nan", "zero"):
        raise ValueError(f'empty: expected "nan" or "zero" but got {shown(empty)}')
    check_normalizer(normalizer, reduction)
    if target is not None:
        if not isinstance(target, Tensor):
            raise TypeError(f"target: expected a tensor but got {describe(target)}")
        check_dense("target", target)
        if not target.is_floating_point():
            raise TypeError(
                "target: expected floating-point values of the prediction's shape, because a term compares element by "
                f"element, but got {describe(target)}"
            )
        if target.shape != input.shape:
            raise ValueError(
                f"target: expected the prediction's shape {tuple(input.shape)} but got {tuple(target.shape)}"
            )
        check_same_device("target", target, input)
    for name, w in zip(("weight", "pos_weight"), weights, strict=True):
        if w is None:
            continue
        check_dense(name, w)
        check_same_device(name, w, input)
        if not _broadcasts(w.shape, input.shape):
            raise ValueError(
                f"{name}: expected a shape that broadcasts to {tuple(input.shape)} but got {tuple(w.shape)}"
            )
    return Elements(
        input, target, *weights, None if normalizer is None else scalar_tensor("normalizer", normalizer, None, input),
        None
        if type(logit_scale) is float and logit_scale == 1.0
        else scalar_tensor("logit_scale", logit_scale, 1.0, input),
        checked_softcap(softcap), reduction, empty == "zero", limits,
    )  # fmt: skip


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def weights_of(terms: list[tuple[float | Tensor, Term]]) -> tuple[Tensor | None, Tensor | None]:
    """The weights of the one pass."""
    found: list[tuple[Tensor | None, Tensor | None]] = []
    for _, term in terms:
        if not isinstance(term, BinaryCrossEntropy):
            continue
        own = (term.weight, term.pos_weight)
        same = not found or all(
            a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))
            for a, b in zip(own, found[0], strict=True)
        )
        if not same:
            raise ValueError(
                "weight: the binary cross-entropy terms of one objective share weight and pos_weight; evaluate "
                "objectives with different weights separately and add their losses"
            )
        found.append(own)
    return found[0] if found else (None, None)


# ---- the call -------------------------------------------------------------------------------------------------------


def evaluate(
    terms: list[tuple[float | Tensor, Term]], backend: str, elements: Elements, with_gradient: bool, with_parts: bool
) -> tuple[Tensor, Tensor | list[Tensor]]:
    """The loss, and each term's own value if asked for."""
    if with_gradient and elements.reduction == "none":
        raise ValueError(
            'gradient="forward" needs a scalar reduction: with reduction="none" the upstream gradient of each element '
            "is only known in the backward pass"
        )
    for _, term in terms:
        if term.target == "elements" and elements.target is None:
            raise ValueError(f"target: {term._formula_name()} needs one but got None")
    program = ops.Program.of([(coefficient, _Kind(term.element_kind, term.parameter)) for coefficient, term in terms])
    run = ops.backend_for(backend, elements.input)
    if run.family is None:
        return reference(elements, terms)
    return run_family(run.family, elements, program, with_gradient, with_parts)


class _Kind(NamedTuple):
    """A term as a program reads it."""

    kind: int
    parameter: float


def run_family(
    family: str, e: Elements, program: ops.Program, with_gradient: bool, with_parts: bool
) -> tuple[Tensor, Tensor]:
    kernels = getattr(torch.ops, family)
    terms, tensor = program
    if _C is None:
        without_core.refuse_tangents(*e, tensor)
    options: dict[str, Any] = {
        name: value
        for name, value in (
            ("logit_scale", e.logit_scale), ("weight", e.weight), ("pos_weight", e.pos_weight),
            ("coefficient_tensor", tensor), ("normalizer", e.normalizer),
        )
        if value is not None
    }  # fmt: skip
    fuse = with_gradient and torch.is_grad_enabled() and e.input.requires_grad
    op = kernels.elementwise_fused if fuse else kernels.elementwise
    loss, parts, *_ = op.default(
        terms, REDUCTIONS.index(e.reduction), e.input, e.target, **options, softcap=e.softcap, limits=e.limits,
        empty_zero=e.empty_zero, with_parts=with_parts or tensor is not None,
    )  # fmt: skip
    return loss, parts


# ---- the specification ----------------------------------------------------------------------------------------------


def reference(e: Elements, terms: list[tuple[float | Tensor, Any]]) -> tuple[Tensor, list[Tensor]]:
    """In eager torch, differentiable any number of times. A term here has a formula and a parameter."""
    dtype = e.result_dtype
    z = x = e.input.to(dtype)
    if e.logit_scale is not None:
        z = z * e.logit_scale.to(z)
    if e.softcap:
        z = torch.tanh(z / e.softcap) * e.softcap
    if z is not x:  # as of logits, −inf is tested before the scale and the cap
        z = z.masked_fill(x == -torch.inf, -torch.inf)
    y, weight, pos_weight = (
        other if x is None else x.to(dtype) for x, other in ((e.target, 0.0), (e.weight, 1.0), (e.pos_weight, 1.0))
    )
    if not isinstance(y, Tensor):
        y = torch.zeros_like(z)
    parts, loss = [], z.new_zeros(z.shape if e.reduction == "none" else ())
    for coefficient, term in terms:
        value = term.element_formula(z, y, term.parameter, weight, pos_weight)
        if not e.limits and term.element_kind == BinaryCrossEntropy.element_kind:
            value = _torchs_number(value, z, y, term.parameter, weight, pos_weight)
        if e.reduction != "none":
            value = value.sum(dtype=torch.float64)
        if e.normalizer is not None:
            value = value / e.normalizer.detach().to(value)
        elif e.reduction == "mean" and not (e.empty_zero and z.numel() == 0):
            value = value / z.numel() if z.numel() else value * torch.nan
        parts.append(value.to(dtype))
        loss = loss + coefficient * value
    return loss.to(dtype), parts


def _torchs_number(value: Tensor, z: Tensor, y: Tensor, parameter: float, weight: Any, pos_weight: Any) -> Tensor:
    """What torch's formula gives for an infinite prediction: NaN where the limit is 0·∞."""
    y = y * (1.0 - parameter) + 0.5 * parameter
    infinite = z.isinf()
    x = z.masked_fill(~infinite, 0.0)
    number = weight * ((1.0 - y) * x - (1.0 + (pos_weight - 1.0) * y) * F.logsigmoid(x))
    return torch.where(infinite, number, value)


# ---- mixed with terms on rows ---------------------------------------------------------------------------------------


def apart(
    terms: list[tuple[float | Tensor, Term]], reduction: str
) -> tuple[list[tuple[float | Tensor, Term]], list[tuple[float | Tensor, Term]]]:
    """The terms that run on elements, and those that read whole rows: they take a pass of their own, without target."""
    of_elements = [pair for pair in terms if pair[1].element_kind is not None]
    of_rows = [pair for pair in terms if pair[1].element_kind is None]
    for _, term in of_rows:
        first = next(t for _, t in of_elements if t.kind is None)
        if term.target != "none":
            raise ValueError(
                f"target: {first._formula_name()} compares element by element and {term._formula_name()} reads the "
                "class of a row, so they have no target in common; evaluate them separately and add the losses"
            )
        if reduction == "none":
            raise ValueError(
                f'reduction: "none" gives a loss for each element, and {term._formula_name()} has one for each row'
            )
    return of_elements, of_rows
