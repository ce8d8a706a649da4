"""Terms on parameters: penalties on the size of weights, or on their distance from where they began.

One formula serves all of them, θ − θ₀ = d:

    value  Σ l1·|d| + ½·l2·F·d²          gradient  l1·sign(d) + l2·F·d

with θ₀ = 0 and F = 1 where there is none. That is an elementwise objective of every parameter, so the kernels are those
of elementwise.py: the value reads every parameter once and writes nothing. The gradient is returned to autograd and
not added to `.grad` behind its back.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import distributed, ops
from .batch import REDUCTIONS, describe
from .elementwise import MeanAbsoluteError, MeanSquaredError
from .objective import Term, checked_weight
from .terms import checked_number

# ---- the ops --------------------------------------------------------------------------------------------------------

_BLOCK = 1 << 20  # elements that eager torch works on together


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _blocks(x: Tensor) -> Iterator[Tensor]:
    return iter(x.reshape(-1).split(_BLOCK))


def _distances(
    theta: Tensor, origins: list[Tensor], weights: list[Tensor], k: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """d and F of the k-th parameter, block by block, in the accumulation type."""
    wide = _wide(theta)
    of_origin = _blocks(origins[k]) if origins else itertools.repeat(None)
    of_weight = _blocks(weights[k]) if weights else itertools.repeat(None)
    for block, origin, weight in zip(_blocks(theta), of_origin, of_weight, strict=False):
        d = block.to(wide)
        yield d if origin is None else d - origin.to(wide), None if weight is None else weight.to(wide)


def _kernels(x: Tensor) -> Any | None:
    """The kernels for elements on a device, if it has any."""
    try:
        return getattr(torch.ops, ops.backend_for("auto", x).family)
    except NotImplementedError:
        return None


@functools.cache
def _together(device: torch.device) -> bool:
    """Whether the device has kernels for many parameters at once, which is asked by trying."""
    theta = torch.zeros(1, device=device)
    try:
        ops.backend_for("auto", theta)
        torch.ops.objkern.multi_penalty([theta], [], [], 1.0, 1.0)
    except NotImplementedError:
        return False
    return True


def _by(what: Callable[[Tensor], Any], parameters: list[Tensor]) -> list[tuple[Any, list[int]]]:
    """What it says of parameters, in the order in which that comes, with the places of those of which it does."""
    found: dict[Any, list[int]] = {}
    for k, theta in enumerate(parameters):
        found.setdefault(what(theta), []).append(k)
    return list(found.items())


def _device(x: Tensor) -> torch.device:
    return x.device


def _widest(values: list[Tensor]) -> torch.dtype:
    return torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32


def _at(places: list[int], *lists: list[Tensor]) -> list[list[Tensor]]:
    return [[of[k] for k in places] if of else [] for of in lists]


def _terms(weighted: bool, l1: float, l2: float) -> list[float]:
    """The penalty as an elementwise objective, with the origin as target; none is 0."""
    found = [MeanSquaredError.element_kind, float(weighted), 0.5 * l2] if l2 else []
    return [*found, *((MeanAbsoluteError.element_kind, 0.0, l1) if l1 else ())]


_SUM = REDUCTIONS.index("sum")


def _of_one(origins: list[Tensor], weights: list[Tensor], k: int) -> tuple[Tensor | None, Tensor | None]:
    return origins[k] if origins else None, weights[k] if weights else None


def _value(parameters: list[Tensor], origins: list[Tensor], weights: list[Tensor], l1: float, l2: float) -> Tensor:
    values, device = [], parameters[0].device
    for place, places in _by(_device, parameters):
        own = _at(places, parameters, origins, weights)
        if _together(place) and (l1 or l2):
            values.append(torch.ops.objkern.multi_penalty(*own, l1, l2).to(device))
        else:
            values += [value.to(device) for value in _values_one_by_one(*own, l1, l2)]
    total = torch.stack(values).sum() if values else torch.zeros((), device=device)
    return total.to(_widest(parameters))


def _values_one_by_one(
    parameters: list[Tensor], origins: list[Tensor], weights: list[Tensor], l1: float, l2: float
) -> Iterator[Tensor]:
    for k, theta in enumerate(parameters):
        kernels, (origin, weight) = _kernels(theta), _of_one(origins, weights, k)
        if kernels is None:
            yield _eager_value(theta, origins, weights, k, l1, l2)
        elif l1 or l2:
            loss, _ = kernels.elementwise(_terms(weight is not None, l1, l2), _SUM, theta, origin, weight=weight)
            yield loss.double()


def _gradient(
    upstream: Tensor, parameters: list[Tensor], origins: list[Tensor], weights: list[Tensor], l1: float, l2: float
) -> list[Tensor]:
    """Rounded once to the parameter's dtype, after the upstream gradient."""
    found: dict[int, Tensor] = {}
    for place, places in _by(_device, parameters):
        own = _at(places, parameters, origins, weights)
        if _together(place):
            gradients = torch.ops.objkern.multi_penalty_gradient(upstream.to(place), *own, l1, l2)
        else:
            gradients = _gradients_one_by_one(upstream, *own, l1, l2)
        found |= dict(zip(places, gradients, strict=True))
    return [found[k] for k in range(len(parameters))]


