"""A call's arguments, checked and flattened to rows: what every backend receives."""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
REDUCTIONS = ("none", "mean", "sum")

_validation = "cpu"


def set_validation(mode: str) -> None:
    """Say when bad labels raise: "cpu" (the default: on the CPU, where looking is free) or "always".

    On other devices looking costs a synchronisation; without it the loss of such a row is NaN.

    Raises:
        ValueError: another word.

    >>> set_validation("always")  # while looking for a bad label on a GPU
    >>> set_validation("cpu")
    """
    global _validation
    if mode not in ("cpu", "always"):
        raise ValueError(f'validation: expected "cpu" or "always" but got {shown(mode)}')
    _validation = mode


def validates(logits: Tensor) -> bool:
    """Whether bad labels of these logits raise, unless the call says otherwise."""
    return logits.is_cpu or _validation == "always"


class Batch(NamedTuple):
    """N rows of V logits, and how to read and reduce them."""

    logits: Tensor  # (N, V)
    target: Tensor | None  # (N) int64 labels, or (N, V) probabilities
    class_weight: Tensor | None  # (V)
    normalizer: Tensor | None  # 0-dim
    logit_scale: Tensor | None  # 0-dim; None is 1
    softcap: float  # 0 is none
    ignore_index: int
    reduction: str
    empty_zero: bool
    masked: bool  # −inf logits are excluded classes; False: they are numbers, as in torch
    validate: bool
    shape: torch.Size  # of the rows before they were flattened
    rows: dict[str, Tensor]  # (N) each
    reference: Tensor | None = None  # (N, V) logits
    temperature: float = 1.0  # of the divergence from the reference

    @property
    def dense(self) -> bool:
        """Whether the target is a probability distribution."""
        return self.target is not None and self.target.is_floating_point()

    @property
    def result_dtype(self) -> torch.dtype:
        return torch.float64 if self.logits.dtype == torch.float64 else torch.float32

    def counted(self) -> Tensor | None:
        """(N) bool: the rows that are not ignored; None where all count."""
        return None if self.target is None or self.dense else self.target != self.ignore_index

    def row_weight(self) -> Tensor | float:
        """(N) class weights of the labels; 1 where there are none or the target is dense."""
        if self.class_weight is None or self.target is None or self.dense:
            return 1.0
        labels = self.target.clamp(0, self.class_weight.shape[0] - 1)
        return self.class_weight.to(self.result_dtype).gather(0, labels)


