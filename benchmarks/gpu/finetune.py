"""A whole step of training a language model: tokens a second, memory, the largest batch that fits, against everyone.

About 100M weights at Llama-3's vocabulary, sequences of 2048 tokens, bfloat16, the head tied to the embedding: a model
whose head is most of it, as in small language models of today.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..accuracy import reason
from ..pairing import summary
from ..steps import Training, losses, prepared, whole_step
from ..workloads import PLAIN, WORKLOADS, Workload
from .contest import compared
from .device import Device
from .step import Step, main

TRAINING = Training("causal-lm", "a Llama of 91M parameters", 4, 2048, 128256, 128256, 512, 8, 8, True, tied=True)
MOST = 512  # sequences of the largest batch that is tried


def contestants(training: Training, workload: Workload) -> dict[str, Any]:
    found = losses(training, workload)
    if workload is PLAIN:
        try:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused
        except ImportError:
            return found

        def liger(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            return fused(hidden.flatten(0, 1), model.lm_head.weight, labels[:, 1:].flatten())

        found["liger"] = liger
    return found


def begun(device: Device, training: Training, workload: Workload, name: str) -> Callable[[], None]:
    """A step of one contestant, on a model of its own."""
    model = prepared(training, workload, name, device.name, torch.bfloat16)
    return whole_step(contestants(training, workload)[name], model, *training.inputs(device.name))


def measure(device: Device, step: Step, training: Training, workload: Workload, seconds: float) -> None:
    runs: dict[str, Callable[[], None]] = {}
    memory, skipped = {}, {}
    for name in contestants(training, workload):
        try:
            runs[name] = begun(device, training, workload, name)
            runs[name]()
            device.synchronize()
            memory[name] = device.growth(runs[name])[1]
        except Exception as error:  # out of memory, or a kernel that does not compile: the others go on
            skipped[name] = reason(error)
            runs.pop(name, None)
            gc.collect()
            device.free_bytes()
    once = sum(device.seconds(run, flush=False) for run in runs.values())
    rounds = max(3, min(15, int(seconds / max(once, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(device.seconds(runs[name], flush=False))
    runs.clear()
    gc.collect()
    device.free_bytes()
    largest = {name: largest_batch(device, step, training, workload, name) for name in names}
    step.record({
        "kind": "finetune step", "rows": training.tokens, "classes": training.classes, "dtype": "bfloat16",
        "workload": workload.name, "training": training.why, "length": training.length, "skipped": skipped,
        "memory": memory, "largest_batch": largest,
        "tokens_per_second": {name: training.tokens / summary(found)[1] for name, found in times.items()},
    } | compared(times))  # fmt: skip


def largest_batch(device: Device, step: Step, training: Training, workload: Workload, name: str) -> int:
    """Sequences of a whole step that fit, within a tenth: by doubling, then by halving what lies between."""
    most = 2 if device.scale > 1 else MOST

    def fits(batch: int) -> bool:
        try:
            begun(device, replace(training, batch=batch), workload, name)()
            device.synchronize()
        except torch.OutOfMemoryError:
            return False
        finally:
            gc.collect()
            device.free_bytes()
        return True

    low = high = training.batch
    while high <= most and step.left > 5.0 and fits(high):
        low, high = high, 2 * high
    while high <= most and high - low > max(1, low // 10) and step.left > 5.0:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def run(step: Step) -> int:
    device, failed = step.device(), 0
    training = TRAINING
    if device.scale > 1:
        training = replace(TRAINING, batch=1, length=4, classes=250, vocabulary=250, hidden=64, layers=1, heads=2)
    for number, (name, workload) in enumerate(WORKLOADS.items()):
        try:
            measure(device, step, training, workload, min(6.0, step.left / (2 * len(WORKLOADS) - number)))
        except Exception as error:  # recorded with the case, which counts as failed; the others go on
            failed += 1
            step.record({"kind": "finetune step", "workload": name, "skipped": {"all": reason(error)}})
    return failed


if __name__ == "__main__":
    main(run)