def _gradients_one_by_one(
    upstream: Tensor, parameters: list[Tensor], origins: list[Tensor], weights: list[Tensor], l1: float, l2: float
) -> list[Tensor]:
    found = []
    for k, theta in enumerate(parameters):
        kernels, (origin, weight) = _kernels(theta), _of_one(origins, weights, k)
        u = upstream.to(theta.device, _wide(theta))
        if kernels is None:
            found.append(_eager_gradient(u, theta, origins, weights, k, l1, l2))
        else:
            terms = _terms(weight is not None, l1, l2)
            found.append(kernels.elementwise_gradient(u, False, terms, _SUM, theta, origin, weight=weight))
    return found


def _eager_value(
    theta: Tensor, origins: list[Tensor], weights: list[Tensor], k: int, l1: float, l2: float
) -> Tensor:  # fmt: skip
    total = theta.new_zeros((), dtype=torch.float64)
    for d, f in _distances(theta, origins, weights, k):
        square = d * d if f is None else d * d * f
        total = total + l1 * d.abs().sum(dtype=torch.float64) + 0.5 * l2 * square.sum(dtype=torch.float64)
    return total


def _eager_gradient(
    u: Tensor, theta: Tensor, origins: list[Tensor], weights: list[Tensor], k: int, l1: float, l2: float
) -> Tensor:
    blocks = []
    for d, f in _distances(theta, origins, weights, k):
        g = d * (u * l2) if f is None else d * f * (u * l2)
        blocks.append((g + d.sign() * (u * l1) if l1 else g).to(theta.dtype))
    return torch.cat(blocks).view(theta.shape)


def _plain_value(
    parameters: list[Tensor], origins: list[Tensor], weights: list[Tensor], l1: float, l2: float
) -> Tensor:  # fmt: skip
    """In plain torch, for derivatives of any order and mode, and under the transforms of torch.func."""
    wide, values = _widest(parameters), []
    for k, theta in enumerate(parameters):
        origin, weight = _of_one(origins, weights, k)
        d = theta.to(wide) if origin is None else theta.to(wide) - origin.to(wide)
        square = d * d if weight is None else d * d * weight.to(wide)
        values.append((l1 * d.abs() + 0.5 * l2 * square).sum().to(parameters[0].device))
    return torch.stack(values).sum()


_SCHEMA = "Tensor[] parameters, Tensor[] origins, Tensor[] weights, float l1, float l2"
torch.library.define("objkern::parameter_penalty", f"({_SCHEMA}) -> Tensor")
torch.library.define("objkern::parameter_penalty_gradient", f"(Tensor upstream, {_SCHEMA}) -> Tensor[]")
torch.library.impl("objkern::parameter_penalty", "CompositeExplicitAutograd", _value)
torch.library.impl("objkern::parameter_penalty_gradient", "CompositeExplicitAutograd", _gradient)


