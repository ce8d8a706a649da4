"""Objectives attached to models on several ranks, processes under gloo: sharded by FSDP, in DDP, and in Trainer.

Row 22 of other projects' mistakes, and 24: whatever the ranks, batches and accumulation, the gradient is that of one big
batch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("ranks need torch.distributed with gloo", allow_module_level=True)

import objkern  # noqa: E402
from objkern.transformers import attach, compute_loss_func  # noqa: E402

from .ranks import Ranks  # noqa: E402

OBJECTIVE = objkern.CrossEntropy(label_smoothing=0.1) + 1e-2 * objkern.ZLoss()
ROWS, TOKENS, CLASSES = 8, 8, 40
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Ranks]]:
    with Ranks(2) as two, Ranks(4) as four:
        yield {2: two, 4: four}


def llama(tied: bool = False, frozen: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=CLASSES, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, tie_word_embeddings=tied,
    ))  # fmt: skip
    model.lm_head.weight.requires_grad_(not frozen)
    return model


def tokens() -> Tensor:
    return torch.randint(CLASSES, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))


def labels(ignored: int) -> Tensor:
    """Another number of them in every row; the last rows have none."""
    found = tokens().where(torch.arange(TOKENS) >= torch.arange(ROWS)[:, None] % 5, -100)
    found[ROWS - ignored :] = -100
    return found


def whole_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """The gradients, on every rank; the names are those of the model that something has wrapped."""
    return {
        name.removeprefix("module."): p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def shard(model: nn.Module, alone: bool = False) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if alone:
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# ---- FSDP -----------------------------------------------------------------------------------------------------------


def step(tied: bool, frozen: bool, ignored: int, alone: bool = False) -> dict[str, Tensor] | str:
    """The gradients of a rank's share of the rows, which FSDP averages; or what went wrong."""
    model, y = attach(shard(llama(tied, frozen), alone), OBJECTIVE), labels(ignored)
    share = ROWS // dist.get_world_size()
    own = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    count = (y[:, 1:] != -100).sum() / dist.get_world_size()  # as averaging divides by the ranks
    try:
        model(input_ids=tokens()[own], labels=y[own], num_items_in_batch=count, use_cache=False).loss.backward()
    except ValueError as error:
        return str(error)
    return gathered(model)


