"""The ops as citizens of torch: opcheck, torch.compile, torch.func, autocast, graphs, copies and threads."""

import copy
import math
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import objkern
from objkern import CrossEntropy, Entropy, LogitL2, MaxZLoss, ZLoss, custom, ops
from objkern.batch import flatten

from .conftest import EVERY_TERM

OPS = torch.ops.objkern
TERMS = [0.0, 0.1, 1.0, 1.0, 0.0, 0.01, 3.0, 0.0, -0.1]  # (kind, parameter, coefficient) of three terms
ELEMENTS = [0.0, 0.1, 1.0, 2.0, 0.0, 0.5]  # of two elementwise terms
OBJECTIVE = CrossEntropy(label_smoothing=0.1) + 0.01 * ZLoss() - 0.1 * Entropy()
CUSTOM = CrossEntropy() + 0.1 * custom(lambda s: s.entropy * s.lse, name="product")
LABELS = torch.tensor([1, -100, 2, 3, 6])


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).mul_(2).to(dtype).requires_grad_()


def gradients(loss: Tensor, *inputs: Tensor, upstream: float = 1.7) -> tuple[Tensor, ...]:
    """Under an upstream gradient that is not 1: a shortcut for 1 must not hide a missing factor (PITFALLS 4)."""
    return torch.autograd.grad(loss.sum() * upstream, inputs)


# ---- opcheck --------------------------------------------------------------------------------------------------------

OBJECTIVE_CASES = {
    "plain": lambda x: ((TERMS, 1, x, LABELS), {}),
    "rows": lambda x: ((TERMS, 0, x, LABELS), {"with_parts": True}),
    "no target": lambda x: (([1.0, 0.0, 1.0], 2, x), {}),
    "tensors": lambda x: (
        (TERMS, 1, x, LABELS),
        {
            "with_parts": True,
            "coefficient_tensor": torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True),
            "logit_scale": torch.tensor(1.5, requires_grad=True),
            "normalizer": torch.tensor(3.0),
            "softcap": 5.0,
        },
    ),
    "probabilities": lambda x: (([0.0, 0.1, 1.0], 2, x, torch.rand(5, 7).requires_grad_()), {}),
    "weights": lambda x: ((TERMS, 1, x, LABELS), {"class_weight": torch.rand(7), "masked": False}),
    "half": lambda x: ((TERMS, 1, x.detach().bfloat16().requires_grad_(), LABELS), {}),
    "transposed": lambda x: ((TERMS, 1, torch.randn(7, 5).t().requires_grad_(), LABELS), {}),
}


@pytest.mark.parametrize("case", OBJECTIVE_CASES)
@pytest.mark.parametrize("op", ["objective", "fused"])
def test_opcheck_of_objectives(op: str, case: str) -> None:
    args, kwargs = OBJECTIVE_CASES[case](logits(5, 7))
    if op == "fused" and args[1] == 0:
        with pytest.raises(ValueError, match="the gradient of unreduced losses"):
            OPS.fused(*args, **kwargs)
        return
    torch.library.opcheck(getattr(OPS, op).default, args, kwargs)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("reduction", [0, 1])
def test_opcheck_of_the_gradient(reduction: int, requires_grad: bool) -> None:
    x = logits(5, 7)
    _, _, kept = OPS.objective(TERMS, reduction, x.detach(), LABELS)
    upstream = torch.randn(5 if reduction == 0 else (), requires_grad=requires_grad)
    x = x if requires_grad else x.detach()
    torch.library.opcheck(OPS.gradient.default, (upstream, kept, False, TERMS, reduction, x, LABELS))


def test_opcheck_of_statistics() -> None:
    x = logits(5, 7)
    torch.library.opcheck(OPS.statistics.default, (x, LABELS), {"softcap": 4.0})
    found, kept = OPS.statistics(x.detach(), LABELS)
    partials = torch.randn_like(found).requires_grad_()
    torch.library.opcheck(OPS.statistics_gradient.default, (partials, kept, False, x, LABELS))


# ---- torch.compile --------------------------------------------------------------------------------------------------


