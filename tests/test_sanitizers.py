"""The C++ core under the compiler's sanitizers, with the tests that the CPU kernels have anyway.

Out-of-bounds accesses and undefined behaviour: kernels and bindings are built with AddressSanitizer and
UndefinedBehaviorSanitizer, into a copy of the package, as the emulated CUDA kernels are. Races: ThreadSanitizer does not
know OpenMP's threads, so the kernels, which are plain functions on plain pointers, are linked into a program with threads
of its own (sanitizers/threads.cpp). Faults are planted in both builds: a sanitizer that sees none of them looks at nothing.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils import cpp_extension

import setup as how_it_is_built
from objkern import _C

from .emulation.build import SANITIZED, Build, ordinary_objects, run_tests
from .faults import ROOT, VARIABLE, Replacement, plant

pytestmark = [
    pytest.mark.trust,
    pytest.mark.skipif(sys.platform != "linux", reason="sanitizers as GCC has them on Linux"),
]

KEPT = ROOT / "build/sanitizers"
# The kernels that this machine can run; the others of the build are not there to be called.
CAPABILITIES = [name for name in how_it_is_built.CAPABILITIES if name in ("default", _C.build_info()["cpu_capability"])]
KERNELS = ["-std=c++20", "-O1", "-g1", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-Wno-unknown-pragmas"]
TESTS = [f"tests/test_{name}.py" for name in ("kernels", "pitfalls", "precision", "corners", "elementwise", "buffers",
                                              "default_call", "errors", "sequences")]  # fmt: skip

TILE, KERNEL, BUFFERS = "cpu/tile.h", "cpu/kernels.cpp", "cpu/buffers.cpp"
# name -> what stands wrong, and the tests that run into it.
OUT_OF_BOUNDS = {
    "the weight behind the label's": (
        Replacement(TILE, "static_cast<const A*>(in.class_weight)[⟦in.target[row]⟧]", "in.target[row] + in.classes"),
        ["tests/test_corners.py", "-k", "lost_gradients or nan_among"],
    ),
    "a shift by more bits than there are": (
        Replacement(KERNEL, "(int64_t{256} << ⟦10⟧)", "10 + 64 * static_cast<int>(in.rows > 0)"),
        ["tests/test_kernels.py"],
    ),
}  # fmt: skip
RACES = {
    "the sums of all tiles in one place": Replacement(TILE, "of_tiles[⟦row / rows_per_tile * fields + k⟧] +=", "k"),
    "the segments of all rows in one place": Replacement(KERNEL, "pieces[⟦i⟧] = Found::of", "i % segments"),
    "a lock of one's own": Replacement(
        BUFFERS, "lock(⟦all.mutex⟧);\n  // Not one that", "*new std::mutex"
    ),
}  # fmt: skip
NUMBERS = {name: number for number, name in enumerate((*OUT_OF_BOUNDS, *RACES), 1)}


def machine_flags(capability: str) -> list[str]:
    aten_name, machine = how_it_is_built.CAPABILITIES[capability]
    variant = "baseline" if capability == "default" else capability
    return [f"-DCPU_CAPABILITY={aten_name}", f"-DCPU_CAPABILITY_{aten_name}", f"-DOBJKERN_VARIANT={variant}", *machine]


def planted(folder: Path) -> Path:
    faults = [*(fault for fault, _ in OUT_OF_BOUNDS.values()), *RACES.values()]
    plant(folder / "csrc", ([fault] for fault in faults))
    return folder / "csrc"


def compile_core(build: Build, csrc: Path, flags: list[str]) -> None:
    """The kernels of every capability, and what is common to them."""
    built = [f"-DOBJKERN_HAS_{name.upper()}" for name in CAPABILITIES]
    for name in CAPABILITIES:
        build.compile(csrc / KERNEL, [*KERNELS, *flags, *machine_flags(name)], f"kernels_{name}")
    build.compile(csrc / "cpu/dispatch.cpp", [*KERNELS, *flags, *built])
    build.compile(csrc / BUFFERS, [*KERNELS, *flags])


@functools.cache
def library() -> Path:
    """A folder with the package and the tests, its kernels and bindings under the sanitizers."""
    folder = KEPT / "addresses"
    csrc = planted(folder)
    build = Build(folder, SANITIZED)
    includes = [f"-isystem{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_paths()["include"])]
    flags = [
        "-fPIC",
        "-fopenmp",
        "-DTORCH_EXTENSION_NAME=_C",
        "-DTORCH_API_INCLUDE_EXTENSION_H",
        f"-I{csrc}",
        *includes,
    ]
    compile_core(build, csrc, flags)
    for name in ("bindings", "bindings_cpu", "autograd", "default_call"):
        build.compile(csrc / f"{name}.cpp", [*KERNELS, "-O0", *flags])
    build.finish(path for path in ordinary_objects() if path.stem == "build_facts")
    return folder


@functools.cache
def program() -> Path:
    """The kernels with threads that ThreadSanitizer knows."""
    folder = KEPT / "threads"
    csrc = planted(folder)
    build = Build(folder, ["-fsanitize=thread"])
    # Before ATen's own headers, so that Parallel.h is ours.
    flags = [f"-I{ROOT}/tests/sanitizers", f"-I{csrc}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    compile_core(build, csrc, flags)
    build.compile(ROOT / "tests/sanitizers/threads.cpp", [*KERNELS, *flags])
    return build.program(folder / "threads")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_access_out_of_bounds(capability: str, record_property: Callable[[str, object], None]) -> None:
    """13: a label out of range that reads memory, and whatever else reads or writes where it must not."""
    done = run_tests(library(), *TESTS, sanitized=True, timeout=3600, OBJKERN_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    record_property("tests", done.stdout.count("."))


@pytest.mark.parametrize("name", OUT_OF_BOUNDS)
def test_a_planted_access_is_noticed(name: str) -> None:
    _, tests = OUT_OF_BOUNDS[name]
    done = run_tests(library(), "-x", *tests, sanitized=True, timeout=1200, **{VARIABLE: str(NUMBERS[name])})
    assert done.returncode != 0
    assert re.search(r"AddressSanitizer|runtime error: ", done.stderr + done.stdout), done.stderr[-4000:]


def run_program(fault: int = 0) -> subprocess.CompletedProcess[str]:
    # Where addresses are laid out too randomly for it, ThreadSanitizer gives up.
    command = ["setarch", "-R", str(program())]
    env = {"PATH": os.environ["PATH"], "TSAN_OPTIONS": "halt_on_error=1 exitcode=66", VARIABLE: str(fault)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=3600)


def test_no_races(record_property: Callable[[str, object], None]) -> None:
    """30: several callers at once, each divided among threads, find what one finds alone, and share nothing else."""
    done = run_program()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "kernels: 0 results differ" in done.stdout
    record_property("kernels", done.stdout.split()[0])


@pytest.mark.parametrize("name", RACES)
def test_a_planted_race_is_noticed(name: str) -> None:
    done = run_program(NUMBERS[name])
    assert done.returncode == 66, done.stdout[-2000:] + done.stderr[-4000:]
    assert "data race" in done.stderr
