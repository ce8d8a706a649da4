"""The fused linear path: hidden states and a weight in, loss and gradients out, against everyone and the bare GEMMs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import accuracy, peers
from ..accuracy import Loss, reason
from ..pairing import summary
from ..workloads import PLAIN, WORKLOADS, Workload
from .contest import able, compared, record_absences
from .device import Device
from .step import Entry, Step, main

MODES = ("forward", "recompute")
# Rows, features, classes: a layer of Llama-3-8B, and one of Gemma-2-2B.
CASES = [(4096, 4096, 128256), (8192, 2304, 256000)]


def contestants(device: Device, workload: Workload, compile: bool) -> dict[str, Loss]:
    objective, eager = workload.objective, workload.eager
    found: dict[str, Loss] = {
        f"objkern {name} {mode}": lambda h, w, y, b=backend, m=mode: objective.linear(h, w, y, backend=b, mode=m)
        for name, backend in device.backends.items()
        if able(device)[name] is None
        for mode in MODES
    }
    found["eager"] = lambda h, w, y: eager(F.linear(h, w), y)
    if compile:
        torch._dynamo.reset()
        found["compiled"] = torch.compile(found["eager"], dynamic=False, fullgraph=True)
    return found | (rivals() if workload is PLAIN else {})


def rivals() -> dict[str, Loss]:
    """What is installed of other fused linear losses, and torch's own chunked one (2.13 on)."""
    found = {name: peer.loss() for name, peer in peers.on("linear").items()}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch, chunked"] = lambda h, w, y: F.linear_cross_entropy(h, w, y, options=options)
    return found


def gemms(h: Tensor, w: Tensor) -> dict[str, Callable[[], Any]]:
    """The products that no implementation can avoid, of the largest chunks that fit: three, and four with recompute."""
    rows = min(h.shape[0], 2048)
    logits = torch.empty(rows, w.shape[0], dtype=h.dtype, device=h.device)
    of_hidden, of_weight = torch.empty_like(h), torch.empty_like(w)

    def run(projections: int) -> None:
        for begin in range(0, h.shape[0], rows):
            part = h[begin : begin + rows]
            z = logits[: part.shape[0]]
            for _ in range(projections):
                torch.mm(part, w.t(), out=z)
            torch.mm(z, w, out=of_hidden[begin : begin + rows])
            torch.mm(z.t(), part, out=of_weight)

    return {"three GEMMs": lambda: run(1), "four GEMMs": lambda: run(2)}


def inputs(device: Device, rows: int, features: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    make = {"dtype": torch.bfloat16, "device": device.name}
    hidden = torch.randn(rows, features, **make).requires_grad_()
    weight = (torch.randn(classes, features, **make) * (3 / features**0.5)).requires_grad_()
    return hidden, weight, torch.randint(classes, (rows,), device=device.name)


def measure(device: Device, step: Step, case: tuple[int, int, int], workload: Workload, seconds: float) -> None:
    rows, features, classes = case[0] // device.scale, case[1] // device.scale, case[2] // device.scale
    h, w, y = inputs(device, rows, features, classes)
    runs: dict[str, Callable[[], Any]] = {
        name: lambda loss=loss: torch.autograd.grad(loss(h, w, y), (h, w))
        for name, loss in contestants(device, workload, compile=not step.quick).items()
    }
    runs |= gemms(h.detach(), w.detach())
    skipped: dict[str, str] = {}
    memory: dict[str, int] = {}
    once = 0.0
    for name, run in list(runs.items()):
        try:
            run()
            device.synchronize()
            memory[name] = device.growth(run)[1]
            begin = perf_counter()
            device.seconds(run)
            once += perf_counter() - begin
        except Exception as error:  # out of memory, or a kernel that does not compile: the others go on
            skipped[name] = reason(error)
            del runs[name]
            gc.collect()
            device.free_bytes()
    rounds = max(3, min(20, int(seconds / max(once, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        names = list(runs)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(device.seconds(runs[name]))
    times = {name: found[1:] for name, found in times.items()}
    step.record(described(case, workload) | compared(times) | {
        "skipped": skipped, "memory": memory, "errors": errors(device, workload, h, w, y),
        "tflops": {name: 2e-12 * products(name) * rows * features * classes / summary(found)[1]
                   for name, found in times.items() if "GEMM" in name},
    })  # fmt: skip


def products(name: str) -> int:
    return {"three GEMMs": 3, "four GEMMs": 4}[name]


def described(case: tuple[int, int, int], workload: Workload) -> Entry:
    rows, features, classes = case
    return {
        "kind": "linear", "rows": rows, "features": features, "classes": classes, "dtype": "bfloat16",
        "workload": workload.name,
    }  # fmt: skip


def errors(device: Device, workload: Workload, h: Tensor, w: Tensor, y: Tensor) -> Entry:
    """Relative errors of loss and hidden gradient against float64, on 64 rows: right before fast."""
    inputs = (h.detach()[:64].clone().requires_grad_(), w.detach(), y[:64])
    found, failed = accuracy.errors(
        contestants(device, workload, compile=False), lambda h, w, y: workload.eager(F.linear(h, w), y), inputs,
        shared=(1,), fatal=False,
    )  # fmt: skip
    return {**found, **failed}


def run(step: Step) -> int:
    device, failed = step.device(), 0
    record_absences(device, step)
    cases = [(case, name) for case in (CASES[:1] if step.quick else CASES) for name in WORKLOADS]
    for number, (case, name) in enumerate(cases):
        share = max(1.0, step.left / (len(cases) - number))
        try:
            measure(device, step, case, WORKLOADS[name], min(8.0, 0.5 * share))
        except Exception as error:  # recorded with the case, which counts as failed; the others go on
            failed += 1
            step.record(described(case, WORKLOADS[name]) | {"skipped": {"all": reason(error)}})
    return failed


if __name__ == "__main__":
    main(run)
