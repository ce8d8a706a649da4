"""The vocabulary in which terms are written: what is known of a row of logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Statistics(NamedTuple):
    """One number per row of logits z with target y and p = softmax(z); natural logarithms. All differentiable.

    A class whose logit is −inf is excluded: n is the number of the others, and it adds to nothing. The fields that
    read the target are None where there is no target. The order is that of csrc/objective.h.
    """

    logprob: Tensor  # log p_y
    other_logprob: Tensor  # log(1 − p_y), exact where p_y rounds to 1
    lse: Tensor  # log Σ exp z_j
    entropy: Tensor  # −Σ p_j log p_j
    max_logit: Tensor  # max z_j; its gradient goes to the first maximum
    mean_logit: Tensor  # Σ z_j / n
    mean_square_logit: Tensor  # Σ z_j² / n
    logit_variance: Tensor  # Σ (z_j − mean_logit)² / n
    target_logit: Tensor  # z_y
    mean_logprob: Tensor  # Σ log p_j / n, negative cross-entropy against the uniform distribution