@torch.library.register_fake("objkern::parameter_penalty")
def _fake_value(parameters: list[Tensor], *_: Any) -> Tensor:
    double = any(p.dtype == torch.float64 for p in parameters)
    return parameters[0].new_empty((), dtype=torch.float64 if double else torch.float32)


@torch.library.register_fake("objkern::parameter_penalty_gradient")
def _fake_gradient(upstream: Tensor, parameters: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    parameters, origins, weights, ctx.l1, ctx.l2 = inputs
    ctx.sizes = len(parameters), len(origins)
    ctx.save_for_backward(*parameters, *origins, *weights)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    count, with_origin = ctx.sizes
    saved = list(ctx.saved_tensors)
    parameters, origins, weights = saved[:count], saved[count : count + with_origin], saved[count + with_origin :]
    if torch.is_grad_enabled():  # plain torch where a second derivative may be asked for
        found = [
            _eager_gradient(upstream.to(theta.device, _wide(theta)), theta, origins, weights, k, ctx.l1, ctx.l2)
            for k, theta in enumerate(parameters)
        ]
    else:
        found = torch.ops.objkern.parameter_penalty_gradient(upstream, parameters, origins, weights, ctx.l1, ctx.l2)
    return found, [None] * len(origins), [None] * len(weights), None, None


torch.library.register_autograd("objkern::parameter_penalty", _backward, setup_context=_keep)


# ---- which parameters -----------------------------------------------------------------------------------------------

Parameters = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


def is_bias_or_norm(name: str, owner: nn.Module) -> bool:
    """By name: a parameter called bias, or one of a module whose class has "Norm" in its name."""
    return "bias" in name or "norm" in type(owner).__name__.lower()


def _may_be_transformed() -> bool:
    """Asked once for all parameters, of which there may be hundreds. A graph of torch.compile cannot ask."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_transformed(x: Tensor) -> bool:
    """Whether torch.func, or forward-mode differentiation, may ask for its derivative."""
    if not _may_be_transformed():
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None


def _of_module(model: nn.Module, include_all: bool) -> dict[str, Tensor]:
    """The parameters that require grad, each once, less biases and norm weights."""
    found, seen = {}, set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not (parameter.requires_grad or _is_transformed(parameter)):
                continue
            seen.add(id(parameter))
            if include_all or not is_bias_or_norm(name, module):
                found[f"{prefix}.{name}" if prefix else name] = parameter
    return found


def _of_iterable(parameters: Iterable[Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for place, item in enumerate(parameters):
        name, parameter = item if isinstance(item, tuple) and len(item) == 2 else (str(place), item)
        fits = isinstance(parameter, Tensor) and parameter.is_floating_point() and isinstance(name, str)
        if not fits or parameter.layout != torch.strided or parameter.is_nested:
            raise TypeError(
                "parameters: expected a module, parameters, or (name, parameter) pairs, dense floating-point ones, but "
                f"item {place} is {describe(item)}"
            )
        if name in found:
            raise ValueError(f"parameters: two of them are called {name!r}")
        found[name] = parameter
    return found


class _Held:
    """Parameters of others: not registered, not kept alive, not copied, and never written to a file."""

    def __init__(self, parameters: Any, include_all: bool) -> None:
        self.include_all = include_all
        self.model: Callable[[], Any] | None = None
        if isinstance(parameters, nn.Module):
            self.model, self.what = weakref.ref(parameters), type(parameters).__name__
            if not _of_module(parameters, include_all):
                raise ValueError(
                    f"parameters: {self.what} has none that require grad"
                    + ("" if include_all else " beside biases and norm weights; include_all=True takes those too")
                )
            return
        if isinstance(parameters, (Tensor, str, bytes, Mapping)) or not isinstance(parameters, Iterable):
            raise TypeError(
                f"parameters: expected a module, parameters, or (name, parameter) pairs but got {describe(parameters)}"
            )
        named = _of_iterable(parameters)
        if not named:
            raise ValueError("parameters: expected at least one but got none (was the iterator used up?)")
        self.what = f"{len(named)} parameters"
        self.references = {name: weakref.ref(parameter) for name, parameter in named.items()}

    def named(self) -> dict[str, Tensor]:
        if self.model is not None:
            model = self.model()
            if model is None:
                raise ReferenceError(f"the {self.what} that this term is about is gone")
            return _of_module(model, self.include_all)
        found = {name: reference() for name, reference in self.references.items()}
        gone = [name for name, parameter in found.items() if parameter is None]
        if gone:
            raise ReferenceError(f"parameters that this term is about are gone: {', '.join(gone[:3])}")
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            f"a term on parameters ({self.what}) cannot be pickled, because it points to the model; save the "
            "objective's state_dict, and build it anew around the model"
        )


# ---- the terms ------------------------------------------------------------------------------------------------------


def _takes_sums(theta: Tensor, g: Tensor | None) -> bool:
    """Whether there is a gradient that a kernel can add to."""
    return g is not None and g.layout == torch.strided and g.is_contiguous() and g.dtype == theta.dtype


class ParameterTerm(Term):
    """A term on parameters: added once per call, whatever the reduction and the normalizer.

    ``term()`` is its value, ``objective + c * term`` adds it to an objective, `accumulate_` its gradient to `.grad`.
    """

    name: ClassVar[str]
    about_parameters = True

    def __init__(self, parameters: Parameters, l1: float, l2: float, include_all: bool) -> None:
        super().__init__()
        if not isinstance(include_all, bool):
            raise TypeError(f"include_all: expected True or False but got {describe(include_all)}")
        self.l1, self.l2, self.include_all = l1, l2, include_all
        self._held = _Held(parameters, include_all)

    def _tensors(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The parameters, and of each its origin and its weight, if the term has them."""
        return list(self._held.named().values()), [], []

    def _tensors_of_one_kind(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        tensors = self._tensors()
        if len({theta.is_meta for theta in tensors[0]}) > 1:
            raise ValueError(f"{self._formula_name()}: some of its parameters have no values, on the meta device")
        return tensors

    def penalty(self) -> Tensor:
        """The value, float32 (float64 if a parameter is). Of DTensors that of the whole, on every rank."""
        tensors = self._tensors_of_one_kind()
        if not tensors[0]:
            return torch.zeros(())  # all are frozen
        if _may_be_transformed() and any(map(_is_transformed, tensors[0])):
            return _plain_value(*tensors, self.l1, self.l2)
        if not distributed.is_dtensor(*tensors[0]):
            return torch.ops.objkern.parameter_penalty(*tensors, self.l1, self.l2)
        values = []
        for where, places in _by(distributed.spread, tensors[0]):
            parts = [[distributed.own(x) for x in some] for some in _at(places, *tensors)]
            value = torch.ops.objkern.parameter_penalty(*parts, self.l1, self.l2)
            values.append(distributed.of_all_parts(value, where))
        return torch.stack([value.to(values[0].device, torch.float64) for value in values]).sum().to(_widest(values))

    @torch.no_grad()
    def accumulate_(self, weight: float | Tensor = 1.0) -> None:
        """``(weight * term()).backward()`` without a graph: adds to `.grad`, and makes it where there is none.

        >>> theta = torch.tensor([3.0, -4.0], requires_grad=True)
        >>> L2([theta]).accumulate_(0.5)
        >>> theta.grad
        tensor([ 1.5000, -2.0000])
        """
        weight = checked_weight("weight", weight)
        tensors = self._tensors_of_one_kind()
        if not tensors[0]:
            return
        parameters, origins, weights = ([distributed.own(x) for x in some] for some in tensors)
        gradients = [distributed.gradient_of(theta) for theta in tensors[0]]
        upstream = torch.as_tensor(weight, dtype=torch.float64, device=parameters[0].device)
        at_once: dict[torch.device, list[int]] = {}
        for k, (whole, theta, g) in enumerate(zip(tensors[0], parameters, gradients, strict=True)):
            if not whole.requires_grad:
                continue
            if _takes_sums(theta, g) and _together(theta.device):
                at_once.setdefault(theta.device, []).append(k)
                continue
            # A parameter at a time, so that no more than one gradient exists beside those that are kept.
            own = [theta], origins[k : k + 1], weights[k : k + 1]
            (found,) = torch.ops.objkern.parameter_penalty_gradient(upstream, *own, self.l1, self.l2)
            if g is None:
                whole.grad = distributed.spread_like(found, whole)
            elif g.is_sparse:  # of an embedding, say; the sum is dense
                whole.grad = found + g
            else:
                g.add_(found)
        for place, places in at_once.items():
            own = _at(places, parameters, origins, weights)
            torch.ops.objkern.multi_penalty_accumulate_(
                [gradients[k] for k in places], upstream.to(place), *own, self.l1, self.l2
            )  # fmt: skip

    def _arguments(self) -> str:
        return f"<{self._held.what}>" + (", include_all=True" if self.include_all else "")


class L2(ParameterTerm):
    """``sum(0.5 * p.square().sum() for p in parameters)``

    ½Σθ². Of a module its parameters that require grad, without biases and norm weights, which decay has no reason to
    shrink; ``include_all=True`` takes those too. Of an iterable of (named) parameters, all of them.

    With SGD this is weight decay; with Adam it is not, because the step divides the penalty's gradient by the size of
    all gradients: prefer ``torch.optim.AdamW``, θ ← θ − η·∇L − η·λ·θ, there.

    Source: Krogh and Hertz, "A Simple Weight Decay Can Improve Generalization", 1991; Loshchilov and Hutter,
    "Decoupled Weight Decay Regularization", 2019.

    >>> layer = nn.Linear(2, 1)
    >>> for parameter in layer.parameters():
    ...     _ = nn.init.constant_(parameter, 2.0)
    >>> L2(layer)().item(), L2(layer, include_all=True)().item()  # without the bias, and with it
    (4.0, 6.0)
    >>> objective = CrossEntropy() + 0.01 * L2(layer)
    >>> objective
    CrossEntropy() + 0.01*L2(<Linear>)
    """

    name = "l2"

    def __init__(self, parameters: Parameters, *, include_all: bool = False) -> None:
        super().__init__(parameters, 0.0, 1.0, include_all)


class L1(ParameterTerm):
    """``sum(p.abs().sum() for p in parameters)``

    Σ|θ|, over the parameters as `L2` takes them. The derivative at 0 is 0, as torch has it.

    Source: Tibshirani, "Regression Shrinkage and Selection via the Lasso", 1996.

    >>> theta = torch.tensor([3.0, -4.0], requires_grad=True)
    >>> L1([theta])().backward()
    >>> theta.grad
    tensor([ 1., -1.])
    """

    name = "l1"

    def __init__(self, parameters: Parameters, *, include_all: bool = False) -> None:
        super().__init__(parameters, 1.0, 0.0, include_all)


class ElasticNet(ParameterTerm):
    """``l1 * sum(p.abs().sum() for p in parameters) + l2 * sum(0.5 * p.square().sum() for p in parameters)``

    Both in one pass, over the parameters as `L2` takes them. l1, l2 ≥ 0, not both 0.

    Source: Zou and Hastie, "Regularization and Variable Selection via the Elastic Net", 2005.

    Raises:
        ValueError: a negative weight, or none that is positive.

    >>> theta = torch.tensor([3.0, -4.0])
    >>> ElasticNet([theta], l1=0.1, l2=0.01)()
    tensor(0.8250)
    """

    name = "elastic_net"

    def __init__(self, parameters: Parameters, l1: float, l2: float, *, include_all: bool = False) -> None:
        l1, l2 = checked_number("l1", l1, low=0.0), checked_number("l2", l2, low=0.0)
        if l1 == l2 == 0:
            raise ValueError("l1, l2: expected one of them to be positive but both are 0")
        super().__init__(parameters, l1, l2, include_all)

    def _arguments(self) -> str:
        return f"{super()._arguments()}, l1={self.l1!r}, l2={self.l2!r}"


class L2SP(ParameterTerm):
    """``sum(0.5 * (p - start).square().sum() for p, start in zip(parameters, pretrained))``

    ½Σ(θ − θ₀)², the distance from where the parameters were when the term was made, so that continued training keeps
    what they knew. The starting points are buffers of the term: they move with ``.to()`` and are in the state dict.

    Source: Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
    2018.

    Raises:
        ValueError: at a call, a parameter of another shape than when the term was made.
        ReferenceError: at a call, parameters that are gone: the term does not keep them alive.

    >>> layer = nn.Linear(2, 1)
    >>> stay = L2SP(layer)
    >>> stay().item()
    0.0
    >>> with torch.no_grad():
    ...     _ = layer.weight.add_(3.0)
    >>> stay().item()  # ½ · 2 · 3²
    9.0
    """

    name = "l2_sp"

    def __init__(self, parameters: Parameters, *, include_all: bool = False) -> None:
        super().__init__(parameters, 0.0, 1.0, include_all)
        for name, parameter in self._held.named().items():
            self.register_buffer(_buffer("start", name), parameter.detach().clone())

    def _tensors(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        parameters = self._held.named()
        return self._in_order(parameters), self._kept("start", parameters), []

    def _in_order(self, parameters: dict[str, Tensor]) -> list[Tensor]:
        return [p for name, p in parameters.items() if _buffer("start", name) in self._buffers]

    def _kept(self, kind: str, parameters: dict[str, Tensor]) -> list[Tensor]:
        """Of each parameter that there was when the term was made; what has been frozen since is left out."""
        found = []
        for name, parameter in parameters.items():
            kept = self._buffers.get(_buffer(kind, name))
            if kept is None:
                continue
            if distributed.is_dtensor(parameter) and kept.shape == parameter.shape:
                # If the model was sharded since, or otherwise: every rank keeps its own part.
                kept = self._buffers[_buffer(kind, name)] = distributed.part_of(kept, parameter)
            if kept.shape != parameter.shape or distributed.is_dtensor(parameter) != distributed.is_dtensor(kept):
                raise ValueError(
                    f"{self._formula_name()}: {name} is {describe(parameter)} now, but was {describe(kept)} when the "
                    "term was made; make it after the model is resized, and call it where the weights are as they "
                    "were: not between the forward and the backward pass of a model that FSDP shards"
                )
            found.append(kept.to(parameter.device))
        return found


class EWC(L2SP):
    """``sum(0.5 * (f * (p - start).square()).sum() for p, f, start in zip(parameters, fisher, pretrained))``

    ½ΣF(θ − θ₀)²: elastic weight consolidation holds those parameters where they were that an earlier task needs.

    Args:
        parameters: a module, or (named) parameters, as for `L2`.
        fisher: the diagonal of the Fisher information, a tensor of each parameter's shape by its name, as
            `diagonal_fisher` gives it; a parameter without one is left alone. Not negative. Buffers of the term.

    Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", 2017.

    >>> theta = torch.zeros(2, requires_grad=True)
    >>> stay = EWC([("theta", theta)], fisher={"theta": torch.tensor([1.0, 100.0])})
    >>> with torch.no_grad():
    ...     _ = theta.add_(1.0)
    >>> stay.accumulate_(0.1)
    >>> theta.grad
    tensor([ 0.1000, 10.0000])
    """

    name = "ewc"

    def __init__(self, parameters: Parameters, fisher: Mapping[str, Tensor], *, include_all: bool = False) -> None:
        super().__init__(parameters, include_all=include_all)
        if not isinstance(fisher, Mapping):
            raise TypeError(f"fisher: expected a dict of tensors by the names of parameters but got {describe(fisher)}")
        named = self._held.named()
        unknown = sorted(set(fisher) - set(named))
        if unknown:
            raise ValueError(f"fisher: {unknown[:3]} are not among the parameters {list(named)[:6]}")
        if not fisher:
            raise ValueError("fisher: expected a tensor for at least one parameter but got none")
        for name, parameter in named.items():
            if name not in fisher:
                del self._buffers[_buffer("start", name)]
                continue
            f = fisher[name]
            dense = isinstance(f, Tensor) and f.layout == torch.strided and not f.is_complex()
            if not dense or f.shape != parameter.shape:
                raise ValueError(
                    f"fisher: {name}: expected shape {tuple(parameter.shape)}, real numbers, but got {describe(f)}"
                )
            if not bool((f >= 0).all()):
                raise ValueError(f"fisher: {name}: expected numbers >= 0 but got {f.min().item()}")
            self.register_buffer(_buffer("fisher", name), f.detach().clone())

    def _tensors(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        parameters = self._held.named()
        return self._in_order(parameters), self._kept("start", parameters), self._kept("fisher", parameters)


def _buffer(kind: str, name: str) -> str:
    """A buffer's name, which may have no dots; each name has its own."""
    escaped = name.replace("\\", "\\\\").replace("/", "\\/")
    return f"{kind}/{escaped.replace('.', '/')}"


def diagonal_fisher(
    model: nn.Module, batches: Iterable[Any], log_likelihood: Callable[[nn.Module, Any], Tensor], *,
    include_all: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """``{name: mean of (d log p(sample) / d parameter)² over the samples}``

    The diagonal of the empirical Fisher information, for `EWC`. The gradient is taken sample by sample, because the
    square of a batch's mean gradient is not the mean of the squares. Gradients that parameters hold stay as they are.

    Args:
        model: its parameters as for `L2`; used as it is, so call ``model.eval()`` before to leave dropout out.
        batches: a data loader; anything that `log_likelihood` takes.
        log_likelihood: ``log_likelihood(model, batch) -> (N,)``, the log-probability of each sample of the batch.

    Returns:
        A tensor for each parameter, float32 (float64 for float64 parameters).

    Raises:
        ValueError: no samples, or a log-likelihood that is no vector.

    Source: Kirkpatrick et al., 2017; Kunstner et al., "Limitations of the Empirical Fisher Approximation", 2019.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(layer.weight, 1.0)
    >>> def log_likelihood(model, x):  # of a normal distribution with the variance 1, up to a constant
    ...     return -0.5 * (model(x) - 3.0).square().squeeze(-1)
    >>> diagonal_fisher(layer, [torch.tensor([[1.0], [2.0]])], log_likelihood)  # mean of 2² and 2²
    {'weight': tensor([[4.]])}
    """
    parameters = _of_module(model, include_all)
    if not parameters:
        raise ValueError(f"model: {type(model).__name__} has no parameters to penalize; see include_all")
    if distributed.is_dtensor(*parameters.values()):
        raise NotImplementedError(
            "model: its weights are in parts, and a sample's gradient would be of no rank's; take the Fisher "
            "information of the whole model, before it is sharded"
        )
    found = {
        name: torch.zeros_like(p, dtype=_wide(p), memory_format=torch.preserve_format) for name, p in parameters.items()
    }
    count = 0
    for batch in batches:
        values = log_likelihood(model, batch)
        if not isinstance(values, Tensor) or values.dim() != 1:
            raise ValueError(f"log_likelihood: expected one number per sample, shape (N,), but got {describe(values)}")
        for place in range(len(values)):
            last = place == len(values) - 1
            gradients = torch.autograd.grad(
                values[place], list(parameters.values()), retain_graph=not last, allow_unused=True
            )
            for total, g in zip(found.values(), gradients, strict=True):
                if g is not None:
                    wide = g.to(total.dtype)
                    total.addcmul_(wide, wide)
        count += len(values)
    if count == 0:
        raise ValueError("batches: expected at least one sample but got none")
    return {name: total.div_(count) for name, total in found.items()}
