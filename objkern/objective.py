"""The Objective and its algebra: a sum of weighted terms that is computed in one pass over the logits."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from . import distributed, linear, ops
from .batch import Batch, check_validate, describe, flatten, shown
from .reference import FREE_STATISTICS, evaluate
from .statistics import Statistics

# The names in parts that no term may take.
RESERVED_PARTS = ("total", "rows", *FREE_STATISTICS)


class Coefficient(NamedTuple):
    """A number times 0-dim tensors. The product is taken at every call, so that tensors may change in between."""

    number: float
    tensors: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, value: Any) -> Coefficient:
        if isinstance(value, Tensor):
            if value.dim() != 0 or not value.is_floating_point():
                raise ValueError(
                    f"coefficient: expected a number or a 0-dim floating-point tensor but got {describe(value)}"
                )
            return cls(1.0, (value,))
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"coefficient: expected a number or a 0-dim tensor but got {describe(value)}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ValueError(f"coefficient: expected a finite number but got {describe(value)}")
        return cls(number)

    def times(self, other: Coefficient) -> Coefficient:
        return Coefficient.of(self.number * other.number)._replace(tensors=self.tensors + other.tensors)


class Objective(nn.Module):
    """A weighted sum of terms, evaluated as one fused forward and backward pass.

    ``objective(logits, target)`` equals ``sum(c * term(logits, target) for c, term in objective.weighted_terms)``.

    Built with ``+``, ``-`` and scalar ``*``, also of objectives. It is an ``nn.Module``; its ``repr`` reads like the
    formula, and `parse` reads that back where all terms are made of numbers.

    A coefficient is a number or a 0-dim tensor. A tensor is read at every call, so a schedule may update it in place;
    one that requires grad receives its gradient. ``nn.Parameter`` coefficients are registered with the module, other
    tensors stay the caller's own.

    >>> objective = CrossEntropy(label_smoothing=0.1) + 1e-4 * ZLoss() - 0.01 * Entropy()
    >>> objective
    CrossEntropy(label_smoothing=0.1) + 0.0001*ZLoss() - 0.01*Entropy()
    >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
    >>> loss = objective(logits, torch.tensor([0, 2]))
    >>> loss.backward()
    >>> logits.grad
    tensor([[-0.1325,  0.1051,  0.0277],
            [ 0.0887,  0.2727, -0.3613]])
    >>> strength = torch.tensor(0.01)  # for a schedule
    >>> CrossEntropy() - strength * Entropy()
    CrossEntropy() - <tensor>*Entropy()
    """

    # (number, tensors or names of parameters, term) of each summand
    _summands: list[tuple[float, tuple[str | Tensor, ...], Term]]

    def __init__(self, terms: Iterable[tuple[Coefficient, Term]] = ()) -> None:
        super().__init__()
        terms = list(terms)
        self._terms = nn.ModuleList(term for _, term in terms)
        # A parameter is kept by its name, so that whoever replaces it in the module replaces it here.
        names: dict[int, str] = {}
        for coefficient, _ in terms:
            for tensor in coefficient.tensors:
                if isinstance(tensor, nn.Parameter) and id(tensor) not in names:
                    names[id(tensor)] = f"coefficient_{len(names)}"
                    self.register_parameter(names[id(tensor)], tensor)
        self._summands = [
            (coefficient.number, tuple(names.get(id(tensor), tensor) for tensor in coefficient.tensors), term)
            for coefficient, term in terms
        ]
        self._penalized = any(term.about_parameters for _, term in terms)
        self._elementwise = any(term._elementwise for _, term in terms)

    def _factors(self, factors: tuple[str | Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f) if isinstance(f, str) else f for f in factors)

    def _sum(self) -> list[tuple[Coefficient, Term]]:
        return [(Coefficient(number, self._factors(factors)), term) for number, factors, term in self._summands]

    @property
    def weighted_terms(self) -> list[tuple[float | Tensor, Term]]:
        """The terms in order, each with the present value of its coefficient.

        >>> (2 * CrossEntropy() - 0.1 * Entropy()).weighted_terms
        [(2.0, CrossEntropy()), (-0.1, Entropy())]
        """
        return [
            (math.prod(self._factors(factors), start=number) if factors else number, term)
            for number, factors, term in self._summands
        ]

    # ---- algebra ----------------------------------------------------------------------------------------------------

    def __add__(self, other: Objective) -> Objective:
        if not isinstance(other, Objective):
            return NotImplemented
        return Objective(self._sum() + other._sum())

    def __radd__(self, other: Any) -> Objective:
        # sum([a, b]) starts from the number 0.
        return self if isinstance(other, numbers.Real) and other == 0 else NotImplemented

    def __mul__(self, factor: float | Tensor) -> Objective:
        if not isinstance(factor, (numbers.Real, Tensor)):
            return NotImplemented
        return Objective((Coefficient.of(factor).times(coefficient), term) for coefficient, term in self._sum())

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Objective:
        if not isinstance(divisor, numbers.Real):
            raise TypeError(f"divisor: expected a number but got {describe(divisor)}; multiply by a tensor instead")
        return self * (1.0 / divisor)

    def __neg__(self) -> Objective:
        return self * -1.0

    def __sub__(self, other: Objective) -> Objective:
        return self + -other if isinstance(other, Objective) else NotImplemented

    def __repr__(self) -> str:
        text = ""
        for (number, tensors), term in self._sum():
            negative = math.copysign(1.0, number) < 0
            sign = (" - " if negative else " + ") if text else ("-" if negative else "")
            factor = "" if abs(number) == 1 else f"{abs(number)!r}*"
            text += sign + factor + "<tensor>*" * len(tensors) + term._formula_name()
        return text

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def forward(
        self,
        logits: Tensor | None = None,
        target: Tensor | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        normalizer: float | Tensor | None = None,
        logit_scale: float | Tensor = 1.0,
        softcap: float | None = None,
        reference: Tensor | None = None,
        rows: dict[str, Tensor] | None = None,
        shift: int = 0,
        class_dim: int = -1,
        gradient: str = "backward",
        empty: str = "nan",
        parameter_weight: float | Tensor = 1.0,
        return_parts: bool = False,
        process_group: Any = None,
        validate: bool | None = None,
        backend: str = "auto",
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """``sum(c * reduce(term(z, target)) for c, term in terms)`` with ``z = cap * tanh(scale * logits / cap)``.

        Args:
            logits: (..., V), or (N, V, d1, ...) with ``class_dim=1``; float32, float64, bfloat16 or float16. Never
                written to. A logit of −inf excludes its class: no probability, nothing added to any statistic.
            target: class labels int64 of the shape of ``logits`` without the class dimension, or probabilities of the
                shape of ``logits``. May be left out if no term reads it, as may the logits if all terms are about
                parameters.
            reduction: "mean" divides cross-entropy by the sum of its labels' class weights and every other term by
                the number of rows that count; "sum"; "none" gives a loss per row.
            ignore_index: rows with this label contribute nothing to any term.
            normalizer: replaces every denominator of the mean; a number or 0-dim tensor, a constant.
            logit_scale: s, a number or 0-dim tensor; receives its gradient if it requires one.
            softcap: c > 0; applied after the scale.
            reference: logits of another model, or of another pass, for `KLDivergence` and custom terms: of the shape
                of ``logits``, any floating-point dtype, taken as they are, without scale and cap. One that requires
                grad receives its gradient, by way of eager torch.
            rows: per-row tensors for custom terms, by name, each of the target's shape.
            shift: 1 for causal language models: position t of the logits meets target t + 1 (second to last
                dimension of the logits); the last position is ignored. Nothing is copied.
            gradient: "backward" reads the logits again in the backward pass; "forward" computes the gradient with the
                loss, which reads memory once less and holds a gradient-sized buffer until the backward pass. Scalar
                reductions only.
            empty: the mean over no rows: "nan" as in torch, or "zero".
            parameter_weight: multiplies the terms on parameters, which are added once per call, whatever reduction and
                normalizer; 1/k where k calls are accumulated into one step.
            return_parts: also return a dict of detached tensors: each term's own reduced value before its coefficient
                (`cross_entropy`, `z_loss`, a second one of a kind `z_loss_2`), `total`, and the means over the rows
                that count of `lse`, and with class labels `accuracy` and `target_probability`; `rows` is their number.
                With ``reduction="none"`` each is one number per row.
            process_group: of torch.distributed, whose ranks hold a part of the classes each, of the same rows: the
                order of the ranks is that of the classes, and parts may differ in size. Labels and class weights are
                those of all classes, probabilities and reference those of the rank's own. Every rank returns the same
                loss, and the gradient of it by its own logits. DTensors that are sharded by class say this by
                themselves. See `objkern.distributed`.
            validate: whether bad labels raise on devices where finding out costs a synchronisation (on the CPU they
                always do). Default: see `objkern.set_validation`. Where they do not raise, their rows' loss is NaN.
            backend: "auto" (the kernels of the device: on a GPU "cuda", else "triton"), "cpu", "cuda", "triton", or
                "reference" (eager torch, any device). One asked for by name that cannot run raises a ValueError.

        Returns:
            The loss, float32 (float64 for float64 logits), 0-dim or of the target's shape for ``reduction="none"``.

        Raises:
            IndexError: a label outside [0, V) that is not ``ignore_index``; names the row and the label.
            ValueError, TypeError: names the argument, what was expected and what came.

        >>> objective = CrossEntropy() + 1e-4 * ZLoss()
        >>> logits, target = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([0, -100])
        >>> loss, parts = objective(logits, target, return_parts=True)
        >>> {name: round(parts[name].item(), 4) for name in ("cross_entropy", "z_loss", "total", "accuracy", "rows")}
        {'cross_entropy': 0.4076, 'z_loss': 5.7966, 'total': 0.4082, 'accuracy': 1.0, 'rows': 1.0}
        >>> objective(logits, torch.tensor([0, 3]))
        Traceback (most recent call last):
        IndexError: target: row 1 holds label 3, which is neither in [0, 3) nor ignore_index (-100) ...
        """
        try:
            terms, penalties = self.weighted_terms, None
            if self._penalized:
                terms, penalties = _apart(terms, reduction, parameter_weight)
                if not terms:
                    return self._result(None, [], None, return_parts, penalties)
            if self._elementwise:
                _check_elementwise_options(ignore_index, rows, shift, validate, reference)
                if process_group is not None or distributed.is_dtensor(logits, target):
                    raise NotImplementedError(
                        "process_group: terms that compare element by element have no classes that ranks could share; "
                        'give each rank its own elements with reduction="sum" and a normalizer, and add the losses up'
                    )
                loss, parts = _evaluate_elements(
                    terms, logits, target, gradient, return_parts, backend, reduction=reduction, normalizer=normalizer,
                    logit_scale=logit_scale, softcap=softcap, empty=empty, class_dim=class_dim,
                )  # fmt: skip
                return self._result(loss, parts, None, return_parts, penalties)
            class_weight = _class_weight(terms)
            program = ops.Program.of(terms)
            at = None
            if process_group is not None or distributed.is_dtensor(logits):
                at, logits, target, reference = distributed.of_logits(
                    logits, target, reference, process_group, class_dim
                )
            if class_weight is None and at is None:
                loss = ops.default_call(program, logits, target, (
                    reduction, ignore_index, normalizer, logit_scale, softcap, reference, rows, shift, class_dim,
                    gradient, empty, parameter_weight, return_parts, process_group, validate, backend,
                ), _DEFAULTS)  # fmt: skip
                if loss is not None:
                    return loss if penalties is None else loss + penalties.total()
            batch = flatten(
                logits, target, reduction=reduction, ignore_index=ignore_index, normalizer=normalizer,
                logit_scale=logit_scale, softcap=softcap, rows=rows, shift=shift, class_dim=class_dim, empty=empty,
                validate=validate, class_weight=class_weight, reference=reference, temperature=_temperature(terms),
                part=at is not None,
            )  # fmt: skip
            if gradient not in GRADIENTS:
                raise ValueError(f'gradient: expected "backward" or "forward" but got {shown(gradient)}')
            built_in = _check_call(
                terms, batch, return_parts, "gradient" if gradient == "forward" else None, reference is not None
            )
            run, first_maximum = ops.backend_for(backend, batch.logits), None
            if at is not None:
                built_in = False
                statistics, first_maximum = distributed.statistics(run, at, batch, in_forward=gradient == "forward")
            elif built_in:
                loss, parts = run.objective(batch, program, gradient == "forward", return_parts)
            else:
                statistics = run.statistics(batch)
        except (ValueError, TypeError, NotImplementedError, IndexError) as error:
            raise _located(error, f"{self!r} on logits", logits, shift) from None
        if not built_in:
            loss, parts = evaluate(statistics, batch, terms, first_maximum)
        return self._result(loss, parts, batch, return_parts, penalties)

    def linear(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
        normalizer: float | Tensor | None = None,
        logit_scale: float | Tensor = 1.0,
        softcap: float | None = None,
        reference: Tensor | tuple[Tensor, ...] | None = None,
        rows: dict[str, Tensor] | None = None,
        shift: int = 0,
        gradient: str = "backward",
        empty: str = "nan",
        parameter_weight: float | Tensor = 1.0,
        return_parts: bool = False,
        process_group: Any = None,
        validate: bool | None = None,
        backend: str = "auto",
        mode: str = "auto",
        chunk_rows: int | None = None,
        memory_budget: int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """``objective(torch.nn.functional.linear(hidden, weight, bias), target)``, the logits never materialised

        Logits exist a chunk of rows at a time, in float32 (float64 for float64 inputs), also where hidden states and
        weight are half precision: as accurate as ``F.linear(hidden.float(), weight.float())``. In the place of a
        model's own head, mind what else that head does: a bias, a scale or a cap of the logits.

        Args:
            hidden: (..., D) float32, float64, bfloat16 or float16. Under autocast it, weight and bias are cast as
                those of F.linear.
            weight: (V, D) of hidden's dtype; a frozen one gets no gradient, and no memory for it.
            target: as in `forward`, for logits of shape (..., V).
            bias: (V) of hidden's dtype.
            reduction: "mean" divides cross-entropy by the sum of its labels' class weights and every other term by
                the number of rows that count; "sum"; "none" gives a loss per row.
            ignore_index: rows with this label contribute nothing to any term.
            normalizer: replaces every denominator of the mean; a number or 0-dim tensor, a constant.
            logit_scale: s, a number or 0-dim tensor; receives its gradient if it requires one.
            softcap: c > 0; logits become c·tanh(s·logits / c).
            reference: as in `forward`, or (hidden, weight) or (hidden, weight, bias) of another model's last layer,
                (..., E), (V, E) and (V), whose logits exist a chunk at a time too, and go through the scale and the cap
                of this call.
            rows: per-row tensors for custom terms, by name, each of the target's shape.
            shift: 1 for causal language models: position t of the hidden states meets target t + 1; the last position
                is ignored. Nothing is copied.
            gradient: "forward" is another word for ``mode="forward"``.
            mode: "forward" makes the gradients with the loss, a chunk at a time, and holds them until the backward
                pass: three GEMMs in all; for scalar reductions of built-in terms. "recompute" projects each chunk once
                more in the backward pass: four GEMMs, no memory between the passes, any upstream gradient. "auto" takes
                "forward" where it can: not for ``reduction="none"``, custom terms, or a logit scale that learns.
            process_group: of torch.distributed, whose ranks hold the weight and bias of some classes each, and the same
                hidden states; see `forward`. Every rank's hidden states get the whole gradient. ``mode="recompute"``.
            chunk_rows: rows of a chunk; by default a function of shape and device, `objkern.linear.choose_chunk_rows`.
            memory_budget: bytes that a chunk's logits and their gradient may take, in the place of `chunk_rows`; one
                row at least. It makes chunks smaller than the default, never larger, and does not count the gradients
                of hidden states and weight.
            empty, parameter_weight, return_parts, validate, backend: as in `forward`. "reference" is eager torch,
                which does materialise the logits.

        Returns:
            The loss, float32 (float64 for float64 inputs), and the parts if asked for, as `forward`.

        Raises:
            ValueError: also for ``mode="forward"`` where gradients are only known in the backward pass.
            IndexError, TypeError: as `forward`.

        Second derivatives, and those of a probability target, are taken through eager torch with all logits at once.

        >>> hidden, weight = torch.eye(2, requires_grad=True), torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
        >>> objective = CrossEntropy() + 1e-4 * ZLoss()
        >>> loss = objective.linear(hidden, weight, torch.tensor([0, 2]))
        >>> loss.backward()
        >>> round(loss.item(), 4), round(objective(hidden @ weight.T, torch.tensor([0, 2])).item(), 4)
        (0.9799, 0.9799)
        >>> hidden.grad
        tensor([[-0.2120,  0.1224],
                [ 0.5002,  0.2881]])
        """
        try:
            if self._elementwise:
                raise NotImplementedError(
                    "linear: terms that compare element by element are not fused with the linear layer; use "
                    "objective(F.linear(hidden, weight, bias), target)"
                )
            if mode not in linear.MODES:
                raise ValueError(f'mode: expected "auto", "forward" or "recompute" but got {shown(mode)}')
            if gradient == "forward":
                if mode == "recompute":
                    raise ValueError('gradient="forward" contradicts mode="recompute"')
                mode = "forward"
            terms, penalties = self.weighted_terms, None
            if self._penalized:
                terms, penalties = _apart(terms, reduction, parameter_weight)
                if not terms:
                    return self._result(None, [], None, return_parts, penalties)
            at, reduces = None, True
            if process_group is not None or distributed.is_dtensor(hidden, weight):
                at, reduces, (hidden, weight, bias), target, reference = distributed.of_layer(
                    hidden, weight, bias, target, reference, process_group
                )
            part = at is not None
            layer, proxy = linear.layer(hidden, weight, bias, chunk_rows, memory_budget, part)
            of_head = reference is not None and not isinstance(reference, Tensor)
            batch = flatten(
                proxy, target, reduction=reduction, ignore_index=ignore_index, normalizer=normalizer,
                logit_scale=logit_scale, softcap=softcap, rows=rows, shift=shift, empty=empty, validate=validate,
                class_weight=_class_weight(terms), reference=None if of_head else reference,
                temperature=_temperature(terms), part=part,
            )  # fmt: skip
            if of_head:
                layer, batch = linear.with_reference(layer, batch, reference)
            if gradient not in GRADIENTS:
                raise ValueError(f'gradient: expected "backward" or "forward" but got {shown(gradient)}')
            built_in = _check_call(
                terms, batch, return_parts, "mode" if mode == "forward" else None, reference is not None
            )
            run = ops.backend_for(backend, proxy)
            if at is not None:
                built_in = False
                statistics, first_maximum = distributed.statistics(
                    run, at, batch, layer, reduces, in_forward=mode == "forward"
                )
            elif built_in:
                linear.check_mode(mode, batch)
                loss, parts = linear.objective(run, layer, batch, ops.Program.of(terms), mode, return_parts)
            else:
                statistics, first_maximum = linear.statistics(run, layer, batch)
        except (ValueError, TypeError, NotImplementedError, IndexError) as error:
            name = repr(self) if isinstance(self, Term) else f"({self!r})"
            raise _located(error, f"{name}.linear on hidden states", hidden, shift) from None
        if not built_in:
            loss, parts = evaluate(statistics, batch, terms, first_maximum)
        return self._result(loss, parts, batch, return_parts, penalties)

    def accumulate_(self, weight: float | Tensor = 1.0) -> None:
        """``(weight * objective()).backward()`` for terms on parameters alone, without a graph

        Adds their gradient to `.grad` in one pass over each parameter, and makes it where there is none.

        Raises:
            ValueError: the objective has a term on logits, which would be left out; a coefficient that requires grad,
                which would get none.

        >>> theta = torch.tensor([3.0, -4.0], requires_grad=True)
        >>> (0.1 * L2([theta]) + 0.01 * L1([theta])).accumulate_()
        >>> theta.grad
        tensor([ 0.3100, -0.4100])
        """
        for _, term in self.weighted_terms:
            if not term.about_parameters:
                raise ValueError(f"accumulate_: {term._formula_name()} is not about parameters")
        weight = checked_weight("weight", weight)
        for x in (weight, *(coefficient for coefficient, _ in self.weighted_terms)):
            if isinstance(x, Tensor) and x.requires_grad:
                raise ValueError(
                    "accumulate_: a coefficient or weight that requires grad would get none; call objective() and "
                    "backward(), or detach it"
                )
        for coefficient, term in self.weighted_terms:
            term.accumulate_(weight * coefficient)

    def _result(
        self, loss: Tensor | None, parts: Tensor | list[Tensor], batch: Batch | None, return_parts: bool,
        penalties: _Penalties | None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        of_parameters: list[Tensor] = []
        if penalties is not None:
            total = penalties.total()
            loss, of_parameters = total if loss is None else loss + total, penalties.values
        if batch is not None and batch.reduction == "none" and len(batch.shape) != 1:
            loss = loss.view(batch.shape)
        if not return_parts:
            return loss
        # Cloned: autograd may have kept them, and a logger may add to them in place.
        parts, of_parameters = ([part.detach().clone() for part in some] for some in (parts, of_parameters))
        return loss, self._named_parts(loss, parts, of_parameters, batch)

    def _named_parts(
        self, loss: Tensor, parts: list[Tensor], of_parameters: list[Tensor], batch: Batch | None
    ) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        of_rows, of_parameters = iter(parts), iter(of_parameters)
        for _, _, term in self._summands:
            name, count = term.name, 2
            while name in named:
                name, count = f"{term.name}_{count}", count + 1
            named[name] = next(of_parameters if term.about_parameters else of_rows)
        named["total"] = loss.detach().clone()
        if batch is None:
            return named
        for name in FREE_STATISTICS:
            value = next(of_rows)
            if (batch.target is None or batch.dense) and name != "lse":
                continue
            named.setdefault(name, value)
        if batch.reduction != "none":
            named["rows"] = next(of_rows)
        else:
            named = {name: value.view(batch.shape) for name, value in named.items()}
        return named


_DEFAULTS = tuple(Objective.forward.__kwdefaults__.values())


class _Penalties:
    """The terms on parameters of a call, and what multiplies them."""

    def __init__(self, terms: list[tuple[float | Tensor, Term]], weight: float | Tensor) -> None:
        self.terms, self.weight = terms, weight
        self.values: list[Tensor] = []

    def total(self) -> Tensor:
        self.values = [term.penalty() for _, term in self.terms]
        weighted = [coefficient * value for (coefficient, _), value in zip(self.terms, self.values, strict=True)]
        return sum(weighted[1:], weighted[0]) * self.weight


def _apart(
    terms: list[tuple[float | Tensor, Term]], reduction: str, weight: float | Tensor
) -> tuple[list[tuple[float | Tensor, Term]], _Penalties]:
    """The terms on logits, and those on parameters."""
    penalties = [(coefficient, term) for coefficient, term in terms if term.about_parameters]
    if reduction == "none":
        raise ValueError(
            f'reduction: "none" gives a loss for each row, and {penalties[0][1]._formula_name()} belongs to none'
        )
    weight = checked_weight("parameter_weight", weight)
    return [pair for pair in terms if not pair[1].about_parameters], _Penalties(penalties, weight)


def checked_weight(name: str, weight: float | Tensor) -> float | Tensor:
    """A number, or a 0-dim tensor of one."""
    if isinstance(weight, Tensor) and weight.dim() == 0 and not weight.is_complex():
        return weight
    if isinstance(weight, (bool, Tensor)) or not isinstance(weight, numbers.Real):
        raise TypeError(f"{name}: expected a number or a 0-dim tensor but got {describe(weight)}")
    try:
        return float(weight)
    except OverflowError:
        raise ValueError(f"{name}: expected a finite number but got {describe(weight)}") from None


def _class_weight(terms: list[tuple[float | Tensor, Term]]) -> Tensor | None:
    """The one class weight of the pass, or none."""
    weight, found = None, False
    for _, term in terms:
        if not term.reads_class_weight:
            continue
        own = term._buffers["weight"]  # through the module, the look-up takes as long as all the other checks
        # A shared tensor is one object until .to() makes a copy for each term.
        if found and own is not weight and (own is None or weight is None or not torch.equal(own, weight)):
            raise ValueError(
                "class weight: the cross-entropy terms of one objective share one class weight tensor; "
                "evaluate objectives with different weights separately and add their losses"
            )
        weight, found = own, True
    return weight


def _temperature(terms: list[tuple[float | Tensor, Term]]) -> float:
    """The one temperature of the pass."""
    found = {term.parameter for _, term in terms if term.reads_reference and term.kind is not None}
    if len(found) > 1:
        raise ValueError(
            f"temperature: the divergences of one objective share one, but got {sorted(found)}; evaluate objectives "
            "with different temperatures separately and add their losses"
        )
    return found.pop() if found else 1.0


def _located(error: Exception, what: str, x: object, shift: object) -> Exception:
    """The error, with the call that it came from."""
    where = f"{what} {'' if getattr(x, 'is_nested', False) else tuple(getattr(x, 'shape', ()))}"
    if isinstance(error, IndexError) and shift:
        where += "; shift=1: row t holds the label at t + 1"
    return type(error)(f"{error} [{where}]")


GRADIENTS = ("backward", "forward")


def _check_call(
    terms: list[tuple[float | Tensor, Term]],
    batch: Batch,
    return_parts: bool,
    in_forward: str | None,
    with_reference: bool,
) -> bool:
    """What the terms ask of a call; returns whether all of them are built in, so that kernels know them.

    in_forward: the option that asks for gradients in the forward pass, if one does.
    """
    if not isinstance(return_parts, bool):
        raise TypeError(f"return_parts: expected True or False but got {describe(return_parts)}")
    if in_forward is not None and batch.reduction == "none":
        raise ValueError(
            f'{in_forward}="forward" needs a scalar reduction: with reduction="none" the upstream gradient of each row '
            "is only known in the backward pass"
        )
    built_in, unread, reads_reference = True, set(batch.rows), False
    for _, term in terms:
        reads_reference = reads_reference or term.reads_reference or term.kind is None
        if term.reads_reference and not with_reference:
            raise ValueError(f"reference: {term._formula_name()} needs one but got None")
        if term.kind is None:
            built_in = False
            if in_forward is not None:
                raise ValueError(
                    f'{in_forward}="forward" cannot serve {term._formula_name()}: its derivative comes from autograd'
                )
        for name in term.required_rows:
            if name not in batch.rows:
                raise ValueError(f"rows: {term._formula_name()} needs {name!r} but got {sorted(batch.rows) or None}")
        unread = {name for name in unread if not term.reads_row(name)}
        if term.target != "none":
            if batch.target is None:
                raise ValueError(f"target: {term._formula_name()} needs one but got None")
            if term.target == "index" and batch.dense:
                raise ValueError(f"target: {term._formula_name()} needs class labels (int64) but got probabilities")
    if with_reference and not reads_reference:
        raise ValueError("reference: no term reads it; it is for KLDivergence and custom terms")
    if unread:
        raise ValueError(f"rows: no term reads {sorted(unread)}; per-row tensors are for custom terms")
    return built_in


def _check_elementwise_options(
    ignore_index: int, rows: object, shift: int, validate: bool | None, reference: object
) -> None:
    """What is about labels and rows, and so has to stand at its default."""
    rows = None if isinstance(rows, dict) and not rows else rows
    for name, given, default in (("ignore_index", ignore_index, -100), ("rows", rows, None), ("shift", shift, 0)):
        if type(given) is not type(default) or given != default:
            raise ValueError(
                f"{name}: has no meaning for terms that compare element by element, but got {describe(given)}; "
                "a weight of 0 leaves an element out"
            )
    if reference is not None:
        raise ValueError("reference: has no meaning for terms that compare element by element")
    check_validate(validate)


def _evaluate_elements(
    terms: list[tuple[float | Tensor, Term]], prediction: Tensor, target: Tensor | None, gradient: str,
    return_parts: bool, backend: str, *, class_dim: int, **options: Any,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The loss of an elementwise objective and the value of each term in order. Terms on rows get a pass of their own,
    over the same prediction and without a target."""
    from . import elementwise

    if not isinstance(return_parts, bool):
        raise TypeError(f"return_parts: expected True or False but got {describe(return_parts)}")
    if gradient not in GRADIENTS:
        raise ValueError(f'gradient: expected "backward" or "forward" but got {shown(gradient)}')
    of_elements, of_rows = elementwise.apart(terms, options["reduction"])
    elements = elementwise.checked(prediction, target, elementwise.weights_of(of_elements), limits=True, **options)
    loss, found = elementwise.evaluate(of_elements, backend, elements, gradient == "forward", return_parts)
    found = list(found) if return_parts else []
    if of_rows:
        several = Objective((Coefficient.of(coefficient), term) for coefficient, term in of_rows)
        own = several(
            prediction, gradient=gradient, backend=backend, class_dim=class_dim, return_parts=return_parts, **options
        )
        if return_parts:
            own, parts = own
            rest = iter(parts.values())
            values = iter(found)
            found = [next(values if term.element_kind is not None else rest) for _, term in terms]
        loss = loss + own
    return loss, found


