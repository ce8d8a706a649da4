"""More logits than 32 bits count. In a file of its own, because it wants most of a device's memory for itself."""

import pytest
import torch

from .rows import EVERYTHING, GRADIENT, require_memory, value_and_gradient


@pytest.mark.parametrize("classes", [17, 50257, 256000])
@pytest.mark.parametrize("bits", [31, 32])
def test_more_logits_than_32_bits_count(bits: int, classes: int, device: torch.device, backend: str) -> None:
    """10: an illegal access, or silently wrong last rows. The last rows equal float64 computed on them alone."""
    bits = bits if device.type == "cuda" else 16  # a dry run has no room for more
    rows = (1 << bits) // classes + 3
    gradient_bytes = 2 * rows * classes
    require_memory(device, 2 * gradient_bytes + 64 * rows + 2**30)
    z = torch.empty(rows, classes, dtype=torch.bfloat16, device=device)
    for part in z.split(max(1, (1 << 28) // classes)):
        part.normal_(0, 3)
    y = torch.randint(0, classes, (rows,), device=device)
    places = sorted({0, rows // 2, rows - 3, rows - 2, rows - 1})
    truth = value_and_gradient(
        EVERYTHING, z[places].double(), y[places], reduction="sum", backend="reference",
        upstream=torch.tensor(1.7, device=device),
    )[1]  # fmt: skip
    for gradient in GRADIENT:
        _, found = value_and_gradient(EVERYTHING, z, y, reduction="sum", gradient=gradient, backend=backend)
        error = found[places].double() - truth
        assert error.abs().max() <= torch.finfo(torch.bfloat16).eps * truth.abs().max(), gradient
        del found, error
    by_row = EVERYTHING(z, y, reduction="none", backend=backend)
    alone = EVERYTHING(z[places].double(), y[places], reduction="none", backend="reference")
    torch.testing.assert_close(by_row[places].double(), alone, rtol=1e-5, atol=1e-6)
