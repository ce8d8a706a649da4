"""Random calls of random objectives, held against float64 autograd of the formulas.

Hypothesis draws what a call is made of; the numbers come from a generator with a drawn seed. `check` is run on the CPU
kernels by test_properties.py, and on the interpreted and the emulated ones by their own cases.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

import objkern

ROW_TERMS = (
    "CrossEntropy()", "CrossEntropy(label_smoothing=0.1)", "CrossEntropy(label_smoothing=1.0)", "ZLoss()", "MaxZLoss()",
    "Entropy()", "Focal(gamma=2.0)", "Focal(gamma=0.5)", "Poly1(epsilon=1.5)", "GeneralizedCrossEntropy(q=0.7)",
    "Unlikelihood()", "Margin(m=0.35)", "Margin(m=-1.0)", "LogitL2()",
)  # fmt: skip
ANY_TARGET = ("CrossEntropy()", "CrossEntropy(label_smoothing=0.1)", "ZLoss()", "MaxZLoss()", "Entropy()", "LogitL2()")
NO_TARGET = ("ZLoss()", "MaxZLoss()", "Entropy()", "LogitL2()")
ELEMENT_TERMS = (
    "BinaryCrossEntropy()", "BinaryCrossEntropy(label_smoothing=0.2)", "BernoulliEntropy()", "MeanSquaredError()",
    "MeanAbsoluteError()", "Huber()", "Huber(delta=0.25)", "LogitL2()",
)  # fmt: skip
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Of the sum of what the terms are by themselves. A gradient is rounded to its dtype at the end.
OF_LOSS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
OF_GRADIENT = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}
LEAST = {torch.float64: 1e-14, torch.float32: 1e-7, torch.bfloat16: 1e-7, torch.float16: 1e-7}  # of a gradient


Results = dict[str, Tensor]


@dataclass
class Case:
    kind: str  # "labels", "probabilities", "no target", "elements"
    terms: list[tuple[float, str]]
    rows: int
    classes: int
    dtype: torch.dtype
    seed: int
    spread: float
    offset: float
    options: dict[str, Any] = field(default_factory=dict)
    ignored: float = 0.0  # share of the rows
    excluded: float = 0.0  # share of the logits
    layout: str = "contiguous"
    linear: str | None = None  # a mode, for the path from hidden states
    temperature: float = 1.0  # of the divergences

    @property
    def objective(self) -> objkern.Objective:
        return objkern.parse(" + ".join(f"{c!r}*{term}" for c, term in self.terms).replace("+ -", "- "))


@st.composite
def cases(draw: Any, most_rows: int = 9, most_classes: int = 150, linear: bool = True) -> Case:
    kind = draw(st.sampled_from(["labels"] * 4 + ["probabilities", "no target", "elements"]))
    terms = {
        "labels": ROW_TERMS, "probabilities": ANY_TARGET, "no target": NO_TARGET, "elements": ELEMENT_TERMS
    }[kind]  # fmt: skip
    coefficient = st.sampled_from([1.0, 0.5, -0.7, 2.0, 1e-3, -0.05])
    chosen = draw(st.lists(st.tuples(coefficient, st.sampled_from(terms)), min_size=1, max_size=6))
    if kind == "elements" and all(term == "LogitL2()" for _, term in chosen):
        chosen[0] = (chosen[0][0], "BernoulliEntropy()")  # alone it is a term on rows
    edges = [n for n in (1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 64, 65, 127, 128, 129) if n <= most_classes]
    classes = draw(st.one_of(st.sampled_from(edges), st.integers(2, most_classes)))
    if classes == 1:  # a sole class has probability 1: some formulas are infinite, others 0 by 0
        chosen = [(c, term) for c, term in chosen if not term.startswith(("Unlikelihood", "Focal", "Margin"))]
        chosen = chosen or [(1.0, "LogitL2()" if kind != "elements" else "MeanSquaredError()")]
    temperature = draw(st.sampled_from([1.0, 2.0, 0.5]))
    if kind != "elements" and draw(st.integers(0, 2)) == 0:
        both = [f"KLDivergence({direction!r}, temperature={temperature})" for direction in ("forward", "reverse")]
        chosen = [*chosen[:4], *draw(st.lists(st.tuples(coefficient, st.sampled_from(both)), min_size=1, max_size=2))]
    case = Case(
        kind, chosen, draw(st.integers(1, most_rows)), classes, draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 2**20)), draw(st.sampled_from([0.1, 1.0, 3.0])), draw(st.sampled_from([0.0, 0.0, -4.0, 50.0])),
        temperature=temperature,
    )  # fmt: skip
    options = case.options
    options["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    if options["reduction"] != "none":
        options["gradient"] = draw(st.sampled_from(["backward", "forward"]))
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["normalizer"] = draw(st.sampled_from([3, 7.5]))
    if draw(st.integers(0, 3)) == 0:
        options["softcap"] = draw(st.sampled_from([2.0, 30.0]))
    if draw(st.integers(0, 3)) == 0:
        options["logit_scale"] = draw(st.sampled_from([0.5, 2.0, -1.0]))
    case.layout = draw(st.sampled_from(["contiguous", "contiguous", "padded", "transposed", "every second"]))
    if kind == "labels":
        case.ignored = draw(st.sampled_from([0.0, 0.3, 1.0]))
        options["empty"] = "zero"
        if options["reduction"] == "mean" and draw(st.booleans()):
            options["ignore_index"] = draw(st.sampled_from([-1, 0]))
    if kind in ("labels", "no target") and classes > 2:
        case.excluded = draw(st.sampled_from([0.0, 0.0, 0.3]))
    if linear and kind != "elements" and case.excluded == 0 and draw(st.integers(0, 2)) == 0:
        case.linear = "recompute" if options["reduction"] == "none" else draw(st.sampled_from(["forward", "recompute"]))
        case.offset = 0.0
        options.pop("gradient", None)
    return case


def numbers(case: Case) -> tuple[Tensor, Tensor | None]:
    """Logits or predictions, and the target."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.rows, case.classes)
    z = torch.randn(shape, generator=generator, dtype=torch.float64) * case.spread + case.offset
    z = z.to(case.dtype)
    if case.layout == "padded":
        z = torch.nn.functional.pad(z, (1, 3))[:, 1 : 1 + case.classes]
    elif case.layout == "transposed":
        z = z.t().contiguous().t()
    elif case.layout == "every second":
        z = z.repeat_interleave(2, 0)[::2]
    if case.kind == "labels":
        target = torch.randint(case.classes, shape[:1], generator=generator)
        mark = case.options.get("ignore_index", -100)
        target[torch.rand(shape[:1], generator=generator) < case.ignored] = mark
        own = torch.nn.functional.one_hot(target.clamp(min=0), case.classes).bool()
    elif case.kind == "probabilities":
        target = torch.rand(shape, generator=generator, dtype=torch.float64)
        target, own = (target / target.sum(1, keepdim=True)).to(case.dtype), None
    elif case.kind == "elements":
        target, own = torch.rand(shape, generator=generator, dtype=torch.float64).round(decimals=1).to(case.dtype), None
    else:
        target = own = None
    if case.excluded:
        out = torch.rand(shape, generator=generator) < case.excluded
        out[:, :2] = False  # two classes are left in every row
        z = z.masked_fill(out if own is None else out & ~own, -torch.inf)
    return z, target


