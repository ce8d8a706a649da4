"""Terms on parameters on a device: the kernels for elements, a call for each parameter."""

import pytest
import torch

from objkern import EWC, L1, L2, L2SP, ElasticNet, penalties

from ..conftest import DTYPES

TERMS = {
    "L2": lambda p, f: L2(p), "L1": lambda p, f: L1(p), "ElasticNet": lambda p, f: ElasticNet(p, 0.3, 0.7),
    "L2SP": lambda p, f: L2SP(p), "EWC": lambda p, f: EWC(p, f),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TERMS)
def test_values_and_gradients(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """As eager torch in float64, but for rounding; of a scalar, of a transposed one, of one of several blocks."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    theta = [x.requires_grad_() for x in (make(7, 30), make(), make(300, 100), make(9, 20).t())]
    fisher = {str(k): torch.rand(p.shape, generator=generator).to(device) for k, p in enumerate(theta)}
    term = TERMS[name](theta, fisher)
    with torch.no_grad():
        for p in theta:
            p.add_(make(*p.shape))
    assert penalties._kernels(theta[0]) is not None
    value = term()
    found = [value.detach(), *torch.autograd.grad(value, theta, torch.full_like(value, 0.7))]
    term.accumulate_(0.7)
    _, origins, weights = term._tensors()
    exact = torch.zeros((), dtype=torch.float64, device=device)
    for k, p in enumerate(theta):
        d = p.detach().double() - (origins[k].double() if origins else 0.0)
        f = weights[k].double() if weights else 1.0
        exact += term.l1 * d.abs().sum() + 0.5 * term.l2 * (f * d * d).sum()
        gradient = 0.7 * (term.l1 * d.sign() + term.l2 * f * d)
        eps = torch.finfo(dtype).eps
        for g in (found[k + 1], p.grad):
            assert g.dtype == dtype
            torch.testing.assert_close(g.double(), gradient, rtol=2 * eps, atol=2 * eps)
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-6 if dtype != torch.float64 else 1e-12, atol=0.0)
