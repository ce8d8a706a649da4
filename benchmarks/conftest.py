"""Options and fixtures, the results file, and the tables at the end of a run."""

from __future__ import annotations

import datetime
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import machine, peers, results, tables
from .child import Child
from .figures import Entry, disturbed, in_a_line, missed, unsteady

SECONDS = {"quick": 2.0, "full": 10.0}  # for the rounds of a benchmark

ENTRIES = pytest.StashKey[list[Entry]]()
HEADER = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", choices=list(SECONDS), default="full", help="quick: what is marked so")
    parser.addoption("--seconds", type=float, help="for the rounds of a benchmark (default: by size)")
    parser.addoption("--rounds", type=int, help="paired rounds of every benchmark, in the place of seconds")
    parser.addoption("--slack", type=float, default=0.0, help="share by which a target may be missed (%(default)s)")
    parser.addoption("--no-compile", action="store_true", help="leave torch.compile out (it needs a C++ compiler)")
    parser.addoption(
        "--record", nargs="?", const="", metavar="FILE",
        help="write the results to FILE; without FILE to benchmarks/results, named by machine and date",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    # Of one's own: the shared one in the temporary folder may be cleared by another process while this one compiles.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parent.parent / "build" / "inductor"))
    if config.option.seconds is None:
        config.option.seconds = SECONDS[config.option.size]
    config.option.benchmark_quiet = True  # times of one contestant; the tables below have them all, paired
    config.option.showcapture = "no"  # a missed target needs no log of what torch.compile did
    # A benchmark that was skipped, or failed before its timing, says so itself.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.size == "quick":
        left = [item for item in items if item.get_closest_marker("quick") is None]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item.get_closest_marker("quick") is not None]


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[ENTRIES] = []
    session.config.stash[HEADER] = {
        "schema": results.SCHEMA,
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "pytest", *session.config.invocation_params.args]),
        "size": session.config.option.size,
        "commit": machine.commit(),
        "absent": peers.absent(),
        "machine": machine.describe() | {"load_before": os.getloadavg()[0]},  # before the benchmarks are the load
    }


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """torch.compile counts recompilations of a function, and after a few falls back to eager torch without a word."""
    if "torch" in sys.modules:
        sys.modules["torch"]._dynamo.reset()


@pytest.fixture
def record(pytestconfig: pytest.Config) -> Callable[[Entry], None]:
    """Takes a benchmark's results; the benchmark fails if they surely miss a target, and the run goes on."""

    def take(entry: Entry) -> None:
        entry = results.rounded(entry)
        pytestconfig.stash[ENTRIES].append(entry)
        if (reporter := pytestconfig.pluginmanager.get_plugin("terminalreporter")) is not None:
            reporter.write_line(f"\n{in_a_line(entry)}")
        if found := missed(entry, surely=True, slack=pytestconfig.option.slack):
            pytest.fail("; ".join(found), pytrace=False)

    return take


@pytest.fixture(scope="session")
def children() -> Iterator[dict[str, Child]]:
    """A process for every instruction set that can run here."""
    started = {name: Child(name) for name in ("default", "avx2", "avx512")}
    yield {name: child for name, child in started.items() if child.capability == name}
    for child in started.values():
        child.__exit__(None, None, None)


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    entries, header = config.stash[ENTRIES], config.stash[HEADER]
    write = terminalreporter.write_line
    if exitstatus == pytest.ExitCode.INTERRUPTED:
        header["interrupted"] = True
    if not entries:
        return
    record = config.getoption("--record")
    if record is not None:  # before anything is made of them
        path = Path(record) if record else results.path(header)
        results.write(path, header | {"entries": entries})
    for title, table in tables.every(entries):
        write(f"\n{title}\n", bold=True)
        write(table)
    write("")
    for name, why in header["absent"].items():
        write(f"absent: {name}: {why}")
    warnings = ["the run was interrupted: this is a part of it"] if header.get("interrupted") else []
    warnings += [machine.load_warning(header["machine"]["load_before"]), *disturbed(entries)]
    for line in filter(None, [*warnings, *(line for entry in entries for line in unsteady(entry))]):
        write(f"WARNING: {line}", yellow=True)
    surely = [line for entry in entries for line in missed(entry, surely=True, slack=config.option.slack)]
    perhaps = [line for entry in entries for line in missed(entry) if line not in surely]
    terminalreporter.section(f"{len(surely)} missed targets" if surely else "no target surely missed")
    for line in surely:
        write(line, red=True)
    for line in perhaps:
        write(f"perhaps: {line}", yellow=True)
    if record is not None:
        write(f"results: {path}")
