"""The CUDA kernels in machine code, on a machine without a GPU: registers, spills and the width of accesses.

The objects of the build under test hold the code of every architecture that it was built for. What is looked at here is
what a compiler may silently get wrong: a kernel that spills or that reads element by element gives the right numbers.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from objkern import _C

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
WANTED = ("sm_80", "sm_90", "sm_100")  # of the wheel
DTYPES = ("float32", "float64", "bfloat16", "float16")
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


def dump(path: Path, *options: str) -> str:
    done = subprocess.run([cuobjdump(), *options, str(path)], capture_output=True, text=True, check=True)
    return done.stdout


def described(mangled: str, registers: int, stack: int) -> Kernel:
    name = re.search(r"(cluster|lanes|gradient|chain|count)_kernel", mangled)[1]
    flags = re.search(r"5DepthE(\d)ELb(\d)E(?:LNS\w+4PassE(\d))?", mangled)
    if flags is None:
        return Kernel(name, None, False, None, registers, stack)
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


@functools.cache
def built(dtype: str) -> Path:
    objects = list(ROOT.glob(f"build/temp*/kernels/cuda_rows_{dtype}.o"))
    return max(objects, key=lambda path: path.stat().st_mtime)


def built_archs() -> list[str]:
    return ["sm_" + arch.split("+")[0].replace(".", "") for arch in _C.build_info()["cuda_archs"].split(";")]


def blocks_planned(kernel: Kernel, dtype: str) -> int:
    """Blocks that a multiprocessor is to hold at once: the plan of docs/kernels.md, in the words of the test."""
    if kernel.name in ("chain", "count"):
        return 2
    if dtype == "float64" or kernel.transform or kernel.depth == FULL:
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
    for dtype in DTYPES:
        assert set(kernels_in(dump(built(dtype), "-res-usage"))) == set(WANTED)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_kernel_spills_and_every_plan_fits(dtype: str) -> None:
    """A spill is a round trip through local memory in a loop whose budget is the memory's; it shows in no result."""
    found = kernels_in(dump(built(dtype), "-res-usage"))
    assert set(found) >= set(built_archs())
    for arch, kernels in found.items():
        assert len(kernels) == (10 if dtype == "float64" else 34), arch
        assert problems(kernels, dtype) == [], arch


# ---- the loops ------------------------------------------------------------------------------------------------------


class Loop(NamedTuple):
    body: list[str]

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.body)


def functions(sass: str) -> dict[str, list[tuple[int, str]]]:
    """Each function's instructions with their addresses."""
    found: dict[str, list[tuple[int, str]]] = {}
    for line in sass.splitlines():
        if words := re.search(r"Function : (\S+)", line):
            code = found.setdefault(words[1], [])
        elif words := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            code.append((int(words[1], 16), words[2].strip()))
    return found


def innermost_loops(code: list[tuple[int, str]]) -> list[Loop]:
    spans = []
    for address, text in code:
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if jump and int(jump[1], 16) <= address:
            spans.append((int(jump[1], 16), address))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [Loop([text for address, text in code if begin <= address <= end]) for begin, end in inner]


def vector_loops(code: list[tuple[int, str]]) -> list[Loop]:
    """The loops over the vectors of a row: those that compute exponentials out of 16-byte accesses."""
    loops = innermost_loops(code)
    return [loop for loop in loops if loop.count("MUFU.EX2") and loop.count(r"(LDG|LDS|LD)\.\S*128")]


NARROW = r"\b(LDG|STG)\.(?!\S*128)"
SPILL = r"\b(LDL|STL)\b"


@functools.cache
def code_of(dtype: str, arch: str) -> dict[str, list[tuple[int, str]]]:
    return functions(dump(built(dtype), "-sass", "-arch", arch))


@pytest.mark.parametrize(("dtype", "arch"), [("bfloat16", "sm_80"), ("bfloat16", "sm_90"), ("bfloat16", "sm_100"), ("float16", "sm_90"), ("float32", "sm_90")])  # fmt: skip
def test_the_body_of_a_row_moves_16_bytes_at_a_time(dtype: str, arch: str) -> None:
    """A masked tail turned every access of a body into 2 bytes, and a kernel into a quarter of its speed."""
    if arch not in built_archs():
        pytest.skip(f"the build is for {built_archs()}")
    checked = 0
    for mangled, code in code_of(dtype, arch).items():
        kernel = described(mangled, 0, 0)
        assert not any(re.search(SPILL, text) for _, text in code), mangled
        if kernel.depth in (None, FULL) or kernel.transform:
            continue
        loops = vector_loops(code)
        writes = kernel.name == "gradient" or kernel.step in (REREAD, RESIDENT)
        stores = [loop for loop in loops if loop.count(r"\bSTG\.\S*128")]
        assert len(loops) >= (1 if kernel.name == "gradient" or not writes else 2), mangled
        assert bool(stores) == writes, mangled
        for loop in loops:
            assert loop.count(NARROW) == 0, mangled
        if kernel.step == RESIDENT:
            assert any(re.search(r"LDGSTS\S*\.128", text) for _, text in code), mangled
            assert all(loop.count(r"\bLDG\b") == 0 for loop in loops), f"{mangled} reads the row twice"
        checked += 1
    assert checked == 18  # 3 depths × (3 of clusters, 2 of lanes, 1 gradient)


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
    code = functions(dump(cubin, "-sass"))
    assert any(re.search(SPILL, text) for _, text in code["crowded_gradient_kernel"])
    (loop,) = vector_loops(code["narrow_gradient_kernel"])
    assert loop.count(NARROW) == 8
    assert loop.count(r"\bSTG\.\S*128") == 0
