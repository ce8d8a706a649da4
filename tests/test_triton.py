"""The Triton backend where there is no GPU: kernels interpreted on the CPU, and compiled for GPUs that are not there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import objkern
from objkern import CrossEntropy
from objkern.triton import why_not

triton = pytest.importorskip("triton")
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # fused multiply-adds, whatever the environment says

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from objkern.triton import compare, elementwise, epilogue, launch, narrow, ops, reduce, wide  # noqa: E402
from objkern.triton.launch import Terms  # noqa: E402

from .compiled import GIVEN, Compiled, compile_kernel  # noqa: E402

ROOT = Path(__file__).parent.parent
CASES = "tests/interpreted/cases.py"

# ---- the kernels, interpreted ---------------------------------------------------------------------------------------


def interpreted(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """pytest with arguments, in a folder with objkern and tests, in a process where triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


HALVES = {
    "rows in registers": [CASES, "-k", "few or narrow"],
    "rows in tiles": [CASES, "tests/interpreted/functions.py", "-k", "not (few or narrow)"],
}


@pytest.fixture(scope="module")
def running() -> Iterator[dict[str, subprocess.Popen[str]]]:
    started = {name: interpreted(ROOT, *arguments) for name, arguments in HALVES.items()}
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.slow
def test_the_interpreted_kernels_agree_with_the_reference(half: str, running: dict[str, subprocess.Popen[str]]) -> None:
    output, _ = running[half].communicate(timeout=900)
    assert running[half].returncode == 0, output[-6000:]
    assert " passed" in output
    assert "skipped" not in output


