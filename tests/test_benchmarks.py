"""The benchmarks' arithmetic, by hand; that they run; what they promise about memory, measured."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter, sleep

import pytest
import torch

from benchmarks import accuracy, figures, machine, memory, pairing, peers, plot, report, results, tables
from benchmarks.child import Child
from benchmarks.workloads import ADDED, SHAPES, WORKLOADS
from objkern.__main__ import main

ROOT = Path(__file__).parent.parent

# 3 · 1000 bytes in 1 s against 2 · 1500 in 2 s: twice the speed of the copy.
ENTRY = {
    "kind": "step", "rows": 25, "classes": 10, "dtype": "float32", "workload": "regularized", "why": "by hand",
    "rounds": 3, "bytes": 1000, "copy_bytes": 1500, "kept_bytes": 4096,
    "seconds": {
        "eager": [4.0, 5.0, 6.0], "compiled": [1.0, 1.0, 1.0], "copy": [2.0, 2.0, 2.0], "objkern": [1.0, 1.0, 1.0],
        "objkern, plain": [0.8, 0.8, 0.8],
    },
    "ratio": {
        "eager": [4.0, 5.0, 6.0], "compiled": [1.0, 1.0, 1.0], "copy": [2.0, 2.0, 2.0], "objkern, plain": [0.5, 0.8, 1],
    },
    "targets": {"eager": 4.5, "compiled": 1.5, "price": 1.08, "copy": 0.55},
    "errors": {"eager": [1e-7, 2e-7], "objkern": [1e-8, 2e-8]},
}  # fmt: skip


def linear(rows: int, classes: int, sweep: str) -> figures.Entry:
    """A time of 1 ns per logit, and 1 µs per call in eager torch."""
    seconds = rows * classes * 1e-9
    return {
        "kind": "linearity", "rows": rows, "classes": classes, "dtype": "float32", "workload": "both", "sweep": sweep,
        "seconds": {"eager": [1e-6 + seconds] * 3, "objkern, plain": [seconds] * 3, "objkern, regularized": [seconds] * 3},
    }  # fmt: skip


LINEAR = [linear(4**i, 32000, "rows") for i in range(8)] + [linear(1024, 10 * 4**i, "classes") for i in range(8)]
HEADER = {
    "schema": results.SCHEMA, "datetime": "2030-01-02T03:04:05+00:00", "command": "python -m pytest benchmarks",
    "commit": "0123456789ab",
    "machine": {
        "cpu": "A(R) CPU (family 6)", "cores": 2, "threads": 2, "capability": "AVX512", "memory_gib": 8, "system": "Linux",
        "huge_pages": "madvise", "python": "3.11", "torch": "2.13", "objkern": "0.1", "allocator": "system malloc",
        "keeps_pages": False, "objkern_build": {"cpu_capability": "avx512"}, "load_before": 0.25,
    },
}  # fmt: skip


def test_figures_by_hand() -> None:
    assert figures.figure(ENTRY, "price") == [1.0, 1.25, 2.0]
    assert figures.figure(ENTRY, "copy") == [2.0, 2.0, 2.0]
    assert figures.gb_per_second(ENTRY, "objkern") == pytest.approx(3e-6)
    assert figures.copy_gb_per_second(ENTRY) == pytest.approx(1.5e-6)
    assert figures.slope([1, 10, 100], [3, 300, 30000]) == pytest.approx(2)


def test_missed_targets_are_listed_and_marked() -> None:
    assert figures.missed(ENTRY) == [
        "step, 25 × 10 float32 regularized: torch.compile's time / objkern's is 1, expected ≥ 1.5",
        "step, 25 × 10 float32 regularized: objkern's time regularized / plain is 1.25, expected ≤ 1.08",
    ]
    table = tables.times([ENTRY])
    assert "**1.00** [1.00, 1.00] ✗ ≥ 1.5" in table
    assert "**1.25** [1.00, 2.00] ✗ ≤ 1.08" in table
    assert table.count(tables.MARK) == 2


@pytest.mark.parametrize(("n", "rank"), [(5, 0), (6, 0), (9, 1), (15, 3), (31, 9)])
def test_interval_of_a_median(n: int, rank: int) -> None:
    """As tables of order statistics give it: at 15 samples, the 4th and the 12th."""
    assert pairing.median_rank(n) == rank
    outside = sum(math.comb(n, i) for i in range(rank + 1)) * 0.5**n
    assert 2 * outside <= 0.05 or n < 6
    assert pairing.paired_ratio(range(1, n + 1), [1] * n) == [rank + 1, (n + 1) / 2, n - rank]


def test_contestants_take_turns() -> None:
    """Everyone whose step is not long an untimed one and then a timed one, ours last."""
    log: list[str] = []

    def step(name: str) -> pairing.Step:
        return lambda: log.append(name) or float(len(log))

    turn = pairing.Round({"a": step("a"), "b": step("b")}, "ours", step("ours"), warm=["a", "ours"])
    for _ in range(2):
        turn.before()
        turn.run()
    assert log == ["a", "a", "b", "ours", "ours"] * 2
    assert turn.seconds == {"a": [2.0, 7.0], "b": [3.0, 8.0], "ours": [5.0, 10.0]}


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="what others do is read from Linux's /proc")
def test_others_are_noticed() -> None:
    """A busy process counts, and does not if it is one's own child that takes part."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        others, ours = machine.Others(), machine.Others([busy.pid])
        begin, seconds = perf_counter(), 0.0
        while seconds < 0.3 and perf_counter() - begin < 60:  # where others are busy, too, it takes its time
            sleep(0.1)
            seconds = (others.cores() - ours.cores()) * (perf_counter() - begin)
        assert seconds >= 0.3
    finally:
        busy.kill()
        busy.wait()


