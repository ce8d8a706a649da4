"""Which backends run on the device, and that each does what the reference does, under every option of a call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import objkern
from objkern import CrossEntropy, ZLoss, custom

from ..conftest import DTYPES, assert_within_budget
from .conftest import DEVICE, NATIVE, is_promised, why_not
from .rows import (
    EVERYTHING,
    GRADIENT,
    REGULARIZED,
    assert_like_reference,
    assert_rounded,
    rows_on,
    upstream_of,
    value_and_gradient,
)


@pytest.mark.parametrize("name", NATIVE)
def test_the_backend_runs(name: str) -> None:
    """What was built can run; what was not says so."""
    if not is_promised(name):
        pytest.skip(f"{name} is not in this build: {why_not(name)}")
    assert why_not(name) is None


@pytest.mark.once
@pytest.mark.real_device
def test_auto_is_a_native_backend(device: torch.device) -> None:
    """Nothing falls back silently: "auto" gives bit for bit what one of the kernels gives."""
    able = [name for name in ("cuda", "triton") if why_not(name) is None]
    if not able:
        pytest.skip("no native backend can run here")
    z, y = rows_on(device, 33, 1003, torch.bfloat16)
    found = value_and_gradient(REGULARIZED, z, y)
    results = [value_and_gradient(REGULARIZED, z, y, backend=name) for name in able]
    assert any(all(torch.equal(a, b) for a, b in zip(found, result, strict=True)) for result in results)


# Every option of a call, as keyword arguments made for (device, rows, classes).
OPTIONS: dict[str, Callable[[torch.device, int, int], dict[str, Any]]] = {
    "rows": lambda d, n, v: {"reduction": "none"},
    "sum": lambda d, n, v: {"reduction": "sum"},
    "ignored rows": lambda d, n, v: {"ignore_index": 1},
    "a number as normalizer": lambda d, n, v: {"normalizer": 7.5},
    "a tensor as normalizer": lambda d, n, v: {"normalizer": torch.tensor(7.5, device=d)},
    "an integer tensor as normalizer": lambda d, n, v: {"normalizer": torch.tensor(7, device=d)},
    "a scale": lambda d, n, v: {"logit_scale": 0.7},
    "a scale on the device": lambda d, n, v: {"logit_scale": torch.tensor(0.7, device=d)},
    "a softcap": lambda d, n, v: {"softcap": 5.0},
    "scale and softcap, by row": lambda d, n, v: {"softcap": 5.0, "logit_scale": 1.3, "reduction": "none"},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("gradient", GRADIENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [9, 1003, 50257])
def test_every_option(
    classes: int, dtype: torch.dtype, gradient: str, option: str, device: torch.device, backend: str
) -> None:
    z, y = rows_on(device, 13, classes, dtype)
    options = OPTIONS[option](device, 13, classes)
    if gradient == "forward" and options.get("reduction") == "none":
        pytest.skip("the gradient of unreduced losses is the backward pass's")
    y[3] = options.get("ignore_index", -100)
    assert_like_reference(EVERYTHING, z, y, backend=backend, what=option, gradient=gradient, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [9, 1003])
def test_class_weights_and_probability_targets(
    classes: int, dtype: torch.dtype, dense: bool, weighted: bool, smoothing: float, device: torch.device, backend: str
) -> None:
    z, y = rows_on(device, 13, classes, dtype)
    generator = torch.Generator().manual_seed(1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = (torch.rand(classes, generator=generator) + 0.1).to(device, wide) if weighted else None
    target = torch.rand(13, classes, generator=generator).softmax(-1).to(device, wide) if dense else y
    results = []
    for name, x, t in ((backend, z, target), ("reference", z.double(), target.double() if dense else target)):
        w = None if weight is None else weight.to(wide if name == backend else torch.float64)
        run = CrossEntropy(w, smoothing) + 0.1 * ZLoss()
        results.append(value_and_gradient(run, x, t, reduction="none", backend=name))
    for what, ours, truth in zip(("loss", "gradient"), *results, strict=True):
        assert_rounded(ours, truth, what)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts(dtype: torch.dtype, reduction: str, device: torch.device, backend: str) -> None:
    """27: detached, and each the value of its own term."""
    z, y = rows_on(device, 13, 1003, dtype)
    y[5] = -100
    x = z.detach().requires_grad_()
    found, expected = (
        EVERYTHING(t, y, reduction=reduction, return_parts=True, backend=name)[1]
        for name, t in ((backend, x), ("reference", z.double()))
    )
    assert set(found) == set(expected)
    for name, value in found.items():
        assert not value.requires_grad
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-6, msg=name)


def test_shapes_of_language_models_and_images(device: torch.device, backend: str) -> None:
    z, _ = rows_on(device, 24, 77, torch.float32)
    y = torch.randint(0, 77, (4, 6), device=device)
    assert_like_reference(REGULARIZED, z.view(4, 6, 77), y, backend=backend, shift=1)
    assert_like_reference(REGULARIZED, z.view(4, 6, 77).movedim(-1, 1).contiguous(), y, backend=backend, class_dim=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [9, 1003, 50257])
def test_row_statistics(classes: int, dtype: torch.dtype, device: torch.device, backend: str) -> None:
    """Every field and its derivative: what policy and preference losses are made of."""
    z, y = rows_on(device, 7, classes, dtype)
    y[2] = -100
    beside = (z.double() * 0.9 + 0.1).to(dtype)

    def run(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        s = torch.stack([*objkern.row_statistics(x, y, reference=beside.to(x.dtype), **options)], -1)
        return s * torch.linspace(-1, 1, s.shape[-1], dtype=s.dtype, device=s.device)

    assert_like_reference(run, z, y, backend=backend, logit_scale=0.8, softcap=20.0)


def test_custom_terms_and_learned_numbers(device: torch.device, backend: str) -> None:
    """Coefficients and scales that are tensors on the device get their gradients."""
    z, y = rows_on(device, 13, 1003, torch.float32)
    results = []
    for name, x in ((backend, z), ("reference", z.double())):
        c, s = (torch.tensor(v, dtype=x.dtype, device=device, requires_grad=True) for v in (0.3, 1.4))
        for objective in (
            CrossEntropy() + c * ZLoss(),
            CrossEntropy() + c * ZLoss() + 0.1 * custom(lambda t: t.entropy * t.lse),
        ):
            leaf = x.detach().requires_grad_()
            loss = objective(leaf, y, logit_scale=s, backend=name)
            results.append((loss, *torch.autograd.grad(loss, (leaf, c, s), upstream_of(loss))))
    for ours, truth in zip(results[:2], results[2:], strict=True):
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)


@pytest.mark.once
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_drop_in_follows_torch(smoothing: float, dtype: torch.dtype, device: torch.device) -> None:
    if DEVICE == "cuda" and why_not("auto"):
        pytest.skip(f"no native backend can run here: {why_not('auto')}")
    z, y = rows_on(device, 13, 1003, dtype)
    y[4] = -100
    found = value_and_gradient(objkern.cross_entropy, z, y, label_smoothing=smoothing)
    native = value_and_gradient(F.cross_entropy, z, y, label_smoothing=smoothing)
    truth = value_and_gradient(F.cross_entropy, z.double(), y, label_smoothing=smoothing)
    assert found[0].dtype == native[0].dtype
    rounding = torch.finfo(dtype).eps  # of the loss to the input's dtype
    assert abs(found[0].double() - truth[0]) <= rounding * truth[0]
    assert_within_budget(found[1], native[1], truth[1], dtype)
