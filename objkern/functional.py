"""Functions: the differentiable primitive, and drop-ins for torch.nn.functional."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from . import distributed, elementwise, linear, ops
from .batch import DTYPES, Batch, check_dense, describe, flatten, is_autocast
from .elementwise import BernoulliEntropy, BinaryCrossEntropy, MeanSquaredError
from .statistics import Statistics
from .terms import CrossEntropy, Entropy, LogitL2, ZLoss, checked_number, checked_temperature


def row_statistics(
    logits: Tensor,
    target: Tensor | None = None,
    *,
    ignore_index: int = -100,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    reference: Tensor | None = None,
    temperature: float = 1.0,
    shift: int = 0,
    class_dim: int = -1,
    process_group: Any = None,
    validate: bool | None = None,
    backend: str = "auto",
) -> Statistics:
    """``logits.log_softmax(-1).gather(-1, target[..., None])`` and eleven more numbers per row, in one pass

    Every field is differentiable; policy and preference losses are a few lines of torch on top of it.

    Args:
        logits: (..., V) float32, float64, bfloat16 or float16; −inf excludes a class.
        target: (...) int64 labels, or (..., V) probabilities (then `logprob` is Σ q_j log p_j), or None.
        ignore_index: rows with this label hold 0 in every field and get a zero gradient.
        reference: logits of the shape of ``logits`` to diverge from, as in `Objective.forward`.
        temperature: T > 0 of `forward_kl` and `reverse_kl` alone.
        logit_scale, softcap, shift, class_dim, process_group, validate, backend: as in `Objective.forward`.

    Returns:
        `Statistics` of shape (...), float32 (float64 for float64 logits); the fields that read the target are None
        where there is none, and the divergences where there is no reference.

    Raises:
        IndexError: a label outside [0, V) that is not ``ignore_index``.

    >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
    >>> s = row_statistics(logits, torch.tensor([0, 2]))
    >>> s.logprob.detach(), s.entropy.detach()
    (tensor([-0.4076, -1.5514]), tensor([0.8324, 0.9753]))
    >>> s.forward_kl is None  # there is no reference
    True
    >>> (s.logprob * torch.tensor([1.0, -1.0])).sum().backward()  # whatever a policy loss makes of them
    >>> logits.grad
    tensor([[ 0.3348, -0.2447, -0.0900],
            [ 0.2119,  0.5761, -0.7881]])
    """
    at = None
    if process_group is not None or distributed.is_dtensor(logits):
        at, logits, target, reference = distributed.of_logits(logits, target, reference, process_group, class_dim)
    batch = flatten(
        logits, target, ignore_index=ignore_index, logit_scale=logit_scale, softcap=softcap, shift=shift,
        class_dim=class_dim, validate=validate, reduction="none", reference=reference,
        temperature=checked_temperature(temperature), part=at is not None,
    )  # fmt: skip
    run = ops.backend_for(backend, batch.logits)
    found = run.statistics(batch) if at is None else distributed.statistics(run, at, batch)[0]
    return _per_row(found, batch)


def _per_row(found: Statistics, batch: Batch) -> Statistics:
    found = found.each(lambda field: field.to(batch.result_dtype).view(batch.shape))
    if batch.target is None:
        return found._replace(logprob=None, other_logprob=None, target_logit=None)
    return found._replace(other_logprob=None, target_logit=None) if batch.dense else found


def linear_row_statistics(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    reference: Tensor | tuple[Tensor, ...] | None = None,
    temperature: float = 1.0,
    shift: int = 0,
    process_group: Any = None,
    validate: bool | None = None,
    backend: str = "auto",
    chunk_rows: int | None = None,
    memory_budget: int | None = None,
) -> Statistics:
    """``objkern.row_statistics(hidden @ weight.T + bias, target)``, the logits never materialised

    Every field is differentiable, each row with an upstream gradient of its own, so there is one mode: "recompute" of
    `Objective.linear`, four GEMMs and a few numbers per row between the passes.

    Args:
        hidden: (..., D) float32, float64, bfloat16 or float16. Under autocast it, weight and bias are cast as those
            of F.linear.
        weight: (V, D) of hidden's dtype; a frozen one gets no gradient, and no memory for it.
        target: (...) int64 labels, or (..., V) probabilities (then `logprob` is Σ q_j log p_j), or None.
        bias: (V) of hidden's dtype.
        ignore_index: rows with this label hold 0 in every field and get a zero gradient.
        reference: logits (..., V) to diverge from, or a head (hidden, weight[, bias]), as in `Objective.linear`.
        temperature: T > 0 of `forward_kl` and `reverse_kl` alone.
        shift: 1 for causal language models: entry t is about label t + 1, and the last entry of a sequence is 0.
        logit_scale, softcap, validate, backend: as in `Objective.forward`.
        process_group, chunk_rows, memory_budget: as in `Objective.linear`.

    Returns:
        `Statistics` of shape (...), float32 (float64 for float64 inputs); the fields that read the target are None
        where there is none, and the divergences where there is no reference.

    Raises:
        IndexError: a label outside [0, V) that is not ``ignore_index``.
        ValueError, TypeError: names the argument, what was expected and what came.

    >>> hidden, weight = torch.eye(2), torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    >>> linear_row_statistics(hidden, weight, torch.tensor([0, 2])).logprob
    tensor([-0.4076, -1.5514])
    """
    at, reduces = None, True
    if process_group is not None or distributed.is_dtensor(hidden, weight):
        at, reduces, (hidden, weight, bias), target, reference = distributed.of_layer(
            hidden, weight, bias, target, reference, process_group
        )
    layer, proxy = linear.layer(hidden, weight, bias, chunk_rows, memory_budget, at is not None)
    of_head = reference is not None and not isinstance(reference, Tensor)
    batch = flatten(
        proxy, target, ignore_index=ignore_index, logit_scale=logit_scale, softcap=softcap, shift=shift,
        validate=validate, reduction="none", reference=None if of_head else reference,
        temperature=checked_temperature(temperature), part=at is not None,
    )  # fmt: skip
    if of_head:
        layer, batch = linear.with_reference(layer, batch, reference)
    run = ops.backend_for(backend, batch.logits)
    if at is None:
        found, _ = linear.statistics(run, layer, batch)
    else:
        found, _ = distributed.statistics(run, at, batch, layer, reduces)
    return _per_row(found, batch)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    entropy: float = 0.0,
) -> Tensor:
    """``torch.nn.functional.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction,
    label_smoothing)``, plus ``z_loss * lse.square()`` and ``entropy * H(p)`` over the same rows

    The same semantics in every corner: the dtype of the result is the input's, −inf logits are numbers and not
    excluded classes, classes are in dimension 1.

    Args:
        input: (C), (N, C) or (N, C, d1, ...) float32, float64, bfloat16 or float16.
        target: labels int64 or uint8 of the input's shape without C, or probabilities of the input's shape.
        weight: (C) of the input's dtype.
        z_loss, entropy: coefficients of the regularizers, each over the number of rows that count; pass a negative
            `entropy` for the confidence penalty.

    Returns:
        The loss, of the input's dtype, 0-dim, or of the labels' shape for ``reduction="none"``.

    Raises:
        IndexError: a label out of range, as torch.
        RuntimeError, ValueError: shapes, dtypes and options that torch refuses.

    >>> logits, target = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    >>> cross_entropy(logits, target, label_smoothing=0.3)
    tensor(0.7076)
    >>> F.cross_entropy(logits, target, label_smoothing=0.3)
    tensor(0.7076)
    >>> cross_entropy(logits, target, z_loss=1e-4, entropy=-0.1)
    tensor(0.3249)
    """
    if size_average is not None or reduce is not None:
        reduction = _legacy_reduction(size_average, reduce)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        name, got = ("target", target) if isinstance(input, Tensor) else ("input", input)
        raise TypeError(f"cross_entropy: {name}: expected a tensor but got {describe(got)}")
    class_dim = 0 if input.dim() == 1 else 1
    dense = input.shape == target.shape
    if class_dim == 0 and target.shape == (1,) and not dense:  # one row, whose label torch takes so, too
        target = target[0]
    program = _program(input, target, weight, class_dim, ignore_index, label_smoothing, z_loss, entropy)
    dtype = torch.promote_types(input.dtype, target.dtype) if dense else input.dtype
    loss = ops.default_call(program, input, target, (weight, ignore_index, reduction), _DEFAULTS, masked=False)
    if loss is not None:
        return _as_torch(loss, dtype)
    try:
        batch = flatten(
            input, target.long() if target.dtype is torch.uint8 else target, reduction=reduction,
            ignore_index=ignore_index, class_dim=class_dim if input.dim() > 2 else -1, class_weight=weight,
            masked=False,
        )  # fmt: skip
    except (ValueError, TypeError):
        if not dense:
            _check_labels(input, target)  # the errors that torch raises
        raise
    run = ops.backend_for("auto", batch.logits)
    loss, _ = run.objective(batch, program, False, False)
    if reduction == "none" and len(batch.shape) != 1:
        loss = loss.view(batch.shape)
    return _as_torch(loss, dtype)


def _program(
    input: Tensor, target: Tensor, weight: Tensor | None, class_dim: int, ignore_index: int, label_smoothing: float,
    z_loss: float, entropy: float,
) -> ops.Program:  # fmt: skip
    """The terms, once the arguments that both drop-ins share are what torch takes."""
    dense = input.shape == target.shape
    if dense and not target.is_floating_point():
        raise RuntimeError(f"Expected floating point type for target with class probabilities, got {target.dtype}")
    if dense and ignore_index >= 0:
        raise RuntimeError("ignore_index is not supported for floating point target")
    if type(label_smoothing) is not float:
        label_smoothing = checked_number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if weight is not None and not (isinstance(weight, Tensor) and weight.is_floating_point()):
        raise TypeError(f"weight: expected a floating-point tensor or None but got {describe(weight)}")
    if weight is not None and weight.shape != (input.shape[class_dim],):
        raise RuntimeError(
            f"cross_entropy: weight tensor should be defined either for all {input.shape[class_dim]} classes or no "
            f"classes but got weight tensor of shape: {list(weight.shape)}"
        )
    terms = [CrossEntropy.kind, label_smoothing, 1.0]
    for name, kind, coefficient in (("z_loss", ZLoss.kind, z_loss), ("entropy", Entropy.kind, entropy)):
        if type(coefficient) is not float or coefficient != 0.0:
            terms += (kind, 0.0, checked_number(name, coefficient))
    return ops.Program(terms)


_DEFAULTS = tuple(cross_entropy.__defaults__[place] for place in (0, 2, 4))  # weight, ignore_index, reduction


def _as_torch(loss: Tensor, dtype: torch.dtype) -> Tensor:
    """In torch's dtype; its autocast runs cross-entropy in float32."""
    return loss if loss.dtype is dtype or is_autocast(loss.device) else loss.to(dtype)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    entropy: float = 0.0,
) -> Tensor:
    """``torch.nn.functional.linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, weight=weight,
    reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing)``, plus ``z_loss * lse.square()``
    and ``entropy * H(p)`` over the same rows; the logits never materialised

    The same semantics in every corner: the dtype of the result is the input's (under autocast float32), −inf logits
    are numbers. Logits are materialised for K-dimensional losses and under torch.func, as torch does for both.

    Args:
        input: (D) or (N, D) float32, float64, bfloat16 or float16; flatten (B, T, D) to (B·T, D). Under autocast cast
            as F.linear casts it, and linear_weight and linear_bias too.
        linear_weight: (C, D), or (C, d1, ..., D) for K-dimensional losses, whose logits are materialised.
        target: labels int64 of shape () or (N) or (N, d1, ...), or probabilities of the logits' shape.
        linear_bias: (C), or (C, d1, ...).
        weight: (C) class weights.
        ignore_index: of labels; None is -100.
        options: torch's chunking strategy; objkern chunks by its own rule (`objkern.linear.choose_chunk_rows`), so
            this only has to be what torch takes.
        z_loss, entropy: coefficients of the regularizers, as in `cross_entropy`: a negative `entropy` is the
            confidence penalty.

    Returns:
        The loss, 0-dim, or of the labels' shape for ``reduction="none"``; of the input's dtype, or for probabilities
        of the dtype that input and target promote to.

    Raises:
        IndexError: a label out of range, as torch.
        RuntimeError, ValueError: shapes, dtypes and options that torch refuses.

    >>> hidden, weight = torch.eye(2), torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    >>> linear_cross_entropy(hidden, weight, torch.tensor([0, 2]), z_loss=1e-4)
    tensor(0.9799)
    """
    for name, x in (("input", input), ("linear_weight", linear_weight), ("target", target)):
        if not isinstance(x, Tensor):
            raise TypeError(f"linear_cross_entropy: {name}: expected a tensor but got {describe(x)}")
    if not 1 <= input.dim() <= 2:
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}")
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    if linear_bias is not None and not isinstance(linear_bias, Tensor):
        raise TypeError(f"linear_bias: expected a tensor or None but got {describe(linear_bias)}")
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"expected linear_bias shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
        )
    for name, x in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if x is not None and x.dtype != input.dtype and not is_autocast(input.device):
            raise RuntimeError(f"expected {name} to have the same dtype as input, {input.dtype}, but got {x.dtype}")
    if not input.is_floating_point():
        raise RuntimeError(f"expected input of a floating-point dtype, got {input.dtype}")
    if options is not None and not isinstance(options, getattr(torch.nn, "LinearCrossEntropyOptions", ())):
        raise TypeError(f"options: expected torch.nn.LinearCrossEntropyOptions or None but got {describe(options)}")
    classes, *places = linear_weight.shape[:-1]
    if places and input.dim() == 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires batched input, "
            f"(N, {input.shape[-1]}), got unbatched input with shape {tuple(input.shape)}"
        )
    shape = (*input.shape[:-1], classes, *places)
    dense = target.shape == shape
    if dense and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    ignore_index = -100 if ignore_index is None else ignore_index
    if input.dim() == 1 and target.shape == (1,) and not dense:  # one row, whose label torch takes so, too
        target = target[0]
    if places or classes == 0 or torch._C._are_functorch_transforms_active():
        bias = None if linear_bias is None else linear_bias.flatten()
        logits = linear.eager_logits(input, linear_weight.flatten(0, -2), bias).view(shape)
        loss = cross_entropy(
            logits, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
            z_loss=z_loss, entropy=entropy,
        )  # fmt: skip
        return _as_torch(loss, torch.promote_types(input.dtype, target.dtype) if dense else input.dtype)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    program = _program(input.new_empty(()).expand(shape), target, weight, 0 if len(shape) == 1 else 1, ignore_index,
                       label_smoothing, z_loss, entropy)  # fmt: skip
    layer, proxy = linear.layer(input, linear_weight, linear_bias, None, None)
    try:
        batch = flatten(
            proxy, target.long() if target.dtype is torch.uint8 else target, reduction=reduction,
            ignore_index=ignore_index, class_weight=weight, masked=False,
        )  # fmt: skip
    except (ValueError, TypeError):
        if not dense:
            _check_labels(proxy, target)
        raise
    loss, _ = linear.objective(ops.backend_for("auto", proxy), layer, batch, program, "auto", False)
    if len(batch.shape) != 1 and reduction == "none":
        loss = loss.view(batch.shape)
    dtype = torch.promote_types(layer.hidden.dtype, target.dtype) if dense else layer.hidden.dtype
    return _as_torch(loss, dtype)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    entropy: float = 0.0,
    logit_l2: float = 0.0,
) -> Tensor:
    """``torch.nn.functional.binary_cross_entropy_with_logits(input, target, weight, size_average, reduce, reduction,
    pos_weight)``, plus ``entropy * H(sigmoid(input))`` and ``logit_l2 * input.square()`` over the same elements

    Args:
        input: of any shape; float32, float64, bfloat16 or float16.
        target: of the input's shape, any floating-point dtype.
        weight, pos_weight: of shapes that broadcast to the input's.
        label_smoothing: ε moves targets towards ½: y (1 − ε) + ε/2.
        entropy, logit_l2: coefficients of the regularizers; a negative `entropy` is the confidence penalty.

    Returns:
        The loss, of the dtype that the arguments promote to, 0-dim, or the input's shape for ``reduction="none"``.

    Raises:
        ValueError: another shape, or a reduction that there is not, as torch.
        RuntimeError: weights that do not broadcast, as torch.
        NotImplementedError: other dtypes, as torch.

    The weights receive gradients if they require them, which torch refuses.

    >>> logits, target = torch.tensor([2.0, -1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0])
    >>> binary_cross_entropy_with_logits(logits, target, reduction="sum")
    tensor(1.1333)
    >>> binary_cross_entropy_with_logits(logits, target, label_smoothing=0.1, entropy=-0.1)
    tensor(0.3731)
    """
    name = "binary_cross_entropy_with_logits"
    weights = {"weight": weight, "pos_weight": pos_weight}
    reduction = _checked_elementwise(name, input, target, weights, size_average, reduce, reduction)
    if target.shape != input.shape:
        raise ValueError(f"Target size ({target.shape}) must be the same as input size ({input.shape})")
    for w in (weight, pos_weight):
        if w is not None and torch.broadcast_shapes(input.shape, w.shape) != input.shape:
            raise RuntimeError(f"input with shape {list(input.shape)} doesn't match the weights' {list(w.shape)}")
    terms = [BinaryCrossEntropy.element_kind, checked_number("label_smoothing", label_smoothing, 0.0, 1.0), 1.0]
    for coefficient, kind, option in (
        (entropy, BernoulliEntropy.element_kind, "entropy"), (logit_l2, LogitL2.element_kind, "logit_l2"),
    ):  # fmt: skip
        if type(coefficient) is not float or coefficient != 0.0:
            terms += [kind, 0.0, checked_number(option, coefficient)]
    return _elementwise(input, target, input.shape, terms, reduction, weight, pos_weight)


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """``torch.nn.functional.mse_loss(input, target, size_average, reduce, reduction, weight)``

    Args:
        input, target: of shapes that broadcast, with torch's warning where they differ; float32, float64, bfloat16 or
            float16; one of them may be of whole numbers.
        weight: of the input's shape; a weighted mean divides by the sum of the weights.

    Returns:
        The loss, of the dtype that input and target promote to.

    Raises:
        ValueError: a weight of another shape, or a reduction that there is not, as torch.
        NotImplementedError: other dtypes, as torch.

    >>> prediction, target = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    >>> mse_loss(prediction, target), mse_loss(prediction, target, weight=torch.tensor([1.0, 3.0]))
    (tensor(2.5000), tensor(3.2500))
    """
    if isinstance(input, Tensor) and isinstance(target, Tensor) and input.dtype != target.dtype:
        wide = torch.promote_types(input.dtype, target.dtype)  # whole numbers beside others become such
        if wide.is_floating_point:
            input, target = (x if x.is_floating_point() else x.to(wide) for x in (input, target))
    reduction = _checked_elementwise("mse_loss", input, target, {"weight": weight}, size_average, reduce, reduction)
    if target.shape != input.shape:
        warnings.warn(
            f"Using a target size ({target.shape}) that is different to the input size ({input.shape}). This will "
            "likely lead to incorrect results due to broadcasting. Please ensure they have the same size.",
            stacklevel=2,
        )
    if weight is not None and weight.shape != input.shape:
        raise ValueError("Weights and input must have the same size.")
    shape = torch.broadcast_shapes(input.shape, target.shape)
    normalizer = None
    if weight is not None and reduction == "mean":
        if weight.requires_grad:  # the denominator has a gradient, too
            return mse_loss(input, target, reduction="sum", weight=weight) / weight.sum()
        normalizer = weight.sum(dtype=torch.float64)
    weighted = 0.0 if weight is None else 1.0
    terms = [MeanSquaredError.element_kind, weighted, 1.0]
    return _elementwise(input, target, shape, terms, reduction, weight, None, normalizer)


