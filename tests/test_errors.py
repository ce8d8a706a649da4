"""Bad input: the error names the argument, what was expected and what came, and nothing is lost."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import objkern
from objkern import BinaryCrossEntropy, CrossEntropy, Focal, KLDivergence, LogitL2, ZLoss, custom
from objkern.batch import flatten

from .nonsense import POOL, REFUSALS, named

Z = torch.zeros(4, 6)
Y = torch.zeros(4, dtype=torch.long)
OBJECTIVE = CrossEntropy() + 0.1 * ZLoss()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([[0.0]], Y), {}, TypeError, r"logits: expected a tensor but got \[\[0.0\]\] \(list\)"),
        ((Z.int(), Y), {}, TypeError, r"logits: expected float32, .* but got a torch.int32 tensor of shape \(4, 6\)"),
        ((Z.to(torch.complex64), Y), {}, TypeError, "logits: expected float32"),
        ((torch.tensor(1.0), Y), {}, ValueError, r"logits: expected shape \(..., V\) but got a 0-dim tensor"),
        ((torch.zeros(4, 0), Y), {}, ValueError, r"logits: expected at least one class but got shape \(4, 0\)"),
        ((Z, [0, 1, 2, 3]), {}, TypeError, "target: expected a tensor but got"),
        ((Z, Y[:3]), {}, ValueError, r"target: expected labels of shape \(4,\) but got \(3,\)"),
        ((Z, Y[:, None]), {}, ValueError, r"target: expected labels of shape \(4,\) but got \(4, 1\)"),
        ((Z, Y.int()), {}, TypeError, r"target: expected int64 labels .* but got a torch.int32 tensor of shape \(4,\)"),
        ((Z, Y.bool()), {}, TypeError, "target: expected int64 labels"),
        ((Z, torch.rand(4, 5)), {}, ValueError, r"probabilities of shape \(4, 6\) but got a torch.float32 tensor of shape \(4, 5\)"),
        ((Z, torch.rand(4)), {}, ValueError, r"target: expected int64 labels of shape \(4,\) or probabilities"),
        ((Z, Y.to("meta")), {}, ValueError, "target: expected a tensor on cpu, as the logits, but got one on meta"),
        ((Z, None), {}, ValueError, r"target: CrossEntropy\(\) needs one but got None"),
        ((Z, Y), {"reduction": "avg"}, ValueError, 'reduction: expected "mean", "sum" or "none" but got \'avg\''),
        ((Z, Y), {"empty": "inf"}, ValueError, 'empty: expected "nan" or "zero"'),
        ((Z, Y), {"ignore_index": 1.5}, TypeError, "ignore_index: expected an int but got 1.5"),
        ((Z, Y), {"ignore_index": None}, TypeError, "ignore_index: expected an int but got None"),
        ((Z, Y), {"normalizer": "3"}, TypeError, "normalizer: expected a number or a 0-dim tensor but got '3'"),
        ((Z, Y), {"normalizer": torch.ones(2)}, ValueError, r"normalizer: .* tensor of shape \(2,\)"),
        ((Z, Y), {"normalizer": 3, "reduction": "sum"}, ValueError, "normalizer: replaces the denominator of reduction"),
        ((Z, Y), {"logit_scale": None}, TypeError, "logit_scale: expected a number or a 0-dim tensor but got None"),
        ((Z, Y), {"logit_scale": torch.ones(4, 1)}, ValueError, r"logit_scale: .* tensor of shape \(4, 1\)"),
        ((Z, Y), {"softcap": 0.0}, ValueError, "softcap: expected a number > 0 .* but got 0.0"),
        ((Z, Y), {"softcap": -3}, ValueError, "softcap: expected a number > 0"),
        ((Z, Y), {"shift": 2}, ValueError, "shift: expected 0 or 1 but got 2"),
        ((Z[0], Y[0]), {"shift": 1}, ValueError, r"shift: expected logits of shape \(..., T, V\)"),
        ((Z, torch.rand(4, 6)), {"shift": 1}, ValueError, "shift: expected int64 labels"),
        ((Z, Y), {"class_dim": 2}, ValueError, r"class_dim: 2 is out of range for logits of shape \(4, 6\)"),
        ((Z, Y), {"gradient": "none"}, ValueError, 'gradient: expected "backward" or "forward"'),
        ((Z, Y), {"gradient": "forward", "reduction": "none"}, ValueError, 'gradient="forward" needs a scalar reduction'),
        ((Z, Y), {"backend": "tpu"}, ValueError, "backend: expected .* but got 'tpu'"),
        ((Z, Y), {"rows": {"a": torch.ones(4)}}, ValueError, r"rows: no term reads \['a'\]"),
    ],
)  # fmt: skip
def test_a_bad_call_names_the_argument(arguments: tuple, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        OBJECTIVE(*arguments, **options)
    assert "[CrossEntropy() + 0.1*ZLoss() on logits" in str(caught.value), "the objective and the shapes are named too"


def test_terms_of_labels_refuse_probabilities() -> None:
    with pytest.raises(
        ValueError, match=r"target: Focal\(gamma=2.0\) needs class labels \(int64\) but got probabilities"
    ):
        (CrossEntropy() + Focal(2))(Z, torch.rand(4, 6))


def test_class_weights() -> None:
    with pytest.raises(ValueError, match=r"class weight: expected shape \(6,\) but got \(5,\)"):
        CrossEntropy(torch.ones(5))(Z, Y)
    with pytest.raises(ValueError, match="class weight: expected a tensor on cpu"):
        CrossEntropy(torch.ones(6, device="meta"))(Z, Y)
    shared = torch.ones(6)
    both = CrossEntropy(shared) + CrossEntropy(shared, 0.1)
    both(Z, Y)
    both.double()(Z, Y)  # each term has its own copy now
    for other in (CrossEntropy(torch.ones(6) * 2), CrossEntropy()):
        with pytest.raises(ValueError, match="class weight: the cross-entropy terms of one objective share one"):
            (CrossEntropy(shared) + other)(Z, Y)


def test_no_native_backend_is_not_silent() -> None:
    with FakeTensorMode():
        z, y = torch.zeros(4, 6, device="mps"), torch.zeros(4, dtype=torch.int64, device="mps")
        everywhere = (
            r'backend: none runs on mps:0 but backend="reference", .*: cuda: its kernels are .*; triton: there is'
        )
        with pytest.raises(NotImplementedError, match=everywhere):
            OBJECTIVE(z, y)
        for backend, device, why in (
            ("cpu", "cuda", "cannot run on cuda:0: its kernels are for CPU tensors"),
            ("cuda", "cpu", "cannot run on cpu: its kernels are for CUDA tensors"),
        ):
            z, y = torch.zeros(4, 6, device=device), torch.zeros(4, dtype=torch.int64, device=device)
            with pytest.raises(ValueError, match=f'backend: "{backend}" {why}'):
                OBJECTIVE(z, y, backend=backend)


def test_forward_gradients_of_custom_terms_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot serve custom"):
        custom(lambda s: s.lse)(Z.clone().requires_grad_(), Y, gradient="forward")


def test_an_error_changes_nothing() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    before = x.detach().clone()
    with pytest.raises(IndexError):
        OBJECTIVE(x, torch.tensor([0, 1, 99, 2]), gradient="forward")
    assert torch.equal(x.detach(), before)
    assert x.grad is None
    assert OBJECTIVE(x, Y).isfinite()


def test_set_validation() -> None:
    with pytest.raises(ValueError, match='validation: expected "cpu" or "always" but got \'never\''):
        objkern.set_validation("never")
    of = lambda validate: flatten(Z.to("meta"), Y.to("meta"), validate=validate).validate  # noqa: E731
    assert [of(None), of(True), of(False)] == [False, True, False]
    objkern.set_validation("always")
    try:
        assert [of(None), of(True), of(False)] == [True, True, False]
    finally:
        objkern.set_validation("cpu")
    assert flatten(Z, Y, validate=False).validate  # on a CPU looking is free


def test_changing_logits_before_the_backward_pass_is_noticed() -> None:
    """As in torch: a silent wrong gradient is the alternative."""
    x = torch.randn(3, 5, requires_grad=True)
    z = x * 2
    loss = OBJECTIVE(z, Y[:3])
    z.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- anything for any argument --------------------------------------------------------------------------------------

HIDDEN, WEIGHT = torch.zeros(4, 5), torch.zeros(6, 5)
DIVERGENCE, OF_ELEMENTS = CrossEntropy() + KLDivergence(), BinaryCrossEntropy() + 0.1 * LogitL2()
CUSTOM = CrossEntropy() + custom(lambda s, a=None: s.lse)
BODY = torch.nn.Linear(2, 2)
ROWS = {"logits": Z, "target": Y}
LAYER = {"hidden": HIDDEN, "weight": WEIGHT, "target": Y, "bias": None}
AS_TORCH = ("cross_entropy", "linear_cross_entropy", "binary_cross_entropy_with_logits", "mse_loss")

# name -> (what is called, its arguments, the options that every call has)
DOORS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "objective": (OBJECTIVE.forward, ROWS),
    "objective that learns": (OBJECTIVE.forward, {"logits": Z.clone().requires_grad_(), "target": Y}),
    "objective without a target": (ZLoss().forward, {"logits": Z}),
    "divergence": (DIVERGENCE.forward, ROWS | {"reference": Z}),
    "custom": (CUSTOM.forward, ROWS),
    "reference": (OBJECTIVE.forward, ROWS | {"backend": "reference"}),
    "elements": (OF_ELEMENTS.forward, {"logits": Z, "target": Z}),
    "penalty": ((objkern.L2(BODY) + OBJECTIVE).forward, ROWS),
    "linear": (OBJECTIVE.linear, LAYER),
    "linear that learns": (OBJECTIVE.linear, LAYER | {"weight": WEIGHT.clone().requires_grad_()}),
    "linear divergence": (DIVERGENCE.linear, LAYER | {"reference": Z}),
    "linear custom": (CUSTOM.linear, LAYER),
    "row_statistics": (objkern.row_statistics, ROWS),
    "linear_row_statistics": (objkern.linear_row_statistics, LAYER),
    "cross_entropy": (objkern.cross_entropy, {"input": Z, "target": Y}),
    "linear_cross_entropy": (objkern.linear_cross_entropy, {"input": HIDDEN, "linear_weight": WEIGHT, "target": Y}),
    "binary_cross_entropy_with_logits": (objkern.binary_cross_entropy_with_logits, {"input": Z, "target": Z}),
    "mse_loss": (objkern.mse_loss, {"input": Z, "target": Z}),
    "custom(...)": (custom, {"fn": lambda s: s.lse}),
    **{term: (getattr(objkern, term), {}) for term in (
        "CrossEntropy", "Focal", "Poly1", "GeneralizedCrossEntropy", "Margin", "KLDivergence", "BinaryCrossEntropy", "Huber",
    )},
    **{term: (getattr(objkern, term), {"parameters": BODY} | more) for term, more in (
        ("L2", {}), ("L1", {}), ("ElasticNet", {"l1": 0.1, "l2": 0.1}), ("L2SP", {}), ("EWC", {"fisher": {name: p.detach().square() for name, p in BODY.named_parameters()}}),
    )},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:size_average and reduce")
@pytest.mark.parametrize("door", DOORS)
def test_anything_for_any_argument(door: str) -> None:
    """It is taken for what it is, or refused by an error that names the argument: nothing of Python's own about
    attributes or truth values, nothing from inside."""
    call, arguments = DOORS[door]
    names = [name for name in inspect.signature(call).parameters if not (door == "reference" and name == "backend")]
    wrong, refused = [], 0
    for name in names:
        for what, value in POOL.items():
            try:
                call(**arguments | {name: value})
            except REFUSALS as error:
                refused += 1
                if not (door in AS_TORCH or named(error, name)):
                    wrong.append((name, what, error))
            except RuntimeError as error:  # torch's own
                if not (door in AS_TORCH or "Inference tensors cannot be saved for backward" in str(error)):
                    wrong.append((name, what, error))
            finally:
                objkern.set_validation("cpu")
    assert not wrong, "\n".join(
        f"{name}, {what}: {str(error)[:200]!r} ({type(error).__name__})" for name, what, error in wrong
    )
    assert refused > len(POOL) * len(names) // 4
