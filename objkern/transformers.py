"""An objective in the place of the loss of Hugging Face models and of their Trainer.

    attach(model, objective)          the model's own loss, by the fused linear path: no logits while it trains
    attach(..., reference=frozen)     the same beside another model's logits, which do not exist either
    compute_loss_func(objective)      for Trainer(compute_loss_func=...), any head, exact under accumulation

`attach` changes three things of one instance: `forward` of its head, which gives a stand-in for the logits while the
model trains on labels; `loss_function`, which takes that stand-in; and `forward` of the model, which says when. What a
model does between its head and its loss (scale, cap, bias, cast, shift) happens to the stand-in and is recorded there.
Whatever nobody foresaw makes a tensor of it, as large as the logits are without objkern, which it is from then on: what
happens to that tensor, also in place, the loss sees.

Nothing here imports transformers; models of 4.57 and later have what is used.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed
from .objective import Objective

__all__ = ["DeferredLogits", "attach", "compute_loss_func", "detach", "is_attached", "parts"]

# ---- the stand-in for logits ----------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A linear layer as the loss reads it: (V, D) and (V) or None."""

    weight: Tensor
    bias: Tensor | None


def _recorded(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the stand-in; the tensor's own, once there is one."""

    @functools.wraps(method)
    def of_either(self: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
        if self.is_materialized():
            return getattr(self.materialize(), method.__name__)(*_tensors(args), **_tensors(kwargs))
        return method(self, *args, **kwargs)

    return of_either


class DeferredLogits:
    """``cap * torch.tanh(scale * F.linear(hidden, weight, bias) / cap)`` that nobody has computed (no cap: no tanh)

    What models do with logits on their way to the loss is recorded: multiplication and division by a number, tanh, the
    addition of a bias, casts, views that keep the classes, and indices of the other dimensions. `cross_entropy` of it
    is the objective. Anything else computes it, with its graph, and from then on it is that tensor.

    Args:
        attached: whose objective `cross_entropy` is.
        hidden: (..., D).
        layer: weight (V, D) and bias (V) or None.
        base, view: the logits that these are a view of, and the function that makes the view of their tensor.
    """

    def __init__(
        self, attached: Attached, hidden: Tensor, layer: Layer, scale: float | Tensor = 1.0,
        cap: float | None = None, dtype: torch.dtype | None = None,
        base: DeferredLogits | None = None, view: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self._attached, self._hidden, self._layer = attached, hidden, layer
        self._scale, self._cap = scale, cap  # before a cap is known, tanh(scale·logits) has the cap 1
        self.dtype = dtype or hidden.dtype
        self.shape = torch.Size((*hidden.shape[:-1], layer.weight.shape[0]))
        self.device, self.ndim, self.requires_grad = hidden.device, hidden.ndim, True
        self.is_cuda = hidden.is_cuda
        self._tensor: Tensor | None = None
        self._base, self._view = base, view
        # Tensors that were made of rows alone, for who reads them, and their versions; of all views of the same logits.
        self._of_rows: list[tuple[Tensor, int]] = [] if base is None else base._of_rows

    def __repr__(self) -> str:
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def _with(self, **changes: Any) -> DeferredLogits:
        now = {"hidden": self._hidden, "layer": self._layer, "scale": self._scale, "cap": self._cap,
               "dtype": self.dtype}  # fmt: skip
        return DeferredLogits(self._attached, **(now | changes))

    def _copied(self, copy: Callable[[Tensor], Tensor], **changes: Any) -> DeferredLogits:
        """What shares no memory with these: a copy is of what they are now, and not of what they become."""
        if not self.is_materialized():
            return self._with(**changes)
        found = self._with(**changes, base=self, view=copy)
        found.materialize()
        return found

    def materialize(self) -> Tensor:
        """The tensor, (..., V), with its graph; the same one at every call, and a view of its base's."""
        if self._tensor is not None:
            return self._tensor
        base = self._base
        if base is not None and (base.is_materialized() or base.numel() == self.numel()):
            self._tensor = self._view(base.materialize())
            return self._tensor
        z = distributed.whole_logits(self._hidden, *self._layer) * self._scale
        z = z if self._cap is None else self._cap * torch.tanh(z / self._cap)
        self._tensor = z.to(self.dtype)
        if base is not None and not self._tensor.is_inference():
            self._of_rows.append((self._tensor, self._tensor._version))
        return self._tensor

    def is_materialized(self) -> bool:
        """Whether there is a tensor, of these logits or of those that they are a view of."""
        if any(tensor._version != version for tensor, version in self._of_rows):
            raise NotImplementedError(
                "attach: this model changes some rows of its logits in place; leave it unattached and use "
                "compute_loss_func, or have it change all of them"
            )
        return self._tensor is not None or (self._base is not None and self._base.is_materialized())

    # -- what models do with logits

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def to(self, *arguments: Any, **options: Any) -> Any:
        device, dtype, *_ = torch._C._nn._parse_to(*arguments, **options)
        if device is not None and device != self.device:
            return self.materialize().to(*arguments, **options)
        if dtype in (None, self.dtype):
            return self
        return self._copied(operator.methodcaller("to", dtype), dtype=dtype)

    def float(self) -> Any:
        return self.to(torch.float32)

    def contiguous(self) -> DeferredLogits:
        return self

    def view(self, *shape: Any) -> Any:
        deferred = self._reshaped(*shape)
        return self.materialize().view(*shape) if deferred is None else deferred

    def reshape(self, *shape: Any) -> Any:
        deferred = self._reshaped(*shape)
        return self.materialize().reshape(*shape) if deferred is None else deferred

    def _reshaped(self, *shape: Any) -> DeferredLogits | None:
        """None where classes do not stay together."""
        wanted = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        if not all(isinstance(size, int) for size in wanted) or wanted[-1] not in (self.shape[-1], -1):
            return None
        if wanted[-1] == -1 and (-1 in wanted[:-1] or math.prod(wanted[:-1]) != math.prod(self.shape[:-1])):
            return None
        hidden = self._hidden.reshape(*wanted[:-1], self._hidden.shape[-1])
        return self._with(hidden=hidden, base=self, view=operator.methodcaller("reshape", wanted))

    def __getitem__(self, index: Any) -> Any:
        indices = index if isinstance(index, tuple) else (index,)
        plain = all(isinstance(part, int | slice) or part is Ellipsis for part in indices)
        given = sum(part is not Ellipsis for part in indices)
        of_rows = (given < self.ndim and Ellipsis not in indices) or (given <= self.ndim and indices[-1] == slice(None))
        if plain and of_rows:
            return self._with(hidden=self._hidden[index], base=self, view=operator.itemgetter(index))
        if isinstance(index, Tensor) and index.dtype == torch.bool and index.ndim < self.ndim:
            return self._copied(operator.itemgetter(index), hidden=self._hidden[index])
        return self.materialize()[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.materialize()[index] = value

    @_recorded
    def __mul__(self, factor: Any) -> Any:
        if not _is_number(factor):
            return self.materialize() * factor
        if self._cap is None:
            return self._with(scale=self._scale * factor)
        if isinstance(factor, Tensor):
            return self.materialize() * factor
        # factor·cap·tanh(scale·z / cap) is the same with another cap and as many times the scale; and even in the cap.
        return self._with(scale=self._scale * factor, cap=self._cap * abs(factor))

    __rmul__ = __mul__

    @_recorded
    def __truediv__(self, divisor: Any) -> Any:
        return self * (1.0 / divisor) if _is_number(divisor) else self.materialize() / divisor

    @_recorded
    def __add__(self, bias: Any) -> Any:
        fits = isinstance(bias, Tensor) and bias.numel() == self.shape[-1] == bias.shape[-1] and not bias.requires_grad
        if not fits or self._cap is not None or isinstance(self._scale, Tensor) or self._scale != 1.0:
            return self.materialize() + bias
        own = bias.reshape(-1).to(self._layer.weight.dtype)
        return self._with(layer=Layer(self._layer.weight, own if self._layer.bias is None else self._layer.bias + own))

    __radd__ = __add__

    @_recorded
    def tanh(self) -> Any:
        return self._with(cap=1.0) if self._cap is None else self.materialize().tanh()

    # -- what torch's ColwiseParallel does with what a head gives: these are all classes' already

    placements = ()

    def redistribute(self, *_: Any, **__: Any) -> DeferredLogits:
        return self

    def to_local(self) -> DeferredLogits:
        return self

    # -- what they do with it in functions of torch, and everything else

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy and isinstance(args[0] if args else kwargs.get("input"), DeferredLogits):
            return _cross_entropy(*args, **kwargs)
        if func in (torch.tanh, torch.Tensor.tanh) and len(args) == 1 and not kwargs:
            return args[0].tanh()
        return func(*_tensors(args), **_tensors(kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in self._OWN:  # of no instance yet, as copy and pickle make one
            raise AttributeError(name)
        return getattr(self.materialize(), name)

    _OWN = ("_tensor", "_hidden", "_base", "_view", "_of_rows")

    def loss(self, target: Tensor, **options: Any) -> Tensor:
        """The objective of the rows, by the fused linear path; of the tensor, if there is one."""
        if self.is_materialized():
            return self._attached.loss_of_tensor(self.materialize(), target, **options)
        return self._attached.loss(self._hidden, self._layer, target, self._scale, self._cap, **options)

    def beside(self, hidden: Tensor, scale: float | Tensor, cap: float | None) -> tuple[Tensor, ...]:
        """Hidden states, weight and bias of a reference, for a call with these hidden states, this scale and this cap

        ``cap * tanh(scale * (h @ w.T + b) / cap)`` is what the call makes of them.
        """
        if (self._cap is None) != (cap is None) or (cap is not None and not math.isclose(self._cap, cap)):
            raise NotImplementedError(
                f"reference: its logits have the softcap {self._cap}, the model's have {cap}; a call has one for both"
            )
        if self._hidden.shape[:-1].numel() != hidden.shape[:-1].numel():
            raise ValueError(
                f"reference: expected hidden states of {tuple(hidden.shape[:-1])} positions but got "
                f"{tuple(self._hidden.shape[:-1])}; this model leaves some out between its head and its loss"
            )
        own, (weight, bias) = self._hidden.reshape(*hidden.shape[:-1], -1), self._layer
        factor = self._scale / (scale.detach() if isinstance(scale, Tensor) else scale)
        if isinstance(factor, Tensor) or factor != 1.0:  # its own scale, where the call has the model's
            own, bias = (own * factor).to(own.dtype), None if bias is None else (bias * factor).to(bias.dtype)
        return (own, weight.detach()) if bias is None else (own, weight.detach(), bias.detach())


for _name in ("sub", "rsub", "rtruediv", "neg", "pow", "matmul", "lt", "le", "gt", "ge", "eq", "ne", "len", "iter",
              "float", "array"):  # fmt: skip

    def _of_tensor(self: DeferredLogits, *arguments: Any, _name: str = f"__{_name}__") -> Any:
        return getattr(self.materialize(), _name)(*_tensors(arguments))

    setattr(DeferredLogits, f"__{_name}__", _of_tensor)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) or (isinstance(x, Tensor) and x.dim() == 0)


def _tensors(values: Any) -> Any:
    if isinstance(values, DeferredLogits):
        return values.materialize()
    if isinstance(values, dict):
        return {key: _tensors(value) for key, value in values.items()}
    if isinstance(values, tuple | list):
        return type(values)(_tensors(value) for value in values)
    return values


def _cross_entropy(
    input: DeferredLogits, target: Tensor, weight: Tensor | None = None, size_average: Any = None,
    ignore_index: int = -100, reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """The loss of a model that calls cross-entropy itself, and not its `loss_function`."""
    if weight is not None or label_smoothing or size_average is not None or reduce is not None:
        raise NotImplementedError(
            "attach: this model weighs or smooths the cross-entropy of its logits by itself, which the objective would "
            "replace; leave it unattached and use compute_loss_func"
        )
    options = _denominators(target, input._attached.count, ignore_index) if reduction == "mean" else {}
    return input.loss(target, ignore_index=ignore_index, reduction=reduction, **options)


# ---- models ---------------------------------------------------------------------------------------------------------


class Attached:
    """What `attach` keeps on a model: the objective, how to call it, and the parts of its last call."""

    def __init__(
        self, owner: nn.Module, head: nn.Module, objective: Objective, options: dict[str, Any],
        reference: nn.Module | None = None,
    ) -> None:  # fmt: skip
        self.objective, self.options, self.reference = objective, options, reference
        self.forward, self.forward_of_head = (_call_of(module) for module in (owner, head))
        parameters = inspect.signature(type(owner).forward).parameters
        self.names = list(parameters)[1:]
        self.place_of_labels = self.names.index("labels") if "labels" in self.names else len(self.names)
        self.takes_count = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.replaced = [(module, name, module.__dict__.get(name)) for module, name in (
            (owner, "forward"), (owner, "_loss_function"), (owner, "accepts_loss_kwargs"), (owner, _KEY),
            (head, "forward"), (head, _KEY))]  # fmt: skip
        self.asked = False  # whether its last forward pass has come to the objective
        self.materializes = True  # whether an evaluation has its logits as a tensor
        self.defers = False  # whether the head is called by a forward pass that ends in a loss
        self.count: Tensor | float | None = None  # num_items_in_batch, for models that do not pass it to their loss
        self.logits_of_reference: DeferredLogits | None = None  # of the call
        self.parts: dict[str, Tensor] = {}

    def loss(
        self, hidden: Tensor, layer: Layer, target: Tensor, scale: float | Tensor, cap: float | None, **options: Any
    ) -> Tensor:
        self.asked = True
        _must_be_there(layer.weight)
        at = distributed.shard_of(layer.weight)  # of a head that somebody has split by class
        if self.logits_of_reference is not None:
            given, *head = self.logits_of_reference.beside(hidden, scale, cap)
            options["reference"] = given, *(x if at is None or distributed.is_dtensor(x) else x[at.own] for x in head)
        loss, parts = self.objective.linear(
            hidden, layer.weight, _beside(hidden, target), layer.bias, logit_scale=scale, softcap=cap,
            return_parts=True, process_group=at, **(self.options | options),
        )  # fmt: skip
        self.parts = parts
        return loss

    def loss_of_tensor(self, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        self.asked = True
        if self.logits_of_reference is not None:
            options["reference"] = self.logits_of_reference.materialize().reshape(logits.shape)
        loss, self.parts = self.objective(
            logits, _beside(logits, target), backend=self.options["backend"], return_parts=True, **options
        )
        return loss


def _beside(rows: Tensor, target: Tensor) -> Tensor:
    """A label for each row, where it is and of its shape."""
    shape = rows.shape[:-1]
    return target.to(rows.device).reshape(shape if target.numel() == shape.numel() else target.shape)


_KEY = "_objkern_attached"


def _call_of(module: nn.Module) -> Callable[..., Any]:
    """Its forward as a function of the module: its class's, or one that somebody has put in the place of that."""
    own = module.__dict__.get("forward")
    return type(module).forward if own is None else _Unbound(own)


class _Unbound(NamedTuple):
    """A bound function as one of the module that it is bound to."""

    function: Callable[..., Any]

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class _Bound:
    """A function as a method of one module; unlike a method it can be pickled, and has the signature of its class's."""

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self.function, self.module = function, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(type(self.module).forward, self.module))


def _must_be_there(weight: Tensor) -> None:
    """Weights of a module that FSDP shards by itself are gone when its forward pass ends, and the loss comes later."""
    if torch.compiler.is_compiling() or type(weight) not in (Tensor, nn.Parameter) or weight.device.type == "meta":
        return
    if weight.numel() > 0 and weight.untyped_storage().nbytes() == 0:
        raise ValueError(
            "head: its weight is sharded by itself, and is not there when the loss is computed; shard the head with "
            "the whole model: fully_shard(model), without fully_shard(model.lm_head)"
        )


def attach(
    model: nn.Module, objective: Objective, *, mode: str = "auto", chunk_rows: int | None = None,
    memory_budget: int | None = None, backend: str = "auto", reference: nn.Module | None = None,
) -> nn.Module:  # fmt: skip
    """``model(**inputs, labels=labels).loss`` becomes ``objective(model(**inputs).logits, labels)``, shifted as the
    model shifts, and by the fused linear path: while the model trains, its logits are never materialised

    For models with a language-model head, causal ones and sequence-to-sequence ones. A scale of the logits, a softcap,
    `final_logits_bias`, `logits_to_keep`, tied embeddings, `num_items_in_batch` and auxiliary losses are as the model
    has them. In training with labels ``outputs.logits`` is a `DeferredLogits`, which becomes a tensor, with all the
    memory that takes, when it is used. In evaluation mode it is a tensor, and the loss is the objective's too; without
    labels nothing differs.

    Under `num_items_in_batch`, which Trainer passes where gradients accumulate, the sum of the rows is divided by it,
    and terms on parameters count by this batch's share of it, so that a whole window of batches is one big batch.

    Args:
        model: a transformers model or one that peft made of it, or whatever has `get_output_embeddings`. LoRA on the
            head trains (its product becomes a weight once a call); dropout of its own must be 0.
        objective: any sum of terms on logits and on parameters.
        mode, chunk_rows, memory_budget, backend: as in `Objective.linear`.
        reference: another model of the same classes, for a KL divergence to it, such as a frozen copy. It is run on the
            inputs of every call, as it is (call its `eval()`), without gradients and up to its last hidden states: its
            logits, too, exist a chunk at a time. Its own scale and bias are honoured; a softcap must be the model's.

    Returns:
        The model. `detach` takes the objective away; attaching anew replaces it. `parts(model)` has the parts.

    Raises:
        TypeError: no objective; a model without a head of its own, or one that is no linear layer.
        ValueError, NotImplementedError: an objective that the fused linear path cannot have with labels alone, as a
            KL divergence without a reference; or a reference that no term reads, or one of other classes.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from objkern.transformers import attach, detach, is_attached, parts
    >>> sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    >>> model = attach(LlamaForCausalLM(LlamaConfig(**sizes)), CrossEntropy() + 1e-4 * ZLoss())
    >>> tokens = torch.arange(12)[None]
    >>> outputs = model(input_ids=tokens, labels=tokens)
    >>> outputs.loss.backward()
    >>> outputs.logits
    DeferredLogits(shape=(1, 12, 64), dtype=torch.float32, device=cpu)
    >>> list(parts(model))
    ['cross_entropy', 'z_loss', 'total', 'lse', 'accuracy', 'target_probability', 'rows']
    >>> is_attached(detach(model))
    False
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"objective: expected an objkern.Objective but got {type(objective).__name__}")
    owner = _owner(model)
    head = owner.get_output_embeddings()
    layer = _layer_of(head)
    options = {"mode": mode, "chunk_rows": chunk_rows, "memory_budget": memory_budget, "backend": backend}
    # Now, and not after the first forward pass: one row of one feature.
    weight = layer.weight.detach()
    narrow = torch.zeros(1, 1, dtype=weight.dtype, device=weight.device)  # whole, also where the weight is sharded
    of_reference = {} if reference is None else {"reference": _narrow_reference(reference, owner, weight, narrow)}
    with torch.no_grad():
        objective.linear(narrow, narrow.expand(weight.shape[0], 1), torch.zeros(1, dtype=torch.long).to(weight.device),
                         **options, **of_reference)  # fmt: skip
    detach(model)
    attached = Attached(owner, head, objective, options, reference)
    for module in (owner, head):
        object.__setattr__(module, _KEY, attached)
    owner.forward = _Bound(_forward, owner)  # type: ignore[method-assign]
    head.forward = _Bound(_forward_of_head, head)  # type: ignore[method-assign]
    owner._loss_function = functools.partial(_loss_function, owner)
    owner.accepts_loss_kwargs = True  # Trainer passes num_items_in_batch
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undoes `attach`: the model is as it was. Returns it."""
    owner = _owner(model)
    if _KEY in owner.__dict__:
        for module, name, before in owner.__dict__[_KEY].replaced:
            if before is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = before
    return model


def is_attached(model: nn.Module, objective: Objective | None = None, reference: nn.Module | None = None) -> bool:
    """Whether an objective, or this one, and beside this reference, if one is given, is the loss of the model."""
    attached = _owner(model).__dict__.get(_KEY)
    return (
        attached is not None
        and (objective is None or attached.objective is objective)
        and (reference is None or attached.reference is reference)
    )


@contextlib.contextmanager
def measuring(model: nn.Module, objective: Objective) -> Iterator[None]:
    """The objective is the model's loss, in evaluation mode too without logits; then whatever was it before."""
    there = is_attached(model)
    attached = _owner(model if there else attach(model, objective)).__dict__[_KEY]
    before = attached.objective, attached.reference, attached.parts
    attached.objective, attached.reference, attached.materializes = objective, None, False
    try:
        yield
    finally:
        attached.objective, attached.reference, attached.parts = before
        attached.materializes = True
        if not there:
            detach(model)


def parts(model: nn.Module) -> dict[str, Tensor]:
    """The parts of the last loss of an attached model: every term, the total, the accuracy; detached."""
    attached = _owner(model).__dict__.get(_KEY)
    if attached is None:
        raise ValueError("model: no objective is attached")
    return dict(attached.parts)


def _owner(model: nn.Module) -> nn.Module:
    """The model that has the head, out of what wraps it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module but got {type(model).__name__}")
    found = model
    for name in ("module", "_orig_mod"):  # DistributedDataParallel, torch.compile
        found = getattr(found, name, found)
    if hasattr(found, "get_base_model"):  # peft
        found = found.get_base_model()
    if getattr(found, "get_output_embeddings", None) is None or found.get_output_embeddings() is None:
        raise TypeError(
            f"model: {type(found).__name__} has no language-model head (no output embeddings); for other heads there "
            "is objkern.transformers.compute_loss_func"
        )
    return found


def _layer_of(head: nn.Module) -> Layer:
    """The weight and bias that a head applies, with what peft adds to it."""
    base = getattr(head, "base_layer", None)
    if base is None:
        if type(head).forward is not nn.Linear.forward:
            raise TypeError(f"model: its head is a {type(head).__name__}, and attach needs a linear layer")
        return Layer(head.weight, head.bias)
    if type(base).forward is not nn.Linear.forward or not hasattr(head, "get_delta_weight"):
        raise TypeError(f"model: its head is a {type(head).__name__} on {type(base).__name__}, and no LoRA on a linear")
    weight = base.weight
    if head.disable_adapters or head.merged:
        return Layer(weight, base.bias)
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        if getattr(head, "use_dora", {}).get(name, False) or getattr(head, "lora_bias", {}).get(name, False):
            raise NotImplementedError(f"attach: the adapter {name!r} of the head is DoRA or has a bias, not plain LoRA")
        if getattr(head.lora_dropout[name], "p", 0.0) > 0.0:
            raise NotImplementedError(
                f"attach: the adapter {name!r} of the head has a dropout of its own; set lora_dropout=0.0, or leave "
                "the head out of target_modules"
            )
        delta = head.lora_B[name].weight @ head.lora_A[name].weight  # (V, D)
        weight = weight + (delta * head.scaling[name]).to(weight.dtype)
    return Layer(weight, base.bias)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    attached = self.__dict__[_KEY]
    if self.get_output_embeddings().__dict__.get(_KEY) is not attached:  # resized or wrapped since: another module
        attach(self, attached.objective, reference=attached.reference, **attached.options)
        attached = self.__dict__[_KEY]
    place = attached.place_of_labels
    if kwargs.get("labels") is None and (place >= len(args) or args[place] is None):
        return attached.forward(self, *args, **kwargs)
    if attached.objective._penalized and _is_sharded(self):
        raise NotImplementedError(
            "objective: a term on parameters cannot be in the loss of a model that FSDP shards, of whose weights some "
            "are gathered then and some are not; leave it out, and call (c * term).accumulate_() behind the backward "
            "pass"
        )
    attached.defers, attached.asked = True, False
    attached.count = kwargs.get("num_items_in_batch")
    if attached.reference is not None:
        given = dict(zip(attached.names, args, strict=False)) | kwargs
        attached.logits_of_reference = _logits_of_reference(attached, given)
    if not attached.takes_count:
        kwargs.pop("num_items_in_batch", None)
    try:
        outputs = attached.forward(self, *args, **kwargs)
    finally:
        attached.defers, attached.count, attached.logits_of_reference = False, None, None
    if not attached.asked and (isinstance(outputs, tuple) or _field(outputs, "loss") is not None):
        raise NotImplementedError(
            f"attach: {type(self).__name__} computes its loss from its logits by itself, in a way that the objective "
            "does not see; leave it unattached and use compute_loss_func"
        )
    return outputs if self.training or not attached.materializes else _materialized(outputs)


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP shards it, or layers of it."""
    return any(hasattr(module, "set_requires_gradient_sync") for module in model.modules())


def _narrow_reference(reference: nn.Module, owner: nn.Module, weight: Tensor, narrow: Tensor) -> tuple[Tensor, Tensor]:
    """Of one row and one feature, to ask the objective whether it takes a reference."""
    frozen = _owner(reference)
    if frozen is owner:
        raise ValueError("reference: expected another model but got the model itself; copy it")
    classes = _layer_of(frozen.get_output_embeddings()).weight.shape[0]
    if classes != weight.shape[0]:
        raise ValueError(f"reference: expected a head of {weight.shape[0]} classes but got one of {classes}")
    return narrow, narrow.expand(classes, 1)


_OF_THE_MODEL = ("inputs_embeds", "decoder_inputs_embeds", "encoder_outputs", "past_key_values")
_OF_THE_CALL = ("labels", "num_items_in_batch", "return_dict", "use_cache", "output_attentions", "output_hidden_states")


@torch.no_grad()
def _logits_of_reference(attached: Attached, given: dict[str, Any]) -> DeferredLogits:
    """Of the same inputs, by a model whose head is told for this one call to leave them uncomputed."""
    for name in _OF_THE_MODEL:
        if given.get(name) is not None:
            raise NotImplementedError(
                f"reference: expected the numbers of tokens, which two models can share, but got {name}; prompt "
                "vectors of peft are such"
            )
    inputs = {name: value for name, value in given.items() if name not in _OF_THE_CALL}
    owner = _owner(attached.reference)
    if owner.config.is_encoder_decoder and inputs.get("decoder_input_ids") is None:
        inputs["decoder_input_ids"] = owner.prepare_decoder_input_ids_from_labels(given["labels"])
    head = owner.get_output_embeddings()
    before = head.__dict__.get("forward")
    head.forward = MethodType(lambda self, hidden: DeferredLogits(attached, hidden, _layer_of(self)), head)
    try:
        logits = attached.reference(**inputs, use_cache=False, return_dict=True).logits
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before
    if not isinstance(logits, DeferredLogits) or logits.is_materialized():
        raise NotImplementedError(
            f"reference: {type(owner).__name__} does more with its logits than scale, cap and shift them"
        )
    return logits


def _materialized(outputs: Any) -> Any:
    if isinstance(outputs, tuple):
        return tuple(_tensors(value) for value in outputs)
    for name, value in list(outputs.items()):
        if isinstance(value, DeferredLogits):
            outputs[name] = value.materialize()
    return outputs


def _forward_of_head(self: nn.Module, hidden: Tensor) -> Any:
    attached = self.__dict__[_KEY]
    if not attached.defers:
        return attached.forward_of_head(self, hidden)
    if distributed.is_dtensor(hidden):  # as torch's ColwiseParallel hands them on; their gradient is summed by the loss
        from torch.distributed.tensor import Replicate

        everywhere = [Replicate()] * hidden.device_mesh.ndim
        hidden = hidden.redistribute(placements=everywhere).to_local(grad_placements=everywhere)
    return DeferredLogits(attached, hidden, _layer_of(self))


def _loss_function(
    self: nn.Module, logits: Any, labels: Tensor, vocab_size: int | None = None,
    num_items_in_batch: Tensor | float | None = None, ignore_index: int = -100, shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:  # fmt: skip
    """As transformers' ForCausalLMLoss and ForMaskedLMLoss, whose arguments these are."""
    attached = self.__dict__[_KEY]
    if shift_labels is None:
        shifts = getattr(self, "loss_type", None) != "ForMaskedLM"
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shifts else labels
    options = {"ignore_index": ignore_index, **_denominators(shift_labels, num_items_in_batch, ignore_index)}
    if isinstance(logits, DeferredLogits):
        return logits.loss(shift_labels, **options)
    return attached.loss_of_tensor(logits, shift_labels, **options)


def _denominators(labels: Tensor, count: Tensor | float | None, ignore_index: int = -100) -> dict[str, Any]:
    """The number of rows of all batches that make a step, and this batch's share of it for what is not of rows."""
    if count is None:
        return {}
    rows = (labels != ignore_index).sum()
    count = count.to(rows.device) if isinstance(count, Tensor) else count
    return {"normalizer": count, "parameter_weight": rows / count}


# ---- Trainer --------------------------------------------------------------------------------------------------------


def compute_loss_func(objective: Objective, *, shift: bool | None = None, backend: str = "auto") -> Callable[..., Any]:
    """``transformers.Trainer(..., compute_loss_func=compute_loss_func(objective))``: the objective of a model's logits

    For every head: causal and sequence-to-sequence language models, token classification, sequence classification by
    class (labels (B)), by several labels at once (float labels (B, L)) or by numbers (float labels of the logits'
    shape, or (B) beside (B, 1)), and question answering. Sums are divided by `num_items_in_batch` where Trainer gives
    it, whatever the head: transformers' own losses of classification heads take a mean of each batch, which Trainer
    then adds up as if they were sums (huggingface/transformers#47688). The logits are materialised; for language models
    `attach` is the way without them.

    Args:
        objective: of rows for class labels, of elements for float labels.
        shift: whether position t is to predict label t + 1; by default for outputs of causal language models.
        backend: as in `Objective`.

    Returns:
        ``(outputs, labels, num_items_in_batch=None) -> loss``. Question answering has two labels a row, its start and
        its end: (B, 2), which Trainer can count (as a column `labels`, with remove_unused_columns=False), a pair of
        tensors, or a dict with start_positions and end_positions; the loss is the mean of the two.

    Raises (when called):
        TypeError, ValueError: labels that do not fit the outputs.

    >>> from objkern.transformers import compute_loss_func
    >>> loss = compute_loss_func(CrossEntropy(label_smoothing=0.3))
    >>> outputs = {"logits": torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]])}
    >>> loss(outputs, torch.tensor([0, 2]))
    tensor(1.0795)
    >>> loss(outputs, torch.tensor([0, 2]), num_items_in_batch=8)  # of four such batches
    tensor(0.2699)
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"objective: expected an objkern.Objective but got {type(objective).__name__}")

    def loss(outputs: Any, labels: Any, num_items_in_batch: Tensor | float | None = None) -> Tensor:
        if _field(outputs, "start_logits") is not None:
            return _of_span(objective, outputs, labels, num_items_in_batch, backend)
        logits = _field(outputs, "logits")
        if logits is None:
            raise TypeError(f"outputs: expected logits among them but got {type(outputs).__name__}")
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels: expected a tensor but got {type(labels).__name__}")
        causal = "CausalLM" in type(outputs).__name__ if shift is None else shift
        if labels.is_floating_point():
            if [size for size in labels.shape if size != 1] != [size for size in logits.shape if size != 1]:
                raise ValueError(
                    f"labels: expected one for each of {tuple(logits.shape)} logits but got {tuple(labels.shape)}"
                )
            if causal:
                raise ValueError(
                    "labels: expected class labels, which are shifted here, but got probabilities or numbers; shift "
                    "them, and pass shift=False"
                )
            labels = labels.view(logits.shape)
        elif causal:
            labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
        options = {} if labels.is_floating_point() else {"ignore_index": -100}
        return objective(
            logits, labels, backend=backend, **options, **_denominators(labels, num_items_in_batch)
        )  # fmt: skip

    return loss


def _of_span(objective: Objective, outputs: Any, labels: Any, count: Tensor | float | None, backend: str) -> Tensor:
    if isinstance(labels, dict):
        labels = labels.get("start_positions"), labels.get("end_positions")
    elif isinstance(labels, Tensor) and labels.shape[1:] == (2,):
        labels = labels.unbind(1)
        count = None if count is None else count / 2  # which counted both
    if not (isinstance(labels, tuple | list) and len(labels) == 2 and all(isinstance(y, Tensor) for y in labels)):
        raise TypeError("labels: expected start and end positions: (B, 2), a pair of tensors or a dict of them")
    losses = []
    for logits, y in zip((_field(outputs, "start_logits"), _field(outputs, "end_logits")), labels, strict=True):
        beyond = logits.shape[-1]  # as in transformers: a place that truncation cut off counts for nothing
        y = y.reshape(-1)
        y = y.where((y >= 0) & (y < beyond), beyond)
        options = _denominators(y, count, beyond)
        losses.append(objective(logits, y, ignore_index=beyond, backend=backend, **options))
    return (losses[0] + losses[1]) / 2


def _field(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, dict) else getattr(outputs, name, None)
