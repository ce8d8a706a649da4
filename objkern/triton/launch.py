"""What is launched how: the sizes of programs, and the compile-time sides of a call.

Sizes come from a table that depends on the shape and the type alone. Nothing is autotuned: a first call would take
seconds, and the order of sums, hence the last digit, would differ between machines. docs/triton-kernels.md has the
reasons for the numbers.
"""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..reads import DIVERGENCES as DIVERGENCES
from ..reads import reads_of, row_gradient_fields

FEW = 32  # classes up to which a row belongs to a thread
NARROW = 1024  # classes up to which several rows share a program


class NarrowLaunch(NamedTuple):
    """Rows of few classes: ROWS × COLS elements a program."""

    rows: int
    columns: int
    warps: int


class WideLaunch(NamedTuple):
    """Rows of many classes: tiles of `vectors` 16-byte vectors; the gradient takes `tiles` of them a program."""

    vectors: int
    warps: int
    tiles: int


# (classes from, launch): the first row whose number is not larger than V.
WIDE = (
    (8192, WideLaunch(vectors=512, warps=8, tiles=4)),
    (0, WideLaunch(vectors=256, warps=4, tiles=4)),
)
FEW_ROWS = 128  # of a program of 4 warps: one a thread
NARROW_ELEMENTS = 1024  # of a program of 4 warps: 8 a thread
MOST_NARROW_ROWS = 8  # two a warp: what is kept per row would fill the registers
EPILOGUE_ROWS = 128
PROGRAMS = 512  # fewer rows than this are split into pieces, so that a GPU of a hundred and more processors is busy
MOST_PIECES = 32
COMPARE_CLASSES = 2048  # that a program of 8 warps compares with a reference's together
COUNT_ROWS = 4096  # labels that the one program of `prepare_kernel` looks at together
ELEMENTS = 1024  # of a prediction that a program of 4 warps takes
REDUCE_ELEMENTS = 2048  # values that the one program of `reduce_kernel` adds together; 8 float64 a thread


