"""The terms: C++ against Python, tables worked by hand, and the algebra's exact meaning."""

import math

import pytest
import torch

import objkern
from objkern import _C, terms
from objkern.objective import Term
from objkern.statistics import Statistics

from .conftest import NATIVE, random_rows

PARAMETERS = {
    "CrossEntropy": [0.0, 0.1, 1.0],
    "Focal": [0.0, 0.5, 2.0],
    "Poly1": [-1.0, 2.0],
    "GeneralizedCrossEntropy": [0.3, 1.0],
    "Margin": [-0.5, 0.35],
    "KLDivergence": [1.0, 2.5],
    "_ReverseKL": [1.0, 2.5],
}


# Those of a divergence need a reference: test_divergence.py.
ROW_TERMS = [name for name, term in Term.registry.items() if term.kind is not None and not term.reads_reference]


def example_statistics(seed: int) -> list[float]:
    """Statistics of a real row, from confident and right (seed 0) to confident and wrong."""
    z = torch.randn(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z[2] += [12.0, 3.0, 0.0, -9.0][seed % 4]
    beside = z.flip(0)
    return [float(field) for field in objkern.row_statistics(z, torch.tensor(2), reference=beside, backend="reference")]


@pytest.mark.parametrize(
    ("cls", "parameter"), [(cls, p) for cls in Term.by_kind.values() for p in PARAMETERS.get(cls.__name__, [0.0])]
)
@pytest.mark.parametrize("seed", range(4))
def test_cpp_and_python_terms_agree(cls: type[Term], parameter: float, seed: int) -> None:
    """Value and every partial derivative: the C++ twin states its derivative, Python's comes from autograd."""
    values = example_statistics(seed)
    weight = 1.7 if cls.reads_class_weight else 1.0
    leaves = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]
    expected = cls.formula(Statistics(*leaves), parameter, weight)
    partials = torch.autograd.grad(expected, leaves, allow_unused=True)
    value, found = _C.term(cls.kind, parameter, weight, values)
    assert value == pytest.approx(expected.item(), rel=1e-12)
    for field, ours, theirs in zip(Statistics._fields, found, partials, strict=True):
        assert ours == pytest.approx(0.0 if theirs is None else theirs.item(), rel=1e-10, abs=1e-300), field


def test_every_cpp_kind_has_a_python_twin() -> None:
    """The enum in csrc/objective.h and the classes here count the same, without gaps."""
    assert sorted(Term.by_kind) == list(range(len(Term.by_kind)))
    unknown, _ = _C.term(len(Term.by_kind), 0.0, 1.0, example_statistics(0))
    assert math.isnan(unknown)


def test_derive_by_hand() -> None:
    """z = (0, log 2, log 3), target 2: p = (1, 2, 3)/6; the others are (0, log 2), M = log 2, S = 3/2."""
    half = math.log(0.5)
    centred = [
        math.log(2), 1.5, 0.5 * half, half, half**2 / 2, half**2,  # max, Σe, Σe·t, Σt, Σ(z − mean)², Σz²
        2.0, half, 0.0, 0.0, 3.0, math.log(3), 1.0, 1.0,  # Σw, Σw·t, soft, soft, classes, z_y, w_y, is max
        0.0, 0.0, 0.0, 0.0, 0.0, 0.25, 0.75,  # of a reference: what gradients read, and the divergences
    ]  # fmt: skip
    found = Statistics(*_C.derive(centred, False))
    z = [0.0, math.log(2), math.log(3)]
    p = [1 / 6, 2 / 6, 3 / 6]
    assert found.logprob == pytest.approx(math.log(0.5), rel=1e-15)
    assert found.other_logprob == pytest.approx(math.log(0.5), rel=1e-15)
    assert found.lse == pytest.approx(math.log(6), rel=1e-15)
    assert found.entropy == pytest.approx(-sum(q * math.log(q) for q in p), rel=1e-15)
    assert found.max_logit == z[2]
    assert found.target_logit == z[2]
    assert found.mean_logit == pytest.approx(sum(z) / 3, rel=1e-15)
    assert found.mean_square_logit == pytest.approx(sum(x * x for x in z) / 3, rel=1e-14)
    assert found.logit_variance == pytest.approx(sum((x - sum(z) / 3) ** 2 for x in z) / 3, rel=1e-14)
    assert found.mean_logprob == pytest.approx(sum(math.log(q) for q in p) / 3, rel=1e-15)
    assert (found.forward_kl, found.reverse_kl) == (0.25, 0.75)


