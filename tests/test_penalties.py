"""Terms on parameters: values and gradients of the formulas, which parameters they are about, and who owns what."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import objkern
from objkern import EWC, L1, L2, L2SP, CrossEntropy, ElasticNet, ZLoss, diagonal_fisher, penalties

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Net(nn.Module):
    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, width), nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def moved(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


TERMS: dict[str, tuple[Callable[..., objkern.Objective], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "L2": (lambda p, f: L2(p), lambda p, start, f: 0.5 * p.square().sum()),
    "L1": (lambda p, f: L1(p), lambda p, start, f: p.abs().sum()),
    "ElasticNet": (lambda p, f: ElasticNet(p, 0.3, 0.7), lambda p, start, f: 0.3 * p.abs().sum() + 0.35 * p.square().sum()),
    "L2SP": (lambda p, f: L2SP(p), lambda p, start, f: 0.5 * (p - start).square().sum()),
    "EWC": (lambda p, f: EWC(p, f), lambda p, start, f: 0.5 * (f * (p - start).square()).sum()),
}  # fmt: skip


def several_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops that a GPU has for many parameters, and nothing else."""
    values, gradients = penalties._values_one_by_one, penalties._gradients_one_by_one

    def accumulate(sums: list[Tensor], *arguments: object) -> None:
        for total, g in zip(sums, gradients(*arguments), strict=True):
            total.add_(g)

    ops = {
        "multi_penalty": lambda *arguments: torch.stack(list(values(*arguments))).sum(),
        "multi_penalty_gradient": gradients, "multi_penalty_accumulate_": accumulate,
    }  # fmt: skip
    for name, op in ops.items():
        monkeypatch.setattr(torch.ops.objkern, name, op)
    monkeypatch.setattr(penalties, "_together", lambda device: True)
    monkeypatch.setattr(penalties, "_values_one_by_one", None)
    monkeypatch.setattr(penalties, "_gradients_one_by_one", None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", ["for many parameters", "for one parameter", "none"])
@pytest.mark.parametrize("name", TERMS)
def test_values_and_gradients(name: str, kernels: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within twice the error of eager torch in the same dtype, and one rounding of the exact gradient."""
    if kernels == "for many parameters":  # as a GPU has them
        several_at_once(monkeypatch)
    elif kernels == "for one parameter":
        monkeypatch.setattr(penalties, "_eager_value", None)
        monkeypatch.setattr(penalties, "_eager_gradient", None)
    else:  # a device that has none
        monkeypatch.setattr(penalties, "_kernels", lambda x: None)
        monkeypatch.setattr(penalties, "_BLOCK", 64)  # several blocks, and a rest
    make, formula = TERMS[name]
    torch.manual_seed(1)
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((7, 30), (3,), (), (0, 4), (64, 2))]
    parameters.append(nn.Parameter(torch.randn(20, 9).to(dtype).t()))  # transposed in memory
    with torch.no_grad():
        parameters[0][0, 0] = 0.0
    fisher = {str(k): torch.rand(p.shape) for k, p in enumerate(parameters)}
    fisher["0"][0, 1] = 0.0
    term = make(parameters, fisher)
    starts = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn_like(p))
    ours = term()
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    gradients = torch.autograd.grad(ours, parameters, torch.tensor(0.7, dtype=ours.dtype))

    def eager(to: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = [p.detach().to(to).requires_grad_() for p in parameters]
        value = sum(formula(p, s.to(to), f.to(to)) for p, s, f in zip(leaves, starts, fisher.values(), strict=True))
        return value, torch.autograd.grad(value, leaves, torch.tensor(0.7, dtype=to))

    exact, exact_gradients = eager(torch.float64)
    theirs, _ = eager(dtype)
    error, allowed = abs(ours.double() - exact), abs(theirs.double() - exact)
    assert error <= 2 * allowed + 4 * torch.finfo(ours.dtype).eps * exact
    for p, g, truth in zip(parameters, gradients, exact_gradients, strict=True):
        assert g.dtype == dtype
        assert g.shape == p.shape
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(g.double(), truth, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("name", TERMS)
def test_transforms_of_torch_func(name: str) -> None:
    """And forward-mode derivatives, of the parameters of a module while others stand in their place."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    fisher = torch.rand_like(layer.weight)
    term = TERMS[name][0](layer, {"weight": fisher})

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self) -> Tensor:
            return term()

    whole = Whole()

    def value(weight: Tensor) -> Tensor:
        return torch.func.functional_call(whole, {"layer.weight": weight}, ())

    weight, tangent = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    plain = lambda w: TERMS[name][1](w, layer.weight.detach(), fisher)  # noqa: E731
    exact = plain(weight)
    gradient = torch.func.grad(plain)(weight)
    along = (gradient * tangent).sum()
    torch.testing.assert_close(value(weight.requires_grad_()), exact)
    weight = weight.detach()
    torch.testing.assert_close(torch.func.grad(value)(weight), gradient)
    torch.testing.assert_close(torch.func.jvp(value, (weight,), (tangent,)), (exact, along))
    torch.testing.assert_close(torch.vmap(value)(torch.stack([weight, 2 * weight]))[0], exact)
    second = torch.func.jvp(torch.func.grad(value), (weight,), (tangent,))[1]
    torch.testing.assert_close(second, torch.func.jvp(torch.func.grad(plain), (weight,), (tangent,))[1])
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(value(forward_ad.make_dual(weight, tangent))).tangent
        torch.testing.assert_close(found, along)


def test_parameters_that_are_all_frozen(net: Net) -> None:
    terms = [L1(net), L2(net), L2SP(net)]
    objective = CrossEntropy() + 0.1 * terms[0] + 0.1 * terms[1] + 0.1 * terms[2]
    net.requires_grad_(False)
    z, y = torch.randn(3, 5), torch.tensor([0, 1, 2])
    loss, parts = objective(z, y, return_parts=True)
    torch.testing.assert_close(loss, F.cross_entropy(z, y))
    for term in terms:
        assert parts[term.name] == 0.0
        term.accumulate_()
    assert all(p.grad is None for p in net.parameters())


def test_names_of_buffers_are_those_of_one_parameter() -> None:
    names = ["a.b", "a/b", "a\\/b", "a\\.b", "a./b", "a/.b"]
    parameters = [(name, torch.full((2,), float(k), requires_grad=True)) for k, name in enumerate(names)]
    stay = L2SP(parameters)
    assert len(list(stay.buffers())) == len(names)
    assert stay() == 0.0


@pytest.mark.parametrize("name", TERMS)
def test_derivatives(name: str) -> None:
    parameters = [
        torch.randn(3, 2, dtype=torch.float64, requires_grad=True),
        torch.randn(4, dtype=torch.float64, requires_grad=True),
    ]
    term = TERMS[name][0](
        parameters, {str(k): torch.rand(p.shape, dtype=torch.float64) for k, p in enumerate(parameters)}
    )
    arguments = term._tensors()[1:]
    value = lambda *p: torch.ops.objkern.parameter_penalty([x + 0.1 for x in p], *arguments, term.l1, term.l2)  # noqa: E731
    assert torch.autograd.gradcheck(value, parameters)
    assert torch.autograd.gradgradcheck(value, parameters)
    for count in (1, 2):
        some = [tensors[:count] for tensors in (parameters, *arguments)]
        torch.library.opcheck(torch.ops.objkern.parameter_penalty.default, (*some, term.l1, term.l2))


def test_a_large_sum_keeps_its_digits() -> None:
    p = nn.Parameter(torch.full((3_000_001,), 0.1))
    exact = p.detach().double()
    assert L2([p])().item() == pytest.approx((0.5 * exact.square().sum()).item(), rel=2e-7)
    assert L1([p])().item() == pytest.approx(exact.sum().item(), rel=2e-7)


# ---- as a term of an objective --------------------------------------------------------------------------------------


def test_added_once_whatever_the_reduction(net: Net) -> None:
    x, y = torch.randn(6, 8), torch.tensor([0, 1, 2, 3, -100, 4])
    term = L2SP(net)
    moved(net)
    rows = CrossEntropy() + 0.1 * ZLoss()
    objective = rows + 0.5 * term
    for options in ({}, {"reduction": "sum"}, {"normalizer": 3.0}, {"gradient": "forward"}, {"return_parts": True}):
        for weight in (1.0, 0.25, torch.tensor(0.5)):
            loss = objective(net(x), y, parameter_weight=weight, **options)
            expected = rows(net(x), y, **options)
            if "return_parts" in options:
                (loss, parts), (expected, of_rows) = loss, expected
                assert list(parts) == ["cross_entropy", "z_loss", "l2_sp", *list(of_rows)[2:]]
                torch.testing.assert_close(parts["l2_sp"], term().detach())
                torch.testing.assert_close(parts["total"], loss.detach())
                assert not any(part.requires_grad for part in parts.values())
            torch.testing.assert_close(loss, expected + weight * 0.5 * term())
    with pytest.raises(ValueError, match='"none" gives a loss for each row'):
        objective(net(x), y, reduction="none")
    with pytest.raises(TypeError, match="parameter_weight"):
        objective(net(x), y, parameter_weight="1")
    assert "0.5*L2SP(<Net>)" in repr(objective)


def test_on_the_linear_path(net: Net) -> None:
    hidden, y = torch.randn(6, 40), torch.randint(5, (6,))
    objective = CrossEntropy() + 0.5 * L2(net)
    loss, parts = objective.linear(hidden, net.last.weight, y, return_parts=True)
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(hidden, net.last.weight), y) + 0.5 * L2(net)())
    torch.testing.assert_close(parts["l2"], L2(net)().detach())
    (g,) = torch.autograd.grad(loss, net.last.weight)
    expected = F.cross_entropy(F.linear(hidden, net.last.weight), y) + 0.25 * net.last.weight.square().sum()
    torch.testing.assert_close(g, torch.autograd.grad(expected, net.last.weight)[0])


