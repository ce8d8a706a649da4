"""From batches to kernels: the custom ops' fake versions, their derivatives, and the choice of a backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import _C, reference
from .batch import REDUCTIONS, Batch
from .statistics import Statistics

if TYPE_CHECKING:
    from .objective import Term

_ROW_GRADIENT = 10  # fields of RowGradient in csrc/objective.h
_CENTRED = 14  # fields of Centred
_FREE = len(reference.FREE_STATISTICS)


class Backend(NamedTuple):
    """What a room of kernels offers to the objective."""

    name: str
    objective: Callable[[Batch, list[tuple[float | Tensor, Term]], bool], tuple[Tensor, list[Tensor]]]
    statistics: Callable[[Batch], Statistics]


def backend_for(name: str, logits: Tensor) -> Backend:
    """The backend asked for by name, or for "auto" the native one of the device; what cannot run raises."""
    if name == "reference":
        return REFERENCE
    if name == "cpu" and logits.device.type != "cpu":
        raise ValueError(f'backend: "cpu" cannot run on logits on {logits.device}')
    if name in ("auto", "cpu"):
        if logits.device.type == "cpu":
            return CPU
        raise NotImplementedError(
            f'backend: there is no native backend for {logits.device.type} tensors; backend="reference" runs anywhere'
        )
    raise ValueError(f'backend: expected "auto", "cpu" or "reference" but got {name!r}')


def reads(kind: int, parameter: float) -> int:
    """Which statistics a term reads, as bits in the order of `Statistics`."""
    return _C.reads([(kind, parameter)])


# ---- the objective --------------------------------------------------------------------------------------------------


def _objective(
    batch: Batch, terms: list[tuple[float | Tensor, Term]], with_gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    coefficients = [1.0 if isinstance(c, Tensor) else c for c, _ in terms]
    tensors = None
    if any(isinstance(c, Tensor) for c, _ in terms):
        tensors = torch.stack([
            c.to(torch.float64) if isinstance(c, Tensor) else torch.ones((), dtype=torch.float64) for c, _ in terms
        ])  # fmt: skip
    program = (
        [term.kind for _, term in terms],
        [term.parameter for _, term in terms],
        coefficients,
        REDUCTIONS.index(batch.reduction),
    )
    every_read = 0
    for _, term in terms:
        every_read |= term.reads
    fuse = with_gradient and torch.is_grad_enabled() and batch.logits.requires_grad
    # A second reduction of the same rows must not see a normalizer that requires grad: it is a constant.
    normalizer = None if batch.normalizer is None else batch.normalizer.detach()
    loss, parts = _FusedObjective.apply(
        batch.logits, batch.target, tensors, batch.logit_scale, normalizer, batch, program, every_read, fuse
    )
    return loss, list(parts.clone().unbind(0))  # the caller's own: autograd may have kept the others


class _FusedObjective(torch.autograd.Function):
    """One pass collects; the backward pass writes. Kept between: the inputs and ten numbers per row."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor | None,
        coefficients: Tensor | None,
        logit_scale: Tensor | None,
        normalizer: Tensor | None,
        batch: Batch,
        program: tuple[list[int], list[float], list[float], int],
        reads: int,
        fuse: bool,
    ) -> tuple[Tensor, Tensor]:
        arguments = (
            logits, target, batch.class_weight, coefficients, normalizer, logit_scale, *program,
            batch.ignore_index, batch.softcap, batch.masked, batch.empty_zero,
        )  # fmt: skip
        if fuse:
            loss, parts, row_gradient, ctx.gradient = torch.ops.objkern.fused(*arguments)
        else:
            loss, parts, row_gradient = torch.ops.objkern.objective(*arguments)
            ctx.gradient = None
        ctx.save_for_backward(
            logits, target, coefficients, logit_scale, normalizer, batch.class_weight, row_gradient, parts
        )
        ctx.options = replace(batch, logits=None, target=None, logit_scale=None, normalizer=None, class_weight=None)
        ctx.program = program
        ctx.reads = reads
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, coefficients, logit_scale, normalizer, class_weight, row_gradient, parts = ctx.saved_tensors
        batch = replace(
            ctx.options, logits=logits, target=target, logit_scale=logit_scale, normalizer=normalizer,
            class_weight=class_weight,
        )  # fmt: skip
        inputs = (logits, target, coefficients, logit_scale)
        needed = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # create_graph: a gradient that can be differentiated comes from the reference
            grads = _differentiable_gradient(ctx.program, batch, inputs, needed, upstream)
            return (*grads, None, None, None, None, None)

        grads: list[Tensor | None] = [None] * 4
        if needed[0]:
            # The gradient made in the forward pass is handed over once; a second backward pass computes its own.
            gradient, ctx.gradient = ctx.gradient, None
            if gradient is None or not _scale(gradient, upstream):
                gradient = _gradient(batch, row_gradient, upstream, ctx.reads)
            grads[0] = gradient
        if needed[1]:
            only_target = (False, True, False, False)
            grads[1] = _differentiable_gradient(ctx.program, batch, inputs, only_target, upstream)[1]
        if needed[2]:
            # d loss / d coefficient is the term itself.
            static = torch.tensor(ctx.program[2], dtype=torch.float64)
            own = parts[: len(ctx.program[0])].to(torch.float64)
            grads[2] = static * (own * upstream).sum(-1) if upstream.dim() else static * own * upstream
        if needed[3]:
            to_scaled = _gradient(batch.wide(), row_gradient, upstream, ctx.reads, unscaled=True)
            grads[3] = _scale_gradient(to_scaled, logits, logit_scale)
        return (*grads, None, None, None, None, None)


