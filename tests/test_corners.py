"""Corners where the library was once wrong: masks, NaN, scales, and what surrounds a loss in real training code."""

import math

import pytest
import torch
import torch.nn.functional as F

import objkern
from objkern import (
    BinaryCrossEntropy,
    CrossEntropy,
    Entropy,
    KLDivergence,
    LogitL2,
    MaxZLoss,
    Unlikelihood,
    ZLoss,
    custom,
)

INF = math.inf


@pytest.mark.parametrize("classes", [5, 64, 65, 9000])
@pytest.mark.parametrize("objective", [CrossEntropy(), CrossEntropy() + ZLoss(), CrossEntropy() - Entropy(), LogitL2()])
def test_a_softcap_leaves_excluded_classes_alone(objective: objkern.Objective, classes: int) -> None:
    x = torch.randn(1, classes)
    x[0, -3] = -INF
    x.requires_grad_()
    objective(x, torch.tensor([0]), softcap=30.0).backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad[0, -3] == 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("classes", "place"), [(2, 1), (5, 2), (100, 17), (20000, 9000)])
def test_a_nan_among_masked_classes_is_not_lost(classes: int, place: int, backend: str) -> None:
    x = torch.full((1, classes), -INF)
    x[0, 0], x[0, place] = 1.0, math.nan
    for objective in (CrossEntropy(), ZLoss(), MaxZLoss(), Entropy(), CrossEntropy(torch.ones(classes))):
        assert objective(x, torch.tensor([0]), backend=backend).isnan(), repr(objective)
    assert objkern.cross_entropy(x, torch.tensor([0])).isnan()
    y = torch.zeros(1, classes)
    y[0, place] = math.nan
    for target in (0, place):
        assert MaxZLoss()(y, torch.tensor([target]), backend=backend).isnan()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("classes", [3, 100])
def test_a_logit_of_infinity_and_a_row_without_classes_are_nan(classes: int, backend: str) -> None:
    x = torch.zeros(3, classes)
    x[0, 1] = INF
    x[1] = -INF
    for objective in (CrossEntropy(), ZLoss(), MaxZLoss(), Entropy(), Unlikelihood(), LogitL2()):
        for y in (torch.tensor([1, 1, 1]), torch.tensor([0, 0, 0])):
            found = objective(x, y, reduction="none", backend=backend)
            assert found.isnan().tolist() == [True, True, False], (objective, y)


def test_probability_targets_learn_through_tensor_coefficients() -> None:
    x = torch.randn(2, 5)
    for value in (0.5, 0.0):
        q = torch.rand(2, 5, requires_grad=True)
        ours = (torch.tensor(value) * CrossEntropy())(x, q)
        torch.testing.assert_close(torch.autograd.grad(ours, q), torch.autograd.grad(value * F.cross_entropy(x, q), q))


@pytest.mark.parametrize(
    "objective", [CrossEntropy(), CrossEntropy() + custom(lambda s: s.lse)], ids=["term", "custom"]
)
def test_a_learned_scale_beside_masks_and_ignored_rows(objective: objkern.Objective) -> None:
    x = torch.randn(3, 5, dtype=torch.float64)
    x[0, 1] = -INF
    x[2] = math.nan
    y = torch.tensor([0, 2, -100])
    s = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(objective(x, y, logit_scale=s, reduction="sum"), s)
    (expected,) = torch.autograd.grad(objective(x[:2], y[:2], logit_scale=s, reduction="sum", backend="reference"), s)
    torch.testing.assert_close(found, expected)


def test_the_gradient_of_a_scale_is_summed_before_it_is_rounded() -> None:
    x = torch.randn(15, 64).to(torch.bfloat16)
    y = torch.randint(0, 64, (15,))
    s = torch.tensor(1.5, requires_grad=True)
    (found,) = torch.autograd.grad(CrossEntropy()(x, y, logit_scale=s), s)
    (exact,) = torch.autograd.grad(F.cross_entropy(x.double() * s, y), s)
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-6)


def test_float16_does_not_underflow_under_loss_scaling() -> None:
    x = torch.zeros(2, 5, dtype=torch.float16)
    x[:, 0] = 20
    x.requires_grad_()
    y = torch.tensor([0, -100])
    both = [torch.autograd.grad(CrossEntropy()(x, y, gradient=g) * 65536, x)[0] for g in ("forward", "backward")]
    assert torch.equal(*both)
    assert both[0][0].abs().min() > 1e-5
    (infinite,) = torch.autograd.grad(CrossEntropy()(x, y, gradient="forward") * INF, x)
    assert not infinite[1].any()


