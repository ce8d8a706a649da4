"""The package without its native core: what runs, what says why not, and that Python says what the C++ says."""

import itertools
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import objkern
from objkern import _C, reads, without_core
from objkern.objective import Term

from . import check_wheel
from .faults import ROOT, copy_python

HOW = "docs/building.md says how to build them"


# ---- what is said twice ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["objkern", "objkern_triton"])
def test_the_schemas_are_those_of_the_core(family: str) -> None:
    schemas = without_core.KERNELS | (without_core.OTHERS if family == "objkern" else {})
    for name, schema in schemas.items():
        op, _, overload = name.partition(".")
        core = getattr(getattr(torch.ops, family), op)
        assert str(getattr(core, overload or "default")._schema) == str(
            torch._C.parse_schema(f"{family}::{name}{schema}")
        )
    names = {
        name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{family}::")
    }
    defined_in_python = {"parameter_penalty", "parameter_penalty_gradient"}
    assert {n for n in names if not n.startswith("linear_")} - defined_in_python == set(schemas)


def test_formulas_read_what_the_core_says_they_read() -> None:
    for kind, parameter in itertools.product(Term.by_kind, (0.0, 0.3)):
        assert reads.reads_of(kind, parameter) == _C.reads_of(kind, parameter), Term.by_kind[kind]
    for first, second in itertools.product(Term.by_kind, repeat=2):
        for parameter, weighted, dense in itertools.product((0.0, 0.3), (False, True), (False, True)):
            arguments = [first, parameter, 1.0, second, 0.0, 1.0], weighted, dense
            assert reads.row_gradient_fields(*arguments) == _C.row_gradient_fields(*arguments), arguments
    with pytest.raises(RuntimeError, match="term kind 99 is not known"):
        reads.reads_of(99.0, 0.0)


