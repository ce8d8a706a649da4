"""From batches to kernels: the choice of a backend, and what the custom ops need beside their kernels.

The ops, their CPU kernels and their first derivatives are C++ (csrc/bindings.cpp, csrc/autograd.cpp). Here are their
fake versions for torch.compile, their rules under vmap, and the derivatives that go through the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C, reference
from .batch import REDUCTIONS, Batch
from .statistics import Statistics

_ROW_GRADIENT = 10  # fields of RowGradient in csrc/objective.h
_CENTRED = 14  # fields of Centred
_FREE = len(reference.FREE_STATISTICS)


class Program(NamedTuple):
    """The terms of an objective as kernels read them; the coefficients are numbers times `tensor`, if there is one."""

    kinds: list[int]
    parameters: list[float]
    coefficients: list[float]
    tensor: Tensor | None = None  # (terms)

    @classmethod
    def of(cls, kinds: list[int], parameters: list[float], coefficients: Sequence[float | Tensor]) -> Program:
        if not any(isinstance(c, Tensor) for c in coefficients):
            return cls(kinds, parameters, list(coefficients))
        factors = [c.to(torch.float64) if isinstance(c, Tensor) else torch.tensor(c, dtype=torch.float64)
                   for c in coefficients]  # fmt: skip
        return cls(kinds, parameters, [1.0] * len(factors), torch.stack(factors))


class Backend(NamedTuple):
    """What a room of kernels offers to the objective.

    objective(batch, program, gradient with the forward pass?, parts?) gives the loss and, if asked for, the parts.
    """

    name: str
    objective: Callable[[Batch, Program, bool, bool], tuple[Tensor, Tensor]]
    statistics: Callable[[Batch], Statistics]


def backend_for(name: str, logits: Tensor) -> Backend:
    """The backend asked for by name, or for "auto" the native one of the device; what cannot run raises."""
    if name == "reference":
        return REFERENCE
    if name == "cpu" and logits.device.type != "cpu":
        raise ValueError(f'backend: "cpu" cannot run on logits on {logits.device}')
    if name in ("auto", "cpu"):
        if logits.is_cpu:
            return CPU
        raise NotImplementedError(
            f'backend: there is no native backend for {logits.device.type} tensors; backend="reference" runs anywhere'
        )
    raise ValueError(f'backend: expected "auto", "cpu" or "reference" but got {name!r}')


# ---- the kernels ----------------------------------------------------------------------------------------------------


def _objective(batch: Batch, program: Program, with_gradient: bool, with_parts: bool) -> tuple[Tensor, Tensor]:
    kinds, parameters, coefficients, tensor = program
    fuse = with_gradient and torch.is_grad_enabled() and batch.logits.requires_grad
    found = (torch.ops.objkern.fused.default if fuse else torch.ops.objkern.objective.default)(
        batch.logits, batch.target, batch.logit_scale, batch.class_weight, batch.ignore_index, batch.softcap,
        batch.masked, tensor, batch.normalizer, kinds, parameters, coefficients, REDUCTIONS.index(batch.reduction),
        batch.empty_zero, with_parts or tensor is not None,
    )  # fmt: skip
    return found[0], found[1]


def _statistics(batch: Batch) -> Statistics:
    found, _ = torch.ops.objkern.statistics.default(
        batch.logits, batch.target, batch.logit_scale, batch.class_weight, batch.ignore_index, batch.softcap,
        batch.masked,
    )  # fmt: skip
    return Statistics(*found.unbind(0))


# ---- the reference, as a backend and for derivatives ----------------------------------------------------------------


def _reference_objective(batch: Batch, program: Program, _: bool, with_parts: bool) -> tuple[Tensor, Tensor]:
    loss, parts = reference.objective(batch, _terms(program))
    return loss, torch.stack([part.detach() for part in parts]) if with_parts else loss


def _terms(program: Program) -> list[tuple[float | Tensor, Any]]:
    from .objective import Term

    factors = [1.0] * len(program.kinds) if program.tensor is None else program.tensor
    return [
        (number * factor, Term.of_kind(kind, parameter))
        for number, factor, kind, parameter in zip(
            program.coefficients, factors, program.kinds, program.parameters, strict=True
        )
    ]


def _row_batch(
    logits: Tensor, target: Tensor | None, logit_scale: Tensor | None, class_weight: Tensor | None, ignore_index: int,
    softcap: float, masked: bool, normalizer: Tensor | None = None, reduction: str = "none", empty_zero: bool = False,
) -> Batch:  # fmt: skip
    return Batch(
        logits, target, class_weight, normalizer, logit_scale, softcap, ignore_index, reduction, empty_zero, masked,
        validate=False, shape=logits.shape[:1], rows={},
    )  # fmt: skip


class _Family(NamedTuple):
    """An op as the reference computes it."""

    forward: Callable[..., Tensor]
    differentiable: tuple[int, ...]  # places in its arguments; the logits are the first


def _objective_forward(*arguments: Any) -> Tensor:
    *rows, tensor, normalizer, kinds, parameters, coefficients, reduction, empty_zero, _ = arguments
    batch = _row_batch(*rows, normalizer, REDUCTIONS[reduction], empty_zero)
    return reference.objective(batch, _terms(Program(kinds, parameters, coefficients, tensor)))[0]


def _statistics_forward(*arguments: Any) -> Tensor:
    return torch.stack(reference.statistics(_row_batch(*arguments))).to(torch.float64)


_OBJECTIVE = _Family(_objective_forward, (0, 1, 2, 7))
_STATISTICS = _Family(_statistics_forward, (0, 1, 2))


def _reference_gradient(family: _Family, upstream: Tensor, *arguments: Any) -> list[Tensor]:
    *inputs, needed = arguments
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        wanted = [inputs[place] for place, need in zip(family.differentiable, needed, strict=True) if need]
        found = _grad(family.forward(*inputs), wanted, upstream, create_graph)
    return found


def _reference_second_order(family: _Family, grad: Tensor, upstream: Tensor, *arguments: Any) -> list[Tensor]:
    """Derivatives of the gradient to the logits: to the upstream gradient, and to the differentiable arguments."""
    *inputs, needed = arguments
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        if not inputs[0].requires_grad:
            inputs[0] = inputs[0].detach().requires_grad_()
        candidates = [upstream, *(inputs[place] for place in family.differentiable)]
        wanted = [x for x, need in zip(candidates, needed, strict=True) if need]
        (gradient,) = _grad(family.forward(*inputs), [inputs[0]], upstream, True)
        return _grad(gradient, wanted, grad, create_graph)


def _grad(output: Tensor, inputs: list[Tensor], upstream: Tensor, create_graph: bool) -> list[Tensor]:
    """torch.autograd.grad, with 0 for what the output does not read (a target under label_smoothing=1)."""
    if not output.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(output, inputs, upstream, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


_library = torch.library.Library("objkern", "IMPL")
for _name, _function, _family in (
    ("reference_gradient", _reference_gradient, _OBJECTIVE),
    ("reference_second_order", _reference_second_order, _OBJECTIVE),
    ("reference_statistics_gradient", _reference_gradient, _STATISTICS),
    ("reference_statistics_second_order", _reference_second_order, _STATISTICS),
):
    _library.impl(
        _name, lambda *args, function=_function, family=_family: function(family, *args), "CompositeImplicitAutograd"
    )


# ---- fake versions: shapes and dtypes for torch.compile and fake tensors -------------------------------------------


@torch.library.register_fake("objkern::objective")
def _(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *_, kinds, _, _, reduction, _, with_parts = arguments
    like = {"dtype": torch.float64 if logits.dtype == torch.float64 else torch.float32}
    rows, parts = logits.shape[0], len(kinds) + _FREE
    if REDUCTIONS[reduction] == "none":
        found = logits.new_empty(rows, **like), logits.new_empty((parts if with_parts else 0, rows), **like)
    else:
        found = logits.new_empty((), **like), logits.new_empty(parts + 1 if with_parts else 0, **like)
    return *found, logits.new_empty((_ROW_GRADIENT, rows), **like)


@torch.library.register_fake("objkern::fused")
def _(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return *torch.ops.objkern.objective(logits, *arguments), logits.new_empty(logits.shape)


@torch.library.register_fake("objkern::statistics")
def _(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    rows, double = logits.shape[0], {"dtype": torch.float64}
    return logits.new_empty((len(Statistics._fields), rows), **double), logits.new_empty((_CENTRED, rows), **double)


@torch.library.register_fake("objkern::gradient")
@torch.library.register_fake("objkern::statistics_gradient")
def _(upstream: Tensor, kept: Tensor, logits: Tensor, *arguments: Any) -> Tensor:
    return logits.new_empty(logits.shape)


# ---- vmap -----------------------------------------------------------------------------------------------------------


def _one_by_one(op: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """vmap as a loop: each sample has a mean, and rows to ignore, of its own."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        results = [
            op(*(a.select(d, i) if isinstance(a, Tensor) and d is not None else a
                 for a, d in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]  # fmt: skip
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(field) for field in zip(*results, strict=True)), (0,) * len(results[0])

    return rule


for _name in ("objective", "fused", "gradient", "statistics", "statistics_gradient"):
    torch.library.register_vmap(f"objkern::{_name}", _one_by_one(getattr(torch.ops.objkern, _name)))


CPU = Backend("cpu", _objective, _statistics)
REFERENCE = Backend("reference", _reference_objective, reference.statistics)