def _scale(gradient: Tensor, upstream: Tensor) -> bool:
    """Multiply a finished gradient by the upstream gradient in place; False where that would lose digits.

    Half precision has been rounded already, and float16 may have underflowed; 0·∞ in an ignored row would be NaN.
    """
    if torch.compiler.is_compiling():  # no look at the number
        return False
    factor = upstream.item()
    if factor == 1.0:
        return True
    if gradient.dtype in (torch.bfloat16, torch.float16) or not math.isfinite(factor):
        return False
    gradient.mul_(upstream)
    return True


def _scale_gradient(to_scaled: Tensor, logits: Tensor, logit_scale: Tensor) -> Tensor:
    """dL/ds = Σ dL/d(s·x) x; what has no gradient (an excluded class, an ignored row) may be infinite."""
    return torch.where(to_scaled == 0, to_scaled, to_scaled * logits).sum().to(logit_scale.dtype)


def _gradient(batch: Batch, row_gradient: Tensor, upstream: Tensor, reads: int, unscaled: bool = False) -> Tensor:
    return torch.ops.objkern.gradient(upstream, row_gradient, *_row_arguments(batch), unscaled, reads)


def _row_arguments(batch: Batch) -> tuple[Any, ...]:
    return (
        batch.logits, batch.target, batch.class_weight, batch.logit_scale, batch.ignore_index, batch.softcap,
        batch.masked,
    )  # fmt: skip


def _differentiable_gradient(
    program: tuple[list[int], list[float], list[float], int],
    batch: Batch,
    inputs: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
    upstream: Tensor,
) -> list[Tensor | None]:
    """The gradients of the reference, with their graph where one is being recorded."""
    from .objective import Term

    kinds, parameters, coefficients, _ = program
    tensors = inputs[2]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        terms = []
        for k, (kind, parameter, c) in enumerate(zip(kinds, parameters, coefficients, strict=True)):
            term = Term.by_kind[kind].__new__(Term.by_kind[kind])
            Term.__init__(term)
            term.parameter = parameter
            terms.append((c if tensors is None else c * tensors[k], term))
        loss, _ = reference.objective(batch, terms)
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(loss, wanted, upstream, create_graph=create_graph, allow_unused=True))
    # What the objective does not read (a target under label_smoothing=1) has the gradient 0.
    return [_or_zeros(next(found), x) if need else None for x, need in zip(inputs, needed, strict=True)]


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


