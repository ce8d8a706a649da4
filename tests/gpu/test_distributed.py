"""A vocabulary that is split: its parts one after the other on one device, and ranks on devices of their own."""

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from objkern import CrossEntropy, Entropy, LogitL2, MaxZLoss, Objective, ZLoss, distributed

from .rows import assert_rounded, rows_on

OBJECTIVE = CrossEntropy(label_smoothing=0.1) + 1e-2 * ZLoss() - 0.1 * Entropy() + 1e-2 * LogitL2() + 1e-3 * MaxZLoss()
SPLIT = (1003, 0, 512, 485)


def slices(split: tuple[int, ...]) -> list[slice]:
    ends = [*itertools.accumulate(split)]
    return [slice(end - size, end) for end, size in zip(ends, split, strict=True)]


def in_parts(run: Callable[[distributed.Shard, slice], list[Tensor]], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each rank finds, its sums gathered without a group: all ranks tell them, and then all go on."""
    told: list[Tensor] = []
    everyone: Tensor | None = None

    def gather(own: Tensor, ranks: int, _: object) -> Tensor:
        if everyone is None:
            told.append(own)
            return own.expand(ranks, *own.shape)
        return everyone

    monkeypatch.setattr(distributed, "_all_gather", gather)
    ranks = [(distributed.Shard(None, rank, SPLIT), own) for rank, own in enumerate(slices(SPLIT))]
    for rank in ranks:
        run(*rank)
    everyone = torch.stack(told)
    return [run(*rank) for rank in ranks]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["logits", "linear"])
def test_parts_make_the_whole(
    kind: str, dtype: torch.dtype, device: torch.device, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """25, and 20: in sync-debug mode a call that waits for the device is an error."""
    classes = sum(SPLIT)
    z, y = rows_on(device, 33, classes, dtype)
    y[5] = -100
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(33, 64, generator=draw).to(device, dtype)
    weight = (torch.randn(classes, 64, generator=draw) * 0.3).to(device, dtype)
    upstream = torch.tensor(1.7, device=device)

    def of(own: slice, wide: Callable[[Tensor], Tensor] = lambda x: x, **options: Any) -> list[Tensor]:
        if kind == "logits":
            leaves = [wide(z[:, own]).detach().requires_grad_()]
            loss = OBJECTIVE(leaves[0], y, **options)
        else:
            leaves = [wide(hidden).detach().requires_grad_(), wide(weight[own]).detach().requires_grad_()]
            loss = OBJECTIVE.linear(leaves[0], leaves[1], y, **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss))]

    class Nothing:  # hidden gradients are added up below
        def __init__(self, _: object) -> None: ...
        def begin(self, _: Tensor) -> None: ...
        def wait(self) -> None: ...

    monkeypatch.setattr(distributed, "_Reduction", Nothing)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        found = in_parts(lambda at, own: of(own, process_group=at, backend=backend, validate=False), monkeypatch)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    truth = of(slice(None), Tensor.double, backend="reference")
    for loss, *_ in found:
        assert_rounded(loss, truth[0], "loss")
    if kind == "logits":
        assert_rounded(torch.cat([g for _, g in found], 1), truth[1], "logits")
    else:
        assert_rounded(sum(g.float() for _, g, _ in found).to(dtype), truth[1], "hidden")
        assert_rounded(torch.cat([g for *_, g in found]), truth[2], "weight")


def of_rank(rank: int, count: int, folder: str, objective: Objective) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/meet", rank=rank, world_size=count,
                            timeout=timedelta(seconds=60))  # fmt: skip
    classes = 1000 + 7 * rank
    draw = torch.Generator().manual_seed(rank)
    weight = (torch.randn(classes, 64, generator=draw) * 0.3).to(device).requires_grad_()
    same = torch.Generator().manual_seed(99)
    hidden = torch.randn(257, 64, generator=same).to(device).requires_grad_()
    y = torch.randint(1000 * count, (257,), generator=same).to(device)
    loss = objective.linear(hidden, weight, y, process_group=dist.group.WORLD)
    loss.backward()
    torch.save([loss.detach().cpu(), hidden.grad.cpu(), weight.detach().cpu(), weight.grad.cpu()], f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.once
@pytest.mark.real_device
def test_ranks_on_devices_of_their_own(device: torch.device) -> None:
    count = min(torch.cuda.device_count(), 4)
    if count < 2:
        pytest.skip("needs two CUDA devices or more")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(of_rank, (count, folder, OBJECTIVE), nprocs=count)
        found = [torch.load(f"{folder}/{rank}", weights_only=True) for rank in range(count)]
    same = torch.Generator().manual_seed(99)
    hidden = torch.randn(257, 64, generator=same).double().requires_grad_()
    y = torch.randint(1000 * count, (257,), generator=same)
    weight = torch.cat([w for _, _, w, _ in found]).double().requires_grad_()
    loss = OBJECTIVE.linear(hidden, weight, y)
    loss.backward()
    for mine, of_hidden, _, _ in found:
        assert torch.equal(mine, found[0][0])
        assert_rounded(mine, loss.detach(), "loss")
        assert_rounded(of_hidden, hidden.grad, "hidden")
    assert_rounded(torch.cat([g for *_, g in found]), weight.grad, "weight")


# ---- fine-tuning ----------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent.parent
WORDS = [f"word{k}" for k in range(30)]


def steps_of(folder: Path, ranks: int, *words: str) -> list[dict[str, float]]:
    """What each step of a run logs."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "objkern", "finetune", "causal-lm", str(folder / "rows.jsonl"),
               "--hidden-size", "64", "--layers", "2", "--heads", "4", "--vocabulary", "500", "--max-length", "32",
               "--epochs", "1", "--batch-size", "4", "--device", "cuda", "--output", *words]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = Path(words[0], "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == "step"]


@pytest.mark.once
@pytest.mark.real_device
@pytest.mark.parametrize("how", ["data", "fsdp", "tensor"])
def test_the_loop_on_devices_of_their_own(how: str, device: torch.device, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices or more")
    pytest.importorskip("transformers")
    draw = torch.Generator().manual_seed(0)
    rows = [{"text": " ".join(WORDS[k] for k in torch.randint(len(WORDS), (20,), generator=draw))} for _ in range(72)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    alone = steps_of(tmp_path, 1, str(tmp_path / "alone"), "--accumulation", "2")
    windows = "2" if how == "tensor" else "1"  # ranks with the same batches, or with others
    found = steps_of(tmp_path, 2, str(tmp_path / how), "--accumulation", windows, "--parallel", how)
    assert len(found) == len(alone) > 5
    for ours, theirs in zip(found, alone, strict=True):
        assert ours["cross_entropy"] == pytest.approx(theirs["cross_entropy"], rel=1e-3)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-2)
