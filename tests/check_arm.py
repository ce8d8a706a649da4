"""The CPU kernels on Arm, compiled by a cross compiler and run by qemu: `make check-arm`.

    python -m tests.check_arm [pytest options]

torch's vectors have other code on Arm (NEON), and the kernels take their portable branches there. The tests of the
kernels run as they are, on a library of this machine whose kernels live in a process of their own: an aarch64 program
that qemu-user runs (tests/arm/doors.cpp). Then faults are planted in that program, which the tests must notice.

Exit status: 0 all is well; 1 it is not; 77 not checked, because there is no cross compiler or no qemu.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from torch.utils import cpp_extension

import setup

from .check_oldest_torch import NOT_CHECKED
from .emulation.build import KERNEL, Build, ordinary_objects, run_tests
from .faults import ROOT, VARIABLE, Replacement, plant

CXX, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
# Four gigabytes of logits do not go through a pipe.
TOO_LARGE = "not two_to_the_31"
TESTS = [f"tests/test_{name}.py" for name in ("terms", "precision", "pitfalls", "kernels", "elementwise", "divergence")]

# What is wrong, and a test that must say so.
FAULTS = {
    "an exponential of few digits": Replacement("cpu/vectors.h", "p = at::vec::fmadd(p, r, F(0.16666416f));", "p = at::vec::fmadd(p, r, F(0.1666f));"),
    "padding counted as logits": Replacement("cpu/wide.h", "⟦-std::numeric_limits<float>::infinity()⟧, block.pack[i]);", "0.0f"),
}  # fmt: skip
NOTICED_BY = ["tests/test_kernels.py"]


def missing_tools() -> list[str]:
    return [tool for tool in (CXX, QEMU) if shutil.which(tool) is None]


def build() -> Path:
    """A folder with the package, the tests, and a library whose kernels are in `kernels`, beside it."""
    folder = ROOT / "build/arm"
    csrc = folder / "csrc"
    plant(csrc, ([fault] for fault in FAULTS.values()))
    build = Build(folder)
    doors = ROOT / "tests/arm/doors.cpp"
    includes = [f"-I{csrc}", *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    ours = [*KERNEL[2:], *setup.WARNINGS, "-fopenmp", *includes]
    build.compile(doors, ours)
    build.compile(csrc / "cpu/dispatch.cpp", ours)
    name, flags = setup.CAPABILITIES["default"]
    baseline = [f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}", *flags]
    arm = " ".join([*setup.FLAGS, *setup.WARNINGS, *baseline, *includes])
    objects = []
    build.lines += [
        f"rule arm\n  command = {CXX} {arm} -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule arm_link\n  command = {CXX} -static -fopenmp -o $out $in",
    ]
    for source in (doors, csrc / "cpu/dispatch.cpp", csrc / "cpu/kernels.cpp"):
        objects.append(str(folder / "objects" / f"arm_{source.stem}.o"))
        build.lines.append(f"build {objects[-1]}: arm {source}")
    build.lines.append(f"build {folder / 'kernels'}: arm_link {' '.join(objects)}")
    of_this_machine = {"dispatch", *(f"kernels_{name}" for name in setup.CAPABILITIES)}
    others = [path for path in ordinary_objects() if path.stem not in of_this_machine]
    binding = next(path.parent for path in others if path.name == "autograd.o") / "bindings_cpu.o"
    build.finish([*others, binding])
    return folder


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_tests(
        folder, "-q", *arguments, timeout=5400,
        OBJKERN_ARM_KERNELS=f"exec {QEMU} {folder / 'kernels'}", **environment,
    )  # fmt: skip


def main(options: list[str]) -> int:
    if missing := missing_tools():
        print(f"NOT CHECKED: there is no {' and no '.join(missing)} (Debian: g++-aarch64-linux-gnu, qemu-user)")
        return NOT_CHECKED
    folder = build()
    where = "from objkern import __main__; print(__main__.info())"
    environment = {**os.environ, "OBJKERN_ARM_KERNELS": f"exec {QEMU} {folder / 'kernels'}"}
    info = subprocess.run([sys.executable, "-c", where], cwd=folder, env=environment, capture_output=True, text=True)
    print(info.stdout + info.stderr, flush=True)
    if "aarch64, emulated" not in info.stdout:
        print("check_arm: these kernels are not those of the other machine")
        return 1
    start = time.perf_counter()
    done = run(folder, "-k", TOO_LARGE, *TESTS, *options)
    print(done.stdout[-6000:], done.stderr[-2000:])
    print(f"{time.perf_counter() - start:.0f} s of {CXX} kernels under {QEMU}")
    passes = done.returncode == 0
    for number, name in enumerate(FAULTS, 1):
        noticed = run(folder, "-x", *NOTICED_BY, **{VARIABLE: str(number)}).returncode == 1
        print(f"fault: {name}: {'noticed' if noticed else 'NOT NOTICED'}", flush=True)
        passes &= noticed
    print("the kernels do on Arm what they should" if passes else "check_arm: failed")
    return 0 if passes else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