# ---- statistics -----------------------------------------------------------------------------------------------------


def _statistics(batch: Batch) -> Statistics:
    return Statistics(*_RowStatistics.apply(batch.logits, batch.target, batch.logit_scale, batch).unbind(0))


class _RowStatistics(torch.autograd.Function):
    """(10, N) float64 statistics. Kept between: the inputs and fourteen numbers per row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor | None, logit_scale: Tensor | None, batch: Batch) -> Tensor:
        statistics, centred = torch.ops.objkern.statistics(*_row_arguments(batch))
        ctx.save_for_backward(logits, target, logit_scale, batch.class_weight, centred)
        ctx.options = replace(batch, logits=None, target=None, logit_scale=None, class_weight=None)
        return statistics

    @staticmethod
    def backward(ctx: Any, partials: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, logit_scale, class_weight, centred = ctx.saved_tensors
        batch = replace(ctx.options, logits=logits, target=target, logit_scale=logit_scale, class_weight=class_weight)
        needed = ctx.needs_input_grad[:3]
        create_graph = torch.is_grad_enabled()
        if create_graph or needed[1]:
            with torch.enable_grad():
                stacked = torch.stack(reference.statistics(batch)).to(torch.float64)
                wanted = [x for x, need in zip((logits, target, logit_scale), needed, strict=True) if need]
                # A statistic that nothing reads has upstream 0 and may be infinite: leave it out.
                found = iter(
                    torch.autograd.grad(stacked, wanted, partials, create_graph=create_graph, allow_unused=True)
                )
            return (*[next(found) if need else None for need in needed], None)
        grads: list[Tensor | None] = [None] * 3
        if needed[0]:
            grads[0] = torch.ops.objkern.statistics_gradient(partials, centred, *_row_arguments(batch), False)
        if needed[2]:
            to_scaled = torch.ops.objkern.statistics_gradient(partials, centred, *_row_arguments(batch.wide()), True)
            grads[2] = _scale_gradient(to_scaled, logits, logit_scale)
        return (*grads, None)


# ---- fake versions: shapes and dtypes for torch.compile and fake tensors -------------------------------------------


def _result_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@torch.library.register_fake("objkern::objective")
def _(logits: Tensor, target: Tensor | None, class_weight: Tensor | None, coefficient_tensor: Tensor | None,
      normalizer: Tensor | None, logit_scale: Tensor | None, terms: list[int], parameters: list[float],
      coefficients: list[float], reduction: int, ignore_index: int, softcap: float, masked: bool,
      empty_zero: bool) -> tuple[Tensor, ...]:  # fmt: skip
    rows, like = logits.shape[0], {"dtype": _result_dtype(logits)}
    if REDUCTIONS[reduction] == "none":
        loss, parts = logits.new_empty(rows, **like), logits.new_empty((len(terms) + _FREE, rows), **like)
    else:
        loss, parts = logits.new_empty((), **like), logits.new_empty(len(terms) + _FREE + 1, **like)
    return loss, parts, logits.new_empty((_ROW_GRADIENT, rows), **like)


@torch.library.register_fake("objkern::fused")
def _(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    loss, parts, row_gradient = torch.ops.objkern.objective(logits, *arguments)
    return loss, parts, row_gradient, logits.new_empty(logits.shape)


@torch.library.register_fake("objkern::gradient")
def _(upstream: Tensor, row_gradient: Tensor, logits: Tensor, *arguments: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("objkern::statistics")
def _(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    rows, double = logits.shape[0], {"dtype": torch.float64}
    return logits.new_empty((len(Statistics._fields), rows), **double), logits.new_empty((_CENTRED, rows), **double)


@torch.library.register_fake("objkern::statistics_gradient")
def _(partials: Tensor, centred: Tensor, logits: Tensor, *arguments: Any) -> Tensor:
    return logits.new_empty(logits.shape)


CPU = Backend("cpu", _objective, _statistics)
REFERENCE = Backend("reference", lambda batch, terms, _: reference.objective(batch, terms), reference.statistics)
