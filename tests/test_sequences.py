"""Random sequences of calls (sequences.py): some hundreds in the ordinary tests, half an hour of them in the long ones.

OBJKERN_MINUTES=5 python -m pytest -m trust tests/test_sequences.py    # other ones each time
OBJKERN_SEED=123 python -m pytest -m trust tests/test_sequences.py     # those of one seed again
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from time import monotonic

import hypothesis
import pytest
from hypothesis.stateful import run_state_machine_as_test

from .sequences import Calls

STEPS = 12
MINUTES = float(os.environ.get("OBJKERN_MINUTES", 30))


def settings(sequences: int, **more: object) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=sequences, stateful_step_count=STEPS, deadline=None, database=None,
        suppress_health_check=list(hypothesis.HealthCheck), **more,
    )  # fmt: skip


def test_sequences() -> None:
    """The same ones in every run."""
    run_state_machine_as_test(Calls, settings=settings(int(os.environ.get("OBJKERN_CASES", 60)), derandomize=True))


@pytest.mark.trust
def test_other_sequences_each_time(record_property: Callable[[str, object], None]) -> None:
    begin, sequences, of = monotonic(), 0, 100
    fixed = os.environ.get("OBJKERN_SEED")
    while sequences == 0 or (fixed is None and monotonic() - begin < 60 * MINUTES):
        seed = random.SystemRandom().getrandbits(32) if fixed is None else int(fixed)
        print(f"OBJKERN_SEED={seed}", flush=True)  # pytest shows it with a failure

        class Seeded(Calls):
            pass

        run_state_machine_as_test(hypothesis.seed(seed)(Seeded), settings=settings(of))
        sequences += of
    record_property("sequences of calls", sequences)
    record_property("steps, at most", sequences * STEPS)