def test_parameters_stay_connected_when_they_are_replaced() -> None:
    x, y = torch.randn(3, 5), torch.tensor([0, 1, 2])
    objective = CrossEntropy() + torch.nn.Parameter(torch.tensor(0.3)) * ZLoss()
    plain, z = CrossEntropy()(x, y), ZLoss()(x)
    called = torch.func.functional_call(objective, {"coefficient_0": torch.tensor(100.0)}, (x, y))
    torch.testing.assert_close(called, plain + 100 * z)
    objective.load_state_dict({"coefficient_0": torch.tensor(1.0)}, assign=True)
    loss = objective(x, y)
    torch.testing.assert_close(loss, plain + z)
    loss.backward()
    torch.testing.assert_close(next(objective.parameters()).grad, z)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_parts_belong_to_the_caller(reduction: str) -> None:
    x, y = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])
    coefficient = torch.tensor(0.5, requires_grad=True)
    loss, parts = (CrossEntropy() + coefficient * ZLoss())(x, y, return_parts=True, reduction=reduction)
    before = loss.detach().clone()
    for value in parts.values():
        value += 100
    assert torch.equal(loss.detach(), before)
    loss.sum().backward()
    with pytest.raises(ValueError, match="name: 'total' is a part of every call"):
        custom(lambda s: s.lse, name="total")


def test_a_custom_term_may_be_a_module_with_weights() -> None:
    class Learned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(1, 1)

        def forward(self, s: objkern.Statistics) -> torch.Tensor:
            return self.linear(s.lse[:, None]).squeeze(-1)

    fn = Learned()
    objective = CrossEntropy() + custom(fn)
    objective(torch.randn(4, 5), torch.tensor([0, 1, 2, 3])).backward()
    assert fn.linear.weight.grad is not None


def test_lost_gradients_are_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(5))
    with pytest.raises(ValueError, match="class weight: a constant here"):
        CrossEntropy(weight)(torch.randn(2, 5), torch.tensor([0, 1]))


def test_dtypes_as_in_torch() -> None:
    x, q = torch.randn(2, 5).half(), torch.rand(2, 5)
    assert objkern.cross_entropy(x, q).dtype == F.cross_entropy(x, q).dtype
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            x = torch.randn(2, 5).to(dtype)
            assert (
                objkern.cross_entropy(x, torch.tensor([0, 1])).dtype == F.cross_entropy(x, torch.tensor([0, 1])).dtype
            )


