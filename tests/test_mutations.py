"""A test that still passes when the kernel is wrong is no test: each named fault, planted in the C++, must be caught."""

import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import build_cuda

from .faults import ROOT, VARIABLE, Replacement, copy_python, plant

pytestmark = pytest.mark.slow

ROWS = [f"tests/test_{name}.py" for name in ("kernels", "pitfalls", "precision", "terms")]
ELEMENTS = ["tests/test_elementwise.py"]

FAULTS = {
    "target gradient from 1 − p_y": Replacement(
        "objective.h", "g.target_grad = g.target_grad + f.logprob * ⟦o.p_others⟧;", "R(1) - o.p_target"
    ),
    "no entropy gradient": Replacement("objective.h", "g.exp_t = g.exp_t - f.entropy * r;", ""),
    "pieces merged without rescaling": Replacement("objective.h", "sum.sum_e += ⟦factor * low.sum_e⟧;", "low.sum_e"),
    "maximum not subtracted": Replacement("cpu/wide.h", "const V t_ = ⟦v - max⟧, e_ = exp_nonpositive(t_);", "v"),
    "tail off by one": Replacement("cpu/wide.h", "⟦count - j - i * W::kPack⟧, -std", "count - 1 - j - i * W::kPack"),
    "padding counted as logits": Replacement(
        "cpu/wide.h", "⟦-std::numeric_limits<float>::infinity()⟧, block.pack[i]);", "0.0f"
    ),
    "target counted among the others": Replacement("cpu/wide.h", "if (⟦holds(j, hole)⟧) [[unlikely]]", "false"),
    "sums not rescaled to a larger maximum": Replacement("cpu/wide.h", "e = e * factor;", ""),
    "Σ t not moved to a larger maximum": Replacement("cpu/wide.h", "if (⟦counted() > 0⟧) t_shift", "false"),
    "−inf between the first and the last block not noticed": Replacement(
        "cpu/wide.h", "if (⟦!careful⟧ && !std::isfinite", "false"
    ),
    "no aligned head": Replacement("cpu/wide.h", "if (⟦head > 0⟧) some(begin, head);", "false"),
    "sums without the first tile": Replacement("cpu/tile.h", "for (size_t i = ⟦0⟧; i < of_tiles.size();", "fields"),
    "narrow weights of the gradient left out": Replacement("cpu/narrow.h", "d = at::vec::fmadd(g.const_w, w, d);", ""),
    "rows assumed to be dense": Replacement("cpu/wide.h", "row * ⟦in.row_stride⟧", "in.classes"),
    "narrow rows assumed to be dense": Replacement(
        "cpu/narrow.h", "row * ⟦in.row_stride⟧, in.row_stride, count, z", "in.classes"
    ),
    "narrow target counted among the others": Replacement(
        "cpu/narrow.h", "found = found + ⟦V::blendv(one, zero, out)⟧;", "one"
    ),
    "upstream gradient of the first row for all": Replacement("cpu/kernels.cpp", "upstream[⟦row * stride⟧]", "0"),
    "ignored rows not skipped": Replacement(
        "cpu/tile.h", "⟦in.target[row] == in.ignore_index⟧;", "in.target[row] < 0 && in.target[row] == in.ignore_index"
    ),
    "weights read from their beginning": Replacement("cpu/elementwise.h", "first = ⟦i % period⟧;", "0"),
    "padding counted as elements": Replacement(
        "cpu/elementwise.h", "⟦count == kBlock ? value : V::set(V(A(0)), value, there(count, v))⟧", "value"
    ),
    "the gradient of a block of elements added to the next": Replacement(
        "cpu/elementwise.h", "if (⟦kWrites⟧) std::fill(gradient_", "false"
    ),
    "the binary gradient from σ(z) − y": Replacement(
        "elementwise.h", "(⟦no * odds.sigmoid_plus - yes * odds.sigmoid_minus⟧)", "odds.sigmoid_plus - yes"
    ),
}


def build(folder: Path) -> None:
    """The library with every fault, made as the build under test made its baseline kernels."""
    plant(folder / "csrc", ([fault] for fault in FAULTS.values()))
    copy_python(folder)
    ninja = max(ROOT.glob("build/temp*/kernels/build.ninja"), key=lambda path: path.stat().st_mtime)
    text = ninja.read_text()
    command = re.search(r"command = (.*)", text)[1]
    flags = re.search(r"build \S*kernels_default\.o: cxx \S+\n  flags = (.*)", text)[1]
    target = folder / "kernels.o"
    for name, value in {"$out": target, "$in": folder / "csrc/cpu/kernels.cpp", "$flags": flags}.items():
        command = command.replace(name, str(value))
    command = command.replace("-O3", "-O1").replace(f"-I{ROOT}/csrc", f"-I{folder}/csrc")
    others = [path for path in ninja.parent.glob("*.o") if path.name != "kernels_default.o"]
    # Of the newest build: those with CUDA and without have folders of their own.
    newest = max(ninja.parent.parent.glob("**/csrc/autograd.o"), key=lambda path: path.stat().st_mtime)
    bindings = newest.parent.glob("*.o")
    library = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    torch_lib = Path(torch.__file__).parent / "lib"
    link = ["c++", "-shared", "-fopenmp", "-o", folder / "objkern" / library, *bindings, target, *others]
    link += [f"-L{torch_lib}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    if any(path.name.startswith("cuda_") for path in others):
        toolkit = build_cuda.inspect(build_cuda.find_nvcc(os.environ), build_cuda.host_compiler(os.environ))
        link += [f"-L{toolkit.libraries}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    for step in (["sh", "-c", command], [str(part) for part in link]):
        done = subprocess.run(step, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]


# Where to look first, for faults that the first tests do not notice.
FIRST = {
    "target gradient from 1 − p_y": "precision",
    "rows assumed to be dense": "pitfalls",
    "narrow rows assumed to be dense": "pitfalls",
    "upstream gradient of the first row for all": "pitfalls",
    "ignored rows not skipped": "pitfalls",
}


def outcome(number: int, folder: Path) -> tuple[int, str]:
    """Wake a fault (0: none) and run the tests that should notice; pytest's exit status and the end of its output."""
    tests = [*ELEMENTS, *ROWS]
    if number > 0:
        name, fault = list(FAULTS.items())[number - 1]
        tests = ELEMENTS if fault.file.endswith("elementwise.h") else ROWS
        tests = sorted(tests, key=lambda path: path != f"tests/test_{FIRST.get(name, 'kernels')}.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests],
        cwd=folder, capture_output=True, text=True, timeout=600,
        env={"PATH": "/usr/bin:/bin", "OBJKERN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1",
             VARIABLE: str(number)},
    )  # fmt: skip
    return done.returncode, done.stdout[-2000:]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """All faults, two at a time, and none."""
    folder = tmp_path_factory.mktemp("planted")
    build(folder)
    names = ["no fault", *FAULTS]
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda number: outcome(number, folder), range(len(names)))
        return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str, outcomes: dict[str, tuple[int, str]]) -> None:
    status, output = outcomes[name]
    assert status == 1, f"the tests did not notice: {name}\n{output}"
    assert " failed" in output


def test_the_copy_without_a_fault_passes(outcomes: dict[str, tuple[int, str]]) -> None:
    status, output = outcomes["no fault"]
    assert status == 0, output
