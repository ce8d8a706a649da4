"""Nothing waits for the device, everything runs on the stream and the device of its tensors, graphs capture it."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

import objkern

from .calls import CALLS, Call
from .conftest import why_not
from .rows import EVERYTHING, GRADIENT, REGULARIZED, rows_on, upstream_of, value_and_gradient

pytestmark = pytest.mark.real_device


def each_call(test: Callable[..., None]) -> Callable[..., None]:
    for mark in (
        pytest.mark.parametrize("name", CALLS),
        pytest.mark.parametrize("gradient", GRADIENT),
        pytest.mark.parametrize("classes", [9, 1003, 50257]),
    ):
        test = mark(test)
    return test


def call_for(device: torch.device, classes: int, name: str, gradient: str) -> Call:
    if gradient == "forward" and name in ("rows", "custom"):
        pytest.skip("has no forward gradient")
    return Call(device, classes, name)


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    with warnings.catch_warnings():  # that the mode is a prototype and does not see every way to wait
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(run: Callable[[], list[torch.Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """A graph of what runs, warmed up on a side stream as torch asks, and the tensors that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    return graph, captured


@each_call
def test_nothing_waits_for_the_device(
    classes: int, gradient: str, name: str, device: torch.device, backend: str
) -> None:
    """20: `.item()` or `torch.equal` in the hot path: the host waits, and the device idles after it."""
    call = call_for(device, classes, name, gradient)
    z, y = call.inputs(device, classes, torch.bfloat16, 0)
    x = z.requires_grad_()
    call(x, y, gradient=gradient, backend=backend)  # compiles, loads
    with no_waiting():
        call(x, y, gradient=gradient, backend=backend)
        REGULARIZED(x.detach(), y, backend=backend) if not call.dense else None  # without a gradient
        objkern.row_statistics(x.detach(), y, backend=backend) if not call.dense else None


@pytest.mark.once
def test_the_drop_in_does_not_wait(device: torch.device) -> None:
    if why_not("auto") is not None:
        pytest.skip(f"no native backend can run here: {why_not('auto')}")
    z, y = rows_on(device, 11, 1003, torch.bfloat16)
    value_and_gradient(objkern.cross_entropy, z, y)
    with no_waiting():
        value_and_gradient(objkern.cross_entropy, z, y)


@each_call
def test_a_graph_captures_and_replays(
    classes: int, gradient: str, name: str, device: torch.device, backend: str
) -> None:
    """20: captured once; replayed with other logits, labels and coefficients, it gives what a fresh call gives."""
    call = call_for(device, classes, name, gradient)
    z, y = call.inputs(device, classes, torch.bfloat16, 0)
    x, y = z.clone().requires_grad_(), y.clone()
    run = lambda: call(x, y, gradient=gradient, backend=backend)  # noqa: E731
    graph, captured = capture(run)
    for seed in (0, 5, 9):
        new_z, new_y = call.inputs(device, classes, torch.bfloat16, seed)
        x.data.copy_(new_z)
        y.copy_(new_y)
        for number in [*call.numbers, *(leaf.data for leaf in call.leaves)]:
            number.mul_(1.25)
        graph.replay()
        found = [value.clone() for value in captured]
        for a, b in zip(found, run(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        graph.replay()  # and again, bit for bit
        for a, b in zip(captured, found, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("gradient", GRADIENT)
@pytest.mark.parametrize("classes", [9, 1003, 50257])
def test_a_side_stream_behind_a_long_kernel(classes: int, gradient: str, device: torch.device, backend: str) -> None:
    """21: launched on stream 0, it would read the logits before they are there."""
    z, y = rows_on(device, 64, classes, torch.bfloat16)
    expected = value_and_gradient(REGULARIZED, z, y, gradient=gradient, backend=backend)
    x = torch.zeros_like(z).requires_grad_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # tens of milliseconds
        x.data.copy_(z)
        loss = REGULARIZED(x, y, gradient=gradient, backend=backend)
        torch.cuda._sleep(100_000_000)
        (found,) = torch.autograd.grad(loss, x, upstream_of(loss))
    side.synchronize()
    assert torch.equal(loss.detach(), expected[0])
    assert torch.equal(found, expected[1])


@pytest.mark.parametrize("gradient", GRADIENT)
def test_another_device_than_the_current_one(gradient: str, backend: str) -> None:
    """21: tensors on cuda:1 while cuda:0 is current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    results = []
    for index in (0, 1):
        z, y = rows_on(torch.device("cuda", index), 64, 1003, torch.bfloat16)
        results.append(value_and_gradient(EVERYTHING, z, y, gradient=gradient, backend=backend))
        assert results[-1][1].device.index == index
    assert torch.cuda.current_device() == 0
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())


def test_threads_with_streams_of_their_own(device: torch.device, backend: str) -> None:
    """Workspaces and tables are nobody's alone."""
    from concurrent.futures import ThreadPoolExecutor

    batches = [rows_on(device, 33, 1003 + 7 * k, torch.bfloat16, seed=k) for k in range(8)]
    expected = [value_and_gradient(EVERYTHING, z, y, backend=backend) for z, y in batches]
    torch.cuda.synchronize()

    def work(k: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                found = value_and_gradient(EVERYTHING, *batches[k], backend=backend)
            torch.cuda.current_stream().synchronize()
        return all(torch.equal(a, b) for a, b in zip(found, expected[k], strict=True))

    with ThreadPoolExecutor(8) as executor:
        assert all(executor.map(work, range(8)))
