"""The token loss of proximal policy optimization as a term of an objective, beside built-in ones.

    python examples/ppo.py

Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms".
"""

import torch
from torch import Tensor
from toy import VOCABULARY, ToyModel, completions_only, reward

import objkern
from objkern import Entropy, Statistics, ZLoss, custom


def clipped_surrogate(s: Statistics, advantage: Tensor, old_logprob: Tensor) -> Tensor:
    ratio = torch.exp(s.logprob - old_logprob)
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


objective = custom(clipped_surrogate, needs=("logprob",)) - 0.01 * Entropy() + 1e-4 * ZLoss()


def main(steps: int = 30, batch: int = 64) -> float:
    torch.manual_seed(0)
    policy = ToyModel()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    for step in range(steps):
        tokens = policy.sample(torch.randint(0, VOCABULARY, (batch, 4)), length=10)
        labels, rewards = completions_only(tokens, prompt=4), reward(tokens, prompt=4)
        with torch.no_grad():
            old = objkern.linear_row_statistics(policy(tokens), policy.head.weight, labels, shift=1).logprob
        advantage = ((rewards - rewards.mean()) / (rewards.std() + 1e-4))[:, None].expand_as(old)
        for _ in range(2):
            loss, parts = objective.linear(
                policy(tokens), policy.head.weight, labels, shift=1, return_parts=True,
                rows={"advantage": advantage, "old_logprob": old},
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}  reward {rewards.mean().item():.3f}  entropy {parts['entropy'].item():.3f}")
    return rewards.mean().item()


if __name__ == "__main__":
    main()
