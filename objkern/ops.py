"""From batches to kernels: the choice of a backend, and what the custom ops need beside their kernels.

The ops, their CPU kernels and their first derivatives are C++ (csrc/bindings.cpp, csrc/autograd.cpp; where that is not
built, without_core.py has the ops). Here are their fake versions for torch.compile, their rules under vmap, and the
derivatives that go through the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cuda, native, reference, triton, without_core
from .batch import REDUCTIONS, Batch, shown, validates
from .native import _C
from .reads import row_gradient_fields as fields_of
from .statistics import Statistics

FAMILIES = ("objkern", "objkern_triton")  # namespaces of ops, defined in csrc/bindings.cpp
CENTRED = 21  # fields of Centred in csrc/objective.h
_FREE = len(reference.FREE_STATISTICS)
if _C is None:
    without_core.define_ops()


class Program(NamedTuple):
    """The terms of an objective as kernels read them."""

    terms: list[float]  # kind, parameter and coefficient of each
    tensor: Tensor | None = None  # (terms) factors of the coefficients

    @classmethod
    def of(cls, weighted_terms: list[tuple[float | Tensor, Any]]) -> Program:
        """From (coefficient, term) pairs; a term here is what has a kind and a parameter."""
        terms: list[Any] = []
        numbers = True
        for coefficient, term in weighted_terms:
            terms += (term.kind, term.parameter, coefficient)
            if type(coefficient) is not float and isinstance(coefficient, Tensor):
                numbers = False
        if numbers:
            return cls(terms)
        coefficients = terms[2::3]
        terms[2::3] = [1.0 if isinstance(c, Tensor) else c for c in coefficients]
        tensors = [c for c in coefficients if isinstance(c, Tensor)]
        like = next((c for c in tensors if not c.is_cpu), tensors[0])  # a number of the CPU can go anywhere
        one = like.new_ones((), dtype=torch.float64)
        return cls(terms, torch.stack([c.to(one) if isinstance(c, Tensor) else one for c in coefficients]))


class Backend(NamedTuple):
    """What a room of kernels offers to the objective.

    objective(batch, program, gradient with the forward pass?, parts?) gives the loss and, if asked for, the parts.
    """

    name: str
    objective: Callable[[Batch, Program, bool, bool], tuple[Tensor, Tensor]]
    statistics: Callable[[Batch], Statistics]
    family: str | None = None  # the namespace of its ops, if it has any


def backend_for(name: str, logits: Tensor) -> Backend:
    """The backend asked for by name, or for "auto" the best that runs on the device; what cannot run raises."""
    if name == "reference":
        return REFERENCE
    if (name in ("auto", "cpu")) and (logits.is_cpu or logits.is_meta) and _C is not None:
        return CPU
    device = logits.device
    if name == "auto":
        kinds = ("cpu",) if logits.is_cpu or logits.is_meta else AUTOMATIC
        reasons = {kind: why_not(kind, device.type, device.index) for kind in kinds}
        for kind, reason in reasons.items():
            if reason is None:
                return NATIVE[kind]
        raise NotImplementedError(
            f'backend: none runs on {device} but backend="reference", which runs anywhere: '
            + "; ".join(f"{kind}: {reason}" for kind, reason in reasons.items())
        )
    if not isinstance(name, str) or name not in NATIVE:
        raise ValueError(f'backend: expected "auto", "reference" or one of {", ".join(NATIVE)} but got {shown(name)}')
    reason = why_not(name, device.type, device.index)
    if reason is not None:
        raise ValueError(f'backend: "{name}" cannot run on {device}: {reason}')
    return NATIVE[name]


def default_call(
    program: Program, logits: Tensor, target: Tensor | None, options: tuple[Any, ...], defaults: tuple[Any, ...],
    masked: bool = True,
) -> Tensor | None:  # fmt: skip
    """The mean loss by the short way (csrc/default_call.cpp), or None for a call that has to go the general way.

    The short way is for rows of logits with class labels where `options` are the very objects of `defaults`.
    """
    if program.tensor is not None or type(logits) is not Tensor or torch.compiler.is_compiling() or _C is None:
        return None
    if not logits.is_cpu and validates(logits):
        return None
    run = backend_for("auto", logits)
    return _C.default_call(run is NATIVE["triton"], logits, target, program.terms, masked, options, defaults)


def why_not(name: str, device_type: str, index: int | None) -> str | None:
    """Why a backend cannot run on a device, or None."""
    if name == "cpu":
        return native.why_not() if device_type in ("cpu", "meta") else "its kernels are for CPU tensors"
    if name == "triton":
        return triton.why_not(device_type)
    if device_type != "cuda":
        return "its kernels are for CUDA tensors"
    return cuda.why_not(index or 0)


# What torch.compiler.assume_constant_result would set, had it not to import the compiler: a device stays what it is.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


# ---- the kernels ----------------------------------------------------------------------------------------------------


_REDUCTION = {name: number for number, name in enumerate(REDUCTIONS)}


def _native(name: str, family_name: str, checks_labels: bool = False) -> Backend:
    """The backend that runs a family of ops; csrc/bindings.cpp says which there are.

    checks_labels: the labels are checked here, where that is asked for, because the kernels make NaN of bad ones.
    """
    family = getattr(torch.ops, family_name)
    objective_op, fused_op, statistics_op = family.objective.default, family.fused.default, family.statistics.default

    def objective(batch: Batch, program: Program, with_gradient: bool, with_parts: bool) -> tuple[Tensor, Tensor]:
        if checks_labels and batch.validate:
            reference.check_labels(batch.target, batch.logits.shape[1], batch.ignore_index)
        options = _options(batch)
        terms, tensor = program
        if _C is None:
            without_core.refuse_tangents(*batch, tensor)
        if tensor is not None:
            options["coefficient_tensor"] = tensor
        if batch.normalizer is not None:
            options["normalizer"] = batch.normalizer
        if batch.empty_zero:
            options["empty_zero"] = True
        if with_parts or tensor is not None:
            options["with_parts"] = True
        fuse = with_gradient and torch.is_grad_enabled() and batch.logits.requires_grad
        run = fused_op if fuse else objective_op
        found = run(terms, _REDUCTION[batch.reduction], batch.logits, batch.target, **options)
        return found[0], found[1]

    def statistics(batch: Batch) -> Statistics:
        if checks_labels and batch.validate:
            reference.check_labels(batch.target, batch.logits.shape[1], batch.ignore_index)
        if _C is None:
            without_core.refuse_tangents(*batch)
        found, _ = statistics_op(batch.logits, batch.target, **_options(batch))
        return named_statistics(found, batch)

    return Backend(name, objective, statistics, family_name)


def named_statistics(found: Tensor, batch: Batch) -> Statistics:
    """Of the rows of an op's result; without a reference there is no divergence from it."""
    named = Statistics(*found.unbind(0))
    return named if batch.reference is not None else named._replace(forward_kl=None, reverse_kl=None)


