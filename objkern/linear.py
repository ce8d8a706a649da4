"""The fused linear path: hidden states and a weight in, loss and gradients out; one chunk of logits at a time.

    hidden, weight ──GEMM──▶ logits of a chunk ──kernels of the backend──▶ their gradient ──GEMMs──▶ ∂hidden, ∂weight

Two modes. "forward": the gradients are made with the loss, by chunks of rows, three GEMMs in all; the backward pass
only scales them. "recompute": the forward pass keeps a few numbers per row, the backward pass projects anew, by chunks
of classes, whose part of the weight's gradient is then finished at once; four GEMMs, exact for any upstream gradient.
It is the same code for every backend: the kernels see a chunk as they see any logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from . import ops, reference
from .batch import DTYPES, REDUCTIONS, Batch, check_dense, check_same_device, describe, is_autocast, shown
from .statistics import Statistics

MODES = ("auto", "forward", "recompute")

# ---- how many rows a chunk has --------------------------------------------------------------------------------------

_CPU_ROWS = 512  # GEMMs are at full speed from a few hundred rows on; measured, see docs/linear.md
_GPU_ROWS = 1750  # below, the product with the hidden states starves the device
_GPU_FROZEN_ROWS = 512
_TILE_ROWS, _TILE_COLUMNS = 128, 256  # of a GEMM's block


def chunk_bytes(rows: int, classes: int, logits_bytes: int, gradient_bytes: int) -> int:
    """What a chunk of so many rows takes: its logits and their gradient."""
    return rows * classes * (logits_bytes + gradient_bytes)


def choose_chunk_rows(
    features: int,
    classes: int,
    *,
    logits_bytes: int,
    gradient_bytes: int,
    multiprocessors: int | None,
    trains_weight: bool,
    memory_budget: int | None = None,
) -> int:
    """Most rows of a chunk, from the layer and the device alone, so that results are the same from run to run. How many
    rows there are plays no part: a compiler would have to compile anew for each number of them.

    On a GPU the GEMM that gives the hidden gradient of a chunk, C × features, should fill whole waves of blocks of
    128 × 256: C(w) = 128·⌊m·w / ⌈features/256⌉⌋ on m multiprocessors. The smallest w with C of 1750 rows or more (512
    where the weight is frozen) is taken. On a CPU GEMMs need less, and a chunk that the caches help with is better.

    Args:
        multiprocessors: of the GPU; None on a CPU.
        memory_budget: bytes that a chunk's logits and their gradient may take; the chunk shrinks to fit.

    Raises:
        ValueError: a budget that a single row does not fit in.
    """
    if multiprocessors is None:
        wanted = _CPU_ROWS
    else:
        enough = _GPU_ROWS if trains_weight else _GPU_FROZEN_ROWS
        columns = math.ceil(features / _TILE_COLUMNS)
        waves = math.ceil(enough / _TILE_ROWS * columns / multiprocessors)
        wanted = _TILE_ROWS * (multiprocessors * waves // columns)
    if memory_budget is not None:
        of_row = chunk_bytes(1, classes, logits_bytes, gradient_bytes)
        if memory_budget < of_row:
            raise ValueError(
                f"memory_budget: expected at least {of_row} bytes, one row of {classes} logits and their gradient, "
                f"but got {shown(memory_budget)}"
            )
        wanted = min(wanted, memory_budget // of_row)
    return wanted


def tile_of(rows: int, classes: int, chunk_rows: int) -> tuple[int, int]:
    """Rows and classes of a tile of the backward pass, no more elements than a chunk of rows has in the forward pass.

    All rows and as many classes as there is room for; where that would be too few for a GEMM, fewer rows. A chunk of
    few rows is its own tile: GEMMs of few rows add up in another order than others, and logits that differ in the last
    digit from those that the forward pass saw would cost precision.
    """
    if chunk_rows < _LEAST_ROWS:
        return max(1, min(rows, chunk_rows)), classes
    room = chunk_rows * classes
    columns = min(classes, max(room // max(rows, 1), _LEAST_CLASSES))
    if columns < classes:  # rows of the tile begin at multiples of 16 bytes
        columns -= columns % min(columns, _CLASSES_STEP)
    return max(1, min(rows, room // columns)), columns


_LEAST_ROWS, _LEAST_CLASSES, _CLASSES_STEP = 64, 1024, 128


# ---- the linear layer -----------------------------------------------------------------------------------------------

_PANEL = 4096  # classes of a half-precision weight that are widened at a time


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """a @ b, or that more, in `out`, whose dtype may be wider than theirs."""
    if a.dtype == out.dtype:
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    if add:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _widens(hidden: Tensor) -> bool:
    """Whether half-precision GEMMs run on float32 copies, panel by panel: on a CPU those are faster."""
    return hidden.is_cpu and hidden.element_size() == 2


class _Head:
    """Products with the weight, (V, D), and the sums of its gradient.

    Logits are made in float32 (float64 for float64 inputs), for half-precision logits would dominate the error. Their
    gradient is written as the GEMMs after it take it.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.hidden, self.weight = hidden, weight
        self.classes, self.features = weight.shape
        self.dtype = hidden.dtype
        self.wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.widens = _widens(hidden)
        self.gradient_dtype = self.wide if self.widens else self.dtype
        self.bias = None if bias is None else bias.to(self.wide)
        self.weight_sum: Tensor | None = None  # of the gradients of the chunks
        self.bias_sum: Tensor | None = None

    def states(self, chunk: Tensor | slice) -> Tensor:
        """Hidden states of rows, as the GEMMs take them."""
        h = self.hidden[chunk] if isinstance(chunk, slice) else self.hidden.index_select(0, chunk)
        return h.to(self.wide) if self.widens else h

    def panels(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight as the GEMMs take it, some classes at a time."""
        if not self.widens:
            yield slice(0, self.classes), self.weight
            return
        panel = self.weight.new_empty(min(_PANEL, self.classes), self.features, dtype=self.wide)
        for begin in range(0, self.classes, _PANEL):
            columns = slice(begin, min(begin + _PANEL, self.classes))
            yield columns, panel[: columns.stop - begin].copy_(self.weight[columns])

    def add_bias(self, logits: Tensor, columns: slice) -> Tensor:
        return logits if self.bias is None else logits.add_(self.bias[columns])

    def project(self, h: Tensor, out: Tensor) -> Tensor:
        """Logits of the rows h."""
        for columns, weight in self.panels():
            _multiply(h, weight.t(), out[:, columns])
        return self.add_bias(out, slice(None))

    def accumulate(self, g: Tensor, h: Tensor, needs: Sequence[bool]) -> Tensor | None:
        """Adds the gradient g of a chunk's logits to the sums of weight and bias; returns that of the hidden states."""
        of_hidden, of_weight, of_bias = needs
        if of_weight:
            first = self.weight_sum is None
            if first:
                self.weight_sum = self.weight.new_empty(self.weight.shape, dtype=self.wide)
            _multiply(g.t(), h, cast(Tensor, self.weight_sum), add=not first)
        if of_bias:
            share = g.sum(0, dtype=self.wide)
            self.bias_sum = share if self.bias_sum is None else self.bias_sum.add_(share)
        if not of_hidden:
            return None
        found = h.new_empty(h.shape, dtype=self.wide)
        for columns, weight in self.panels():
            _multiply(g[:, columns], weight, found, add=columns.start > 0)
        return found

    def finished(self, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """The sums of weight and bias, empty where none is needed; zeros where there was no chunk."""
        weight, bias = self.weight_sum, self.bias_sum
        if weight is None:
            weight = self.weight.new_zeros(self.weight.shape if needs[1] else (0,), dtype=self.wide)
        if bias is None:
            bias = self.weight.new_zeros(self.classes if needs[2] else 0, dtype=self.wide)
        return weight, bias

    def unit(self, *sizes: Tensor) -> Tensor | None:
        """A power of two of the size of a product, in which gradients of logits are counted so that float16, as GEMMs
        take it, keeps their digits; None where they need no help.
        """
        if self.gradient_dtype != torch.float16:
            return None
        largest = math.prod(x.detach().abs().amax().to(torch.float64) for x in sizes if x.numel())
        if not isinstance(largest, Tensor):
            return None
        unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
        return torch.where(largest.isfinite(), unit, 1.0)


# ---- chunks ---------------------------------------------------------------------------------------------------------


_SMALLEST, _LARGEST = -(2**63), 2**63 - 1  # of int64


_ROW_OPTIONS = ("target", "logit_scale", "class_weight", "ignore_index", "softcap", "masked")  # as kernels take them


class _Rows(NamedTuple):
    """What the ops know of the rows, without their logits; in the order of the schemas."""

    target: Tensor | None
    logit_scale: Tensor | None
    class_weight: Tensor | None
    ignore_index: int
    softcap: float
    masked: bool
    reference_input: Tensor | None  # (N, V) logits, or where there is a weight the (N, D) hidden states of a reference
    temperature: float
    reference_weight: Tensor | None
    reference_bias: Tensor | None

    @property
    def labelled(self) -> bool:
        return self.target is not None and not self.target.is_floating_point()

    def of(self, rows: Tensor | slice, columns: slice | None = None) -> dict[str, Any]:
        """The arguments of an op on some rows, and some classes, from which labels are counted then."""
        found: dict[str, Any] = {name: getattr(self, name) for name in _ROW_OPTIONS}
        if self.reference_input is not None:
            found |= {"reference": self.reference_logits(rows, columns), "temperature": self.temperature}
        if self.target is not None:
            found["target"] = _take(self.target, 0, rows)
        if columns is not None:
            if self.labelled:
                labels = found["target"]
                shifted = labels.clamp(min=-1) - columns.start  # the smallest int marks ignored rows, and is no label
                found["target"] = shifted.masked_fill_(labels == self.ignore_index, _SMALLEST)
                found["ignore_index"] = _SMALLEST
            elif self.target is not None:
                found["target"] = found["target"][:, columns]
            if self.class_weight is not None:
                found["class_weight"] = self.class_weight[columns]
        return found

    def reference_logits(self, rows: Tensor | slice, columns: slice | None = None) -> Tensor:
        """Those of a reference head go through the scale and the cap of the call, as those of the head beside it."""
        columns = slice(None) if columns is None else columns
        given = _take(cast(Tensor, self.reference_input), 0, rows)
        if self.reference_weight is None:
            return given[:, columns]
        bias = None if self.reference_bias is None else self.reference_bias[columns]
        with torch.no_grad():
            head = _Head(given, self.reference_weight[columns], bias)
            found = head.project(
                head.states(slice(0, len(given))), given.new_empty(len(given), head.classes, dtype=head.wide)
            )
            return _transformed(found, self.logit_scale, self.softcap)

    def check_labels(self, head: _Head) -> None:
        """On a CPU a bad label raises, with its place among all rows; kernels see those of a chunk."""
        if head.hidden.is_cpu:
            reference.check_labels(self.target, head.classes, self.ignore_index)

    def kept(self, count: int, skip_ignored: bool) -> Tensor | None:
        """The rows that are not ignored, or None for all of them."""
        if not (skip_ignored and self.labelled):
            return None
        assert self.target is not None
        kept = (self.target != self.ignore_index).nonzero().view(-1)
        return kept if len(kept) < count else None


def _transformed(x: Tensor, scale: Tensor | None, cap: float) -> Tensor:
    """cap · tanh(scale · x / cap); −inf stays −inf, whatever scale and cap."""
    if scale is None and not cap:
        return x
    z = x if scale is None else x * scale.to(x)
    z = torch.tanh(z / cap) * cap if cap else z
    return torch.where(x == -torch.inf, x, z)


def _take(x: Tensor, dim: int, chunk: Tensor | slice) -> Tensor:
    if isinstance(chunk, slice):
        return x.narrow(dim, chunk.start, chunk.stop - chunk.start)
    return x.index_select(dim, chunk)


def _put(x: Tensor, dim: int, chunk: Tensor | slice, values: Tensor) -> None:
    if isinstance(chunk, slice):
        x.narrow(dim, chunk.start, chunk.stop - chunk.start).copy_(values)
    else:
        x.index_copy_(dim, chunk, values.to(x.dtype))


def _pieces(count: int, size: int) -> Iterator[slice]:
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


class _Chunk(NamedTuple):
    """Rows of a chunk, and what a kernel takes of them."""

    rows: Tensor | slice
    states: Tensor
    logits: Tensor
    gradient: Tensor  # room for it
    arguments: dict[str, Any]


def _chunks(head: _Head, rows: _Rows, chunk_rows: int, skip_ignored: bool, with_gradient: bool) -> Iterator[_Chunk]:
    """The rows in chunks: all of them, or those that are not ignored."""
    kept = rows.kept(len(head.hidden), skip_ignored)
    count = len(head.hidden) if kept is None else len(kept)
    logits = head.hidden.new_empty(min(chunk_rows, count), head.classes, dtype=head.wide)
    gradient = logits.new_empty(logits.shape if with_gradient else (0, head.classes), dtype=head.gradient_dtype)
    for piece in _pieces(count, chunk_rows):
        chunk = piece if kept is None else kept[piece]
        size = piece.stop - piece.start
        h = head.states(chunk)
        yield _Chunk(chunk, h, head.project(h, logits[:size]), gradient[:size], rows.of(chunk))


def _family(name: str) -> Any:
    return getattr(torch.ops, name)


class _Denominators(NamedTuple):
    of_terms: Tensor  # (terms) float64
    rows: Tensor  # () float64, how many count


def _denominators(rows: _Rows, count: int, terms: list[float], reduction: str, normalizer: Tensor | None,
                  empty_zero: bool, like: Tensor) -> _Denominators:  # fmt: skip
    """Cross-entropy divides by the sum of its labels' weights, every other term by the number of rows that count."""
    number, weights = like.new_full((), float(count), dtype=torch.float64), None
    target = rows.target
    if target is not None and not target.is_floating_point():
        counted = target != rows.ignore_index
        number = counted.sum(dtype=torch.float64)
        if rows.class_weight is not None:
            labels = target.clamp(0, rows.class_weight.shape[0] - 1)
            weights = torch.where(counted, rows.class_weight.to(torch.float64).gather(0, labels), 0.0).sum()
    one = torch.ones_like(number)
    found = []
    for kind in terms[::3]:
        if reduction != "mean":
            found.append(one)
        elif normalizer is not None:
            found.append(one * normalizer)
        else:
            mean = weights if weights is not None and kind == 0 else number
            found.append(torch.where(number == 0, one, mean) if empty_zero else mean)
    return _Denominators(torch.stack(found), number)


# ---- the ops --------------------------------------------------------------------------------------------------------

_HEAD_SCHEMA = "str family, Tensor hidden, Tensor weight, Tensor? bias"
_ROWS_SCHEMA = (
    "Tensor? target, Tensor? logit_scale, Tensor? class_weight, int ignore_index, float softcap, bool masked, "
    "Tensor? reference_input, float temperature, Tensor? reference_weight, Tensor? reference_bias"
)
_TERMS_SCHEMA = (
    "float[] terms, int reduction, Tensor? coefficient_tensor, Tensor? normalizer, bool empty_zero, bool with_parts"
)
_CHUNKS_SCHEMA = "bool[] needs, int chunk_rows, bool skip_ignored"


def _linear_objective(
    family: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None,
    logit_scale: Tensor | None, class_weight: Tensor | None, ignore_index: int, softcap: float, masked: bool,
    reference_input: Tensor | None, temperature: float, reference_weight: Tensor | None, reference_bias: Tensor | None,
    terms: list[float], reduction: int, coefficient_tensor: Tensor | None, normalizer: Tensor | None, empty_zero: bool,
    with_parts: bool, needs: list[bool], chunk_rows: int, skip_ignored: bool, with_gradient: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(loss, parts, row_gradient, maximum, and the gradients of hidden, weight and bias, or empty tensors)

    Gradients stay in the accumulation type until the upstream gradient is known: they are rounded once, and in float16
    after loss scaling.
    """
    rows = _Rows(
        target, logit_scale, class_weight, ignore_index, softcap, masked, reference_input, temperature,
        reference_weight, reference_bias,
    )  # fmt: skip
    head = _Head(hidden, weight, bias)
    n, size, kind = hidden.shape[0], len(terms) // 3, REDUCTIONS[reduction]
    denominators = _denominators(rows, n, terms, kind, normalizer, empty_zero, hidden)
    factors = 1.0 / denominators.of_terms
    if coefficient_tensor is not None:  # numbers of the CPU go to a device one by one, without waiting for it
        coefficients = coefficient_tensor.to(torch.float64)
        if coefficients.device == factors.device:
            factors = factors * coefficients
        else:
            factors = torch.stack([factors[k] * coefficients[k] for k in range(size)])

    unit = None
    if with_gradient:
        unit = head.unit(torch.stack([factors[k] * number for k, number in enumerate(terms[2::3])]))
    if unit is not None:
        factors = factors / unit

    rows.check_labels(head)
    kernels = _family(family)
    inner = REDUCTIONS.index("none" if kind == "none" else "sum")
    fields = ops.row_gradient_fields(terms, class_weight, target)
    row_gradient = hidden.new_zeros((fields, n), dtype=head.wide)
    maximum, reads_maximum = hidden.new_zeros((2, n), dtype=torch.float64), _MAX_Z in terms[::3]
    of_hidden = hidden.new_zeros(hidden.shape if needs[0] and with_gradient else (0,), dtype=head.wide)
    parts_size = size + len(reference.FREE_STATISTICS) if with_parts else 0
    losses, all_parts = [], []
    if kind == "none":
        loss = hidden.new_zeros(n, dtype=head.wide)
        parts = hidden.new_zeros((parts_size, n), dtype=head.wide)
    for chunk in _chunks(head, rows, chunk_rows, skip_ignored, with_gradient):
        options = {**chunk.arguments, "coefficient_tensor": factors, "with_parts": with_parts}
        if with_gradient:
            found = kernels.fused.into(terms, inner, chunk.logits, **options, gradient=chunk.gradient)
        else:
            found = kernels.objective.default(terms, inner, chunk.logits, **options)
        _put(row_gradient, 1, chunk.rows, found[2])
        if reads_maximum:
            _put(maximum, 1, chunk.rows, _maximum_of(chunk))
        if kind == "none":
            _put(loss, 0, chunk.rows, found[0])
            if with_parts:
                _put(parts, 1, chunk.rows, found[1])
        else:
            losses.append(found[0])
            all_parts.append(found[1])
        if with_gradient:
            share = head.accumulate(chunk.gradient, chunk.states, needs)
            if share is not None:
                _put(of_hidden, 0, chunk.rows, share)
    if kind != "none":
        # Over no rows a mean is 0/0.
        nothing = torch.where(denominators.rows == 0, (0.0 / denominators.of_terms).sum(), 0.0)
        total = torch.stack(losses).sum(dtype=torch.float64) if losses else torch.zeros_like(nothing)
        loss = ((total if unit is None else total * unit) + nothing).to(head.wide)
        parts = _parts_of_chunks(all_parts, size, denominators, head.wide) if with_parts else loss.new_empty(0)
    of_weight, of_bias = head.finished([with_gradient and need for need in needs])
    if unit is not None:
        for counted in (row_gradient[1:], of_hidden, of_weight, of_bias):  # the maximum before the coefficients stays
            counted *= unit
    return loss, parts, row_gradient, maximum, of_hidden, of_weight, of_bias


def _parts_of_chunks(parts: list[Tensor], size: int, denominators: _Denominators, dtype: torch.dtype) -> Tensor:
    """Sums of terms over their denominators, means of the free statistics, and the number of rows."""
    free = len(reference.FREE_STATISTICS)
    if not parts:
        parts = [denominators.of_terms.new_zeros(size + free + 1)]
    of_chunks = torch.stack(parts).to(torch.float64)
    terms, means, counts = of_chunks.split([size, free, 1], dim=1)
    sums = torch.where(counts == 0, 0.0, means * counts).sum(0)
    return torch.cat([terms.sum(0) / denominators.of_terms, sums / counts.sum(), counts.sum(0)]).to(dtype)


def _fake_linear_objective(
    family: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None,
    logit_scale: Tensor | None, class_weight: Tensor | None, ignore_index: int, softcap: float, masked: bool,
    reference_input: Tensor | None, temperature: float, reference_weight: Tensor | None, reference_bias: Tensor | None,
    terms: list[float], reduction: int, coefficient_tensor: Tensor | None, normalizer: Tensor | None, empty_zero: bool,
    with_parts: bool, needs: list[bool], chunk_rows: int, skip_ignored: bool, with_gradient: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    ops.no_meta_beside(
        "hidden states", hidden, weight=weight, bias=bias, target=target, logit_scale=logit_scale,
        class_weight=class_weight, reference=reference_input, reference_weight=reference_weight,
        coefficient=coefficient_tensor, normalizer=normalizer,
    )  # fmt: skip
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    n, size = hidden.shape[0], len(terms) // 3 + len(reference.FREE_STATISTICS)
    if REDUCTIONS[reduction] == "none":
        loss, parts = hidden.new_empty(n, dtype=wide), hidden.new_empty((size if with_parts else 0, n), dtype=wide)
    else:
        loss, parts = hidden.new_empty((), dtype=wide), hidden.new_empty(size + 1 if with_parts else 0, dtype=wide)
    fields = ops.row_gradient_fields(terms, class_weight, target)
    gradients = _fake_gradients(hidden, weight, [with_gradient and need for need in needs], wide)
    maximum = hidden.new_empty((2, n), dtype=torch.float64)
    return loss, parts, hidden.new_empty((fields, n), dtype=wide), maximum, *gradients


def _fake_gradients(
    hidden: Tensor, weight: Tensor, needs: list[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    of_hidden, of_weight, of_bias = (
        hidden.new_empty(shape if need else (0,), dtype=dtype) for shape, need in zip(shapes, needs, strict=True)
    )
    return of_hidden, of_weight, of_bias


class Reduction(Protocol):
    """A sum over processes that is under way between two calls; without rows it is not begun."""

    def begin(self, x: Tensor) -> None: ...

    def wait(self) -> None: ...


class _Tile(NamedTuple):
    """Some rows, some classes, and what a kernel takes of them."""

    columns: slice
    logits: Tensor
    arguments: dict[str, Any]


def _gradients(
    head: _Head, rows: _Rows, needs: list[bool], chunk_rows: int, skip_ignored: bool, needs_scale: bool,
    of_rows: Sequence[Tensor], unit: Tensor | None, write: Callable[[list[Tensor], _Tile, Tensor], None],
    reduction: Reduction | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight, bias and logit scale, tile by tile.

    Args:
        of_rows: what `write` needs to know of the rows, the last dimension; it gets its tile's.
        unit: what the gradients that `write` writes are to be multiplied by.
        write: puts the gradient of a tile's logits, or of the scaled logits if the scale needs one, in a tensor.
        reduction: of the gradient of the hidden states; under way while the last product of the weight is made.
    """
    hidden, weight, scale = head.hidden, head.weight, rows.logit_scale
    kept = rows.kept(len(hidden), skip_ignored)
    if kept is not None:
        of_rows = [x.index_select(-1, kept) if x.dim() else x for x in of_rows]
    count = len(hidden) if kept is None else len(kept)
    states = head.states(slice(None) if kept is None else kept)
    tile_rows, tile_classes = tile_of(count, max(head.classes, 1), chunk_rows)  # a part of the classes may have none
    pieces = list(_pieces(count, tile_rows))

    of_states = states.new_zeros(states.shape if needs[0] else (0,), dtype=head.wide)
    of_weight = weight.new_empty(weight.shape if needs[1] else (0,))
    of_bias = weight.new_empty(head.classes if needs[2] else 0)
    of_scale = hidden.new_zeros((), dtype=torch.float64)
    # Of the weight, the products of a tile are its gradient, unless they have to be added or are counted in a unit.
    direct = unit is None and not head.widens and (head.dtype == head.wide or len(pieces) == 1)
    room = hidden.new_empty(tile_rows * tile_classes, dtype=head.wide)
    gradient_room = room.new_empty(room.shape, dtype=head.wide if needs_scale else head.gradient_dtype)

    for columns in _pieces(head.classes, tile_classes):
        size = columns.stop - columns.start
        w = weight[columns].to(head.wide) if head.widens else weight[columns]
        weight_sum = of_weight[columns] if direct else w.new_zeros(w.shape if needs[1] else (0,), dtype=head.wide)
        bias_sum = w.new_zeros(size, dtype=head.wide)
        for piece in pieces:
            shape = (piece.stop - piece.start, size)
            logits, g = (x[: math.prod(shape)].view(shape) for x in (room, gradient_room))
            h = states[piece]
            head.add_bias(_multiply(h, w.t(), logits), columns)
            tile = _Tile(columns, logits, rows.of(piece if kept is None else kept[piece], columns))
            write([x[..., piece] if x.dim() else x for x in of_rows], tile, g)
            if needs_scale:  # what has no gradient (an excluded class) may be infinite
                of_scale += torch.where(g == 0, g, g * logits).sum(dtype=torch.float64)
                g = g.mul_(cast(Tensor, scale).to(g)).to(head.gradient_dtype)
            if needs[0]:
                _multiply(g, w, of_states[piece], add=columns.start > 0)
                if reduction is not None and piece.stop == count and columns.stop == head.classes:
                    reduction.begin(of_states if unit is None else of_states.mul_(unit))  # each rank has its unit
            if needs[1]:
                _multiply(g.t(), h, weight_sum, add=piece.start > 0)
            if needs[2]:
                bias_sum += g.sum(0, dtype=head.wide)
        if needs[1] and not direct:
            of_weight[columns] = weight_sum if unit is None else weight_sum * unit
        if needs[2]:
            of_bias[columns] = bias_sum if unit is None else bias_sum * unit
    if not pieces:
        of_weight.zero_()
        of_bias.zero_()
    if reduction is not None:
        if head.classes == 0:
            reduction.begin(of_states)
        reduction.wait()
    if unit is not None:
        of_states, of_scale = of_states if reduction is not None else of_states * unit, of_scale * unit
    of_hidden = of_states.to(head.dtype)
    if needs[0] and kept is not None:
        of_hidden = hidden.new_zeros(hidden.shape).index_copy_(0, kept, of_hidden)
    return of_hidden, of_weight, of_bias, of_scale


# ---- the maximum ----------------------------------------------------------------------------------------------------

# The gradient of a row's maximum goes to one element, which a kernel knows by its being equal to the maximum. Logits
# that are computed anew differ in their last digits from those of the forward pass, if their GEMM has another shape. So
# the forward pass keeps where the maximum is, and the logit there, which takes its old value again.

_MAX_Z = 2.0  # kind of the one term that reads the maximum
_MAX_GRAD, _TARGET_IS_MAX = 9, 13  # fields of RowGradient, and of Centred
_BLOCK = 128


def _first_maximum(z: Tensor) -> Tensor:
    """z.argmax(1) at the speed of amax, which is several times that on a CPU: the block of the maximum comes first."""
    whole = z.shape[1] // _BLOCK * _BLOCK
    maxima = z[:, :whole].unflatten(1, (-1, _BLOCK)).amax(2) if whole else z.new_empty(len(z), 0)
    if whole < z.shape[1]:
        maxima = torch.cat([maxima, z[:, whole:].amax(1, keepdim=True)], 1)
    first = maxima.argmax(1, keepdim=True) * _BLOCK
    columns = (first + torch.arange(_BLOCK, device=z.device)).clamp_(max=z.shape[1] - 1)
    return first + z.gather(1, columns).argmax(1, keepdim=True)


def _maximum_of(chunk: _Chunk) -> Tensor:
    """(2, rows) float64: the first class but the target of the largest z, and its logit. A cap keeps the order.

    Whether it is the target that has the largest z the kernels know without help: that is a number of the row.
    """
    logits, target, scale = (chunk.logits, *(chunk.arguments[name] for name in ("target", "logit_scale")))
    z = logits if scale is None else torch.where(logits.isneginf(), logits, logits * scale.to(logits))
    if target is None or target.is_floating_point():
        place = _first_maximum(z)
    else:  # the buffer is a chunk's own, and gets back what it held
        own = target.clamp(0, z.shape[1] - 1).unsqueeze(1)
        held = z.gather(1, own)
        here = target.unsqueeze(1) == own  # or it is elsewhere
        place = _first_maximum(z.scatter_(1, own, held.masked_fill(here, -torch.inf)))
        z.scatter_(1, own, held)
    return torch.cat([place.to(torch.float64), logits.gather(1, place).to(torch.float64)], 1).t()


def _put_maximum(maximum: Tensor, tile: _Tile) -> Tensor:
    """Restores the logit at the maximum; returns which rows have theirs in the tile."""
    place = maximum[0].to(torch.int64) - tile.columns.start
    size = tile.logits.shape[1]
    here = (place >= 0) & (place < size)
    place = place.clamp(0, size - 1).unsqueeze(1)
    old = torch.where(here.unsqueeze(1), maximum[1].to(tile.logits.dtype).unsqueeze(1), tile.logits.gather(1, place))
    tile.logits.scatter_(1, place, old)
    return here


# ---- the gradients of a loss, of statistics -------------------------------------------------------------------------


def _linear_objective_gradient(
    upstream: Tensor, row_gradient: Tensor, maximum: Tensor, family: str, hidden: Tensor, weight: Tensor,
    bias: Tensor | None, target: Tensor | None, logit_scale: Tensor | None, class_weight: Tensor | None,
    ignore_index: int, softcap: float, masked: bool, reference_input: Tensor | None, temperature: float,
    reference_weight: Tensor | None, reference_bias: Tensor | None, terms: list[float], needs: list[bool],
    chunk_rows: int, skip_ignored: bool, needs_scale: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of hidden, weight and bias, or empty tensors, and that of the logit scale."""
    rows = _Rows(
        target, logit_scale, class_weight, ignore_index, softcap, masked, reference_input, temperature,
        reference_weight, reference_bias,
    )  # fmt: skip
    head = _Head(hidden, weight, bias)
    unit = head.unit(upstream, row_gradient[1:])
    op = _family(family).gradient.into

    reads_maximum = _MAX_Z in terms[::3]

    def write(of_rows: list[Tensor], tile: _Tile, out: Tensor) -> None:
        u, kept, maximum = of_rows
        kept = kept.contiguous()
        if reads_maximum:
            kept = kept.clone()
            kept[_MAX_GRAD].masked_fill_(~_put_maximum(maximum, tile), 0.0)
        op(u, kept, needs_scale, terms, REDUCTIONS.index("sum"), tile.logits, **tile.arguments, gradient=out)

    u = upstream.to(head.wide) if unit is None else (upstream / unit).to(head.wide)
    numbers = (u, row_gradient, maximum)
    return _gradients(head, rows, needs, chunk_rows, skip_ignored, needs_scale, numbers, unit, write)


_OF_HEAD_AND_ROWS = 10  # arguments, from the target on


def _fake_linear_objective_gradient(
    upstream: Tensor, row_gradient: Tensor, maximum: Tensor, family: str, hidden: Tensor, weight: Tensor,
    bias: Tensor | None, *others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    needs = others[_OF_HEAD_AND_ROWS + 1]
    return *_fake_gradients(hidden, weight, needs, hidden.dtype), hidden.new_empty((), dtype=torch.float64)


def collect(
    family: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None,
    logit_scale: Tensor | None, class_weight: Tensor | None, ignore_index: int, softcap: float, masked: bool,
    reference_input: Tensor | None, temperature: float, reference_weight: Tensor | None, reference_bias: Tensor | None,
    chunk_rows: int, skip_ignored: bool, part: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(statistics, centred sums, maximum) of every row; the first two as `objkern::statistics` has them

    part: the classes are some of many, and where a label is none of them, the kernels take the first for it.
    """
    rows = _Rows(
        target, logit_scale, class_weight, ignore_index, softcap, masked, reference_input, temperature,
        reference_weight, reference_bias,
    )  # fmt: skip
    head = _Head(hidden, weight, bias)
    if not part:
        rows.check_labels(head)
    op, n = _family(family).statistics.default, hidden.shape[0]
    statistics = hidden.new_zeros((len(Statistics._fields), n), dtype=torch.float64)
    centred = hidden.new_zeros((ops.CENTRED, n), dtype=torch.float64)
    maximum = hidden.new_zeros((2, n), dtype=torch.float64)
    for chunk in _chunks(head, rows, chunk_rows, skip_ignored, with_gradient=False):
        arguments = chunk.arguments
        if part and rows.labelled:
            arguments = arguments | {"target": with_first_elsewhere(arguments["target"], head.classes, ignore_index)}
        found = op(chunk.logits, **arguments)
        _put(statistics, 1, chunk.rows, found[0])
        _put(centred, 1, chunk.rows, found[1])
        _put(maximum, 1, chunk.rows, _maximum_of(chunk))
    return statistics, centred, maximum


def with_first_elsewhere(labels: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Labels, and the first class for those that are none of these classes."""
    return labels.masked_fill(((labels < 0) | (labels >= classes)) & (labels != ignore_index), 0)


def _fake_linear_statistics(
    family: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None,
    logit_scale: Tensor | None, class_weight: Tensor | None, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    ops.no_meta_beside(
        "hidden states", hidden, weight=weight, bias=bias, target=target, logit_scale=logit_scale,
        class_weight=class_weight,
    )  # fmt: skip
    sizes = len(Statistics._fields), ops.CENTRED, 2
    return tuple(hidden.new_empty((size, hidden.shape[0]), dtype=torch.float64) for size in sizes)


def gradients_of_statistics(
    partials: Tensor, centred: Tensor, maximum: Tensor, family: str, hidden: Tensor, weight: Tensor,
    bias: Tensor | None, target: Tensor | None, logit_scale: Tensor | None, class_weight: Tensor | None,
    ignore_index: int, softcap: float, masked: bool, reference_input: Tensor | None, temperature: float,
    reference_weight: Tensor | None, reference_bias: Tensor | None, needs: list[bool], chunk_rows: int,
    skip_ignored: bool, needs_scale: bool, reduction: Reduction | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of hidden, weight and bias, or empty tensors, and that of the logit scale.

    reduction: of the gradient of the hidden states, which is begun as soon as they are all there.
    """
    rows = _Rows(
        target, logit_scale, class_weight, ignore_index, softcap, masked, reference_input, temperature,
        reference_weight, reference_bias,
    )  # fmt: skip
    head = _Head(hidden, weight, bias)
    unit = head.unit(partials)
    op = _family(family).statistics_gradient.into

    of_max = Statistics._fields.index("max_logit")
    reads_maximum = not partials.is_cpu or bool(partials[of_max].any())  # a GPU would have to be waited for

    def write(of_rows: list[Tensor], tile: _Tile, out: Tensor) -> None:
        f, kept, maximum = of_rows
        if reads_maximum:
            elsewhere = ~_put_maximum(maximum, tile) & (kept[_TARGET_IS_MAX] == 0)
            f = f.clone()
            f[of_max].masked_fill_(elsewhere, 0.0)
        op(f, kept.contiguous(), needs_scale, tile.logits, **tile.arguments, gradient=out)

    numbers = (partials if unit is None else partials / unit, centred, maximum)
    return _gradients(head, rows, needs, chunk_rows, skip_ignored, needs_scale, numbers, unit, write, reduction)


def _fake_linear_statistics_gradient(
    partials: Tensor,
    centred: Tensor,
    maximum: Tensor,
    family: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *others: Any,
) -> tuple[Tensor, ...]:
    needs = others[_OF_HEAD_AND_ROWS]
    return *_fake_gradients(hidden, weight, needs, hidden.dtype), hidden.new_empty((), dtype=torch.float64)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast chose the dtypes of an op's arguments; inside, they stay what they are."""

    def run(*arguments: Any) -> Any:
        device = next(a for a in arguments if isinstance(a, Tensor)).device.type
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return run


_GRADIENTS = "(Tensor hidden, Tensor weight, Tensor bias, Tensor logit_scale)"
_OPS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "linear_objective": (
        f"({_HEAD_SCHEMA}, {_ROWS_SCHEMA}, {_TERMS_SCHEMA}, {_CHUNKS_SCHEMA}, bool with_gradient) -> (Tensor loss, "
        "Tensor parts, Tensor row_gradient, Tensor maximum, Tensor hidden, Tensor weight, Tensor bias)",
        _linear_objective, _fake_linear_objective,
    ),
    "linear_objective_gradient": (
        f"(Tensor upstream, Tensor row_gradient, Tensor maximum, {_HEAD_SCHEMA}, {_ROWS_SCHEMA}, float[] terms, "
        f"{_CHUNKS_SCHEMA}, bool needs_scale) -> {_GRADIENTS}",
        _linear_objective_gradient, _fake_linear_objective_gradient,
    ),
    "linear_statistics": (
        f"({_HEAD_SCHEMA}, {_ROWS_SCHEMA}, int chunk_rows, bool skip_ignored) -> (Tensor statistics, Tensor centred, "
        "Tensor maximum)",
        collect, _fake_linear_statistics,
    ),
    "linear_statistics_gradient": (
        f"(Tensor partials, Tensor centred, Tensor maximum, {_HEAD_SCHEMA}, {_ROWS_SCHEMA}, {_CHUNKS_SCHEMA}, "
        f"bool needs_scale) -> {_GRADIENTS}",
        gradients_of_statistics, _fake_linear_statistics_gradient,
    ),
}  # fmt: skip
for _name, (_schema, _function, _fake) in _OPS.items():
    torch.library.define(f"objkern::{_name}", _schema)
    torch.library.impl(f"objkern::{_name}", "CompositeExplicitAutograd", without_autocast(_function))
    torch.library.register_fake(f"objkern::{_name}", _fake)
    torch.library.register_vmap(f"objkern::{_name}", ops.one_by_one(getattr(torch.ops.objkern, _name)))


# ---- derivatives ----------------------------------------------------------------------------------------------------

# Places of arguments. Both forward ops begin with the family, the head and what is known of the rows.
_HIDDEN, _WEIGHT, _BIAS, _TARGET, _SCALE = range(1, 6)
_REFERENCE, _REFERENCE_WEIGHT, _REFERENCE_BIAS = 10, 12, 13
_HEAD_AND_ROWS = 14  # how many there are of those
_TERMS, _COEFFICIENTS = 14, 16  # of linear_objective
_NEEDS, _CHUNK_ROWS, _SKIP_IGNORED, _WITH_GRADIENT = range(20, 24)
_EAGER = (_TARGET, _REFERENCE, _REFERENCE_WEIGHT, _REFERENCE_BIAS)  # their derivatives have no kernels


class _Kept:
    """What a forward op leaves for its backward pass: its arguments, and what else is named."""

    def __init__(self, ctx: Any, inputs: tuple[Any, ...], *results: Tensor) -> None:
        self.tensors = [place for place, value in enumerate(inputs) if isinstance(value, Tensor)]
        self.others = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(inputs[place] for place in self.tensors), *results)

    def of(self, ctx: Any) -> tuple[list[Any], list[Tensor]]:
        """The arguments and the results, read once: a checkpoint computes what it unpacks anew."""
        saved, arguments = ctx.saved_tensors, list(self.others)
        for place, value in zip(self.tensors, saved, strict=False):
            arguments[place] = value
        return arguments, list(saved[len(self.tensors) :])


def _through_reference(
    forward: Callable[..., Tensor], arguments: list[Any], places: list[int], needed: list[bool], upstream: Tensor
) -> dict[int, Tensor]:
    """Gradients from eager torch, all logits at once: second derivatives, and those of a probability target."""
    create_graph = torch.is_grad_enabled()
    if not any(needed):
        return {}
    with torch.enable_grad():
        inputs, wanted = ops.apart(arguments, places, needed)
        found = ops.gradients(forward(*inputs), wanted, upstream, create_graph)
    return dict(zip([place for place, need in zip(places, needed, strict=True) if need], found, strict=True))


def eager_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))


def _of_counted(x: Tensor | None, target: Tensor | None, ignore_index: int) -> Tensor | None:
    """With zeros for ignored rows: whatever they hold, nothing comes of it, and 0·NaN would."""
    if x is None or target is None or target.is_floating_point():
        return x
    return x.masked_fill((target == ignore_index)[:, None], 0.0)


def eager_reference(
    given: Tensor | None, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, cap: float
) -> Tensor | None:
    """The logits of a reference, constants but for what of them requires grad: the scale is the other side's."""
    if given is None or weight is None:
        return given
    return _transformed(eager_logits(given, weight, bias), None if scale is None else scale.detach(), cap)


def _eager_objective(
    family: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None,
    logit_scale: Tensor | None, class_weight: Tensor | None, ignore_index: int, softcap: float, masked: bool,
    reference_input: Tensor | None, temperature: float, reference_weight: Tensor | None, reference_bias: Tensor | None,
    terms: list[float], reduction: int, coefficient_tensor: Tensor | None, normalizer: Tensor | None, empty_zero: bool,
    *_: Any,
) -> Tensor:  # fmt: skip
    hidden, reference_input = (_of_counted(x, target, ignore_index) for x in (hidden, reference_input))
    r = eager_reference(reference_input, reference_weight, reference_bias, logit_scale, softcap)
    return ops.objective_forward(
        terms, reduction, eager_logits(cast(Tensor, hidden), weight, bias), target, logit_scale, class_weight,
        ignore_index, softcap, masked, r, temperature, coefficient_tensor, normalizer, empty_zero,
    )  # fmt: skip


def _eager_statistics(family: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rows: Any) -> Tensor:
    known = _Rows(*rows[:_OF_HEAD_AND_ROWS])
    hidden, given = (_of_counted(x, known.target, known.ignore_index) for x in (hidden, known.reference_input))
    r = eager_reference(given, known.reference_weight, known.reference_bias, known.logit_scale, known.softcap)
    return ops.statistics_forward(eager_logits(hidden, weight, bias), *known[:6], r, known.temperature)


def _eager_places(ctx: Any) -> tuple[list[int], list[bool]]:
    needed = [place for place in _EAGER if ctx.needs_input_grad[place]]
    return needed, [True] * len(needed)


def _keep_objective(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, parts, row_gradient, maximum, *gradients = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.kept = _Kept(ctx, inputs, parts, row_gradient, maximum)
    # Handed over once, scaled in place; a second backward pass makes its own. Detached: no way back to this node.
    ctx.finished = [g.detach() for g in gradients] if inputs[_WITH_GRADIENT] else None


def _objective_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    arguments, (parts, row_gradient, maximum) = ctx.kept.of(ctx)
    places = [_HIDDEN, _WEIGHT, _BIAS, _TARGET, _SCALE, _COEFFICIENTS, *_EAGER[1:]]
    needed = [ctx.needs_input_grad[place] for place in places]
    found: dict[int, Tensor | None] = {}
    if torch.is_grad_enabled():
        found.update(_through_reference(_eager_objective, arguments, places, needed, upstream))
        return tuple(found.get(place) for place in range(len(arguments)))
    found.update(_through_reference(_eager_objective, arguments, *_eager_places(ctx), upstream))
    if ctx.needs_input_grad[_COEFFICIENTS]:
        found[_COEFFICIENTS] = _coefficient_gradient(arguments, parts, upstream)
    needs, needs_scale = needed[:3], needed[4]
    if any(needs) or needs_scale:
        finished, ctx.finished = ctx.finished, None
        if finished is not None and all(made or not need for made, need in zip(arguments[_NEEDS], needs, strict=True)):
            gradients = [_scaled(g, upstream, arguments[_HIDDEN].dtype) if need else g
                         for g, need in zip(finished, needs, strict=True)]  # fmt: skip
        else:
            *gradients, of_scale = torch.ops.objkern.linear_objective_gradient(
                upstream, row_gradient, maximum, *arguments[:_HEAD_AND_ROWS], arguments[_TERMS], needs,
                arguments[_CHUNK_ROWS], arguments[_SKIP_IGNORED], needs_scale,
            )  # fmt: skip
            if needs_scale:
                found[_SCALE] = of_scale.to(arguments[_SCALE])
        found.update({place: g for place, g, need in zip(places[:3], gradients, needs, strict=True) if need})
    return tuple(found.get(place) for place in range(len(arguments)))


def _coefficient_gradient(arguments: list[Any], parts: Tensor, upstream: Tensor) -> Tensor:
    """d loss / d coefficient is the term itself."""
    terms, like = arguments[_TERMS], arguments[_COEFFICIENTS]
    values = parts.to(torch.float64) * upstream
    if upstream.dim() != 0:
        values = values.sum(-1)
    # One by one, for a tensor of the numbers would have to be copied to the device.
    return torch.stack([values[k] * number for k, number in enumerate(terms[2::3])]).to(like)


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient · upstream, in place where nobody else can see it."""
    if type(gradient) is not Tensor or _stands_for_others(gradient, upstream):
        return (gradient * upstream).to(dtype)
    if gradient.dtype != dtype:  # in one pass, without the wide product between
        return torch.mul(gradient, upstream, out=gradient.new_empty(gradient.shape, dtype=dtype))
    if upstream.is_cpu and float(upstream) == 1.0:
        return gradient
    return gradient.mul_(upstream)


def _stands_for_others(*tensors: Tensor) -> bool:
    """Whether one of them is traced, or a batch of tensors, so that it cannot be looked at or written to."""
    batched = torch._C._functorch.is_functorch_wrapped_tensor, torch._C._functorch.is_legacy_batchedtensor
    return torch.compiler.is_compiling() or any(x.is_meta or any(test(x) for test in batched) for x in tensors)


def _keep_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.kept = _Kept(ctx, inputs, *output[1:])


def _statistics_backward(ctx: Any, partials: Tensor, *_: Any) -> tuple[Any, ...]:
    arguments, (centred, maximum) = ctx.kept.of(ctx)
    places = [_HIDDEN, _WEIGHT, _BIAS, _TARGET, _SCALE, *_EAGER[1:]]
    needed = [ctx.needs_input_grad[place] for place in places]
    found: dict[int, Tensor | None] = {}
    if torch.is_grad_enabled():
        found.update(_through_reference(_eager_statistics, arguments, places, needed, partials))
        return tuple(found.get(place) for place in range(len(arguments)))
    found.update(_through_reference(_eager_statistics, arguments, *_eager_places(ctx), partials))
    needs, needs_scale = needed[:3], needed[4]
    if any(needs) or needs_scale:
        *gradients, of_scale = torch.ops.objkern.linear_statistics_gradient(
            partials, centred, maximum, *arguments[:_HEAD_AND_ROWS], needs, *arguments[_HEAD_AND_ROWS:], needs_scale
        )
        found.update({place: g for place, g, need in zip(places[:3], gradients, needs, strict=True) if need})
        if needs_scale:
            found[_SCALE] = of_scale.to(arguments[_SCALE])
    return tuple(found.get(place) for place in range(len(arguments)))


torch.library.register_autograd("objkern::linear_objective", _objective_backward, setup_context=_keep_objective)
torch.library.register_autograd("objkern::linear_statistics", _statistics_backward, setup_context=_keep_statistics)


# ---- calls ----------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """The last layer of a call, checked: what stands in the place of logits."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V)
    chunk_rows: int
    skip_ignored: bool
    reference_weight: Tensor | None = None  # (V, D) of a reference whose hidden states stand in the batch
    reference_bias: Tensor | None = None

    @property
    def needs(self) -> list[bool]:
        if not torch.is_grad_enabled():
            return [False] * 3
        return [x is not None and x.requires_grad for x in (self.hidden, self.weight, self.bias)]


def layer(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int | None, memory_budget: int | None,
    part: bool = False,
) -> tuple[Layer, Tensor]:  # fmt: skip
    """The layer, and logits without memory: their shape, dtype and device, for `flatten` to check a target against.

    part: the classes are some of many, perhaps none.
    """
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if not isinstance(x, Tensor) and (x is not None or name != "bias"):
            raise TypeError(f"{name}: expected a tensor but got {describe(x)}")
        if isinstance(x, Tensor):
            check_dense(name, x)
        if hasattr(x, "full_tensor"):
            raise TypeError(f"{name}: expected a whole tensor but got a DTensor; gather it first: {name}.full_tensor()")
    if is_autocast(hidden.device):  # as F.linear under autocast
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = (
            x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x
            for x in (hidden, weight, bias)
        )
    if not hidden.is_floating_point():
        raise TypeError(f"hidden: expected float32, float64, bfloat16 or float16 but got {hidden.dtype}")
    if hidden.dim() == 0:
        raise ValueError("hidden: expected shape (..., D) but got a 0-dim tensor")
    if weight.numel() == 0 and weight.shape != (weight.shape[0], 0) and not part:
        raise ValueError(
            f"weight: expected shape (V, {hidden.shape[-1]}) with at least one class but got {tuple(weight.shape)}; "
            "one that FSDP or ZeRO-3 has sharded is only there within the forward pass of its module, or gathered"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight: expected shape (V, {hidden.shape[-1]}) but got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({weight.shape[0]},) but got {tuple(bias.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"{name}: expected {hidden.dtype}, as the hidden states, but got {x.dtype}")
        if x is not None and x.device != hidden.device:
            raise ValueError(
                f"{name}: expected a tensor on {hidden.device}, as the hidden states, but got one on {x.device}"
            )
    for name, number in (("chunk_rows", chunk_rows), ("memory_budget", memory_budget)):
        if number is not None and (type(number) is not int or number < 1):
            raise ValueError(f"{name}: expected a positive int or None but got {describe(number)}")
    proxy = hidden.new_empty(()).expand(*hidden.shape[:-1], weight.shape[0])
    rows = hidden.unsqueeze(0) if hidden.dim() == 1 else hidden.flatten(0, -2)
    if chunk_rows is None:
        chunk_rows = _chunk_rows(rows, weight, memory_budget) if len(weight) else 1
    elif memory_budget is not None:
        raise ValueError("memory_budget: has no meaning beside chunk_rows; give one of them")
    return Layer(rows, weight, bias, min(chunk_rows, _LARGEST), skip_ignored=hidden.is_cpu), proxy


def with_reference(layer: Layer, batch: Batch, reference: Sequence[Tensor]) -> tuple[Layer, Batch]:
    """A reference's last hidden states, weight and perhaps bias, checked, in the place of its logits."""
    parts = ("hidden", "weight", "bias")
    if not isinstance(reference, (tuple, list)) or len(reference) not in (2, 3):
        raise TypeError(
            f"reference: expected logits, or (hidden, weight) or (hidden, weight, bias), but got {describe(reference)}"
        )
    hidden, weight, bias = (*reference, None)[:3]
    for name, x in zip(parts, (hidden, weight, bias), strict=True):
        if x is None and name == "bias":
            continue
        if not isinstance(x, Tensor) or x.dtype not in DTYPES:
            raise TypeError(
                f"reference: {name}: expected a float32, float64, bfloat16 or float16 tensor but got {describe(x)}"
            )
        check_dense(f"reference: {name}", x)
        check_same_device(f"reference: {name}", x, layer.hidden)
    if is_autocast(hidden.device):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = (
            x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in (hidden, weight, bias)
        )
    classes = layer.weight.shape[0]
    if hidden.shape[:-1] != batch.shape or hidden.dim() == 0:
        raise ValueError(
            f"reference: hidden: expected shape ({', '.join(map(str, batch.shape))}, D) but got {tuple(hidden.shape)}"
        )
    if weight.shape != (classes, hidden.shape[-1]):
        raise ValueError(
            f"reference: weight: expected shape ({classes}, {hidden.shape[-1]}) but got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (classes,):
        raise ValueError(f"reference: bias: expected shape ({classes},) but got {tuple(bias.shape)}")
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        raise TypeError(f"reference: expected weight and bias of {hidden.dtype}, as its hidden states")
    batch = batch._replace(reference=hidden.unsqueeze(0) if hidden.dim() == 1 else hidden.flatten(0, -2))
    return layer._replace(reference_weight=weight, reference_bias=bias), batch


_CPU_BUDGET = 256 << 20  # bytes; beyond, a chunk only costs memory


def _chunk_rows(hidden: Tensor, weight: Tensor, memory_budget: int | None) -> int:
    wide = 8 if hidden.dtype == torch.float64 else 4
    on_cpu = hidden.device.type in ("cpu", "meta")
    least = 2 * wide * weight.shape[0]
    return choose_chunk_rows(
        hidden.shape[1], weight.shape[0], logits_bytes=wide,
        gradient_bytes=wide if on_cpu else hidden.element_size(),
        multiprocessors=None if on_cpu else _multiprocessors(hidden.device.index or 0),
        trains_weight=weight.requires_grad,
        memory_budget=max(_CPU_BUDGET, least) if on_cpu and memory_budget is None else memory_budget,
    )  # fmt: skip


def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_multiprocessors._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_mode(mode: str, batch: Batch) -> None:
    reason = _why_not_in_forward(batch)
    if mode == "forward" and reason is not None:
        raise ValueError(f'mode: "forward" cannot serve {reason}: its gradients are only known in the backward pass')


def _why_not_in_forward(batch: Batch) -> str | None:
    """What keeps the gradients from being made with the loss, or None."""
    if batch.reduction == "none":
        return 'reduction="none"'
    if batch.logit_scale is not None and batch.logit_scale.requires_grad and torch.is_grad_enabled():
        return "a logit scale that requires grad"
    return None


def objective(
    run: ops.Backend, layer: Layer, batch: Batch, program: ops.Program, mode: str, with_parts: bool
) -> tuple[Tensor, Tensor | list[Tensor]]:
    """The loss of built-in terms and, if asked for, their parts."""
    if run.family is None:
        return _reference_objective(layer, batch, program, with_parts)
    if batch.validate and not layer.hidden.is_cpu:
        reference.check_labels(batch.target, layer.weight.shape[0], batch.ignore_index)
    _check_derivatives(layer, batch, program.tensor)
    needs = layer.needs
    in_forward = any(needs) and mode != "recompute" and _why_not_in_forward(batch) is None
    terms, tensor = program
    loss, parts, *_ = torch.ops.objkern.linear_objective(
        run.family, layer.hidden, layer.weight, layer.bias, batch.target, batch.logit_scale, batch.class_weight,
        batch.ignore_index, batch.softcap, batch.masked, batch.reference, batch.temperature, layer.reference_weight,
        layer.reference_bias, terms, REDUCTIONS.index(batch.reduction), tensor,
        batch.normalizer, batch.empty_zero, with_parts or tensor is not None, needs, layer.chunk_rows,
        layer.skip_ignored, in_forward,
    )  # fmt: skip
    return loss, parts


def _check_derivatives(layer: Layer, batch: Batch, coefficients: Tensor | None = None) -> None:
    """Derivatives that these ops do not have raise: autograd would take them for zero, or speak of something else."""
    if torch.compiler.is_compiling():
        return
    inputs = (
        layer.hidden, layer.weight, layer.bias, batch.target, batch.logit_scale, coefficients, batch.reference,
        layer.reference_weight, layer.reference_bias,
    )  # fmt: skip
    inputs = [x for x in inputs if x is not None and x.is_floating_point()]
    if any(unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(
            'linear: forward-mode derivatives are not implemented; use reverse mode, or backend="reference"'
        )
    if torch._C._are_functorch_transforms_active() and torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise NotImplementedError(
            "linear: derivatives under torch.func (grad, vjp, jacrev) are not implemented; use torch.autograd, or "
            'backend="reference", or the objective on logits'
        )


def _reference_objective(
    layer: Layer, batch: Batch, program: ops.Program, with_parts: bool
) -> tuple[Tensor, Tensor | list[Tensor]]:
    return ops.REFERENCE.objective(_whole(layer, batch), program, False, with_parts)


def _whole(layer: Layer, batch: Batch) -> Batch:
    """With all logits at once."""
    return batch._replace(
        logits=eager_logits(layer.hidden, layer.weight, layer.bias),
        reference=eager_reference(
            batch.reference, layer.reference_weight, layer.reference_bias, batch.logit_scale, batch.softcap
        ),
    )


def statistics(run: ops.Backend, layer: Layer, batch: Batch) -> tuple[Statistics, Tensor]:
    """The statistics of every row, and whether its label is the first maximum."""
    if run.family is None:
        whole = _whole(layer, batch)
        return run.statistics(whole), reference.is_first_maximum(whole)
    if batch.validate and not layer.hidden.is_cpu:
        reference.check_labels(batch.target, layer.weight.shape[0], batch.ignore_index)
    _check_derivatives(layer, batch)
    found, centred, _ = torch.ops.objkern.linear_statistics(
        run.family, layer.hidden, layer.weight, layer.bias, batch.target, batch.logit_scale, batch.class_weight,
        batch.ignore_index, batch.softcap, batch.masked, batch.reference, batch.temperature, layer.reference_weight,
        layer.reference_bias, layer.chunk_rows, layer.skip_ignored,
    )  # fmt: skip
    return ops.named_statistics(found, batch), centred[_TARGET_IS_MAX] > 0
