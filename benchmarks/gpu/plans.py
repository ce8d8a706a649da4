"""Every way to launch a kernel, at every size: what the tables of the backends are tuned by.

CUDA: cluster (blocks that share a row), resident (the row stays in shared memory), lanes (that share a short row).
Triton: vectors of a tile, warps, and tiles of a program of the gradient.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from objkern import _C

from ..accuracy import reason
from ..pairing import summary
from ..workloads import PLAIN, WORKLOADS
from .contest import MODES, able, described, inputs, objkern_loss
from .device import Device
from .step import Step, main

WIDE = [(128256, torch.bfloat16), (32000, torch.bfloat16), (256000, torch.bfloat16), (50257, torch.bfloat16),
        (151936, torch.bfloat16), (32000, torch.float32), (4096, torch.bfloat16)]  # fmt: skip
NARROW = [
    (4096, 9, torch.bfloat16),
    (512, 32, torch.bfloat16),
    (65536, 10, torch.bfloat16),
    (8192, 512, torch.bfloat16),
]
CLUSTERS = (1, 2, 4, 8, 16)
LANES = (1, 2, 4, 8, 16, 32)
TILES = [(vectors, warps, 4) for vectors in (256, 512, 1024) for warps in (4, 8, 16)] + [(512, 8, 1), (512, 8, 16)]
ROWS = 8192


@contextmanager
def cuda_plan(cluster: int, resident: bool, lanes: int) -> Iterator[None]:
    _C.force_cuda_plan(cluster, resident, lanes)
    try:
        yield
    finally:
        _C.force_cuda_plan()


@contextmanager
def triton_launch(vectors: int, warps: int, tiles: int) -> Iterator[None]:
    launch = importlib.import_module("objkern.triton.launch")
    kept = launch.WIDE
    launch.WIDE = ((0, launch.WideLaunch(vectors, warps, tiles)),)
    try:
        yield
    finally:
        launch.WIDE = kept


def plans(backend: str, narrow: bool) -> dict[str, Callable[[], Any]]:
    """By name, for those backends that let themselves be told."""
    found: dict[str, Callable[[], Any]] = {}
    if backend == "cuda" and hasattr(_C, "force_cuda_plan"):
        for cluster, resident in itertools.product(() if narrow else CLUSTERS, (True, False)):
            name = f"cluster {cluster}, {'resident' if resident else 'read twice'}"
            found[name] = lambda c=cluster, r=resident: cuda_plan(c, r, 0)
        for lanes in LANES if narrow else ():
            found[f"lanes {lanes}"] = lambda n=lanes: cuda_plan(1, False, n)
    if backend == "triton" and not narrow and triton_can_be_told():
        for sizes in TILES:
            found["{} vectors, {} warps, {} tiles".format(*sizes)] = lambda s=sizes: triton_launch(*s)
    return found


def triton_can_be_told() -> bool:
    try:
        launch = importlib.import_module("objkern.triton.launch")
    except ImportError:
        return False
    return hasattr(launch, "WIDE") and hasattr(launch, "WideLaunch")


def measure(device: Device, step: Step, backend: str, x: Tensor, y: Tensor, until: float) -> None:
    """Each plan's times, and whether it gives the default's gradient; a wrong one may well be quick."""
    narrow = x.shape[1] <= 1024
    for workload in [PLAIN] if step.quick else WORKLOADS.values():
        expected: dict[str, Tensor] = {}
        for name, force in {"default": None, **plans(backend, narrow)}.items():
            if step.left < until:
                return
            entry = described("plan", x, workload) | {"backend": backend, "plan": name, "seconds": {}}
            for mode in MODES:
                loss = objkern_loss(workload, device.backends[backend], mode)
                run = partial(gradient_of, loss, x, y)
                try:
                    if force is None:
                        expected[mode] = run()[:64].float()
                        entry["seconds"][mode] = timed(device, run, narrow)
                        continue
                    with force():
                        off = (run()[:64].float() - expected[mode]).abs().max() / expected[mode].abs().max()
                        entry.setdefault("off", {})[mode] = off.item()
                        entry["seconds"][mode] = timed(device, run, narrow)
                except Exception as error:  # a plan that does not fit is an entry of the result
                    entry.setdefault("skipped", {})[mode] = reason(error)
            step.record(entry)


def gradient_of(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return torch.autograd.grad(loss(x, y), x)[0]


def timed(device: Device, run: Callable[[], Any], narrow: bool) -> list[float]:
    run()
    return summary([device.seconds(run, repeat=20 if narrow else 1, flush=not narrow) for _ in range(7)])


def run(step: Step) -> int:
    device = step.device()
    shapes = [(ROWS // device.scale, *shape) for shape in WIDE]
    shapes += [(rows // min(16, device.scale), classes, dtype) for rows, classes, dtype in NARROW]
    shapes = shapes[:1] if step.quick else shapes
    usable = [name for name in device.backends if able(device)[name] is None]
    for number, (rows, classes, dtype) in enumerate(shapes):
        if device.free_bytes() < 4.0 * rows * classes * dtype.itemsize:
            continue
        x, y = inputs(device, rows, classes, dtype)
        begin = step.left
        share = begin / (len(shapes) - number)  # each shape its part of the time, each backend its part of that
        for turn, backend in enumerate(usable, 1):
            measure(device, step, backend, x, y, until=begin - share * turn / len(usable))
        del x, y
    return 0


if __name__ == "__main__":
    main(run)