# name: (file, the line's text, what stands there instead, the case that must notice)
FAULTS = {
    "padding counted as a logit of 0": ("narrow.py", "mask=there & (column < V), other=PAD", "mask=there & (column < V), other=0.0", "test_every_term_at_ragged_sizes[few-9]"),
    "tail one short": ("wide.py", "tl.where(last < V, last, V)", "tl.where(last < V - 1, last, V)", "test_every_term_at_ragged_sizes[wide-33]"),
    "target not left out": ("wide.py", "there = here & (element + head != y)", "there = here", "test_every_term_at_ragged_sizes[wide-67]"),
    "an unfinished tile in two pieces": ("wide.py", "(full >= first) & (full < last)", "full < last", "test_longer_rows_plain_and_regularized[pieces-513]"),
    "labels in 32 bits": ("epilogue.py", "label = tl.load(target + index, mask=there, other=0)", "label = tl.load(target + index, mask=there, other=0).to(tl.int32)", "test_bad_labels_are_nan_in_their_row_alone[few-4294967299]"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.slow
def test_a_planted_fault_is_caught(name: str, tmp_path: Path) -> None:
    """A test that still passes when the kernel is wrong is no test."""
    file, old, new, case = FAULTS[name]
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "objkern", tmp_path / "objkern", ignore=ignored)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for library in (ROOT / "objkern").glob("*.so"):
        (tmp_path / "objkern" / library.name).symlink_to(library)
    path = tmp_path / "objkern" / "triton" / file
    source = path.read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {file}"
    path.write_text(source.replace(old, new))
    process = interpreted(tmp_path, f"{CASES}::{case}")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, f"the tests did not notice: {name}\n{output[-3000:]}"
    assert "1 failed" in output


# ---- the kernels, compiled ------------------------------------------------------------------------------------------

OBJECTIVES = {
    "plain": [0, 0.0, 1.0],
    "regularized": [0, 0.1, 1.0, 1, 0.0, 1e-4, 3, 0.0, -0.01],
    "full": [0, 0.1, 1.0, 2, 0.0, 1.0],
    "beside": [0, 0.1, 1.0, 10, 2.0, 0.5, 11, 2.0, 0.5],  # a reference
}
VECTOR = {"bf16": 8, "fp16": 8, "fp32": 4, "fp64": 2}


def compiled(name: str, objective: str, element: str, arch: int, classes: int = 32001, gradient: str = "") -> Compiled:
    """A kernel as launch.py has it launched for labels, without weights, for an even or odd number of classes."""
    terms = Terms.of(OBJECTIVES[objective], False, False)
    tiles, rows = launch.wide_launch(classes), launch.narrow_launch(classes)
    everything = {
        "A": tl.float64 if element == "fp64" else tl.float32, "TERMS": terms.kinds, "READS": terms.reads,
        "DEPTH": terms.depth, "PARTS": False, "PER_ROW": False, "TRANSFORM": 0, "MASKED": True,
        "SMOOTHED": terms.smoothed, "PLACES": False, "UNSCALED": False, "RESCALE": False, "ALIGNED": True,
        "DENSE": False, "WEIGHTED": False, "MEAN": True, "EMPTY_ZERO": False, "COUNT": len(terms.kinds),
        "TILES": tiles.tiles, "R": tiles.vectors, "E": VECTOR[element], "COLS": rows.columns, "CLASSES": int(classes > launch.FEW),
        "TASK": 1 if name == "few_kernel" else 0, "FIELDS": 4, "BLOCK": launch.COUNT_ROWS if name == "prepare_kernel" else launch.REDUCE_ELEMENTS // 4,
        "ROWS": launch.EPILOGUE_ROWS if name in ("epilogue_kernel", "chain_kernel") else rows.rows,
        "logit_scale": None, "loss": None, "dense": None, "class_weight": None, "coefficient_tensor": None,
        "normalizer": None, "parts": None,
    }  # fmt: skip
    if objective == "beside":
        everything |= {
            "reference": GIVEN,
            "divergence": GIVEN,
            "BESIDE": True,
            "REVERSE": True,
            "BLOCK": launch.COMPARE_CLASSES // (1 + (element == "fp64")),
        }
    kernel = next(
        getattr(room, name) for room in (compare, wide, narrow, reduce, epilogue) if hasattr(room, name)
    )  # fmt: skip
    present = {key: value for key, value in everything.items() if key in kernel.arg_names}
    if name == "reduce_kernel":
        del present["loss"]
    in_tiles = name in ("collect_kernel", "gradient_kernel", "fused_kernel")
    warps = {"prepare_kernel": 8, "reduce_kernel": 8}.get(name, tiles.warps if in_tiles else rows.warps)
    return compile_kernel(kernel, arch, element, warps, present, len(terms.kinds), gradient)


IN_TILES = [
    ("collect_kernel", "plain", "bf16", 90, 32001), ("collect_kernel", "regularized", "fp32", 90, 32001),
    ("gradient_kernel", "plain", "fp32", 90, 1031), ("gradient_kernel", "regularized", "bf16", 90, 32001),
    ("fused_kernel", "plain", "fp32", 90, 32001), ("fused_kernel", "regularized", "bf16", 90, 32001),
    ("fused_kernel", "full", "bf16", 90, 32001), ("gradient_kernel", "full", "fp32", 90, 32001),
    ("fused_kernel", "regularized", "bf16", 80, 32001), ("fused_kernel", "regularized", "bf16", 100, 32001),
    ("collect_kernel", "plain", "fp16", 80, 2047), ("gradient_kernel", "plain", "fp32", 100, 32001),
    ("fused_kernel", "plain", "fp64", 90, 32001),
]  # fmt: skip


@pytest.mark.parametrize(("name", "objective", "element", "arch", "classes"), IN_TILES)
def test_tiles_are_read_and_written_in_128_bits(
    name: str, objective: str, element: str, arch: int, classes: int
) -> None:
    """A mask at an odd V makes every access as narrow as an element; registers that spill go through memory."""
    found = compiled(name, objective, element, arch, classes)
    assert found.spills == 0
    assert found.stack == 0
    assert found.registers <= 128
    assert found.widths("LDG").count(128) >= 2
    width = {"bf16": 16, "fp16": 16, "fp32": 32, "fp64": 64}[element]
    if name == "collect_kernel":  # stores sums alone
        assert element == "fp32" or found.widths("LDG").count(width) <= 2  # z_y and the ends
        return
    assert found.widths("STG").count(128) >= 4
    if width == 16:  # wider ones may be a row's numbers
        assert found.widths("STG").count(16) <= 4  # the ends, of the gradient and of rows without one
        assert found.widths("LDG").count(16) <= 8


@pytest.mark.parametrize(("name", "arch", "gradient"), [
    ("fused_kernel", 90, "bf16"), ("fused_kernel", 80, "fp16"), ("gradient_kernel", 90, "bf16"),
    ("gradient_kernel", 100, "bf16"),
])  # fmt: skip
def test_half_precision_gradients_of_float32_logits(name: str, arch: int, gradient: str) -> None:
    """16 bytes of logits become 8 of their gradient."""
    found = compiled(name, "regularized", "fp32", arch, gradient=gradient)
    assert (found.spills, found.stack) == (0, 0)
    assert found.registers <= 128
    assert found.widths("LDG").count(128) >= 2
    assert found.widths("STG").count(64) >= 4
    assert found.widths("STG").count(16) <= 4


@pytest.mark.parametrize(("element", "arch"), [("bf16", 90), ("fp32", 80), ("fp16", 100), ("fp64", 90)])
@pytest.mark.parametrize("name", ["compare_kernel", "epilogue_kernel", "gradient_kernel", "chain_kernel"])
def test_nothing_spills_beside_a_reference(name: str, element: str, arch: int) -> None:
    found = compiled(name, "beside", element, arch)
    assert (found.spills, found.stack) == (0, 0)


@pytest.mark.parametrize(("element", "arch"), [("bf16", 90), ("fp32", 90), ("fp16", 80), ("bf16", 100), ("fp64", 90)])
@pytest.mark.parametrize("task", ["sums", "sums and gradient", "gradient", "values"])
def test_elements_move_in_128_bits(task: str, element: str, arch: int) -> None:
    """Of every whole block: the mask of the last one makes its accesses as narrow as an element."""
    kinds = (1, 2, 4, 6, 8, 10)  # every term, the first with smoothing
    present = {
        "A": tl.float64 if element == "fp64" else tl.float32, "TASK": {"values": 1, "gradient": 2}.get(task, 0),
        "KINDS": kinds, "PARTS": False, "TRANSFORM": 0, "UNSCALED": False, "LIMITS": True, "ODDS": True,
        "RESCALE": False, "ALIGNED": True, "BLOCK": launch.ELEMENTS, "weight": None, "pos_weight": None,
        "logit_scale": None, "upstream": None,
    }  # fmt: skip
    if task != "values":
        present["loss"] = None
    if "gradient" not in task:
        present["gradient"] = None
    found = compile_kernel(elementwise.element_kernel, arch, element, 4, present, len(kinds))
    assert (found.spills, found.stack) == (0, 0)
    assert found.registers <= (224 if element == "fp64" else 128)
    assert found.widths("LDG").count(128) >= 2  # prediction and target
    if "gradient" in task:
        assert found.widths("STG").count(128) >= 1


@pytest.mark.parametrize(
    ("name", "objective", "element", "arch", "classes"),
    [
        ("few_kernel", "regularized", "bf16", 90, 9), ("few_kernel", "regularized", "fp32", 80, 10),
        ("narrow_collect_kernel", "regularized", "fp32", 90, 100), ("narrow_collect_kernel", "full", "bf16", 100, 1000),
        ("narrow_gradient_kernel", "plain", "fp32", 90, 1000), ("narrow_gradient_kernel", "regularized", "bf16", 90, 9),
        ("epilogue_kernel", "regularized", "bf16", 90, 32001), ("epilogue_kernel", "full", "fp64", 90, 32001),
        ("chain_kernel", "full", "fp32", 90, 32001), ("prepare_kernel", "regularized", "fp32", 90, 32001),
        ("reduce_kernel", "regularized", "fp32", 90, 32001),
    ],
)  # fmt: skip
def test_nothing_spills(name: str, objective: str, element: str, arch: int, classes: int) -> None:
    found = compiled(name, objective, element, arch, classes)
    assert found.spills == 0
    assert found.stack == 0
    assert found.registers <= 255


@triton.jit
def masked_copy(x, gradient, V: tl.int32, BLOCK: tl.constexpr):
    """What objkern's kernels do not do: rows read and written under a mask alone."""
    place = tl.arange(0, BLOCK)
    mask = place < V
    start = tl.program_id(0).to(tl.int64) * V
    tl.store(gradient + start + place, tl.load(x + start + place, mask=mask), mask=mask)


def test_the_check_of_widths_can_fail() -> None:
    found = compile_kernel(masked_copy, 90, "bf16", 4, {"BLOCK": 4096})
    assert set(found.widths("LDG")) == set(found.widths("STG")) == {16}


# ---- launches -------------------------------------------------------------------------------------------------------


def test_terms_read_what_the_native_ones_do() -> None:
    """The bits of `reads_of` in csrc/objective.h, as far as the fields that a row keeps tell them."""
    from objkern import _C

    for kind in range(10):
        for parameter in (0.0, 0.3):
            for dense in (False, True):
                terms = Terms.of([kind, parameter, 1.0], False, dense)
                rest = dense or terms.reads & (16 | 32 | 128)
                depth = 3 if rest else 2 if terms.reads & 64 else 1 if terms.reads & (8 | 512) else 0
                assert depth == terms.depth
                assert _C.row_gradient_fields([kind, parameter, 1.0], False, dense) == terms.fields


class Recorder:
    """In the place of a kernel: what Triton would compile it for on an H100, from the arguments of its launches."""

    def __init__(self, kernel: Any) -> None:
        backend = CUDABackend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        self.compiled: set[str] = set()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(0 < size < 2**31 for size in grid)

        def run(*arguments: Any, **options: Any) -> None:
            assert options["num_warps"] in (4, 8)
            self.compiled.add(str(self.bind(*arguments, **options)[1:]))

        return run


@pytest.mark.parametrize("classes", [9, 100, 4001])
def test_a_changed_number_compiles_nothing_anew(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule of a coefficient, or a last batch of another size, must not wait for a compiler. 1 and multiples of
    16 are what Triton likes to compile for.
    """
    recorders = {name: Recorder(kernel) for name, kernel in vars(ops).items() if name.endswith("_kernel")}
    for name, recorder in recorders.items():
        monkeypatch.setattr(ops, name, recorder)
    for rows in (600, 16 * 37, 1000):
        z, y = torch.zeros(rows, classes), torch.zeros(rows, dtype=torch.int64)
        for number in (1.0, 16.0, 0.1, 5e-324, -0.0 if rows == 1000 else 2.5):
            options = {"softcap": abs(number) or 1.0, "ignore_index": int(number)}
            arguments = ([0.0, 0.1 + abs(number), number, 1.0, 0.0, number], 1, z, y)
            _, _, row_gradient, gradient = ops.fused(*arguments, **options)
            ops.objective(*arguments, **options)
            ops.gradient(torch.ones(()), row_gradient, False, *arguments, **options)
            ops.rescale(gradient, torch.ones(()), row_gradient, *arguments, **options)
            statistics, centred = ops.statistics(z, y, **options)
            ops.statistics_gradient(statistics, centred, False, z, y, **options)
    found = {name: len(recorder.compiled) for name, recorder in recorders.items() if recorder.compiled}
    assert found.pop("few_kernel", 3) == 3  # objective, fused and statistics
    assert found.pop("epilogue_kernel", 2) == 2  # objective and statistics
    assert {found.pop(name, 3) for name in ("gradient_kernel", "narrow_gradient_kernel")} == {3}  # rescaled; full depth
    assert {found.pop(name, 2) for name in ("collect_kernel", "narrow_collect_kernel")} == {2}  # full depth
    assert set(found.values()) == {1}, found


def test_a_changed_number_compiles_no_comparison_and_no_elements_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    recorders = {name: Recorder(kernel) for name, kernel in vars(ops).items() if name.endswith("_kernel")}
    for name, recorder in recorders.items():
        monkeypatch.setattr(ops, name, recorder)
    for rows, number in ((600, 1.0), (16 * 37, 16.0), (1000, 0.1)):
        z, y = torch.zeros(rows, 9), torch.zeros(rows, dtype=torch.int64)
        ops.statistics(z, y, reference=z, temperature=number)
        ops.elementwise_fused([0.0, number, number, 2.0, 0.0, number], 1, z, z, softcap=number)
    found = {name: len(recorder.compiled) for name, recorder in recorders.items() if recorder.compiled}
    kernels = (
        "compare_kernel",
        "collect_kernel",
        "epilogue_kernel",
        "prepare_kernel",
        "element_kernel",
        "reduce_kernel",
    )
    assert found == dict.fromkeys(kernels, 1)


@pytest.mark.parametrize("rows", [1, 7, 500, 8192])
def test_the_table_of_launches_covers_every_size(rows: int) -> None:
    for classes in (1, 2, 32, 33, 64, 65, 1000, 1024, 1025, 8191, 8192, 262144):
        narrow_ = launch.narrow_launch(classes)
        assert classes <= narrow_.columns < 2 * classes
        if classes <= launch.FEW:
            assert narrow_.rows == launch.FEW_ROWS
        elif classes <= launch.NARROW:
            assert 1 <= narrow_.rows <= launch.MOST_NARROW_ROWS
            assert narrow_.rows * narrow_.columns <= launch.NARROW_ELEMENTS
        pieces = launch.pieces_of(rows, classes, 8)
        assert 1 <= pieces <= launch.MOST_PIECES
        assert pieces == 1 or pieces * rows <= launch.PROGRAMS


def test_sizes_are_powers_of_two() -> None:
    """tl.arange knows no others, and a program no other numbers of warps."""
    names = (
        "FEW_ROWS",
        "MOST_NARROW_ROWS",
        "EPILOGUE_ROWS",
        "COMPARE_CLASSES",
        "COUNT_ROWS",
        "ELEMENTS",
        "REDUCE_ELEMENTS",
    )
    sizes = {name: getattr(launch, name) for name in names}
    for classes in (1, 2, 3, 32, 33, 64, 65, 513, 1024, 1025, 8192):
        narrow_, wide_ = launch.narrow_launch(classes), launch.wide_launch(classes)
        sizes |= {"rows": narrow_.rows, "warps": narrow_.warps, "vectors": wide_.vectors, "warps of tiles": wide_.warps}
        assert [name for name, size in sizes.items() if size & (size - 1)] == []


def test_rows_are_split_as_long_as_processors_are_idle() -> None:
    found = [
        launch.pieces_of(rows, classes, 8) for rows, classes in ((1, 262144), (1, 8193), (100, 262144), (500, 262144))
    ]
    assert found == [launch.MOST_PIECES, 3, launch.PROGRAMS // 100, 1]


def test_numbers_of_the_host_travel_with_launches() -> None:
    """A kernel cannot read the host's memory, and nothing waits for a number of the device."""
    x, scale = torch.empty(2, 5, device="meta"), torch.tensor(0.75)
    rows = launch.Rows(x, logit_scale=scale)
    assert (rows.logit_scale, rows.transform, rows.transform_numbers) == (None, 1, launch.words(0.75, 0.0))
    assert (launch.Rows(x).transform, launch.Rows(x).transform_numbers) == (0, launch.words(1.0, 0.0))
    assert launch.Rows(x, logit_scale=scale, softcap=2.0).transform == 2
    there = scale.to("meta")
    assert launch.Rows(x, logit_scale=there).logit_scale is there
    assert rows.on_device("normalizer", None) is None
    assert rows.on_device("normalizer", there) is there
    moved = rows.on_device("normalizer", torch.tensor([[0.5, 2.0]]))
    assert (moved.device.type, moved.shape) == ("meta", (1, 2))


def test_classes_are_counted_in_32_bits() -> None:
    most = 2**31 - 2**16
    assert launch.Rows(torch.empty(1, most - 1, device="meta")).classes == most - 1
    with pytest.raises(ValueError, match="counts classes in 32 bits"):
        launch.Rows(torch.empty(1, most, device="meta"))


def test_rows_with_a_stride_are_not_copied() -> None:
    wide_ = torch.zeros(3, 9)
    assert launch.with_unit_class_stride(wide_[:, :5]).data_ptr() == wide_.data_ptr()
    assert launch.with_unit_class_stride(wide_[:, ::2]).is_contiguous()


# ---- asked for by name ----------------------------------------------------------------------------------------------


def test_what_cannot_run_says_why() -> None:
    z, y = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r'backend: "triton" cannot run on cpu: Triton compiles for GPUs'):
        CrossEntropy()(z, y, backend="triton")
    with pytest.raises(ValueError, match=r'"triton" cannot run on meta: there is no Triton for meta devices'):
        CrossEntropy()(z.to("meta"), y.to("meta"), backend="triton")
    code = (
        "import sys; sys.modules['triton'] = None; import torch, objkern\n"
        "try: objkern.ZLoss()(torch.zeros(1, 2), backend='triton')\n"
        "except ValueError as error: print(error)\n"
        "from objkern.__main__ import info; print(info())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "cannot run on cpu: triton is not installed" in done.stdout, done.stderr
    assert "triton backend     cannot run: triton is not installed" in done.stdout


def test_a_broken_triton_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.language", None)
    assert "triton cannot be imported" in objkern.triton._missing.__wrapped__()


def test_the_summary_names_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert objkern.triton.summary().endswith("no GPU that torch sees")
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    assert objkern.triton.summary().startswith("runs on xpu, with triton")
    monkeypatch.setattr(objkern.triton, "interpreted", lambda: True)
    assert objkern.triton.summary().startswith("runs on xpu, cpu (interpreted), with triton")


def test_shapes_are_known_without_a_device() -> None:
    """torch.compile and fake tensors meet the ops before any kernel runs."""
    assert why_not("cuda") is None
    with FakeTensorMode():
        z = torch.zeros(4, 6, device="cuda")
        y = torch.zeros(4, dtype=torch.int64, device="cuda")
        loss, parts = CrossEntropy()(z, y, backend="triton", return_parts=True)
        assert loss.shape == parts["lse"].shape == ()
        assert objkern.row_statistics(z, y, backend="triton").lse.shape == (4,)
        assert torch.ops.objkern_triton.fused([0.0, 0.0, 1.0], 1, z, y)[3].shape == (4, 6)


def test_importing_objkern_does_not_import_triton() -> None:
    code = "import sys, torch; before = 'triton' in sys.modules; import objkern; print(before, 'triton' in sys.modules)"
    done: Any = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    before, after = done.stdout.split()
    assert before == after
