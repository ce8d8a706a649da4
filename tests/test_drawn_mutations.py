"""Faults drawn from a seed, in C++, CUDA, Triton and Python: at least 97 of 100 must be caught. See tests/mutants.py."""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from . import mutants, mutator

COUNT = int(os.environ.get("OBJKERN_FAULTS", "40"))
SEED = int(os.environ.get("OBJKERN_SEED", "0"))

CPP = """\
#define SIZE 3
#ifdef SIZE
#ifndef OTHER
  n = 8 * k;
#endif
#elif defined(OTHER)
  n = 9;
#else
  n = 6;
#endif
// a comment: 1 + 2
template <class T, int N = 4>
T f(const T* x, int64_t n, T (&y)[N + 2]) {
  if (n > 0 && x[n] != 0.5f) {
    sum += x[i] * 2;
    return std::min(a + b, c) < d ? a : -b;
  }
  const auto text = "1 + 2";
  float lanes[7], more[n / 5];
  call(n);
}
"""
PYTHON = '''\
"""1 + 2"""
def f(x: Tensor | None = None, n: int = 3) -> int:
    """3 + 4"""
    if not x and n < 2:
        raise ValueError(f"n: {n + 1}")
    y[0] = max(n * 0.5, -x)
    return [a for a in y if a != 1]
'''


def made(source: str, places: object) -> set[str]:
    return {f"{p.kind}: {source[p.begin : p.end]} → {p.wrong}" for p in places}


def test_places_in_cpp() -> None:
    assert made(CPP, mutator.of_cpp(CPP, ["SIZE"])) == {
        "operator: n > 0 → n >= 0", "operator: n > 0 && x[n] != 0.5f → n > 0 || x[n] != 0.5f",
        "operator: x[n] != 0.5f → x[n] == 0.5f", "operator: x[i] * 2 → x[i] / 2", "operator: a + b → a - b",
        "operator: std::min(a + b, c) < d → std::min(a + b, c) <= d",
        "operator: std::min(a + b, c) → std::max(a + b, c)", "condition: std::min(a + b, c) < d → !(std::min(a + b, c) < d)",
        "condition: n > 0 && x[n] != 0.5f → !(n > 0 && x[n] != 0.5f)", "constant: 0 → 1", "constant: 0.5f → 1.0f",
        "constant: 2 → 3", "constant: 4 → 5", "index: n → 0", "index: i → 0", "dropped: sum += x[i] * 2; → ",
        "dropped: call(n); → ", "constant: 8 → 9", "operator: 8 * k → 8 / k", "dropped: n = 8 * k; → ",
    }  # fmt: skip


def test_places_in_python() -> None:
    assert made(PYTHON, mutator.of_python(PYTHON)) == {
        "constant: 3 → 4", "operator: not x and n < 2 → ((not x) or (n < 2))", "operator: n < 2 → n <= 2",
        "condition: not x → bool(x)", "condition: not x and n < 2 → (not (not x and n < 2))", "constant: 2 → 3",
        'dropped: raise ValueError(f"n: {n + 1}") → pass', "dropped: y[0] = max(n * 0.5, -x) → pass", "index: 0 → 1",
        "operator: max → min", "operator: n * 0.5 → ((n) / (0.5))", "constant: 0.5 → 1.0", "operator: -x → (+(x))",
        "operator: a != 1 → a == 1", "condition: a != 1 → (not (a != 1))", "constant: 1 → 2",
    }  # fmt: skip


def test_a_seed_draws_the_same_faults_of_every_kind() -> None:
    for name in mutants.ROOMS:
        faults = list(itertools.islice(mutants.draw(name, 3, 1), 50))
        assert faults == list(itertools.islice(mutants.draw(name, 3, 1), 50))
        assert faults != list(itertools.islice(mutants.draw(name, 4, 1), 50))
        kinds = Counter(fault.place.kind for fault in faults)
        assert len(faults) == 50
        assert min(kinds[kind] for kind in ("operator", "constant", "condition", "dropped")) >= 5


@pytest.mark.parametrize("known", mutants.NEUTRAL, ids=lambda known: f"{known.file}: {known.line}")
def test_what_changes_nothing_is_still_there(known: mutants.Neutral) -> None:
    rooms = [name for name, room in mutants.ROOMS.items() if any(Path(known.file).match(p) for p in room.files)]
    assert any(mutants.is_neutral(known, room, *place) for room in rooms for place in mutants.every_place(room))
    assert known.reason


@pytest.mark.trust
@pytest.mark.skipif(sys.platform != "linux", reason="C++ is built as Linux has it")
def test_drawn_faults_are_caught(record_property: Callable[[str, object], None]) -> None:
    kept = os.environ.get("OBJKERN_FAULTS_FILE")  # what `python -m tests.mutants --out` began
    found = mutants.examine(mutants.shares(COUNT, tuple(mutants.ROOMS)), SEED, out=Path(kept) if kept else None)
    survived = [each for each in found if each["outcome"] != "caught"]
    record_property("seed", SEED)
    record_property("faults", len(found))
    record_property("caught", len(found) - len(survived))
    record_property(
        "survived", "; ".join(f"{e['file']}:{e['line']} {e['right']!r} → {e['wrong']!r}" for e in survived) or "none"
    )
    assert len(found) == COUNT
    assert len(survived) <= 0.03 * COUNT, survived
