"""What `make gpu` does, as far as a CPU can tell: that its tests run, its steps end, its figures and its page are right.

Nothing here says anything about a GPU.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.gpu.__main__
from benchmarks.gpu import figures, run, sanitizer, status, suite, summary, wheels
from benchmarks.gpu.claims import CLAIMS, NATIVE
from benchmarks.gpu.run import STEPS, Run, Step

ROOT = Path(__file__).parent.parent
TESTS = {
    f"{path.stem.removeprefix('test_')}::{node.name.removeprefix('test_')}"
    for path in (ROOT / "tests" / "gpu").glob("test_*.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
}


# ---- the suite ------------------------------------------------------------------------------------------------------


def test_every_test_belongs_to_a_claim_and_every_claim_has_tests() -> None:
    claimed = {test for claims in CLAIMS.values() for claim in claims for test in claim.tests}
    assert claimed == TESTS


def test_the_table_of_the_suite_names_tests_that_exist() -> None:
    text = (ROOT / "tests" / "gpu" / "README.md").read_text(encoding="utf-8")
    words = {word.strip(".`").rpartition("::")[2] for word in text.replace("`", " ").replace(",", " ").split()}
    named = {word for word in words if word.startswith("test_") and not word.endswith((".py", "_"))}
    assert named <= {f"test_{test.partition('::')[2]}" for test in TESTS}
    assert len(named) > 20


@pytest.mark.slow
def test_a_part_of_the_suite_runs_on_a_stand_in() -> None:
    """So that what needs a GPU to mean something does not need one to be found broken."""
    chosen = (
        "(test_labels and not 50257) or (test_layouts and not 4099 and not 301) or test_large or compile and mean or "
        "every_option and 9 or several_backward and 1003 or func or masked and 33 or plain_cross and (9 or 1003)"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu", "-k", chosen, "-p", "no:cacheprovider"],
        cwd=ROOT, env={**os.environ, "OBJKERN_GPU_TESTS": "cpu:cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 150


def test_the_calls_that_graphs_capture_are_calls() -> None:
    """The tests of streams need a device as a whole; what they call does not."""
    from tests.gpu.calls import CALLS, Call

    for name in CALLS:
        call = Call(torch.device("cpu"), 9, name)
        z, y = call.inputs(torch.device("cpu"), 9, torch.bfloat16, 0)
        found = call(z.requires_grad_(), y, backend="cpu")
        assert all(torch.isfinite(value).all() for value in found), name


def test_outcomes_are_read_from_what_pytest_prints() -> None:
    printed = """