def flatten(
    logits: Tensor,
    target: Tensor | None,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
    normalizer: float | Tensor | None = None,
    logit_scale: float | Tensor = 1.0,
    softcap: float | None = None,
    rows: dict[str, Tensor] | None = None,
    shift: int = 0,
    class_dim: int = -1,
    empty: str = "nan",
    validate: bool | None = None,
    class_weight: Tensor | None = None,
    masked: bool = True,
    reference: Tensor | None = None,
    temperature: float = 1.0,
    part: bool = False,
) -> Batch:
    """Check the arguments of a call and flatten them; see `Objective.forward` for their meaning.

    part: the classes are some of many, perhaps none, and the class weight is not looked at.
    """
    logits = _check_logits(logits, class_dim)
    size = logits.shape
    shape, classes = size[:-1], size[-1]
    if classes == 0 and not part:
        raise ValueError(f"logits: expected at least one class but got shape {tuple(size)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction: expected "mean", "sum" or "none" but got {shown(reduction)}')
    if empty not in ("nan", "zero"):
        raise ValueError(f'empty: expected "nan" or "zero" but got {shown(empty)}')
    if type(ignore_index) is not int:
        ignore_index = _integer("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected an int of 64 bits but got {shown(ignore_index)}")
    if type(shift) is not int or shift not in (0, 1):
        raise ValueError(f"shift: expected 0 or 1 but got {shown(shift)}")
    if rows is not None and not isinstance(rows, dict):
        raise TypeError(f"rows: expected a dict of tensors but got {describe(rows)}")
    if validate is not None:
        check_validate(validate)
    check_normalizer(normalizer, reduction)
    if target is not None:
        target = _check_target(target, logits, shape, class_dim)
    if shift:
        target = _shifted(target, shape, ignore_index)
    if class_weight is not None:
        check_same_device("class weight", class_weight, logits)
        if class_weight.requires_grad:
            raise ValueError("class weight: a constant here, so its gradient would be lost; pass weight.detach()")
        if class_weight.shape != (classes,) and not part:
            raise ValueError(f"class weight: expected shape ({classes},) but got {tuple(class_weight.shape)}")
    if reference is not None:
        reference = _check_reference(reference, logits, class_dim)
    softcap = checked_softcap(softcap)
    if len(shape) != 1:
        count = -1 if classes else math.prod(shape)  # a part of the vocabulary may be none of it
        logits = logits.reshape(count, classes)
        if reference is not None:
            reference = reference.reshape(count, classes)
        if target is not None:
            target = target.reshape(count, *target.shape[len(shape) :])
    return Batch(
        logits, target, class_weight,
        None if normalizer is None else scalar_tensor("normalizer", normalizer, None, logits),
        None
        if type(logit_scale) is float and logit_scale == 1.0
        else scalar_tensor("logit_scale", logit_scale, 1.0, logits),
        softcap,
        ignore_index, reduction, empty == "zero", masked,
        logits.is_cpu or bool(validate) or (validate is None and validates(logits)),
        shape,
        {name: _check_row(name, value, shape, logits) for name, value in rows.items()} if rows else {},
        reference, temperature,
    )  # fmt: skip


def check_normalizer(normalizer: float | Tensor | None, reduction: str) -> None:
    if normalizer is not None and reduction != "mean":
        raise ValueError(
            f'normalizer: replaces the denominator of reduction="mean" and has no meaning for {reduction!r}'
        )


def check_validate(validate: bool | None) -> None:
    if not (validate is None or validate is True or validate is False):
        raise TypeError(f"validate: expected True, False or None but got {describe(validate)}")


def checked_softcap(softcap: float | None) -> float:
    """A cap as the ops take it: 0 is none."""
    if softcap is not None and not (_is_number(softcap) and 1e-30 <= softcap <= 1e30):
        raise ValueError(f"softcap: expected a number > 0 (within 1e-30 and 1e30) or None but got {shown(softcap)}")
    return 0.0 if softcap is None else float(softcap)


def check_dense(name: str, x: Tensor) -> None:
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{name}: expected a dense tensor but got a {_layout_of(x)} one")


def _integer(name: str, value: object) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int but got {describe(value)}")
    return int(value)


def _check_logits(logits: Tensor, class_dim: int) -> Tensor:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a tensor but got {describe(logits)}")
    check_dense("logits", logits)
    if logits.dtype not in DTYPES:
        raise TypeError(f"logits: expected float32, float64, bfloat16 or float16 but got {describe(logits)}")
    if logits.dim() == 0:
        raise ValueError("logits: expected shape (..., V) but got a 0-dim tensor")
    if type(class_dim) is not int:
        raise TypeError(f"class_dim: expected an int but got {describe(class_dim)}")
    if class_dim != -1:
        if not -logits.dim() <= class_dim < logits.dim():
            raise ValueError(f"class_dim: {shown(class_dim)} is out of range for logits of shape {tuple(logits.shape)}")
        if class_dim != logits.dim() - 1:
            logits = logits.movedim(class_dim, -1)
    return logits


def _layout_of(x: Tensor) -> str:
    """The name of a layout that no kernel reads."""
    return "nested" if x.is_nested else str(x.layout).removeprefix("torch.")


def _check_target(target: Tensor, logits: Tensor, shape: torch.Size, class_dim: int) -> Tensor:
    """`logits` has its classes last and rows of `shape`; a dense target comes with its classes at `class_dim`."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a tensor but got {describe(target)}")
    check_dense("target", target)
    if not (target.is_cpu and logits.is_cpu):
        check_same_device("target", target, logits)
    if target.dtype is torch.int64:
        if target.shape != shape:
            raise ValueError(f"target: expected labels of shape {tuple(shape)} but got {tuple(target.shape)}")
        return target
    if target.dtype not in DTYPES:
        raise TypeError(f"target: expected int64 labels or floating-point probabilities but got {describe(target)}")
    if target.dim() == logits.dim() and class_dim not in (-1, logits.dim() - 1):
        target = target.movedim(class_dim, -1)
    if target.shape != logits.shape:
        raise ValueError(
            f"target: expected int64 labels of shape {tuple(shape)} or probabilities of shape "
            f"{tuple(logits.shape)} but got {describe(target)}"
        )
    return target


def _check_reference(reference: Tensor, logits: Tensor, class_dim: int) -> Tensor:
    if not isinstance(reference, Tensor) or reference.dtype not in DTYPES:
        raise TypeError(
            f"reference: expected float32, float64, bfloat16 or float16 logits but got {describe(reference)}"
        )
    check_dense("reference", reference)
    if reference.dim() == logits.dim() and class_dim not in (-1, logits.dim() - 1):
        reference = reference.movedim(class_dim, -1)
    if reference.shape != logits.shape:
        raise ValueError(f"reference: expected logits of shape {tuple(logits.shape)} but got {describe(reference)}")
    check_same_device("reference", reference, logits)
    return reference


def _shifted(target: Tensor | None, shape: torch.Size, ignore_index: int) -> Tensor:
    if target is None or target.is_floating_point():
        raise ValueError("shift: expected int64 labels as target")
    if not shape:
        raise ValueError("shift: expected logits of shape (..., T, V) but got (V,)")
    # Labels move, logits stay: position t reads label t + 1 and the last position is ignored.
    return torch.cat([target[..., 1:], target.new_full((*shape[:-1], min(1, shape[-1])), ignore_index)], dim=-1)


def _check_row(name: str, value: Tensor, shape: torch.Size, logits: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != shape:
        raise ValueError(f"rows: {name}: expected a tensor of shape {tuple(shape)} but got {describe(value)}")
    check_same_device(f"rows: {name}", value, logits)
    return value.reshape(-1)


def check_same_device(name: str, value: Tensor, logits: Tensor) -> None:
    if value.device != logits.device:
        raise ValueError(f"{name}: expected a tensor on {logits.device}, as the logits, but got one on {value.device}")


def scalar_tensor(
    name: str, value: float | Tensor | None, neutral: float | None, beside: Tensor
) -> Tensor | None:  # fmt: skip
    """0-dim tensor, or None for the neutral value. Numbers stay on the CPU, where every backend can read them."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"{name}: expected a number or a 0-dim tensor but got {describe(value)}")
        if value.is_meta and not beside.is_meta:
            raise ValueError(f"{name}: expected a tensor on {beside.device}, as the other tensors, but got one on meta")
        return value if value.is_floating_point() else value.long()
    if value is None or (_is_number(value) and value == neutral):
        if value is None and neutral is not None:
            raise TypeError(f"{name}: expected a number or a 0-dim tensor but got None")
        return None
    if not _is_number(value):
        raise TypeError(f"{name}: expected a number or a 0-dim tensor but got {describe(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a finite number but got {describe(value)}") from None
    return torch.tensor(number, dtype=torch.float64, device="cpu")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for tensors of the device; there is none for meta tensors."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def describe(value: object) -> str:
    """What came, for an error message."""
    if isinstance(value, Tensor):
        shape = "" if value.is_nested else f" of shape {tuple(value.shape)}"  # which some nested tensors have not
        return f"a {'nested ' if value.is_nested else ''}{value.dtype} tensor{shape}"
    for field in ("logits", "last_hidden_state"):  # what a model returns, and its repr would print all its tensors
        if hasattr(value, field):
            return f"{type(value).__name__}; pass its .{field}"
    return f"{shown(value)} ({type(value).__name__})"


def shown(value: object) -> str:
    """A value as it was written, or the beginning of that."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no int of more than 4300 digits
        return "an int of very many digits"
    return text if len(text) <= 200 else text[:200] + "..."