# p = (1, 2, 3)/6, target 2, by hand.
BY_HAND = {
    "CrossEntropy()": math.log(2),
    "CrossEntropy(label_smoothing=0.3)": 0.7 * math.log(2) + 0.1 * (math.log(6) + math.log(3) + math.log(2)),
    "ZLoss()": math.log(6) ** 2,
    "MaxZLoss()": math.log(3) ** 2,
    "Entropy()": math.log(6) / 6 + math.log(3) / 3 + math.log(2) / 2,
    "Focal(gamma=2.0)": 0.25 * math.log(2),
    "Poly1(epsilon=3.0)": math.log(2) + 1.5,
    "GeneralizedCrossEntropy(q=0.5)": 2 * (1 - math.sqrt(0.5)),
    "Unlikelihood()": math.log(2),
    "Margin(m=1.0)": math.log(1 + math.exp(1.0)),  # the odds against the target are e
    "LogitL2()": (math.log(2) ** 2 + math.log(3) ** 2) / 3,
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("formula", BY_HAND)
def test_terms_by_hand(formula: str, backend: str) -> None:
    z = torch.tensor([[0.0, math.log(2), math.log(3)]], dtype=torch.float64)
    loss = objkern.parse(formula)(z, torch.tensor([2]), backend=backend)
    assert loss.item() == pytest.approx(BY_HAND[formula], rel=1e-14)


def test_every_term_is_worked_by_hand_and_written_natively() -> None:
    """A new term that nobody checked by an independent formula fails here."""
    for formulas in (BY_HAND, NATIVE):
        assert {f.split("(")[0] for f in formulas} == set(ROW_TERMS)


@pytest.mark.parametrize("formula", NATIVE)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_float64_values_and_gradients_against_the_native_formula(formula: str, backend: str) -> None:
    z, y = random_rows(13, 37, torch.float64)
    upstream = torch.randn(13, dtype=torch.float64)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss = objkern.parse(formula)(ours, y, reduction="none", backend=backend)
    expected = NATIVE[formula](theirs, y)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    loss.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("cls", "arguments", "error", "message"),
    [
        (terms.CrossEntropy, {"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected a number in \[0.0, 1.0\] but got 1.5"),
        (terms.CrossEntropy, {"label_smoothing": "a"}, TypeError, "label_smoothing: expected a number but got 'a'"),
        (terms.CrossEntropy, {"weight": torch.ones(2, 2)}, ValueError, r"weight: expected a floating-point tensor of shape \(V,\)"),
        (terms.Focal, {"gamma": -1.0}, ValueError, "gamma: expected a number >= 0.0 but got -1.0"),
        (terms.GeneralizedCrossEntropy, {"q": 0.0}, ValueError, "q: expected 0 < q"),
        (terms.GeneralizedCrossEntropy, {"q": 1.01}, ValueError, "q: expected"),
        (terms.Poly1, {"epsilon": math.nan}, ValueError, "epsilon: expected a number finite"),
        (terms.Margin, {"m": math.inf}, ValueError, "m: expected"),
        (terms.Margin, {"m": True}, TypeError, "m: expected a number but got True"),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(cls: type, arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        cls(**arguments)


def test_rows_of_custom_terms() -> None:
    """Each term gets the per-row tensors that it has arguments for; one that is missing, or that nobody reads, raises."""
    logits, a, b = torch.randn(5, 7), torch.rand(5), torch.rand(5)

    def first(s: Statistics, a: torch.Tensor) -> torch.Tensor:
        return s.lse * a

    def second(s: Statistics, *, b: torch.Tensor, c: float = 2.0) -> torch.Tensor:
        return s.lse * b * c

    both = objkern.custom(first) + objkern.custom(second)
    expected = (logits.logsumexp(-1) * (a + 2.0 * b)).mean()
    torch.testing.assert_close(both(logits, rows={"a": a, "b": b}), expected)
    everything = objkern.custom(lambda s, **rows: s.lse * rows["a"] * rows["b"])
    torch.testing.assert_close(everything(logits, rows={"a": a, "b": b}), (logits.logsumexp(-1) * a * b).mean())
    with pytest.raises(ValueError, match=r"rows: custom\(<function second>\) needs 'b' but got \['a'\]"):
        both(logits, rows={"a": a})
    with pytest.raises(ValueError, match=r"rows: no term reads \['d'\]"):
        both(logits, rows={"a": a, "b": b, "d": a})


def test_a_built_in_term_has_no_subclasses() -> None:
    """The kernels would not see what they change; and a plain term must not be what somebody made of it."""
    z, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    before = objkern.CrossEntropy()(z, y, backend="reference")
    for built_in in (objkern.CrossEntropy, objkern.KLDivergence, objkern.Huber, objkern.LogitL2):
        with pytest.raises(TypeError, match=rf"Other: the kernels know terms by .*, and \d+ is {built_in.__name__}"):
            type("Other", (built_in,), {"formula": staticmethod(lambda s, parameter, weight: 2.0 * s.lse)})
    assert objkern.CrossEntropy()(z, y, backend="reference") == before
    assert "Other" not in Term.registry
