"""How the last layer of a language model and its loss go over several devices: what is sent, held and waited for.

    print(objkern.distributed.plan(8192, 4096, 128256, 8))

Arithmetic, not measurement: docs/scale.md states what it assumes and holds it against what was counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .batch import describe

SUMS, DIVERGENCE = 13, 7  # numbers that a rank tells of a row, and how many more beside a reference
ROW_BYTES = 8 * SUMS


@dataclass(frozen=True)
class Machine:
    """What a rank's device does in a second. The defaults are one H200's, measured; the link is NVLink's data sheet."""

    flops: float = 790e12  # of products of bfloat16 matrices
    memory: float = 4.3e12  # bytes read and written
    link: float = 450e9  # bytes to the other ranks, and as many from them


@dataclass(frozen=True)
class Strategy:
    """One way; everything is of one rank and one step.

    Attributes:
        name: what `plan` calls it.
        sent_forward: bytes of the tensors that it hands to collectives in the forward pass.
        sent_backward: and in the backward pass.
        wire: bytes that leave it, by rings: (R − 1)/R of what is gathered or scattered in all, twice that of a sum.
        memory: bytes of weight, gradients, hidden states and what exists of the logits, at the most.
        seconds: products and passes over memory, and then the wire, nothing overlapping.
    """

    name: str
    sent_forward: float
    sent_backward: float
    wire: float
    memory: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What `plan` found, a table when it is printed; ``plan["data parallel"]`` is the `Strategy` of that name."""

    rows: int
    features: int
    classes: int
    ranks: int
    dtype: torch.dtype
    strategies: tuple[Strategy, ...]

    def __getitem__(self, name: str) -> Strategy:
        return next(one for one in self.strategies if one.name == name)

    def __repr__(self) -> str:
        """A table."""
        header = ["", "sent forward", "sent backward", "on the wire", "memory", "time"]
        lines = [
            [one.name, *(_bytes(x) for x in (one.sent_forward, one.sent_backward, one.wire, one.memory)),
             f"{1e3 * one.seconds:.2f} ms"]
            for one in self.strategies
        ]  # fmt: skip
        widths = [max(len(line[k]) for line in [header, *lines]) for k in range(len(header))]
        title = (
            f"{self.rows} rows x {self.features} features x {self.classes} classes, "
            f"{str(self.dtype).removeprefix('torch.')}, {self.ranks} ranks; of one rank:"
        )
        rows = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in [header, *lines]
        ]
        return "\n".join([title, *rows])


def plan(
    rows: int, features: int, classes: int, ranks: int, dtype: torch.dtype = torch.bfloat16, *, trains: bool = True,
    reference: bool = False, machine: Machine | None = None,
) -> Plan:  # fmt: skip
    """What a step of the last layer and its loss sends, holds and takes, by strategy: `print` it.

    - "data parallel": rows are split, every rank has the whole weight, whose gradients are summed.
    - "sharded weight" (FSDP2): rows are split; the weight is gathered for each pass, its gradient is scattered.
    - "vocab-parallel logits": classes are split, logits are there: `objective(logits, target, process_group=g)`.
    - "vocab-parallel linear": classes are split, logits are not: `objective.linear(..., process_group=g)`.
    - "sequence- and vocab-parallel": hidden states come split by row; gathered, and their gradient scattered.

    Args:
        rows, features, classes: of the whole batch.
        ranks: devices that share it.
        dtype: of hidden states and weight.
        trains: whether the weight does.
        reference: whether there is a reference's logits beside them, for a divergence.

    Raises:
        ValueError: a size that is no positive int.

    >>> from objkern.distributed import plan
    >>> found = plan(8192, 4096, 128256, ranks=8)
    >>> print(found)
    8192 rows x 4096 features x 128256 classes, bfloat16, 8 ranks; of one rank:
                                  sent forward  sent backward  on the wire   memory      time
    data parallel                          0 B        1.05 GB      1.84 GB  3.97 GB   8.84 ms
    sharded weight                      131 MB        1.18 GB      2.76 GB  4.23 GB  10.89 ms
    vocab-parallel logits               852 kB        67.1 MB       123 MB   922 MB   4.60 ms
    vocab-parallel linear               852 kB         134 MB       241 MB   792 MB   6.65 ms
    sequence- and vocab-parallel       9.24 MB        67.1 MB       123 MB   792 MB   6.39 ms
    >>> round(found["vocab-parallel linear"].memory / 1e9, 1)  # GB of each rank
    0.8
    """
    for name, size in (("rows", rows), ("features", features), ("classes", classes), ("ranks", ranks)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected a positive int but got {describe(size)}")
    m, item = machine or Machine(), dtype.itemsize
    own_rows, own_classes = math.ceil(rows / ranks), math.ceil(classes / ranks)
    ring = (ranks - 1) / ranks
    weight, own_weight = item * classes * features, item * own_classes * features
    states, sums = item * rows * features, (ROW_BYTES + 8 * DIVERGENCE * reference) * rows
    of_states = 4 * rows * features  # summed in float32
    several = ranks > 1

    def layer(n: int, v: int, products: int, gathered: float = 0.0) -> tuple[float, float]:
        """Memory and seconds of the fused linear layer; `products`: of n × D × V."""
        chunk = min(n, _CHUNK_ROWS) * v * (4 + item)
        held = item * v * features + (4 if trains else 0) * v * features + n * features * (item + 4) + chunk
        passes = n * v * (3 * (4 + item) + 4)  # logits written, read twice, gradient written and read
        return held + gathered, 2 * products * n * v * features / m.flops + passes / m.memory

    products = 3 if trains else 2
    found = []
    memory, seconds = layer(own_rows, classes, products)
    sent = weight if trains and several else 0
    found.append(_strategy("data parallel", 0, sent, 2 * ring * sent, memory, seconds, m))
    gathers = own_weight if several else 0
    scattered = weight if trains and several else 0
    found.append(_strategy("sharded weight", gathers, gathers + scattered, ring * (2 * weight + scattered) * several,
                           memory + own_weight * (1 + trains), seconds, m))  # fmt: skip
    logits = item * rows * own_classes
    gathered_wire = sums * (ranks - 1)  # what the others send is as much as what it receives
    head = 2 * products * rows * own_classes * features / m.flops
    found.append(_strategy(
        "vocab-parallel logits", sums, states if several else 0, gathered_wire + 2 * ring * states,
        own_weight * (1 + trains) + 2 * states + 2 * logits, head + 4 * logits / m.memory, m,
    ))  # fmt: skip
    memory, seconds = layer(rows, own_classes, products + 1)
    found.append(_strategy("vocab-parallel linear", sums, of_states, gathered_wire + 2 * ring * of_states, memory,
                           seconds, m))  # fmt: skip
    own_states = item * own_rows * features
    found.append(_strategy("sequence- and vocab-parallel", sums + own_states * several, states * several,
                           gathered_wire + 2 * ring * states, memory, seconds, m))  # fmt: skip
    return Plan(rows, features, classes, ranks, dtype, tuple(found))


_CHUNK_ROWS = 2048  # about what objkern.linear.choose_chunk_rows takes on a large device


def _strategy(
    name: str, forward: float, backward: float, wire: float, memory: float, seconds: float, machine: Machine
) -> Strategy:
    return Strategy(name, forward, backward, wire, memory, seconds + wire / machine.link)


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
