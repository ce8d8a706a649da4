"""The vocabulary in which terms are written: what is known of a row of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Statistics(NamedTuple):
    """One number per row of logits z with target y and p = softmax(z); natural logarithms. All differentiable.

    A class whose logit is −inf is excluded: n is the number of the others, and it adds to nothing. The fields that
    read the target are None where there is no target, and the divergences where there is no reference. The order is
    that of csrc/objective.h.

    Fields:
        logprob: log p_y
        other_logprob: log(1 − p_y), exact where p_y rounds to 1
        lse: log Σ exp z_j
        entropy: −Σ p_j log p_j
        max_logit: max z_j; its gradient goes to the first maximum
        mean_logit: Σ z_j / n
        mean_square_logit: Σ z_j² / n
        logit_variance: Σ (z_j − mean_logit)² / n
        target_logit: z_y
        mean_logprob: Σ log p_j / n, negative cross-entropy against the uniform distribution
        forward_kl: KL(q ‖ p) = Σ q_j (log q_j − log p_j) at a temperature T, q = softmax(r/T) of a reference r
        reverse_kl: KL(p ‖ q) = Σ p_j (log p_j − log q_j), p = softmax(z/T); over the classes that z does not exclude

    >>> s = row_statistics(torch.tensor([[2.0, 1.0, 0.0]]))
    >>> s.lse, s.max_logit, s.logprob
    (tensor([2.4076]), tensor([2.]), None)
    """

    logprob: Tensor
    other_logprob: Tensor
    lse: Tensor
    entropy: Tensor
    max_logit: Tensor
    mean_logit: Tensor
    mean_square_logit: Tensor
    logit_variance: Tensor
    target_logit: Tensor
    mean_logprob: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor

    def each(self, function: Callable[[Tensor], Tensor]) -> Statistics:
        """With the function applied to every field that is there.

        >>> row_statistics(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])).each(torch.Tensor.item).lse
        2.4076...
        """
        return Statistics(*(None if field is None else function(field) for field in self))
