"""The CUDA kernels without a GPU; tests/emulation says how, and what that proves.

Run by `make emulate`, not with the other tests. The builds and the runs take two processors for a few minutes, so that all are started together; each test waits for
its own. A test that passes although a kernel is wrong is no test: faults are planted in the kernels, one at a time.
"""

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from . import build

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fibers and sanitizers as Linux has them")

CASES = "tests/emulation/cases.py"
EXISTING = [f"tests/test_{name}.py" for name in ("kernels", "pitfalls", "precision", "corners")]

# Tests of the CPU's kernels, or of what a GPU does otherwise, and why.
NOT_OF_A_GPU = {
    "test_rows_that_begin_between_boundaries": "the order of a row's sum depends on where it begins modulo 16 bytes",
    "test_narrow_rows_of_every_width": "the same; test_every_size_under_every_plan has these sizes",
    "test_any_strides": "the same; test_rows_that_begin_anywhere has these strides",
    "test_a_gradient_larger_than_the_caches": "the same, and the CPU's caches",
    "test_bad_labels_name_row_and_label": "they give NaN; test_a_bad_label_is_a_row_of_nan",
    "test_many_labels_are_counted_and_checked": "the same; test_many_rows counts them",
    "test_offsets_beyond_two_to_the_31": "4 GB, written thread by thread; test_rows_farther_apart_than_32_bits_can_tell",
}

# The runs that must pass: name -> (pytest's arguments, whether under the sanitizers).
PART = "every_size or anywhere or options"
RUNS: dict[str, tuple[list[str], bool]] = {
    "sizes": ([CASES, "-k", PART], False),
    "schedules, masks, labels": ([CASES, "-k", f"not ({PART})"], False),
    "the tests of the CPU kernels": (
        [*EXISTING, "-k", f"not ({' or '.join(f'({test})' for test in NOT_OF_A_GPU)})"],
        False,
    ),
    "sanitized": (
        [CASES, "-k", "(anywhere and (float16 or float64) and not cluster4) or bad_label or no_rows or many_rows"],
        True,
    ),
}

# Of the cases, what runs in every build with a fault until one fails.
NOTICING = "(depth or runs_first or anywhere or rises or ignored or bad_label or turns or farther) and not float64 and not torch.float16"

ROWS = "cuda/row_kernels.h"
FLOAT32, BFLOAT16 = "rows_float32.cu", "rows_bfloat16.cu"

# name: (source that is compiled anew, [(file, text, what stands there instead), ...])
FAULTS: dict[str, tuple[str, list[tuple[str, str, str]]]] = {
    "sums of warps read before all are there": (
        FLOAT32, [(ROWS, "shared.of_warp[thread / kWarp] = of_warp;\n    block_sync();", "shared.of_warp[thread / kWarp] = of_warp;")],
    ),
    "sums of blocks read before all are there": (
        FLOAT32, [(ROWS, "      cluster_arrive();\n      cluster_wait();\n", "")],
    ),
    "a block ends, or goes on, while others read its sums": (
        FLOAT32, [(ROWS, "if (ranks > 1) cluster_arrive();", ""), (ROWS, "if (ranks > 1) cluster_wait();", "")],
    ),
    "what is shared overwritten before it is used up": (
        FLOAT32, [(ROWS, "    block_sync();  // what is shared is used up\n", "")],
    ),
    "gradient written before its coefficients are known": (
        FLOAT32, [(ROWS, "      block_sync();\n      const Affine", "      const Affine")],
    ),
    "tile read before it arrived": (FLOAT32, [(ROWS, "copies_arrived<0>();", "copies_arrived<1>();")]),
    "a wrong rank read": (FLOAT32, [(ROWS, "in_block(&shared.of_block, r)", "in_block(&shared.of_block, r - 1)")]),
    "last class of a row left out": (
        FLOAT32, [("cuda/sums.h", "+ thread; j < w.end; j += threads) add_one", "+ thread; j < w.end - 1; j += threads) add_one")],
    ),
    "target counted among the others": (FLOAT32, [("cuda/sums.h", "if (start + i == target) z[i] = A(-kInfinity);", "{}")]),
    "sums not rescaled to a larger maximum": (FLOAT32, [("cuda/sums.h", "      e *= factor;\n", "")]),
    "the first of equal maxima not known": (FLOAT32, [("cuda/sums.h", "first = min(first, other.first);", "")]),
    "row offsets of 32 bits": (
        BFLOAT16, [(ROWS, "+ row * rows.row_stride;\n    T* const gradient", "+ static_cast<int>(row * rows.row_stride);\n    T* const gradient")],
    ),
    "a vector shifted by too little": (BFLOAT16, [("cuda/elements.h", "if ((past & 4) != 0)", "if (false)")]),
    "ignored rows left as they were": (
        FLOAT32, [(ROWS, "write_zeros(gradient, begin, end, thread, kBlockThreads);", "{}")],
    ),
    "ticket not reset": (FLOAT32, [("cuda/gradient_kernels.h", "    header.ticket = 0;\n", "")]),
    "ticket taken before the sums are stored": (
        FLOAT32,
        [("cuda/epilogue.h", "  block_sync();\n  if (thread == 0) shared.last = take_ticket(&call.header()->ticket) + 1 == static_cast<uint32_t>(call.teams);\n", ""),
         ("cuda/epilogue.h", "  double* const sums = call.team_sums();\n", "  double* const sums = call.team_sums();\n  if (thread == 0) shared.last = take_ticket(&call.header()->ticket) + 1 == static_cast<uint32_t>(call.teams);\n")],
    ),
    "whether a block is the last read before it is known": (
        FLOAT32, [("cuda/epilogue.h", "  block_sync();\n  if (!shared.last) return;", "  if (!shared.last) return;")],
    ),
    "one upstream gradient for all rows": (
        FLOAT32, [("cuda/gradient_kernels.h", "upstream[row * call.upstream_stride]", "upstream[0]")],
    ),
    "no room for a tile that begins between boundaries": (
        "doors.cu", [("cuda/doors.cu", "* element_size(rows.dtype) + 16;", "* element_size(rows.dtype);")],
    ),
}  # fmt: skip

