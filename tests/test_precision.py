"""Digits: confident rows, large offsets, masked classes, half precision; each held against float64."""

import math

import pytest
import torch
import torch.nn.functional as F

import objkern
from objkern import CrossEntropy, Entropy, Focal, GeneralizedCrossEntropy, Margin, Poly1, Unlikelihood, custom

from .conftest import (
    DTYPES,
    EVERY_NATIVE,
    EVERY_TERM,
    NATIVE,
    assert_within_budget,
    native_objective,
    random_rows,
)

BACKENDS = ["cpu", "reference"]


def row_with_margin(margin: float, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 row whose label leads the best other class by `margin`, exactly."""
    z = torch.randn(classes, generator=torch.Generator().manual_seed(classes)).clamp(-3, 3)
    z = (z * 1024).round() / 1024  # so that adding the margin rounds nothing
    y = classes // 3
    others = torch.cat([z[:y], z[y + 1 :]])
    z[y] = others.max() + margin
    return z[None], torch.tensor([y])


def exact(z: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss, gradient and entropy in float64, from the odds against the target, without cancellation."""
    z, label = z[0].double(), int(y)
    odds = torch.exp(z - z[label])
    odds[label] = 0.0
    against = odds.sum()
    loss = torch.log1p(against)
    gradient = odds / (1 + against)
    gradient[label] = -against / (1 + against)
    p = odds / (1 + against)
    p[label] = 1 / (1 + against)
    log_p = z - z[label] - loss
    return {"loss": loss, "gradient": gradient, "entropy": -(p * log_p).sum()}


def assert_digits(found: torch.Tensor, truth: torch.Tensor) -> None:
    """Relative 1e-5, or a subnormal: below `tiny` float32 has no digits to keep."""
    error, tiny = (found.double() - truth).abs(), torch.finfo(torch.float32).tiny
    assert (error <= 1e-5 * truth.abs() + (truth.abs() < tiny) * tiny).all(), (found, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [2, 17, 1000, 32001])
@pytest.mark.parametrize("margin", [5.0, 20.0, 40.0, 80.0, -100.0])
def test_confident_rows_keep_their_digits(margin: float, classes: int, backend: str) -> None:
    """5 and 6: loss exactly 0 at a margin of 20, target gradient rounded before 1 is subtracted."""
    z, y = row_with_margin(margin, classes)
    truth = exact(z, y)
    x = z.clone().requires_grad_()
    loss = CrossEntropy()(x, y, backend=backend)
    (gradient,) = torch.autograd.grad(loss, x, torch.tensor(1.7))
    entropy = Entropy()(z, y, backend=backend)
    assert_digits(loss, truth["loss"])
    assert_digits(entropy, truth["entropy"])
    assert_digits(gradient[0], 1.7 * truth["gradient"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("margin", [5.0, 20.0, 40.0, 80.0])
def test_terms_of_the_odds_keep_their_digits(margin: float, backend: str) -> None:
    """Terms in 1 − p_y, which is 0 in float32 from a margin of 17 on."""
    z, y = row_with_margin(margin, 17)
    truth = exact(z, y)
    others = -math.expm1(-truth["loss"].item())  # 1 − p_y
    expected = {
        Unlikelihood(): -math.log(others),
        Focal(1.0): others * truth["loss"].item(),
        Poly1(2.0): truth["loss"].item() + 2 * others,
        GeneralizedCrossEntropy(0.5): -math.expm1(-0.5 * truth["loss"].item()) / 0.5,
        Margin(3.0): math.log1p(math.exp(3.0) * math.expm1(truth["loss"].item())),
    }
    for term, value in expected.items():
        assert_digits(term(z, y, backend=backend), torch.tensor(value, dtype=torch.float64))


# Terms that depend on differences of logits only.
SHIFT_INVARIANT = {
    repr(objkern.parse(f)): objkern.parse(f) for f in NATIVE if f not in ("ZLoss()", "MaxZLoss()", "LogitL2()")
} | {"logit_variance": custom(lambda s: s.logit_variance), "mean_logprob": custom(lambda s: s.mean_logprob)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHIFT_INVARIANT)
@pytest.mark.parametrize("offset", [1e3, -1e3, 1e7, -1e7])
def test_a_common_offset_changes_nothing(offset: float, name: str, backend: str) -> None:
    """7: an objective of differences must not see what all logits share."""
    z = torch.randint(-8, 9, (5, 33), generator=torch.Generator().manual_seed(1)).float()  # exact beside 1e7
    y = torch.randint(0, 33, (5,), generator=torch.Generator().manual_seed(2))
    found = []
    for x in (z, z + offset):
        x = x.clone().requires_grad_()
        loss = SHIFT_INVARIANT[name](x, y, reduction="none", backend=backend)
        loss.backward(torch.linspace(-1.0, 2.0, 5))
        found.append((loss.detach(), x.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_logits_at_two_to_the_24(backend: str) -> None:
    """7: 0.0 instead of 0.693."""
    z = torch.full((1, 2), 2.0**24)
    assert CrossEntropy()(z, torch.tensor([0]), backend=backend).item() == pytest.approx(math.log(2), rel=1e-6)
    assert objkern.cross_entropy(z, torch.tensor([0])).item() == pytest.approx(math.log(2), rel=1e-6)


# Sizes around every vector length, a prime, and real vocabularies' residues.
@pytest.mark.parametrize("classes", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 257, 1000, 4099, 8191])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_term_at_once_within_the_error_budget(dtype: torch.dtype, classes: int) -> None:
    """29: loss and gradient at most twice as far from float64 as torch's own formula in the same dtype."""
    z, y = random_rows(7, classes, dtype)
    upstream = torch.randn(7, dtype=torch.float64)
    formula = dict(EVERY_NATIVE)
    text = EVERY_TERM
    if classes == 1:  # 1 − p_y is 0 there and its logarithm infinite, in every dtype
        formula.pop("Unlikelihood()")
        text = text.replace("+ 0.2*Unlikelihood() ", "")
    results = []
    for run, x in (
        (lambda x: objkern.parse(text)(x, y, reduction="none"), z),
        (lambda x: native_objective(x, y, formula), z),
        (lambda x: native_objective(x, y, formula), z.double()),
    ):
        x = x.clone().requires_grad_()
        loss = run(x)
        loss.backward(upstream.to(loss.dtype))
        results.append((loss.detach(), x.grad))
    ours, native, truth = results
    assert_within_budget(ours[0], native[0], truth[0], dtype, f"loss, V={classes}")
    assert_within_budget(ours[1], native[1], truth[1], dtype, f"gradient, V={classes}")


@pytest.mark.parametrize("formula", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.001, 1.0, 10.0])
def test_each_term_within_the_error_budget(formula: str, dtype: torch.dtype, scale: float) -> None:
    """Nearly uniform, ordinary and confident rows; term by term, so that none hides in the sum of the others."""
    z, y = random_rows(11, 515, dtype, scale)
    upstream = torch.randn(11, dtype=torch.float64)
    results = []
    for run, x in (
        (lambda x: objkern.parse(formula)(x, y, reduction="none"), z),
        (lambda x: NATIVE[formula](x, y), z),
        (lambda x: NATIVE[formula](x, y), z.double()),
    ):
        x = x.clone().requires_grad_()
        loss = run(x)
        loss.backward(upstream.to(loss.dtype))
        results.append((loss.detach(), x.grad))
    ours, native, truth = results
    assert_within_budget(ours[0], native[0], truth[0], dtype, f"{formula} loss")
    assert_within_budget(ours[1], native[1], truth[1], dtype, f"{formula} gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("margin", [5.0, 7.0, 20.0])
def test_half_precision_gradient_of_a_sure_row(dtype: torch.dtype, margin: float) -> None:
    """5: 20 % error at p = .99 and 100 % at .999 where p_y is rounded to bfloat16 before 1 is subtracted."""
    z = torch.zeros(1, 101, dtype=dtype)
    z[0, 40] = margin
    x = z.clone().requires_grad_()
    CrossEntropy()(x, torch.tensor([40])).backward(torch.tensor(3.0))
    wanted = 3 * exact(z, torch.tensor([40]))["gradient"]
    spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # of the subnormals
    assert abs(x.grad[0, 40].item() - wanted[40].item()) <= torch.finfo(dtype).eps * abs(wanted[40].item()) + spacing


def test_half_logits_have_a_float32_loss() -> None:
    """9: bfloat16 logits gave 440.0 for 442.04."""
    z = torch.zeros(1, 3, dtype=torch.bfloat16)
    z[0, 0] = 442.0
    loss = CrossEntropy()(z, torch.tensor([1]), reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == 442.0
    many = torch.zeros(1001, 3, dtype=torch.bfloat16)
    assert CrossEntropy()(many, torch.zeros(1001, dtype=torch.long), reduction="sum").item() == pytest.approx(
        1001 * math.log(3), rel=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_accumulate_without_drift(dtype: torch.dtype) -> None:
    """A quarter of a million equal classes: sums of small terms in float32 must not stall."""
    classes = 256000
    z = torch.zeros(1, classes, dtype=dtype)
    s = objkern.row_statistics(z, torch.tensor([7]))
    assert s.lse.item() == pytest.approx(math.log(classes), rel=1e-7)
    assert s.entropy.item() == pytest.approx(math.log(classes), rel=1e-7)
    assert s.mean_logprob.item() == pytest.approx(-math.log(classes), rel=1e-7)


@pytest.mark.parametrize("outlier", [30.0, 1000.0])
def test_variance_survives_an_outlier(outlier: float) -> None:
    """Σt²/n − mean² cancels when the maximum lies far from the rest: 7e-5 off for one logit of 30."""
    x = torch.randn(4, 32000)
    x[:, 5] = outlier
    s = objkern.row_statistics(x, torch.tensor([0, 5, 31999, 7]))
    torch.testing.assert_close(s.logit_variance.double(), x.double().var(-1, correction=0), rtol=2e-6, atol=0)


@pytest.mark.parametrize("classes", [8191, 8192, 8193, 16384, 20000, 40961])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_several_segments(dtype: torch.dtype, classes: int) -> None:
    """Long rows are collected in pieces that merge: the maximum in any of them, −inf in one, a whole one excluded."""
    z, _ = random_rows(5, classes, dtype)
    z[0, -1], z[1, 0], z[2, classes // 2] = 20.0, 20.0, 20.0
    z[3, 100:7000] = -torch.inf
    z[4, : max(8192, classes - 50)] = -torch.inf if classes > 8250 else 0.0
    y = torch.tensor([classes - 1, 1, classes // 2, 50, classes - 1])
    found = []
    beside = (0.9 * z).masked_fill(z == -torch.inf, 1.0)
    for backend, x in (("cpu", z), ("reference", z.double())):
        x = x.clone().requires_grad_()
        s = torch.stack(objkern.row_statistics(x, y, backend=backend, reference=beside))
        loss = objkern.parse(EVERY_TERM)(x, y, backend=backend)
        s.nan_to_num(0.0, 0.0, 0.0).mean(0).sum().backward(retain_graph=True)
        (gradient,) = torch.autograd.grad(loss, x)
        found.append((s.detach().double(), x.grad.double(), gradient.double()))
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=tolerance, atol=1e-6)


# ---- masked classes -------------------------------------------------------------------------------------------------


def keep(z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return z.masked_fill(~mask, -torch.inf)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [5, 33, 300])
@pytest.mark.parametrize("softcap", [None, 15.0])
def test_masked_classes_are_as_if_they_were_not_there(classes: int, softcap: float | None, backend: str) -> None:
    """16: with every term on, −inf columns give the values and gradients of the narrower problem."""
    generator = torch.Generator().manual_seed(classes)
    z = torch.randn(6, classes, generator=generator, dtype=torch.float64) * 2
    mask = torch.rand(classes, generator=generator) > 0.4
    mask[1] = mask[classes - 2] = True
    y = torch.where(torch.arange(6) % 2 == 0, 1, classes - 2)
    kept = mask.nonzero().squeeze(1)
    narrow_y = (kept[None] == y[:, None]).int().argmax(1)
    objective = objkern.parse(EVERY_TERM)
    wide, narrow = keep(z, mask).requires_grad_(), z[:, kept].clone().requires_grad_()
    upstream = torch.randn(6, generator=generator, dtype=torch.float64)
    options = {"reduction": "none", "softcap": softcap, "logit_scale": 0.7, "backend": backend}
    loss, expected = objective(wide, y, **options), objective(narrow, narrow_y, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    loss.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(wide.grad[:, kept], narrow.grad, rtol=1e-11, atol=1e-13)
    assert (wide.grad[:, ~mask] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_finite_logit_at_every_position(dtype: torch.dtype, backend: str) -> None:
    """16: a whole tile of −inf must not give NaN, wherever the one class that is left stands."""
    classes = 70
    z = torch.full((classes, classes), -torch.inf, dtype=dtype)
    z.fill_diagonal_(2.5)
    y = torch.arange(classes)
    x = z.clone().requires_grad_()
    objective = objkern.parse(EVERY_TERM.replace("+ 0.2*Unlikelihood() ", ""))
    loss = objective(x, y, reduction="none", backend=backend)
    # p_y = 1: only z-loss, max-z and logit L2 are left, and the margin has no other class to lead.
    expected = 0.5 * 2.5**2 + 0.3 * 2.5**2 + 0.9 * 2.5**2
    torch.testing.assert_close(loss, torch.full_like(loss, expected), rtol=1e-6, atol=0)
    loss.sum().backward()
    wanted = torch.zeros_like(x).fill_diagonal_(2 * 2.5 * (0.5 + 0.3 + 0.9))
    torch.testing.assert_close(x.grad, wanted, rtol=1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [3, 17, 255])
def test_strongly_negative_rows(classes: int, backend: str) -> None:
    """15: lanes that pad a vector must not add exp(0) where every logit is far below 0."""
    z, y = random_rows(4, classes, torch.float64)
    z = z.float() - 5e4
    s = objkern.row_statistics(z, y, backend=backend)
    assert torch.allclose(s.lse.double(), z.double().logsumexp(-1), rtol=1e-7, atol=0)
    expected = F.cross_entropy(z.double(), y)
    assert CrossEntropy()(z, y, backend=backend).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_excluded_target_is_an_infinite_loss_and_a_finite_gradient(backend: str) -> None:
    z = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    loss = CrossEntropy()(z, torch.tensor([1]), backend=backend)
    assert loss.item() == torch.inf
    loss.backward()
    torch.testing.assert_close(z.grad, torch.tensor([[0.26894143, 0.0, 0.73105860]]))
    for objective in (Focal(2.0), Poly1(1.0), GeneralizedCrossEntropy(0.5), Margin(1.0)):
        x = z.detach().clone().requires_grad_()
        objective(x, torch.tensor([1]), backend=backend).backward()
        assert torch.isfinite(x.grad).all(), repr(objective)


def test_nan_logits_are_not_hidden() -> None:
    z = torch.randn(3, 40)
    z[1, 39] = torch.nan
    x = z.clone().requires_grad_()
    loss = objkern.parse(EVERY_TERM)(x, torch.tensor([0, 1, 2]), reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    loss.sum().backward()
    assert x.grad[1].isnan().any()
    assert not x.grad[[0, 2]].isnan().any()
