"""A test that still passes when the kernel is wrong is no test: each named fault, planted in the C++, must be caught."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import build_cuda

ROOT = Path(__file__).parent.parent
CAUGHT_BY = ["tests/test_terms.py", "tests/test_kernels.py", "tests/test_pitfalls.py", "tests/test_precision.py"]

# name: (file, the line's text, what stands there instead)
FAULTS = {
    "target gradient from 1 − p_y": (
        "objective.h", "g.target_grad = g.target_grad + f.logprob * o.p_others;", "g.target_grad = g.target_grad + f.logprob * (R(1) - o.p_target);",
    ),
    "no entropy gradient": ("objective.h", "g.exp_t = g.exp_t - f.entropy * r;", ""),
    "pieces merged without rescaling": ("objective.h", "sum.sum_e += factor * low.sum_e;", "sum.sum_e += low.sum_e;"),
    "maximum not subtracted": ("cpu/wide.h", "const V t_ = v - max, e_ = exp_nonpositive(t_);", "const V t_ = v, e_ = exp_nonpositive(t_);"),
    "tail off by one": ("cpu/wide.h", "count - j - i * W::kPack, -std", "count - 1 - j - i * W::kPack, -std"),
    "padding counted as logits": ("cpu/wide.h", "-std::numeric_limits<float>::infinity(), block.pack[i]);", "0.0f, block.pack[i]);"),
    "target counted among the others": ("cpu/wide.h", "if (holds(j, hole)) [[unlikely]]", "if (false)"),
    "sums not rescaled to a larger maximum": ("cpu/wide.h", "e = e * factor;", ""),
    "Σ t not moved to a larger maximum": ("cpu/wide.h", "if (counted() > 0) t_shift", "if (false) t_shift"),
    "−inf between the first and the last block not noticed": ("cpu/wide.h", "if (!careful && !std::isfinite", "if (false && !std::isfinite"),
    "no aligned head": ("cpu/wide.h", "if (head > 0) some(begin, head);", ""),
    "sums without the first tile": ("cpu/tile.h", "for (size_t i = 0; i < of_tiles.size();", "for (size_t i = fields; i < of_tiles.size();"),
    "narrow weights of the gradient left out": ("cpu/narrow.h", "d = at::vec::fmadd(g.const_w, w, d);", ""),
    "rows assumed to be dense": ("cpu/wide.h", "row * in.row_stride", "row * in.classes"),
    "narrow rows assumed to be dense": ("cpu/narrow.h", "row * in.row_stride, in.row_stride, count, z", "row * in.classes, in.classes, count, z"),
    "narrow target counted among the others": ("cpu/narrow.h", "found = found + V::blendv(one, zero, out);", "found = found + one;"),
    "upstream gradient of the first row for all": ("cpu/kernels.cpp", "upstream[row * stride]", "upstream[0]"),
    "ignored rows not skipped": ("cpu/tile.h", "in.target[row] == in.ignore_index;", "in.target[row] < 0 && in.target[row] == in.ignore_index;"),
}  # fmt: skip


def build_command(mutant: Path) -> tuple[list[str], list[str]]:
    """How the build that is under test made its baseline kernels, redirected to the mutant's source; and the link."""
    ninja = max(ROOT.glob("build/temp*/kernels/build.ninja"), key=lambda path: path.stat().st_mtime)
    text = ninja.read_text()
    command = re.search(r"command = (.*)", text)[1]
    flags = re.search(r"build \S*kernels_default\.o: cxx \S+\n  flags = (.*)", text)[1]
    target = mutant / "kernels.o"
    for name, value in {"$out": target, "$in": mutant / "csrc/cpu/kernels.cpp", "$flags": flags}.items():
        command = command.replace(name, str(value))
    command = command.replace("-O3", "-O1").replace(f"-I{ROOT}/csrc", f"-I{mutant}/csrc")
    others = [path for path in ninja.parent.glob("*.o") if path.name != "kernels_default.o"]
    # Of the newest build: those with CUDA and without have folders of their own.
    newest = max(ninja.parent.parent.glob("**/csrc/autograd.o"), key=lambda path: path.stat().st_mtime)
    bindings = newest.parent.glob("*.o")
    (library,) = (ROOT / "objkern").glob("_C*.so")
    torch_lib = Path(torch.__file__).parent / "lib"
    link = ["c++", "-shared", "-fopenmp", "-o", mutant / "objkern" / library.name, *bindings, target, *others]
    link += [f"-L{torch_lib}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    if any(path.name.startswith("cuda_") for path in others):
        toolkit = build_cuda.inspect(build_cuda.find_nvcc(os.environ), build_cuda.host_compiler(os.environ))
        link += [f"-L{toolkit.libraries}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    return ["sh", "-c", command], [str(part) for part in link]


def outcome(name: str, folder: Path) -> tuple[int, str]:
    """Plant the fault, build it, run the tests that should notice; pytest's exit status and the end of its output."""
    mutant = folder / re.sub(r"\W+", "_", name)
    shutil.copytree(ROOT / "csrc", mutant / "csrc")
    shutil.copytree(ROOT / "objkern", mutant / "objkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "tests", mutant / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", mutant)
    if name in FAULTS:
        file, old, new = FAULTS[name]
        path = mutant / "csrc" / file
        source = path.read_text()
        assert source.count(old) == 1, f"{name}: {old!r} stands {source.count(old)} times in {file}"
        path.write_text(source.replace(old, new))
    for command in build_command(mutant):
        subprocess.run(command, check=True, capture_output=True, text=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *CAUGHT_BY],
        cwd=mutant, capture_output=True, text=True, timeout=600,
        env={"PATH": "/usr/bin:/bin", "OBJKERN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout[-2000:]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """All faults, two at a time, and a copy without one."""
    folder = tmp_path_factory.mktemp("mutants")
    names = ["no fault", *FAULTS]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(lambda name: outcome(name, folder), names), strict=True))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str, outcomes: dict[str, tuple[int, str]]) -> None:
    status, output = outcomes[name]
    assert status == 1, f"the tests did not notice: {name}\n{output}"
    assert " failed" in output


def test_the_copy_without_a_fault_passes(outcomes: dict[str, tuple[int, str]]) -> None:
    status, output = outcomes["no fault"]
    assert status == 0, output