def narrow_launch(classes: int) -> NarrowLaunch:
    columns = 1 << (classes - 1).bit_length()
    return NarrowLaunch(
        FEW_ROWS if classes <= FEW else min(MOST_NARROW_ROWS, max(1, NARROW_ELEMENTS // columns)), columns, 4
    )


def wide_launch(classes: int) -> WideLaunch:
    return next(launch for least, launch in WIDE if classes >= least)


def pieces_of(rows: int, classes: int, vector: int) -> int:
    """Into how many pieces a row is split."""
    tiles = -(-classes // (wide_launch(classes).vectors * vector))
    return max(1, min(MOST_PIECES, tiles, PROGRAMS // max(rows, 1)))


# ---- numbers --------------------------------------------------------------------------------------------------------


def words(*numbers: float) -> tuple[int, ...]:
    """The bits of each number's float64 in three int32 words, low ones first, which `elementary.number` puts together.

    Triton makes float32 of Python's floats, and compiles anew for an int in a tuple that is 1 or a multiple of 16. A
    word holds 21 or 22 bits and ends in two ones, so it is neither.
    """
    found: list[int] = []
    for (bits,) in struct.iter_unpack("<Q", struct.pack(f"<{len(numbers)}d", *numbers)):
        found += ((bits >> shift & mask) << 2 | 3 for shift, mask in ((0, 0x1FFFFF), (21, 0x1FFFFF), (42, 0x3FFFFF)))
    return tuple(found)


# ---- terms ----------------------------------------------------------------------------------------------------------

_ELEMENT_KINDS = 6  # ElementKind in csrc/elementwise.h
_DEPTHS = {3: 0, 5: 1, 6: 2, 10: 3, 15: 3}  # by the number of fields that a row's gradient keeps


@dataclass(frozen=True)
class Terms:
    """The terms of an objective; `kinds` and `reads` are known at compile time, `numbers` only at run time."""

    kinds: tuple[int, ...]  # 2·kind + (is the parameter not 0?)
    numbers: tuple[int, ...]  # words of parameter and coefficient of each
    reads: int
    fields: int  # of the row gradient
    smoothed: bool

    @classmethod
    def of(cls, terms: list[float], weighted: bool, dense: bool) -> Terms:
        kinds, numbers, reads, smoothed = [], [], 0, False
        for kind, parameter, coefficient in zip(terms[::3], terms[1::3], terms[2::3], strict=True):
            if kind != int(kind):
                raise RuntimeError(f"objkern: term kind {kind} is not known")
            kind = int(kind)
            kinds.append(2 * kind + (parameter != 0))
            numbers += (parameter, coefficient)
            reads |= reads_of(kind, parameter)
            smoothed |= kind == 0 and parameter > 0
        return cls(tuple(kinds), words(*numbers), reads, row_gradient_fields(terms, weighted, dense), smoothed)

    @property
    def depth(self) -> int:
        return _DEPTHS[self.fields]


def element_kinds(terms: list[float]) -> tuple[int, ...]:
    """As `Terms.kinds`, of an elementwise objective."""
    for kind in terms[::3]:
        if not (0 <= kind < _ELEMENT_KINDS and kind == int(kind)):
            raise RuntimeError(f"objkern: term kind {kind} is not known")
    return tuple(2 * int(kind) + (parameter != 0) for kind, parameter in zip(terms[::3], terms[1::3], strict=True))


# ---- rows -----------------------------------------------------------------------------------------------------------


class OnDevice:
    """What calls share that run where a tensor is."""

    def __init__(self, x: Tensor) -> None:
        self.device = x.device
        double = x.dtype == torch.float64
        self.dtype = torch.float64 if double else torch.float32  # in which sums are taken
        self.type = tl.float64 if double else tl.float32

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def on_device(self, name: str, number: Tensor | None) -> Tensor | None:
        """A number or a few of them, without waiting for the device. Those of the CPU travel with launches, because a
        CUDA graph captures no copy of memory that may be gone when it is replayed."""
        check_allocated(**{name: number})
        if number is None or number.device == self.device:
            return number
        if not number.is_cpu:
            return number.to(self.device, non_blocking=True)
        values = [torch.full((), x, dtype=number.dtype, device=self.device) for x in number.reshape(-1).tolist()]
        return torch.stack(values).view(number.shape)

    def on_its_device(self) -> contextlib.AbstractContextManager[Any]:
        """Triton launches on the current device."""
        if self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.get_device_module(self.device).device(self.device)

    def set_transform(self, logit_scale: Tensor | None, softcap: float) -> None:
        """A scale of the CPU is a number of the launch; one of the device is read there."""
        check_allocated(logit_scale=logit_scale)
        self.logit_scale, scale = None, 1.0
        if logit_scale is not None and logit_scale.is_cpu and self.device.type != "cpu":
            scale = float(logit_scale)
        elif logit_scale is not None:
            self.logit_scale = logit_scale
        self.transform = 2 if softcap else int(self.logit_scale is not None or scale != 1.0)
        self.transform_numbers = words(scale, softcap)


class Elements(OnDevice):
    """A prediction and what stands beside its elements, checked, as kernels take them."""

    def __init__(
        self, input: Tensor, target: Tensor | None = None, logit_scale: Tensor | None = None,
        weight: Tensor | None = None, pos_weight: Tensor | None = None, softcap: float = 0.0, limits: bool = True,
    ) -> None:  # fmt: skip
        check_allocated(input=input, target=target, weight=weight, pos_weight=pos_weight)
        super().__init__(input)
        self.input, self.limits = input.contiguous(), limits
        self.count = input.numel()
        self.target = None
        if target is not None:
            if target.shape != input.shape:
                raise RuntimeError(
                    f"objkern: target: expected the shape {tuple(input.shape)} but got {tuple(target.shape)}"
                )
            self.target = target.contiguous()
        self.weight, self.weight_period = self._repeated(weight)
        self.pos_weight, self.pos_weight_period = self._repeated(pos_weight)
        self.set_transform(logit_scale, softcap)

    def _repeated(self, numbers: Tensor | None) -> tuple[Tensor | None, int]:
        """Numbers that broadcast to the input: once if they repeat over its first dimensions, else one per element."""
        if numbers is None:
            return None, 1
        numbers = numbers.to(self.dtype)
        while numbers.dim() and numbers.shape[0] == 1:
            numbers = numbers.squeeze(0)
        shape = self.input.shape
        if numbers.shape != shape[len(shape) - numbers.dim() :]:
            numbers = numbers.expand(shape)
        return numbers.contiguous(), max(1, numbers.numel())

    def sizes(self) -> dict[str, Any]:
        return {
            "x": self.input, "target": self.target, "weight": self.weight, "pos_weight": self.pos_weight,
            "logit_scale": self.logit_scale, "transform": self.transform_numbers, "elements": self.count,
            "weight_period": self.weight_period, "pos_weight_period": self.pos_weight_period, "A": self.type,
            "TRANSFORM": self.transform, "LIMITS": self.limits,
        }  # fmt: skip


class Rows(OnDevice):
    """The row arguments of an op, checked, as kernels take them; the counterpart of `Batch` in csrc/batch.h."""

    def __init__(
        self, logits: Tensor, target: Tensor | None = None, logit_scale: Tensor | None = None,
        class_weight: Tensor | None = None, ignore_index: int = -100, softcap: float = 0.0, masked: bool = True,
        reference: Tensor | None = None, temperature: float = 1.0,
    ) -> None:  # fmt: skip
        if logits.dim() != 2 or logits.shape[1] == 0:
            raise RuntimeError(
                f"objkern: logits: expected (rows, classes) and at least one class but got {tuple(logits.shape)}"
            )
        if logits.shape[1] >= 2**31 - 2**16:
            raise ValueError(f"logits: the Triton backend counts classes in 32 bits but got {logits.shape[1]}")
        check_allocated(logits=logits, target=target, class_weight=class_weight, reference=reference)
        self.logits = with_unit_class_stride(logits)
        self.rows, self.classes = logits.shape
        super().__init__(logits)
        self.vector = 16 // logits.element_size()
        self.ignore_index, self.masked = ignore_index, masked
        self.labels = self.dense = None
        if target is not None and target.dtype == torch.int64:
            if target.shape != (self.rows,):
                raise RuntimeError(f"objkern: target: expected ({self.rows}) labels but got {tuple(target.shape)}")
            self.labels = target.contiguous()
        elif target is not None:
            if target.shape != logits.shape:
                raise RuntimeError(
                    f"objkern: target: expected probabilities of shape {tuple(logits.shape)} but got "
                    f"{tuple(target.shape)}"
                )
            self.dense = self._as_read(target)
        if class_weight is not None:
            if class_weight.shape != (self.classes,):
                raise RuntimeError(
                    f"objkern: class weight: expected ({self.classes}) but got {tuple(class_weight.shape)}"
                )
            class_weight = class_weight.to(self.dtype).contiguous()
        self.class_weight = class_weight
        # A number of the host travels with the call; one of the device is read there.
        self.set_transform(logit_scale, softcap)
        self.reference, self.temperature = None, words(1.0 / temperature)
        if reference is not None:
            if reference.shape != logits.shape:
                raise ValueError(
                    f"objkern: reference: expected logits of shape {tuple(logits.shape)} but got "
                    f"{tuple(reference.shape)}"
                )
            if not masked:
                raise ValueError("objkern: reference: logits of −inf have to be excluded classes beside it")
            self.reference = self._as_read(reference)
        whole = self.reference is not None  # rows of any length by the kernels for many classes
        self.few, self.narrow = self.classes <= FEW and not whole, self.classes <= NARROW and not whole

    def _as_read(self, x: Tensor) -> Tensor:
        """A (rows, classes) tensor beside the logits, of their type or the accumulation type."""
        return with_unit_class_stride(x if x.dtype == self.logits.dtype else x.to(self.dtype))

    @property
    def reference_stride(self) -> int:
        return 0 if self.reference is None else self.reference.stride(0)

    @property
    def dense_stride(self) -> int:
        return 0 if self.dense is None else self.dense.stride(0)

    def sizes(self) -> dict[str, Any]:
        """Arguments that every kernel over rows has under these names."""
        return {
            "x": self.logits, "target": self.labels, "class_weight": self.class_weight,
            "logit_scale": self.logit_scale, "transform": self.transform_numbers, "rows": self.rows,
            "row_stride": self.logits.stride(0), "ignore_index": self.ignore_index, "V": self.classes, "A": self.type,
            "TRANSFORM": self.transform, "MASKED": self.masked,
        }  # fmt: skip

    def aligned_with(self, gradient: Tensor) -> bool:
        """Whether every row of the gradient begins as many elements past a whole vector as the row of logits does."""
        places = self.logits.data_ptr() // self.logits.element_size(), gradient.data_ptr() // gradient.element_size()
        apart = self.logits.stride(0) - self.classes
        return (places[0] - places[1]) % self.vector == 0 and (self.rows <= 1 or apart % self.vector == 0)


def check_allocated(**tensors: Tensor | None) -> None:
    """FSDP and offloading free the memory of a tensor that they keep; a kernel would read at the address 0."""
    for name, x in tensors.items():
        if x is not None and x.numel() and not x.untyped_storage().nbytes():
            raise ValueError(
                f"objkern: {name}: its memory has been freed, as FSDP and offloading do between uses; make the call, "
                "and its backward pass, where it is there"
            )


def with_unit_class_stride(t: Tensor) -> Tensor:
    return t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()
