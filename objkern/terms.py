"""The terms: each a formula on the statistics of a row, in plain arithmetic, with its source.

Every formula has a twin in csrc/objective.h, which adds its partial derivatives; tests hold the two together.
Notation: logits z (after scale and softcap) of V classes, target y, p = softmax(z), natural logarithms.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .batch import Batch, describe, shown
from .objective import RESERVED_PARTS, Term
from .statistics import Statistics

__all__ = [
    "CrossEntropy",
    "Entropy",
    "Focal",
    "GeneralizedCrossEntropy",
    "KLDivergence",
    "LogitL2",
    "Margin",
    "MaxZLoss",
    "Poly1",
    "Unlikelihood",
    "ZLoss",
    "custom",
]


class CrossEntropy(Term):
    """``F.cross_entropy(logits, target, weight=weight, label_smoothing=label_smoothing)``

    −(1 − ε) w_y log p_y − (ε/V) Σ_j w_j log p_j; with probability targets q, −Σ_j w_j q'_j log p_j where
    q' = (1 − ε) q + ε/V. V counts the classes that are not excluded by a logit of −inf.

    Args:
        weight: (V) class weights w, a buffer: moves with ``.to()``, saved in the state dict.
        label_smoothing: ε in [0, 1].

    Source: Szegedy et al. 2015, "Rethinking the Inception Architecture for Computer Vision", for smoothing.

    >>> logits, target = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    >>> CrossEntropy(label_smoothing=0.3)(logits, target)
    tensor(0.7076)
    >>> F.cross_entropy(logits, target, label_smoothing=0.3)
    tensor(0.7076)
    >>> CrossEntropy()(logits, torch.tensor([[0.5, 0.5, 0.0]]))  # probabilities
    tensor(0.9076)
    """

    name, kind, target, reads_class_weight = "cross_entropy", 0, "any", True

    def __init__(self, weight: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.parameter = checked_number("label_smoothing", label_smoothing, 0.0, 1.0)
        if weight is not None and not (isinstance(weight, Tensor) and weight.dim() == 1 and weight.is_floating_point()):
            raise ValueError(f"weight: expected a floating-point tensor of shape (V,) but got {describe(weight)}")
        self.register_buffer("weight", weight)

    @staticmethod
    def formula(s: Statistics, parameter: float, weight: Tensor | float) -> Tensor:
        hard = -(1.0 - parameter) * weight * s.logprob
        return hard - parameter * s.mean_logprob if parameter != 0.0 else hard

    def _arguments(self) -> str:
        weight = "" if self.weight is None else f"weight=<tensor of {self.weight.numel()}>"
        smoothing = f"label_smoothing={self.parameter!r}" if self.parameter else ""
        return ", ".join(filter(None, (weight, smoothing)))


class ZLoss(Term):
    """``logits.logsumexp(-1).square()``

    lse², lse = log Σ exp z_j: keeps the normaliser near 1. Source: Chowdhery et al. 2022, "PaLM", section 5.

    >>> ZLoss()(torch.tensor([[2.0, 1.0, 0.0]]))  # lse = 2.4076
    tensor(5.7966)
    """

    name, kind = "z_loss", 1

    @staticmethod
    def formula(s: Statistics, parameter: float, weight: Tensor | float) -> Tensor:
        return s.lse * s.lse


class MaxZLoss(Term):
    """``logits.amax(-1).square()``

    (max_j z_j)²; the gradient goes to the first maximum. Source: Yang et al. 2023, "Baichuan 2", section 2.

    >>> MaxZLoss()(torch.tensor([[2.0, 1.0, 0.0], [-3.0, -3.0, -5.0]]), reduction="none")
    tensor([4., 9.])
    """

    name, kind = "max_z_loss", 2

    @staticmethod
    def formula(s: Statistics, parameter: float, weight: Tensor | float) -> Tensor:
        return s.max_logit * s.max_logit


class Entropy(Term):
    """``torch.distributions.Categorical(logits=logits).entropy()``

    H(p) = lse − Σ p_j z_j. Subtract it for the confidence penalty. Source: Pereyra et al. 2017, "Regularizing Neural
    Networks by Penalizing Confident Output Distributions".

    >>> Entropy()(torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), reduction="none")  # at most log V
    tensor([0.8324, 1.0986])
    >>> CrossEntropy() - 0.1 * Entropy()  # the confidence penalty
    CrossEntropy() - 0.1*Entropy()
    """

    name, kind = "entropy", 3

    @staticmethod
    def formula(s: Statistics, parameter: float, weight: Tensor | float) -> Tensor:
        return s.entropy


class Focal(Term):
    """``-(1 - p_y) ** gamma * p_y.log()``

    −(1 − p_y)^γ log p_y: easy rows count less. γ = 0 is cross-entropy.

    Args:
        gamma: γ ≥ 0.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection".

    >>> logits, target = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    >>> [round(Focal(gamma)(logits, target).item(), 4) for gamma in (0.0, 1.0, 2.0)]
    [0.4076, 0.1364, 0.0457]
    """

    name, kind, target = "focal", 4, "index"

    def __init__(self, gamma: float) -> None:
        super().__init__()
        self.parameter = checked_number("gamma", gamma, 0.0)

    @staticmethod
    def formula(s: Statistics, parameter: float, weight: Tensor | float) -> Tensor:
        if parameter == 0.0:
            return -s.logprob
        # (1 − p_y)^γ as exp(γ log(1 − p_y)) keeps its digits where p_y rounds to 1; where it is 0, so is the value.
        focus = torch.exp(parameter * s.other_logprob)
        return -torch.where(focus == 0, focus, focus * s.logprob)

    def _arguments(self) -> str:
        return f"gamma={self.parameter!r}"


class Poly1(Term):
    """``-p_y.log() + epsilon * (1 - p_y)``

    −log p_y + ε (1 − p_y): cross-entropy with the first coefficient of its Taylor series in 1 − p_y changed by ε.

    Args:
        epsilon: ε, any number; the paper uses −1 to 5.

    Source: Leng et al. 2022, "PolyLoss".

    >>> logits, target = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    >>> Poly1(epsilon=1.0)(logits, target)  # 0.4076 + (1 − 0.6652)
    tensor(0.7424)
    """

    name, kind, target = "poly1", 5, "index"

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.parameter = checked_number("epsilon", epsilon)

    @staticmethod
    def formula(s: Statistics, parameter: float, weight: Tensor | float) -> Tensor:
        return parameter * torch.exp(s.other_logprob) - s.logprob

    def _arguments(self) -> str:
        return f"epsilon={self.parameter!r}"


class GeneralizedCrossEntropy(Term):
    """``(1 - p_y ** q) / q``

    Between cross-entropy (q → 0) and mean absolute error (q = 1): robust to wrong labels.

    Args:
        q: 0 < q ≤ 1.

    Source: Zhang and Sabuncu 2018, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy
    Labels".

    >>> logits, target = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    >>> [round(GeneralizedCrossEntropy(q)(logits, target).item(), 4) for q in (1.0, 0.5, 0.001)]
    [0.3348, 0.3688, 0.4075]
    """

    name, kind, target = "generalized_cross_entropy", 6, "index"

    def __init__(self, q: float) -> None:
        super().__init__()
        self.parameter = checked_number("q", q, 0.0, 1.0)
        if self.parameter == 0.0:
            raise ValueError("q: expected 0 < q <= 1 but got 0; the limit is CrossEntropy()")

    @staticmethod
    def formula(s: Statistics, parameter: float, weight: Tensor | float) -> Tensor:
        return -torch.expm1(parameter * s.logprob) / parameter

    def _arguments(self) -> str:
        return f"q={self.parameter!r}"


class Unlikelihood(Term):
    """``-(1 - p_y).log()``

    Makes the target less likely. Source: Welleck et al. 2019, "Neural Text Generation with Unlikelihood Training".

    >>> logits, target = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    >>> Unlikelihood()(logits, target)
    tensor(1.0943)
    """

    name, kind, target = "unlikelihood", 7, "index"

    @staticmethod
    def formula(s: Statistics, parameter: float, weight: Tensor | float) -> Tensor:
        return -s.other_logprob


class Margin(Term):
    """``F.cross_entropy(logits - m * F.one_hot(target, V), target)``

    Cross-entropy with z_y − m in place of z_y; the margin applies after scale and softcap:
    softplus(d + m), d = log((1 − p_y) / p_y).

    Args:
        m: the margin, in logits.

    Source: Wang et al. 2018, "Additive Margin Softmax for Face Verification".

    >>> logits, target = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    >>> Margin(m=0.5)(logits, target)
    tensor(0.6041)
    >>> CrossEntropy()(torch.tensor([[1.5, 1.0, 0.0]]), target)
    tensor(0.6041)
    """

    name, kind, target = "margin", 8, "index"

    def __init__(self, m: float) -> None:
        super().__init__()
        self.parameter = checked_number("m", m)

    @staticmethod
    def formula(s: Statistics, parameter: float, weight: Tensor | float) -> Tensor:
        return -torch.nn.functional.logsigmoid(s.logprob - s.other_logprob - parameter)

    def _arguments(self) -> str:
        return f"m={self.parameter!r}"


class LogitL2(Term):
    """``logits.square().mean(-1)``

    Σ_j z_j² / V: keeps the logits small, their common offset included. V counts the classes that are not excluded.
    Source: the L2 activity regularizer, on logits as in Dauphin and Cubuk 2021, "Deconstructing the Regularization of
    BatchNorm".

    >>> LogitL2()(torch.tensor([[2.0, 1.0, 0.0]]))
    tensor(1.6667)
    """

    name, kind, element_kind = "logit_l2", 9, 5

    @staticmethod
    def formula(s: Statistics, parameter: float, weight: Tensor | float) -> Tensor:
        return s.mean_square_logit

    @staticmethod
    def element_formula(z: Tensor, y: Tensor, parameter: float, weight: Any, pos_weight: Any) -> Tensor:
        return z.square()


class KLDivergence(Term):
    """``T**2 * F.kl_div((logits / T).log_softmax(-1), (reference / T).softmax(-1), reduction="none").sum(-1)``

    "forward": T² KL(q ‖ p) = T² Σ q_j (log q_j − log p_j), "reverse": T² KL(p ‖ q), with p = softmax(z/T) and q =
    softmax(r/T) of the logits r that the call gives as ``reference``, over the classes that z does not exclude. T²
    keeps the size of the gradient where T grows. Accumulated as differences: 1e-6 keeps its sign and its digits.

    Args:
        direction: "forward" (the reference teaches; p covers all that q does) or "reverse" (p stays where q is).
        temperature: T in [1e-6, 1e6], the same for all such terms of an objective.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; Gu et al. 2023, "MiniLLM", for reverse.

    >>> logits, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    >>> KLDivergence("forward", temperature=2.0)(logits, reference=teacher)
    tensor(0.1217)
    >>> KLDivergence("reverse", temperature=2.0)(logits, reference=teacher)
    tensor(0.1240)
    >>> distilled = CrossEntropy() + 0.5 * KLDivergence(temperature=2.0)
    >>> distilled(logits, torch.tensor([0]), reference=teacher)
    tensor(0.4685)
    """

    name, kind, reads_reference = "kl_divergence", 10, True

    def __new__(cls, direction: str = "forward", temperature: float = 1.0) -> KLDivergence:
        return super().__new__(_ReverseKL if cls is KLDivergence and direction == "reverse" else cls)

    def __init__(self, direction: str = "forward", temperature: float = 1.0) -> None:
        super().__init__()
        if direction not in ("forward", "reverse"):
            raise ValueError(f'direction: expected "forward" or "reverse" but got {shown(direction)}')
        self.direction = direction
        self.parameter = checked_temperature(temperature)

    @staticmethod
    def formula(s: Statistics, parameter: float, weight: Tensor | float) -> Tensor:
        return parameter**2 * s.forward_kl

    def _arguments(self) -> str:
        return f"{self.direction!r}" + (f", temperature={self.parameter!r}" if self.parameter != 1.0 else "")

    def _formula_name(self) -> str:
        return f"KLDivergence({self._arguments()})"


class _ReverseKL(KLDivergence):
    """The other direction, which to the kernels is a term of its own."""

    kind = 11

    @staticmethod
    def formula(s: Statistics, parameter: float, weight: Tensor | float) -> Tensor:
        return parameter**2 * s.reverse_kl


def checked_temperature(value: float) -> float:
    return checked_number("temperature", value, 1e-6, 1e6)


class Custom(Term):
    """A term of your own; see `custom`."""

    def __init__(self, fn: Callable[..., Tensor], needs: Sequence[str] | None = None, name: str | None = None) -> None:
        super().__init__()
        if not callable(fn):
            raise TypeError(f"fn: expected a function of the row statistics but got {describe(fn)}")
        if needs is not None and (
            not isinstance(needs, (list, tuple, set, frozenset)) or not all(isinstance(need, str) for need in needs)
        ):
            raise TypeError(f"needs: expected names of statistics or None but got {describe(needs)}")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name: expected a string or None but got {describe(name)}")
        unknown = sorted(set(needs or ()) - set(Statistics._fields))
        if unknown:
            raise ValueError(f"needs: {unknown} are not among the statistics {', '.join(Statistics._fields)}")
        self.fn = fn
        self.needs = None if needs is None else tuple(needs)
        self.name = name or _snake_case(getattr(fn, "__name__", type(fn).__name__))
        if self.name in RESERVED_PARTS:
            raise ValueError(f"name: {self.name!r} is a part of every call; give the term another name")
        self.required_rows, self._optional_rows = _arguments_after_first(fn)
        self.reads_reference = bool(self.needs) and bool({"forward_kl", "reverse_kl"} & set(self.needs))
        if self.needs is not None and {"logprob", "other_logprob", "target_logit"} & set(self.needs):
            self.target = "index" if {"other_logprob", "target_logit"} & set(self.needs) else "any"

    def reads_row(self, name: str) -> bool:
        return self._optional_rows is None or name in self.required_rows or name in self._optional_rows

    def value(self, s: Statistics, batch: Batch) -> Tensor:
        visible = s if batch.target is not None else s._replace(logprob=None, other_logprob=None, target_logit=None)
        if batch.dense:
            visible = visible._replace(other_logprob=None, target_logit=None)
        dtype = batch.result_dtype
        visible = visible.each(lambda field: field.to(dtype, copy=True))  # the function may write to them
        try:
            value = self.fn(visible, **{name: row for name, row in batch.rows.items() if self.reads_row(name)})
        except (TypeError, AttributeError) as error:
            missing = [] if batch.target is not None else ["target"]
            missing += ["class labels (int64) as target"] if batch.dense else []
            missing += [] if batch.reference is not None else ["reference"]
            if missing and "None" in str(error):
                raise ValueError(
                    f"{' or '.join(missing)}: {self._formula_name()} reads statistics that are None without: {error}"
                ) from error
            raise
        if not isinstance(value, Tensor) or value.shape != s.lse.shape or value.is_complex():
            raise ValueError(
                f"{self._formula_name()}: expected one real value per row, a tensor of shape {tuple(s.lse.shape)}, "
                f"but got {describe(value)}"
                + ("; statistics of a target or a reference are None without" if value is None else "")
            )
        return value

    def _arguments(self) -> str:
        return f"<function {self.name}>"

    def _formula_name(self) -> str:
        return f"custom({self._arguments()})"


def _arguments_after_first(fn: Callable[..., Tensor]) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Names of the arguments that have to be given by keyword, and of those that may be; None: whatever is given."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (ValueError, TypeError):  # of a built-in function Python may know nothing
        return (), None
    named = [p for p in parameters[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = tuple(p.name for p in named if p.default is p.empty)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return required, None
    return required, tuple(p.name for p in named if p.default is not p.empty)


def custom(fn: Callable[..., Tensor], needs: Sequence[str] | None = None, name: str | None = None) -> Custom:
    """``fn(objkern.row_statistics(logits, target), **rows)``

    A term from any differentiable function of the statistics of a row; it runs through the same two kernels as the
    built-in terms, its derivative comes from autograd on one number per row.

    Args:
        fn: ``fn(stats, **rows) -> (N,)``, one value per row; must not mix rows. `stats` is a `Statistics`, `rows` those
            of the per-row tensors given to the call that it has arguments for, flattened to (N,).
        needs: names of the statistics that `fn` reads; lets a call without target fail early, by name.
        name: the key in ``parts``; the function's own name by default.

    Raises:
        TypeError, ValueError: when it is made, of what is no function, statistic or free name; when it is called, of a
            value that is not one number per row, or without what `fn` reads.

    >>> def reinforce(s, advantage):
    ...     return -advantage * s.logprob
    >>> logits, target = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 2])
    >>> objective = custom(reinforce, needs=["logprob"]) - 0.01 * Entropy()
    >>> loss, parts = objective(logits, target, rows={"advantage": torch.tensor([1.0, -1.0])}, return_parts=True)
    >>> parts["reinforce"]
    tensor(-0.5719)
    """
    return Custom(fn, needs, name)


def checked_number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number but got {describe(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and low <= number <= high):
        bounds = f"in [{low}, {high}]" if math.isfinite(high) else f">= {low}" if math.isfinite(low) else "finite"
        raise ValueError(f"{name}: expected a number {bounds} but got {shown(value)}")
    return number


def _snake_case(name: str) -> str:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return "custom" if name == "<lambda>" else re.sub(r"\W+", "_", words).strip("_") or "custom"
