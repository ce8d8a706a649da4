"""Direct preference optimization from hidden states; neither model's logits exist.

    python examples/dpo.py

Source: Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward Model".
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from toy import ToyModel, completions_only, preferences

import objkern


def sequence_logprob(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """(B) the log-probability of every completion; what is ignored adds 0."""
    return objkern.linear_row_statistics(hidden, weight, labels, shift=1).logprob.sum(-1)


def dpo_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    """From the log-probabilities (B) of the completions under the policy and under the reference."""
    return -F.logsigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected))).mean()


def main(steps: int = 60) -> float:
    torch.manual_seed(0)
    policy = ToyModel()
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for step in range(steps):
        pair = preferences(32)
        labels = [completions_only(tokens, prompt=4) for tokens in pair]
        logprobs = [
            sequence_logprob(model(tokens), model.head.weight, y)
            for model in (policy, reference)
            for tokens, y in zip(pair, labels, strict=True)
        ]
        loss = dpo_loss(*logprobs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        margin = (logprobs[0] - logprobs[2]) - (logprobs[1] - logprobs[3])
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}  loss {loss.item():.4f}  preferred {(margin > 0).double().mean().item():.2f}")
    return loss.item()


if __name__ == "__main__":
    main()
