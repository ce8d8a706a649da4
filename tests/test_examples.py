"""The examples: they train, and what they compute from hidden states is what plain torch computes from full logits."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from objkern import linear_row_statistics

from .faults import ROOT


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module(request.param)


def the(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("example", [name], indirect=True)


def token_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """(B, T − 1), 0 for what is ignored, from all the logits."""
    return -F.cross_entropy((hidden @ weight.T)[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")


def inputs(example: ModuleType, batch: int = 6, length: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(batch, length, 16), torch.randn(40, 16)
    labels = torch.randint(0, 40, (batch, length))
    labels[:, :3] = -100
    return hidden.double(), weight.double(), labels


def assert_same(fused, plain, *tensors: Tensor) -> None:
    """Loss and gradients."""
    found = []
    for loss in (fused, plain):
        leaves = [x.clone().requires_grad_() for x in tensors]
        value = loss(*leaves)
        found.append([value.detach(), *torch.autograd.grad(value, leaves)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@the("dpo")
def test_dpo(example: ModuleType) -> None:
    (chosen, weight, labels), (rejected, _, others) = inputs(example), inputs(example)
    reference = [torch.randn(6).double() for _ in range(2)]

    def fused(chosen: Tensor, rejected: Tensor, weight: Tensor) -> Tensor:
        logprobs = (example.sequence_logprob(h, weight, y) for h, y in ((chosen, labels), (rejected, others)))
        return example.dpo_loss(*logprobs, *reference)

    def plain(chosen: Tensor, rejected: Tensor, weight: Tensor) -> Tensor:
        a, b = (token_logprobs(h, weight, y).sum(1) for h, y in ((chosen, labels), (rejected, others)))
        return -F.logsigmoid(0.1 * ((a - reference[0]) - (b - reference[1]))).mean()

    assert_same(fused, plain, chosen, rejected, weight)
    assert example.main() < 0.3


@the("orpo")
def test_orpo(example: ModuleType) -> None:
    hidden, weight, labels = inputs(example)

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        logprob = token_logprobs(hidden, weight, labels)
        mean = logprob.sum(1) / (labels[:, 1:] != -100).sum(1)
        odds = mean - torch.log1p(-mean.exp())
        return -logprob[:3].sum() / (labels[:3, 1:] != -100).sum() - 0.1 * F.logsigmoid(odds[:3] - odds[3:]).mean()

    assert_same(lambda h, w: example.orpo_loss(h, w, labels), plain, hidden, weight)
    assert example.main() < 2.0


@the("grpo")
def test_grpo(example: ModuleType) -> None:
    hidden, weight, labels = inputs(example)
    advantage = example.group_advantage(torch.rand(2, 3).double()).flatten()
    old = linear_row_statistics(hidden, weight, labels, shift=1).logprob + 0.3 * torch.randn(6, 9).double()

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        p = (hidden @ weight.T)[:, :-1]
        ratio = torch.exp(token_logprobs(hidden, weight, labels) - old[:, :-1])
        gain = torch.minimum(ratio * advantage[:, None], ratio.clamp(0.8, 1.2) * advantage[:, None])
        entropy = torch.distributions.Categorical(logits=p).entropy()
        counts = labels[:, 1:] != -100
        return (((-gain - 0.01 * entropy) * counts).sum(1) / counts.sum(1)).mean()

    assert_same(lambda h, w: example.grpo_loss(h, w, labels, advantage, old), plain, hidden, weight)
    assert example.main() > 0.6


@the("ppo")
def test_ppo(example: ModuleType) -> None:
    hidden, weight, labels = inputs(example)
    advantage, old = torch.randn(6, 9).double(), -3 + 0.3 * torch.randn(6, 9).double()

    def fused(hidden: Tensor, weight: Tensor) -> Tensor:
        rows = {"advantage": advantage, "old_logprob": old}
        return example.objective.linear(hidden, weight, labels, shift=1, rows=rows)

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        z = (hidden @ weight.T)[:, :-1]
        ratio = torch.exp(token_logprobs(hidden, weight, labels) - old[:, :-1])
        gain = torch.minimum(ratio * advantage[:, :-1], ratio.clamp(0.8, 1.2) * advantage[:, :-1])
        entropy = torch.distributions.Categorical(logits=z).entropy()
        value = -gain - 0.01 * entropy + 1e-4 * z.logsumexp(-1).square()
        return value[labels[:, 1:] != -100].mean()

    assert_same(fused, plain, hidden, weight)
    assert example.main() > 0.6


@the("mixup")
def test_mixup(example: ModuleType) -> None:
    x, labels = torch.randn(30, example.FEATURES), torch.randint(0, example.CLASSES, (30,))
    inputs, q = example.mixed(x, labels)
    assert inputs.shape == x.shape
    torch.testing.assert_close(q.sum(1), torch.ones(30))
    z = torch.randn(30, example.CLASSES)
    expected = F.cross_entropy(z, q, label_smoothing=0.05) + 1e-4 * z.logsumexp(1).square().mean()
    torch.testing.assert_close(example.objective(z, q), expected)
    assert example.main() > 0.9


def plain_divergence(z: Tensor, r: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over the positions that count of T² KL(q ‖ p), position t against label t + 1."""
    kept = labels[:, 1:] != -100
    log_p, log_q = ((x[:, :-1] / temperature).log_softmax(-1)[kept] for x in (z, r))
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()


@the("distillation")
def test_distillation(example: ModuleType) -> None:
    hidden, weight, labels = inputs(example)
    teacher_hidden, teacher_weight = torch.randn(6, 9, 8).double(), torch.randn(40, 8).double()

    def fused(hidden: Tensor, weight: Tensor) -> Tensor:
        return example.distillation_loss(hidden, weight, teacher_hidden, teacher_weight, labels)[0]

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        z, r = hidden @ weight.T, teacher_hidden @ teacher_weight.T
        loss = F.cross_entropy(z[:, :-1].transpose(1, 2), labels[:, 1:])
        return 0.3 * loss + 0.7 * plain_divergence(z, r, labels, 2.0)

    assert_same(fused, plain, hidden, weight)
    assert example.main() < 0.5 * example.train(example.Student(), 1, example.ToyModel())


@the("r_drop")
def test_r_drop(example: ModuleType) -> None:
    (first, weight, labels), (second, _, _) = inputs(example), inputs(example)

    def fused(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
        return example.r_drop_loss(first, second, weight, labels)

    def plain(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
        z, r = first @ weight.T, second @ weight.T
        loss = sum(F.cross_entropy(x[:, :-1].transpose(1, 2), labels[:, 1:]) for x in (z, r)) / 2
        return loss + 0.5 * (plain_divergence(z, r, labels) + plain_divergence(r, z, labels))

    assert_same(fused, plain, first, second, weight)
    assert example.main() < 1.0
