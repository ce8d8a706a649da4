"""Other libraries' losses, where they are installed: what they are called, and what keeps them from taking part.

    for peer in PEERS: peer.missing()     why it cannot be imported, or None
    logits(), linear()                    the losses of those that can, by name

Each is asked for nothing but plain cross-entropy, the mean over the rows, which is what all of them have in common.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from .accuracy import Loss


@dataclass(frozen=True)
class Peer:
    """A loss of another library.

    Attributes:
        module, function: where it is found; `pip install` takes `package`.
        on: "logits": of logits and labels; "linear": of hidden states, a weight and labels.
        overwrites: its input with the gradient.
    """

    name: str
    package: str
    module: str
    function: str
    on: str
    overwrites: bool = False
    mean: Callable[[Any], Tensor] = lambda found: found  # of what it returns

    def missing(self) -> str | None:
        try:
            getattr(import_module(self.module), self.function)
        except ModuleNotFoundError as error:
            return f"{error.name} is not installed (pip install {self.package})"
        except Exception as error:  # an import may do anything, and what it says belongs to the results
            return f"{type(error).__name__}: {error}"[:300]
        return None

    def loss(self) -> Loss:
        function = getattr(import_module(self.module), self.function)
        return lambda *inputs: self.mean(function(*inputs))


PEERS = [
    Peer("liger", "liger-kernel", "liger_kernel.transformers.functional", "liger_cross_entropy", "logits", True),
    Peer("quack", "quack-kernels", "quack.cross_entropy", "cross_entropy", "logits"),
    Peer("flash-attention", "flash-attn", "flash_attn.ops.triton.cross_entropy", "cross_entropy_loss", "logits",
         mean=lambda found: found[0].mean()),
    Peer("liger", "liger-kernel", "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", "linear"),
    Peer("cut-cross-entropy", "cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy", "linear"),
]  # fmt: skip


NAMES = tuple(dict.fromkeys(peer.name for peer in PEERS))


def on(what: str) -> dict[str, Peer]:
    """Those of logits, or of a linear layer, that can be imported."""
    return {peer.name: peer for peer in PEERS if peer.on == what and peer.missing() is None}


def absent() -> dict[str, str]:
    """By name, why those that cannot be imported can't."""
    return {peer.name: why for peer in PEERS if (why := peer.missing()) is not None}
