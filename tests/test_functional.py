"""The drop-in cross_entropy against torch: PyTorch's own samples, then the corners they leave out."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal import common_modules
from torch.testing._internal.common_methods_invocations import op_db

import objkern

from .conftest import assert_masks_are_no_part_of_a_gradient, assert_within_budget

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
CROSS_ENTROPY = next(op for op in op_db if op.name == "nn.functional.cross_entropy")


def assert_same(input: torch.Tensor, target: torch.Tensor, kwargs: dict) -> None:
    """Value, dtype and shape of the result, and the gradients under a random upstream gradient."""
    results = []
    for function in (objkern.cross_entropy, F.cross_entropy):
        x = input.detach().clone().requires_grad_()
        y = target.detach().clone().requires_grad_() if target.is_floating_point() else target
        loss = function(x, y, **kwargs)
        upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(7)).to(loss.dtype)
        loss.backward(upstream)
        results.append((loss.detach(), x.grad, y.grad if y.is_floating_point() else torch.zeros(())))
    if input.dtype in (torch.bfloat16, torch.float16):
        # torch rounds between its steps and objkern does not: agreement is what torch's own error allows.
        x = input.detach().double().requires_grad_()
        y = target.detach().double().requires_grad_() if target.is_floating_point() else target
        weight = kwargs.get("weight")
        truth = F.cross_entropy(x, y, **{**kwargs, "weight": None if weight is None else weight.double()})
        truth.backward(upstream.double())
        for ours, theirs, exact in zip(*results, (truth, x.grad, y.grad), strict=True):
            assert ours.dtype == theirs.dtype
            assert ours.shape == theirs.shape
            if exact is None or not torch.isfinite(exact).all():
                torch.testing.assert_close(ours, theirs, equal_nan=True)
            else:
                assert_within_budget(ours, theirs, exact, input.dtype)
        return
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opinfo_samples(dtype: torch.dtype) -> None:
    samples = list(CROSS_ENTROPY.sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) >= 20
    for sample in samples:
        assert_same(sample.input, sample.args[0], sample.kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_module_inputs(dtype: torch.dtype) -> None:
    make = common_modules.module_inputs_torch_nn_CrossEntropyLoss
    samples = make(None, "cpu", dtype, requires_grad=True, training=True)
    assert len(samples) >= 70
    for sample in samples:
        assert_same(*sample.forward_input.args, sample.constructor_input.kwargs)


@pytest.mark.skipif(
    not hasattr(common_modules, "module_error_inputs_torch_nn_CrossEntropyLoss"),
    reason="this torch has no such samples",
)
def test_module_error_inputs() -> None:
    make = common_modules.module_error_inputs_torch_nn_CrossEntropyLoss
    samples = make(None, "cpu", torch.float32, requires_grad=False, training=True)
    assert len(samples) >= 7
    for sample in samples:
        inputs = sample.module_error_input
        with pytest.raises(sample.error_type, match=sample.error_regex):
            objkern.cross_entropy(*inputs.forward_input.args, **inputs.constructor_input.kwargs)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(
    ("weighted", "smoothing", "reduction"), itertools.product((False, True), (0.0, 0.2, 1.0), ("mean", "sum", "none"))
)
def test_options_together(dtype: torch.dtype, weighted: bool, smoothing: float, reduction: str) -> None:
    x = torch.randn(4, 21, 3).to(dtype)
    weight = torch.rand(21).to(dtype) if weighted else None
    labels = torch.randint(0, 21, (4, 3))
    labels[1, 2] = labels[3, 0] = -100
    soft = torch.randn(4, 21, 3).softmax(1).to(dtype)
    for target in (labels, soft):
        assert_same(x, target, {"weight": weight, "label_smoothing": smoothing, "reduction": reduction})


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("values", [
    [[0.0, -torch.inf, 1.0], [2.0, 1.0, -torch.inf]],
    [[-torch.inf, -torch.inf, 1.0], [-torch.inf, 0.0, -torch.inf]],
    [[-torch.inf] * 3, [1.0, 2.0, 3.0]],
    [[torch.inf, 0.0, 1.0], [1.0, 2.0, 3.0]],
    [[torch.nan, 0.0, 1.0], [1.0, 2.0, 3.0]],
    [[1e38, -1e37, 0.0], [1e30, 1e30, 1e30]],
])  # fmt: skip
@pytest.mark.parametrize("target", [[0, 1], [2, 2], [1, 0]])
@pytest.mark.parametrize("times", [1, 70])
def test_infinities_and_nan_as_in_torch(
    times: int, values: list, target: list, weighted: bool, smoothing: float
) -> None:
    weight = torch.tensor([0.5, 0.0, 2.0]).repeat(times) if weighted else None
    assert_same(
        torch.tensor(values).repeat(1, times), torch.tensor(target),
        {"weight": weight, "label_smoothing": smoothing, "reduction": "none"},
    )  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("times", [1, 70])
@pytest.mark.parametrize("weighted", [False, True])
def test_minus_infinity_under_probabilities(weighted: bool, times: int, smoothing: float) -> None:
    """0·(−inf) is NaN in torch, and stays so in the drop-in; an Objective excludes the class."""
    x = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, 2.0, 1.0]]).repeat(1, times)
    q = torch.tensor([[0.5, 0.0, 0.5], [0.2, 0.3, 0.5]]).repeat(1, times) / times
    weight = torch.tensor([0.5, 1.5, 2.0]).repeat(times) if weighted else None
    assert_same(x, q, {"weight": weight, "label_smoothing": smoothing, "reduction": "none"})
    assert torch.isfinite(objkern.CrossEntropy(label_smoothing=smoothing)(x, q))


def test_empty_and_ignored_as_in_torch() -> None:
    for rows, target in ((0, torch.empty(0, dtype=torch.long)), (3, torch.full((3,), -100))):
        for reduction in ("mean", "sum", "none"):
            assert_same(torch.randn(rows, 5), target, {"reduction": reduction})
    zero_weights = {"weight": torch.zeros(5)}
    assert_same(torch.randn(2, 5), torch.tensor([1, 2]), zero_weights)


@pytest.mark.parametrize("other", [torch.int64, torch.uint8, torch.bool, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_of_dtypes_that_promote(dtype: torch.dtype, other: torch.dtype) -> None:
    x, y = torch.randn(6).to(dtype), torch.tensor([0, 1, 1, 0, 3, 0]).to(other)
    for a, b in ((x, y), (y, x)):
        found, expected = objkern.mse_loss(a, b), F.mse_loss(a, b)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)
    whole = torch.ones(3, dtype=torch.int64)
    for of_whole, message in ((F.mse_loss, "for 'Long'"), (objkern.mse_loss, r"for torch\.int64")):  # torch has none
        with pytest.raises(NotImplementedError, match=f"not implemented {message}"):
            of_whole(whole, whole)


def test_a_row_whose_label_has_a_dimension() -> None:
    z = torch.randn(5)
    for label in (torch.tensor([1]), torch.tensor([-100])):
        for reduction in ("none", "sum"):
            found, expected = (f(z, label, reduction=reduction) for f in (objkern.cross_entropy, F.cross_entropy))
            torch.testing.assert_close(found, expected)


def test_byte_labels_and_single_rows() -> None:
    assert_same(torch.randn(6, 5), torch.randint(0, 5, (6,)).byte(), {})
    assert_same(torch.randn(5), torch.tensor(2), {})
    assert_same(torch.randn(5), torch.rand(5), {})
    assert_same(torch.randn(2, 1), torch.tensor([0, 0]), {"label_smoothing": 0.1})


@pytest.mark.parametrize("bad", [torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 9])])
def test_errors_have_torchs_type(bad: torch.Tensor) -> None:
    x = torch.randn(2, 5)
    with pytest.raises(Exception) as theirs:  # noqa: PT011  (the type is what is compared)
        F.cross_entropy(x, bad)
    with pytest.raises(theirs.type):
        objkern.cross_entropy(x, bad)


def test_the_legacy_arguments_still_mean_what_they_meant() -> None:
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for size_average, reduce in ((True, None), (False, None), (None, False), (False, True)):
        with pytest.warns(UserWarning, match="deprecated"):
            ours = objkern.cross_entropy(x, y, size_average=size_average, reduce=reduce)
        with pytest.warns(UserWarning, match="deprecated"):
            theirs = F.cross_entropy(x, y, size_average=size_average, reduce=reduce)
        torch.testing.assert_close(ours, theirs)


def test_the_extras_are_the_terms() -> None:
    x, y = torch.randn(5, 7, requires_grad=True), torch.tensor([0, 3, -100, 6, 2])
    loss = objkern.cross_entropy(x, y, label_smoothing=0.1, z_loss=0.5, entropy=-0.2)
    objective = objkern.CrossEntropy(label_smoothing=0.1) + 0.5 * objkern.ZLoss() - 0.2 * objkern.Entropy()
    torch.testing.assert_close(loss, objective(x, y))
    with pytest.raises(TypeError):
        objkern.cross_entropy(x, y, None, None, -100, None, "mean", 0.0, 0.5)  # keyword-only


# ---- row_statistics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_row_statistics_against_their_definitions(backend: str) -> None:
    z = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 11, (2, 3))
    r = torch.randn(2, 3, 11, dtype=torch.float64)
    s = objkern.row_statistics(z, y, reference=r, temperature=1.5, backend=backend)
    log_p, log_pt, log_q = z.log_softmax(-1), (z / 1.5).log_softmax(-1), (r / 1.5).log_softmax(-1)
    own = log_p.gather(-1, y[..., None]).squeeze(-1)
    expected = objkern.Statistics(
        logprob=own,
        other_logprob=torch.log1p(-own.exp()),
        lse=z.logsumexp(-1),
        entropy=-(log_p.exp() * log_p).sum(-1),
        max_logit=z.amax(-1),
        mean_logit=z.mean(-1),
        mean_square_logit=z.square().mean(-1),
        logit_variance=z.var(-1, correction=0),
        target_logit=z.gather(-1, y[..., None]).squeeze(-1),
        mean_logprob=log_p.mean(-1),
        forward_kl=(log_q.exp() * (log_q - log_pt)).sum(-1),
        reverse_kl=(log_pt.exp() * (log_pt - log_q)).sum(-1),
    )
    for name, found, wanted in zip(s._fields, s, expected, strict=True):
        upstream = torch.randn(2, 3, dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12, msg=name)
        (ours,) = torch.autograd.grad(found, z, upstream, retain_graph=True)
        (theirs,) = torch.autograd.grad(wanted, z, upstream, retain_graph=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_row_statistics_without_target_with_ignored_rows_and_shift(backend: str) -> None:
    z = torch.randn(2, 4, 9)
    s = objkern.row_statistics(z, backend=backend)
    assert s.logprob is s.other_logprob is s.target_logit is None
    torch.testing.assert_close(s.lse, z.logsumexp(-1))
    y = torch.randint(0, 9, (2, 4))
    y[0, 2] = -100
    s = objkern.row_statistics(z, y, shift=1, backend=backend)
    expected = torch.zeros(2, 4)
    expected[:, :-1] = z[:, :-1].log_softmax(-1).gather(-1, y[:, 1:, None].clamp(min=0)).squeeze(-1)
    expected[0, 1] = 0.0
    torch.testing.assert_close(s.logprob, expected)
    assert s.lse[0, 1] == s.lse[0, 3] == 0.0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [6, 700, 9000])
def test_statistics_beside_masks_of_the_least_number(classes: int, dtype: torch.dtype, backend: str) -> None:
    assert_masks_are_no_part_of_a_gradient(backend, classes, dtype)


def test_a_policy_loss_on_row_statistics() -> None:
    """The primitive is enough for a clipped policy loss; its gradient equals the one on full logits."""
    z, y = torch.randn(5, 13, dtype=torch.float64), torch.randint(0, 13, (5,))
    old, advantage = torch.randn(5, dtype=torch.float64) - 2, torch.randn(5, dtype=torch.float64)

    def policy_loss(logprob: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        ratio = (logprob - old).exp()
        return -(torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) + 0.01 * entropy).mean()

    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    s = objkern.row_statistics(a, y)
    policy_loss(s.logprob, s.entropy).backward()
    log_p = b.log_softmax(-1)
    policy_loss(log_p.gather(1, y[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)).backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-14)