@pytest.mark.parametrize("ignored", [0, ROWS // 2])
@pytest.mark.parametrize(("tied", "frozen"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_sharded_model_has_the_gradients_of_a_whole_one(
    ranks: int, tied: bool, frozen: bool, ignored: int, pools: dict[int, Ranks]
) -> None:
    """22: the head's weight is read while it is gathered, whether it trains, is frozen, or is the embedding's; and
    nobody waits for a rank that has no label."""
    model = llama(tied, frozen)
    logits = model(input_ids=tokens()).logits
    truth = whole_gradients(model, OBJECTIVE(logits, labels(ignored), shift=1, backend="reference"))
    assert ("lm_head.weight" in truth) == (not frozen and not tied)
    for found in pools[ranks](step, tied, frozen, ignored):
        assert found.keys() == truth.keys()
        for name, gradient in truth.items():
            torch.testing.assert_close(found[name], gradient, **CLOSE)


def test_a_head_that_is_sharded_by_itself_is_refused(pools: dict[int, Ranks]) -> None:
    """22: its weight is gone by the time the loss is computed; never a loss of freed memory."""
    for found in pools[2](step, False, False, 0, True):
        assert "shard the head with the whole model" in found


def penalized() -> tuple[str, dict[str, Tensor], float]:
    """In the loss of a sharded model a term on parameters is refused; behind the backward pass it is right."""
    model = shard(llama())
    penalty = 0.1 * objkern.L2(model) + 0.2 * objkern.L1(model, include_all=True)
    attach(model, OBJECTIVE + penalty)
    inputs = {"input_ids": tokens(), "labels": labels(0), "use_cache": False}
    try:
        model(**inputs)
        said = ""
    except NotImplementedError as error:
        said = str(error)
    attach(model, OBJECTIVE)
    model(**inputs).loss.backward()
    penalty.accumulate_()
    return said, gathered(model), penalty().item()


@pytest.mark.parametrize("ranks", [2, 4])
def test_terms_on_weights_that_are_in_parts(ranks: int, pools: dict[int, Ranks]) -> None:
    model = llama()
    penalty = 0.1 * objkern.L2(model) + 0.2 * objkern.L1(model, include_all=True)
    value = penalty()
    loss = OBJECTIVE(model(input_ids=tokens()).logits, labels(0), shift=1, backend="reference") + value
    truth = whole_gradients(model, loss)
    for said, found, number in pools[ranks](penalized):
        assert "(c * term).accumulate_() behind the backward pass" in said
        assert number == pytest.approx(value.item(), rel=1e-6)
        for name, gradient in truth.items():
            torch.testing.assert_close(found[name], gradient, **CLOSE)


def refused() -> str:
    """Of a sample nobody has the gradient by weights that are in parts."""
    model = shard(llama())
    try:
        objkern.diagonal_fisher(model, [tokens()], lambda model, x: model(input_ids=x).logits.sum((1, 2)))
    except NotImplementedError as error:
        return str(error)
    return ""


def of_other_placements() -> list[float]:
    """By how much `accumulate_` misses where a gradient is spread otherwise than its parameter, and where the parameter
    itself is spread anew since the term was made."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), []
    whole = torch.arange(12.0).view(4, 3)
    for placement, of_gradient in ((Replicate(), Partial()), (Shard(0), Replicate()), (Replicate(), Shard(1))):
        p = nn.Parameter(distribute_tensor(whole, mesh, [placement]))
        g = distribute_tensor(torch.ones(4, 3), mesh, [of_gradient if of_gradient != Partial() else Replicate()])
        if of_gradient == Partial():
            g = DTensor.from_local(torch.ones(4, 3) / dist.get_world_size(), mesh, [of_gradient])
        p.grad = g
        objkern.L2([p]).accumulate_()
        found.append((p.grad.full_tensor() - (1.0 + whole)).abs().max().item())
    p = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    term = objkern.L2SP([p])
    with torch.no_grad():
        p += 1.0
    p.data = p.data.redistribute(mesh, [Shard(1)])
    found.append(abs(term().item() - 6.0))
    return found


def test_weights_in_parts_in_other_places(pools: dict[int, Ranks]) -> None:
    for ranks in (2, 4):
        assert all("before it is sharded" in said for said in pools[ranks](refused))
        for found in pools[ranks](of_other_placements):
            assert found == pytest.approx([0.0] * 4, abs=1e-6)


def split_by_torch(style: str, first: bool) -> dict[str, Tensor]:
    """A head that torch's own tensor parallelism splits, attached before or behind that."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model, mesh = llama(), init_device_mesh("cpu", (dist.get_world_size(),))
    if first:
        attach(model, OBJECTIVE)
    layouts = {"replicated": Replicate(), "local": None}[style]
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=layouts)})
    if not first:
        attach(model, OBJECTIVE)
    model(input_ids=tokens(), labels=labels(2), use_cache=False).loss.backward()
    with torch.no_grad():
        evaluated = model.eval()(input_ids=tokens(), labels=labels(2), use_cache=False).loss
    return gathered(model) | {"loss": evaluated}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("style", ["replicated", "local"])
def test_a_head_that_torch_splits(style: str, first: bool, pools: dict[int, Ranks]) -> None:
    model = llama()
    loss = OBJECTIVE(model(input_ids=tokens()).logits, labels(2), shift=1, backend="reference")
    truth = whole_gradients(model, loss) | {"loss": loss.detach()}
    for found in pools[2](split_by_torch, style, first):
        assert found.keys() == truth.keys()
        for name, gradient in truth.items():
            torch.testing.assert_close(found[name], gradient, **CLOSE)


# ---- Trainer --------------------------------------------------------------------------------------------------------


def bert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForTokenClassification(transformers.BertConfig(
        vocab_size=CLASSES, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))  # fmt: skip


MODELS = {"attached": llama, "compute_loss_func": bert}


def of_model(how: str, ignored: int) -> Tensor:
    return labels(ignored) if how == "attached" else labels(ignored).where(labels(ignored) < 0, labels(ignored) % 5)


def in_trainer(how: str, size: int, accumulation: int, ignored: int, sharded: bool) -> dict[str, Tensor]:
    """The gradients of Trainer's first step: in DDP, or of a model that is sharded by FSDP."""
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank()), "MASTER_ADDR": "localhost",
                   "WORLD_SIZE": str(dist.get_world_size()), "MASTER_PORT": "29500"}  # fmt: skip
    found: dict[str, Tensor] = {}

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            found.update(gathered(model))

    model, y = MODELS[how](), of_model(how, ignored)
    if sharded:
        shard(model)
    if how == "attached":
        attach(model, OBJECTIVE)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=1, optim="sgd", learning_rate=1e-3, max_grad_norm=0.0, report_to=[],
            save_strategy="no", disable_tqdm=True, logging_strategy="no", use_cpu=True,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, callbacks=[Keep()],
            train_dataset=[{"input_ids": x, "labels": row} for x, row in zip(tokens(), y, strict=True)],
            compute_loss_func=None if how == "attached" else compute_loss_func(OBJECTIVE),
        )  # fmt: skip
        if sharded:  # which accelerate does by itself only on GPUs
            trainer.accelerator.prepare_model = lambda model, **_: model
        trainer.train()
    return found


GRID = {2: [(4, 1), (2, 2), (1, 4)], 4: [(2, 1), (1, 2)]}  # (batch size, accumulation), for all 8 rows in one step


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ignored", [0, 3])
@pytest.mark.parametrize(("ranks", "size", "accumulation"), [(n, *cut) for n, cuts in GRID.items() for cut in cuts])
@pytest.mark.parametrize(("how", "sharded"), [("attached", False), ("compute_loss_func", False), ("attached", True)])
def test_trainer_on_several_ranks(
    how: str, sharded: bool, ranks: int, size: int, accumulation: int, ignored: int, pools: dict[int, Ranks]
) -> None:
    """24: masks of other sizes, batches and ranks without a label."""
    model, y = MODELS[how](), of_model(how, ignored)
    logits = model(input_ids=tokens()).logits
    truth = whole_gradients(model, OBJECTIVE(logits, y, shift=int(how == "attached"), backend="reference"))
    for found in pools[ranks](in_trainer, how, size, accumulation, ignored, sharded):
        assert found.keys() == truth.keys()
        for name, gradient in truth.items():
            torch.testing.assert_close(found[name], gradient, **CLOSE)
