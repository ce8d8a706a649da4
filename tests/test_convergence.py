"""Training by fused objectives is training by the formulas as people write them: curves and final weights are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

import objkern  # noqa: E402
from objkern.transformers import attach  # noqa: E402

from .conftest import native_objective  # noqa: E402

STEPS, BATCH, LENGTH, BYTES, MASK = 300, 8, 64, 256, 257
OBJECTIVES: dict[str, dict[str, float]] = {  # coefficients by term, for both ways
    "plain": {"CrossEntropy()": 1.0},
    "regularized": {"CrossEntropy(label_smoothing=0.1)": 1.0, "ZLoss()": 1e-4, "Entropy()": -0.01, "LogitL2()": 1e-3},
    "focal and poly": {"Focal(gamma=2.0)": 1.0, "Poly1(epsilon=1.0)": 0.5, "MaxZLoss()": 1e-4},
    "robust": {"GeneralizedCrossEntropy(q=0.7)": 1.0, "Margin(m=0.35)": 0.1, "Unlikelihood()": -0.01},
}


def text() -> Tensor:
    """The bytes of Python's language reference, as `help()` shows it."""
    from pydoc_data.topics import topics

    return torch.tensor(list("\n".join(topics.values()).encode()), dtype=torch.uint8)


def gpt() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=BYTES, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=BYTES + 2, max_position_embeddings=LENGTH, hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))  # fmt: skip


def batches(masked: bool) -> list[tuple[Tensor, Tensor]]:
    """Inputs and labels; of masked ones three in twenty are to be told."""
    whole, draw, found = text(), torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        places = torch.randint(len(whole) - LENGTH, (BATCH,), generator=draw)
        ids = torch.stack([whole[place : place + LENGTH].long() for place in places])
        hidden = torch.rand(ids.shape, generator=draw) < 0.15
        found.append((ids.masked_fill(hidden, MASK), ids.where(hidden, -100)) if masked else (ids, ids))
    return found


def trained(make: Callable[[], nn.Module], formula: dict[str, float], fused: bool) -> tuple[list[float], Tensor]:
    """The loss of every step, and all weights at the end."""
    torch.manual_seed(0)
    model = make().train()
    masked = isinstance(model, transformers.BertForMaskedLM)
    if fused:
        attach(model, objkern.parse(" + ".join(f"{c}*{term}" for term, c in formula.items())))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for ids, labels in batches(masked):
        if fused:
            options: dict[str, Any] = {} if masked else {"use_cache": False}
            loss = model(input_ids=ids, labels=labels, **options).loss
        else:
            logits = model(input_ids=ids).logits
            z, y = (logits, labels) if masked else (logits[:, :-1], labels[:, 1:])
            counts = y != -100
            loss = native_objective(z[counts], y[counts], formula).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.trust
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("make", [gpt, bert])
def test_fused_and_native_training_agree(
    make: Callable[[], nn.Module], name: str, record_property: Callable[[str, object], None]
) -> None:
    """Rounding differs, and 300 steps of AdamW let it grow."""
    ours, weights = trained(make, OBJECTIVES[name], fused=True)
    theirs, truth = trained(make, OBJECTIVES[name], fused=False)
    apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / abs(theirs[0])
    distance = ((weights - truth).norm() / truth.norm()).item()
    record_property("loss", f"{theirs[0]:.3f} to {theirs[-1]:.3f}")
    record_property("curves apart", f"{apart:.1e}")
    record_property("weights apart", f"{distance:.1e}")
    assert sum(theirs[-20:]) / 20 < 0.8 * theirs[0]
    assert apart < 2e-3
    assert distance < 5e-3
