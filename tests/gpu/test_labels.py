"""Labels that do not count, labels that are none, and what a mean divides by."""

import pytest
import torch
import torch.nn.functional as F

import objkern
from objkern import CrossEntropy, Entropy, ZLoss, custom

from ..conftest import native_objective
from .rows import EVERYTHING, GRADIENT, REGULARIZED, rows_on, value_and_gradient

BAD = [-1, 0, 1, 2**40, -(2**40), 2**63 - 1, -(2**63)]  # 0 and 1: counted from V


def bad_batch(device: torch.device, classes: int, label: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    z, y = rows_on(device, 5, classes, torch.float32)
    label = label + classes if label in (0, 1) else label
    y[1], y[3] = -100, label
    return z, y, label


@pytest.mark.real_device
@pytest.mark.parametrize("classes", [7, 1003, 50257])
@pytest.mark.parametrize("label", BAD)
@pytest.mark.parametrize("gradient", GRADIENT)
def test_a_bad_label_is_nan_in_its_row_alone(
    gradient: str, label: int, classes: int, device: torch.device, any_backend: str
) -> None:
    """13: an out-of-bounds read, or loss 0 with a gradient. Nothing waits for the device to find out."""
    z, y, _ = bad_batch(device, classes, label)
    good = y.clone()
    good[3] = -100
    losses = EVERYTHING(z, y, reduction="none", backend=any_backend)
    expected = EVERYTHING(z, good, reduction="none", backend=any_backend)
    assert losses.isnan().tolist() == [False, False, False, True, False]
    others = [0, 1, 2, 4]
    assert torch.equal(losses[others], expected[others])
    total, found = value_and_gradient(EVERYTHING, z, y, normalizer=4.0, gradient=gradient, backend=any_backend)
    _, wanted = value_and_gradient(EVERYTHING, z, good, normalizer=4.0, gradient=gradient, backend=any_backend)
    assert total.isnan()
    torch.testing.assert_close(found[others], wanted[others])
    statistics = objkern.row_statistics(z, y, backend=any_backend)
    assert statistics.logprob.isnan().tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("classes", [7, 1003])
@pytest.mark.parametrize("label", BAD)
def test_validation_names_row_and_label(label: int, classes: int, device: torch.device, any_backend: str) -> None:
    """13: validate=True, and set_validation("always"), raise what the CPU raises."""
    z, y, label = bad_batch(device, classes, label)
    message = rf"row 3 holds label {label}\b"
    for run in (
        lambda **kw: CrossEntropy()(z, y, backend=any_backend, **kw),
        lambda **kw: REGULARIZED(z.requires_grad_(), y, backend=any_backend, gradient="forward", **kw),
        lambda **kw: objkern.row_statistics(z, y, backend=any_backend, **kw),
    ):
        with pytest.raises(IndexError, match=message):
            run(validate=True)
        objkern.set_validation("always")
        try:
            with pytest.raises(IndexError, match=message):
                run()
        finally:
            objkern.set_validation("cpu")


@pytest.mark.parametrize("gradient", GRADIENT)
@pytest.mark.parametrize("objective", [EVERYTHING, REGULARIZED + custom(lambda s: s.lse)], ids=["terms", "custom"])
@pytest.mark.parametrize("classes", [11, 1003])
def test_all_rows_ignored(
    classes: int, objective: objkern.Objective, gradient: str, device: torch.device, any_backend: str
) -> None:
    """12: division by zero, infinite gradients, or no graph at all (which hangs data-parallel training)."""
    if gradient == "forward" and objective is not EVERYTHING:
        pytest.skip("custom terms have no forward gradient")
    z, _ = rows_on(device, 4, classes, torch.bfloat16)
    y = torch.full((4,), -100, device=device)
    for empty, reduction, expected in (("nan", "mean", torch.nan), ("zero", "mean", 0.0), ("nan", "sum", 0.0)):
        options = {"empty": empty, "reduction": reduction, "gradient": gradient, "backend": any_backend}
        loss, found = value_and_gradient(objective, z, y, **options)
        torch.testing.assert_close(loss.cpu(), torch.tensor(expected), equal_nan=True)
        assert not found.any()
    losses, found = value_and_gradient(objective, z, y, reduction="none", backend=any_backend)
    assert not losses.any()
    assert not found.any()


@pytest.mark.parametrize("classes", [3, 17, 130, 4099, 50257])
@pytest.mark.parametrize("gradient", GRADIENT)
def test_ignore_index_inside_the_vocabulary(
    gradient: str, classes: int, device: torch.device, any_backend: str
) -> None:
    """14: a sentinel that matched a class or a padded column."""
    z, _ = rows_on(device, 6, classes, torch.float32)
    ignored = classes - 1
    y = torch.tensor([0, ignored, 1, ignored, 0, 1], device=device)
    options = {"gradient": gradient, "backend": any_backend}
    loss, found = value_and_gradient(REGULARIZED, z, y, ignore_index=ignored, **options)
    kept = y != ignored
    expected, wanted = value_and_gradient(REGULARIZED, z[kept], y[kept], **options)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found[kept], wanted, rtol=1e-6, atol=1e-7 * wanted.abs().max().item())
    assert not found[~kept].any()
    y[[1, 3]] = 0
    past = value_and_gradient(REGULARIZED, z, y, ignore_index=classes, **options)  # one past the last: nothing matches
    for a, b in zip(past, value_and_gradient(REGULARIZED, z, y, **options), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [8, 3001])  # one block merges, and many do
def test_means_divide_by_the_rows_that_count(
    rows: int, reduction: str, weighted: bool, device: torch.device, any_backend: str
) -> None:
    """17: a mean over all tokens. The expected value is written out here, not computed by what is tested."""
    z, y = rows_on(device, rows, 12, torch.float64)
    y[[2, 5]] = -100
    kept = y != -100
    weight = torch.linspace(0.1, 3.0, 12, dtype=torch.float64, device=device) if weighted else None
    w = z.new_ones(rows - 2) if weight is None else weight[y[kept]]
    values = [
        w * F.cross_entropy(z[kept], y[kept], reduction="none"),
        z[kept].logsumexp(-1).square(),
        native_objective(z[kept], y[kept], {"Entropy()": 1.0}),
    ]
    coefficients = [1.0, 0.5, -0.25]
    objective = CrossEntropy(weight) + 0.5 * ZLoss() - 0.25 * Entropy()
    loss, parts = objective(z, y, reduction=reduction, return_parts=True, backend=any_backend)
    if reduction == "none":
        expected = z.new_zeros(rows)
        expected[kept] = sum(c * v for c, v in zip(coefficients, values, strict=True))
    else:
        counts = [w.sum(), rows - 2, rows - 2] if reduction == "mean" else [1.0, 1.0, 1.0]
        expected = sum(c * v.sum() / n for c, v, n in zip(coefficients, values, counts, strict=True))
        assert parts["rows"] == rows - 2
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
