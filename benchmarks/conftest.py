"""Options and fixtures, the results file, and the tables at the end of a run."""

from __future__ import annotations

import datetime
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import machine, results, tables
from .child import Child
from .figures import Entry, disturbed, missed

ENTRIES = pytest.StashKey[list[Entry]]()
HEADER = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, help="paired rounds of every benchmark (default: by shape)")
    parser.addoption("--no-compile", action="store_true", help="leave torch.compile out (it needs a C++ compiler)")
    parser.addoption(
        "--record", nargs="?", const="", metavar="FILE",
        help="write the results to FILE; without FILE to benchmarks/results, named by machine and date",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    # Of one's own: the shared one in the temporary folder may be cleared by another process while this one compiles.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parent.parent / "build" / "inductor"))
    config.option.benchmark_quiet = True  # times of one contestant; the tables below have them all, paired
    config.option.showcapture = "no"  # a missed target needs no log of what torch.compile did
    # A benchmark that was skipped, or failed before its timing, says so itself.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[ENTRIES] = []
    session.config.stash[HEADER] = {
        "schema": results.SCHEMA,
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "pytest", *session.config.invocation_params.args]),
        "commit": machine.commit(),
        "machine": machine.describe() | {"load_before": os.getloadavg()[0]},  # before the benchmarks are the load
    }


@pytest.fixture
def record(pytestconfig: pytest.Config) -> Callable[[Entry], None]:
    """Takes a benchmark's results; the benchmark fails if they miss a target, and the run goes on."""

    def take(entry: Entry) -> None:
        pytestconfig.stash[ENTRIES].append(results.rounded(entry))
        if found := missed(entry):
            pytest.fail("; ".join(found), pytrace=False)

    return take


@pytest.fixture(scope="session")
def children() -> Iterator[dict[str, Child]]:
    """A process for every instruction set that can run here."""
    started = {name: Child(name) for name in ("default", "avx2", "avx512")}
    yield {name: child for name, child in started.items() if child.capability == name}
    for child in started.values():
        child.__exit__(None, None, None)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    entries, header = config.stash[ENTRIES], config.stash[HEADER]
    write = terminalreporter.write_line
    if warning := machine.load_warning(header["machine"]["load_before"]):
        write(f"WARNING: {warning}", yellow=True)
    for line in disturbed(entries):
        write(f"WARNING: {line}", yellow=True)
    if not entries:
        return
    record = config.getoption("--record")
    if record is not None:  # before anything is made of them
        path = Path(record) if record else results.path(header)
        results.write(path, header | {"entries": entries})
        write(f"written to {path}; `make docs` brings docs/performance.md up to date")
    for title, table in tables.every(entries):
        write(f"\n{title}\n", bold=True)
        write(table)
    misses = [line for entry in entries for line in missed(entry)]
    terminalreporter.section(f"{len(misses)} missed targets" if misses else "every target met")
    for line in misses:
        write(line, red=True)
