"""The CUDA kernels in machine code, on a machine without a GPU: registers, spills and the width of accesses.

The objects of the build under test hold the code of every architecture that it was built for. What is looked at here is
what a compiler may silently get wrong: a kernel that spills or that reads element by element gives the right numbers.
"""

from __future__ import annotations

import functools
import itertools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

from objkern import _C

from .machine_code import Loop, count, functions, graph_of, innermost_loops

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
WANTED = ("sm_80", "sm_90", "sm_100")  # of the wheel
DTYPES = ("float32", "float64", "bfloat16", "float16")
NARROWING = ("float32_bfloat16", "float32_float16")  # float32 logits, whose gradient is written in half precision
REGISTERS = 1 << 16  # of a multiprocessor
PLAIN, ENTROPY, SQUARE, FULL = range(4)  # Depth in csrc/objective.h
OBJECTIVE, REREAD, RESIDENT, STATISTICS = range(4)  # Pass in csrc/cuda/row_kernels.h

pytestmark = pytest.mark.skipif(
    _C.build_info()["cuda_archs"] is None, reason="this build has no CUDA kernels (OBJKERN_CUDA=0, or there is no nvcc)"
)


class Kernel(NamedTuple):
    name: str  # cluster, lanes, gradient, chain or count
    depth: int | None
    transform: bool
    step: int | None  # Pass
    registers: int
    stack: int


def cuobjdump() -> str:
    """Of the toolkit, or out of triton's package."""
    beside = Path(NVCC).resolve().parent / "cuobjdump"
    if beside.exists():
        return str(beside)
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def nvdisasm() -> str:
    return str(Path(cuobjdump()).with_name("nvdisasm"))


def dump(path: Path, *options: str) -> str:
    done = subprocess.run([cuobjdump(), *options, str(path)], capture_output=True, text=True, check=True)
    return done.stdout


def described(mangled: str, registers: int, stack: int) -> Kernel:
    name = re.search(r"(cluster|lanes|gradient|chain|count|compare)_kernel", mangled)[1]
    flags = re.search(r"5DepthE(\d)ELb(\d)E(?:LNS\w+4PassE(\d))?", mangled)
    if flags is None:
        transforms = re.search(r"compare_kernel\S*?Lb(\d)ELb\dE", mangled)
        return Kernel(name, None, transforms is not None and transforms[1] == "1", None, registers, stack)
    step = None if flags[3] is None else int(flags[3])
    return Kernel(name, int(flags[1]), flags[2] == "1", step, registers, stack)


def kernels_in(usage: str) -> dict[str, list[Kernel]]:
    """By architecture, from what ``cuobjdump -res-usage`` says."""
    found: dict[str, list[Kernel]] = {}
    arch = ""
    pattern = r"arch = (sm_\w+)|Function (\S+):\s+REG:(\d+) STACK:(\d+)"
    for words in re.finditer(pattern, usage):
        if words[1]:
            arch = words[1]
        else:
            found.setdefault(arch, []).append(described(words[2], int(words[3]), int(words[4])))
    return found


def built(dtype: str) -> Path:
    return object_of(f"rows_{dtype}")


@functools.cache
def object_of(source: str) -> Path:
    objects = list(ROOT.glob(f"build/temp*/kernels/cuda_{source}.o"))
    return max(objects, key=lambda path: path.stat().st_mtime)


def built_archs() -> list[str]:
    return ["sm_" + arch.split("+")[0].replace(".", "") for arch in _C.build_info()["cuda_archs"].split(";")]


def blocks_planned(kernel: Kernel, dtype: str) -> int:
    """Blocks that a multiprocessor is to hold at once: the plan of docs/kernels.md, in the words of the test."""
    if kernel.name in ("chain", "count"):
        return 2
    if dtype == "float64":
        return 1
    if kernel.name == "compare":
        return 2 if kernel.transform else 3
    if kernel.transform or kernel.depth == FULL:
        return 2
    if kernel.name == "gradient":
        return 4
    if kernel.step == REREAD and kernel.depth == SQUARE:
        return 2
    return 4 if kernel.depth == PLAIN and kernel.step == OBJECTIVE else 3


