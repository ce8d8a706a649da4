"""torch.compile and autocast: one graph, forward and backward, with eager's numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import objkern
from objkern import CrossEntropy, Entropy, ZLoss, custom

from .rows import EVERYTHING, GRADIENT, REGULARIZED, rows_on, upstream_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # a compiler's advice: TF32, online softmax

CUSTOM = CrossEntropy() + 0.1 * custom(lambda s: s.entropy * s.lse, name="product")

# name -> function of (logits, labels, backend)
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "mean": lambda x, y, b: REGULARIZED(x, y, backend=b),
    # 3: every row has its own upstream gradient
    "rows": lambda x, y, b: REGULARIZED(x, y, reduction="none", backend=b) * torch.arange(x.shape[0], device=x.device),
    "forward": lambda x, y, b: REGULARIZED(x, y, gradient="forward", backend=b),
    # 2: two losses on the same logits
    "two losses": lambda x, y, b: (
        REGULARIZED(x, y, backend=b) + x.float().square().mean() + CrossEntropy()(x, y, backend=b)
    ),
    "statistics": lambda x, y, b: objkern.row_statistics(x, y, backend=b).entropy * x.detach().float().amax(-1),
    "custom": lambda x, y, b: CUSTOM(x, y, backend=b),
    "shift": lambda x, y, b: REGULARIZED(x[None], y[None], shift=1, backend=b),
    "transposed": lambda x, y, b: REGULARIZED(x.t().contiguous().t(), y, backend=b),
    "scaled logits": lambda x, y, b: EVERYTHING(x * 0.5, y, softcap=20.0, logit_scale=1.3, backend=b),
}


def compare(compiled: Callable[..., Tensor], eager: Callable[..., Tensor], x: Tensor, *arguments: Any) -> None:
    results = []
    for run in (compiled, eager):
        leaf = x.detach().requires_grad_()
        loss = run(leaf, *arguments)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf, upstream_of(loss))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
        assert b.any()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_once_for_all_shapes(name: str, dtype: torch.dtype, device: torch.device, any_backend: str) -> None:
    """18: no graph break, ignored labels included; one more compilation when the shape turns out to vary."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor" if device.type == "cuda" else "aot_eager")
    function = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for rows in (4, 7, 11):
        z, y = rows_on(device, rows, 77, dtype)
        y[1] = -100
        compare(compiled, function, z, y, any_backend)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("gradient", GRADIENT)
def test_compiled_with_a_head(gradient: str, device: torch.device, backend: str) -> None:
    """18: in a graph with the matrix product before it and the optimizer's loss scaling after it."""

    def step(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        return REGULARIZED(hidden @ weight, y, gradient=gradient, backend=backend) * 3.0

    torch._dynamo.reset()
    weight = torch.randn(16, 1003, device=device)
    hidden, _ = rows_on(device, 33, 16, torch.float32, scale=0.5)
    y = torch.randint(0, 1003, (33,), device=device)
    y[2] = -100
    compare(torch.compile(step, fullgraph=True), step, hidden, weight, y)


def test_a_schedule_does_not_recompile(device: torch.device, backend: str) -> None:
    coefficient = torch.tensor(0.5, device=device)
    objective = CrossEntropy() + coefficient * ZLoss()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(objective, fullgraph=True, backend=counter)
    z, y = rows_on(device, 6, 77, torch.float32)
    for value in (0.5, 0.25, 0.0):
        coefficient.fill_(value)
        torch.testing.assert_close(compiled(z, y, backend=backend), objective(z, y, backend=backend))
    assert counter.frame_count == 1


@pytest.mark.real_device
def test_compiled_with_cuda_graphs(device: torch.device, backend: str) -> None:
    """18 and 20: mode="reduce-overhead" records the kernels into graphs of its own."""
    torch._dynamo.reset()

    def function(x: Tensor, y: Tensor) -> Tensor:
        return REGULARIZED(x * 1.0, y, backend=backend)

    compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    for seed in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        z, y = rows_on(device, 33, 1003, torch.bfloat16, seed=seed)
        y[3] = -100
        compare(compiled, function, z, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, device: torch.device, any_backend: str) -> None:
    """19: the loss of half-precision logits is float32, and the gradient has the logits' dtype."""
    layer = torch.nn.Linear(6, 77, device=device)
    x, y = torch.randn(4, 6, device=device), torch.randint(0, 77, (4,), device=device)
    objective = CrossEntropy(label_smoothing=0.1) - 0.1 * Entropy()
    with torch.autocast(device.type, dtype):
        z = layer(x)
        loss = objective(z, y, backend=any_backend)
    assert z.dtype == dtype
    assert loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.any()
