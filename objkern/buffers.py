"""The memory of large gradients, which is used again from step to step.

Writing to memory fresh from the system costs several times what the kernel needs, for every page is first cleared and
mapped. So when a gradient of at least 1 MiB on the CPU is freed, its memory is kept for the next one: at most two
buffers, and at most an eighth of the machine's memory unless `set_buffer_limit` says otherwise.
"""

from __future__ import annotations

from .batch import shown
from .native import core


def buffer_limit() -> int:
    """Bytes of freed gradients that may be kept."""
    return core().buffer_limit()


def set_buffer_limit(bytes: int) -> None:
    """Keep at most so many bytes of freed gradients; 0 keeps none and gives back what is kept.

    Raises:
        ValueError: no int of 64 bits, or a negative one.

    >>> before = buffer_limit()
    >>> set_buffer_limit(64 * 2**20)
    >>> buffer_limit()
    67108864
    >>> set_buffer_limit(before)
    """
    if isinstance(bytes, bool) or not isinstance(bytes, int) or not 0 <= bytes < 2**63:
        raise ValueError(f"bytes: expected an int >= 0 of 64 bits but got {shown(bytes)}")
    core().set_buffer_limit(bytes)


def release_buffers() -> None:
    """Give the memory of freed gradients back to the system."""
    core().release_buffers()
