"""Any strides of logits and of upstream gradients; whose memory is whose."""

import pytest
import torch

from objkern import BinaryCrossEntropy, CrossEntropy, KLDivergence, custom

from ..conftest import DTYPES
from ..test_pitfalls import layouts
from .rows import EVERYTHING, GRADIENT, REGULARIZED, rows_on, value_and_gradient

BY_HAND = REGULARIZED + custom(lambda s: s.lse)


@pytest.mark.parametrize("name", ["transposed", "padded rows", "every other row", "every other class"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient", GRADIENT)
@pytest.mark.parametrize("classes", [9, 301, 4099])
def test_any_strides(
    classes: int, gradient: str, dtype: torch.dtype, name: str, device: torch.device, backend: str
) -> None:
    """11: the class stride was right and the row stride wrong. Padded rows also begin between 16-byte words."""
    z, y = rows_on(device, 6, classes, dtype)
    strided = layouts(z.cpu())[name]
    moved = torch.empty_strided(strided.size(), strided.stride(), dtype=dtype, device=device).copy_(strided)
    options = {"gradient": gradient, "backend": backend}
    for a, b in zip(*(value_and_gradient(REGULARIZED, x, y, **options) for x in (moved, z)), strict=True):
        assert a.is_contiguous()
        # The order of a row's sum depends on where the row begins within 16 bytes.
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(
            a, b, rtol=eps if a.dtype.itemsize == 2 else 4 * eps, atol=eps * b.abs().max().item()
        )


@pytest.mark.parametrize("offset", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_begin_anywhere(dtype: torch.dtype, offset: int, device: torch.device, backend: str) -> None:
    """Slices of a larger tensor start between 16-byte words; every row equals that row alone."""
    for classes in (33, 4099):
        memory, _ = rows_on(device, 1, 8 * (classes + 3) + 16, dtype)
        z = memory[0, offset : offset + 5 * (classes + 3)].view(5, classes + 3)[:, :classes]
        _, y = rows_on(device, 5, classes, dtype)
        together = value_and_gradient(EVERYTHING, z, y, reduction="none", backend=backend)
        alone = value_and_gradient(EVERYTHING, z.contiguous(), y, reduction="none", backend=backend)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a, b, rtol=4 * torch.finfo(a.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("classes", [19, 1003])
def test_expanded_logits_and_upstream_gradients(classes: int, device: torch.device, backend: str) -> None:
    """11: stride-0 rows, and the stride-0 upstream gradient that .sum() sends."""
    z, _ = rows_on(device, 1, classes, torch.float64)
    y = torch.tensor([3, 18, 3, 0], device=device)
    x, again = z.clone().requires_grad_(), z.clone().requires_grad_()
    (REGULARIZED(x.expand(4, classes), y, reduction="none", backend=backend).sum() * 2.0).backward()
    (REGULARIZED(again.repeat(4, 1), y, reduction="sum", backend=backend) * 2.0).backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-12, atol=1e-15)
    strided = torch.randn(4, 2, dtype=torch.float64, device=device)[:, 0]
    wide = z.repeat(4, 1)
    for run in (REGULARIZED, BY_HAND):
        a, b = (
            value_and_gradient(run, wide, y, reduction="none", backend=backend, upstream=u)
            for u in (strided, strided.contiguous())
        )
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("objective", [REGULARIZED, BY_HAND], ids=["terms", "custom"])
@pytest.mark.parametrize("classes", [21, 1003])
def test_every_row_has_its_own_upstream_gradient(classes: int, objective: object, device: torch.device, backend: str):
    """3 and 4: reduction="none" multiplied every row by the first row's upstream gradient."""
    z, y = rows_on(device, 6, classes, torch.float64)
    upstream = torch.tensor([0.0, -1.0, 2.5, 1.0, 1e-3, -40.0], dtype=torch.float64, device=device)
    options = {"reduction": "none", "backend": backend}
    _, together = value_and_gradient(objective, z, y, upstream=upstream, **options)
    for row in range(6):
        part = slice(row, row + 1)
        _, alone = value_and_gradient(objective, z[part], y[part], upstream=upstream[part], **options)
        torch.testing.assert_close(together[part], alone, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("gradient", GRADIENT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [70, 4099])
def test_the_callers_logits_are_never_written(
    classes: int, dtype: torch.dtype, gradient: str, device: torch.device, backend: str
) -> None:
    """1: the gradient was written into the logits, and a second loss on them was silently wrong."""
    z, y = rows_on(device, 9, classes, dtype)
    x = z.clone().requires_grad_()
    version = x._version
    first = REGULARIZED(x, y, gradient=gradient, backend=backend)
    own = 0.3 * x.to(first.dtype).square().mean()  # the user's penalty on the same logits
    (3.0 * first + own).backward()
    assert torch.equal(x.detach(), z)
    assert x._version == version
    again = z.double().requires_grad_()
    (3.0 * REGULARIZED(again, y, backend="reference") + 0.3 * again.square().mean()).backward()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(x.grad.double(), again.grad, rtol=0, atol=4 * eps * again.grad.abs().max().item())


def test_memory_that_is_gone_is_an_error(device: torch.device, backend: str) -> None:
    """FSDP and offloading free it, and keep the tensor."""
    z, y = rows_on(device, 6, 35, torch.float32)
    q = z.sigmoid()
    gone = z.clone()
    gone.untyped_storage().resize_(0)
    lost = torch.tensor(2.0, device=device)
    lost.untyped_storage().resize_(0)
    for name, call in {
        "logits": lambda: CrossEntropy()(gone, y, backend=backend),
        "target": lambda: CrossEntropy()(z, gone, backend=backend),
        "reference": lambda: KLDivergence()(z, reference=gone, backend=backend),
        "logit_scale": lambda: CrossEntropy()(z, y, logit_scale=lost, backend=backend),
        "normalizer": lambda: CrossEntropy()(z, y, normalizer=lost, backend=backend),
        "input": lambda: BinaryCrossEntropy()(gone, q, backend=backend),
        "weight": lambda: BinaryCrossEntropy(weight=gone)(z, q, backend=backend),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: its memory has been freed"):
            call()
