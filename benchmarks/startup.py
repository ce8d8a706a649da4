"""What a process pays before it trains: run as `python -m benchmarks.startup WHAT`, it prints seconds as JSON."""

from __future__ import annotations

import json
import sys
from time import perf_counter


def first_calls() -> dict[str, float]:
    """Of a loss with its backward pass, in a process that has torch and objkern: the first, and the second."""
    import torch

    begin = perf_counter()
    import objkern  # noqa: F401

    found = {"import objkern, after torch": perf_counter() - begin}
    from .workloads import REGULARIZED

    z, y = torch.randn(64, 1000, requires_grad=True), torch.randint(1000, (64,))
    torch.nn.functional.mse_loss(z, torch.zeros_like(z)).backward()  # autograd's threads and torch's pool are nobody's
    compiled = torch.compile(REGULARIZED.eager, dynamic=False, fullgraph=True)
    for name, loss in (("objkern", REGULARIZED.objective), ("eager", REGULARIZED.eager), ("compiled", compiled)):
        for which in ("first", "second"):
            begin = perf_counter()
            loss(z, y).backward()
            found[f"{name}, {which} call"] = perf_counter() - begin
    return found


if __name__ == "__main__":
    print(json.dumps({"first-calls": first_calls}[sys.argv[1]]()))