def test_parameter_terms_alone(net: Net) -> None:
    objective = 0.5 * L2(net) + torch.tensor(2.0) * L1(net)
    torch.testing.assert_close(objective(), 0.5 * L2(net)() + 2.0 * L1(net)())
    loss, parts = objective(return_parts=True)
    assert list(parts) == ["l2", "l1", "total"]
    assert loss.item() == parts["total"].item()


def test_coefficients_that_learn_or_are_scheduled(net: Net) -> None:
    c = torch.tensor(0.5, requires_grad=True)
    objective = CrossEntropy() + c * L2(net)
    loss = objective(torch.randn(3, 5), torch.tensor([0, 1, 2]))
    assert torch.autograd.grad(loss, c)[0].item() == pytest.approx(L2(net)().item())
    with torch.no_grad():
        c.mul_(2)
    assert (
        objective(torch.zeros(3, 5), torch.tensor([0, 1, 2])) - torch.log(torch.tensor(5.0))
    ).item() == pytest.approx(L2(net)().item(), rel=1e-5)


def test_accumulate(net: Net) -> None:
    """The same gradients as by autograd, added to what there is."""
    fisher = {"last.weight": torch.rand(5, 40), "first.weight": torch.rand(40, 8)}
    objective = 0.3 * L2(net) + 0.1 * L1(net) + 0.2 * L2SP(net) + 0.4 * EWC(net, fisher)
    moved(net)
    objective(parameter_weight=0.5).backward()
    expected = {name: p.grad for name, p in net.named_parameters()}
    for before in (None, 1.0):
        for p in net.parameters():
            p.grad = None if before is None else torch.full_like(p, before)
        objective.accumulate_(0.5)
        for name, p in net.named_parameters():
            if expected[name] is None:
                assert p.grad is None if before is None else bool((p.grad == 1).all())
            else:
                torch.testing.assert_close(p.grad, expected[name] + (before or 0.0))
    p = nn.Parameter(torch.tensor([3.0]))
    for term, gradient in ((L2([p]), 3.0), (0.5 * L2([p]), 4.5)):
        term.accumulate_()
        assert p.grad == gradient
    with pytest.raises(ValueError, match=r"CrossEntropy\(\) is not about parameters"):
        (CrossEntropy() + objective).accumulate_()