def plain_batch(rows: int, classes: int = 9, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    y = torch.randint(0, classes, (rows,))
    y[1] = -100
    return logits(rows, classes, dtype=dtype), y


COMPILED: dict[str, tuple[Callable[..., Tensor], Callable[[int], tuple[Tensor, ...]]]] = {
    "mean": (lambda x, y: OBJECTIVE(x, y), plain_batch),
    # 3: every row has its own upstream gradient
    "none": (lambda x, y: OBJECTIVE(x, y, reduction="none") * torch.arange(x.shape[0]), plain_batch),
    "forward": (lambda x, y: OBJECTIVE(x, y, gradient="forward"), plain_batch),
    "forward, half": (
        lambda x, y: OBJECTIVE(x, y, gradient="forward"),
        lambda n: plain_batch(n, dtype=torch.bfloat16),
    ),
    "drop-in": (lambda x, y: objkern.cross_entropy(x, y, label_smoothing=0.1, z_loss=0.01), plain_batch),
    # 2: two losses on the same logits
    "two losses": (lambda x, y: OBJECTIVE(x, y) + x.square().mean() + CrossEntropy()(x, y), plain_batch),
    "statistics": (lambda x, y: objkern.row_statistics(x, y).entropy * x.detach().amax(-1), plain_batch),
    "custom": (lambda x, y: CUSTOM(x, y), plain_batch),
    "parts": (
        lambda x, y: OBJECTIVE(x, y) * OBJECTIVE(x, y, return_parts=True)[1]["entropy"],
        plain_batch,
    ),
    "shift": (
        lambda x, y: OBJECTIVE(x, y, shift=1),
        lambda n: (logits(n, 5, 9), torch.randint(0, 9, (n, 5))),
    ),
    "class dimension": (
        lambda x, y: OBJECTIVE(x, y, class_dim=1),
        lambda n: (logits(n, 9, 5), torch.randint(0, 9, (n, 5))),
    ),
    "probabilities": (lambda x, q: CrossEntropy()(x, q), lambda n: (logits(n, 9), torch.rand(n, 9).requires_grad_())),
    "scale": (
        lambda x, y, s: OBJECTIVE(x, y, logit_scale=s, softcap=5.0),
        lambda n: (*plain_batch(n), torch.tensor(1.5, requires_grad=True)),
    ),
    # 11: strides of inputs and upstream gradients
    "transposed": (lambda x, y: OBJECTIVE(x.t(), y), lambda n: (logits(9, n), torch.randint(0, 9, (n,)))),
    "expanded": (
        lambda x, y: OBJECTIVE(x[:1].expand(x.shape[0], -1), y, reduction="none").sum(),
        plain_batch,
    ),
    "an objective of its own": (lambda x, y: (CrossEntropy(label_smoothing=0.1) + 0.1 * ZLoss())(x, y), plain_batch),
    "a linear layer before it": (
        lambda x, w, y: OBJECTIVE(x @ w, y),
        lambda n: (logits(n, 5), logits(5, 9), torch.randint(0, 9, (n,))),
    ),
    "reference": (lambda x, y: OBJECTIVE(x, y, backend="reference"), plain_batch),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_once_for_all_shapes(name: str) -> None:
    """18: one graph without a break, forward and backward; one more compilation when the shape turns out to vary."""
    function, batch = COMPILED[name]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for rows in (4, 7, 11, 16):
        inputs = batch(rows)
        leaves = [x for x in inputs if x.requires_grad]
        losses = [run(*inputs) for run in (compiled, function)]
        torch.testing.assert_close(losses[0], losses[1])
        for ours, eager in zip(*(gradients(loss, *leaves) for loss in losses), strict=True):
            torch.testing.assert_close(ours, eager)
            assert eager.any()
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["mean", "reference", "a linear layer before it"])
def test_compiled_by_inductor(name: str) -> None:
    """18: the default compiler, which fuses and reorders what surrounds the loss."""
    function, batch = COMPILED[name]
    torch._dynamo.reset()
    inputs = batch(6)
    leaves = [x for x in inputs if x.requires_grad]
    losses = [run(*inputs) for run in (torch.compile(function, fullgraph=True), function)]
    for ours, eager in zip(*(gradients(loss, *leaves) for loss in losses), strict=True):
        torch.testing.assert_close(ours, eager)


def test_a_schedule_does_not_recompile() -> None:
    coefficient = torch.tensor(0.5)
    objective = CrossEntropy() + coefficient * ZLoss()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(objective, fullgraph=True, backend=counter)
    x, y = plain_batch(6)
    for value in (0.5, 0.25, 0.0):
        coefficient.fill_(value)
        torch.testing.assert_close(compiled(x, y), objective(x, y))
    assert counter.frame_count == 1


def test_compiled_gradients_are_exact_where_the_model_is_sure() -> None:
    """5 and 6 through the compiled path: a margin of 40."""
    x = torch.zeros(3, 5)
    x[:, 0] = 40.0
    x.requires_grad_()
    y = torch.zeros(3, dtype=torch.long)
    torch._dynamo.reset()
    loss = torch.compile(CrossEntropy(), fullgraph=True, backend="aot_eager")(x, y)
    (found,) = gradients(loss, x)
    others = 1.7 / 3 / (math.exp(40.0) + 4)
    exact = torch.tensor([-4 * others] + [others] * 4, dtype=torch.float64).expand(3, 5)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        x = torch.empty(3, 5, 7, requires_grad=True)
        loss, parts = OBJECTIVE(x, torch.zeros(3, 5, dtype=torch.long), return_parts=True)
        loss.backward()
        assert loss.shape == ()
        assert x.grad.shape == x.shape
        assert set(parts) == {
            "cross_entropy", "z_loss", "entropy", "total", "lse", "accuracy", "target_probability", "rows",
        }  # fmt: skip
    x, y = torch.empty(2, 7, device="meta"), torch.empty(2, dtype=torch.long, device="meta")
    assert OBJECTIVE(x, y, reduction="none").is_meta


# ---- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(dtype: torch.dtype, compiled: bool) -> None:
    """19: the loss of half-precision logits is float32, and the gradient has the logits' dtype."""
    layer = torch.nn.Linear(6, 9)
    x, y = torch.randn(4, 6), torch.randint(0, 9, (4,))

    def run(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = layer(x)
        return OBJECTIVE(z, y), z

    torch._dynamo.reset()
    with torch.autocast("cpu", dtype):
        loss, z = (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(x, y)
    assert z.dtype == dtype
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, OBJECTIVE(z.detach(), y))
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.any()


# ---- torch.func -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [OBJECTIVE, CUSTOM], ids=["terms", "custom"])
def test_func_grad_and_vmap(objective: objkern.Objective) -> None:
    x, y = logits(3, 5, 7).detach(), torch.stack([LABELS, LABELS.flip(0), LABELS])
    per_sample = torch.vmap(torch.func.grad(lambda z, t: 1.7 * objective(z, t)))(x, y)
    for found, z, t in zip(per_sample, x, y, strict=True):
        leaf = z.clone().requires_grad_()
        (expected,) = gradients(objective(leaf, t), leaf)
        torch.testing.assert_close(found, expected)
    losses = torch.vmap(objective, in_dims=(1, None))(x.movedim(0, 1), LABELS)
    torch.testing.assert_close(losses, torch.stack([objective(z, LABELS) for z in x]))


def test_the_gradient_of_the_forward_pass_is_handed_over() -> None:
    """It was computed a second time: whoever asked whether anyone else holds it counted the tensor's Python object."""

    class Ops(TorchDispatchMode):
        names: list[str]

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names += [func.name()] * (func.namespace == "objkern")
            return func(*args, **(kwargs or {}))

    def called(loss: Tensor, x: Tensor) -> list[str]:
        with Ops() as mode:
            mode.names = []
            torch.autograd.grad(loss * 1.5, x, retain_graph=True)
        return mode.names

    x = logits(5, 7)
    loss = OBJECTIVE(x, LABELS, gradient="forward")
    assert called(loss, x) == ["objkern::rescale"]
    assert called(loss, x) == ["objkern::gradient"]  # that of the forward pass belongs to who asked first
    loss, _, _, held = OPS.fused(TERMS, 1, x, LABELS)
    before = held.clone()
    assert called(loss, x) == ["objkern::gradient"]
    assert torch.equal(held, before)


def test_func_grad_of_a_gradient_from_the_forward_pass() -> None:
    x = logits(5, 7)
    found = torch.func.grad(lambda z: 1.7 * OBJECTIVE(z, LABELS, gradient="forward"))(x.detach())
    torch.testing.assert_close(found, *gradients(OBJECTIVE(x, LABELS), x))


def test_func_jacrev_and_functional_call() -> None:
    x = logits(5, 7, dtype=torch.float64).detach()
    rows = torch.func.jacrev(lambda z: OBJECTIVE(z, LABELS, reduction="none"))(x)
    expected = torch.autograd.functional.jacobian(lambda z: OBJECTIVE(z, LABELS, reduction="none"), x)
    torch.testing.assert_close(rows, expected)
    twice = torch.func.jacrev(torch.func.jacrev(lambda z: OBJECTIVE(z, LABELS)))(x)
    hessian = torch.autograd.functional.hessian(lambda z: OBJECTIVE(z, LABELS, backend="reference"), x)
    torch.testing.assert_close(twice, hessian)

    model = torch.nn.Linear(6, 7).double()
    inputs = torch.randn(5, 6, dtype=torch.float64)
    found = torch.func.grad(lambda p: OBJECTIVE(torch.func.functional_call(model, p, (inputs,)), LABELS))(
        dict(model.named_parameters())
    )
    OBJECTIVE(model(inputs), LABELS).backward()
    torch.testing.assert_close(found["weight"], model.weight.grad)


@pytest.mark.parametrize("run", [OBJECTIVE, lambda x, y, **kw: objkern.row_statistics(x, y, **kw).entropy.sum()])
def test_forward_mode_says_what_to_do(run: Callable[..., Tensor]) -> None:
    x = logits(5, 7).detach()
    with pytest.raises(NotImplementedError, match='use reverse mode, or backend="reference"'):
        torch.func.jvp(lambda z: run(z, LABELS), (x,), (x,))
    _, tangent = torch.func.jvp(lambda z: run(z, LABELS, backend="reference"), (x,), (x,))
    expected = (torch.func.grad(lambda z: run(z, LABELS))(x) * x).sum()
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-6, check_dtype=False)


# ---- autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("gradient", ["backward", "forward"])
def test_two_backward_passes(gradient: str, compiled: bool) -> None:
    """2: a saved gradient that was scaled in place."""
    x, y = plain_batch(5)
    objective: Any = OBJECTIVE
    if compiled:
        torch._dynamo.reset()
        objective = torch.compile(OBJECTIVE, fullgraph=True, backend="aot_eager")
    loss = objective(x, y, gradient=gradient)
    found = [torch.autograd.grad(loss, x, torch.tensor(u), retain_graph=True)[0] for u in (3.0, 1.0, -0.5)]
    for gradient_, u in zip(found, (3.0, 1.0, -0.5), strict=True):
        torch.testing.assert_close(gradient_, u * found[1])
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_logits_changed_in_place_are_noticed() -> None:
    x, y = plain_batch(5)
    z = x * 1.0
    loss = OBJECTIVE(z, y)
    z.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("formula", [EVERY_TERM, "CrossEntropy()"])
def test_gradgradcheck(formula: str, reduction: str) -> None:
    objective = objkern.parse(formula)
    x = logits(4, 6, dtype=torch.float64)
    y = torch.tensor([0, 5, -100, 2])
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    run = lambda x, s: objective(x, y, reduction=reduction, logit_scale=s, softcap=7.0)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, scale))
    assert torch.autograd.gradgradcheck(run, (x, scale))
    assert torch.autograd.gradgradcheck(lambda x: objective(x, y, reduction=reduction), (x,))


