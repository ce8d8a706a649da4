"""The long tests, with their figures: python -m tests.trust [pytest options] (make trust).

They are marked `trust`, and say what they found by pytest's `record_property`. Their outcomes and figures go to
tests/results/, from which docs/guarantees.py makes its table.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from benchmarks import machine

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def outcome(case: ET.Element) -> str:
    for kind, word in (("failure", "FAILED"), ("error", "FAILED"), ("skipped", "skipped")):
        found = case.find(kind)
        if found is not None:
            return word if word == "FAILED" else f"skipped: {found.get('message')}"
    return "passed"


def tests(report: Path) -> list[dict[str, Any]]:
    """As pytest's JUnit report has them."""
    return [
        {
            "name": f"{case.get('classname').removeprefix('tests.')}::{case.get('name')}",
            "outcome": outcome(case), "seconds": float(case.get("time")),
            "figures": {p.get("name"): p.get("value") for p in case.iter("property")},
        }
        for case in ET.parse(report).iter("testcase")
    ]  # fmt: skip


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "trust",
            "-o",
            "junit_family=xunit1",
            f"--junitxml={report}",
            *sys.argv[1:],
        ]
        status = subprocess.run(command, cwd=ROOT).returncode
        if not report.exists():
            return status
        found = tests(report)
    now = datetime.datetime.now(datetime.timezone.utc)
    result = {"datetime": now.isoformat(timespec="seconds"), "commit": machine.commit(), "machine": machine.describe()}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"trust-{now:%Y-%m-%d-%H%M%S}.json"
    path.write_text(json.dumps(result | {"tests": found}, indent=1) + "\n", encoding="utf-8")
    width = max((len(test["name"]) for test in found), default=0)
    for test in found:
        figures = "; ".join(f"{key} {value}" for key, value in test["figures"].items())
        print(f"{test['name']:{width}}  {test['outcome']}  {test['seconds']:7.1f} s  {figures}")
    print(f"results: {path.relative_to(ROOT)}; make docs brings docs/guarantees.md up to date")
    return status


if __name__ == "__main__":
    sys.exit(main())
