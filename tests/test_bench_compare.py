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
    "machine": {"cpu": "a", "threads": 2, "torch": "2.13", "allocator": "system malloc"},
}


def drawn(seed: int, slowed: dict[int, float], count: int = 14, rounds: int = 31, between: float = 0.015) -> Any:
    """Entries whose rounds scatter by 6 %, drift, and lie `between` off from run to run; slowed: by place, a factor."""
    random.seed(seed)
    entries = []
    for place in range(count):
        drift = [0.1 * math.sin(0.3 * k + seed) + random.gauss(0, 0.05) for k in range(rounds)]
        off = random.gauss(0, between)

        def times(seconds: float, drift: list[float] = drift) -> list[float]:
            return [seconds * math.exp(d + random.gauss(0, 0.06) + 0.5 * (random.random() < 0.05)) for d in drift]

        entries.append({
            "kind": "step", "rows": 10 + place, "classes": 9, "dtype": "float32", "workload": "plain",
            "times": {"eager": times(1e-2), "compiled": times(5e-3),
                      "objkern": times(1e-3 * slowed.get(place, 1.0) * math.exp(off))},
        })  # fmt: skip
    return entries


def flagged(a: Any, b: Any) -> set[str]:
    changes = list(compare.changes_of(a, b))
    return {one.where for one in [compare.common(changes), *changes] if compare.slower(one, changes)}


def test_a_slower_kernel_is_found_and_an_equal_one_is_not() -> None:
    """In forty pairs of runs each: nothing where nothing is, three tenths alone, a tenth everywhere."""
    alarms = [flagged(drawn(2 * k, {}), drawn(2 * k + 1, {})) for k in range(40)]
    assert sum(map(bool, alarms)) <= 1
    alone = [flagged(drawn(2 * k, {}), drawn(2 * k + 1, {5: 1.3})) for k in range(40)]
    assert sum("step, 15 × 9 float32 plain: objkern" in found for found in alone) >= 37
    everywhere = [flagged(drawn(2 * k, {}), drawn(2 * k + 1, dict.fromkeys(range(14), 1.1))) for k in range(40)]
    assert sum("all of them" in found for found in everywhere) >= 38


def test_by_hand() -> None:
    def entry(seconds: list[float]) -> dict[str, Any]:
        return {"kind": "step", "rows": 2, "classes": 9, "dtype": "float32", "workload": "plain",
                "times": {"eager": [1.0, 2.0, 1.0], "copy": [4.0, 8.0, 4.0], "objkern": seconds}}  # fmt: skip

    (change,) = compare.changes_of([entry([1.0, 2.0, 1.0])], [entry([1.1, 2.2, 1.1])])
    assert change.where == "step, 2 × 9 float32 plain: objkern"
    assert math.exp(change.log_ratio) == pytest.approx(1.1)
    assert change.error == 0.0  # every round says the same
    assert compare.percent(change.log_ratio) == "+10.0 %"
    assert compare.slower(change, [change] * 3)
    assert not compare.slower(change._replace(error=0.05), [change] * 3)
    assert not compare.slower(change._replace(log_ratio=0.02), [change] * 3)  # nobody's business
    assert list(compare.changes_of([entry([1.0])], [entry([1.0]) | {"rows": 3}])) == []


def written(path: Path, entries: Any, **machine: Any) -> str:
    path.write_text(json.dumps(HEADER | {"machine": HEADER["machine"] | machine, "entries": entries}))
    return str(path)


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a = written(tmp_path / "a.json", drawn(0, {}))
    assert main(["bench", "compare", a, a]) == 0
    assert "nothing by itself became slower" in capsys.readouterr().out
    b = written(tmp_path / "b.json", drawn(1, {3: 1.5}))
    assert main(["bench", "compare", a, b]) == 1
    printed = capsys.readouterr().out
    assert "1 of 14 became slower" in printed
    assert "| step, 13 × 9 float32 plain: objkern |" in printed
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
        ("nothing.json", "no benchmark in common"),
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
