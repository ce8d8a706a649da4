"""What the terms of an objective read of a row, and how many numbers the row keeps for its gradient.

A term reads what its formula touches: a formula is run once on statistics that take note. `reads_of` and
`row_gradient_fields` in csrc/objective.h say the same, and a test compares them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .statistics import Statistics

_BIT = {name: 1 << place for place, name in enumerate(Statistics._fields)}
DIVERGENCES = _BIT["forward_kl"] | _BIT["reverse_kl"]
_FULL = _BIT["max_logit"] | _BIT["mean_logit"] | _BIT["logit_variance"]
_PLAIN_FIELDS, _ENTROPY_FIELDS, _SQUARE_FIELDS, _FULL_FIELDS, _ALL_FIELDS = 3, 5, 6, 10, 15


class _Noting:
    """Statistics that take note of who is asked for."""

    def __init__(self) -> None:
        self.reads = 0

    def __getattr__(self, name: str) -> Tensor:
        self.reads |= _BIT[name]
        return torch.zeros((), dtype=torch.float64)


@functools.cache
def _reads_of(kind: float, has_parameter: bool) -> int:
    from .objective import Term  # which imports the backends

    if kind not in Term.by_kind:
        raise RuntimeError(f"objkern: term kind {kind:g} is not known")
    noting = _Noting()
    Term.by_kind[int(kind)].formula(noting, 0.5 if has_parameter else 0.0, 1.0)
    return noting.reads


def reads_of(kind: float, parameter: float) -> int:
    """The statistics that a term reads, as bits, in the order of `Statistics`."""
    return _reads_of(kind, parameter != 0)


def row_gradient_fields(terms: list[float], weighted_classes: bool, dense_target: bool) -> int:
    """How many numbers a row keeps for its gradient under the terms (kind, parameter, coefficient)."""
    reads = 0
    for kind, parameter in zip(terms[::3], terms[1::3], strict=True):
        reads |= reads_of(kind, parameter)
    if reads & DIVERGENCES:
        return _ALL_FIELDS
    if reads & _FULL or dense_target or (weighted_classes and reads & _BIT["mean_logprob"]):
        return _FULL_FIELDS
    if reads & _BIT["mean_square_logit"]:
        return _SQUARE_FIELDS
    return _ENTROPY_FIELDS if reads & (_BIT["entropy"] | _BIT["mean_logprob"]) else _PLAIN_FIELDS