def problems(kernels: list[Kernel], dtype: str) -> list[str]:
    found = []
    for kernel in kernels:
        if kernel.stack:
            found.append(f"{kernel}: {kernel.stack} bytes of stack, for spills or for an array")
        if kernel.registers * 256 * blocks_planned(kernel, dtype) > REGISTERS:
            found.append(f"{kernel}: {kernel.registers} registers, too many for {blocks_planned(kernel, dtype)} blocks")
    return found


def test_the_build_holds_what_the_wheel_carries() -> None:
    """So that the tests below cannot pass by looking at nothing; a build for other devices says what it left out."""
    missing = [arch for arch in WANTED if arch not in built_archs()]
    if missing:
        pytest.skip(f"built with TORCH_CUDA_ARCH_LIST for {built_archs()}: {missing} are not looked at")
    for dtype in (*DTYPES, *NARROWING):
        assert set(kernels_in(dump(built(dtype), "-res-usage"))) == set(WANTED)


@pytest.mark.parametrize("dtype", [*DTYPES, *NARROWING])
def test_no_kernel_spills_and_every_plan_fits(dtype: str) -> None:
    """A spill is a round trip through local memory in a loop whose budget is the memory's; it shows in no result."""
    found = kernels_in(dump(built(dtype), "-res-usage"))
    assert set(found) >= set(built_archs())
    for arch, kernels in found.items():
        assert len(kernels) == (11 if dtype == "float64" else 12 if dtype in NARROWING else 37), arch
        assert problems(kernels, dtype) == [], arch


# ---- elementwise objectives -----------------------------------------------------------------------------------------

# Of a dtype each, and of half-precision predictions with float32 targets, each with weights and the like and without
# (float64 always with them); for sums, for sums and gradient, for values, for the gradient alone.
ELEMENT_KERNELS = (2 * 5 + 1) * 4


