"""The ops of an installation without the native core: what csrc/bindings.cpp and csrc/autograd.cpp say, in Python.

The schemas of both families, so that the rest of the package is the same with and without; and the derivatives of the
Triton family, whose kernels are Python's. Tests compare the schemas with those of the core, and the derivatives with
the reference's. What is in C++ costs the host half as much (docs/torch.md), so with the core nothing of this is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

# ---- schemas --------------------------------------------------------------------------------------------------------

_ROW = (
    "Tensor logits, Tensor? target=None, Tensor? logit_scale=None, Tensor? class_weight=None, int ignore_index=-100, "
    "float softcap=0, bool masked=True, Tensor? reference=None, float temperature=1"
)
_COMMON = "Tensor? coefficient_tensor=None, Tensor? normalizer=None, bool empty_zero=False, bool with_parts=False"
_OBJECTIVE = f"float[] terms, int reduction, {_ROW}, {_COMMON}"
_ELEMENT = (
    "float[] terms, int reduction, Tensor input, Tensor? target=None, Tensor? logit_scale=None, Tensor? weight=None, "
    f"Tensor? pos_weight=None, float softcap=0, bool limits=True, {_COMMON}"
)
_PENALTY = "Tensor[] parameters, Tensor[] origins, Tensor[] weights, float l1, float l2"
_INTO = "*, Tensor(a!) gradient"
_NEEDED = "Tensor upstream, bool[] needed"
_PARTIALS = "Tensor partials, Tensor centred, bool unscaled"

KERNELS = {
    "objective": f"({_OBJECTIVE}) -> (Tensor loss, Tensor parts, Tensor row_gradient)",
    "fused": f"({_OBJECTIVE}) -> (Tensor loss, Tensor parts, Tensor row_gradient, Tensor gradient)",
    "fused.into": f"({_OBJECTIVE}, {_INTO}) -> (Tensor loss, Tensor parts, Tensor row_gradient)",
    "gradient": f"(Tensor upstream, Tensor row_gradient, bool unscaled, {_OBJECTIVE}) -> Tensor",
    "gradient.into": f"(Tensor upstream, Tensor row_gradient, bool unscaled, {_OBJECTIVE}, {_INTO}) -> ()",
    "rescale": f"(Tensor(a!) gradient, Tensor upstream, Tensor row_gradient, {_OBJECTIVE}) -> ()",
    "statistics": f"({_ROW}) -> (Tensor statistics, Tensor centred)",
    "statistics_gradient": f"({_PARTIALS}, {_ROW}) -> Tensor",
    "statistics_gradient.into": f"({_PARTIALS}, {_ROW}, {_INTO}) -> ()",
    "elementwise": f"({_ELEMENT}) -> (Tensor loss, Tensor parts)",
    "elementwise_fused": f"({_ELEMENT}) -> (Tensor loss, Tensor parts, Tensor gradient)",
    "elementwise_gradient": f"(Tensor upstream, bool unscaled, {_ELEMENT}) -> Tensor",
    "elementwise_rescale": f"(Tensor(a!) gradient, Tensor upstream, {_ELEMENT}) -> ()",
}
OTHERS = {
    "multi_penalty": f"({_PENALTY}) -> Tensor",
    "multi_penalty_gradient": f"(Tensor upstream, {_PENALTY}) -> Tensor[]",
    "multi_penalty_accumulate_": f"(Tensor(a!)[] gradients, Tensor upstream, {_PENALTY}) -> ()",
    "reference_gradient": f"({_NEEDED}, {_OBJECTIVE}) -> Tensor[]",
    "reference_second_order": f"(Tensor grad, {_NEEDED}, {_OBJECTIVE}) -> Tensor[]",
    "reference_elementwise_gradient": f"({_NEEDED}, {_ELEMENT}) -> Tensor[]",
    "reference_elementwise_second_order": f"(Tensor grad, {_NEEDED}, {_ELEMENT}) -> Tensor[]",
    "reference_statistics_gradient": f"(Tensor partials, bool[] needed, {_ROW}) -> Tensor[]",
    "reference_statistics_second_order": f"(Tensor grad, Tensor partials, bool[] needed, {_ROW}) -> Tensor[]",
}

_defined: list[torch.library.Library] = []  # a library takes its ops along when it is freed


def define_ops() -> None:
    for family, schemas in (("objkern_triton", KERNELS), ("objkern", KERNELS | OTHERS)):
        library = torch.library.Library(family, "DEF")
        _defined.append(library)
        for name, schema in schemas.items():
            library.define(name + schema)


# ---- derivatives ----------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """Ops with one derivative: objective and fused, statistics, elementwise and elementwise_fused.

    The first of `places`, those of differentiable arguments, are logits, target and logit scale.
    """

    family: Any  # in ops.py: the reference's forward function, and the places
    gradient: str
    rescale: str | None
    kept: int | None  # which result the gradient op takes
    coefficients: int | None  # a place

    @property
    def places(self) -> tuple[int, ...]:
        return self.family.differentiable

    @property
    def before_arguments(self) -> int:  # in the gradient op: upstream, kept, unscaled
        return 2 if self.kept is None else 3


def _needed(ctx: Any, places: Sequence[int]) -> list[bool]:
    """Arguments that were left at their defaults are not counted."""
    return [place < len(ctx.needs_input_grad) and ctx.needs_input_grad[place] for place in places]


def _in_places(found: dict[int, Tensor | None], count: int) -> tuple[Tensor | None, ...]:
    return tuple(found.get(place) for place in range(count))


def _forward_rules(kind: _Kind) -> tuple[Callable[..., Any], Callable[..., None]]:
    from . import linear, ops

    kernels = torch.ops.objkern_triton
    logits, _, scale = kind.places[:3]
    by_kernels = {logits, scale, kind.coefficients}

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        place = kind.coefficients
        if place is not None and _needed(ctx, [place])[0] and output[1].shape[0] == 0:
            raise ValueError(
                "objkern: coefficient_tensor requires a gradient, which is made of the parts: pass with_parts"
            )
        ctx.mark_non_differentiable(*output[1:])
        kept = [] if kind.kept is None else [output[kind.kept]]
        ctx.kept = linear._Kept(ctx, inputs, output[1], *kept)
        after = 1 if kind.kept is None else kind.kept
        # The fused gradient is handed over once, scaled in place; a second backward pass makes its own.
        ctx.finished = output[-1].detach() if kind.rescale is not None and len(output) > after + 1 else None

    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        arguments, (parts, *kept) = ctx.kept.of(ctx)
        needed = _needed(ctx, kind.places)
        # What can be differentiated again comes from the reference, but for the common case: the gradient op of the
        # logits has a derivative of its own.
        again = torch.is_grad_enabled() and any(needed[1:])
        through = [need and (again or place not in by_kernels) for place, need in zip(kind.places, needed, strict=True)]
        found: dict[int, Tensor | None] = {}
        if any(through):
            gradients = ops._reference_gradient(kind.family, upstream, through, *arguments)
            places = [place for place, need in zip(kind.places, through, strict=True) if need]
            found.update(zip(places, gradients, strict=True))
        mine = [place for place, need in zip(kind.places, needed, strict=True) if need and place not in found]
        op = getattr(kernels, kind.gradient).default
        if logits in mine:
            finished, ctx.finished = ctx.finished, None
            if finished is None or torch.is_grad_enabled() or linear._stands_for_others(finished, upstream):
                found[logits] = op(upstream, *kept, False, *arguments)
            else:
                getattr(kernels, kind.rescale)(finished, upstream, *kept, *arguments)
                found[logits] = finished
        if scale in mine:  # dL/ds = Σ dL/d(s·x) x, summed before it is rounded
            x = arguments[logits]
            wide = [*arguments]
            wide[logits] = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
            g = op(upstream, *kept, True, *wide)
            found[scale] = torch.where(g == 0, g, g * x).sum().to(arguments[scale])
        if kind.coefficients in mine:  # d loss / d coefficient is the term itself
            terms, values = arguments[0], parts.to(torch.float64) * upstream
            values = values.flatten(1).sum(1) if upstream.dim() else values
            own = [values[k] * number for k, number in enumerate(terms[2::3])]
            found[kind.coefficients] = torch.stack(own).to(arguments[kind.coefficients])
        return _in_places(found, len(arguments))

    return backward, keep


def _gradient_rules(kind: _Kind) -> tuple[Callable[..., Any], Callable[..., None]]:
    """The derivatives of a gradient op: to the upstream gradient, and to the differentiable arguments."""
    from . import linear, ops

    places = (0, *(kind.before_arguments + place for place in kind.places))

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if inputs[kind.before_arguments - 1]:
            raise NotImplementedError(f"objkern: {kind.gradient}: no second derivative of `unscaled`")
        ctx.kept = linear._Kept(ctx, inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        arguments, _ = ctx.kept.of(ctx)
        needed = _needed(ctx, places)
        second = ops._reference_second_order(
            kind.family, grad, arguments[0], needed, *arguments[kind.before_arguments :]
        )
        wanted = [place for place, need in zip(places, needed, strict=True) if need]
        return _in_places(dict(zip(wanted, second, strict=True)), len(arguments))

    return backward, keep


def refuse_tangents(*inputs: Any) -> None:
    """autograd's Python rules would take a tensor with a tangent, and no gradient, for one without."""
    for x in inputs:
        if isinstance(x, Tensor) and x.is_floating_point() and unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                'objkern: forward-mode derivatives are not implemented; use reverse mode, or backend="reference"'
            )


def register_derivatives() -> None:
    from . import ops

    kinds = {
        _Kind(ops._OBJECTIVE, "gradient", "rescale", 2, 11): ("objective", "fused"),
        _Kind(ops._STATISTICS, "statistics_gradient", None, 1, None): ("statistics",),
        _Kind(ops._ELEMENTWISE, "elementwise_gradient", "elementwise_rescale", None, 9):
            ("elementwise", "elementwise_fused"),
    }  # fmt: skip
    for kind, names in kinds.items():
        for name in names:
            backward, keep = _forward_rules(kind)
            torch.library.register_autograd(f"objkern_triton::{name}", backward, setup_context=keep)
        backward, keep = _gradient_rules(kind)
        torch.library.register_autograd(f"objkern_triton::{kind.gradient}", backward, setup_context=keep)
