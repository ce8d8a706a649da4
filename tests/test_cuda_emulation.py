"""The CUDA kernels without a GPU, on the CPU; tests.emulation says how, and what that proves.

The builds and the runs take two processors for a few minutes, so that all are started together; each test waits for
its own. A test that passes although a kernel is wrong is no test: faults are planted in the kernels, one at a time.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from .emulation import build
from .faults import VARIABLE, Replacement

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="fibers and sanitizers as Linux has them"),
]

CASES = "tests/emulation/cases.py"

# The runs that must pass: name -> (pytest's arguments, whether under the sanitizers).
PART = "every_size or anywhere or elementwise"
RUNS: dict[str, tuple[list[str], bool]] = {
    "sizes": ([CASES, "-k", PART], False),
    "schedules, masks, labels": ([CASES, "-k", f"not ({PART})"], False),
    "the tests of the CPU kernels": (
        [*build.EXISTING, "-k", build.OF_A_GPU],
        False,
    ),
    "sanitized": (
        [
            CASES,
            "-k",
            "(anywhere and (float16 or float64) and not (cluster2 or cluster4)) or bad_label or no_rows or many_rows",
        ],
        True,
    ),
}


class Fault(NamedTuple):
    replacements: list[Replacement]
    noticed_by: str = "every_depth and float32"


ROWS, SUMS, ELEMENTS = "cuda/row_kernels.h", "cuda/sums.h", "cuda/elements.h"
EPILOGUE, GRADIENT, DOORS = "cuda/epilogue.h", "cuda/gradient_kernels.h", "cuda/doors.cu"
ELEMENTWISE, PARAMETERS, COMPARE = "cuda/elementwise.cu", "cuda/parameters.cu", "cuda/compare_kernel.h"
TICKET = (
    "  if (thread == 0) shared.last = take_ticket(&call.header()->ticket) + 1 == static_cast<uint32_t>(call.teams);\n"
)


def fault(file: str, text: str, wrong: str = "", noticed_by: str = Fault._field_defaults["noticed_by"]) -> Fault:
    return Fault([Replacement(file, text, wrong)], noticed_by)


FAULTS = {
    "sums of warps read before all are there": fault(ROWS, "= of_warp;\n    ⟦block_sync();⟧"),
    "sums of blocks read before all are there": fault(ROWS, "      cluster_arrive();\n      cluster_wait();\n"),
    "a block goes on, or ends, while others read its sums": Fault(
        [Replacement(ROWS, "if (ranks > 1) cluster_arrive();", ""), Replacement(ROWS, "if (ranks > 1) cluster_wait();", "")]
    ),
    "what is shared overwritten before it is used up": fault(ROWS, "⟦block_sync();⟧  // what is shared is used up\n"),
    "gradient written before its coefficients are known": fault(ROWS, "⟦block_sync();⟧\n      const Affine"),
    "tile read before it arrived": fault(ROWS, "copies_arrived<0>();", "copies_arrived<1>();"),
    "a wrong rank read": fault(ROWS, "in_block(&shared.of_block, ⟦r⟧)", "r - 1"),
    "last class of a row left out": fault(SUMS, "thread; j < ⟦w.end⟧; j +=", "w.end - 1"),
    "target counted among the others": fault(SUMS, "if (start + i == target) z[i] = A(-kInfinity);"),
    "sums not rescaled to a larger maximum": fault(SUMS, "      e *= factor;\n"),
    "the first of equal maxima not known": fault(SUMS, "first = min(first, other.first);", "", "maximum_twice"),
    "row offsets of 32 bits": fault(
        ROWS, "+ ⟦row * rows.row_stride⟧;\n    G* const gradient", "static_cast<int>(row * rows.row_stride)",
        "farther_apart",
    ),
    "a vector shifted by too little": fault(ELEMENTS, "if (⟦(past & 4) != 0⟧)", "false", "anywhere and bfloat16"),
    "the second word of a pair of float32 logits read twice": fault(
        "cuda/affine.h", "load128_across(⟦x + i * Element<T>::kVector⟧, past)", "x", "half_precision_gradients and bfloat16"
    ),
    "ignored rows left as they were": fault(ROWS, "write_zeros(gradient, begin, end, thread, kBlockThreads);"),
    "ticket not reset": fault(GRADIENT, "    header.ticket = 0;\n"),
    "ticket taken before the sums are stored": Fault(
        [Replacement(EPILOGUE, "  block_sync();\n" + TICKET, ""), Replacement(EPILOGUE, "= call.team_sums();\n⟦⟧", TICKET)]
    ),
    "whether a block is the last read before it is known": fault(EPILOGUE, "  ⟦block_sync();⟧\n  if (!shared.last)"),
    "one upstream gradient for all rows": fault(GRADIENT, "upstream[⟦row * call.upstream_stride⟧]", "0", "take_turns"),
    "no room for a tile that begins between boundaries": fault(
        DOORS, "return ⟦tile_of(rows, cluster) * element_size(rows.dtype) + 16⟧;",
        "tile_of(rows, cluster) * element_size(rows.dtype)",
    ),
    "a tile that begins at a multiple of 16 whatever its row does": fault(
        ROWS, "⟦misalignment(x + begin) / static_cast<int>(sizeof(T)) - begin⟧", "-begin"
    ),
    "the missing half of a pair of vectors counted as logits of 0": fault(
        SUMS, "⟦there ? transform(in_vector[i]) : A(-kInfinity)⟧", "there ? transform(in_vector[i]) : A(0)"
    ),
    "normalizer left unread": fault(EPILOGUE, "if (⟦program.has_normalizer⟧) {", "false", "options"),
    "a bad label without a trace": fault(EPILOGUE, "if (bad) value = nan;", "", "bad_label"),
    "all rows of a warp with the sums of its first": fault(
        ROWS, "const int leader = ⟦thread % kWarp / width * width⟧;", "0"
    ),
    "no digits put back into the odds": fault("objective.h", "const LogOdds<R> odds(d, ⟦low⟧);", "R(0)", "rounded_once"),
    "sums of a block of elements read before all are there": fault(
        ELEMENTWISE, "⟦block_sync();⟧\n  const int lane", "", "elementwise"
    ),
    "the elements of one block for all": fault(ELEMENTWISE, "(⟦static_cast<int64_t>(block_index())⟧ * kElementThreads", "0", "elementwise"),
    "elements past the end counted": fault(ELEMENTWISE, "if (⟦i < there⟧) sum += values[i];", "true", "elementwise"),
    "weights that repeat stay at one of them": fault(ELEMENTWISE, "place = ⟦place + 1 == period ? 0 : place + 1⟧;", "0", "elementwise"),
    "one upstream gradient for all elements": fault(ELEMENTWISE, "upstream[⟦first + i⟧]", "0", "elementwise"),
    "sums of a block of a parameter read before all are there": fault(
        PARAMETERS, "⟦block_sync();⟧\n  if (thread == 0)\n    for (int warp", "", "many_parameters"
    ),
    "the elements of a parameter's first block for all": fault(PARAMETERS, "⟦(block - call.first[k])⟧ * kOfBlock", "0", "many_parameters"),
    "a gradient that is there forgotten": fault(PARAMETERS, "Of::kGradient && ⟦call.adds⟧) read", "false", "many_parameters"),
    "an excluded class counted in a divergence": fault(COMPARE, "⟦(out ? low : r[i])⟧ - base_r", "r[i]", "divergence_alone"),
}  # fmt: skip

# What gives the right numbers all the same, and only the sanitizers see.
UNSEEN = {
    "16 bytes read behind the last row": fault(ELEMENTS, "  if (past == 0) return load128(p);\n", "", "anywhere and float32"),
    "the weight of a bad label read": fault(
        GRADIENT, "⟦y < 0 ? 0 : y < rows.classes ? y : rows.classes - 1⟧;", "y", "bad_label"
    ),
}  # fmt: skip
NUMBERS = {name: number for number, name in enumerate((*FAULTS, *UNSEEN), 1)}


def outcome(name: str) -> tuple[int, str]:
    """pytest's exit status, and the end of what it wrote."""
    arguments, sanitized = RUNS[name]
    done = build.run_tests(builds(sanitized), *arguments, sanitized=sanitized)
    return done.returncode, done.stdout[-4000:] + done.stderr[-4000:]


def outcome_of_fault(name: str) -> tuple[int, str]:
    sanitized = name in UNSEEN
    expression = (UNSEEN if sanitized else FAULTS)[name].noticed_by
    done = build.run_tests(
        builds(sanitized), "-x", CASES, "-k", expression, sanitized=sanitized, **{VARIABLE: str(NUMBERS[name])}
    )
    return done.returncode, done.stdout[-3000:] + done.stderr[-9000:]


@functools.cache
def builds(sanitized: bool) -> Path:
    """The kernels with every fault, all of them asleep."""
    return build.emulated(sanitized, [each.replacements for each in (*FAULTS.values(), *UNSEEN.values())])


@pytest.fixture(scope="module")
def started() -> Iterator[Callable[[str], Future[tuple[int, str]]]]:
    """Everything that the tests of this file wait for, two at a time. The builds come first: what they share is made once."""
    for sanitized in (False, True):
        builds(sanitized)
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(outcome, name) for name in RUNS}
        futures |= {name: pool.submit(outcome_of_fault, name) for name in (*FAULTS, *UNSEEN)}
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
