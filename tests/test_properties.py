"""Random calls of random objectives on the CPU kernels.

OBJKERN_CASES=20000 python -m pytest tests/test_properties.py
"""

import hypothesis
import pytest

from .properties import Case, cases, check, settings


@pytest.mark.parametrize("share", range(3))
def test_random_objectives(share: int) -> None:
    """1,500 cases in all; each share draws its own."""

    @settings(500)
    @hypothesis.seed(share)
    @hypothesis.given(cases())
    def run(case: Case) -> None:
        check(case)

    run()
