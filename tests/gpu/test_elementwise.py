"""Elementwise objectives on a device."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import objkern
from objkern import BinaryCrossEntropy, MeanSquaredError

from ..conftest import DTYPES, assert_within_budget
from .test_streams import capture, no_waiting

ALL = objkern.parse(
    "BinaryCrossEntropy(label_smoothing=0.1) - 0.1*BernoulliEntropy() + 0.5*MeanSquaredError() + "
    "0.25*MeanAbsoluteError() + 2.0*Huber(delta=0.3) + 0.01*LogitL2()"
)


def inputs(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    y = torch.rand(shape, generator=generator, dtype=torch.float64).round(decimals=1)
    return z.to(device, dtype), y.to(device, dtype)


def eager(z: Tensor, y: Tensor, reduction: str) -> Tensor:
    p = F.binary_cross_entropy_with_logits(z, 0.9 * y + 0.05, reduction="none")
    p = p - 0.1 * torch.distributions.Bernoulli(logits=z).entropy() + 0.5 * F.mse_loss(z, y, reduction="none")
    p = p + 0.25 * F.l1_loss(z, y, reduction="none") + 2 * F.huber_loss(z, y, reduction="none", delta=0.3)
    p = p + 0.01 * z.square()
    return p if reduction == "none" else getattr(p, reduction)()


def results(loss: object, z: Tensor) -> list[Tensor]:
    leaf = z.detach().requires_grad_()
    value = loss(leaf)
    upstream = torch.linspace(-1.0, 2.0, value.numel(), dtype=torch.float64).view(value.shape) if value.dim() else 1.7
    upstream = torch.as_tensor(upstream, dtype=value.dtype).to(value.device)
    return [value.detach(), *torch.autograd.grad(value, leaf, upstream)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (33, 129), (3, 40_001)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_term(
    reduction: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, backend: str
) -> None:
    z, y = inputs(device, shape, dtype)
    exact = results(lambda x: eager(x, y.cpu().double(), reduction), z.cpu().double())
    native = results(lambda x: eager(x, y, reduction), z)
    for gradient in ("backward", "forward") if reduction != "none" else ("backward",):
        options = {"reduction": reduction, "gradient": gradient, "backend": backend}
        ours = results(lambda x: ALL(x, y, **options), z)  # noqa: B023
        for one, other, truth in zip(ours, native, exact, strict=True):
            assert_within_budget(one.cpu(), other.cpu(), truth, dtype)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 1), (7, 5), ()], ids=str)
def test_weights_options_and_parts(shape: tuple[int, ...], device: torch.device, backend: str) -> None:
    z, y = inputs(device, (7, 5), torch.float32)
    weight, pos_weight = (torch.rand(shape, device=device) for _ in range(2))
    objective = BinaryCrossEntropy(weight, pos_weight) + torch.tensor(0.3, device=device) * MeanSquaredError()
    found = []
    for name in (backend, "reference"):
        loss, parts = objective(
            z[:, :], y, softcap=4.0, logit_scale=torch.tensor(1.5, device=device), normalizer=11, return_parts=True,
            backend=name,
        )  # fmt: skip
        found.append([loss, *parts.values()])
    torch.testing.assert_close(*found)


def test_the_drop_ins_follow_torch(device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        z, y = inputs(device, (33, 129), dtype)
        z.view(-1)[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
        for ours, native in (
            (objkern.mse_loss, F.mse_loss),
            (objkern.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits),
        ):
            found, expected = ours(z, y, reduction="none"), native(z, y, reduction="none")
            assert found.dtype == expected.dtype
            if dtype == torch.float32:  # between its steps torch rounds to bfloat16
                torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.real_device
def test_nothing_waits_and_a_graph_captures(device: torch.device, backend: str) -> None:
    z, y = inputs(device, (64, 1001), torch.bfloat16)
    z.requires_grad_()

    def run() -> list[Tensor]:
        found = []
        for options in ({}, {"gradient": "forward"}, {"reduction": "none"}):
            loss = ALL(z, y, backend=backend, **options)
            found += [loss.detach(), *torch.autograd.grad(loss, z, torch.full_like(loss, 0.7))]
        return found

    run()
    with no_waiting():
        run()
    graph, captured = capture(run)
    for seed in (0, 5):
        z.data.copy_(inputs(device, (64, 1001), torch.bfloat16, seed)[0])
        graph.replay()
        for a, b in zip(captured, run(), strict=True):
            assert torch.equal(a, b)


def test_bitwise_the_same_and_more_than_one_block(device: torch.device, backend: str) -> None:
    z, y = inputs(device, (300, 4099), torch.float32)
    first = results(lambda x: ALL(x, y, backend=backend), z)
    for _ in range(3):
        for a, b in zip(first, results(lambda x: ALL(x, y, backend=backend), z), strict=True):
            assert torch.equal(a, b)
    shifted = torch.cat([z.flatten()[:1], z.flatten()])[1:].view(z.shape)  # begins between 16-byte words
    torch.testing.assert_close(results(lambda x: ALL(x, y, backend=backend), shifted), first)