def test_gradgradcheck_of_targets_coefficients_and_statistics() -> None:
    x = logits(3, 5, dtype=torch.float64)
    q = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 4, 2])
    assert torch.autograd.gradgradcheck(lambda x, q: CrossEntropy(label_smoothing=0.1)(x, q), (x, q))
    assert torch.autograd.gradgradcheck(lambda x, c: (CrossEntropy() + c * ZLoss())(x, y), (x, c))
    statistics = lambda x: torch.stack(objkern.row_statistics(x, y, reference=q))  # noqa: E731
    assert torch.autograd.gradgradcheck(statistics, (x,))


def test_the_gradient_penalty_of_a_model() -> None:
    """A second derivative as people use it, through layers before the loss."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5)).double()
    inputs = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 4])
    found = []
    for loss in (CrossEntropy(), F.cross_entropy):
        (to_inputs,) = torch.autograd.grad(loss(model(inputs), y), inputs, create_graph=True)
        found.append(torch.autograd.grad(to_inputs.square().sum(), list(model.parameters()), allow_unused=True))
    for ours, native in zip(*found, strict=True):
        torch.testing.assert_close(ours, native)


def test_no_graph_without_need() -> None:
    x, y = plain_batch(5)
    with torch.no_grad():
        assert not OBJECTIVE(x, y).requires_grad
        assert not OBJECTIVE(x, y, gradient="forward").requires_grad
    assert not OBJECTIVE(x.detach(), y).requires_grad
    with torch.inference_mode():
        loss, parts = OBJECTIVE(torch.randn(5, 9), y, return_parts=True)
        assert loss.is_inference()
        assert objkern.row_statistics(torch.randn(5, 9), y).lse.is_inference()
    assert "total" in parts


def test_saved_tensor_hooks_and_checkpointing() -> None:
    x, y = plain_batch(5)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        loss = OBJECTIVE(x, y)
    assert torch.Size([5, 9]) in packed
    (expected,) = gradients(loss, x)
    again = torch.utils.checkpoint.checkpoint(OBJECTIVE, x, y, use_reentrant=False)
    torch.testing.assert_close(gradients(again, x)[0], expected)


# ---- copies and threads ---------------------------------------------------------------------------------------------


def test_copies() -> None:
    coefficient = torch.nn.Parameter(torch.tensor(0.3))
    objective = CrossEntropy(torch.rand(9)) + coefficient * ZLoss() - 0.1 * (MaxZLoss() + 2 * LogitL2())
    x, y = plain_batch(5)
    expected = objective(x, y)
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert repr(twin) == repr(objective)
        assert torch.equal(twin(x, y), expected)
        next(twin.parameters()).data.fill_(5.0)
        assert not torch.equal(twin(x, y), expected)
    assert torch.equal(objective(x, y), expected)


def test_threads() -> None:
    """Many threads through one objective at once: each gets the values that it gets alone."""
    batches = [plain_batch(33, 1003) for _ in range(8)]
    alone = [(OBJECTIVE(x, y).detach(), *gradients(OBJECTIVE(x, y), x)) for x, y in batches]
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in batches]

    def work(k: int) -> None:
        x, y = batches[k]
        for _ in range(20):
            found[k].append((OBJECTIVE(x, y).detach(), *gradients(OBJECTIVE(x, y), x)))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, expected in zip(found, alone, strict=True):
        assert len(results) == 20
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected, strict=True))


# ---- corners found by attacking the derivatives ---------------------------------------------------------------------

# Arguments that were computed from one another, as functions of one leaf: name -> (shape of the leaf, loss).
ENTANGLED: dict[str, Callable[..., Tensor]] = {
    "target from logits": lambda t, **kw: CrossEntropy()(t + torch.eye(4, 5), t, **kw),
    "target is logits": lambda t, **kw: CrossEntropy(label_smoothing=0.1)(t, t, **kw),
    "target through a softmax": lambda t, **kw: CrossEntropy()(t.softmax(-1).log(), t.softmax(-1), **kw),
    "scale in the logits": lambda t, **kw: OBJECTIVE(t * t.mean(), LABELS[:4], logit_scale=t.mean(), **kw),
    "coefficient from logits": lambda t, **kw: (CrossEntropy() + t.mean() * ZLoss())(t, LABELS[:4], **kw),
    "statistics": lambda t, **kw: objkern.row_statistics(
        t * t.mean(), LABELS[:4], logit_scale=t.mean(), **kw
    ).entropy.mean(),
    "square of the loss": lambda t, **kw: OBJECTIVE(t, LABELS[:4], **kw).square(),
    "rows, not linear": lambda t, **kw: OBJECTIVE(t, LABELS[:4], reduction="none", **kw).exp().sum(),
    "product of losses": lambda t, **kw: OBJECTIVE(t, LABELS[:4], **kw) * CrossEntropy()(t, LABELS[:4], **kw),
}


@pytest.mark.parametrize("name", ENTANGLED)
def test_arguments_computed_from_one_another(name: str) -> None:
    """Derivatives through the reference once went through the caller's graph too, and counted it twice."""
    run = ENTANGLED[name]
    leaf = torch.randn(4, 5, dtype=torch.float64).softmax(-1).requires_grad_()
    results = []
    for backend in ("auto", "reference"):
        (plain,) = gradients(run(leaf, backend=backend), leaf)
        (first,) = torch.autograd.grad(run(leaf, backend=backend) * 1.7, leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum() + first.sum(), leaf)
        results.append((plain, first.detach(), second))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)
    _, pullback = torch.func.vjp(run, leaf.detach())
    torch.testing.assert_close(
        pullback(torch.tensor(1.7, dtype=torch.float64))[0], results[1][0], rtol=1e-9, atol=1e-12
    )