def _options(batch: Batch) -> dict[str, Any]:
    """The options of a batch that differ from the defaults of the ops: passing one costs more than looking at it."""
    options: dict[str, Any] = {}
    if batch.logit_scale is not None:
        options["logit_scale"] = batch.logit_scale
    if batch.class_weight is not None:
        options["class_weight"] = batch.class_weight
    if batch.ignore_index != -100:
        options["ignore_index"] = batch.ignore_index
    if batch.softcap:
        options["softcap"] = batch.softcap
    if not batch.masked:
        options["masked"] = False
    if batch.reference is not None:
        options["reference"] = batch.reference
        options["temperature"] = batch.temperature
    return options


# ---- the reference, as a backend and for derivatives ----------------------------------------------------------------


def _reference_objective(batch: Batch, program: Program, _: bool, with_parts: bool) -> tuple[Tensor, Tensor]:
    loss, parts = reference.objective(batch, _terms(program))
    return loss, torch.stack([part.detach() for part in parts]) if with_parts else loss


class _BuiltIn(NamedTuple):
    """A term of a program, to the reference what the term itself is: without a module, which no compiler can make."""

    term: type[Any]
    parameter: float

    @property
    def reads_class_weight(self) -> bool:
        return self.term.reads_class_weight

    @property
    def element_kind(self) -> int:
        return self.term.element_kind

    @property
    def element_formula(self) -> Callable[..., Tensor]:
        return self.term.element_formula

    def value(self, s: Statistics, batch: Batch) -> Tensor:
        return self.term.formula(s, self.parameter, batch.row_weight() if self.reads_class_weight else 1.0)