@pytest.mark.parametrize("gradient", ["backward", "forward"])
@pytest.mark.parametrize(
    "formula", ["CrossEntropy()", "CrossEntropy(label_smoothing=0.1) + 0.1*ZLoss() - 0.01*Entropy()"]
)
def test_compiled_without_a_graph_break(formula: str, gradient: str) -> None:
    """18: a compiled loss that is wrong when a label is ignored, or a graph break."""
    objective = objkern.parse(formula)
    torch._dynamo.reset()
    run = torch.compile(lambda x, y: 2.0 * objective(x, y, gradient=gradient), fullgraph=True, backend="aot_eager")
    for rows in (4, 7):
        x = torch.randn(rows, 9)
        y = torch.randint(0, 9, (rows,))
        y[1] = -100
        results = []
        for call in (run, lambda x, y: 2.0 * objective(x, y)):
            leaf = x.clone().requires_grad_()
            loss = call(leaf, y)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ignore_index": 2**63}, ValueError, "ignore_index: expected an int of 64 bits"),
        ({"class_dim": "a"}, TypeError, "class_dim: expected an int but got 'a'"),
        ({"class_dim": 1.0}, TypeError, "class_dim: expected an int"),
        ({"rows": [1]}, TypeError, "rows: expected a dict of tensors"),
        ({"shift": torch.tensor([1, 1])}, ValueError, "shift: expected 0 or 1"),
        ({"shift": True}, ValueError, "shift: expected 0 or 1 but got True"),
        ({"validate": "x"}, TypeError, "validate: expected True, False or None"),
        ({"softcap": 1e-50}, ValueError, "softcap: expected a number > 0"),
    ],
)
def test_more_bad_options(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        CrossEntropy()(torch.zeros(2, 3), torch.tensor([0, 1]), **options)


def test_more_bad_algebra() -> None:
    with pytest.raises(ValueError, match="coefficient: expected a finite number"):
        10**400 * ZLoss()
    with pytest.raises(ValueError, match="objective: "):
        objkern.parse("9" * 400 + "*ZLoss()")
    with pytest.raises(TypeError, match="divisor: expected a number"):
        ZLoss() / torch.tensor(2.0)
    with pytest.raises(ValueError, match="target or reference: custom"):
        custom(lambda s: s.logprob * 2)(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="expected at least one class"):
        torch.ops.objkern.statistics(torch.zeros(2, 0), None, None, None, -100, 0.0, True)


# ---- rows without finite logits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("classes", [1, 3, 33, 200, 1500, 20000])
@pytest.mark.parametrize("objective", [CrossEntropy(), CrossEntropy() + ZLoss() - Entropy()], ids=repr)
def test_a_row_without_a_finite_logit(objective: objkern.Objective, classes: int, backend: str) -> None:
    """The loss is NaN, nothing is accurate, and excluded classes have no gradient."""
    for label in (0, classes - 1):
        x = torch.full((2, classes), -INF)
        x[1] = 0.0
        x[1, label] = 9.0
        x.requires_grad_()
        y = torch.tensor([label, label])
        loss, parts = objective(x, y, reduction="none", return_parts=True, backend=backend)
        assert loss.isnan().tolist() == [True, False]
        assert parts["accuracy"].tolist() == [0.0, 1.0]
        loss.sum().backward()
        assert not x.grad[0].any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("row", [[math.nan], [INF], [math.nan, -INF], [3.0, math.nan]])
@pytest.mark.parametrize("excluded", [0, 300])
def test_nan_and_infinity_beside_no_other_class(excluded: int, row: list[float], backend: str) -> None:
    logits = torch.tensor([row + excluded * [-INF]])
    loss, parts = CrossEntropy()(logits, torch.tensor([0]), backend=backend, return_parts=True)
    assert loss.isnan()
    assert parts["accuracy"] == 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("value", [math.nan, INF, -INF])
def test_whatever_an_ignored_row_holds(value: float, backend: str) -> None:
    """Nothing comes of it, in second derivatives neither."""
    x = torch.tensor([[value, 1.0], [1.0, 2.0]], requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    y = torch.tensor([-100, 1])
    first = torch.autograd.grad(CrossEntropy()(x, y, logit_scale=scale, backend=backend), (x, scale))
    again = torch.autograd.grad(CrossEntropy()(x, y, logit_scale=scale, backend=backend), (x, scale), create_graph=True)
    torch.testing.assert_close(again, first)
    assert first[0][0].tolist() == [0.0, 0.0]
    (second,) = torch.autograd.grad(again[0].square().sum() + again[1], x)
    assert second[0].tolist() == [0.0, 0.0]
    assert second.isfinite().all()


# ---- what surrounds a call ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_drop_in_on_meta_tensors(dtype: torch.dtype) -> None:
    x, y = torch.empty(5, 7, dtype=dtype, device="meta"), torch.empty(5, dtype=torch.long, device="meta")
    assert objkern.cross_entropy(x, y).dtype == F.cross_entropy(x, y).dtype


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_numbers_do_not_follow_the_default_device(default: str) -> None:
    x, y = torch.randn(5, 7), torch.randint(7, (5,))
    expected = CrossEntropy()(x, y, logit_scale=2.0, normalizer=3)
    try:
        torch.set_default_device(default)
        for backend in ("auto", "reference"):
            found = CrossEntropy()(x, y, logit_scale=2.0, normalizer=3, backend=backend)
            torch.testing.assert_close(found, expected)
    finally:
        torch.set_default_device(None)


def test_labels_are_not_looked_at_while_a_graph_is_traced() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    x, y = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    loss = lambda a, b: CrossEntropy()(a, b, backend="reference")  # noqa: E731
    torch.testing.assert_close(
        torch.func.vmap(loss)(x, y), torch.stack([loss(a, b) for a, b in zip(x, y, strict=True)])
    )
    assert torch.func.hessian(lambda a: loss(a, y[0]))(x[0]).shape == (5, 7, 5, 7)
    with FakeTensorMode():
        assert loss(torch.randn(5, 7), torch.zeros(5, dtype=torch.long)).shape == ()
    graph = make_fx(loss)(x[0], y[0])
    torch.testing.assert_close(graph(x[0], y[0]), loss(x[0], y[0]))


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"z_loss": torch.tensor(0.5, requires_grad=True)}, TypeError, "z_loss: expected a number"),
    ({"entropy": "x"}, TypeError, "entropy: expected a number"),
    ({"z_loss": True}, TypeError, "z_loss: expected a number"),
    ({"z_loss": math.nan}, ValueError, "z_loss: expected a number finite"),
    ({"z_loss": 10**400}, ValueError, "z_loss"),
    ({"label_smoothing": None}, TypeError, "label_smoothing: expected a number"),
    ({"weight": [1.0] * 7}, TypeError, "weight: expected a floating-point tensor"),
    ({"weight": torch.ones(7, dtype=torch.long)}, TypeError, "weight: expected a floating-point tensor"),
], ids=str)  # fmt: skip
def test_bad_numbers_of_the_drop_in(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        objkern.cross_entropy(torch.randn(5, 7), torch.randint(7, (5,)), **options)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"return_parts": "none"}, TypeError, "return_parts: expected True or False"),
    ({"backend": []}, ValueError, "backend: expected"),
    ({"logit_scale": 10**400}, ValueError, "logit_scale: expected a finite number"),
    ({"normalizer": 10**400}, ValueError, "normalizer: expected a finite number"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_bad_options_of_an_objective(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        CrossEntropy()(torch.randn(5, 7), torch.randint(7, (5,)), **options)


def test_tensors_that_are_not_dense() -> None:
    x, y = torch.randn(5, 7), torch.randint(7, (5,))
    nested = torch.nested.nested_tensor([torch.randn(2, 7), torch.randn(3, 7)], layout=torch.jagged)
    for logits, name in ((x.to_sparse(), "sparse_coo"), (nested, "nested")):
        with pytest.raises(TypeError, match=f"logits: expected a dense tensor but got a {name} one"):
            CrossEntropy()(logits, y)
    with pytest.raises(TypeError, match="target: expected a dense tensor"):
        CrossEntropy()(x, x.softmax(-1).to_sparse())


def freed(x: torch.Tensor) -> torch.Tensor:
    """As FSDP and offloading leave one: its shape stays, its memory is gone."""
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def test_memory_that_is_gone_is_an_error() -> None:
    z, y, q = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0]), torch.rand(6, 5)
    per_class = torch.ones(5)
    calls = {
        "logits": lambda: CrossEntropy()(freed(z), y),
        "logits: ": lambda: objkern.row_statistics(freed(z)),
        "logits:": lambda: objkern.cross_entropy(freed(z.bfloat16()), y),
        "target": lambda: CrossEntropy()(z, freed(q)),
        "target: ": lambda: CrossEntropy()(z.bfloat16(), freed(q)),
        "target:": lambda: CrossEntropy()(z, freed(y)),
        "class_weight": lambda: CrossEntropy(weight=freed(per_class))(z, y),
        "reference": lambda: KLDivergence()(z, reference=freed(z)),
        "input": lambda: BinaryCrossEntropy()(freed(z), q),
        " target": lambda: BinaryCrossEntropy()(z, freed(q)),
        " weight": lambda: BinaryCrossEntropy(weight=freed(per_class))(z, q),
        "pos_weight": lambda: BinaryCrossEntropy(pos_weight=freed(per_class))(z, q),
        "logit_scale": lambda: CrossEntropy()(z, y, logit_scale=freed(torch.tensor(2.0))),
        "logit_scale:": lambda: BinaryCrossEntropy()(z, q, logit_scale=freed(torch.tensor(2.0))),
        "normalizer": lambda: CrossEntropy()(z, y, normalizer=freed(torch.tensor(2.0))),
        "parameter": lambda: objkern.L2([gone])(),
    }
    gone = freed(z)
    for name, call in calls.items():
        with pytest.raises(ValueError, match="its memory has been freed") as raised:
            call()
        assert name.strip(" :") in str(raised.value) or name == "parameter"
    x = z.clone().requires_grad_()
    loss = CrossEntropy()(x, y)
    memory = x.detach().clone()
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="logits: its memory has been freed"):
        loss.backward()
    x.untyped_storage().resize_(memory.untyped_storage().nbytes())
    with torch.no_grad():
        x.copy_(memory)
    CrossEntropy()(x, y).backward()
    assert torch.empty(0, 5).untyped_storage().nbytes() == 0
    assert CrossEntropy()(torch.empty(0, 5), torch.empty(0, dtype=torch.long), reduction="sum") == 0.0