def test_vjp_to_every_argument() -> None:
    """Once zeros: outside its level a tensor of torch.func no longer says that it requires a gradient."""
    x, q = logits(4, 5, dtype=torch.float64).detach(), torch.rand(4, 5, dtype=torch.float64)
    s, c = torch.tensor(1.3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    one = torch.tensor(1.0, dtype=torch.float64)
    y = torch.tensor([0, 2, 1, 1])
    for run, inputs in (
        (lambda x, q: CrossEntropy()(x, q), (x, q)),
        (lambda x, s: OBJECTIVE(x, y, logit_scale=s), (x, s)),
        (lambda x, c: (CrossEntropy() + c * ZLoss())(x, y), (x, c)),
        (lambda x, s: objkern.row_statistics(x, y, logit_scale=s).lse.sum(), (x, s)),
    ):
        leaves = tuple(t.clone().requires_grad_() for t in inputs)
        expected = torch.autograd.grad(run(*leaves), leaves)
        for found, truth in zip(torch.func.vjp(run, *inputs)[1](one), expected, strict=True):
            assert truth.any()
            torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)


def test_batched_gradients() -> None:
    x, q = logits(4, 5, dtype=torch.float64), torch.rand(4, 5, dtype=torch.float64)
    y = torch.tensor([0, 2, 1, 1])
    upstream = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    for gradient in ("backward", "forward"):
        loss = CrossEntropy()(x, y, gradient=gradient)
        (found,) = torch.autograd.grad(loss, x, upstream, is_grads_batched=True)
        (one,) = torch.autograd.grad(CrossEntropy()(x, y), x)
        torch.testing.assert_close(found, upstream[:, None, None] * one)
    functional = torch.autograd.functional
    run = lambda q: CrossEntropy()(x.detach(), q, reduction="none")  # noqa: E731
    torch.testing.assert_close(functional.jacobian(run, q, vectorize=True), functional.jacobian(run, q))
    run = lambda x: CrossEntropy()(x, y)  # noqa: E731
    torch.testing.assert_close(functional.hessian(run, x, vectorize=True), functional.hessian(run, x))