tests/gpu/test_a.py::test_x[cuda-a b] PASSED                                  [ 10%]
tests/gpu/test_a.py::test_x[cuda-c] FAILED                                    [ 20%]
tests/gpu/test_a.py::test_y SKIPPED (there is no reason)                      [ 30%]
tests/gpu/test_a.py::test_x[cuda-c] ERROR                                     [ 20%]
FAILED tests/gpu/test_a.py::test_x[cuda-c] - AssertionError: 1 is not 2
tests/gpu/test_a.py::test_z[k] """
    assert suite.outcomes(printed, ended=True) == {
        "test_a.py::test_x": {
            "passed": 1,
            "failed": 2,
            "messages": ["test_a.py::test_x[cuda-c]: AssertionError: 1 is not 2"],
        },
        "test_a.py::test_y": {"skipped": 1},
        "test_a.py::test_z": {"failed": 1, "messages": ["test_a.py::test_z[k]: ended the process, or was ended"]},
    }


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (
            0,
            "12 calls of cuda on cuda\n========= ERROR SUMMARY: 0 errors",
            {"status": "clean", "errors": 0, "calls": 12},
        ),
        (9, "12 calls of cuda\n========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)", {"errors": 3}),
        (1, "========= ERROR SUMMARY: 0 errors", {"status": "failed"}),  # the program did not come to its end
        (1, "========= Error: Device not supported", {"status": "unsupported"}),
    ],
)
def test_the_sanitizers_verdict(code: int, output: str, expected: dict[str, Any]) -> None:
    assert expected.items() <= sanitizer.verdict(code, output).items()


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_wheels_take_part_and_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "PEERS", tmp_path / "peers")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    with pytest.raises(SystemExit, match=r"there is no \.whl in"):
        wheels.importable(tmp_path)
    info = "peer_of_a_test-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "peer_of_a_test-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer_of_a_test.py", "answer = 42\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: peer-of-a-test\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    assert wheels.importable(tmp_path) == ["peer_of_a_test-1.0-py3-none-any.whl"]
    assert os.environ["PYTHONPATH"].endswith(f"{os.pathsep}elsewhere")
    command = [sys.executable, "-c", "import peer_of_a_test; print(peer_of_a_test.answer)"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "42\n"
    assert importlib.util.find_spec("peer_of_a_test") is None
    (tmp_path / "peer_of_a_test-1.0-py3-none-any.whl").write_bytes(b"no wheel")
    with pytest.raises(SystemExit, match="pip could not install them"):
        wheels.importable(tmp_path)


def test_without_a_device_the_command_says_so() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("There is no CUDA device here: ")


@pytest.mark.slow
def test_a_dry_run(tmp_path: Path) -> None:
    """Each kind of step once, by its real command."""
    chosen = [
        word
        for name in ("ceilings", "small", "elementwise", "finetune", "host", "plans", "sanitizer")
        for word in ("--only", name)
    ]
    command = [sys.executable, "-m", "benchmarks.gpu", "--stand-in", "--quick", "--out", str(tmp_path), *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text(encoding="utf-8"))
    assert list(result["steps"]) == [
        "facts",
        "sanitizer",
        "ceilings",
        "small",
        "elementwise",
        "finetune",
        "host",
        "plans",
    ]
    assert {step["status"] for step in result["steps"].values()} == {"ok"}, done.stdout
    kinds = {entry["kind"] for step in result["steps"].values() for entry in step["entries"]}
    assert {"facts", "sanitizer", "copy", "gemm", "small", "finetune step", "host", "profile", "plan"} <= kinds
    assert "| target " in done.stdout
    assert status.load(tmp_path) == []  # a stand-in is no GPU


def test_steps_that_fail_or_hang_cost_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LOGS", ROOT / "build" / "gpu-test")
    codes = {
        "good": "print('fine'); open(lines, 'a').write('{\"kind\": \"copy\", \"gb_per_second\": 2.0}\\n')",
        "bad": "raise SystemExit('no')",
        "hanging": 'open(lines, \'a\').write(\'{"kind": "gemm"}\\n{"kind": \'); import time; time.sleep(60)',
        "late": "raise SystemExit('never begun')",
    }

    def command(self: Run, step: Step, lines: Path, limit: float) -> tuple[list[str], dict[str, str]]:
        return [sys.executable, "-c", f"lines = {str(lines)!r}; {codes[step.name]}"], dict(os.environ)

    monkeypatch.setattr(Run, "_command", command)
    this = Run({"schema": 1}, tmp_path / "r.json", 5.4, quick=False, stand_in=False)
    this.steps([Step(name, "", 2.0, 1.0, name, times=name not in ("good", "bad")) for name in codes])
    result = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert {name: step["status"] for name, step in result["steps"].items()} == {
        "good": "ok", "bad": "failed", "hanging": "timeout", "late": "not run"
    }  # fmt: skip
    assert result["steps"]["bad"]["tail"] == ["no"]
    assert result["steps"]["hanging"]["entries"] == [{"kind": "gemm"}]
    assert figures.copy_ceiling(result) == 2e9
    assert summary.failed(result)


def test_the_plan_of_a_run_fits_its_time() -> None:
    sides = [max(step.about for step in batch) for batch in run.batches(STEPS)]
    assert sum(sides) <= benchmarks.gpu.__main__.parser().get_default("budget") <= 540  # of a loan of ten minutes


# ---- figures and page -----------------------------------------------------------------------------------------------

# 2 · 600 bytes in 1 µs for one read and one write, beside a copy's 1.25 GB/s: 96 %. 3 · 600 in 1.6 µs: 90 %.
LARGE = {
    "kind": "objective", "rows": 3, "classes": 100, "dtype": "bfloat16", "workload": "plain", "bytes": 600,
    "seconds": {
        "objkern cuda forward": [1e-6, 1e-6, 1e-6], "objkern cuda backward": [1.6e-6, 1.6e-6, 1.6e-6],
        "objkern triton forward": [2e-6, 2e-6, 2e-6], "eager": [5e-6, 5e-6, 5e-6], "compiled": [1.5e-6, 1.5e-6, 1.5e-6],
    },
    "ratio": {
        "eager / objkern cuda forward": [4.9, 5.0, 5.1], "compiled / objkern cuda forward": [1.4, 1.5, 1.6],
        "eager / objkern triton forward": [2.4, 2.5, 2.6],
    },
    "errors": {"eager": [1e-3, 1e-3], "objkern cuda forward": [1e-7, 1e-3]},
}  # fmt: skip
REGULARIZED = {
    **LARGE,
    "workload": "regularized",
    "seconds": {"objkern cuda forward": [1e-6, 1.02e-6, 2e-6], "objkern cuda forward, plain": [1e-6, 1e-6, 1e-6]},
    "ratio": {"objkern cuda forward, plain / objkern cuda forward": [0.97, 0.98, 0.99]},
}
TESTED = {
    "kind": "tests", "file": "test_labels.py", "backend": "cuda", "seconds": 1.0, "exit": 1,
    "tests": {
        "test_labels.py::test_all_rows_ignored": {"passed": 7, "skipped": 2},
        "test_labels.py::test_ignore_index_inside_the_vocabulary": {"passed": 3, "failed": 1},
    },
}  # fmt: skip
RESULT = {
    "schema": 1, "kind": "gpu", "datetime": "2030-01-02T03:04:05+00:00", "command": "", "commit": "0123456789ab",
    "stand_in": False,
    "steps": {
        "facts": {"status": "ok", "seconds": 1.0, "entries": [{"kind": "facts", "device": "A GPU", "driver": "1.2"}]},
        "tests": {"status": "failed", "seconds": 2.0, "entries": [TESTED]},
        "sanitizer": {"status": "ok", "seconds": 2.0, "entries": [
            {"kind": "sanitizer", "tool": "memcheck", "backend": "cuda", "status": "clean", "errors": 0, "calls": 9}
        ]},
        "ceilings": {"status": "ok", "seconds": 2.0, "entries": [{"kind": "copy", "gb_per_second": 1.25}]},
        "objectives": {"status": "ok", "seconds": 3.0, "entries": [LARGE, REGULARIZED]},
        "plans": {"status": "not run", "entries": []},
    },
}  # fmt: skip


def test_figures_by_hand() -> None:
    found = {finding.target: finding for finding in figures.findings(RESULT)}
    assert {name: round(finding.value, 4) for name, finding in found.items()} == {
        "fused": 0.96, "both passes": 0.9, "eager": 5.0, "compiled": 1.5, "price": round(1 / 0.98, 4)
    }  # fmt: skip
    assert {name for name, finding in found.items() if not finding.met} == {"both passes", "compiled"}
    assert found["eager"].by == "objkern cuda forward"
    assert figures.wrong(RESULT) == []
    off = {
        **LARGE,
        "errors": {"eager": [1e-3, 1e-3], "objkern cuda forward": [1e-7, 0.5], "objkern triton forward": "no"},
    }
    wrong = figures.wrong({"steps": {"objectives": {"entries": [off]}}})
    assert [line.partition(", ")[2] for line in wrong] == [
        "objkern cuda forward: gradient off by 5.0e-01", "objkern triton forward: no"
    ]  # fmt: skip


def test_the_page_is_a_function_of_the_files(tmp_path: Path) -> None:
    empty = status.page([])
    assert empty.count(status.NOTHING) == sum(map(len, CLAIMS.values())) + 8 + len(figures.TARGETS) + 1
    path = tmp_path / "gpu-a-gpu-2030-01-02.json"
    run.write(path, RESULT)
    assert status.load(tmp_path) == [(path, RESULT)]
    text = status.page(status.load(tmp_path))
    rows = dict(line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| "))
    source = "(A GPU, 2030-01-02, gpu-a-gpu-2030-01-02.json)"
    nothing = status.NOTHING
    assert rows["all rows ignored, no rows, one class (12)"] == (
        f"cuda: 7 cases hold (A GPU, {path.name}); triton: {nothing}, reference: {nothing}"
    )
    assert rows["`ignore_index` inside the vocabulary (14)"].startswith("cuda: **1 of 4 cases fail**")
    assert rows["no access out of bounds or misaligned"] == f"cuda: clean, 9 calls {source}; triton: {nothing}"
    assert rows[str(figures.TARGETS["eager"])] == f"met: 3 × 100 bfloat16: 5 {source}"
    assert rows[str(figures.TARGETS["compiled"])] == f"**missed 1 of 1**: 3 × 100 bfloat16: 1.5 ✗ {source}"
    assert rows["`make gpu` runs to its end"] == nothing  # some of its steps
    steps = {step.name: {"status": "not run", "entries": []} for step in run.STEPS} | RESULT["steps"]
    assert status.of_command({"steps": steps}).startswith(
        f"{len(run.STEPS)} steps, 10 s, but build not run, tests failed"
    )
    assert rows["autocast (19)"] == nothing
    assert NATIVE == ("cuda", "triton")


def test_what_the_sanitizer_said_before_its_time_was_up() -> None:
    entry = {"kind": "sanitizer", "tool": "racecheck", "backend": "triton", "status": "timeout", "seconds": 9.0}
    race = "========= Error: Race reported between Write access at f\n========= and Write access at f\n"
    for tail, expected in (("========= COMPUTE-SANITIZER", None), (2 * race, "**2 reports** before its time was up")):
        result = {"steps": {"sanitizer": {"entries": [{**entry, "tail": tail}]}}}
        assert status.of_sanitizer("racecheck", "triton", result) == expected
        assert status.of_sanitizer("racecheck", "cuda", result) is None
    failed = {"steps": {"sanitizer": {"entries": [{**entry, "status": "errors", "errors": 3}]}}}
    assert status.of_sanitizer("racecheck", "triton", failed) == "**3 reports**"


def test_tests_that_were_cut_off_are_no_proof_of_the_rest() -> None:
    result = {"steps": {"tests": {"entries": [{**TESTED, "exit": "timeout"}]}}}
    (claim,) = (claim for claim in CLAIMS["Labels and masks"] if "one class (12)" in claim.text)
    text = status.measured_tests([(Path("gpu-2.json"), result)], claim)
    assert text.startswith("cuda: 7 cases hold, others were not reached (")
    whole = {"steps": {"tests": {"entries": [TESTED]}}}
    text = status.measured_tests([(Path("gpu-2.json"), result), (Path("gpu-1.json"), whole)], claim)
    assert text.startswith("cuda: 7 cases hold (an unknown device, gpu-1.json)")


def test_the_test_that_a_limit_ended_did_not_fail() -> None:
    (claim,) = (claim for claim in CLAIMS["Labels and masks"] if "one class (12)" in claim.text)
    name = f"test_{claim.tests[0].partition('::')[0]}.py::test_{claim.tests[0].partition('::')[2]}"
    ended = {"passed": 3, "failed": 1, "messages": [f"{name}[x]: {suite.ENDED}"]}
    entry = {"kind": "tests", "file": "", "backend": "cuda", "tests": {name: ended}}
    for code, failed in (("timeout", 0), (-11, 1)):  # a limit, a crash
        outcome = status.outcome(
            claim, Path("gpu-1.json"), {"steps": {"t": {"entries": [{**entry, "exit": code}]}}}, "cuda"
        )
        assert outcome == status.Outcome("gpu-1.json", 3, failed, True)


def test_the_drop_in_counts_as_a_call_and_the_bare_op_does_not() -> None:
    ratio = {"F.cross_entropy": [1, 1, 1], "objkern cuda op": [0.7, 0.7, 0.7], "objkern cuda backward": [1.2, 1.2, 1.2],
             "objkern.cross_entropy": [1.0, 1.05, 1.1]}  # fmt: skip
    entry = {
        "kind": "host",
        "what": "forward and backward",
        "rows": 512,
        "classes": 32,
        "dtype": "float32",
        "ratio": ratio,
    }
    (found,) = figures.hosts({"steps": {"host": {"entries": [entry]}}})
    assert (found.by, found.value, found.met) == ("objkern.cross_entropy", 1.05, True)
