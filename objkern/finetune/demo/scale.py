"""The same objective where it costs something: forward and backward on logits of language-model size."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

import objkern

from ..memory import extra_peak_bytes
from ..tables import mebibytes, table
from .native import fused_objective, native_objective

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Measurement:
    """One contestant; the errors are relative, against float64. `failure` has one line if it could not run."""

    name: str
    seconds: float = float("nan")
    extra_bytes: float = float("nan")
    loss_error: float = float("nan")
    gradient_error: float = float("nan")
    failure: str = ""


def measure(device: torch.device, rows: int, classes: int, compiled: bool, repetitions: int = 7) -> list[Measurement]:
    """Fused, native and (if `compiled`) native through torch.compile on the same float32 logits (rows, classes)."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, classes, generator=generator)).to(device).requires_grad_()
    target = torch.randint(classes, (rows,), generator=generator).to(device)
    truth = logits.detach().double().requires_grad_()
    true_loss = native_objective(truth, target)
    true_loss.backward()
    true_loss, true_gradient = true_loss.detach(), truth.grad
    del truth

    def contest(name: str, objective: Loss) -> Measurement:
        def forward_and_backward() -> torch.Tensor:
            logits.grad = None
            loss = objective(logits, target)
            loss.backward()
            return loss.detach()

        loss = forward_and_backward()  # warm-up; for torch.compile also the compilation
        loss_error = ((loss.double() - true_loss).abs() / true_loss.abs()).item()
        gradient_error = (torch.dist(logits.grad.double(), true_gradient) / true_gradient.norm()).item()
        logits.grad = None
        objkern.release_buffers()  # the memory of the call before, kept for this one, would not count
        extra = extra_peak_bytes(forward_and_backward, device)
        seconds = []
        for _ in range(repetitions):
            _synchronize(device)
            began = time.perf_counter()
            forward_and_backward()
            _synchronize(device)
            seconds.append(time.perf_counter() - began)
        return Measurement(name, median(seconds), extra, loss_error, gradient_error)

    results = [contest("fused", fused_objective()), contest("native", native_objective)]
    if compiled:
        try:
            results.append(contest("native, torch.compile", torch.compile(native_objective, dynamic=False)))
        except Exception as error:  # no compiler, no headers, a toolchain of another kind: the row says which
            line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            results.append(Measurement("native, torch.compile", failure=f"{type(error).__name__}: {line}"))
    return results


def scale_table(results: list[Measurement]) -> str:
    """The measurements, and below the table why one is missing."""
    fused = results[0].seconds
    rows = [
        [
            result.name,
            *(
                ["failed", "", "", "", ""]
                if result.failure
                else [
                    f"{1e3 * result.seconds:.0f} ms",
                    f"{result.seconds / fused:.1f}",
                    mebibytes(result.extra_bytes),
                    f"{result.loss_error:.1e}",
                    f"{result.gradient_error:.1e}",
                ]
            ),
        ]
        for result in results
    ]
    text = table(["objective", "median time", "of fused", "extra peak", "loss error", "gradient error"], rows)
    return "\n".join([text, *(f"{result.name} failed: {result.failure}" for result in results if result.failure)])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