def elementwise_usage() -> dict[str, dict[str, tuple[int, int]]]:
    """Registers and bytes of stack of every kernel, by architecture."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    arch = ""
    for words in re.finditer(r"arch = (sm_\w+)|Function (\S+):\s+REG:(\d+) STACK:(\d+)",
                             dump(object_of("elementwise"), "-res-usage")):  # fmt: skip
        if words[1]:
            arch = words[1]
        else:
            found.setdefault(arch, {})[words[2]] = int(words[3]), int(words[4])
    return found


def test_no_elementwise_kernel_spills() -> None:
    found = elementwise_usage()
    assert set(found) >= set(built_archs())
    for arch, kernels in found.items():
        assert len(kernels) == ELEMENT_KERNELS + 2, arch  # and the sums of two accumulation types
        for name, (registers, stack) in kernels.items():
            assert stack == 0, (arch, name)
            assert registers * 256 * 2 <= REGISTERS, (arch, name)


@pytest.mark.parametrize("arch", WANTED)
def test_elements_move_16_bytes_at_a_time(arch: str) -> None:
    """Prediction and target are read, and gradient or values written, in words of 128 bits wherever those are whole."""
    if arch not in built_archs():
        pytest.skip(f"the build is for {built_archs()}")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [cuobjdump(), "-xelf", "all", object_of("elementwise").resolve()],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        (cubin,) = Path(folder).glob(f"*.{arch}.cubin")
        texts = functions(cubin, nvdisasm(), r"element_kernel")
    assert len(texts) == ELEMENT_KERNELS
    for name, text in texts.items():
        assert len(re.findall(r"\bLDG\.\S*128", text)) >= 2, name
        writes = "5AskedE0E" not in name  # the gradient, or unreduced values
        assert (len(re.findall(r"\bSTG\.\S*128", text)) >= 1) == writes, name


# ---- the loops ------------------------------------------------------------------------------------------------------

STORE, LOAD = r"STG\.\S*128", r"(?:LDG|LDS|LD)\.\S*128"
NARROW = r"(?:LDG|STG)\.(?!\S*128)"
HALF = r"(?:LDG\.(?!\S*(?:128|64))|STG\.(?!\S*128))"
EXPONENTIAL = r"MUFU\.EX2"

# Instructions of a lane for each element that a resident kernel may spend in its loops over the vectors of a row, sums
# and gradient together; an H200 that moves 4.3 TB/s has time for 27.6 of each element of 2 bytes, and 55 of 4.
BUDGET = {
    "bfloat16": {PLAIN: 18, ENTROPY: 23, SQUARE: 25},
    "float16": {PLAIN: 18, ENTROPY: 23, SQUARE: 25},
    "float32": {PLAIN: 33, ENTROPY: 39, SQUARE: 41},
}
LOOKED_AT = [(dtype, arch) for dtype, arch in itertools.product((*BUDGET, *NARROWING), WANTED)
             if arch == "sm_90" or dtype.endswith("bfloat16")]  # fmt: skip


class Vectors(NamedTuple):
    """A loop over the 16-byte vectors of a row, and its common turn."""

    loop: Loop
    writes: bool
    turn: list[str]
    accesses: int  # of 16 bytes in that turn

    @classmethod
    def of(cls, loop: Loop) -> Vectors | None:
        text = loop.instructions
        stores = count(text, STORE) > 0
        if not count(text, EXPONENTIAL) or not (stores or count(text, LOAD)):
            return None
        return cls(loop, stores, *loop.turn(STORE if stores else LOAD))


def vector_loops(sass: str) -> list[Vectors]:
    return [found for loop in innermost_loops(graph_of(sass)) if (found := Vectors.of(loop))]


@functools.cache
def loops_of(dtype: str, arch: str) -> dict[Kernel, list[Vectors]]:
    """Of the kernels whose speed is that of their loops: no transform, not the full depth."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [cuobjdump(), "-xelf", "all", built(dtype).resolve()], cwd=folder, check=True, capture_output=True
        )
        (cubin,) = Path(folder).glob(f"*.{arch}.cubin")
        texts = functions(cubin, nvdisasm(), r"(cluster|gradient|lanes)_kernel.*5DepthE[012]ELb0E")
    return {described(name, 0, 0): vector_loops(text) for name, text in texts.items()}


@pytest.mark.parametrize(("dtype", "arch"), LOOKED_AT)
def test_the_body_of_a_row_moves_16_bytes_at_a_time(dtype: str, arch: str) -> None:
    """A masked tail turned every access of a body into 2 bytes, and a kernel into a quarter of its speed."""
    if arch not in built_archs():
        pytest.skip(f"the build is for {built_archs()}")
    kernels = loops_of(dtype, arch)
    # Of each depth 3 of clusters, 2 of lanes, 1 gradient; of those that narrow, 2 and 1 of the depths 0 and 2.
    assert len(kernels) == (6 if dtype in NARROWING else 18)
    for kernel, loops in kernels.items():
        writes = kernel.name == "gradient" or kernel.step in (REREAD, RESIDENT)
        collects = kernel.name != "gradient"
        assert sorted(loop.writes for loop in loops) == [False] * collects + [True] * writes, kernel
        for vectors in loops:
            # Of 32 bytes at any multiple of 4, the compiler may take the last ones by 8.
            assert count(vectors.loop.instructions, HALF if dtype in NARROWING else NARROW) == 0, kernel
            # Every element goes through an exponential and one of the accesses.
            half = (dtype in NARROWING and vectors.writes) or not dtype.startswith("float32")
            assert count(vectors.turn, EXPONENTIAL) == vectors.accesses * (8 if half else 4), kernel
            if kernel.step == RESIDENT:  # the row is read from memory once, by asynchronous copies
                assert count(vectors.loop.instructions, r"LDG\b") == 0, kernel


