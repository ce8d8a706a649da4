"""Objectives attached to models that FSDP shards, on two processes under gloo: row 22 of other projects' mistakes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

transformers = pytest.importorskip("transformers")

import objkern  # noqa: E402
from objkern.transformers import attach  # noqa: E402

RANKS, LABELS_OF_A_RANK = 2, 14
OBJECTIVE = objkern.CrossEntropy(label_smoothing=0.1) + 1e-2 * objkern.ZLoss()


def llama(tied: bool, frozen: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, tie_word_embeddings=tied,
    ))  # fmt: skip
    model.lm_head.weight.requires_grad_(not frozen)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(40, (4, 8), generator=torch.Generator().manual_seed(1))


def sharded(rank: int, folder: Path, tied: bool, frozen: bool, alone: bool) -> None:
    """One rank: the gradients of its half of the batch, which FSDP averages, are written; or what went wrong."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    signal.alarm(150)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    model, mesh = llama(tied, frozen), init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if alone:
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    attach(model, OBJECTIVE)
    ids = tokens()[2 * rank : 2 * rank + 2]
    count = torch.tensor(LABELS_OF_A_RANK)
    try:
        model(input_ids=ids, labels=ids, num_items_in_batch=count, use_cache=False).loss.backward()
    except ValueError as error:
        (folder / f"error-{rank}").write_text(str(error))
        os._exit(0)  # the other rank does the same; nothing is left to wait for
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save(found, folder / "gradients")
    dist.destroy_process_group()


def on_two_ranks(*arguments: object) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=sharded, args=(rank, *arguments)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        assert process.exitcode == 0


@pytest.mark.parametrize(("tied", "frozen"), [(False, False), (False, True), (True, False)])
def test_a_sharded_model_has_the_gradients_of_a_whole_one(tied: bool, frozen: bool, tmp_path: Path) -> None:
    """22: the head's weight is read while it is gathered, whether it trains, is frozen, or is the embedding's."""
    on_two_ranks(tmp_path, tied, frozen, False)
    found = torch.load(tmp_path / "gradients", weights_only=True)
    model, ids = llama(tied, frozen), tokens()
    OBJECTIVE(model(input_ids=ids).logits, ids, shift=1, backend="reference").backward()
    truth = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == truth.keys()
    assert ("lm_head.weight" in truth) == (not frozen and not tied)
    for name, gradient in truth.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_head_that_is_sharded_by_itself_is_refused(tmp_path: Path) -> None:
    """22: its weight is gone by the time the loss is computed; never a loss of freed memory."""
    on_two_ranks(tmp_path, False, False, True)
    for rank in range(RANKS):
        assert "shard the head with the whole model" in (tmp_path / f"error-{rank}").read_text()
