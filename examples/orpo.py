"""Odds-ratio preference optimization: supervised loss and preference in one pass over one model.

    python examples/orpo.py

Source: Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model".
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from toy import IGNORED, ToyModel, completions_only, preferences

import objkern


def log_odds(mean_logprob: Tensor) -> Tensor:
    """log (p / (1 − p)) of p = exp(mean log-probability)."""
    return mean_logprob - torch.log(-torch.expm1(mean_logprob))


def orpo_loss(hidden: Tensor, weight: Tensor, labels: Tensor, strength: float = 0.1) -> Tensor:
    """The first half of the batch are chosen completions, the second half rejected ones of the same prompts."""
    logprob = objkern.linear_row_statistics(hidden, weight, labels, shift=1).logprob
    counts = (labels[:, 1:] != IGNORED).sum(-1)
    chosen, rejected = (logprob.sum(-1) / counts).chunk(2)
    supervised = -logprob.chunk(2)[0].sum() / counts.chunk(2)[0].sum()
    return supervised - strength * F.logsigmoid(log_odds(chosen) - log_odds(rejected)).mean()


def main(steps: int = 60) -> float:
    torch.manual_seed(0)
    model = ToyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        tokens = torch.cat(preferences(32))
        loss = orpo_loss(model(tokens), model.head.weight, completions_only(tokens, prompt=4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}  loss {loss.item():.4f}")
    return loss.item()


if __name__ == "__main__":
    main()