# What gives the right numbers all the same, and only the sanitizers see.
UNSEEN: dict[str, tuple[str, list[tuple[str, str, str]]]] = {
    "16 bytes read behind the last row": (FLOAT32, [("cuda/elements.h", "  if (past == 0) return load128(p);\n", "")]),
    "the weight of a bad label read": (
        FLOAT32, [("cuda/gradient_kernels.h", "y < 0 ? 0 : y < rows.classes ? y : rows.classes - 1;", "y;")],
    ),
}  # fmt: skip


def outcome(name: str) -> tuple[int, str]:
    """pytest's exit status, and the end of what it wrote."""
    arguments, sanitized = RUNS[name]
    done = build.run_tests(build.emulated(sanitized), *arguments, sanitized=sanitized)
    return done.returncode, done.stdout[-4000:] + done.stderr[-4000:]


def outcome_of_fault(name: str, folder: Path) -> tuple[int, str]:
    sanitized = name in UNSEEN
    source, replacements = (UNSEEN if sanitized else FAULTS)[name]
    mutant = folder / re.sub(r"\W+", "_", name)
    csrc = mutant / "csrc"
    shutil.copytree(build.ROOT / "csrc", csrc)
    for file, old, new in replacements:
        text = (csrc / file).read_text()
        assert text.count(old) == 1, f"{name}: {old!r} stands {text.count(old)} times in {file}"
        (csrc / file).write_text(text.replace(old, new))
    build.mutant(mutant, csrc, [source], sanitized)
    done = build.run_tests(mutant, "-x", CASES, "-k", NOTICING, sanitized=sanitized)
    return done.returncode, done.stdout[-3000:] + done.stderr[-9000:]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Future[tuple[int, str]]]]:
    """Everything that the tests of this file wait for, two at a time. The builds come first: what they share is made once."""
    folder = tmp_path_factory.mktemp("emulated")
    for sanitized in (False, True):
        build.emulated(sanitized)
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(outcome, name) for name in RUNS}
        futures |= {name: pool.submit(outcome_of_fault, name, folder) for name in (*FAULTS, *UNSEEN)}
        yield futures.__getitem__
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", RUNS)
def test_emulated_kernels_pass(name: str, started: Callable[[str], Future[tuple[int, str]]]) -> None:
    status, output = started(name).result()
    assert status == 0, output


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_kernel_is_caught(name: str, started: Callable[[str], Future[tuple[int, str]]]) -> None:
    status, output = started(name).result()
    crashed = status < 0
    assert crashed or (status == 1 and " failed" in output), f"the tests did not notice: {name}\n{output}"


@pytest.mark.parametrize("name", UNSEEN)
def test_an_access_out_of_bounds_is_caught(name: str, started: Callable[[str], Future[tuple[int, str]]]) -> None:
    status, output = started(name).result()
    assert status != 0, f"the sanitizers did not notice: {name}\n{output}"
    assert "AddressSanitizer" in output
