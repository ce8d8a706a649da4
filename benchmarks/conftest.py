"""Options, fixtures, and what a results file says about its origin."""

from __future__ import annotations

import os
from typing import Any

import pytest

from . import machine

LOAD = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, help="paired rounds of every benchmark (default: by shape)")


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[LOAD] = os.getloadavg()[0]  # before the benchmarks are the load


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    return machine.copy_bandwidth()


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return machine.describe() | {"load_before": config.stash[LOAD]}


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    for key in set(commit_info) - {"id", "time", "dirty"}:
        del commit_info[key]


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Keep the file small enough to commit and to read: no raw times, four digits."""
    output_json["command"] = "python -m pytest " + " ".join(config.invocation_params.args)
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)
        entry["params"] = {"shape": entry["group"], "workload": entry["extra_info"]["workload"]}
    output_json |= rounded(output_json)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