def test_accumulate_as_backward_does() -> None:
    """A weight in the precision of each parameter, beside a sparse gradient; and no gradient is lost in silence."""
    a, b = (torch.ones(1, dtype=dtype, requires_grad=True) for dtype in (torch.float32, torch.float64))
    L2([a, b]).accumulate_(0.1)
    assert (a.grad.item(), b.grad.item()) == (torch.tensor(0.1).item(), 0.1)
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    assert table.weight.grad.is_sparse
    L2(table).accumulate_(2.0)
    torch.testing.assert_close(table.weight.grad, 2.0 * table.weight.detach() + torch.eye(4)[:, 1:2])
    learned = torch.tensor(0.5, requires_grad=True)
    before = b.grad.clone()
    for call in (lambda: (learned * L2([b])).accumulate_(), lambda: (L1([b]) + L2([b])).accumulate_(learned)):
        with pytest.raises(ValueError, match="a coefficient or weight that requires grad would get none"):
            call()
    assert torch.equal(b.grad, before)


def test_accumulate_of_many_parameters_at_once(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a gradient that a kernel can add to; a transposed one is added to by itself."""
    start = [p.detach().clone() for p in net.parameters()]
    fisher = {name: torch.rand(p.shape) for name, p in net.named_parameters()}
    term = EWC(net, fisher, include_all=True)
    moved(net)
    several_at_once(monkeypatch)
    single = torch.ops.objkern.parameter_penalty_gradient
    alone = []

    def gradient(upstream: Tensor, parameters: list[Tensor], *others: object) -> list[Tensor]:
        alone.extend(parameters)
        return single(upstream, parameters, *others)

    monkeypatch.setattr(torch.ops.objkern, "parameter_penalty_gradient", gradient)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    net.first.weight.grad = torch.ones(8, 40).t()
    net.norm.bias.grad = None
    term.accumulate_()
    assert alone == [net.first.weight, net.norm.bias]
    for p, began, f in zip(net.parameters(), start, fisher.values(), strict=True):
        torch.testing.assert_close(p.grad, f * (p.detach() - began) + float(p is not net.norm.bias))


def test_sgd_with_l2_is_weight_decay_and_adam_is_not(net: Net) -> None:
    x, y = torch.randn(6, 8), torch.randint(5, (6,))

    def trained(optimizer: Callable[..., torch.optim.Optimizer], penalized: bool, **options: float) -> Tensor:
        model = copy.deepcopy(net)
        objective = CrossEntropy() + 0.1 * L2(model, include_all=True) if penalized else CrossEntropy()
        step = optimizer(model.parameters(), lr=0.1, **options)
        for _ in range(5):
            step.zero_grad()
            objective(model(x), y).backward()
            step.step()
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    torch.testing.assert_close(trained(torch.optim.SGD, True), trained(torch.optim.SGD, False, weight_decay=0.1))
    decoupled = trained(torch.optim.AdamW, False, weight_decay=0.1)
    assert (trained(torch.optim.AdamW, True, weight_decay=0.0) - decoupled).abs().max() > 1e-2


def test_compiled_without_a_break(net: Net) -> None:
    objective = CrossEntropy() + 0.5 * L2(net) + 0.1 * L2SP(net)
    moved(net)
    x, y = torch.randn(6, 8), torch.randint(5, (6,))
    run = lambda: objective(net(x), y)  # noqa: E731
    expected = torch.autograd.grad(run(), net.first.weight)[0]
    found = torch.compile(run, backend="aot_eager", fullgraph=True)()
    torch.testing.assert_close(found, run())
    torch.testing.assert_close(torch.autograd.grad(found, net.first.weight)[0], expected)


# ---- which parameters, and whose ------------------------------------------------------------------------------------


def test_which_parameters(net: Net) -> None:
    """Of a module those that require grad, less biases and norms; of an iterable all."""
    names = lambda term: list(term._held.named())  # noqa: E731
    fisher = {"first.weight": torch.ones(40, 8)}
    assert names(L2(net)) == ["first.weight", "last.weight"]
    assert names(L2(net, include_all=True)) == [name for name, _ in net.named_parameters()]
    for make in (L1, L2SP, lambda model: ElasticNet(model, 1.0, 1.0), lambda model: EWC(model, fisher)):
        assert names(make(net)) == ["first.weight", "last.weight"]
    assert list(diagonal_fisher(net, [torch.randn(2, 8)], lambda m, x: m(x)[:, 0])) == ["first.weight", "last.weight"]
    assert names(L2(net.parameters())) == [str(k) for k in range(6)]
    assert repr(L2(net.parameters())) == "L2(<6 parameters>)"
    assert names(L2(net.named_parameters())) == [name for name, _ in net.named_parameters()]
    net.first.weight.requires_grad_(False)
    assert names(L2(net)) == ["last.weight"]
    net.last.weight = nn.Parameter(net.last.weight.detach() * 2)  # replaced: the term sees the new one
    term = L2(net)
    torch.testing.assert_close(term(), 0.5 * net.last.weight.square().sum())
    tied = Net()
    tied.other = tied.first
    assert names(L2(tied)) == ["first.weight", "last.weight"]
    del tied.other
    tied.last.weight = tied.first.weight  # of two modules that are not the same
    assert names(L2(tied)) == ["first.weight"]


def test_a_term_does_not_own_the_model(net: Net) -> None:
    objective = CrossEntropy() + L2SP(net) + L2(net)
    assert list(objective.parameters()) == []
    assert sorted(objective.state_dict()) == ["_terms.1.start/first/weight", "_terms.1.start/last/weight"]
    twin = copy.deepcopy(objective)
    moved(net)
    torch.testing.assert_close(
        twin(torch.zeros(1, 5), torch.tensor([0])), objective(torch.zeros(1, 5), torch.tensor([0]))
    )
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(objective)
    with pytest.raises(ValueError, match="holds a tensor, a function or a model: <Net>"):
        objkern.parse(repr(0.5 * L2SP(net)))
    twin.load_state_dict(objective.state_dict())
    assert objective.double()._terms[1]._buffers["start/first/weight"].dtype == torch.float64
    del net
    gc.collect()


def test_a_model_that_is_gone() -> None:
    net = Net()
    term = L2(net)
    alone = L1([nn.Parameter(torch.ones(2))])
    del net
    gc.collect()
    for gone in (term, alone):
        with pytest.raises(ReferenceError, match="gone"):
            gone()


def test_bad_input(net: Net) -> None:
    meta = [torch.ones(2, 2), torch.ones(2, device="meta")]
    fisher = {"first.weight": torch.ones(40, 8)}
    cases: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: L2(net.first.weight), TypeError, "parameters: expected a module, parameters"),
        (lambda: L2(net.state_dict()), TypeError, "parameters: expected a module, parameters"),
        (lambda: L2([]), ValueError, "expected at least one"),
        (lambda: L2([torch.ones(2, dtype=torch.int64)]), TypeError, "item 0 is"),
        (lambda: L2([1.0]), TypeError, "item 0 is"),
        (lambda: L2([torch.ones(2).to_sparse()]), TypeError, "item 0 is"),
        (lambda: L2(meta)(), ValueError, r"L2\(<2 parameters>\): some of its parameters have no values"),
        (lambda: L2(meta).accumulate_(), ValueError, "on the meta device"),
        (lambda: L2(net).accumulate_(torch.ones(3)), TypeError, "weight: expected a number or a 0-dim tensor"),
        (lambda: L2(net).accumulate_(torch.tensor(1j)), TypeError, "weight: expected a number or a 0-dim tensor"),
        (lambda: (2.0 * L2(net)).accumulate_("a"), TypeError, "weight: expected a number or a 0-dim tensor but got 'a'"),
        (lambda: L2(net)(parameter_weight=torch.tensor(1j)), TypeError, "parameter_weight: expected a number"),
        (lambda: EWC(net, {"first.weight": 1j * torch.ones(40, 8)}), ValueError, "first.weight: expected shape"),
        (lambda: L2([("a", net.first.weight), ("a", net.last.weight)]), ValueError, "two of them are called 'a'"),
        (lambda: L2(nn.LayerNorm(3)), ValueError, "include_all=True takes those too"),
        (lambda: L2(nn.ReLU(), include_all=True), ValueError, "has none that require grad"),
        (lambda: L2(net, include_all=1), TypeError, "include_all"),
        (lambda: ElasticNet(net, -1.0, 1.0), ValueError, "l1: expected a number >= 0"),
        (lambda: ElasticNet(net, 0.0, 0.0), ValueError, "one of them to be positive"),
        (lambda: EWC(net, {"first": torch.ones(2)}), ValueError, "are not among the parameters"),
        (lambda: EWC(net, {"first.weight": torch.ones(2)}), ValueError, r"first.weight: expected shape \(40, 8\)"),
        (lambda: EWC(net, {"first.weight": -torch.ones(40, 8)}), ValueError, "expected numbers >= 0"),
        (lambda: EWC(net, {"first.weight": torch.full((40, 8), torch.nan)}), ValueError, "expected numbers >= 0"),
        (lambda: EWC(net, {}), ValueError, "at least one parameter"),
        (lambda: EWC(net, 1.0), TypeError, "fisher: expected a dict"),
    ]  # fmt: skip
    for make, error, message in cases:
        with pytest.raises(error, match=message):
            make()
    term = EWC(net, fisher)
    net.first = nn.Linear(9, 40)
    with pytest.raises(ValueError, match="make it after the model is resized"):
        term()


# ---- the Fisher information -----------------------------------------------------------------------------------------


def test_fisher_of_a_linear_model() -> None:
    """For p = softmax(Wx) the gradient of log p_y to W is (1_y − p) xᵀ."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False)
    x, y = torch.randn(10, 4), torch.randint(3, (10,))
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    before = model.weight.grad = torch.ones(3, 4)
    found = diagonal_fisher(model, batches, lambda m, b: -F.cross_entropy(m(b[0]), b[1], reduction="none"))
    p = model(x).softmax(-1)
    expected = torch.einsum("nc,nd->ncd", F.one_hot(y, 3) - p, x).square().mean(0)
    torch.testing.assert_close(found["weight"], expected.detach())
    assert torch.equal(model.weight.grad, before)
    for bad, message in (([], "at least one sample"), (batches, "one number per sample")):
        with pytest.raises(ValueError, match=message):
            diagonal_fisher(model, bad, lambda m, b: F.cross_entropy(m(b[0]), b[1]))


def test_fisher_of_parameters_that_no_sample_reaches(net: Net) -> None:
    found = diagonal_fisher(net, [torch.randn(3, 8)], lambda m, x: m.first(x).sum(-1))
    assert found["first.weight"].all()
    assert not found["last.weight"].any()
    with pytest.raises(ValueError, match="LayerNorm has no parameters to penalize"):
        diagonal_fisher(net.norm, [torch.randn(3, 40)], lambda m, x: m(x).sum(-1))


def test_ewc_keeps_what_the_first_task_needs() -> None:
    """After training on a second task the first one's loss is lower with EWC than without, at the same distance weight."""
    torch.manual_seed(0)
    first = torch.randn(64, 8), torch.randint(5, (64,))
    second = torch.randn(64, 8), torch.randint(5, (64,))

    def train(model: nn.Module, data: tuple[Tensor, Tensor], objective: objkern.Objective) -> nn.Module:
        step = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(60):
            step.zero_grad()
            objective(model(data[0]), data[1]).backward()
            step.step()
        return model

    base = train(Net(), first, CrossEntropy())
    losses = {}
    for name in ("nothing", "ewc"):
        model = copy.deepcopy(base)
        objective: objkern.Objective = CrossEntropy()
        if name == "ewc":
            fisher = diagonal_fisher(
                model, [first], lambda m, b: -F.cross_entropy(m(b[0]), b[1], reduction="none"), include_all=True
            )
            objective = objective + 100.0 * EWC(model, fisher, include_all=True)
        train(model, second, objective)
        losses[name] = F.cross_entropy(model(first[0]), first[1]).item()
    assert losses["ewc"] < 0.75 * losses["nothing"]
