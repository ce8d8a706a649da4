"""R-Drop: two passes under dropout have to agree; the divergence is symmetric, and its gradient goes to both.

    python examples/r_drop.py

Source: Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks".
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from toy import ToyModel, completions_only, preferences

from objkern import CrossEntropy, KLDivergence

ALPHA = 1.0
LABELS, AGREEMENT = CrossEntropy(), ALPHA / 2 * (KLDivergence("forward") + KLDivergence("reverse"))


def r_drop_loss(first: Tensor, second: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """(CE(p) + CE(q)) / 2 + α (KL(p ‖ q) + KL(q ‖ p)) / 2 from the hidden states (B, T, D) of two passes, one head.

    A reference is a constant, so each side is called with the other as its reference: either value is that of the
    symmetric divergence, and the two gradients together are its gradient.
    """
    loss, agreement = 0.0, 0.0
    for own, other in ((first, second), (second, first)):
        loss = loss + 0.5 * LABELS.linear(own, weight, labels, shift=1)
        agreement = agreement + AGREEMENT.linear(
            own, weight, labels, shift=1, reference=(other.detach(), weight.detach())
        )
    return loss + (agreement - agreement.detach() / 2)


def main(steps: int = 60) -> float:
    torch.manual_seed(0)
    model = ToyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        tokens, _ = preferences(32)
        labels = completions_only(tokens, prompt=1)
        first, second = (F.dropout(model(tokens), 0.2) for _ in range(2))
        loss = r_drop_loss(first, second, model.head.weight, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}  loss {loss.item():.4f}")
    return loss.item()


if __name__ == "__main__":
    main()
