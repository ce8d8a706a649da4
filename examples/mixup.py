"""Mixup: examples and their labels are mixed, so that targets are probabilities.

    python examples/mixup.py

Source: Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization".
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objkern import CrossEntropy, ZLoss

CLASSES, FEATURES = 5, 16
objective = CrossEntropy(label_smoothing=0.05) + 1e-4 * ZLoss()


def mixed(x: Tensor, labels: Tensor, alpha: float = 0.2) -> tuple[Tensor, Tensor]:
    """Pairs of examples in proportions λ : 1 − λ, and the same of their one-hot labels: (N, V) probabilities."""
    share = torch.distributions.Beta(alpha, alpha).sample((len(x), 1))
    other = torch.randperm(len(x))
    q = F.one_hot(labels, CLASSES).to(x)
    return share * x + (1 - share) * x[other], share * q + (1 - share) * q[other]


def main(steps: int = 100) -> float:
    torch.manual_seed(0)
    centres = 2 * torch.randn(CLASSES, FEATURES)
    model = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        labels = torch.randint(0, CLASSES, (64,))
        x = centres[labels] + torch.randn(64, FEATURES)
        inputs, targets = mixed(x, labels)
        loss, parts = objective(model(inputs), targets, return_parts=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracy = (model(x).argmax(-1) == labels).double().mean().item()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}  loss {parts['cross_entropy'].item():.4f}  accuracy {accuracy:.2f}")
    return accuracy


if __name__ == "__main__":
    main()
