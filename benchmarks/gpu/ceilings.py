"""What the device can do: bytes per second of a copy, and bf16 matrix products. The measure of everything else."""

from __future__ import annotations

from functools import partial

import torch

from ..pairing import summary
from .device import Device
from .step import Step, main


def copies(device: Device, step: Step) -> None:
    """From device memory to device memory; bytes read and bytes written are both counted."""
    for megabytes in (256, 1024, 4096):
        size = (megabytes << 20) // (device.scale if step.stand_in else 1)
        if device.free_bytes() < 2.5 * size:
            continue
        source = torch.ones(size, dtype=torch.uint8, device=device.name)
        destination = torch.zeros_like(source)
        run = partial(destination.copy_, source)
        seconds = summary([device.seconds(run) for _ in range(10 if step.quick else 40)][3:])
        step.record({"kind": "copy", "bytes": 2 * size, "seconds": seconds, "gb_per_second": 2e-9 * size / seconds[1]})


def products(device: Device, step: Step) -> None:
    size = 128 if step.stand_in else 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device.name) for _ in range(2))
    out = torch.empty_like(a)
    run = partial(torch.mm, a, b, out=out)
    seconds = summary([device.seconds(run) for _ in range(10 if step.quick else 30)][3:])
    step.record({"kind": "gemm", "size": size, "seconds": seconds, "tflops": 2e-12 * size**3 / seconds[1]})


def run(step: Step) -> None:
    device = step.device()
    copies(device, step)
    products(device, step)


if __name__ == "__main__":
    main(run)
