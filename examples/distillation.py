"""Knowledge distillation: a student learns the labels and the whole distribution of a teacher; no logits exist.

    python examples/distillation.py

Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".
"""

import torch
from torch import Tensor, nn
from toy import VOCABULARY, ToyModel, completions_only, preferences

from objkern import CrossEntropy, KLDivergence

objective = 0.3 * CrossEntropy() + 0.7 * KLDivergence("forward", temperature=2.0)


def distillation_loss(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor):
    """From the last hidden states (B, T, D) and the heads (V, D) of both, whose widths D may differ."""
    reference = (teacher_hidden.detach(), teacher_weight.detach())
    return objective.linear(hidden, weight, labels, reference=reference, shift=1, return_parts=True)


class Student(nn.Module):
    """A head over embeddings alone, half as wide."""

    def __init__(self, features: int = 16) -> None:
        super().__init__()
        self.body = nn.Embedding(VOCABULARY, features)
        self.head = nn.Linear(features, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(tokens)


def train(model: nn.Module, steps: int, teacher: ToyModel | None = None) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        tokens, _ = preferences(32)
        labels = completions_only(tokens, prompt=1)
        if teacher is None:
            loss = CrossEntropy().linear(model(tokens), model.head.weight, labels, shift=1)
        else:
            loss, parts = distillation_loss(
                model(tokens), model.head.weight, teacher(tokens), teacher.head.weight, labels
            )
            if step % 40 == 0 or step == steps - 1:
                print(f"step {step}  " + "  ".join(f"{name} {parts[name]:.4f}" for name in ("total", "kl_divergence")))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main(steps: int = 120) -> float:
    torch.manual_seed(0)
    teacher = ToyModel()
    train(teacher, 60)
    return train(Student(), steps, teacher.requires_grad_(False))


if __name__ == "__main__":
    main()
