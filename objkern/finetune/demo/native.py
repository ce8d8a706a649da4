"""The demo's objective twice: fused, and the same formula as people write it in plain torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

LABEL_SMOOTHING, Z_LOSS, ENTROPY = 0.1, 1e-4, 0.01


def fused_objective() -> torch.nn.Module:
    """Cross-entropy with label smoothing, z-loss and a confidence penalty, in two passes over the logits."""
    from objkern import CrossEntropy, Entropy, ZLoss

    return CrossEntropy(label_smoothing=LABEL_SMOOTHING) + Z_LOSS * ZLoss() - ENTROPY * Entropy()


def native_objective(
    logits: torch.Tensor, target: torch.Tensor, *, normalizer: torch.Tensor | float | None = None,
    return_parts: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """The same sum: logits (..., V), target (...) with -100 on rows that don't count. Every step is its own pass."""
    logits, target = logits.flatten(0, -2), target.flatten()  # (N, V), (N,)
    counts = target != -100
    rows = counts.sum() if normalizer is None else normalizer
    cross_entropy = F.cross_entropy(logits, target, label_smoothing=LABEL_SMOOTHING, reduction="sum") / rows
    z_loss = torch.where(counts, logits.logsumexp(-1).square(), 0).sum() / rows
    logprob = logits.log_softmax(-1)
    entropy = torch.where(counts, -(logprob.exp() * logprob).sum(-1), 0).sum() / rows
    total = cross_entropy + Z_LOSS * z_loss - ENTROPY * entropy
    if not return_parts:
        return total
    parts = {"cross_entropy": cross_entropy, "z_loss": z_loss, "entropy": entropy, "total": total}
    return total, {name: value.detach() for name, value in parts.items()}


class Native(torch.nn.Module):
    """`native_objective` where a loop expects an objective."""

    weighted_terms = ()

    def forward(self, logits: torch.Tensor, target: torch.Tensor, **options: Any) -> Any:
        return native_objective(logits, target, **options)

    def __repr__(self) -> str:
        return "plain torch"
