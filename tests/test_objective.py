"""The algebra, the options of a call, parsing, and derivatives of every order."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import objkern
from objkern import CrossEntropy, Entropy, Focal, LogitL2, Margin, Objective, Poly1, ZLoss, custom, parse

from .conftest import EVERY_TERM, NATIVE, native_objective, random_rows

OBJECTIVE = CrossEntropy(label_smoothing=0.1) + 1e-4 * ZLoss() - 0.01 * Entropy()


# ---- algebra --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        (CrossEntropy(), "CrossEntropy()"),
        (OBJECTIVE, "CrossEntropy(label_smoothing=0.1) + 0.0001*ZLoss() - 0.01*Entropy()"),
        (-(CrossEntropy() - 2 * ZLoss()), "-CrossEntropy() + 2.0*ZLoss()"),
        (3 * (CrossEntropy() + 2 * ZLoss()) * 0.5, "1.5*CrossEntropy() + 3.0*ZLoss()"),
        (sum([CrossEntropy(), Focal(2), Focal(gamma=3.5)]), "CrossEntropy() + Focal(gamma=2.0) + Focal(gamma=3.5)"),
        (Poly1(-1) - Margin(0.35), "Poly1(epsilon=-1.0) - Margin(m=0.35)"),
        (0 * ZLoss() + 1e300 * LogitL2(), "0.0*ZLoss() + 1e+300*LogitL2()"),
    ],
)
def test_repr_reads_like_the_formula_and_parses_back(objective: Objective, text: str) -> None:
    assert repr(objective) == text
    assert repr(parse(text)) == text
    assert repr(parse(f"  {text}\n")) == text


def test_arithmetic_makes_new_objectives() -> None:
    a = CrossEntropy() + ZLoss()
    b = 2 * a
    assert repr(a) == "CrossEntropy() + ZLoss()"
    assert repr(b) == "2.0*CrossEntropy() + 2.0*ZLoss()"
    assert repr(a / 4) == "0.25*CrossEntropy() + 0.25*ZLoss()"
    with pytest.raises(TypeError):
        a + 1
    with pytest.raises(TypeError):
        a * a
    with pytest.raises(TypeError):
        "2" * a
    with pytest.raises(ValueError, match=r"coefficient: expected .* but got a torch.float32 tensor of shape \(2,\)"):
        a * torch.ones(2)
    with pytest.raises(ValueError, match="coefficient: expected a finite number but got nan"):
        float("nan") * a


@pytest.mark.parametrize(
    "text",
    [
        "", "1", "ZLoss", "ZLoss() +", "2*3", "ZLoss()*ZLoss()", "ZLoss()/2", "Nonsense()", "__import__('os').system('x')",
        "Focal()", "Focal(gamma='2')", "Focal(gamma=[2])", "Focal(2, gamma=2)", "Focal(**{})", "CrossEntropy(weight=w)",
        "ZLoss() if 1 else ZLoss()", "(lambda: ZLoss())()", "True*ZLoss()", "custom(f)", "+".join(["ZLoss()"] * 3) + "+",
        "Focal(gamma=2, gamma=3)", "ZLoss(1, 2, 3)", "ZLoss(3.0)", "2**3*ZLoss()", "-" * 100_000 + "ZLoss()", "(" * 5000 + "ZLoss()" + ")" * 5000,
        "ZLoss()\0", "GeneralizedCrossEntropy(q=7)", "1e999*ZLoss()", "objective(x)", "Term()", "Custom(1)",
    ],
)  # fmt: skip
def test_what_cannot_be_parsed_says_so(text: str) -> None:
    with pytest.raises(ValueError, match=r"objective: |q: expected|coefficient: "):
        parse(text)
    with pytest.raises(TypeError, match="objective: expected a string but got int"):
        parse(3)


def test_parse_is_a_parser_and_not_eval() -> None:
    """Only names of terms and numbers mean anything."""
    assert repr(parse("-2*(CrossEntropy(label_smoothing=0.1) - 3*ZLoss())")) == (
        "-2.0*CrossEntropy(label_smoothing=0.1) + 6.0*ZLoss()"
    )
    assert repr(parse("Focal(2)*0.5")) == "0.5*Focal(gamma=2.0)"
    assert repr(parse("2*-3*ZLoss()")) == "-6.0*ZLoss()"


def test_terms_that_hold_tensors_or_functions_do_not_parse_back() -> None:
    for objective in (CrossEntropy(torch.ones(3)), custom(lambda s: s.lse), torch.tensor(0.5) * ZLoss()):
        with pytest.raises(ValueError, match="objective: "):
            parse(repr(objective))


def test_pickle_deepcopy_and_state_dict() -> None:
    z, y = random_rows(4, 5, torch.float32)
    objective = CrossEntropy(torch.arange(1.0, 6.0)) + torch.tensor(0.5) * ZLoss()
    for twin in (pickle.loads(pickle.dumps(objective)), copy.deepcopy(objective)):
        assert repr(twin) == repr(objective)
        assert torch.equal(twin(z, y), objective(z, y))
    assert [k.split(".")[-1] for k in objective.state_dict()] == ["weight"]
    assert objective.double().weighted_terms[0][1].weight.dtype == torch.float64


# ---- coefficients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_tensor_coefficients_are_read_at_every_call_and_learn(backend: str) -> None:
    z, y = random_rows(6, 9, torch.float64)
    schedule = torch.tensor(0.25, dtype=torch.float64)
    learned = torch.nn.Parameter(torch.tensor(-0.5, dtype=torch.float64))
    objective = CrossEntropy() + schedule * ZLoss() + 3 * (learned * Entropy())
    assert [p is learned for p in objective.parameters()] == [True]
    for value in (0.25, 0.125):
        schedule.fill_(value)
        x = z.clone().requires_grad_()
        loss, parts = objective(x, y, return_parts=True, backend=backend)
        expected = parts["cross_entropy"] + value * parts["z_loss"] - 1.5 * parts["entropy"]
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
        learned.grad = None
        (2.0 * loss).backward()
        torch.testing.assert_close(learned.grad, 6 * parts["entropy"], rtol=1e-12, atol=0)
    x = z.clone().requires_grad_()
    upstream = torch.randn(6, dtype=torch.float64)
    learned.grad = None
    losses, parts = objective(x, y, reduction="none", return_parts=True, backend=backend)
    losses.backward(upstream)
    torch.testing.assert_close(learned.grad, 3 * (upstream * parts["entropy"]).sum(), rtol=1e-12, atol=0)


def test_a_parameter_coefficient_is_registered() -> None:
    weight = torch.nn.Parameter(torch.tensor(0.1))
    assert [p is weight for p in (CrossEntropy() + weight * ZLoss()).parameters()] == [True]


@pytest.mark.parametrize("scale", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("objective", [OBJECTIVE, OBJECTIVE + custom(lambda s: s.lse)], ids=["terms", "custom"])
def test_a_logit_scale_learns(objective: Objective, softcap: float | None, scale: float) -> None:
    z, y = random_rows(4, 7, torch.float64)
    found = []
    for backend in ("cpu", "reference"):
        s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        x = z.clone().requires_grad_()
        (1.3 * objective(x, y, logit_scale=s, softcap=softcap, backend=backend)).backward()
        found.append((s.grad, x.grad))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-10, atol=1e-14)
    assert found[0][0] != 0


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.5, -2.0])
def test_scale_then_softcap_then_margin(scale: float, softcap: float | None) -> None:
    z, y = random_rows(5, 8, torch.float64)
    x = z * scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    expected = native_objective(x, y, {"Margin(m=0.35)": 1.0, "LogitL2()": 1.0}).mean()
    loss = (Margin(0.35) + LogitL2())(z, y, logit_scale=scale, softcap=softcap)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "normalizer", [7, 2.5, torch.tensor(4.0), torch.tensor(13), torch.tensor(3, dtype=torch.int32)]
)
def test_a_normalizer_replaces_every_denominator(normalizer: float | torch.Tensor, backend: str) -> None:
    z, y = random_rows(6, 5, torch.float64)
    y[0] = -100
    weight = torch.rand(5, dtype=torch.float64)
    objective = CrossEntropy(weight) + 0.5 * ZLoss()
    total, parts = objective(z, y, reduction="sum", return_parts=True, backend=backend)
    loss, normalized = objective(z, y, normalizer=normalizer, return_parts=True, backend=backend)
    torch.testing.assert_close(loss, total / float(normalizer), rtol=1e-12, atol=0)
    torch.testing.assert_close(normalized["z_loss"], parts["z_loss"] / float(normalizer), rtol=1e-12, atol=0)


def test_normalizer_makes_accumulation_exact() -> None:
    """24: two micro-batches with uneven masks give the gradient of the one big batch."""
    z, y = random_rows(10, 6, torch.float64)
    y[[0, 1, 7]] = -100
    whole = z.clone().requires_grad_()
    OBJECTIVE(whole, y).backward()
    pieces = z.clone().requires_grad_()
    count = (y != -100).sum()
    for part in (slice(0, 3), slice(3, 10)):
        OBJECTIVE(pieces[part], y[part], normalizer=count).backward()
    torch.testing.assert_close(whole.grad, pieces.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_shift_for_causal_models(backend: str) -> None:
    z = torch.randn(3, 7, 11, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 11, (3, 7))
    y[1, 4:] = -100
    loss, parts = OBJECTIVE(z, y, shift=1, return_parts=True, backend=backend)
    short, expected = OBJECTIVE(z[:, :-1], y[:, 1:], return_parts=True, backend=backend)
    torch.testing.assert_close(loss, short, rtol=1e-13, atol=0)
    assert parts["rows"] == expected["rows"] == 15
    (gradient,) = torch.autograd.grad(loss, z)
    assert not gradient[:, -1].any()
    rows = OBJECTIVE(z, y, shift=1, reduction="none", backend=backend)
    assert rows.shape == (3, 7)
    assert not rows[:, -1].any()


def test_class_dim() -> None:
    z = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 5, (2, 3, 4))
    loss = CrossEntropy(label_smoothing=0.1)(z, y, class_dim=1)
    torch.testing.assert_close(loss, F.cross_entropy(z, y, label_smoothing=0.1))
    torch.testing.assert_close(
        torch.autograd.grad(loss, z)[0], torch.autograd.grad(F.cross_entropy(z, y, label_smoothing=0.1), z)[0]
    )
    q = torch.rand(2, 5, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(CrossEntropy()(z, q, class_dim=1), F.cross_entropy(z, q))
    torch.testing.assert_close(CrossEntropy()(z[0, :, 0, 0], y[0, 0, 0]), F.cross_entropy(z[0, :, 0, 0], y[0, 0, 0]))


def test_terms_without_a_target_need_none() -> None:
    z = torch.randn(4, 6, dtype=torch.float64)
    loss, parts = (ZLoss() - Entropy())(z, return_parts=True)
    expected = z.logsumexp(-1).square().mean() - NATIVE["Entropy()"](z, None).mean()
    torch.testing.assert_close(loss, expected)
    assert sorted(parts) == ["entropy", "lse", "rows", "total", "z_loss"]


def test_parts_are_named_and_numbered() -> None:
    z, y = random_rows(4, 6, torch.float32)
    objective = CrossEntropy() + Focal(1) + 2 * Focal(2) + Focal(3) + custom(lambda s: s.lse, name="mine")
    _, parts = objective(z, y, return_parts=True)
    assert list(parts) == [
        "cross_entropy", "focal", "focal_2", "focal_3", "mine", "total", "lse", "accuracy", "target_probability", "rows",
    ]  # fmt: skip
    _, rows = objective(z, y, return_parts=True, reduction="none")
    assert all(value.shape == (4,) for value in rows.values())
    assert "rows" not in rows


def test_accuracy_breaks_ties_as_argmax_does() -> None:
    z = torch.tensor([[1.0, 2.0, 2.0], [2.0, 2.0, 1.0], [3.0, 3.0, 3.0]])
    for backend in ("cpu", "reference"):
        for y in ([1, 0, 0], [2, 1, 2], [0, 2, 1]):
            _, parts = CrossEntropy()(z, torch.tensor(y), return_parts=True, backend=backend)
            assert parts["accuracy"] == (z.argmax(-1) == torch.tensor(y)).float().mean(), (backend, y)


# ---- probability targets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("weighted", [False, True])
def test_probability_targets_with_regularizers(weighted: bool, backend: str) -> None:
    z, q = torch.randn(5, 19, dtype=torch.float64), torch.randn(5, 19, dtype=torch.float64).softmax(-1)
    weight = torch.rand(19, dtype=torch.float64) if weighted else None
    x, t = z.clone().requires_grad_(), q.clone().requires_grad_()
    loss = (CrossEntropy(weight, 0.1) + 0.5 * ZLoss() - 0.3 * Entropy())(x, t, backend=backend)
    loss.backward(torch.tensor(1.7, dtype=torch.float64))
    x2, t2 = z.clone().requires_grad_(), q.clone().requires_grad_()
    expected = F.cross_entropy(x2, t2, weight=weight, label_smoothing=0.1) + 0.5 * x2.logsumexp(-1).square().mean()
    expected = expected - 0.3 * NATIVE["Entropy()"](x2, None).mean()
    expected.backward(torch.tensor(1.7, dtype=torch.float64))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(t.grad, t2.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_take_probabilities_of_either_precision(dtype: torch.dtype) -> None:
    z, q = torch.randn(3, 40).to(dtype), torch.rand(3, 40)
    full = CrossEntropy()(z, q)
    torch.testing.assert_close(full, F.cross_entropy(z.double(), q.double()).float(), rtol=1e-6, atol=0)
    rounded = CrossEntropy()(z, q.to(dtype))
    torch.testing.assert_close(rounded, F.cross_entropy(z.double(), q.to(dtype).double()).float(), rtol=1e-6, atol=0)


# ---- derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formula", [*NATIVE, EVERY_TERM])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_and_gradgradcheck(formula: str, reduction: str) -> None:
    z, y = random_rows(3, 5, torch.float64, scale=1.0)
    y[1] = -100
    objective = parse(formula)
    run = lambda x: objective(x, y, reduction=reduction, logit_scale=1.2, softcap=6.0)  # noqa: E731
    x = z.requires_grad_()
    assert gradcheck(run, x)
    assert gradgradcheck(run, x)


def test_gradcheck_of_statistics_targets_scales_and_coefficients() -> None:
    z, y = random_rows(3, 5, torch.float64, scale=1.0)
    x = z.requires_grad_()
    q = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    c = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    statistics = lambda x, s: tuple(objkern.row_statistics(x, y, logit_scale=s, reference=q.detach()))  # noqa: E731
    whole = lambda x, q, s, c: (CrossEntropy(label_smoothing=0.1) + c * ZLoss())(x, q, logit_scale=s)  # noqa: E731
    for check in (gradcheck, gradgradcheck):
        assert check(statistics, (x, s))
        assert check(whole, (x, q, s, c))


def test_frozen_logits_cost_no_gradient() -> None:
    z, y = random_rows(3, 5, torch.float32)
    assert not OBJECTIVE(z, y).requires_grad
    with torch.no_grad():
        assert not OBJECTIVE(z.requires_grad_(), y, gradient="forward").requires_grad
    with torch.inference_mode():
        assert OBJECTIVE(z.detach(), y).isfinite()


# ---- custom terms ---------------------------------------------------------------------------------------------------


def test_a_custom_term_equals_the_built_in_one() -> None:
    z, y = random_rows(6, 23, torch.float64)
    y[3] = -100
    ours, own = (z.clone().requires_grad_() for _ in range(2))
    mine = custom(lambda s: -torch.exp(2.0 * s.other_logprob) * s.logprob, needs=("logprob", "other_logprob"))
    a, parts = (CrossEntropy() + 0.5 * mine)(ours, y, return_parts=True)
    b, expected = (CrossEntropy() + 0.5 * Focal(2.0))(own, y, return_parts=True)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts["custom"], expected["focal"], rtol=1e-12, atol=0)
    a.backward()
    b.backward()
    torch.testing.assert_close(ours.grad, own.grad, rtol=1e-11, atol=1e-15)


def test_a_custom_term_reads_rows_and_ignores_ignored_rows() -> None:
    z, y = torch.randn(2, 3, 5), torch.tensor([[0, -100, 2], [1, 4, -100]])
    advantage = torch.randn(2, 3, requires_grad=True)

    def policy(s: objkern.Statistics, advantage: torch.Tensor) -> torch.Tensor:
        return -advantage * s.logprob / s.lse.abs()  # 0/0 in ignored rows

    loss, parts = custom(policy)(z.requires_grad_(), y, rows={"advantage": advantage}, return_parts=True)
    assert next(iter(parts)) == "policy"
    loss.backward()
    assert torch.isfinite(z.grad).all()
    assert not z.grad[0, 1].any()
    assert advantage.grad[0, 0] != 0


def test_custom_mistakes_are_named() -> None:
    z, y = random_rows(4, 5, torch.float32)
    with pytest.raises(ValueError, match=r"needs: \['nonsense'\] are not among the statistics"):
        custom(lambda s: s.lse, needs=("nonsense",))
    with pytest.raises(TypeError, match="fn: expected a function"):
        custom(3)
    with pytest.raises(ValueError, match=r"expected one real value per row, a tensor of shape \(4,\), but got"):
        custom(lambda s: s.lse.mean())(z, y)
    with pytest.raises(ValueError, match="expected one real value per row"):
        custom(lambda s: s.lse + 1j)(z, y)
    with pytest.raises(ValueError, match=r"rows: weights: expected a tensor of shape \(4,\)"):
        custom(lambda s, weights: s.lse * weights)(z, y, rows={"weights": torch.ones(5)})
    with pytest.raises(ValueError, match="target: custom"):
        custom(lambda s: s.logprob, needs=("logprob",))(z)
    for needs in (("logprob", "target_logit"), ("other_logprob",), ("target_logit",)):
        with pytest.raises(ValueError, match=r"target: .*needs class labels"):
            custom(lambda s: s.target_logit, needs=needs)(z, z.softmax(-1))
    with pytest.raises(ValueError, match=r"class labels \(int64\) as target or reference: .* statistics that are None"):
        custom(lambda s: s.logprob + s.target_logit)(z, z.softmax(-1))
    with pytest.raises(ValueError, match=r"rows: no term reads \['a'\]"):
        OBJECTIVE(z, y, rows={"a": torch.ones(4)})


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_mean_over_one_row_divides_by_its_weight(backend: str) -> None:
    """Also where the mean over no rows is to be 0."""
    z, y, weight = torch.randn(3, 4), torch.tensor([-100, 2, -100]), torch.tensor([1.0, 2.0, 5.0, 1.0])
    for empty in ("zero", "nan"):
        found = CrossEntropy(weight)(z, y, empty=empty, backend=backend)
        torch.testing.assert_close(found, F.cross_entropy(z[1:2], y[1:2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_custom_term_may_write_to_its_statistics(dtype: torch.dtype, requires_grad: bool) -> None:
    """They are its own: the other terms' stay as they are."""
    z, y = torch.randn(4, 5, dtype=dtype, requires_grad=requires_grad), torch.zeros(4, dtype=torch.long)
    in_place = custom(lambda s: s.lse.mul_(2.0), name="a") + ZLoss() + custom(lambda s: s.lse.add_(1.0), name="b")
    plain = custom(lambda s: s.lse * 2.0, name="a") + ZLoss() + custom(lambda s: s.lse + 1.0, name="b")
    for backend in ("auto", "reference"):
        torch.testing.assert_close(in_place(z, y, backend=backend), plain(z, y, backend=backend))
