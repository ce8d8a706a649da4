"""`bench compare`: what it finds, and what it does not, in runs that are drawn by chance and in real ones."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, results
from objkern.__main__ import main

HEADER: dict[str, Any] = {
    "schema": results.SCHEMA,
    "machine": {"cpu": "a", "torch": "2.13", "allocator": "system malloc"},
}


def drawn(seed: int, slowed: dict[int, float], count: int = 10, processes: int = 8) -> Any:
    """Floors of kernels in processes that are up to a twelfth slower than they could be.

    Args:
        slowed: by place, a factor.
    """
    random.seed(seed)
    entries = []
    for place in range(count):

        def times(seconds: float) -> list[float]:
            return [seconds * math.exp(0.08 * random.random() ** 2 + abs(random.gauss(0, 0.005)))
                    for _ in range(processes)]  # fmt: skip

        entries.append({
            "kind": "floor", "rows": 10 + place, "classes": 9, "dtype": "float32", "workload": "plain",
            "times": {"yardstick": times(1e-2), "objkern": times(1e-3 * slowed.get(place, 1.0))},
        })  # fmt: skip
    return entries


def flagged(a: Any, b: Any) -> set[str]:
    return {one.where for one in compare.changes_of(a, b) if one.slower}


def test_a_slower_kernel_is_found_and_an_equal_one_is_not() -> None:
    """In a hundred pairs of runs each: nothing where nothing is, and a kernel that takes a tenth longer."""
    alarms = [flagged(drawn(2 * k, {}), drawn(2 * k + 1, {})) for k in range(100)]
    assert sum(map(bool, alarms)) <= 1
    found = [flagged(drawn(2 * k, {}), drawn(2 * k + 1, {5: 1.1})) for k in range(100)]
    assert sum(one == {"15 × 9 float32 plain"} for one in found) >= 95


def test_by_hand() -> None:
    def entry(seconds: list[float]) -> dict[str, Any]:
        return {"kind": "floor", "rows": 2, "classes": 9, "dtype": "float32", "workload": "plain",
                "times": {"yardstick": [4.0, 2.0], "objkern": seconds}}  # fmt: skip

    (change,) = compare.changes_of([entry([2.0, 1.0])], [entry([1.1, 4.4])])
    assert change.where == "2 × 9 float32 plain"
    assert math.exp(change.log_ratio) == pytest.approx(1.1)
    # Of two values the least one drawn is the second in a quarter of the cases: √(3/16) of the distance of their logs.
    deviations = [math.sqrt(3 / 16) * math.log(ratio) for ratio in (2, 2, 2, 4)]
    assert change.error == pytest.approx(math.hypot(*deviations, compare.SCATTER))
    assert compare.percent(change.log_ratio) == "+10.0 %"
    assert not change.slower  # two processes say nothing
    assert change._replace(error=0.035).slower
    assert not change._replace(error=0.04).slower
    assert change._replace(error=0.035, log_ratio=-0.1).quicker
    assert not change._replace(error=0.001, log_ratio=0.04).slower  # nobody's business
    assert compare.changes_of([entry([1.0, 1.0])], [entry([1.0, 1.0]) | {"rows": 3}]) == []
    assert compare.changes_of([entry([1.0, 1.0])], [entry([1.0, 1.0]) | {"kind": "step"}]) == []


def test_the_bootstrap_of_the_least() -> None:
    """Its formula against draws."""
    random.seed(0)
    times = [math.exp(random.gauss(0, 0.1)) for _ in range(7)]
    value, error = compare.least(times)
    assert value == math.log(min(times))
    least = [math.log(min(random.choices(times, k=7))) for _ in range(40000)]
    mean = sum(least) / len(least)
    assert error == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in least) / len(least)), rel=0.02)


def written(path: Path, entries: Any, **machine: Any) -> str:
    path.write_text(json.dumps(HEADER | {"machine": HEADER["machine"] | machine, "entries": entries}))
    return str(path)


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a = written(tmp_path / "a.json", drawn(0, {}))
    assert main(["bench", "compare", a, a]) == 0
    assert "nothing became slower" in capsys.readouterr().out
    b = written(tmp_path / "b.json", drawn(1, {3: 1.5}))
    assert main(["bench", "compare", a, b]) == 1
    printed = capsys.readouterr().out
    assert "1 of 10 became slower" in printed
    assert "| 13 × 9 float32 plain |" in printed
    assert printed.count("SLOWER") == 1
    assert main(["bench", "compare", b, a]) == 0
    assert capsys.readouterr().out.count("quicker") == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("missing.json", "cannot be read: No such file"),
        ("text.json", "no results file, for it is not JSON"),
        ("list.json", "this results file has schema None"),
        ("elsewhere.json", "these runs cannot be compared: cpu: a and b; torch: 2.13 and 2.14"),
        ("nothing.json", "no floors in common"),
    ],
)
def test_what_cannot_be_compared(other: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a = written(tmp_path / "a.json", drawn(0, {}))
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "list.json").write_text("[1]")
    written(tmp_path / "elsewhere.json", drawn(0, {}), cpu="b", torch="2.14")
    written(tmp_path / "nothing.json", [])
    with pytest.raises(SystemExit) as raised:
        main(["bench", "compare", a, str(tmp_path / other)])
    assert message in (capsys.readouterr().err + str(raised.value))
    assert raised.value.code not in (0, 1)
