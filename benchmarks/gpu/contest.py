"""Who takes part on a CUDA device, and the race: contestants take turns, and only times of one round are divided."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .. import accuracy, peers
from ..accuracy import reason
from ..pairing import paired_ratio, summary
from ..workloads import PLAIN, Loss, Workload
from .device import Device
from .step import Entry, Step

MODES = ("backward", "forward")  # two reads and one write; one read and one write


@dataclass
class Contestant:
    loss: Loss
    overwrites: bool = False  # its input with the gradient: it gets a fresh copy, outside of the timed part
    compiles: bool = False


def able(device: Device) -> dict[str, str | None]:
    """For each backend, why it cannot run here; None if it can."""
    from objkern import CrossEntropy

    found: dict[str, str | None] = {}
    for name, backend in device.backends.items():
        x = torch.zeros(2, 3, device=device.name, requires_grad=True)
        try:
            CrossEntropy()(x, torch.zeros(2, dtype=torch.long, device=device.name), backend=backend).backward()
            found[name] = None
        except Exception as error:  # recorded, whatever it is
            found[name] = f"{type(error).__name__}: {error}"
    return found


def ours(device: Device, workload: Workload, suffix: str = "") -> dict[str, Contestant]:
    return {
        f"objkern {name} {mode}{suffix}": Contestant(objkern_loss(workload, backend, mode))
        for name, backend in device.backends.items()
        if able(device)[name] is None
        for mode in MODES
    }


def objkern_loss(workload: Workload, backend: str, mode: str) -> Loss:
    return lambda x, y: workload.objective(x, y, gradient=mode, backend=backend)


def upcast(loss: Loss) -> Loss:
    """Half-precision logits go through float32, as Transformers does."""
    return lambda logits, target: loss(logits.float(), target)


def rivals(workload: Workload, dtype: torch.dtype, compile: bool = True) -> dict[str, Contestant]:
    found = {"eager": Contestant(workload.eager)}
    if dtype.itemsize < 4:
        found["eager, float32"] = Contestant(upcast(workload.eager))
    if compile:
        torch._dynamo.reset()
        compiled = torch.compile(workload.eager, dynamic=False, fullgraph=True)
        found["compiled"] = Contestant(compiled, compiles=True)
    if workload is PLAIN:
        found |= {name: Contestant(peer.loss(), peer.overwrites) for name, peer in peers.on("logits").items()}
    return found


class Turn:
    """A contestant with its logits: what is done before the timed part, and that part."""

    def __init__(self, contestant: Contestant, x: Tensor, y: Tensor) -> None:
        self.loss, self.y = contestant.loss, y
        self.pristine = x if contestant.overwrites else None
        self.x = x.detach().clone().requires_grad_() if contestant.overwrites else x

    def prepare(self) -> None:
        if self.pristine is not None:
            self.x.data.copy_(self.pristine.detach())

    def __call__(self) -> None:
        """Logits are a layer's output in training, so their gradient goes on and is accumulated nowhere."""
        torch.autograd.grad(self.loss(self.x, self.y), self.x)


def race(
    device: Device, contestants: dict[str, Contestant], x: Tensor, y: Tensor, seconds: float, most: int,
    repeat: int = 1, flush: bool = True,
) -> tuple[dict[str, list[float]], Entry]:  # fmt: skip
    """The seconds of everyone, round by round, and who could not take part and why.

    Args:
        seconds: how long all rounds together should take; at least 5 rounds, at most `most`.
    """
    turns: dict[str, Turn] = {}
    skipped: dict[str, str] = {}
    compile_seconds: dict[str, float] = {}
    memory: dict[str, list[int]] = {}
    once = 0.0
    for name, contestant in contestants.items():
        try:
            begin = perf_counter()
            turn = Turn(contestant, x, y)
            turn.prepare()
            turn()
            device.synchronize()
            if contestant.compiles:
                compile_seconds[name] = perf_counter() - begin
            turn.prepare()
            memory[name] = grown(device, turn)
            begin = perf_counter()
            device.seconds(turn, repeat, turn.prepare, flush)
            once += perf_counter() - begin
            turns[name] = turn
        except Exception as error:  # out of memory, or a kernel that does not compile: the others go on
            skipped[name] = reason(error)
            gc.collect()
            device.free_bytes()
    rounds = max(5, min(most, int(seconds / max(once, 1e-6))))
    found: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for number in range(rounds + 1):
        first = number % max(len(names), 1)
        for name in names[first:] + names[:first]:  # nobody is always the one after the largest
            found[name].append(device.seconds(turns[name], repeat, turns[name].prepare, flush))
    return (
        {name: times[1:] for name, times in found.items()},
        {"skipped": skipped, "compile_seconds": compile_seconds, "memory": memory},
    )


def grown(device: Device, turn: Turn) -> list[int]:
    """Bytes that the forward pass adds to the peak, and those that both passes add."""
    loss, forward = device.growth(lambda: turn.loss(turn.x, turn.y))
    held: list[Any] = [loss]
    _, backward = device.growth(lambda: torch.autograd.grad(held.pop(), turn.x))
    del loss
    turn.prepare()
    _, both = device.growth(turn)
    return [forward, max(both, backward)]


def compared(seconds: dict[str, list[float]]) -> Entry:
    """Medians within [20 %, 80 %], and paired ratios of every rival to each of objkern's contestants."""
    own = [name for name in seconds if name.startswith("objkern") and not name.endswith(", plain")]
    ratio = {
        f"{rival} / {name}": paired_ratio(seconds[rival], seconds[name])
        for name in own for rival in seconds
        if not rival.startswith("objkern") or rival == f"{name}, plain"
    }  # fmt: skip
    return {
        "rounds": len(next(iter(seconds.values()), [])),
        "seconds": {name: summary(times) for name, times in seconds.items()},
        "ratio": ratio,
    }


def checked(device: Device, contestants: dict[str, Contestant], workload: Workload, x: Tensor, y: Tensor) -> Entry:
    """Relative errors of loss and gradient against float64, on 128 rows: right before fast."""
    part = x.detach()[-128:].clone().requires_grad_()
    found: Entry = {}
    for truth, suffix in ((workload.eager, ""), (PLAIN.eager, ", plain")):
        losses = {
            name: partial(on_a_copy, one.loss) if one.overwrites else one.loss
            for name, one in contestants.items()
            if name.endswith(", plain") == bool(suffix) and not one.compiles  # compiled for the whole shape alone
        }
        if losses:
            errors, failed = accuracy.errors(losses, truth, (part, y[-128:]), fatal=False)
            found |= errors | failed
    return found


def on_a_copy(loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """Of a loss that overwrites its logits."""
    return loss(x.clone(), y)


def inputs(device: Device, rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits N(0, 3²), about the spread of a language model's, and random labels."""
    torch.manual_seed(0)
    x = torch.empty(max(1, rows), classes, dtype=dtype, device=device.name)
    for part in x.split(max(1, (1 << 28) // classes)):
        part.normal_(0, 3)
    return x.requires_grad_(), torch.randint(0, classes, (max(1, rows),), device=device.name)


def described(kind: str, x: Tensor, workload: Workload) -> Entry:
    return {
        "kind": kind, "rows": x.shape[0], "classes": x.shape[1], "dtype": str(x.dtype).removeprefix("torch."),
        "workload": workload.name, "bytes": x.numel() * x.element_size(),
    }  # fmt: skip


def record_absences(device: Device, step: Step) -> None:
    why = {name: text for name, text in able(device).items() if text is not None}
    step.record({"kind": "absences", "why": why | peers.absent()})