def run(case: Case, objective: objkern.Objective, z: Tensor, target: Tensor | None, **more: Any) -> Results:
    """Loss, parts and gradients under an upstream gradient of its own for every number of the loss, by name. Without the
    accuracy: which of two logits is larger may hang on the last digit of a transform."""
    options = {**case.options, **more}
    if "KLDivergence" in repr(objective):
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(case.seed + 2), dtype=torch.float64)
        narrow = (z.double().masked_fill(z == -torch.inf, 0.0) + noise).to(case.dtype)  # the same for the exact run
        options["reference"] = narrow.to(z.dtype)
    exact = options.get("backend") == "reference"
    if exact:
        options.pop("gradient", None)
    if case.linear is None:
        leaves = [z.detach().requires_grad_()]
        loss, parts = objective(leaves[0], target, return_parts=True, **options)
    else:
        generator = torch.Generator().manual_seed(case.seed)
        weight = torch.randn(case.classes, case.classes + 3, generator=generator, dtype=torch.float64)
        weight = (weight / case.classes**0.5).to(case.dtype)
        hidden = torch.nn.functional.pad(z, (0, 3), value=0.5)
        leaves = [x.detach().to(z.dtype).requires_grad_() for x in (hidden, weight)]
        if not exact:
            options |= {"mode": case.linear, "chunk_rows": 1 + case.seed % 4}
        loss, parts = objective.linear(*leaves, target, return_parts=True, **options)
    generator = torch.Generator().manual_seed(case.seed + 1)
    upstream = torch.rand(loss.shape, generator=generator, dtype=torch.float64) + 0.5
    gradients = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))
    found = {"loss": loss.detach(), **{name: part for name, part in parts.items() if name != "accuracy"}}
    return found | {f"gradient {k}": gradient for k, gradient in enumerate(gradients)}


