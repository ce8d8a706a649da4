"""What the tests share: the error budget, and the formulas as people write them."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import objkern

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Of the largest true value.
BUDGET_ATOL = {torch.float64: 1e-12, torch.float32: 1e-7, torch.float16: 1e-4, torch.bfloat16: 1e-4}


def assert_within_budget(ours: Tensor, native: Tensor, truth: Tensor, dtype: torch.dtype, what: str = "") -> None:
    """err(ours, float64) ≤ 2·err(torch in the same dtype, float64) + atol, norm-wise and in the worst row."""
    ours, native, truth = (
        x.detach().double().reshape(truth.shape[0] if truth.dim() else 1, -1) for x in (ours, native, truth)
    )
    assert torch.isfinite(truth).all(), f"{what}: the truth itself is not finite"
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    atol = BUDGET_ATOL[dtype] * truth.abs().max().item()
    error = ours - truth
    allowed = torch.where(
        torch.isfinite(native), native - truth, torch.zeros_like(truth)
    )  # torch's NaN excuses nothing
    rms = lambda x: x.square().mean().sqrt().item()  # noqa: E731
    worst = lambda x: x.abs().max().item()  # noqa: E731
    for measure in (rms, worst):
        got, limit = measure(error), 2 * measure(allowed) + atol
        assert got <= limit, f"{what} {dtype}: error {got:.3e} exceeds {limit:.3e} (torch's own {measure(allowed):.3e})"


@pytest.fixture
def half_precision_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused linear path on a CPU does as on a GPU: GEMMs of half-precision numbers with float32 sums."""

    def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
        assert a.dtype == b.dtype
        wide = torch.float64 if a.dtype == torch.float64 else torch.float32
        found = a.to(wide) @ b.to(wide)
        return out.add_(found) if add else out.copy_(found)

    monkeypatch.setattr(objkern.linear, "_widens", lambda hidden: False)
    monkeypatch.setattr(objkern.linear, "_multiply", multiply)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass of the fused linear path takes few classes at a time."""
    monkeypatch.setattr(objkern.linear, "_LEAST_ROWS", 1)
    monkeypatch.setattr(objkern.linear, "_LEAST_CLASSES", 12)
    monkeypatch.setattr(objkern.linear, "_CLASSES_STEP", 8)


def one_hot(z: Tensor, y: Tensor) -> Tensor:
    return F.one_hot(y, z.shape[-1]).bool()


def log_p_target(z: Tensor, y: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)


# Each term as people write it in eager torch, from (N, V) logits and (N) labels to (N) values.
NATIVE = {
    "CrossEntropy()": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "CrossEntropy(label_smoothing=0.1)": lambda z, y: F.cross_entropy(z, y, reduction="none", label_smoothing=0.1),
    "ZLoss()": lambda z, y: z.logsumexp(-1).square(),
    "MaxZLoss()": lambda z, y: z.max(-1).values.square(),
    "Entropy()": lambda z, y: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1),
    "Focal(gamma=2.0)": lambda z, y: -((1 - log_p_target(z, y).exp()) ** 2) * log_p_target(z, y),
    "Poly1(epsilon=1.0)": lambda z, y: -log_p_target(z, y) + 1.0 * (1 - log_p_target(z, y).exp()),
    "GeneralizedCrossEntropy(q=0.7)": lambda z, y: (1 - log_p_target(z, y).exp() ** 0.7) / 0.7,
    "Unlikelihood()": lambda z, y: -torch.log(1 - log_p_target(z, y).exp()),
    "Margin(m=0.35)": lambda z, y: F.cross_entropy(z - 0.35 * one_hot(z, y).to(z), y, reduction="none"),
    "LogitL2()": lambda z, y: z.square().mean(-1),
}

EVERY_TERM = (
    "CrossEntropy(label_smoothing=0.1) + 0.5*ZLoss() + 0.3*MaxZLoss() - 0.7*Entropy() + Focal(gamma=2.0) + "
    "Poly1(epsilon=1.0) + GeneralizedCrossEntropy(q=0.7) + 0.2*Unlikelihood() + Margin(m=0.35) + 0.9*LogitL2()"
)


def native_objective(z: Tensor, y: Tensor, formula: dict[str, float]) -> Tensor:
    """(N) values of a weighted sum of NATIVE formulas."""
    return sum(c * NATIVE[name](z, y) for name, c in formula.items())


EVERY_NATIVE = {
    "CrossEntropy(label_smoothing=0.1)": 1.0, "ZLoss()": 0.5, "MaxZLoss()": 0.3, "Entropy()": -0.7,
    "Focal(gamma=2.0)": 1.0, "Poly1(epsilon=1.0)": 1.0, "GeneralizedCrossEntropy(q=0.7)": 1.0, "Unlikelihood()": 0.2,
    "Margin(m=0.35)": 1.0, "LogitL2()": 0.9,
}  # fmt: skip


def random_rows(
    rows: int, classes: int, dtype: torch.dtype, scale: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits N(0, scale²) and labels, the same for every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale).to(dtype)
    return logits, torch.randint(0, classes, (rows,), generator=generator)


def masked_sides(rows: int, classes: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(direction, logits, reference) whose divergence is finite, with classes masked by the least number there is."""
    (z, _), (r, _) = random_rows(rows, classes, dtype, 2.0, 1), random_rows(rows, classes, dtype, 2.0, 2)
    least, some = torch.finfo(dtype).min, torch.arange(classes)
    for masked in (some >= classes - classes // 4, some < classes // 4, some % 3 == 1):
        yield "forward", z, r.masked_fill(masked, least)
        yield "reverse", z.masked_fill(masked, least), r
        for direction in ("forward", "reverse"):
            yield direction, z.masked_fill(masked, least), r.masked_fill(masked, least)


def assert_masks_are_no_part_of_a_gradient(
    backend: str, classes: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> None:
    """Of the least number, whose mean and variance are not finite: nothing to a gradient that is not of these."""
    z, y = (x.to(device) for x in random_rows(3, classes, dtype))
    masked = torch.arange(classes, device=device) >= classes // 3
    y = y % (classes // 3)
    term = objkern.custom(lambda s: s.entropy.square() - s.logprob - s.other_logprob, name="mine")

    def gradients(x: Tensor, backend: str) -> list[Tensor]:  # one by one: their sum would be rounded again
        x.requires_grad_()
        s = objkern.row_statistics(x, y, backend=backend)
        of_statistics = (s.logprob * s.entropy + s.lse.square() - s.other_logprob + s.max_logit).sum()
        objective = (objkern.CrossEntropy() + term)(x, y, backend=backend)
        return [torch.autograd.grad(loss, x)[0] for loss in (of_statistics, objective)]

    found = gradients(z.masked_fill(masked, torch.finfo(dtype).min), backend)
    exact = gradients(z.double().masked_fill(masked, -torch.inf), "reference")
    for ours, truth in zip(found, exact, strict=True):
        assert_rounded(ours, truth, 1e-12 if dtype == torch.float64 else 1e-5)


def assert_rounded(found: Tensor, exact: Tensor, error: float, msg: Callable[[str], str] | None = None) -> None:
    """Computed with such an error, as a part of the largest number, and then rounded to the dtype.

    Half precision rounds each number by itself: the small ones beside a large one have their own digits.
    """
    finite = exact[exact.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 1.0
    of = torch.finfo(found.dtype)
    torch.testing.assert_close(
        found.double(), exact.double(), rtol=max(error, of.eps), atol=error * largest + of.smallest_normal * of.eps,
        equal_nan=True, msg=msg,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
