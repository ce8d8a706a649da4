"""The CUDA kernels without a GPU, on the CPU; tests.emulation says how, and what that proves.

The builds and the runs take two processors for a few minutes, so that all are started together; each test waits for
its own. A test that passes although a kernel is wrong is no test: faults are planted in the kernels, one at a time.
"""

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from .emulation import build

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


class Fault(NamedTuple):
    replacements: list[tuple[str, str, str]]  # (file, text, what stands there instead)
    noticed_by: str = "every_depth and float32"
    source: str = "rows_float32.cu"  # what is compiled anew


ROWS, SUMS, ELEMENTS = "cuda/row_kernels.h", "cuda/sums.h", "cuda/elements.h"
EPILOGUE, GRADIENT, DOORS = "cuda/epilogue.h", "cuda/gradient_kernels.h", "cuda/doors.cu"
TICKET = (
    "  if (thread == 0) shared.last = take_ticket(&call.header()->ticket) + 1 == static_cast<uint32_t>(call.teams);\n"
)

FAULTS = {
    "sums of warps read before all are there": Fault([(ROWS, "= of_warp;\n    block_sync();", "= of_warp;")]),
    "sums of blocks read before all are there": Fault([(ROWS, "      cluster_arrive();\n      cluster_wait();\n", "")]),
    "a block goes on, or ends, while others read its sums": Fault(
        [(ROWS, "if (ranks > 1) cluster_arrive();", ""), (ROWS, "if (ranks > 1) cluster_wait();", "")]
    ),
    "what is shared overwritten before it is used up": Fault([(ROWS, "    block_sync();  // what is shared is used up\n", "")]),
    "gradient written before its coefficients are known": Fault([(ROWS, "      block_sync();\n      const Affine", "      const Affine")]),
    "tile read before it arrived": Fault([(ROWS, "copies_arrived<0>();", "copies_arrived<1>();")]),
    "a wrong rank read": Fault([(ROWS, "in_block(&shared.of_block, r)", "in_block(&shared.of_block, r - 1)")]),
    "last class of a row left out": Fault([(SUMS, "thread; j < w.end; j +=", "thread; j < w.end - 1; j +=")]),
    "target counted among the others": Fault([(SUMS, "if (start + i == target) z[i] = A(-kInfinity);", "{}")]),
    "sums not rescaled to a larger maximum": Fault([(SUMS, "      e *= factor;\n", "")]),
    "the first of equal maxima not known": Fault([(SUMS, "first = min(first, other.first);", "")], "maximum_twice"),
    "row offsets of 32 bits": Fault(
        [(ROWS, "+ row * rows.row_stride;\n    G* const gradient", "+ static_cast<int>(row * rows.row_stride);\n    T* const gradient")],
        "farther_apart", "rows_bfloat16.cu",
    ),
    "a vector shifted by too little": Fault([(ELEMENTS, "if ((past & 4) != 0)", "if (false)")], "anywhere and bfloat16", "rows_bfloat16.cu"),
    "the second word of a pair of float32 logits read twice": Fault(
        [("cuda/affine.h", "load128_across(x + i * Element<T>::kVector, past)", "load128_across(x, past)")],
        "half_precision_gradients and bfloat16", "rows_float32_bfloat16.cu",
    ),
    "ignored rows left as they were": Fault([(ROWS, "write_zeros(gradient, begin, end, thread, kBlockThreads);", "{}")]),
    "ticket not reset": Fault([(GRADIENT, "    header.ticket = 0;\n", "")]),
    "ticket taken before the sums are stored": Fault(
        [(EPILOGUE, "  block_sync();\n" + TICKET, ""), (EPILOGUE, "= call.team_sums();\n", "= call.team_sums();\n" + TICKET)]
    ),
    "whether a block is the last read before it is known": Fault([(EPILOGUE, "  block_sync();\n  if (!shared.last)", "  if (!shared.last)")]),
    "one upstream gradient for all rows": Fault([(GRADIENT, "upstream[row * call.upstream_stride]", "upstream[0]")], "take_turns"),
    "no room for a tile that begins between boundaries": Fault(
        [(DOORS, "* element_size(rows.dtype) + 16;", "* element_size(rows.dtype);")], source="doors.cu"
    ),
    "a tile that begins at a multiple of 16 whatever its row does": Fault(
        [(ROWS, "misalignment(x + begin) / static_cast<int>(sizeof(T)) - begin", "-begin")]
    ),
    "the missing half of a pair of vectors counted as logits of 0": Fault(
        [(SUMS, "there ? transform(in_vector[i]) : A(-kInfinity)", "there ? transform(in_vector[i]) : A(0)")]
    ),
    "normalizer left unread": Fault([(EPILOGUE, "if (program.has_normalizer) {", "if (false) {")], "options"),
    "a bad label without a trace": Fault([(EPILOGUE, "if (bad) value = nan;", "")], "bad_label"),
    "all rows of a warp with the sums of its first": Fault(
        [(ROWS, "const int leader = thread % kWarp / width * width;", "const int leader = 0;")]
    ),
    "no digits put back into the odds": Fault(
        [("objective.h", "    const LogOdds<R> odds(d, low);", "    const LogOdds<R> odds(d);")], "rounded_once"
    ),
}  # fmt: skip

# What gives the right numbers all the same, and only the sanitizers see.
UNSEEN = {
    "16 bytes read behind the last row": Fault([(ELEMENTS, "  if (past == 0) return load128(p);\n", "")], "anywhere and float32"),
    "the weight of a bad label read": Fault([(GRADIENT, "y < 0 ? 0 : y < rows.classes ? y : rows.classes - 1;", "y;")], "bad_label"),
}  # fmt: skip


def outcome(name: str) -> tuple[int, str]:
    """pytest's exit status, and the end of what it wrote."""
    arguments, sanitized = RUNS[name]
    done = build.run_tests(build.emulated(sanitized), *arguments, sanitized=sanitized)
    return done.returncode, done.stdout[-4000:] + done.stderr[-4000:]


def outcome_of_fault(name: str, folder: Path) -> tuple[int, str]:
    sanitized = name in UNSEEN
    fault = (UNSEEN if sanitized else FAULTS)[name]
    mutant = folder / re.sub(r"\W+", "_", name)
    csrc = mutant / "csrc"
    shutil.copytree(build.ROOT / "csrc", csrc)
    for file, old, new in fault.replacements:
        text = (csrc / file).read_text()
        assert text.count(old) == 1, f"{name}: {old!r} stands {text.count(old)} times in {file}"
        (csrc / file).write_text(text.replace(old, new))
    build.mutant(mutant, csrc, [fault.source], sanitized)
    done = build.run_tests(mutant, "-x", CASES, "-k", fault.noticed_by, sanitized=sanitized)
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
