"""The ops of csrc/bindings.cpp on Triton kernels: memory, and which kernels run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import launch
from .compare import compare_kernel
from .elementwise import element_kernel
from .epilogue import chain_kernel
from .launch import Elements, Rows, Terms
from .narrow import few_kernel, narrow_collect_kernel, narrow_gradient_kernel
from .reduce import prepare_kernel, reduce_kernel
from .wide import collect_kernel, epilogue_kernel, fused_kernel, gradient_kernel

_FREE = 3  # lse, accuracy, target probability
_NONE, _MEAN = 0, 1  # reductions, in the order of objkern.batch.REDUCTIONS
_OBJECTIVE, _FUSED, _STATISTICS = 0, 1, 2  # tasks
_LOGPROBS = 3  # reads of a target
_REVERSE_KL = 2048
_STATISTIC_FIELDS, _CENTRED, _DIVERGENCE, _ROW_GRADIENT = 12, 21, 7, 15  # fields, as in csrc


class Call:
    """The arguments of an objective, and what its kernels share."""

    def __init__(
        self, terms: list[float], reduction: int, logits: Tensor, target: Tensor | None = None,
        logit_scale: Tensor | None = None, class_weight: Tensor | None = None, ignore_index: int = -100,
        softcap: float = 0.0, masked: bool = True, reference: Tensor | None = None, temperature: float = 1.0,
        coefficient_tensor: Tensor | None = None, normalizer: Tensor | None = None, empty_zero: bool = False,
        with_parts: bool = False,
    ) -> None:  # fmt: skip
        dense = target is not None and target.dtype != torch.int64
        self.terms = Terms.of(terms, class_weight is not None, dense)
        if not self.terms.reads & launch.DIVERGENCES:
            reference = None
        elif reference is None:
            raise ValueError("reference: KLDivergence needs one but got None")
        self.rows = Rows(
            logits, target, logit_scale, class_weight, ignore_index, softcap, masked, reference, temperature
        )
        if target is None and self.terms.reads & _LOGPROBS:
            raise ValueError("objkern: target: a term needs one but got None")
        self.per_row, self.mean = reduction == _NONE, reduction == _MEAN
        self.coefficient_tensor, self.normalizer = coefficient_tensor, normalizer
        self.empty_zero, self.with_parts = empty_zero, with_parts

    def scales(self) -> Tensor:
        """See `prepare_kernel`."""
        rows, count = self.rows, len(self.terms.kinds)
        scales = rows.empty(3 * count + 1, dtype=torch.float64)
        counting = not self.per_row and (self.mean or self.with_parts)
        tensor = rows.on_device("coefficient_tensor", self.coefficient_tensor)
        prepare_kernel[(1,)](
            rows.labels if counting else None, rows.class_weight, None if tensor is None else tensor.contiguous(),
            rows.on_device("normalizer", self.normalizer), self.terms.numbers, scales, rows.rows, rows.ignore_index,
            rows.classes, TERMS=self.terms.kinds, MEAN=self.mean, EMPTY_ZERO=self.empty_zero, BLOCK=launch.COUNT_ROWS,
            num_warps=8,
        )  # fmt: skip
        return scales

    def constants(self) -> dict[str, Any]:
        return {
            "TERMS": self.terms.kinds, "READS": self.terms.reads, "DEPTH": self.terms.depth, "PARTS": self.with_parts,
        }  # fmt: skip


def _programs(rows: int, block: int) -> int:
    return max(1, -(-rows // block))


def _run_objective(call: Call, with_gradient: bool, given: Tensor | None = None) -> tuple[Tensor, ...]:
    """(loss, parts, row_gradient), and the gradient if it has no place yet."""
    rows, terms = call.rows, call.terms
    with rows.on_its_device():
        scales = call.scales()
        count = len(terms.kinds)
        row_gradient = rows.empty(terms.fields, rows.rows)
        gradient = _gradient_of(rows, given) if with_gradient else None
        pieces = 1 if rows.narrow else launch.pieces_of(rows.rows, rows.classes, rows.vector)
        one_pass = with_gradient and pieces == 1 and not rows.narrow and rows.reference is None
        block = launch.FEW_ROWS if rows.few else 1 if one_pass else launch.EPILOGUE_ROWS
        programs = _programs(rows.rows, block)
        fields = count + (_FREE if call.with_parts else 0)
        loss = rows.empty(rows.rows) if call.per_row else None
        if call.per_row:
            values = rows.empty(fields if call.with_parts else 0, rows.rows)
        else:
            values = rows.empty(fields, programs, dtype=torch.float64)
        if rows.rows == 0:
            values.zero_()
        elif rows.few:
            table = launch.narrow_launch(rows.classes)
            few_kernel[(programs,)](
                **rows.sizes(), dense=rows.dense, dense_stride=rows.dense_stride, class_stride=1, scales=scales,
                values=values, loss=loss, row_gradient=row_gradient, gradient=gradient,
                TASK=_FUSED if with_gradient else _OBJECTIVE, **call.constants(), SMOOTHED=terms.smoothed,
                PER_ROW=call.per_row, ROWS=table.rows, COLS=table.columns, num_warps=table.warps,
            )  # fmt: skip
        elif one_pass:
            table = launch.wide_launch(rows.classes)
            fused_kernel[(rows.rows,)](
                **rows.sizes(), dense=rows.dense, dense_stride=rows.dense_stride, scales=scales, values=values,
                row_gradient=row_gradient, gradient=gradient, **call.constants(), SMOOTHED=terms.smoothed,
                ALIGNED=rows.aligned_with(gradient), R=table.vectors, E=rows.vector, num_warps=table.warps,
            )  # fmt: skip
        else:
            found = _collect(rows, pieces, terms.depth, terms.smoothed, call.with_parts or bool(terms.reads & 16))
            epilogue_kernel[(programs,)](
                **rows.sizes(), pieces=found, divergence=_compare(rows, terms.reads), scales=scales, values=values,
                loss=loss, row_gradient=row_gradient, count=pieces, TASK=_OBJECTIVE, **call.constants(),
                DENSE=rows.dense is not None, PER_ROW=call.per_row, ROWS=block, num_warps=4,
            )  # fmt: skip
            if gradient is not None:
                one = torch.ones((), dtype=rows.dtype, device=rows.device)
                _write_gradient(rows, terms.depth, row_gradient, one, gradient)
        if call.per_row:
            return loss, values, row_gradient
        loss = rows.empty()
        parts = rows.empty(fields + 1 if call.with_parts else 0)
        width = max(1, 1 << (fields - 1).bit_length())
        reduce_kernel[(1,)](
            values, scales, loss, parts, programs, COUNT=count, PARTS=call.with_parts, FREE=_FREE, FIELDS=width,
            BLOCK=max(1, launch.REDUCE_ELEMENTS // width), num_warps=8,
        )  # fmt: skip
        found = (loss, parts, row_gradient)
        return (*found, gradient) if with_gradient and given is None else found


def _compare(rows: Rows, reads: int) -> Tensor | None:
    """(7, rows) what a comparison with the reference finds, as far as it is read; see `Divergence` in objective.py."""
    if rows.reference is None:
        return None
    found = rows.empty(_DIVERGENCE, rows.rows)
    sizes = {name: value for name, value in rows.sizes().items() if name not in ("class_weight", "MASKED")}
    compare_kernel[(rows.rows,)](
        **sizes, reference=rows.reference, reference_stride=rows.reference_stride, temperature=rows.temperature,
        found=found, REVERSE=bool(reads & _REVERSE_KL), BLOCK=launch.COMPARE_CLASSES // (rows.dtype.itemsize // 4),
        num_warps=8,
    )  # fmt: skip
    return found


def _collect(rows: Rows, pieces: int, depth: int, smoothed: bool, places: bool) -> Tensor:
    """(fields, pieces, rows) of the sums over the others; see `Piece` in objective.py."""
    found = rows.empty((3, 6, 7, 12)[depth], pieces, rows.rows)
    if rows.narrow:
        table = launch.narrow_launch(rows.classes)
        narrow_collect_kernel[(_programs(rows.rows, table.rows),)](
            **rows.sizes(), dense=rows.dense, dense_stride=rows.dense_stride, pieces=found, DEPTH=depth,
            SMOOTHED=smoothed, ROWS=table.rows, COLS=table.columns, num_warps=table.warps,
        )  # fmt: skip
        return found
    table = launch.wide_launch(rows.classes)
    collect_kernel[(rows.rows, pieces)](
        **rows.sizes(), dense=rows.dense, dense_stride=rows.dense_stride, pieces=found, DEPTH=depth,
        SMOOTHED=smoothed, PLACES=places, R=table.vectors, E=rows.vector, num_warps=table.warps,
    )  # fmt: skip
    return found


def _write_gradient(
    rows: Rows, depth: int, row_gradient: Tensor, upstream: Tensor, gradient: Tensor, unscaled: bool = False,
    rescale: bool = False,
) -> None:  # fmt: skip
    if rows.rows == 0:
        return
    if not (upstream.dim() == 0 or upstream.shape == (rows.rows,)):
        raise RuntimeError(f"objkern: upstream: expected () or ({rows.rows}) but got {tuple(upstream.shape)}")
    shared = {
        **rows.sizes(), "dense": rows.dense, "dense_stride": rows.dense_stride, "row_gradient": row_gradient,
        "upstream": rows.on_device("upstream", upstream),
        "upstream_stride": upstream.stride(0) if upstream.dim() else 0, "gradient": gradient, "DEPTH": depth,
        "UNSCALED": unscaled, "RESCALE": rescale,
    }  # fmt: skip
    if rows.narrow:
        table = launch.narrow_launch(rows.classes)
        narrow_gradient_kernel[(_programs(rows.rows, table.rows),)](
            **shared, class_stride=1, CLASSES=0 if rows.few else 1, ROWS=table.rows, COLS=table.columns,
            num_warps=table.warps,
        )  # fmt: skip
    else:
        table = launch.wide_launch(rows.classes)
        chunk = table.vectors * rows.vector * table.tiles
        gradient_kernel[(rows.rows, -(-rows.classes // chunk))](
            **shared, reference=rows.reference, reference_stride=rows.reference_stride, temperature=rows.temperature,
            ALIGNED=rows.aligned_with(gradient), TILES=table.tiles, R=table.vectors, E=rows.vector,
            num_warps=table.warps,
        )  # fmt: skip


def _gradient_of(rows: Rows, given: Tensor | None, may_be_half: bool = True) -> Tensor:
    """The one that was given, or a new one."""
    if given is None:
        return rows.empty(rows.rows, rows.classes, dtype=rows.logits.dtype)
    half = may_be_half and rows.logits.dtype == torch.float32 and given.dtype in (torch.bfloat16, torch.float16)
    if not (given.is_contiguous() and given.shape == rows.logits.shape and (half or given.dtype == rows.logits.dtype)):
        raise RuntimeError("objkern: gradient does not belong to these logits")
    return given


def _check_row_gradient(rows: Rows, terms: Terms, row_gradient: Tensor) -> None:
    if not (
        row_gradient.is_contiguous()
        and row_gradient.shape == (terms.fields, rows.rows)
        and row_gradient.dtype == rows.dtype
    ):
        raise RuntimeError("objkern: row_gradient does not belong to these logits")


def objective(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    return _run_objective(Call(*arguments, **options), False)


def fused(*arguments: Any, gradient: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments, **options)
    if call.per_row:
        raise ValueError("objkern: fused: the gradient of unreduced losses is only known in the backward pass")
    return _run_objective(call, True, gradient)


def gradient(
    upstream: Tensor, row_gradient: Tensor, unscaled: bool, *arguments: Any, gradient: Tensor | None = None,
    **options: Any,
) -> Tensor | None:  # fmt: skip
    call = Call(*arguments, **options)
    rows = call.rows
    _check_row_gradient(rows, call.terms, row_gradient)
    with rows.on_its_device():
        out = _gradient_of(rows, gradient)
        _write_gradient(rows, call.terms.depth, row_gradient, upstream, out, unscaled)
    return out if gradient is None else None


def rescale(gradient: Tensor, upstream: Tensor, row_gradient: Tensor, *arguments: Any, **options: Any) -> None:
    """From logits and row gradient again, where the upstream gradient is not 1; the device alone knows."""
    call = Call(*arguments, **options)
    rows = call.rows
    _check_row_gradient(rows, call.terms, row_gradient)
    _gradient_of(rows, gradient, may_be_half=False)
    with rows.on_its_device():
        _write_gradient(rows, call.terms.depth, row_gradient, upstream, gradient, rescale=True)


def statistics(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    rows = Rows(*arguments, **options)
    with rows.on_its_device():
        out = rows.empty(_STATISTIC_FIELDS, rows.rows, dtype=torch.float64)
        centred = rows.empty(_CENTRED, rows.rows, dtype=torch.float64)
        if rows.rows == 0:
            return out, centred
        shared = {
            **rows.sizes(), "scales": None, "values": out, "loss": centred, "row_gradient": None,
            "TASK": _STATISTICS, "TERMS": (), "READS": 1023, "DEPTH": 3, "PARTS": False, "PER_ROW": False,
        }  # fmt: skip
        if rows.few:
            table = launch.narrow_launch(rows.classes)
            few_kernel[(_programs(rows.rows, table.rows),)](
                **shared, dense=rows.dense, dense_stride=rows.dense_stride, class_stride=1, gradient=None,
                SMOOTHED=False, ROWS=table.rows, COLS=table.columns, num_warps=table.warps,
            )  # fmt: skip
        else:
            pieces = 1 if rows.narrow else launch.pieces_of(rows.rows, rows.classes, rows.vector)
            found = _collect(rows, pieces, 3, False, True)
            epilogue_kernel[(_programs(rows.rows, launch.EPILOGUE_ROWS),)](
                **shared, pieces=found, divergence=_compare(rows, launch.DIVERGENCES), count=pieces,
                DENSE=rows.dense is not None, ROWS=launch.EPILOGUE_ROWS, num_warps=4,
            )  # fmt: skip
    return out, centred


def statistics_gradient(
    partials: Tensor, centred: Tensor, unscaled: bool, *arguments: Any, gradient: Tensor | None = None, **options: Any
) -> Tensor | None:
    rows = Rows(*arguments, **options)
    if not (centred.is_contiguous() and centred.shape == (_CENTRED, rows.rows) and centred.dtype == torch.float64):
        raise RuntimeError("objkern: centred sums do not belong to these logits")
    if partials.shape != (_STATISTIC_FIELDS, rows.rows):
        raise RuntimeError(
            f"objkern: partials: expected ({_STATISTIC_FIELDS}, {rows.rows}) but got {tuple(partials.shape)}"
        )
    with rows.on_its_device():
        out = _gradient_of(rows, gradient)
        row_gradient = rows.empty(_ROW_GRADIENT, rows.rows)
        if rows.rows:
            chain_kernel[(_programs(rows.rows, launch.EPILOGUE_ROWS),)](
                row_gradient, centred, partials.to(torch.float64).contiguous(), rows.labels, rows.rows,
                rows.ignore_index, rows.classes, A=rows.type, DENSE=rows.dense is not None,
                WEIGHTED=rows.class_weight is not None, BESIDE=rows.reference is not None,
                ROWS=launch.EPILOGUE_ROWS, num_warps=4,
            )  # fmt: skip
            one = torch.ones((), dtype=rows.dtype, device=rows.device)
            _write_gradient(rows, 3, row_gradient, one, out, unscaled)
    return out if gradient is None else None


# ---- elementwise objectives -----------------------------------------------------------------------------------------


class ElementCall:
    """The arguments of an elementwise objective."""

    def __init__(
        self, terms: list[float], reduction: int, input: Tensor, target: Tensor | None = None,
        logit_scale: Tensor | None = None, weight: Tensor | None = None, pos_weight: Tensor | None = None,
        softcap: float = 0.0, limits: bool = True, coefficient_tensor: Tensor | None = None,
        normalizer: Tensor | None = None, empty_zero: bool = False, with_parts: bool = False,
    ) -> None:  # fmt: skip
        self.elements = Elements(input, target, logit_scale, weight, pos_weight, softcap, limits)
        self.kinds = launch.element_kinds(terms)
        if target is None and any(kind // 2 not in (1, 5) for kind in self.kinds):
            raise ValueError("objkern: target: a term needs one but got None")
        self.per_element, self.mean = reduction == _NONE, reduction == _MEAN
        self.coefficient_tensor, self.normalizer = coefficient_tensor, normalizer
        self.numbers = launch.words(*(x for k in range(len(self.kinds)) for x in terms[3 * k + 1 : 3 * k + 3]))
        self.empty_zero, self.with_parts = empty_zero, with_parts

    def scales(self) -> Tensor:
        e, count = self.elements, len(self.kinds)
        scales = e.empty(3 * count + 1, dtype=torch.float64)
        tensor = e.on_device("coefficient_tensor", self.coefficient_tensor)
        prepare_kernel[(1,)](
            None, None, None if tensor is None else tensor.contiguous(), e.on_device("normalizer", self.normalizer),
            self.numbers, scales, e.count, 0, 1, TERMS=self.kinds, MEAN=self.mean, EMPTY_ZERO=self.empty_zero,
            BLOCK=launch.COUNT_ROWS, num_warps=8,
        )  # fmt: skip
        return scales

    def run(
        self, task: int, *, values: Tensor | None = None, loss: Tensor | None = None, gradient: Tensor | None = None,
        upstream: Tensor | None = None, unscaled: bool = False, rescale: bool = False, scales: Tensor | None = None,
    ) -> None:  # fmt: skip
        e = self.elements
        programs = _programs(e.count, launch.ELEMENTS)
        stride = 0
        if upstream is not None:
            if not (upstream.dim() == 0 or upstream.shape == e.input.shape):
                raise RuntimeError(
                    f"objkern: upstream: expected () or {tuple(e.input.shape)} but got {tuple(upstream.shape)}"
                )
            upstream = e.on_device("upstream", upstream).to(e.dtype).contiguous()
            stride = 0 if upstream.dim() == 0 and not self.per_element else 1
        element_kernel[(programs,)](
            **e.sizes(), scales=self.scales() if scales is None else scales, values=values, loss=loss,
            gradient=gradient, upstream=upstream, upstream_stride=stride, programs=programs, TASK=task,
            KINDS=self.kinds, PARTS=self.with_parts, UNSCALED=unscaled, ODDS=any(kind // 2 <= 1 for kind in self.kinds),
            RESCALE=rescale, ALIGNED=all(x is None or x.data_ptr() % 16 == 0 for x in (e.input, e.target, gradient)),
            BLOCK=launch.ELEMENTS, num_warps=4,
        )  # fmt: skip


_SUMS, _VALUES, _GRADIENT = 0, 1, 2  # tasks of the kernel over elements


def _run_elementwise(call: ElementCall, with_gradient: bool) -> tuple[Tensor, ...]:
    e, count = call.elements, len(call.kinds)
    with e.on_its_device():
        parts = count if call.with_parts else 0
        if call.per_element:
            loss, values = e.empty(*e.input.shape), e.empty(parts, *e.input.shape)
            if e.count:
                call.run(_VALUES, values=values, loss=loss)
            return loss, values
        gradient = torch.empty_like(e.input) if with_gradient else None
        scales, programs = call.scales(), _programs(e.count, launch.ELEMENTS)
        values = e.empty(count, programs, dtype=torch.float64)
        call.run(_SUMS, values=values, gradient=gradient, scales=scales)
        loss, found = e.empty(), e.empty(parts + 1 if parts else 0)
        width = max(1, 1 << (count - 1).bit_length())
        reduce_kernel[(1,)](
            values, scales, loss, found, programs, COUNT=count, PARTS=call.with_parts, FREE=0, FIELDS=width,
            BLOCK=max(1, launch.REDUCE_ELEMENTS // width), num_warps=8,
        )  # fmt: skip
        results = (loss, found[:parts].clone())
        return (*results, gradient) if with_gradient else results


def elementwise(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    return _run_elementwise(ElementCall(*arguments, **options), False)


def elementwise_fused(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
    call = ElementCall(*arguments, **options)
    if call.per_element:
        raise ValueError(
            "objkern: elementwise_fused: the gradient of unreduced losses is only known in the backward pass"
        )
    return _run_elementwise(call, True)


def elementwise_gradient(upstream: Tensor, unscaled: bool, *arguments: Any, **options: Any) -> Tensor:
    call = ElementCall(*arguments, **options)
    with call.elements.on_its_device():
        gradient = torch.empty_like(call.elements.input)
        if call.elements.count:
            call.run(_GRADIENT, gradient=gradient, upstream=upstream, unscaled=unscaled)
    return gradient


def elementwise_rescale(gradient: Tensor, upstream: Tensor, *arguments: Any, **options: Any) -> None:
    """Computed anew where the upstream gradient is not 1; the device alone knows."""
    call = ElementCall(*arguments, **options)
    e = call.elements
    if not (gradient.is_contiguous() and gradient.shape == e.input.shape and gradient.dtype == e.input.dtype):
        raise RuntimeError("objkern: gradient does not belong to this input")
    with e.on_its_device():
        if e.count:
            call.run(_GRADIENT, gradient=gradient, upstream=upstream, rescale=True)


_OPS = {
    "objective": objective, "fused": fused, "fused.into": fused, "gradient": gradient, "gradient.into": gradient,
    "rescale": rescale, "statistics": statistics, "statistics_gradient": statistics_gradient,
    "statistics_gradient.into": statistics_gradient, "elementwise": elementwise, "elementwise_fused": elementwise_fused,
    "elementwise_gradient": elementwise_gradient, "elementwise_rescale": elementwise_rescale,
}  # fmt: skip
_library = torch.library.Library("objkern_triton", "IMPL")


def register(*devices: str) -> None:
    """Implements the ops of `objkern_triton` for devices."""
    for device in devices:
        for name, function in _OPS.items():
            _library.impl(name, function, device.upper())
