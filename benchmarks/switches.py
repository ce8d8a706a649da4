"""What tests of the benchmarks themselves switch on: a kernel that is slower than it is."""

from __future__ import annotations

import os
from time import perf_counter

from .pairing import Step

SLOWED = "OBJKERN_BENCH_SLOWED"  # "0.1": every step of objkern takes a tenth longer


def slowed(timed: dict[str, Step]) -> dict[str, Step]:
    """The steps as they are; with `OBJKERN_BENCH_SLOWED=0.1` objkern's are held up for a tenth of what each took."""
    share = float(os.environ.get(SLOWED, "0"))
    if not share:
        return timed
    return {name: held_up(run, share) if name.startswith("objkern") else run for name, run in timed.items()}


def held_up(run: Step, share: float) -> Step:
    def slow() -> float:
        begin = perf_counter()
        seconds = run()
        end = perf_counter()
        until = end + share * (end - begin)
        while (now := perf_counter()) < until:
            pass
        return seconds * (now - begin) / (end - begin)  # a step may time but a part of what it does

    return slow