def check(case: Case, backend: str = "auto") -> None:
    z, target = numbers(case)
    held = z.clone(), None if target is None else target.clone()
    found = run(case, case.objective, z, target, backend=backend)
    assert torch.equal(z, held[0]), "the logits were written to"
    assert target is None or torch.equal(target, held[1]), "the target was written to"
    wide = target if target is None or target.dtype == torch.int64 else target.double()
    exact = run(case, case.objective, z.double(), wide, backend="reference")
    # Terms may cancel each other: what they are by themselves is looked at only where their sum is not precise enough.
    if (wrong := mismatch(case, found, exact, exact)) is not None:
        alone = [
            run(case, abs(c) * objkern.parse(term), z.double(), wide, backend="reference")
            for c, term in case.terms
            if not (case.kind == "elements" and term == "LogitL2()")  # alone it would be one on rows
        ]
        wrong = mismatch(case, found, exact, *alone, exact)
    assert wrong is None, f"{wrong}\n{case}"


def mismatch(case: Case, found: Results, exact: Results, *sizes: Results) -> str | None:
    """What is not within the bounds, which are relative to the sum of `sizes`, for parts to what they are themselves."""
    largest = lambda x: x.abs().nan_to_num(0.0, 0.0, 0.0).max().item() if x.numel() else 0.0  # noqa: E731
    for name, truth in exact.items():
        ours = found[name]
        if name.startswith("gradient"):
            # Gradients are differences of probabilities, a digit of 1 each; where a cap saturates, its slope
            # 1 − (z/c)² is what rounding left of a difference.
            steep = case.temperature**2 + (4.0 + 2.0 * case.options.get("softcap", 0.0)) * sum(
                abs(c) for c, _ in case.terms
            )
            steep = max(1.0, steep)
            bound = OF_GRADIENT[case.dtype] * sum(largest(x[name]) for x in sizes) + LEAST[case.dtype] * steep
        else:
            of_sum = sum(largest(x["loss"]) for x in sizes) if name in ("loss", "total") else 0.0
            bound = OF_LOSS[case.dtype] * (of_sum + largest(truth) + 1.0)
        try:
            torch.testing.assert_close(ours.double(), truth.double(), rtol=0.0, atol=bound, equal_nan=True)
        except AssertionError as error:
            return f"{name}: {error}"
    return None


def settings(ordinary: int) -> hypothesis.settings:
    """As many cases as OBJKERN_CASES says, or so many; the same ones in every run."""
    return hypothesis.settings(
        max_examples=int(os.environ.get("OBJKERN_CASES", ordinary)), deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
