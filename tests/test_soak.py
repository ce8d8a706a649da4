"""Long use: memory stays flat, nothing slows down; threads, forks, and the end of the process."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import pytest
import torch
from torch import Tensor, nn

from objkern import CrossEntropy, Entropy, ZLoss

ROOT = Path(__file__).parent.parent
OBJECTIVE = CrossEntropy(label_smoothing=0.1) + 1e-4 * ZLoss() - 0.01 * Entropy()
STEPS = 200_000


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.trust
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_two_hundred_thousand_steps(record_property: Callable[[str, object], None]) -> None:
    """Of a tiny model, with batches of other sizes each time, half of them by the fused linear path."""
    draw = torch.Generator().manual_seed(0)
    body, head = nn.Linear(8, 16), nn.Linear(16, 23)
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.05)
    sizes = torch.randint(1, 40, (997,), generator=draw).tolist()
    inputs = torch.randn(40, 8, generator=draw)
    labels = torch.randint(0, 23, (40,), generator=draw)
    tenth, memory, seconds, first, last = STEPS // 10, [], [], 0.0, 0.0
    for part in range(10):
        begin = perf_counter()
        for step in range(part * tenth, (part + 1) * tenth):
            n = sizes[step % len(sizes)]
            hidden = body(inputs[:n]).relu()
            if step % 2:
                loss = OBJECTIVE.linear(hidden, head.weight, labels[:n], head.bias)
            else:
                loss = OBJECTIVE(head(hidden), labels[:n])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step < 100:
                first += loss.item() / 100
            elif step >= STEPS - 100:
                last += loss.item() / 100
        seconds.append(perf_counter() - begin)
        memory.append(resident_bytes())
    grown = (memory[-1] - memory[1]) / 2**20  # the first tenth brings in what there is to bring in
    slower = statistics.median(seconds[-3:]) / statistics.median(seconds[:3])
    record_property("steps", STEPS)
    record_property("memory grown, MiB", f"{grown:.1f}")
    record_property("last steps' time over the first ones'", f"{slower:.2f}")
    record_property("loss", f"{first:.3f} to {last:.3f}")
    assert grown < 8
    assert slower < 1.25
    assert last < first
    assert all(bool(p.isfinite().all()) for p in [*body.parameters(), *head.parameters()])


@pytest.mark.trust
def test_eight_threads_at_once(record_property: Callable[[str, object], None]) -> None:
    """Each with logits of its own, many times: what each finds is what it finds alone, bit for bit."""

    def of(seed: int) -> list[Tensor]:
        draw = torch.Generator().manual_seed(seed)
        found = []
        for step in range(300):
            n, v = 1 + (seed * 31 + step * 7) % 50, 2 + (seed * 17 + step * 13) % 700
            z = torch.randn(n, v, generator=draw).requires_grad_()
            y = torch.randint(0, v, (n,), generator=draw)
            loss = OBJECTIVE(z, y)
            loss.backward()
            found += [loss.detach(), z.grad]
        return found

    together: dict[int, list[Tensor]] = {}
    threads = [threading.Thread(target=lambda k=k: together.update({k: of(k)})) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(together) == 8
    for seed, found in together.items():
        assert all(torch.equal(a, b) for a, b in zip(found, of(seed), strict=True))
    record_property("calls", 8 * 300)


FORK = """
import os, sys, torch, objkern
def step():
    z = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = (objkern.CrossEntropy() + 1e-4 * objkern.ZLoss())(z, torch.arange(64))
    loss.backward()
    return loss.item(), z.grad.sum().item()
torch.set_num_threads(1 if sys.argv[1] == "used" else 2)  # OpenMP's threads do not outlive a fork
before = step() if sys.argv[1] == "used" else None
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        found = step()
        os._exit(0 if before in (None, found) else 1)
    children.append(child)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
print(step())
"""


@pytest.mark.parametrize("when", ["imported", "used"])
def test_forks(when: str) -> None:
    """As data loaders make them: behind the import, and where kernels have run already."""
    done = subprocess.run(
        [sys.executable, "-c", FORK, when], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


EXIT = """
import threading, torch, objkern
z = torch.randn(512, 1000, requires_grad=True)
y = torch.arange(512)
def work():
    while True:
        objkern.CrossEntropy()(z, y).backward()
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
loss = objkern.CrossEntropy()(z, y)
"""


def test_the_end_of_a_process_does_not_hang() -> None:
    """While threads are in the middle of calls, and with a graph that nobody went through. Python ends such threads in
    C++ frames that let nothing pass, which aborts: F.cross_entropy in the same place does so too."""
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", EXIT], cwd=ROOT, capture_output=True, text=True, timeout=60,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode in (0, -signal.SIGABRT), done.stderr[-2000:]
