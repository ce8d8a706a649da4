"""The memory of large gradients is used again, and never while somebody holds it."""

import os

import pytest
import torch

import objkern
from objkern import _C, CrossEntropy

BIG = (300, 2000)  # 2.4 MB in float32


@pytest.fixture(autouse=True)
def _clean():
    limit = objkern.buffer_limit()
    objkern.release_buffers()
    yield
    objkern.set_buffer_limit(limit)
    objkern.release_buffers()


def gradient(z: torch.Tensor) -> torch.Tensor:
    x = z.requires_grad_()
    (g,) = torch.autograd.grad(CrossEntropy()(x, torch.zeros(len(x), dtype=torch.long)), x)
    return g


def test_a_freed_gradient_serves_the_next_one() -> None:
    z = torch.randn(BIG)
    first = gradient(z)
    expected, place = first.clone(), first.data_ptr()
    assert _C.kept_bytes() == 0
    del first
    assert _C.kept_bytes() >= z.nbytes
    second = gradient(z)
    assert second.data_ptr() == place
    assert torch.equal(second, expected)
    assert _C.kept_bytes() == 0


def test_gradients_that_live_together_do_not_share() -> None:
    z = torch.randn(BIG)
    a, b = gradient(z), gradient(2 * z)
    view = a[3]
    kept = a.clone()
    assert a.data_ptr() != b.data_ptr()
    del a  # the view still holds the memory
    c = gradient(3 * z)
    assert torch.equal(view, kept[3])
    assert c.data_ptr() not in (view.data_ptr(), b.data_ptr())


def test_smaller_batches_fit_and_larger_ones_replace() -> None:
    del_me = gradient(torch.randn(BIG))
    place = del_me.data_ptr()
    del del_me
    small = gradient(torch.randn(200, 2000))
    assert small.data_ptr() == place
    del small
    large = gradient(torch.randn(900, 2000))
    assert _C.kept_bytes() == 0, "the one that was too small went back"
    assert large.shape == (900, 2000)


def test_what_is_kept_is_bounded() -> None:
    live = [gradient(torch.randn(BIG)) for _ in range(4)]
    size = live[0].nbytes
    del live
    assert size * 2 <= _C.kept_bytes() <= 2 * (size + 4096)
    objkern.set_buffer_limit(_C.kept_bytes())
    assert _C.kept_bytes() >= size * 2
    objkern.set_buffer_limit(size)
    assert _C.kept_bytes() <= size
    objkern.set_buffer_limit(0)
    assert objkern.buffer_limit() == 0
    gradient(torch.randn(BIG))
    assert _C.kept_bytes() == 0
    with pytest.raises(ValueError, match="bytes: expected an int >= 0 of 64 bits but got -1"):
        objkern.set_buffer_limit(-1)


def test_a_small_gradient_does_not_hold_a_large_buffer() -> None:
    large = gradient(torch.randn(3000, 2000))
    size = large.nbytes
    del large
    small = gradient(torch.randn(BIG))
    assert _C.kept_bytes() >= size
    assert small.untyped_storage().nbytes() == small.nbytes


def test_a_buffer_serves_what_has_its_size_or_a_quarter_of_it() -> None:
    large = gradient(torch.randn(4096, 512))  # 8 MiB: no part of a page is left
    place = large.data_ptr()
    del large
    for rows, served in ((4096, True), (1024, True), (1023, False)):
        found = gradient(torch.randn(rows, 512))
        assert (found.data_ptr() == place) == served
        del found


def test_sizes_are_those_of_what_is_held_now() -> None:
    for rows in (300, 400, 350, 500):  # the system may give the same address again
        objkern.release_buffers()
        g = gradient(torch.randn(rows, 2000))
        size = g.nbytes
        del g
        assert size <= _C.kept_bytes() < size + 4096


def test_the_limit_is_an_eighth_of_the_memory() -> None:
    assert objkern.buffer_limit() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8


def test_small_gradients_are_not_kept() -> None:
    gradient(torch.randn(10, 10))
    assert _C.kept_bytes() == 0


def test_a_gradient_is_an_ordinary_tensor() -> None:
    g = gradient(torch.randn(BIG))
    copy = g.clone()
    g.resize_(400, 2000)
    assert torch.equal(g[:300], copy)
    assert torch.equal(torch.from_numpy(g.numpy())[:300], copy)
