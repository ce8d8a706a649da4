"""Fused objective functions: cross-entropy plus any sum of regularizers, in one forward and one backward pass.

    objective = CrossEntropy(label_smoothing=0.1) + 1e-4 * ZLoss() - 0.01 * Entropy()
    loss = objective(logits, target)
    loss.backward()

Examples in docstrings take for granted:

    import torch
    import torch.nn.functional as F
    from torch import nn
    from objkern import *
"""

from . import terms
from .batch import set_validation
from .buffers import buffer_limit, release_buffers, set_buffer_limit
from .elementwise import BernoulliEntropy, BinaryCrossEntropy, Huber, MeanAbsoluteError, MeanSquaredError
from .functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    linear_cross_entropy,
    linear_row_statistics,
    mse_loss,
    row_statistics,
)
from .objective import Objective
from .parser import parse
from .penalties import EWC, L1, L2, L2SP, ElasticNet, diagonal_fisher
from .statistics import Statistics
from .terms import *  # noqa: F403  whose __all__ is the one list of them

__version__ = "0.1.0"

__all__ = [
    "EWC",
    "L1",
    "L2",
    "L2SP",
    "BernoulliEntropy",
    "BinaryCrossEntropy",
    "ElasticNet",
    "Huber",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "Objective",
    "Statistics",
    "binary_cross_entropy_with_logits",
    "buffer_limit",
    "cross_entropy",
    "diagonal_fisher",
    "linear_cross_entropy",
    "linear_row_statistics",
    "mse_loss",
    "parse",
    "release_buffers",
    "row_statistics",
    "set_buffer_limit",
    "set_validation",
]
__all__ += terms.__all__
