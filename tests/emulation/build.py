"""Builds objkern with its CUDA kernels compiled for the CPU, under the ops of CPU tensors.

A build is a folder with a copy of the package and the tests. What does not differ is taken from the ordinary build:
the schemas, the derivatives, and the CPU kernels, which then stand unused.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch.utils import cpp_extension

from ..faults import ROOT, Replacement, copy_python, plant

KEPT = ROOT / "build/emulation"
CXX = os.environ.get("CXX", "g++")
# Speed matters less than the time to compile; kernels look at the same memory through several types.
KERNEL = ["-x", "c++", "-std=c++20", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas"]
# Not the inline functions of the CPU kernels, which are the same ones compiled otherwise.
EMULATED = ["-DOBJKERN_EMULATED", "-DOBJKERN_CUDA_KEY=CPU", "-DOBJKERN_VARIANT=emulated", f"-I{ROOT}/tests/emulation"]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]


# Tests of the ops that these kernels must pass too.
EXISTING = [
    f"tests/test_{name}.py" for name in ("kernels", "pitfalls", "precision", "corners", "elementwise", "functional")
]

# Tests of the CPU's kernels, or of what a GPU does otherwise, and why.
NOT_OF_A_GPU = {
    "test_rows_that_begin_between_boundaries": "the order of a row's sum depends on where it begins modulo 16 bytes",
    "test_nothing_beside_a_tensor_is_touched": "the same",
    "test_narrow_rows_of_every_width": "the same; test_every_size_under_every_plan has these sizes",
    "test_any_strides": "the same; test_rows_that_begin_anywhere has these strides",
    "test_a_gradient_larger_than_the_caches": "the same, and the CPU's caches",
    "test_bad_labels_name_row_and_label": "they give NaN; test_a_bad_label_is_a_row_of_nan",
    "test_many_labels_are_counted_and_checked": "the same; test_many_rows counts them",
    "test_errors_have_torchs_type": "a bad label gives NaN",
    "40000": "a size for pieces and threads of the CPU's",
    "test_offsets_beyond_two_to_the_31": "4 GB, written thread by thread; test_rows_farther_apart_than_32_bits_can_tell",
}
OF_A_GPU = f"not ({' or '.join(f'({test})' for test in NOT_OF_A_GPU)})"


def kernel_sources(csrc: Path) -> list[Path]:
    return sorted((csrc / "cuda").glob("*.cu"))


def ordinary_objects() -> list[Path]:
    """Of the newest ordinary build, with or without CUDA, but for what registers kernels at the CPU and CUDA keys."""
    newest = max(ROOT.glob("build/temp*/**/csrc/*.o"), key=lambda path: path.stat().st_mtime).parent
    bindings = [path for path in newest.glob("*.o") if path.name not in ("bindings_cpu.o", "bindings_cuda.o")]
    kernels = [path for path in ROOT.glob("build/temp*/kernels/*.o") if not path.name.startswith("cuda_")]
    return sorted([*bindings, *kernels])


class Build:
    """A ninja file in the making: objects, and the library that they and others are linked into."""

    def __init__(self, folder: Path, flags: Iterable[str] = ()) -> None:
        self.folder = folder
        self.flags = list(flags)
        self.objects: list[Path] = []
        self.lines = [
            "rule cxx",
            f"  command = {CXX} -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {CXX} -shared -fopenmp {' '.join(self.flags)} -o $out $in "
            f"-L{Path(torch.__file__).parent / 'lib'} -lc10 -ltorch -ltorch_cpu -ltorch_python -ldl",
        ]

    def compile(self, source: Path, flags: list[str], name: str | None = None) -> None:
        target = self.folder / "objects" / f"{name or source.stem}.o"
        self.lines += [f"build {target}: cxx {source}", f"  flags = {' '.join([*flags, *self.flags])}"]
        self.objects.append(target)

    def problems(self, others: Iterable[Path]) -> str | None:
        """Compile what is out of date, link, and lay the Python files beside. The first object's functions count. What
        the compiler says, where it fails."""
        library = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        inputs = " ".join(map(str, [*self.objects, *others]))
        self.lines.append(f"build {self.folder / 'objkern' / library}: link {inputs}")
        copy_python(self.folder)
        return self.run()

    def program(self, target: Path) -> Path:
        """The objects as a program by itself. Vectors have their functions from torch's library."""
        libraries = Path(torch.__file__).parent / "lib"
        self.lines += [
            "rule program",
            f"  command = {CXX} {' '.join(self.flags)} -o $out $in -L{libraries} -Wl,-rpath,{libraries} -lc10 "
            "-ltorch_cpu -lpthread",
            f"build {target}: program {' '.join(map(str, self.objects))}",
        ]
        if (found := self.run()) is not None:
            raise RuntimeError(f"the program does not compile:\n{found}")
        return target

    def run(self) -> str | None:
        """What does not compile, or None."""
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        done = subprocess.run(["ninja", "-k", "0", "-C", str(self.folder)], capture_output=True, text=True)
        return done.stdout if done.returncode else None

    def finish(self, others: Iterable[Path]) -> None:
        if (found := self.problems(others)) is not None:
            raise RuntimeError(f"the emulated kernels do not compile:\n{found}")


def emulated(sanitized: bool = False, faults: Sequence[Iterable[Replacement]] = ()) -> Path:
    """The build of the kernels, with faults that sleep. The sanitized one looks for accesses out of bounds and undefined
    behaviour."""
    folder = KEPT / ("sanitized" if sanitized else "plain")
    plant(folder / "csrc", faults)
    build = emulated_kernels(folder, sanitized)
    binding = [emulated(False, faults) / "objects/bindings_cuda.o"] if sanitized else []
    build.finish([*binding, *ordinary_objects()])
    return folder


def emulated_kernels(folder: Path, sanitized: bool = False) -> Build:
    """Of the sources in a folder; the sanitized ones without the binding."""
    csrc = folder / "csrc"
    build = Build(folder, SANITIZED if sanitized else ())
    for source in (*kernel_sources(csrc), ROOT / "tests/emulation/emulation.cpp"):
        build.compile(source, [*KERNEL, *EMULATED, f"-I{csrc}"])
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    if not sanitized:
        binding = [*KERNEL, "-O0", "-Wno-psabi", *EMULATED, f"-I{csrc}", *(f"-isystem{path}" for path in includes)]
        build.compile(csrc / "bindings_cuda.cpp", binding)
    return build


def library_of_compiler(name: str) -> str:
    return subprocess.run([CXX, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()


def run_tests(
    folder: Path, *arguments: str, sanitized: bool = False, timeout: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """pytest in a build, where uninitialized memory holds no zeros."""
    env = {
        "PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/tmp"), "OMP_NUM_THREADS": "1",
        "MALLOC_PERTURB_": "129", **environment,
    }  # fmt: skip
    if sanitized:
        env["LD_PRELOAD"] = " ".join(map(library_of_compiler, ("libasan.so", "libubsan.so")))
        env["ASAN_OPTIONS"] = "detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=126"
        env["UBSAN_OPTIONS"] = "print_stacktrace=1"
    # What the sanitizers write before they end the process must not stay in pytest's hands.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--capture=sys", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)