def _terms(program: Program, by_kind: dict[int, type[Any]] | None = None) -> list[tuple[float | Tensor, _BuiltIn]]:
    from .objective import Term

    numbers, tensor = program
    by_kind = Term.by_kind if by_kind is None else by_kind
    return [
        (numbers[3 * k + 2] * (1.0 if tensor is None else tensor[k]),
         _BuiltIn(by_kind[int(numbers[3 * k])], numbers[3 * k + 1]))
        for k in range(len(numbers) // 3)
    ]  # fmt: skip


# Ops as the reference computes them, from the same arguments, with the same defaults.


def objective_forward(
    terms: list[float], reduction: int, logits: Tensor, target: Tensor | None = None, logit_scale: Tensor | None = None,
    class_weight: Tensor | None = None, ignore_index: int = -100, softcap: float = 0.0, masked: bool = True,
    reference_logits: Tensor | None = None, temperature: float = 1.0, coefficient_tensor: Tensor | None = None,
    normalizer: Tensor | None = None, empty_zero: bool = False, with_parts: bool = False,
) -> Tensor:  # fmt: skip
    batch = Batch(
        logits, target, class_weight, normalizer, logit_scale, softcap, ignore_index, REDUCTIONS[reduction], empty_zero,
        masked, validate=False, shape=logits.shape[:1], rows={}, reference=reference_logits, temperature=temperature,
    )  # fmt: skip
    return reference.objective(batch, _terms(Program(terms, coefficient_tensor)))[0]


def statistics_forward(
    logits: Tensor, target: Tensor | None = None, logit_scale: Tensor | None = None,
    class_weight: Tensor | None = None, ignore_index: int = -100, softcap: float = 0.0, masked: bool = True,
    reference_logits: Tensor | None = None, temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    batch = Batch(
        logits, target, class_weight, None, logit_scale, softcap, ignore_index, "none", False, masked, validate=False,
        shape=logits.shape[:1], rows={}, reference=reference_logits, temperature=temperature,
    )  # fmt: skip
    found = reference.statistics(batch)
    return torch.stack([torch.zeros_like(found.lse) if field is None else field for field in found]).to(torch.float64)


def elementwise_forward(
    terms: list[float], reduction: int, input: Tensor, target: Tensor | None = None, logit_scale: Tensor | None = None,
    weight: Tensor | None = None, pos_weight: Tensor | None = None, softcap: float = 0.0, limits: bool = True,
    coefficient_tensor: Tensor | None = None, normalizer: Tensor | None = None, empty_zero: bool = False,
    with_parts: bool = False,
) -> Tensor:  # fmt: skip
    from . import elementwise
    from .objective import Term

    elements = elementwise.Elements(
        input, target, weight, pos_weight, normalizer, logit_scale, softcap, REDUCTIONS[reduction], empty_zero, limits
    )
    weighted = _terms(Program(terms, coefficient_tensor), Term.by_element_kind)
    return elementwise.reference(elements, weighted)[0]


class _Family(NamedTuple):
    """An op in the reference, and the places of its differentiable arguments; the logits are the first."""

    forward: Callable[..., Tensor]
    differentiable: tuple[int, ...]


_OBJECTIVE = _Family(objective_forward, (2, 3, 4, 9, 11))
_STATISTICS = _Family(statistics_forward, (0, 1, 2, 7))
_ELEMENTWISE = _Family(elementwise_forward, (2, 3, 4, 5, 6, 9))


def _reference_gradient(family: _Family, upstream: Tensor, needed: list[bool], *arguments: Any) -> list[Tensor]:
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs, wanted = apart(arguments, family.differentiable, needed)
        return gradients(family.forward(*inputs), wanted, upstream, create_graph)


def _reference_second_order(
    family: _Family, grad: Tensor, upstream: Tensor, needed: list[bool], *arguments: Any
) -> list[Tensor]:
    """Derivatives of the gradient to the logits: to the upstream gradient, and to the differentiable arguments."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        (upstream,), wanted = apart((upstream,), (0,), needed[:1])
        inputs, others = apart(arguments, family.differentiable, [True, *needed[2:]])
        (gradient,) = gradients(family.forward(*inputs), others[:1], upstream, True)
        return gradients(gradient, wanted + others[0 if needed[1] else 1 :], grad, create_graph)


def apart(arguments: Sequence[Any], places: Sequence[int], needed: Sequence[bool]) -> tuple[list[Any], list[Tensor]]:
    """The arguments, and those among them to differentiate by, which stand apart from their history.

    One may have been computed from another; what the caller's graph makes of that is the caller's.
    """
    inputs, wanted = list(arguments), []
    for place, need in zip(places, needed, strict=True):
        if need:
            x = inputs[place]
            inputs[place] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            wanted.append(inputs[place])
    return inputs, wanted


def gradients(output: Tensor, inputs: list[Tensor], upstream: Tensor, create_graph: bool) -> list[Tensor]:
    """torch.autograd.grad, with 0 for what the output does not read (a target under label_smoothing=1)."""
    if not output.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(output, inputs, upstream, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


_library = torch.library.Library("objkern", "IMPL")
for _name, _function, _family in (
    ("reference_gradient", _reference_gradient, _OBJECTIVE),
    ("reference_second_order", _reference_second_order, _OBJECTIVE),
    ("reference_elementwise_gradient", _reference_gradient, _ELEMENTWISE),
    ("reference_elementwise_second_order", _reference_second_order, _ELEMENTWISE),
    ("reference_statistics_gradient", _reference_gradient, _STATISTICS),
    ("reference_statistics_second_order", _reference_second_order, _STATISTICS),
):
    for _key in ("CompositeImplicitAutograd", "Batched"):  # Batched: torch.autograd.grad(..., is_grads_batched=True)
        _library.impl(_name, lambda *args, function=_function, family=_family: function(family, *args), _key)


# ---- fake versions: shapes and dtypes for torch.compile, fake and meta tensors --------------------------------------


def no_meta_beside(name_of_first: str, first: Tensor, **others: Any) -> None:
    """One tensor on "meta" sends an op here, and real logits would get numbers that nobody computed."""
    if not first.is_meta:
        for name, other in others.items():
            if isinstance(other, Tensor) and other.is_meta:
                raise ValueError(
                    f"{name}: expected a tensor on {first.device}, as the {name_of_first}, but got one on meta"
                )


def _fake_objective(
    terms: list[float], reduction: int, logits: Tensor, target: Tensor | None = None, logit_scale: Tensor | None = None,
    class_weight: Tensor | None = None, ignore_index: int = -100, softcap: float = 0.0, masked: bool = True,
    reference: Tensor | None = None, temperature: float = 1.0, coefficient_tensor: Tensor | None = None,
    normalizer: Tensor | None = None, empty_zero: bool = False, with_parts: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    no_meta_beside(
        "logits", logits, target=target, logit_scale=logit_scale, class_weight=class_weight, reference=reference,
        coefficient=coefficient_tensor, normalizer=normalizer,
    )  # fmt: skip
    like = {"dtype": torch.float64 if logits.dtype == torch.float64 else torch.float32}
    rows, parts = logits.shape[0], len(terms) // 3 + _FREE
    if REDUCTIONS[reduction] == "none":
        found = logits.new_empty(rows, **like), logits.new_empty((parts if with_parts else 0, rows), **like)
    else:
        found = logits.new_empty((), **like), logits.new_empty(parts + 1 if with_parts else 0, **like)
    return *found, logits.new_empty((row_gradient_fields(terms, class_weight, target), rows), **like)


def row_gradient_fields(terms: list[float], class_weight: Tensor | None, target: Tensor | None) -> int:
    """How many numbers a row keeps for its gradient."""
    dense = target is not None and target.is_floating_point()
    return fields_of(terms, class_weight is not None, dense)


def _fake_fused(terms: list[float], reduction: int, logits: Tensor, *options: Any, **others: Any) -> tuple[Tensor, ...]:
    results = _fake_objective(terms, reduction, logits, *options, **others)
    return *results, logits.new_empty(logits.shape)


def _fake_statistics(
    logits: Tensor, target: Tensor | None = None, logit_scale: Tensor | None = None,
    class_weight: Tensor | None = None, *options: Any, **others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    no_meta_beside("logits", logits, target=target, logit_scale=logit_scale, class_weight=class_weight)
    rows, double = logits.shape[0], {"dtype": torch.float64}
    return logits.new_empty((len(Statistics._fields), rows), **double), logits.new_empty((CENTRED, rows), **double)


def _fake_gradient(
    upstream: Tensor, row_gradient: Tensor, unscaled: bool, terms: list[float], reduction: int, logits: Tensor,
    *options: Any, **others: Any,
) -> Tensor:  # fmt: skip
    no_meta_beside("logits", logits, upstream=upstream, row_gradient=row_gradient, target=next(iter(options), None))
    return logits.new_empty(logits.shape)


def _fake_statistics_gradient(
    partials: Tensor, centred: Tensor, unscaled: bool, logits: Tensor, *options: Any, **others: Any
) -> Tensor:
    no_meta_beside("logits", logits, partials=partials, centred=centred, target=next(iter(options), None))
    return logits.new_empty(logits.shape)


def _fake_rescale(*_: Any) -> None:
    return None


def _fake_elementwise(
    terms: list[float], reduction: int, input: Tensor, target: Tensor | None = None, logit_scale: Tensor | None = None,
    weight: Tensor | None = None, pos_weight: Tensor | None = None, softcap: float = 0.0, limits: bool = True,
    coefficient_tensor: Tensor | None = None, normalizer: Tensor | None = None, empty_zero: bool = False,
    with_parts: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    no_meta_beside(
        "prediction", input, target=target, logit_scale=logit_scale, weight=weight, pos_weight=pos_weight,
        coefficient=coefficient_tensor, normalizer=normalizer,
    )  # fmt: skip
    dtype, parts = torch.float64 if input.dtype == torch.float64 else torch.float32, len(terms) // 3 * with_parts
    shape = input.shape if REDUCTIONS[reduction] == "none" else ()
    return input.new_empty(shape, dtype=dtype), input.new_empty((parts, *shape), dtype=dtype)


def _fake_elementwise_fused(
    terms: list[float], reduction: int, input: Tensor, *options: Any, **others: Any
) -> tuple[Tensor, ...]:
    return *_fake_elementwise(terms, reduction, input, *options, **others), torch.empty_like(
        input, memory_format=torch.contiguous_format
    )


def _fake_elementwise_gradient(
    upstream: Tensor, unscaled: bool, terms: list[float], reduction: int, input: Tensor, *options: Any, **others: Any
) -> Tensor:
    no_meta_beside("prediction", input, upstream=upstream, target=next(iter(options), None))
    return torch.empty_like(input, memory_format=torch.contiguous_format)


_FAKES = {
    "objective": _fake_objective,
    "fused": _fake_fused,
    "gradient": _fake_gradient,
    "rescale": _fake_rescale,
    "statistics": _fake_statistics,
    "statistics_gradient": _fake_statistics_gradient,
    "elementwise": _fake_elementwise,
    "elementwise_fused": _fake_elementwise_fused,
    "elementwise_gradient": _fake_elementwise_gradient,
    "elementwise_rescale": _fake_rescale,
}
for _family_name in FAMILIES:
    for _name, _fake in _FAKES.items():
        torch.library.register_fake(f"{_family_name}::{_name}", _fake)


# ---- vmap -----------------------------------------------------------------------------------------------------------


def one_by_one(op: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """vmap as a loop: each sample has a mean, and rows to ignore, of its own."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        count = info.batch_size
        if count == 0:  # one sample of zeros tells the shapes
            arguments = tuple(
                a.new_zeros([*a.shape[:d], 1, *a.shape[d + 1 :]]) if isinstance(a, Tensor) and d is not None else a
                for a, d in zip(arguments, in_dims, strict=True)
            )
        results = [
            op(*(a.select(d, i) if isinstance(a, Tensor) and d is not None else a
                 for a, d in zip(arguments, in_dims, strict=True)))
            for i in range(max(count, 1))
        ]  # fmt: skip
        if isinstance(results[0], Tensor):
            return torch.stack(results)[:count], 0
        several = type(results[0])  # a tuple, or the list of the reference's
        stacked = several(torch.stack(field)[:count] for field in zip(*results, strict=True))
        return stacked, several([0] * len(results[0]))

    return rule


_REFERENCE_OPS = (
    "reference_gradient", "reference_second_order", "reference_statistics_gradient",
    "reference_statistics_second_order", "reference_elementwise_gradient", "reference_elementwise_second_order",
)  # fmt: skip
for _family_name in FAMILIES:
    for _name in (
        *(_FAKES.keys() - {"rescale", "elementwise_rescale"}),
        *(_REFERENCE_OPS if _family_name == "objkern" else ()),
    ):
        _op = getattr(getattr(torch.ops, _family_name), _name)
        torch.library.register_vmap(f"{_family_name}::{_name}", one_by_one(_op))


if _C is None:
    without_core.register_derivatives()
CPU = _native("cpu", "objkern")
NATIVE = {
    "cpu": CPU,
    "cuda": _native("cuda", "objkern", checks_labels=True),
    "triton": _native("triton", "objkern_triton", checks_labels=True),
}
AUTOMATIC = ("cuda", "triton")  # of a device other than the CPU, in this order
REFERENCE = Backend("reference", _reference_objective, reference.statistics)
