"""The last layer of a language model with its loss: what is timed and measured of `Objective.linear`.

python -m benchmarks.heads plain 2048 768 32000 float32 objkern    # bytes that a step adds, in a process of its own
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

import objkern

from . import peers
from .accuracy import Loss
from .contest import OURS, step
from .memory import forget_peak, in_a_process, status
from .pairing import Step
from .workloads import PLAIN, WORKLOADS, Targets, Workload

RECOMPUTE = "objkern, recompute"
CHUNKED = "torch, chunked"  # F.linear_cross_entropy with its options; since torch 2.13
GEMMS = "GEMMs alone"


@dataclass(frozen=True)
class Head:
    """(N, D) hidden states and a (V, D) weight."""

    rows: int
    features: int
    classes: int
    dtype: torch.dtype
    why: str
    targets: dict[str, Targets] = field(default_factory=dict, hash=False)  # by workload
    quick: bool = False  # `--size quick` has it

    def __str__(self) -> str:
        return f"{self.rows}x{self.features}x{self.classes}-{str(self.dtype).removeprefix('torch.')}"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states N(0, 1), and a weight that makes logits N(0, 3²); random labels."""
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(self.rows, self.features, generator=generator).to(self.dtype)
        weight = torch.randn(self.classes, self.features, generator=generator).mul_(3 / self.features**0.5)
        labels = torch.randint(0, self.classes, (self.rows,), generator=generator)
        return hidden.requires_grad_(), weight.to(self.dtype).requires_grad_(), labels


HEADS = [
    Head(2048, 768, 32000, torch.float32, "GPT-2's width, T5's vocabulary", {
        "plain": {"eager": 1.0, "chunked": 1.0}, "regularized": {"eager": 1.5},
    }),
    Head(1024, 512, 32000, torch.float32, "small enough to try", {
        "plain": {"eager": 1.0, "chunked": 2.0}, "regularized": {"eager": 1.5},
    }),
    Head(1024, 512, 32000, torch.bfloat16, "the same in bfloat16", {
        "plain": {"eager": 1.0}, "regularized": {"eager": 1.5},
    }),
    Head(128, 128, 32000, torch.float32, "smaller still", {"regularized": {"eager": 1.5}}, quick=True),
]  # fmt: skip
MEMORY_HEAD = HEADS[0]
LAW_FEATURES, LAW_ROWS, LAW_CLASSES = 64, (1024, 8192), (8192, 65536, 262144)


def flops(rows: int, features: int, classes: int) -> int:
    """Of the three products: logits, the gradient of the hidden states, the gradient of the weight."""
    return 6 * rows * features * classes


def losses(workload: Workload) -> dict[str, Loss]:
    objective, eager = workload.objective, workload.eager
    found: dict[str, Loss] = {
        "eager": lambda h, w, y: eager(F.linear(h, w), y),
        RECOMPUTE: lambda h, w, y: objective.linear(h, w, y, mode="recompute"),
        OURS: objective.linear,
    }
    if workload is PLAIN and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        found[CHUNKED] = lambda h, w, y: F.linear_cross_entropy(h, w, y, options=options)
    if workload is PLAIN:
        found |= {name: peer.loss() for name, peer in peers.on("linear").items()}
    return found


def gemms(hidden: Tensor, weight: Tensor) -> Step:
    """The three products that no implementation can avoid, whole and into memory that exists already."""
    h, w = hidden.detach(), weight.detach()
    logits = torch.empty(h.shape[0], w.shape[0], dtype=h.dtype)
    of_hidden, of_weight = torch.empty_like(h), torch.empty_like(w)

    def run() -> float:
        start = perf_counter()
        torch.mm(h, w.t(), out=logits)
        torch.mm(logits, w, out=of_hidden)
        torch.mm(logits.t(), h, out=of_weight)
        return perf_counter() - start

    return run


# ---- memory ---------------------------------------------------------------------------------------------------------


def measure(workload: str, rows: int, features: int, classes: int, dtype: str, contestant: str) -> int:
    """Bytes that forward and backward add to the peak of the resident set, the gradients included."""
    return in_a_process("benchmarks.heads", workload, rows, features, classes, dtype, contestant)


def main(workload: str, rows: str, features: str, classes: str, dtype: str, contestant: str) -> None:
    loss = losses(WORKLOADS[workload])[contestant]
    small = Head(64, int(features), 4096, getattr(torch, dtype), "")
    step(loss, small.inputs())()  # brings in code and threads
    hidden, weight, labels = Head(int(rows), int(features), int(classes), getattr(torch, dtype), "").inputs()
    objkern.release_buffers()
    forget_peak()
    before = status("VmRSS")
    loss(hidden, weight, labels).backward()
    print(json.dumps(status("VmHWM") - before))


if __name__ == "__main__":
    main(*sys.argv[1:])
