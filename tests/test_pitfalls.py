"""Failures that shipped in fused losses, and would come back without a test. Digits: see test_precision.py."""

import pytest
import torch
import torch.nn.functional as F

import objkern
from objkern import CrossEntropy, Entropy, LogitL2, ZLoss, custom

from .conftest import DTYPES, EVERY_NATIVE, EVERY_TERM, assert_within_budget, native_objective, random_rows

REGULARIZED = CrossEntropy(label_smoothing=0.1) + 1e-4 * ZLoss() - 0.01 * Entropy()
GRADIENT = ["backward", "forward"]


def native_regularized(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    count = y != -100
    lse = z.logsumexp(-1)[count]
    p = z.softmax(-1)
    entropy = -(p * z.log_softmax(-1)).sum(-1)[count]
    return F.cross_entropy(z, y, label_smoothing=0.1) + 1e-4 * lse.square().mean() - 0.01 * entropy.mean()


@pytest.mark.parametrize("gradient", GRADIENT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_callers_logits_are_never_written(dtype: torch.dtype, gradient: str) -> None:
    """1: the gradient was written into the logits, and a second loss on them was silently wrong."""
    z, y = random_rows(9, 70, dtype)
    x = z.clone().requires_grad_()
    version = x._version
    first = REGULARIZED(x, y, gradient=gradient)
    own = 0.3 * x.to(first.dtype).square().mean()  # the user's penalty on the same logits
    (3.0 * first + own).backward()
    assert torch.equal(x.detach(), z)
    assert x._version == version
    again = z.clone().requires_grad_()
    (3.0 * native_regularized(again.double(), y) + 0.3 * again.double().square().mean()).backward()
    torch.testing.assert_close(x.grad.double(), again.grad.double(), rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("gradient", GRADIENT)
@pytest.mark.parametrize("upstreams", [(1.0, 1.0), (1.0, -0.5), (3.0, 1.0), (0.25, 7.0)])
def test_two_backwards_with_different_upstream_gradients(upstreams: tuple[float, float], gradient: str) -> None:
    """2: the saved gradient was scaled in place, so the second backward of a retained graph was wrong."""
    z, y = random_rows(5, 33, torch.float32)
    x = z.clone().requires_grad_()
    loss = REGULARIZED(x, y, gradient=gradient)
    found = [torch.autograd.grad(loss, x, torch.tensor(u), retain_graph=True)[0] for u in upstreams]
    (expected,) = torch.autograd.grad(REGULARIZED(x, y, backend="reference"), x)
    for u, g in zip(upstreams, found, strict=True):
        torch.testing.assert_close(g, u * expected, rtol=1e-5, atol=1e-7)
    found[0].zero_()  # what one backward returned belongs to its caller
    (third,) = torch.autograd.grad(loss, x, torch.tensor(2.0))
    torch.testing.assert_close(third, 2 * expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("objective", [REGULARIZED, REGULARIZED + custom(lambda s: s.lse)], ids=["terms", "custom"])
@pytest.mark.parametrize("classes", [21, 130])
def test_every_row_has_its_own_upstream_gradient(classes: int, objective: objkern.Objective) -> None:
    """3 and 4: reduction="none" multiplied every row by the first row's upstream gradient."""
    z, y = random_rows(6, classes, torch.float64)
    upstream = torch.tensor([0.0, -1.0, 2.5, 1.0, 1e-3, -40.0], dtype=torch.float64)
    x = z.clone().requires_grad_()
    objective(x, y, reduction="none").backward(upstream)
    for row in range(6):
        alone = z[row : row + 1].clone().requires_grad_()
        (upstream[row] * objective(alone, y[row : row + 1], reduction="none")).sum().backward()
        torch.testing.assert_close(x.grad[row], alone.grad[0], rtol=1e-12, atol=1e-15)


def layouts(z: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same (N, V) numbers in memory layouts that strides can describe."""
    rows, classes = z.shape
    wide = torch.full((rows, classes + 13), 1e4, dtype=z.dtype)
    wide[:, 5 : 5 + classes] = z
    tall = torch.full((2 * rows, classes), -1e4, dtype=z.dtype)
    tall[::2] = z
    spread = torch.full((rows, 2 * classes), 1e4, dtype=z.dtype)
    spread[:, ::2] = z
    return {
        "transposed": z.t().contiguous().t(),
        "padded rows": wide[:, 5 : 5 + classes],
        "every other row": tall[::2],
        "every other class": spread[:, ::2],
    }


@pytest.mark.parametrize("name", ["transposed", "padded rows", "every other row", "every other class"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient", GRADIENT)
@pytest.mark.parametrize("classes", [45, 301])  # rows that lie one per lane, and rows that fill vectors
def test_any_strides(classes: int, name: str, dtype: torch.dtype, gradient: str) -> None:
    """11: the class stride was right and the row stride wrong."""
    z, y = random_rows(6, classes, dtype)
    strided = layouts(z)[name].detach().requires_grad_()
    plain = z.clone().requires_grad_()
    for x in (strided, plain):
        (1.5 * REGULARIZED(x, y, gradient=gradient)).backward()
    assert torch.equal(strided.grad, plain.grad)


@pytest.mark.parametrize("classes", [19, 190])
def test_expanded_logits_and_expanded_upstream(classes: int) -> None:
    """11: stride-0 rows, and the stride-0 upstream gradient that .sum() sends."""
    z = torch.randn(1, classes, dtype=torch.float64)
    y = torch.tensor([3, 18, 3, 0])
    x = z.clone().requires_grad_()
    losses = REGULARIZED(x.expand(4, classes), y, reduction="none")
    (losses.sum() * 2.0).backward()
    again = z.clone().requires_grad_()
    (REGULARIZED(again.repeat(4, 1), y, reduction="sum") * 2.0).backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-13, atol=0)
    strided = torch.randn(4, 2, dtype=torch.float64)[:, 0]
    a, b = (z.repeat(4, 1).requires_grad_() for _ in range(2))
    REGULARIZED(a, y, reduction="none").backward(strided)
    REGULARIZED(b, y, reduction="none").backward(strided.contiguous())
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("gradient", GRADIENT)
@pytest.mark.parametrize("objective", [REGULARIZED, REGULARIZED + custom(lambda s: s.lse)], ids=["terms", "custom"])
def test_all_rows_ignored(objective: objkern.Objective, gradient: str) -> None:
    """12: division by zero, infinite gradients, or no graph at all (which hangs data-parallel training)."""
    if gradient == "forward" and len(objective.weighted_terms) > 3:
        pytest.skip("custom terms have no forward gradient")
    z = torch.randn(4, 11)
    y = torch.full((4,), -100)
    for empty, reduction, expected in (("nan", "mean", torch.nan), ("zero", "mean", 0.0), ("nan", "sum", 0.0)):
        x = z.clone().requires_grad_()
        loss, parts = objective(x, y, empty=empty, reduction=reduction, gradient=gradient, return_parts=True)
        torch.testing.assert_close(loss.detach(), torch.tensor(expected), equal_nan=True)
        assert parts["rows"] == 0
        loss.backward(torch.tensor(3.0))
        assert torch.equal(x.grad, torch.zeros_like(x))
    x = z.clone().requires_grad_()
    losses = objective(x, y, reduction="none")
    assert torch.equal(losses.detach(), torch.zeros(4))
    losses.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("gradient", GRADIENT)
@pytest.mark.parametrize("classes", [5, 300, 40000])
def test_no_rows(classes: int, gradient: str) -> None:
    """12: an empty batch keeps its graph and gives torch's values."""
    x = torch.randn(0, classes, requires_grad=True)
    y = torch.empty(0, dtype=torch.long)
    assert REGULARIZED(x, y).isnan()
    assert REGULARIZED(x, y, reduction="sum") == 0
    assert REGULARIZED(x, y, reduction="none").shape == (0,)
    loss = REGULARIZED(x, y, empty="zero", gradient=gradient)
    loss.backward()
    assert loss == 0
    assert x.grad.shape == (0, classes)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("label", [-1, 7, 8, 2**40, -(2**40), 2**63 - 1, -(2**63)])
def test_bad_labels_name_row_and_label(label: int, backend: str) -> None:
    """13: an out-of-bounds read, or loss 0 with a gradient."""
    z, y = torch.randn(5, 7, requires_grad=True), torch.tensor([1, -100, 2, 3, 4])
    y[3] = label
    for run in (
        lambda: CrossEntropy()(z, y, backend=backend),
        lambda: CrossEntropy()(z, y, backend=backend, gradient="forward"),
        lambda: objkern.row_statistics(z, y, backend=backend),
        lambda: objkern.cross_entropy(z, y),
    ):
        with pytest.raises(IndexError, match=rf"row 3 holds label {label}\b"):
            run()


@pytest.mark.parametrize("classes", [3, 8, 17, 33, 130])
def test_ignore_index_inside_the_vocabulary(classes: int) -> None:
    """14: a sentinel that matched a class or a padded column."""
    z, _ = random_rows(6, classes, torch.float32)
    ignored = classes - 1
    y = torch.tensor([0, ignored, 1, ignored, 0, 1])
    x = z.clone().requires_grad_()
    loss, parts = REGULARIZED(x, y, ignore_index=ignored, return_parts=True)
    assert parts["rows"] == 4
    loss.backward()
    assert torch.equal(x.grad[[1, 3]], torch.zeros(2, classes))
    kept = y != ignored
    torch.testing.assert_close(loss, REGULARIZED(z[kept], y[kept]), rtol=1e-6, atol=0)
    assert CrossEntropy()(z, y.clamp(max=classes), ignore_index=classes) > 0  # one past the last class: nothing matches


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("formula", ["plain", "every"])
def test_means_divide_by_the_rows_that_count(formula: str, reduction: str, weighted: bool) -> None:
    """17: a mean over all tokens. The expected value is written out here, not computed by what is tested."""
    z, y = random_rows(8, 12, torch.float64)
    y[[2, 5]] = -100
    kept = y != -100
    weight = torch.linspace(0.1, 3.0, 12, dtype=torch.float64) if weighted else None
    w = torch.ones(6, dtype=torch.float64) if weight is None else weight[y[kept]]
    ce = w * F.cross_entropy(z[kept], y[kept], reduction="none")
    lse = z[kept].logsumexp(-1).square()
    rest = [ce, lse] if formula == "plain" else [ce, lse, native_objective(z[kept], y[kept], {"Entropy()": 1.0})]
    objective = CrossEntropy(weight) + 0.5 * ZLoss()
    coefficients = [1.0, 0.5]
    if formula == "every":
        objective, coefficients = objective - 0.25 * Entropy(), [1.0, 0.5, -0.25]
    loss, parts = objective(z, y, reduction=reduction, return_parts=True)
    if reduction == "none":
        expected = torch.zeros(8, dtype=torch.float64)
        expected[kept] = sum(c * v for c, v in zip(coefficients, rest, strict=True))
    else:
        denominators = [w.sum(), 6.0, 6.0] if reduction == "mean" else [1.0, 1.0, 1.0]
        values = [v.sum() / d for v, d in zip(rest, denominators, strict=False)]
        expected = sum(c * v for c, v in zip(coefficients, values, strict=True))
        assert parts["cross_entropy"].item() == pytest.approx(values[0].item(), rel=1e-12)
        assert parts["z_loss"].item() == pytest.approx(values[1].item(), rel=1e-12)
        assert parts["rows"] == 6
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_the_mean_test_would_notice() -> None:
    """17: the loss was compared with itself. The expectation above differs from the wrong denominators'."""
    z, y = random_rows(8, 12, torch.float64)
    y[[2, 5]] = -100
    right = CrossEntropy()(z, y)
    over_all_tokens = F.cross_entropy(z, y, reduction="sum") / 8
    assert abs(right - over_all_tokens) > 0.1


def test_parts_are_detached_and_true() -> None:
    """27: a component came with a dead graph, and its backward silently gave zero."""
    z, y = random_rows(5, 9, torch.float32)
    x = z.clone().requires_grad_()
    loss, parts = REGULARIZED(x, y, return_parts=True)
    assert loss.requires_grad
    assert not any(value.requires_grad for value in parts.values())
    expected = parts["cross_entropy"] + 1e-4 * parts["z_loss"] - 0.01 * parts["entropy"]
    torch.testing.assert_close(parts["total"], expected, rtol=1e-6, atol=0)
    assert parts["accuracy"] == (z.argmax(-1) == y).float().mean()
    torch.testing.assert_close(parts["target_probability"], z.softmax(-1).gather(1, y[:, None]).mean())
    torch.testing.assert_close(parts["lse"], z.logsumexp(-1).mean())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("gradient", GRADIENT)
def test_bitwise_the_same_for_any_number_of_threads(threads: int, gradient: str) -> None:
    """30: results that change between runs."""
    z, y = random_rows(67, 1003, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (2, threads, threads):
            torch.set_num_threads(count)
            x = z.clone().requires_grad_()
            loss = objkern.parse(EVERY_TERM)(x, y, gradient=gradient)
            loss.backward(torch.tensor(0.7))
            results.append((loss.detach(), x.grad))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_offsets_beyond_two_to_the_31() -> None:
    """10: 32-bit offsets: an illegal access, or silently wrong last rows. N·V = 2^31 + 2^16 bfloat16 logits."""
    classes = 1 << 16
    rows = (1 << 15) + 1
    last = torch.randn(2, classes).to(torch.bfloat16)
    z = torch.empty(rows, classes, dtype=torch.bfloat16)  # untouched pages cost nothing
    z[-2:] = last
    y = torch.full((rows,), -100)
    y[-2:] = torch.tensor([5, classes - 1])
    upstream = torch.arange(rows, dtype=torch.float32)
    results = []
    for x, labels, u in ((z, y, upstream), (last, y[-2:], upstream[-2:])):
        x.requires_grad_()
        loss = REGULARIZED(x, labels, reduction="none")
        (gradient,) = torch.autograd.grad(loss, x, u)
        results.append((loss.detach(), gradient))
    assert torch.equal(results[0][0][-2:], results[1][0])
    assert results[0][0][:-2].abs().max() == 0
    assert torch.equal(results[0][1][-2:], results[1][1])
    assert not results[0][1][-1000:-2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_budget_notices_a_perturbed_result(dtype: torch.dtype) -> None:
    """29: a tolerance so wide that it proves nothing. Perturbations of a part in a thousand must fail."""
    z, y = random_rows(7, 300, dtype)
    results = []
    for run, x in (
        (lambda x: objkern.parse(EVERY_TERM)(x, y, reduction="none"), z),
        (lambda x: native_objective(x, y, EVERY_NATIVE), z),
        (lambda x: native_objective(x, y, EVERY_NATIVE), z.double()),
    ):
        x = x.clone().requires_grad_()
        run(x).sum().backward()
        results.append(x.grad)
    ours, native, truth = results
    assert_within_budget(ours, native, truth, dtype)
    label = y[0]
    scale = 1e-3 if dtype == torch.float32 else 0.1
    for perturb in (
        lambda g: g * (1 + scale),
        lambda g: g.index_put((torch.tensor(0), label), g[0, label] * (1 + scale)),
        lambda g: torch.cat([g[:, 1:], g[:, :1]], 1),
    ):
        with pytest.raises(AssertionError, match="exceeds"):
            assert_within_budget(perturb(ours), native, truth, dtype)


def test_logit_l2_counts_every_class_once() -> None:
    """14 and 15: padded lanes counted as classes."""
    for classes in (1, 5, 16, 17, 47, 64, 65):
        z = torch.full((2, classes), 3.0)
        assert LogitL2()(z).item() == pytest.approx(9.0, rel=1e-6)
        assert objkern.row_statistics(z).mean_logit[0].item() == 3.0
