"""The suite for CUDA devices: `pytest tests/gpu`. Without a device every test of it is skipped.

    OBJKERN_GPU_TESTS=DEVICE:BACKENDS    where and what to test; default cuda:cuda,triton,reference

`OBJKERN_GPU_TESTS=cpu:cpu,reference` is a dry run of the tests themselves: whatever does not need a real device runs
on the CPU, so that the suite does not rot between two GPUs. tests/test_gpu_suite.py does so for a part of it.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import objkern
from objkern import _C

HERE = Path(__file__).parent
DEVICE, _, _names = os.environ.get("OBJKERN_GPU_TESTS", "cuda:cuda,triton,reference").partition(":")
BACKENDS = _names.split(",")
NATIVE = [name for name in BACKENDS if name != "reference"]

FAILED = pytest.StashKey[str]()


def there_is_a_device() -> bool:
    with warnings.catch_warnings():  # of a driver that is too old for this torch
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real_device: needs streams, graphs or the memory of a CUDA device")
    config.addinivalue_line("markers", "once: is about no backend in particular, so that one run of several has it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = pytest.mark.skip(reason="there is no CUDA device")
    stand_in = pytest.mark.skip(reason="needs a CUDA device, and this is a dry run on a stand-in")
    elsewhere = pytest.mark.skip(reason="is about no backend in particular, and runs with the CUDA backend's tests")
    missing = DEVICE == "cuda" and not there_is_a_device()
    for item in items:
        if HERE not in item.path.parents:
            continue
        if missing:
            item.add_marker(absent)
        elif DEVICE != "cuda" and item.get_closest_marker("real_device"):
            item.add_marker(stand_in)
        elif DEVICE == "cuda" and BACKENDS[0] != "cuda" and item.get_closest_marker("once"):
            item.add_marker(elsewhere)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` is each of the kernels, `any_backend` also the reference."""
    for name, values in (("backend", NATIVE), ("any_backend", BACKENDS)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, indirect=True)


@lru_cache
def why_not(backend: str) -> str | None:
    """Why a backend cannot run on the device; None if it can."""
    x = torch.zeros(2, 3, device=DEVICE, requires_grad=True)
    try:
        objkern.CrossEntropy()(x, torch.zeros(2, dtype=torch.long, device=DEVICE), backend=backend).backward()
    except Exception as error:  # the reason is reported, whatever it is
        return f"{type(error).__name__}: {error}"
    return None


def is_promised(backend: str) -> bool:
    """Whether this build should be able to run it, so that a failure is one and no absence."""
    if backend == "cuda":
        return _C.build_info().get("cuda_archs") is not None
    if backend == "triton":
        return all(importlib.util.find_spec(name) for name in ("triton", "objkern.triton"))
    return True


def runnable(name: str) -> str:
    if (reason := why_not(name)) is not None:
        pytest.skip(f"{name} cannot run here, see test_the_backend_runs: {reason}")
    return name


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    return runnable(request.param)


@pytest.fixture
def any_backend(request: pytest.FixtureRequest) -> str:
    return runnable(request.param)


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if (failed := item.config.stash.get(FAILED, None)) and HERE in item.path.parents:
        pytest.exit(f"the device failed in {failed}; nothing after that would mean anything", returncode=3)


@pytest.fixture(autouse=True)
def _settled(request: pytest.FixtureRequest) -> Iterator[None]:
    """A kernel that fails does so later, in whatever waits for the device next: that must be its own test."""
    yield
    if DEVICE == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            request.config.stash[FAILED] = request.node.nodeid
            pytest.fail(f"the device failed: {error}", pytrace=False)
