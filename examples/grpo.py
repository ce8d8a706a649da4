"""Group-relative policy optimization with clipping and an entropy bonus.

    python examples/grpo.py

Source: Shao et al. 2024, "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models".
"""

import torch
from torch import Tensor
from toy import IGNORED, VOCABULARY, ToyModel, completions_only, reward

import objkern


def group_advantage(rewards: Tensor) -> Tensor:
    """Rewards (groups, samples) against the others of their group."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def grpo_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, advantage: Tensor, old_logprob: Tensor, clip: float = 0.2,
    entropy_bonus: float = 0.01,
) -> Tensor:  # fmt: skip
    """advantage: (B) of each completion; old_logprob: (B, T), the statistic when they were sampled."""
    s = objkern.linear_row_statistics(hidden, weight, labels, shift=1)
    ratio = torch.exp(s.logprob - old_logprob)
    gain = torch.minimum(ratio * advantage[:, None], ratio.clamp(1 - clip, 1 + clip) * advantage[:, None])
    counts = torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))  # position t predicts label t + 1
    per_token = torch.where(counts, -gain - entropy_bonus * s.entropy, 0.0)
    return (per_token.sum(1) / counts.sum(1)).mean()


def main(steps: int = 30, groups: int = 8, samples: int = 8) -> float:
    torch.manual_seed(0)
    policy = ToyModel()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    for step in range(steps):
        prompts = torch.randint(0, VOCABULARY, (groups, 4)).repeat_interleave(samples, 0)
        tokens = policy.sample(prompts, length=10)
        labels, rewards = completions_only(tokens, prompt=4), reward(tokens, prompt=4)
        advantage = group_advantage(rewards.view(groups, samples)).flatten()
        with torch.no_grad():
            old = objkern.linear_row_statistics(policy(tokens), policy.head.weight, labels, shift=1).logprob
        for _ in range(2):
            loss = grpo_loss(policy(tokens), policy.head.weight, labels, advantage, old)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}  reward {rewards.mean().item():.3f}")
    return rewards.mean().item()


if __name__ == "__main__":
    main()
