"""Digits: the error budget against float64 for every term, dtype and vocabulary; sure rows; large offsets; masks."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import objkern
from objkern import CrossEntropy, Entropy, custom

from ..conftest import DTYPES, EVERY_NATIVE, NATIVE, assert_within_budget, log_p_target
from ..test_precision import SHIFT_INVARIANT, assert_digits, exact, row_with_margin
from .rows import (
    BUT_UNLIKELIHOOD,
    EVERYTHING,
    GRADIENT,
    RAGGED,
    VOCABULARIES,
    assert_like_reference,
    rows_on,
    value_and_gradient,
)

# log(1 − p) in place of log1p(−p) loses the digits of a small p in float64 too.
EXACT = NATIVE | {"Unlikelihood()": lambda z, y: -torch.log1p(-log_p_target(z, y).exp())}


def total(
    formulas: dict[str, Callable[..., Tensor]], formula: dict[str, float], reduction: str
) -> Callable[..., Tensor]:
    def run(z: Tensor, y: Tensor) -> Tensor:
        by_row = sum(c * formulas[name](z, y) for name, c in formula.items())
        return by_row if reduction == "none" else by_row.sum()

    return run


def sizes(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, 1) of each row, or else a single one, that torch was lucky with, could be all that counts. Ones for float64,
    which is its own truth, and for float16, whose small rows are subnormal."""
    size = gradient.norm(dim=1, keepdim=True)
    return size.where((size > 0) & (dtype in (torch.float32, torch.bfloat16)), 1.0)


def assert_budget_of(formula: dict[str, float], z: Tensor, y: Tensor, backend: str) -> None:
    """29: by row under an upstream gradient of its own, and as a sum whose gradient comes with the forward pass."""
    objective = objkern.parse(" + ".join(f"{c}*{name}" for name, c in formula.items()))
    for reduction, gradient in (("none", "backward"), ("sum", "forward")):
        ours = value_and_gradient(objective, z, y, backend=backend, reduction=reduction, gradient=gradient)
        native = value_and_gradient(total(NATIVE, formula, reduction), z, y)
        truth = value_and_gradient(total(EXACT, formula, reduction), z.double(), y)
        what = f"{formula} V={z.shape[1]} {gradient}"
        if reduction == "none":
            assert_within_budget(ours[0], native[0], truth[0], z.dtype, f"loss {what}")
        size = sizes(truth[1], z.dtype)
        of_rows = (gradient.double() / size for _, gradient in (ours, native, truth))
        assert_within_budget(*of_rows, z.dtype, f"gradient {what}")