def test_every_shape_states_known_targets() -> None:
    for shape in SHAPES:
        assert set(shape.targets) <= set(WORKLOADS)
        for workload in WORKLOADS.values():
            assert set(shape.expected(workload, keeps_pages=False)) <= set(figures.TARGETS)
    large = SHAPES[1]
    assert large.expected(WORKLOADS["plain"], keeps_pages=False)["eager"] == 5.0
    assert large.expected(WORKLOADS["plain"], keeps_pages=True) == {"eager": 1.0, "compiled": 1.5, "copy": 0.35}
    assert large.expected(WORKLOADS["regularized"], keeps_pages=True)["eager"] == 12.0


def test_whole_steps_state_known_targets() -> None:
    pytest.importorskip("transformers")
    from benchmarks import test_finetune_step

    for targets in test_finetune_step.TARGETS.values():
        assert set(targets) <= set(figures.TARGETS)


def test_results_file_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written, read, reported: the page and the plot are functions of the file alone."""
    pytest.importorskip("matplotlib")
    path = tmp_path / results.path(HEADER).name
    assert path.name == "2030-01-02-a-cpu-family-6-2-threads.json"
    path.touch()  # a file of that day is not overwritten
    assert results.path(HEADER, tmp_path).name == "2030-01-02-a-cpu-family-6-2-threads-2.json"
    results.write(path, HEADER | {"entries": [ENTRY, *LINEAR]})
    files = results.load(tmp_path)
    assert files == [(path, results.rounded(HEADER | {"entries": [ENTRY, *LINEAR]}))]

    monkeypatch.setattr(report, "PAGE", tmp_path / "performance.md")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    report.README.write_text(f"before\n{report.BEGIN}old\n{report.END}after\n", encoding="utf-8")
    monkeypatch.setattr(plot, "IMAGES", tmp_path)
    monkeypatch.setattr(results, "load", lambda: files)
    monkeypatch.setattr(sys, "argv", ["report"])
    assert len(report.problems()) == 3
    assert report.main() == 0
    assert report.problems() == []
    page = report.PAGE.read_text(encoding="utf-8")
    assert "- step, 25 × 10 float32 regularized: torch.compile's time / objkern's is 1, expected ≥ 1.5" in page
    assert "- objkern, plain: 1.00 where rows grow" in page
    assert report.README.read_text(encoding="utf-8").startswith(f"before\n{report.BEGIN}")
    assert report.README.read_text(encoding="utf-8").endswith(f"{report.END}after\n")
    drawn = plot.PLOTS["linearity"]
    assert drawn.draw(files[0][1]["entries"]) == drawn.path.read_text(encoding="utf-8")  # the same, drawn twice

    files[0][1]["entries"][-1]["seconds"]["eager"][1] *= 2
    assert [problem.partition(" ")[0] for problem in report.problems()] == ["performance.md", "linearity.svg"]
    page = report.folder(path, files[0][1], tmp_path / "report").read_text(encoding="utf-8")
    for image in ("linearity.png", "linearity.svg"):
        assert (tmp_path / "report" / image).stat().st_size > 1000
    assert "![time over size](linearity.png)" in page
    assert f"[{path.name}]({path.name})" in page
    assert json.loads((tmp_path / "report" / path.name).read_text()) == json.loads(path.read_text())


def test_the_page_shows_the_newest_of_every_case() -> None:
    """By machine; what was measured once stays, what was measured again is in the list of files alone."""
    older, newer = ENTRY | {"why": "at first"}, ENTRY | {"why": "again"}
    other = HEADER | {"machine": HEADER["machine"] | {"cpu": "Another"}}
    files = [
        (Path("c.json"), HEADER | {"entries": [newer], "datetime": "2030-03-01T"}),
        (Path("b.json"), other | {"entries": [older | {"why": "elsewhere"}], "datetime": "2030-02-01T"}),
        (Path("a.json"), HEADER | {"entries": [older, *LINEAR], "datetime": "2030-01-01T"}),
        (Path("0.json"), HEADER | {"entries": [older], "datetime": "2029-01-01T"}),
    ]
    page = report.page(files)
    assert [why in page for why in ("again", "elsewhere", "at first")] == [True, True, False]
    assert "| 1024 × 163840 float32 |" in page
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()[-4:]]
    shown = {file.partition("]")[0]: count for file, *_, count in cells}
    assert shown == {"[c.json": "1 of 1", "[b.json": "1 of 1", "[a.json": "16 of 17", "[0.json": "0 of 1"}


def test_contents_link_to_every_heading() -> None:
    """As GitHub makes anchors: lower case, no punctuation, and a number where there is one of the name already."""
    body = "## A, b: c's\n\n### Plain\n\n### f(x)\n\n## Z\n\n### Plain\n"
    assert report.contents(body).splitlines() == [
        "## Contents", "", "- [A, b: c's](#a-b-cs): [Plain](#plain), [f(x)](#fx)", "- [Z](#z): [Plain](#plain-1)",
    ]  # fmt: skip


def test_an_old_results_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps({"datetime": "2020", "benchmarks": []}))
    with pytest.raises(
        SystemExit, match=r"old\.json: this results file has schema 1 and the report reads 2 and 3: record it"
    ):
        results.load(tmp_path)


def test_a_child_runs_steps() -> None:
    with Child("default") as child:
        assert child.capability == "default"
        child.prepare(str(SHAPES[-1]), "plain")
        begin = perf_counter()
        assert 0 < child.run() < perf_counter() - begin
    with Child("mmx") as child:
        assert child.capability is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_a_forward_pass_needs_no_memory() -> None:
    """2048 × 32000 float32 logits are 262 MB; the forward pass grows the process by less than 8."""
    found = memory.measure(["objkern", "objkern, plain"], "regularized", 2048, 32000, "float32")
    logits = 2048 * 32000 * 4
    for name in ("objkern", "objkern, plain"):
        forward, both = found[name]
        assert forward < 8e6
        assert logits <= both + 1e6 < logits + 9e6  # the gradient


def test_benchmarks_run(tmp_path: Path) -> None:
    """From the command line, on the smallest shape; whether targets are met is not asked, compiling takes too long."""
    out = tmp_path / "out"
    arguments = ["logits", "--no-compile", "--rounds", "2", "--out", str(out), "-k", "32x9 and plain", "-p",
                 "no:cacheprovider"]  # fmt: skip
    # Not a part of the pytest that runs this test, whose workers have their own ways with benchmarks.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "objkern", "bench", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    path = out / "results.json"
    assert path.exists(), done.stdout + done.stderr
    result = json.loads(path.read_text(encoding="utf-8"))
    entries = result["entries"]
    assert result["absent"].keys() | {"cut-cross-entropy"} >= set(peers.absent())
    assert {name: len(times) for name, times in entries[0]["times"].items()} == dict.fromkeys(entries[0]["seconds"], 2)
    assert all(max(error) < 1e-6 for error in entries[0]["errors"].values())
    assert "| 32 × 9 float32 " in (out / "report.md").read_text(encoding="utf-8")
    assert entries[0]["kind"] == "step"
    assert {"eager", "objkern", "objkern.cross_entropy"} == set(entries[0]["seconds"])
    assert "| 32 × 9 float32 " in done.stdout
    assert ("no target surely missed" in done.stdout) == (done.returncode == 0)
    again = subprocess.run(
        [sys.executable, "-m", "objkern", "bench", "--out", "out"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert again.returncode == 2
    assert "results are never overwritten" in again.stderr


def test_accuracy_is_checked_without_times_too() -> None:
    words = [sys.executable, "-m", "objkern", "bench", "overhead", "--benchmark-disable", "-p", "no:cacheprovider"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("....... ")


def test_a_wrong_contestant_is_seen() -> None:
    """A loss of its own scale, and one whose gradient is off: errors as they are, and an AssertionError for ours."""
    z = torch.randn(50, 7, requires_grad=True)
    y = torch.randint(7, (50,))
    eager = WORKLOADS["plain"].eager
    losses = {"eager": eager, "double": lambda z, y: 2 * eager(z, y), "absent": lambda z, y: z.nothing(),
              "gradient": lambda z, y: eager(z, y).detach() + 0.9 * (eager(z, y) - eager(z, y).detach())}  # fmt: skip
    errors, failed = accuracy.errors(losses, eager, (z, y))
    assert errors["double"] == pytest.approx([1.0, 1.0], rel=1e-5)
    assert errors["gradient"][0] < 1e-6
    assert errors["gradient"][1] == pytest.approx(0.1, rel=1e-5)
    assert failed == {"absent": "AttributeError: 'Tensor' object has no attribute 'nothing'"}
    with pytest.raises(AssertionError, match=r"objkern, gradient: error 1\.0e-01 exceeds"):
        accuracy.assert_as_accurate({"eager": errors["eager"], "objkern": errors["gradient"]}, torch.float32)


def test_float64_by_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "CHUNK", 20)  # two rows at a time, and one
    h, w, y = torch.randn(7, 5, requires_grad=True), torch.randn(10, 5, requires_grad=True), torch.randint(10, (7,))

    def truth(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return WORKLOADS["regularized"].eager(h @ w.T, y)

    value, gradients = accuracy.in_float64(truth, (h, w, y), (1,))
    exact = [x.detach().double().requires_grad_() for x in (h, w)]
    whole = truth(*exact, y)
    assert value == pytest.approx(whole.item(), rel=1e-14)
    for found, expected in zip(gradients, torch.autograd.grad(whole, exact), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_what_says_too_little_is_said() -> None:
    lines = figures.unsteady(ENTRY)
    assert [line.rpartition(": ")[2] for line in lines] == [
        "eager torch's time / objkern's is somewhere in [4, 6], which is too wide to tell whether it is ≥ 4.5",
        "objkern's time regularized / plain is somewhere in [1, 2], which is too wide to tell whether it is ≤ 1.08",
    ]
    assert figures.missed(ENTRY, surely=True) == figures.missed(ENTRY)[:1]  # the price's interval has the bound in it


def test_an_absent_library_is_named() -> None:
    nobody = peers.Peer("nobody", "no-body", "no_body", "loss", "logits")
    assert nobody.missing() == "no_body is not installed (pip install no-body)"
    broken = peers.Peer("broken", "json", "json", "no_such_function", "logits")
    assert broken.missing() == "AttributeError: module 'json' has no attribute 'no_such_function'"
    assert torch.equal(peers.Peer("sum", "torch", "torch", "sum", "logits").loss()(torch.ones(3)), torch.tensor(3.0))


def test_bench_command_without_a_checkout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("objkern.__main__.__file__", "/nowhere/site-packages/objkern/__main__.py")
    assert main(["bench"]) == 2
    assert "there are no benchmarks beside /nowhere/site-packages/objkern" in capsys.readouterr().err


def test_eager_formulas_are_the_objectives() -> None:
    logits, target = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 6, 2, 2, 5])
    for workload in (*WORKLOADS.values(), *ADDED):
        torch.testing.assert_close(workload.objective(logits, target), workload.eager(logits, target))