@pytest.mark.parametrize("dtype", BUDGET)
def test_the_loops_keep_within_the_arithmetic_that_memory_leaves_time_for(dtype: str) -> None:
    """More terms must not cost more than plain cross-entropy, and they do as soon as arithmetic is what bounds them."""
    if "sm_90" not in built_archs():
        pytest.skip(f"the build is for {built_archs()}")
    for kernel, loops in loops_of(dtype, "sm_90").items():
        if kernel.step == RESIDENT:
            elements = 4 if dtype == "float32" else 8
            spent = sum(len(vectors.turn) / (vectors.accesses * elements) for vectors in loops)
            ceiling = BUDGET[dtype][kernel.depth]
            assert 0.9 * ceiling < spent <= ceiling, f"{spent} {kernel}"  # a ceiling far above is none


# ---- the checks can fail --------------------------------------------------------------------------------------------

FAULTY = """
#include "table.h"
namespace objkern::cuda {
extern "C" __global__ void __launch_bounds__(256, 8) crowded_gradient_kernel(const __grid_constant__ GradientCall call) {
  float sums[64];
  for (int i = 0; i < 64; ++i) sums[i] = static_cast<const float*>(call.upstream)[threadIdx.x + i * 256];
  __syncthreads();
  for (int k = 0; k < 4; ++k)
    for (int i = 0; i < 64; ++i) sums[i] = sums[i] * sums[(i * 7 + 3) % 64] + 1.0f;
  for (int i = 0; i < 64; ++i) static_cast<float*>(call.gradient)[threadIdx.x + i * 256] = sums[i];
}
extern "C" __global__ void indexed_gradient_kernel(const __grid_constant__ GradientCall call) {
  float numbers[32];
  for (int i = 0; i < 32; ++i) numbers[i] = static_cast<const float*>(call.upstream)[i] * threadIdx.x;
  for (int i = 0; i < call.fields; ++i) numbers[(i * call.lanes) % 32] += 1.0f;
  static_cast<float*>(call.gradient)[threadIdx.x] = numbers[(call.lanes + threadIdx.x) % 32];
}
extern "C" __global__ void narrow_gradient_kernel(const __grid_constant__ GradientCall call) {
  const BFloat16* x = static_cast<const BFloat16*>(call.rows.logits);
  BFloat16* out = static_cast<BFloat16*>(call.gradient);
#pragma unroll 1
  for (int v = threadIdx.x; v < call.items; v += 256) {
    float z[8], d[8];
    unpack<BFloat16>(load128(x + 8 * v), z);
    for (int i = 0; i < 8; ++i) d[i] = exp_nonpositive<BFloat16>(z[i]);
    for (int i = 0; i < 8; ++i) out[8 * v + i + 1] = narrowed<BFloat16>(d[i]);
  }
}
}  // namespace objkern::cuda
"""


def test_the_checks_see_what_they_are_for(tmp_path: Path) -> None:
    """A kernel with too few registers, one that indexes an array at run time, and one that stores element by element."""
    source, cubin = tmp_path / "faulty.cu", tmp_path / "faulty.cubin"
    source.write_text(FAULTY)
    command = [
        NVCC, "-O3", "-std=c++20", "-arch=sm_90", "--expt-relaxed-constexpr", f"-I{ROOT}/csrc/cuda", "-cubin",
        "-o", str(cubin), str(source),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    usage = dump(cubin, "-res-usage")
    stacks = {name: int(size) for name, size in re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+)", usage)}
    assert stacks["crowded_gradient_kernel"] > 0
    assert stacks["indexed_gradient_kernel"] > 0
    assert stacks["narrow_gradient_kernel"] == 0
    (kernels,) = kernels_in(usage).values()  # a cubin is of one architecture and does not say which
    assert len(problems(kernels, "bfloat16")) == 2
    greedy = Kernel("cluster", PLAIN, False, RESIDENT, 96, 0)
    assert "too many for 3 blocks" in problems([greedy], "bfloat16")[0]
    (narrow,) = functions(cubin, nvdisasm(), "narrow_gradient_kernel").values()
    (vectors,) = vector_loops(narrow)
    assert not vectors.writes  # no store of 16 bytes
    assert count(vectors.loop.instructions, NARROW) == 8