@pytest.mark.parametrize("classes", RAGGED + VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_term_at_once(dtype: torch.dtype, classes: int, device: torch.device, backend: str) -> None:
    z, y = rows_on(device, 7, classes, dtype)
    assert_budget_of(EVERY_NATIVE, z, y, backend)


@pytest.mark.parametrize("classes", RAGGED + VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_cross_entropy(dtype: torch.dtype, classes: int, device: torch.device, backend: str) -> None:
    z, y = rows_on(device, 7, classes, dtype)
    assert_budget_of({"CrossEntropy()": 1.0}, z, y, backend)


@pytest.mark.parametrize("formula", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("classes", "scale"), [(9, 3.0), (515, 0.001), (515, 10.0), (50257, 3.0)])
def test_each_term(
    classes: int, scale: float, dtype: torch.dtype, formula: str, device: torch.device, backend: str
) -> None:
    """Nearly uniform, ordinary and confident rows; term by term, so that none hides in the sum of the others."""
    z, y = rows_on(device, 11, classes, dtype, scale)
    assert_budget_of({formula: 1.0}, z, y, backend)


@pytest.mark.parametrize(("rows", "classes"), [(4096, 9), (512, 32), (65536, 10), (1025, 64), (300, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_short_rows(dtype: torch.dtype, rows: int, classes: int, device: torch.device, backend: str) -> None:
    """Of so many the worst is far out, for everyone; so the measure is the rounding, and not torch's worst."""
    z, y = rows_on(device, rows, classes, dtype)
    for objective in (CrossEntropy(), EVERYTHING):
        for gradient in GRADIENT:
            assert_like_reference(objective, z, y, backend=backend, reduction="sum", gradient=gradient)
        assert_like_reference(objective, z, y, backend=backend, reduction="none")


@pytest.mark.parametrize("classes", [2, 17, 1000, 32001, 128256])
@pytest.mark.parametrize("margin", [5.0, 20.0, 40.0, 80.0, -100.0])
def test_sure_rows_keep_their_digits(margin: float, classes: int, device: torch.device, any_backend: str) -> None:
    """5 and 6: loss exactly 0 at a margin of 20; target gradient rounded before 1 is subtracted."""
    z, y = row_with_margin(margin, classes)
    truth = exact(z, y)
    for gradient in GRADIENT:
        loss, found = value_and_gradient(
            CrossEntropy(), z.to(device), y.to(device), backend=any_backend, gradient=gradient
        )
        assert_digits(loss.cpu(), truth["loss"])
        assert_digits(found[0].cpu(), 1.7 * truth["gradient"])
    assert_digits(Entropy()(z.to(device), y.to(device), backend=any_backend).cpu(), truth["entropy"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [101, 32001])
@pytest.mark.parametrize("margin", [5.0, 7.0, 20.0])
def test_half_precision_gradient_of_a_sure_row(
    margin: float, classes: int, dtype: torch.dtype, device: torch.device, any_backend: str
) -> None:
    """5: 20 % error at p = .99 and 100 % at .999 where p_y is rounded to bfloat16 before 1 is subtracted."""
    z = torch.zeros(1, classes, dtype=dtype)
    z[0, 40] = margin
    y = torch.tensor([40])
    wanted = 1.7 * exact(z, y)["gradient"][40].item()
    spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # of the subnormals
    for gradient in GRADIENT:
        _, found = value_and_gradient(
            CrossEntropy(), z.to(device), y.to(device), backend=any_backend, gradient=gradient
        )
        assert abs(found[0, 40].item() - wanted) <= torch.finfo(dtype).eps * abs(wanted) + spacing


@pytest.mark.parametrize("name", SHIFT_INVARIANT)
@pytest.mark.parametrize("offset", [1e3, -1e3, 1e7, -1e7])
def test_a_common_offset_changes_nothing(offset: float, name: str, device: torch.device, backend: str) -> None:
    """7: an objective of differences must not see what all logits share. Integers, exact beside 1e7."""
    generator = torch.Generator().manual_seed(1)
    for classes in (33, 20011):
        z = torch.randint(-8, 9, (5, classes), generator=generator).float().to(device)
        y = torch.randint(0, classes, (5,), generator=generator).to(device)
        a, b = (
            value_and_gradient(SHIFT_INVARIANT[name], x, y, reduction="none", backend=backend) for x in (z, z + offset)
        )
        torch.testing.assert_close(a[0], b[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(a[1], b[1], rtol=1e-6, atol=1e-7)


def test_two_logits_at_two_to_the_24(device: torch.device, any_backend: str) -> None:
    """7: 0.0 instead of 0.693."""
    z = torch.full((1, 2), 2.0**24, device=device)
    y = torch.zeros(1, dtype=torch.long, device=device)
    assert CrossEntropy()(z, y, backend=any_backend).item() == pytest.approx(math.log(2), rel=1e-6)


def test_half_logits_have_a_float32_loss(device: torch.device, any_backend: str) -> None:
    """9: bfloat16 logits gave 440.0 for 442.04."""
    z = torch.zeros(1001, 3, dtype=torch.bfloat16, device=device)
    y = torch.zeros(1001, dtype=torch.long, device=device)
    loss = CrossEntropy()(z, y, reduction="sum", backend=any_backend)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1001 * math.log(3), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_accumulate_without_drift(dtype: torch.dtype, device: torch.device, backend: str) -> None:
    """Sums of a million equal terms in float32 must not stall."""
    for classes in (256000, 1 << 20):
        z = torch.zeros(1, classes, dtype=dtype, device=device)
        s = objkern.row_statistics(z, torch.tensor([7], device=device), backend=backend)
        assert s.lse.item() == pytest.approx(math.log(classes), rel=1e-6)
        assert s.entropy.item() == pytest.approx(math.log(classes), rel=1e-6)


@pytest.mark.parametrize("classes", [1003, 40961])
def test_the_maximum_may_rise_in_every_tile(classes: int, device: torch.device, backend: str) -> None:
    """Sums so far are rescaled when a larger logit turns up; an ascending row makes that happen all the time."""
    steps = torch.linspace(-30, 10, classes, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        z = torch.stack([steps, steps.flip(0), steps * 10, steps + 1e4]).to(device, dtype)
        y = torch.tensor([classes - 1, 3, classes // 2, 0], device=device)
        assert_like_reference(CrossEntropy(0.1 * torch.ones(classes, device=device)), z, y, backend=backend)


# ---- masked classes and low rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [33, 4099, 50257])
@pytest.mark.parametrize("gradient", GRADIENT)
def test_masked_vocabularies(
    gradient: str, classes: int, dtype: torch.dtype, device: torch.device, any_backend: str
) -> None:
    """16: with every term on, −inf columns give the values and the gradient of the narrower problem."""
    z, _ = rows_on(device, 6, classes, dtype)
    mask = torch.rand(classes, generator=torch.Generator().manual_seed(classes)) > 0.9
    mask[: classes // 2] = False  # whole tiles
    mask[[classes // 2 + 1, classes - 1]] = True
    kept = mask.nonzero().squeeze(1).to(device)
    narrow_y = torch.tensor([0, len(kept) - 1] * 3, device=device)
    wide = z.masked_fill(~mask.to(device), -torch.inf)
    options = {"backend": any_backend, "gradient": gradient}
    loss, found = value_and_gradient(EVERYTHING, wide, kept[narrow_y], **options)
    truth = value_and_gradient(EVERYTHING, z[:, kept].double(), narrow_y, backend="reference")
    torch.testing.assert_close(loss.double(), truth[0], rtol=1e-5, atol=0)
    eps = torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 16)
    torch.testing.assert_close(found[:, kept].double(), truth[1], rtol=eps, atol=eps * truth[1].abs().max().item())
    assert not found.masked_fill(mask.to(device), 0.0).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [70, 4099, 20011])
def test_one_finite_logit_at_every_place(
    classes: int, dtype: torch.dtype, device: torch.device, any_backend: str
) -> None:
    """16: a whole tile of −inf must not give NaN, wherever the one class that is left stands."""
    edges = {0, 1, 7, 8, 15, 16, 31, 32, 63, 64, 255, 256, 511, 512, 1023, 1024, 2047, 2048, 4095, 4096, 8191, 8192}
    places = [p for p in sorted(edges | {classes // 2, classes - 8, classes - 2, classes - 1}) if p < classes]
    y = torch.tensor(places, device=device)
    z = torch.full((len(places), classes), -torch.inf, dtype=dtype, device=device)
    z.scatter_(1, y[:, None], 2.5)
    loss, found = value_and_gradient(BUT_UNLIKELIHOOD, z, y, reduction="sum", backend=any_backend)
    # p_y = 1: only z-loss, max-z and logit L2 are left, and the margin has no other class to lead.
    torch.testing.assert_close(loss.item(), len(places) * 2.5**2 * (0.5 + 0.3 + 0.9), rtol=1e-6, atol=0)
    wanted = torch.zeros_like(z, dtype=torch.float64).scatter_(1, y[:, None], 1.7 * 2 * 2.5 * (0.5 + 0.3 + 0.9))
    torch.testing.assert_close(found.double(), wanted, rtol=max(1e-6, torch.finfo(dtype).eps), atol=0)


@pytest.mark.parametrize("classes", [3, 17, 255, 4099, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strongly_negative_rows(classes: int, dtype: torch.dtype, device: torch.device, any_backend: str) -> None:
    """15: lanes that pad a vector must not add exp(0) where every logit is far below 0."""
    z, y = rows_on(device, 4, classes, torch.float64)
    z = (z - 5e4).to(dtype)
    s = objkern.row_statistics(z, y, backend=any_backend)
    torch.testing.assert_close(s.lse.double(), z.double().logsumexp(-1), rtol=2e-7, atol=0)
    assert CrossEntropy()(z, y, backend=any_backend).item() == pytest.approx(
        F.cross_entropy(z.double(), y).item(), rel=1e-5
    )


def test_nan_infinity_and_rows_without_classes(device: torch.device, any_backend: str) -> None:
    """They are NaN in their own row, and in no other."""
    for classes in (5, 300, 20011):
        z, _ = rows_on(device, 5, classes, torch.float32)
        z[1, classes - 1], z[2, 0], z[3] = torch.nan, torch.inf, -torch.inf
        y = torch.ones(5, dtype=torch.long, device=device)
        for objective in (CrossEntropy(), EVERYTHING, custom(lambda s: s.entropy)):
            found = objective(z, y, reduction="none", backend=any_backend)
            assert found.isnan().tolist() == [False, True, True, True, False], (classes, objective)


# ---- the dtype of nothing -------------------------------------------------------------------------------------------


def test_no_rows_and_no_other_class(device: torch.device, any_backend: str) -> None:
    """12: an empty batch keeps its graph; one class alone has probability 1."""
    for classes in (5, 1003):
        x = torch.randn(0, classes, device=device, requires_grad=True)
        y = torch.empty(0, dtype=torch.long, device=device)
        assert EVERYTHING(x, y, backend=any_backend).isnan()
        loss = EVERYTHING(x, y, empty="zero", backend=any_backend)
        loss.backward()
        assert loss == 0
        assert x.grad.shape == (0, classes)
    one = torch.full((3, 1), 2.0, device=device)
    y = torch.zeros(3, dtype=torch.long, device=device)
    loss, found = value_and_gradient(CrossEntropy() + custom(lambda s: s.entropy), one, y, backend=any_backend)
    assert loss == 0
    assert not found.any()