def test_a_checkpoint_with_a_learned_scale() -> None:
    x, y = plain_batch(5)
    s = torch.tensor(1.5, requires_grad=True)
    run = lambda x: OBJECTIVE(x, y, logit_scale=s)  # noqa: E731
    again = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    for found, expected in zip(gradients(again, x, s), gradients(run(x), x, s), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_meta_tensor_beside_real_logits_is_refused() -> None:
    """Once a loss of uninitialised memory: a module that was made on meta and never materialised."""
    x, y = plain_batch(5)
    objective = CrossEntropy() + torch.nn.Parameter(torch.tensor(0.1)) * ZLoss()
    with pytest.raises(ValueError, match="coefficient: expected a tensor on cpu, as the logits, but got one on meta"):
        objective.to("meta")(x, y)
    with pytest.raises(
        ValueError, match="logit_scale: expected a tensor on cpu, as the other tensors, but got one on meta"
    ):
        CrossEntropy()(x, y, logit_scale=torch.ones((), device="meta"))
    with pytest.raises(ValueError, match=r"logit_scale: .* but got one on meta"):
        objkern.row_statistics(x, y, logit_scale=torch.ones((), device="meta"))
    z = torch.empty(4, 5, device="meta", requires_grad=True)
    CrossEntropy()(z, torch.empty(4, dtype=torch.long, device="meta"), gradient="forward").backward()
    assert z.grad.shape == z.shape


def test_which_backends_check_labels_for_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of GPUs, which make NaN of bad ones, where that is asked for."""
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(ops.reference, "check_labels", lambda _, classes, ignored: seen.append((classes, ignored)))
    batch, program = flatten(torch.zeros(2, 3), torch.tensor([0, 2])), ops.Program.of([(1.0, CrossEntropy())])
    for name in ("cpu", "cuda"):
        for validate in (False, True):
            given = batch._replace(validate=validate)
            ops.NATIVE[name].objective(given, program, False, False)
            ops.NATIVE[name].statistics(given)
            assert seen == [(3, -100)] * 2 * (validate and name == "cuda")
    assert ops.NATIVE["triton"].family == "objkern_triton"


def test_why_a_backend_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.cuda, "why_not", str)
    assert ops.why_not("cuda", "cuda", None) == "0"
    assert ops.why_not("cuda", "cuda", 2) == "2"
    assert ops.why_not("cuda", "cpu", None) == "its kernels are for CUDA tensors"
    assert ops.why_not("cpu", "cuda", 0) == "its kernels are for CPU tensors"


def test_coefficients_of_a_device_beside_those_of_the_cpu() -> None:
    one = torch.tensor(2.0)
    for pair in ((one, one.to("meta")), (one.to("meta"), one)):
        assert ops.Program.of([(c, CrossEntropy()) for c in pair]).tensor.is_meta


def test_vmap_over_one() -> None:
    z, y = torch.randn(1, 3, 4), torch.tensor([[0, 1, -100]])
    torch.testing.assert_close(torch.vmap(CrossEntropy())(z, y), CrossEntropy()(z[0], y[0])[None])


@pytest.mark.parametrize("ignore_index", [-101, -99])
def test_an_ignore_index_beside_the_default(ignore_index: int) -> None:
    z, y = torch.randn(4, 5), torch.tensor([0, ignore_index, 2, 4])
    found = CrossEntropy()(z, y, ignore_index=ignore_index)
    torch.testing.assert_close(found, F.cross_entropy(z, y, ignore_index=ignore_index))


def test_vmap_over_nothing() -> None:
    assert torch.vmap(CrossEntropy())(torch.zeros(0, 3, 4), torch.zeros(0, 3, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: OPS.objective([0.5, 0.0, 1.0], 1, x, y), "term kind 0.5 is not known"),
        (lambda x, y: OPS.objective([-1.0, 0.0, 1.0], 1, x, y), "term kind -1 is not known"),
        (lambda x, y: OPS.objective([12.0, 0.0, 1.0], 1, x, y), "term kind 12 is not known"),
        (lambda x, y: OPS.objective([99.0, 0.0, 1.0], 1, x, y), "term kind 99 is not known"),
        (lambda x, y: OPS.elementwise([6.0, 0.0, 1.0], 1, x, x), "term kind 6 is not known"),
        (lambda x, y: OPS.objective([0.0, 0.0], 1, x, y), "a kind, a parameter and a coefficient"),
        (lambda x, y: OPS.objective(TERMS, 3, x, y), "reduction: expected 0, 1 or 2"),
        (lambda x, y: OPS.objective(TERMS, -1, x, y), "reduction: expected 0, 1 or 2"),
        (lambda x, y: OPS.objective(TERMS, 1, x, y, normalizer=torch.ones(1)), "normalizer: expected a 0-dim"),
        (lambda x, y: OPS.objective(TERMS, 1, x[0], y), "expected .rows, classes."),
        (lambda x, y: OPS.objective(TERMS, 1, x, y[1:]), "labels but got"),
        (lambda x, y: OPS.objective(TERMS, 1, x, y[:, None]), "labels but got"),
        (lambda x, y: OPS.objective(TERMS, 1, x, x.detach()[:, 1:].exp()), "expected probabilities of shape"),
        (lambda x, y: OPS.objective(TERMS, 1, x, y, class_weight=torch.ones(8)), "class weight: expected"),
        (lambda x, y: OPS.objective(TERMS, 1, x, y, class_weight=torch.ones(9, 1)), "class weight: expected"),
        (lambda x, y: OPS.objective([10.0, 1.0, 1.0], 1, x), "KLDivergence needs one"),
        (lambda x, y: OPS.objective([10.0, 1.0, 1.0], 1, x, reference=x[:, 1:]), "reference: expected logits of shape"),
        (lambda x, y: OPS.objective([10.0, 1.0, 1.0], 1, x, reference=x, temperature=0.0), "temperature: expected"),
        (lambda x, y: OPS.objective([10.0, 1.0, 1.0], 1, x, reference=x, masked=False), "have to be excluded"),
        (lambda x, y: OPS.elementwise(ELEMENTS, 1, x, x[1:]), "target: expected the shape"),
        (lambda x, y: OPS.elementwise(ELEMENTS, 1, x, x, softcap=-1.0), "softcap: expected a number >= 0"),
        (lambda x, y: OPS.elementwise(ELEMENTS, 1, x, x, weight=torch.ones(9) * 1j), "weight: expected real"),
        (lambda x, y: OPS.elementwise(ELEMENTS, 1, x, x, weight=torch.ones(8)), "weight: expected a shape"),
        (lambda x, y: OPS.elementwise_fused(ELEMENTS, 0, x, x), "the gradient of unreduced losses"),
        (lambda x, y: OPS.elementwise_gradient(torch.ones(3), False, ELEMENTS, 0, x, x), "upstream: expected"),
        (lambda x, y: OPS.objective(TERMS, 1, x), "target: a term needs one"),
        (lambda x, y: OPS.objective(TERMS, 1, x, y, softcap=-1.0), "softcap: expected a number >= 0"),
        (lambda x, y: OPS.objective(TERMS, 1, x, y, logit_scale=torch.ones(1)), "logit_scale: expected a 0-dim"),
        (lambda x, y: OPS.objective(TERMS, 1, x, y, class_weight=torch.ones(9) * 1j), "class_weight: expected real"),
        (lambda x, y: OPS.objective(TERMS, 1, x, y, coefficient_tensor=torch.ones(2)), "one coefficient for each of 3"),
        (
            lambda x, y: OPS.objective(TERMS, 1, x, y, coefficient_tensor=torch.ones(3, requires_grad=True)),
            "pass with_parts",
        ),
        (lambda x, y: OPS.fused(TERMS, 0, x, y), "the gradient of unreduced losses"),
        (lambda x, y: OPS.gradient(torch.ones(()), torch.ones(2, 5), False, TERMS, 1, x, y), "does not belong"),
        (lambda x, y: OPS.gradient(torch.ones(4), OPS.objective(TERMS, 1, x, y)[2], False, TERMS, 1, x, y), "upstream"),
    ],
)
def test_ops_refuse_nonsense(call: Callable[..., Any], message: str) -> None:
    x, y = plain_batch(5)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        call(x, y)


def test_what_an_earlier_op_kept_belongs_to_its_logits() -> None:
    x, y = plain_batch(5)
    x = x.detach()
    one, factor = torch.ones(()), torch.tensor(2.0)
    _, _, kept, gradient = OPS.fused(TERMS, 1, x, y)
    for wrong in (kept[:-1], kept[:, 1:].contiguous(), kept.double(), kept.t().contiguous().t(), kept[0]):
        with pytest.raises(RuntimeError, match="row_gradient does not belong"):
            OPS.gradient(one, wrong, False, TERMS, 1, x, y)
    for wrong in (gradient[1:], gradient.bfloat16(), gradient.double(), gradient.t().contiguous().t()):
        with pytest.raises(RuntimeError, match="gradient does not belong"):
            OPS.gradient.into(one, kept, False, TERMS, 1, x, y, gradient=wrong)
    half = OPS.fused(TERMS, 1, x.bfloat16(), y)
    with pytest.raises(RuntimeError, match="gradient does not belong"):
        OPS.rescale(half[3][1:], factor, half[2], TERMS, 1, x.bfloat16(), y)
    statistics, centred = OPS.statistics(x, y)
    for wrong in (centred[:-1], centred[:, 1:].contiguous(), centred.float(), centred.t().contiguous().t(), centred[0]):
        with pytest.raises(RuntimeError, match="centred sums do not belong"):
            OPS.statistics_gradient(statistics, wrong, False, x, y)
    for wrong in (statistics[:-1], statistics[:, 1:], statistics[0]):
        with pytest.raises(RuntimeError, match="partials: expected"):
            OPS.statistics_gradient(wrong, centred, False, x, y)
    halves = OPS.elementwise_fused(ELEMENTS, 1, x.bfloat16(), x)[2]
    for wrong in (halves[1:], halves.t().contiguous().t(), halves.half()):
        with pytest.raises(RuntimeError, match="gradient does not belong"):
            OPS.elementwise_rescale(wrong, factor, ELEMENTS, 1, x.bfloat16(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 2.0, 3.7, torch.inf])
def test_a_finished_gradient_times_what_comes_from_above(factor: float, dtype: torch.dtype) -> None:
    """Rounded once; and nothing comes of ignored rows, whatever the factor."""
    x, y = plain_batch(5)
    x = x.detach().to(dtype)
    y[1] = -100
    for objective, target in ((CrossEntropy(), y), (objkern.MeanSquaredError(), torch.rand(x.shape).to(dtype))):
        found = []
        for gradient in ("forward", "backward"):
            z = x.clone().requires_grad_()
            found += torch.autograd.grad(objective(z, target, gradient=gradient) * factor, z)
        torch.testing.assert_close(*found, rtol=1e-6 if dtype == torch.float32 else 0.0, atol=0.0, equal_nan=True)


def test_a_gradient_for_which_there_is_no_memory() -> None:
    logits = torch.zeros(1, 1 << 24).expand(1 << 22, -1)  # 2^48 bytes in a row
    with pytest.raises(RuntimeError, match="no memory for a gradient of 281474976710656 bytes"):
        OPS.fused([0.0, 0.0, 1.0], 2, logits, torch.zeros(1 << 22, dtype=torch.long))


@pytest.mark.parametrize("gradient", ["backward", "forward"])
def test_what_was_saved_goes_with_the_backward_pass(gradient: str) -> None:
    x, y = plain_batch(5)
    logits = 2.0 * x.detach().requires_grad_()
    held = weakref.ref(logits)
    loss = CrossEntropy()(logits, y, gradient=gradient)
    del logits
    assert held() is not None
    loss.backward()
    assert held() is None
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize(
    ("name", "reduction"),
    [
        ("objective", 0),
        ("objective", 1),
        ("fused", 1),
        ("elementwise", 0),
        ("elementwise", 1),
        ("elementwise_fused", 1),
    ],
)
def test_parts_that_a_coefficient_needs_go_with_the_backward_pass(name: str, reduction: int) -> None:
    x, y = plain_batch(5)
    if name.startswith("elementwise"):
        terms, y = [0.0, 0.0, 1.0], torch.rand(x.shape)
    else:
        terms = [float(CrossEntropy.kind), 0.0, 1.0]
    coefficient = torch.ones(1, dtype=torch.float64, requires_grad=True)
    op = getattr(OPS, name)
    loss, parts, *_ = op(terms, reduction, x.detach(), y, coefficient_tensor=coefficient, with_parts=True)
    held = weakref.ref(parts)
    del parts, _
    assert held() is not None
    loss.sum().backward()
    assert coefficient.grad is not None
    assert held() is None


def test_asking_which_backend_runs_breaks_no_graph() -> None:
    """On a GPU the question goes to the driver, which no compiler can trace: the answer is a constant to it."""
    answers = {name: 1.0 if ops.why_not(name, "cuda", 0) is None else 2.0 for name in ("cuda", "triton")}
    for name, answer in answers.items():
        f = torch.compile(
            lambda x, name=name: x + (1.0 if ops.why_not(name, "cuda", 0) is None else 2.0), fullgraph=True,
            backend="eager",
        )  # fmt: skip
        assert f(torch.zeros(2)).tolist() == [answer, answer]
