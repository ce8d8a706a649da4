"""Fused objective functions: cross-entropy plus any sum of regularizers, in one forward and one backward pass.

objective = CrossEntropy(label_smoothing=0.1) + 1e-4 * ZLoss() - 0.01 * Entropy()
loss = objective(logits, target)
loss.backward()
"""

from .batch import set_validation
from .buffers import buffer_limit, release_buffers, set_buffer_limit
from .functional import cross_entropy, linear_cross_entropy, linear_row_statistics, row_statistics
from .objective import Objective, parse
from .penalties import EWC, L1, L2, L2SP, ElasticNet, diagonal_fisher
from .statistics import Statistics
from .terms import (
    CrossEntropy,
    Entropy,
    Focal,
    GeneralizedCrossEntropy,
    LogitL2,
    Margin,
    MaxZLoss,
    Poly1,
    Unlikelihood,
    ZLoss,
    custom,
)

__version__ = "0.1.0"

__all__ = [
    "EWC",
    "L1",
    "L2",
    "L2SP",
    "CrossEntropy",
    "ElasticNet",
    "Entropy",
    "Focal",
    "GeneralizedCrossEntropy",
    "LogitL2",
    "Margin",
    "MaxZLoss",
    "Objective",
    "Poly1",
    "Statistics",
    "Unlikelihood",
    "ZLoss",
    "buffer_limit",
    "cross_entropy",
    "custom",
    "diagonal_fisher",
    "linear_cross_entropy",
    "linear_row_statistics",
    "parse",
    "release_buffers",
    "row_statistics",
    "set_buffer_limit",
    "set_validation",
]