def _checked_elementwise(
    name: str, input: Tensor, target: Tensor, weights: dict[str, Tensor | None], size_average: bool | None,
    reduce: bool | None, reduction: str,
) -> str:  # fmt: skip
    """What the elementwise drop-ins share; returns the reduction."""
    if size_average is not None or reduce is not None:
        reduction = _legacy_reduction(size_average, reduce)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    for argument, x in (("input", input), ("target", target)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: {argument}: expected a tensor but got {describe(x)}")
        if x.dtype not in DTYPES:
            raise NotImplementedError(f"{name}: {argument}: not implemented for {x.dtype}")
        check_dense(f"{name}: {argument}", x)
    for argument, w in weights.items():
        if w is None:
            continue
        if not isinstance(w, Tensor):
            raise TypeError(f"{name}: {argument}: expected a tensor or None but got {describe(w)}")
        if w.is_complex():
            raise TypeError(f"{name}: {argument}: expected real numbers but got {describe(w)}")
        check_dense(f"{name}: {argument}", w)
    return reduction


def _elementwise(
    input: Tensor, target: Tensor, shape: torch.Size, terms: list[float], reduction: str, weight: Tensor | None,
    pos_weight: Tensor | None, normalizer: Tensor | None = None,
) -> Tensor:  # fmt: skip
    others = [x.dtype for x in (weight, pos_weight) if x is not None]
    dtype = functools.reduce(torch.promote_types, [input.dtype, target.dtype, *others])
    wide = torch.promote_types(input.dtype, target.dtype)
    if wide == torch.float64:
        input = input.to(wide)
    e = elementwise.checked(
        input.expand(shape), target.expand(shape), (weight, pos_weight), reduction=reduction, normalizer=normalizer,
        logit_scale=1.0, softcap=None, empty="nan", limits=False,
    )  # fmt: skip
    family = ops.backend_for("auto", input).family
    loss, _ = elementwise.run_family(family, e, ops.Program(terms), False, False)
    return _as_torch(loss, dtype)


def _check_labels(input: Tensor, target: Tensor) -> None:
    if input.dim() == 0:
        raise RuntimeError("cross_entropy: input expected to have at least one dimension but got none")
    if input.dim() > 1 and (target.dim() == 0 or target.shape[0] != input.shape[0]):
        size = target.shape[0] if target.dim() else "no dimension"
        raise ValueError(f"Expected input batch_size ({input.shape[0]}) to match target batch_size ({size}).")
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"expected target dtype to be Long or Byte, but got {target.dtype}")
    expected = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
    if target.shape != expected:
        raise RuntimeError(f"Expected target size {list(expected)}, got {list(target.shape)}")


def _legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    size_average, reduce = size_average is not False, reduce is not False
    reduction = ("mean" if size_average else "sum") if reduce else "none"
    warnings.warn(f"size_average and reduce are deprecated; use reduction='{reduction}' instead", stacklevel=3)
    return reduction