class Term(Objective):
    """One term: an objective of its own, with coefficient 1, and a building block of sums.

    A built-in term is a formula on the statistics of a row, in plain arithmetic, and the number of its twin in
    csrc/objective.h. It holds at most one number, `parameter`.

    Raises:
        ValueError: when it is made, of a number out of its range.
        TypeError: of what is no number; both name the argument, what was expected and what came.
    """

    name: ClassVar[str]
    kind: ClassVar[int | None] = None  # TermKind in csrc/objective.h
    element_kind: ClassVar[int | None] = None  # ElementKind in csrc/elementwise.h: it runs on single elements
    # What it reads: "none", "index" (class labels), "any" (labels or probabilities), "elements" (one number for each)
    target: ClassVar[str] = "none"
    reads_class_weight: ClassVar[bool] = False
    reads_reference: bool = False  # it cannot do without
    required_rows: tuple[str, ...] = ()  # per-row tensors that a call has to give
    about_parameters: ClassVar[bool] = False  # a term of penalties.py, which reads no logits
    registry: ClassVar[dict[str, type[Term]]] = {}
    by_kind: ClassVar[dict[int, type[Term]]] = {}
    by_element_kind: ClassVar[dict[int, type[Term]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for known, number in ((Term.by_kind, cls.kind), (Term.by_element_kind, cls.element_kind)):
            other = None if number is None else known.get(number)
            if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(
                    f"{cls.__name__}: the kernels know terms by their numbers, and {number} is {other.__name__}'s: "
                    "what a subclass of it changes they would not see; objkern.custom makes a term of any formula"
                )
        if cls.kind is not None:
            Term.by_kind[cls.kind] = cls
        if cls.element_kind is not None:
            Term.by_element_kind[cls.element_kind] = cls
        if (cls.kind is not None or cls.element_kind is not None) and not cls.__name__.startswith("_"):
            Term.registry[cls.__name__] = cls

    def __init__(self) -> None:
        super(Objective, self).__init__()  # a term is its own summand
        self.parameter = 0.0  # the one number of the formula; 0 where it has none

    @property
    def _penalized(self) -> bool:
        return self.about_parameters

    @property
    def _elementwise(self) -> bool:
        return self.element_kind is not None and self.kind is None

    @property
    def _summands(self) -> list[tuple[float, tuple[str | Tensor, ...], Term]]:
        return [(1.0, (), self)]

    @property
    def weighted_terms(self) -> list[tuple[float | Tensor, Term]]:
        return [(1.0, self)]

    @staticmethod
    def formula(s: Statistics, parameter: float, weight: Tensor | float) -> Tensor:
        """The value of each row; `weight` is the class weight of its label."""
        raise NotImplementedError

    @staticmethod
    def element_formula(z: Tensor, y: Tensor, parameter: float, weight: Any, pos_weight: Any) -> Tensor:
        """The value of each element of a prediction z with target y."""
        raise NotImplementedError

    def value(self, s: Statistics, batch: Batch) -> Tensor:
        """(N) values of the term for the rows of a batch."""
        return self.formula(s, self.parameter, batch.row_weight() if self.reads_class_weight else 1.0)

    def reads_row(self, name: str) -> bool:
        """Whether it takes the per-row tensor of this name."""
        return False

    def penalty(self) -> Tensor:
        """The value of a term on parameters."""
        raise NotImplementedError

    def _arguments(self) -> str:
        return ""

    def _formula_name(self) -> str:
        return f"{type(self).__name__}({self._arguments()})"

    def __repr__(self) -> str:
        return self._formula_name()