# ---- in a folder where nothing was built ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    folder = tmp_path_factory.mktemp("without_core")
    copy_python(folder)

    def run(*arguments: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=folder, env={**os.environ, "PYTHONPATH": ".", **environment},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.folder = folder
    return run


def test_what_was_asked_for_is_never_replaced(python: Callable[..., str]) -> None:
    code = """
import torch, objkern
objective = objkern.CrossEntropy(label_smoothing=0.1) + objkern.ZLoss()
z, y = torch.randn(4, 7, requires_grad=True), torch.arange(4)
objective(z, y, backend="reference").backward()
print(z.grad.abs().sum().item() > 0)
calls = {b: lambda b=b: objective(z, y, backend=b) for b in ("auto", "cpu", "cuda", "triton")}
calls["linear"] = lambda: objective.linear(torch.randn(4, 3), torch.randn(7, 3), y)
calls["drop-in"] = lambda: objkern.cross_entropy(z, y)
calls["elements"] = lambda: objkern.mse_loss(z, z.detach())
calls["buffers"] = objkern.release_buffers
for name, call in calls.items():
    try: call(); print(name, "ran")
    except Exception as error: print(name, type(error).__name__, str(error).replace(chr(10), " "))
model = torch.nn.Linear(2, 2)
print(objkern.L2(model)().item() > 0)  # eager torch, as on any device without kernels
"""
    first, *said, last = python("-c", code).splitlines()
    assert first == last == "True"
    said = {line.partition(" ")[0]: line for line in said}
    for name in ("auto", "cpu", "linear", "drop-in", "elements", "buffers"):
        assert "native kernels are not built here" in said[name], said[name]
        assert HOW in said[name]
        assert "circular" not in said[name]
    assert "its kernels are for CUDA tensors" in said["cuda"]
    assert "on the CPU its interpreter runs kernels for tests" in said["triton"]


def test_the_command_line_says_what_is_missing(python: Callable[..., str]) -> None:
    info = python("-m", "objkern", "info")
    assert "compiler           none: no native kernels" in info
    assert f"cpu backend        cannot run: objkern's native kernels are not built here. {HOW}" in info
    assert "cuda backend       cannot run: the native kernels are not built (docs/building.md)" in info
    assert "reference backend  runs on any device" in info
    assert "backends that can run here" in python("-m", "objkern", "--help")


def test_a_core_of_another_python_is_named(python: Callable[..., str]) -> None:
    other = python.folder / "objkern/_C.cpython-39-x86_64-linux-gnu.so"
    other.touch()
    try:
        assert f"; {other.name} belongs to another Python" in python("-m", "objkern", "info")
    finally:
        other.unlink()


def test_a_core_that_does_not_load_is_an_error(python: Callable[..., str]) -> None:
    """One that was built against another torch. Going on without it would be slow, and silent."""
    broken = python.folder / "objkern" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    broken.write_bytes(b"no library")
    try:
        found = python("-c", "try: import objkern\nexcept ImportError as error: print(error)")
        assert f"the native kernels do not load with torch {torch.__version__}: " in found
        assert "build them anew (docs/building.md)" in found
    finally:
        broken.unlink()


DERIVATIVES = """
import torch, objkern
from torch.autograd import grad
torch.manual_seed(0)
double = {"dtype": torch.float64, "requires_grad": True}
z, y = torch.randn(3, 5, **double), torch.tensor([0, 4, -100])
q, teacher = torch.rand(3, 5, **double), torch.randn(3, 5, **double)
scale, coefficient = torch.tensor(1.5, **double), torch.tensor(0.3, **double)
hidden, weight = torch.randn(3, 2, **double), torch.randn(5, 2, **double)
x, t, w = torch.randn(2, 3, **double), torch.rand(2, 3, **double), torch.rand(3, **double)
rows = objkern.CrossEntropy(label_smoothing=0.1) + coefficient * objkern.ZLoss() - 0.1 * objkern.Entropy()
beside = objkern.CrossEntropy() + objkern.KLDivergence("reverse", temperature=2.0)
elements = objkern.BinaryCrossEntropy() + coefficient * objkern.Huber()
CALLS = {
    "labels": (lambda b: rows(z, y, logit_scale=scale, backend=b), (z, scale, coefficient)),
    "unreduced": (lambda b: rows(z, y, reduction="none", backend=b).dot(torch.arange(3.0, dtype=torch.float64)), (z, coefficient)),
    "forward": (lambda b: 2.0 * rows(z, y, gradient="forward", backend=b), (z, coefficient)),
    "probabilities": (lambda b: rows(z, q, backend=b), (z, q)),
    "reference": (lambda b: beside(z, y, reference=teacher, backend=b), (z, teacher)),
    "statistics": (lambda b: objkern.row_statistics(z, y, logit_scale=scale, backend=b).entropy.square().sum(), (z, scale)),
    "elements": (lambda b: elements(x, t, logit_scale=scale, backend=b), (x, t, scale, coefficient)),
    "elements, forward": (lambda b: 3.0 * elements(x, t, gradient="forward", backend=b), (x, t)),
    "linear": (lambda b: rows.linear(hidden, weight, y, backend=b), (hidden, weight, coefficient)),
}
def everything(call, inputs, b):
    first = grad(call(b), inputs)  # by the kernels
    again = grad(call(b), inputs, create_graph=True)
    second = grad(sum((g * (k + 1)).sin().sum() for k, g in enumerate(again)), inputs, allow_unused=True)
    alone = grad(call(b), inputs[0], create_graph=True)[0]  # the gradient op has a derivative of its own
    return [call(b), *first, *again, *(s for s in second if s is not None), *grad(alone.sin().sum(), inputs[0])]
for name, (call, inputs) in CALLS.items():
    ours, theirs = (everything(call, inputs, b) for b in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10, msg=lambda m: f"{name}: {m}")
    loss = call("triton")
    if name.endswith("forward"):  # handed over once, computed anew the second time
        torch.testing.assert_close(grad(loss, inputs[:1], retain_graph=True), grad(loss, inputs[:1]))
half = z.detach().bfloat16().requires_grad_()
(2.0 * rows(half, y, gradient="forward", backend="triton")).backward()
torch.testing.assert_close(half.grad.double(), 2 * grad(rows(z, y, backend="reference"), z)[0], rtol=0.05, atol=0.01)
for tangent in (z, z.detach()):
    with torch.autograd.forward_ad.dual_level():
        try: rows(torch.autograd.forward_ad.make_dual(tangent, tangent), y, backend="triton")
        except (RuntimeError, NotImplementedError) as error: print("refused")
try: torch.func.jvp(lambda z: rows(z, y, backend="triton"), (z.detach(),), (z.detach(),))
except NotImplementedError as error: print("refused")
try: torch.func.jvp(lambda x: elements(x, t, backend="triton"), (x.detach(),), (x.detach(),))
except NotImplementedError as error: print("refused")
try: torch.func.jvp(lambda z: objkern.row_statistics(z, y, backend="triton").lse, (z.detach(),), (z.detach(),))
except NotImplementedError as error: print("refused")
try: torch.ops.objkern_triton.objective([1.0, 0.0, 1.0], 1, z, coefficient_tensor=coefficient[None])
except ValueError as error: print(error)
print(objkern.native._C)
"""


def test_triton_has_its_derivatives(python: Callable[..., str]) -> None:
    """First ones by its kernels, interpreted; second ones by the reference; against the reference in all."""
    pytest.importorskip("triton")
    *said, core = python("-W", "ignore", "-c", DERIVATIVES, TRITON_INTERPRET="1").splitlines()
    assert core == "None"
    assert "pass with_parts" in said[-1]
    assert said[:-1] == ["refused"] * 5  # forward mode: a tangent must not be lost


@pytest.mark.trust
def test_the_interpreted_kernels_agree_with_the_reference(python: Callable[..., str]) -> None:
    """All of tests/interpreted but what compares with the CPU's kernels."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/interpreted/cases.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": "."}
    done = subprocess.run(command, cwd=python.folder, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-6000:]


# ---- building -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CXX": "/nowhere/g++"}, "there is no C++ compiler: /nowhere/g++ is no program"),
        ({"CXX": "false"}, "false compiles no C++20 with Python's headers"),
        ({"OBJKERN_NATIVE": "no"}, 'OBJKERN_NATIVE: expected "0" or "1" but got "no"'),
    ],
)
def test_a_build_without_a_compiler_says_what_to_do(environment: dict[str, str], said: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path)], cwd=ROOT,
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert said in done.stderr
    assert "OBJKERN_NATIVE" in done.stderr


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (
            "import setuptools; setuptools.__version__ = '65.5.0'",
            'setuptools is 65.5.0; first: pip install "setuptools>=77"',
        ),
        ("import sys; sys.modules['torch'] = None", "there is no torch to build against; first: pip install torch"),
    ],
)
def test_an_environment_that_lacks_what_builds_says_so(before: str, said: str) -> None:
    """As a new virtual environment does, where pip is told to build with what is there."""
    code = f"{before}; import runpy; runpy.run_path('setup.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith(f"objkern: {said}")


def test_the_wheel_without_kernels(tmp_path: Path) -> None:
    """It belongs to no Python version and no machine, holds the Python files alone, and lists what it needs."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "build", "-b", str(tmp_path / "build"),
         "bdist_wheel", "-b", str(tmp_path / "bdist"), "-d", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "OBJKERN_NATIVE": "0", "CXX": "/nowhere/g++", "PATH": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"objkern-{objkern.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert check_wheel.content_problems(archive.namelist(), native=False) == []
        assert check_wheel.bill_problems(archive, native=False, cuda=None) == []
