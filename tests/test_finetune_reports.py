"""What a run writes about itself: its records, however often it is resumed; its origin; its picture and its page."""

from __future__ import annotations

import base64
import json
import math
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import objkern
from objkern.finetune import memory, record, reports
from objkern.finetune.deploy import report_main
from objkern.finetune.record import Recorder, check_writable, provenance, records_of, write_json
from objkern.finetune.training import TrainingOptions

from .test_finetune_training import run


def records(epochs: int, steps: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        for _ in range(steps):
            step = sum(r["event"] == "step" for r in found) + 1
            found.append({"event": "step", "step": step, "epoch": epoch, "total": 2.0 / step, "cross_entropy": 1.9 / step,
                          "accuracy": 0.5, "rows": 8.0, "gradient_norm": 1.0 + step % 3, "learning_rate": 1e-3 / step,
                          "seconds": 0.1, "coefficient_0": 0.1 * step})  # fmt: skip
        found.append({"event": "epoch", "epoch": epoch, "step": found[-1]["step"], "total": 2.0 / epoch, "rows": 8.0,
                      "dev_accuracy": 0.4 + 0.1 * epoch, "dev_loss": 1.0 / epoch, "seconds": 1.5})  # fmt: skip
    return found


def written(folder: Path, some: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    with Recorder(folder) as recorder:
        for one in some:
            recorder(one)
    return folder


@contextmanager
def full_disk(size: int = 4096) -> Iterator[None]:
    """As near as a test gets: no file may be larger, and the error is of the same kind."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---- records --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [0, 2, 3, 4, 8])
def test_a_resumed_run_repeats_no_record(again: int, tmp_path: Path) -> None:
    """Killed after the sixth record, half way through the next; resumed at an earlier one, a step or an epoch's end."""
    whole = records(2, 3)
    assert whole[3]["event"] == "epoch"
    written(tmp_path, whole[:6])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    assert records_of(tmp_path) == whole[:6]
    written(tmp_path, whole[min(again, 6) :])
    assert records_of(tmp_path) == whole


def test_a_killed_run_leaves_the_records_of_an_undisturbed_one(tmp_path: Path) -> None:
    """Ended at once, with steps after its newest checkpoint, and resumed."""
    options = TrainingOptions(epochs=3, batch_size=4, learning_rate=1e-2, patience=9, checkpoint_steps=2)
    for name, ends in (("a", ()), ("b", (4, 8, None))):
        (tmp_path / name).mkdir()
        for last in ends or (None,):
            with Recorder(tmp_path / name) as recorder, suppress(InterruptedError):

                def log(one: dict[str, Any], recorder: Recorder = recorder, last: int | None = last) -> None:
                    recorder(one)
                    if one["step"] == last:
                        raise InterruptedError

                run("token-classification", tmp_path / name, options, count=12, log=log, resume=True)
    ours, theirs = ([{**r, "seconds": 0} for r in records_of(tmp_path / name)] for name in "ab")
    assert [r["event"] for r in ours] == (["step"] * 3 + ["epoch"]) * 3
    assert ours == theirs


def test_every_line_is_there_at_once(tmp_path: Path) -> None:
    """Also for someone who looks on; and numbers that JSON has not are null."""
    with Recorder(tmp_path) as recorder:
        for count, one in enumerate(records(1, 3), 1):
            recorder({**one, "bad": math.nan})
            assert len(records_of(tmp_path)) == count
    assert records_of(tmp_path)[0]["bad"] is None
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], "{", lines[1]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: "):
        records_of(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("null", "line 2: expected an object but got nothing"),
        ("{}", "line 2, event: expected one of step, epoch but got nothing"),
        ('{"event": "step"}', "line 2, step: expected a whole number but got nothing"),
        ('{"event": "epoch", "step": 1}', "line 2, epoch: expected a whole number but got nothing"),
        ('{"event": "step", "step": "x", "epoch": 1}', "line 2, step: expected a whole number but got 'x'"),
        ('{"event": "step", "step": 1, "epoch": 1, "a": [1]}', r"line 2, a: expected a number but got \[1\]"),
        (100_000 * "[", "line 2: "),
    ],
)
def test_records_may_have_been_edited(line: str, message: str, tmp_path: Path, capsys: Any) -> None:
    written(tmp_path, records(1, 2))
    path = tmp_path / "metrics.jsonl"
    kept = path.read_text().splitlines()
    path.write_text("\n".join([kept[0], line, *kept[1:]]))
    with pytest.raises(ValueError, match=rf"^.*metrics\.jsonl, {message}") as bad:
        records_of(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        report_main([str(tmp_path)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"python -m objkern report: error: {bad.value}\n"


def test_tensorboard_shows_a_resumed_run_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    whole = records(2, 3)
    written(tmp_path, whole[:6])
    written(tmp_path, whole[4:])  # from step 4 on
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"step/cross_entropy", "step/learning_rate", "epoch/dev_accuracy"} <= set(board.Tags()["scalars"])
    assert not {"step/step", "step/event", "epoch/epoch"} & set(board.Tags()["scalars"])
    for name, event in (("total", "step"), ("dev_accuracy", "epoch")):
        expected = [(r["step"], pytest.approx(r[name])) for r in whole if r["event"] == event]
        assert [(e.step, e.value) for e in board.Scalars(f"{event}/{name}")] == expected


def test_tensorboard_keeps_the_step_whose_epoch_ends_anew(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    whole = records(2, 3)
    written(tmp_path, whole[:6])
    written(tmp_path, whole[3:])
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("step/total")] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_has_every_epoch_at_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Recorder(tmp_path) as recorder:
        for one in records(1, 2):
            recorder(one)
        board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert [e.step for e in board.Scalars("epoch/dev_accuracy")] == [2]
        file = recorder._file
    assert file.closed
    with recorder:  # which begins anew
        recorder(records(1, 3)[2])
    assert len(records_of(tmp_path)) == 4


def test_without_tensorboard_there_are_lines_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    written(tmp_path, records(1, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# ---- where a run comes from -----------------------------------------------------------------------------------------


def test_provenance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["python", "-m", "objkern", "finetune", "--objective", "CrossEntropy() + 1e-4*ZLoss()"]
    found = provenance(words)
    assert shlex.split(found["command"]) == words
    assert found["versions"]["objkern"] == objkern.__version__
    assert {"python", "torch", "transformers"} <= set(found["versions"])
    assert found["git"] is None
    assert found["machine"]["cores"] >= 1
    assert json.loads(json.dumps(found)) == found
    assert shlex.split(provenance()["command"]) == sys.orig_argv


def test_the_commit_of_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        names = ["-c", "user.name=x", "-c", "user.email=x@y"]
        return subprocess.run(["git", *names, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    monkeypatch.chdir(tmp_path)
    try:
        git("init")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git")
    assert provenance()["git"] is None  # no commit yet
    (tmp_path / "train.py").write_text("1")
    git("add", "train.py")
    git("commit", "-m", "one")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run.json").write_text("{}")
    assert provenance()["git"] == {"commit": git("rev-parse", "HEAD").strip(), "dirty": False}
    (tmp_path / "train.py").write_text("2")
    assert provenance()["git"]["dirty"] is True
    monkeypatch.setenv("PATH", "")
    assert provenance()["git"] is None


def test_files_are_whole_and_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": [1.0, math.nan, (math.inf, "ä")], "b": {"c": None}})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1.0, None, [None, "ä"]], "b": {"c": None}}
    assert "ä" in path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8"))["b"] == {"c": None}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]

    check_writable(tmp_path / "a" / "b", 1000)
    assert list((tmp_path / "a" / "b").iterdir()) == []
    for bad in (path, path / "below"):
        with pytest.raises(ValueError, match=r"folder: .*result\.json.* can't be written: \w+"):
            check_writable(bad, 0)
    usage = record.shutil.disk_usage(tmp_path)._replace(free=3 * 2**29)
    monkeypatch.setattr(record.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match=r"folder: the disk of .* has 1\.5 GiB free, and a run needs about 12\.0 GiB"):
        check_writable(tmp_path, 12 * 2**30)
    check_writable(tmp_path, 3 * 2**29)
    with full_disk(100), pytest.raises(ValueError, match=r"folder: .* can't be written: File too large"):
        check_writable(tmp_path, 0)
    for size, text in ((1023, "1023 bytes"), (1024, "1.0 KiB"), (1000 * 2**30, "1000.0 GiB"), (2**41, "2.0 TiB")):
        assert record.in_bytes(size) == text
    for length, text in ((58, repr("x" * 58)), (59, f"'{'x' * 56}...")):
        assert record._short("x" * length) == text


def test_half_of_a_surrogate_pair_is_escaped(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"a": "ä \ud83d \\ud83d"})
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == {"a": "ä \ud83d \\ud83d"}


def test_a_record_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says so at once, and not only when the file is closed; by then there may be room again."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    one = {"event": "step", "step": 1, "epoch": 1, "total": 1.0}
    with Recorder(tmp_path) as recorder:
        recorder(one)
        with (
            full_disk(16),
            pytest.raises(ValueError, match=r"^output: .*metrics\.jsonl can't be written: File too large$"),
        ):
            recorder(one)
    assert records_of(tmp_path) == [one, one]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing beside it; it says which file can't be written."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    written(tmp_path, records(1, 2))
    write_json(tmp_path / "run.json", {"command": "before"})
    reports.write_report(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for write, name in (
        (lambda: write_json(tmp_path / "run.json", {"command": 9000 * "x"}), "run.json"),
        (lambda: reports.write_curves(tmp_path), "curves.png"),
        (lambda: reports.write_page(tmp_path / "report.html", "x", 9000 * "x"), "report.html"),
        (lambda: written(tmp_path, 40 * records(1, 1)), "metrics.jsonl"),
    ):
        with full_disk(), pytest.raises(ValueError, match=rf"^output: .*{name} can't be written: File too large$"):
            write()
        if name in before:
            assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_memory_at_its_height(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Linux tells it, and torch on a GPU; NaN where nobody does."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    status, clear, called = tmp_path / "status", tmp_path / "clear", []
    monkeypatch.setattr(memory, "STATUS", status)
    monkeypatch.setattr(memory, "CLEAR", clear)
    monkeypatch.setattr(sys, "platform", "other")
    assert math.isnan(memory.peak_bytes(cpu))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory.peak_bytes(cpu) > 1000
    status.write_text("Name:\tpython\nVmHWM:\t   300 kB\nVmRSS:\t   100 kB\n")

    def call() -> None:
        called.append(clear.read_text() if clear.is_file() else None)
        status.write_text("VmHWM:\t   500 kB\nVmRSS:\t   100 kB\n")

    assert memory.peak_bytes(cpu) == 300 * 1024
    assert memory.extra_peak_bytes(call, cpu) == 400 * 1024
    clear.unlink()
    clear.mkdir()  # which nobody can write to
    assert math.isnan(memory.extra_peak_bytes(call, cpu))
    status.write_text("Name:\tpython\n")
    assert math.isnan(memory.peak_bytes(cpu))
    sizes = {"max_memory_allocated": 5, "memory_allocated": 2}
    for name in ("synchronize", "reset_peak_memory_stats", *sizes):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: called.append(name) or sizes.get(name))
    assert memory.peak_bytes(gpu) == 5.0
    assert memory.extra_peak_bytes(lambda: called.append("call"), gpu) == 3.0
    assert called == [
        "5", None, "max_memory_allocated", "synchronize", "reset_peak_memory_stats", "memory_allocated", "call",
        "synchronize", "max_memory_allocated",
    ]  # fmt: skip


# ---- the picture and the page ---------------------------------------------------------------------------------------

EVIL = "<script>alert('x')</script> & \"so on\" </td>"
RUN = {
    "name": f"run {EVIL}", "task": "sequence-classification", "model": "bert-base-cased",
    "objective": "CrossEntropy(label_smoothing=0.1) - 0.01*Entropy()", "data": {"train": 900, "dev": 100},
    "options": {"train": EVIL, "training": {"learning_rate": 5e-05, "epochs": 2}},
    **{"command": f"python -m objkern finetune '{EVIL}'", "time": "2026-01-01T00:00:00+00:00",
       "versions": {"torch": "2.13.0"}, "git": {"commit": "abc123", "dirty": True}, "machine": {"gpu": None}},
}  # fmt: skip
RESULT = {
    "how": "stopped early", "best_epoch": 2, "steps": 6, "seconds": 93.0, "parameters": 1000, "trained_parameters": 10,
    "device": "cpu", "untrained": {"accuracy": 0.25, "macro_f1": 0.2}, "dev": {"accuracy": 0.9, "macro_f1": 0.88},
    "test": {"accuracy": 0.875, "macro_f1": None},
    "table": [["class", "precision", "recall", "f1", "rows"], [EVIL, 0.5, 1.0, 2 / 3, 1234], ["bad", 0.0, 0.0, 0.0, 0]],
    "confusion": [[3, 1], [0, 0]], "classes": [EVIL, "bad"],
    "samples": [{"input": EVIL, "truth": EVIL, "predicted": "bad"},
                {"input": {"words": ["the", EVIL]}, "truth": ["O", "B-x"], "predicted": ["B-x", "B-x"]},
                {"input": {"question": "who?", "context": EVIL}, "truth": {"text": [], "answer_start": []}, "predicted": ""}],
}  # fmt: skip


class Page(HTMLParser):
    """Checks that tags close in order; keeps tags, rows of tables, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    def urls(self) -> Iterator[str | None]:
        for _, attributes in self.tags:
            yield from (value for name, value in attributes.items() if name in ("src", "href"))


def test_a_page_that_can_be_sent(tmp_path: Path) -> None:
    written(tmp_path, records(2, 3))
    write_json(tmp_path / "run.json", RUN)
    write_json(tmp_path / "result.json", RESULT)
    (tmp_path / "curves.png").write_bytes(b"of before")
    assert report_main([str(tmp_path)]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object"}
    assert [url.partition(",")[0] for url in page.urls() if url] == ["data:image/png;base64"]
    assert base64.b64decode(text.split("base64,")[1].split('"')[0]) == (tmp_path / "curves.png").read_bytes()
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text
    assert page.text.count(EVIL) >= 8
    for fact in ("stopped early", "best epoch 2", "1.6 min", "untrained 0.2500", "0.8750", "abc123", "5e-05"):
        assert fact in page.text, fact
    assert ["-0.01", "Entropy()", "torch.distributions.Categorical(logits=logits).entropy()"] in page.rows
    assert ["accuracy", "0.2500", "0.9000", "0.8750"] in page.rows
    assert ["macro f1", "0.2000", "0.8800", "–"] in page.rows
    assert [EVIL, "0.5000", "1.0000", "0.6667", "1,234"] in page.rows
    assert [EVIL, "375%", "125%"] in page.rows  # 3 of them are 75%
    assert ["bad", "00%", "00%"] in page.rows
    assert any(row[0] == "2 (best)" for row in page.rows if row)


def test_a_page_of_what_there_is(tmp_path: Path) -> None:
    """Interrupted in the first epoch; nothing but a command; nothing at all."""
    written(tmp_path / "a", records(1, 3)[:2])
    write_json(tmp_path / "a" / "run.json", RUN)
    reports.write_report(tmp_path / "a")
    page = Page((tmp_path / "a" / "report.html").read_text(encoding="utf-8"))
    assert "not finished" in page.text
    assert not {"Confusion", "Samples", "Epochs", "Metrics"} & set(page.text.split())
    (tmp_path / "b").mkdir()
    write_json(tmp_path / "b" / "run.json", {"command": "x"})
    reports.write_report(tmp_path / "b")
    assert not (tmp_path / "b" / "curves.png").exists()
    Page((tmp_path / "b" / "report.html").read_text(encoding="utf-8"))
    (tmp_path / "b" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run: .*run\.json can't be read"):
        reports.write_report(tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("run.json", [], r": expected an object but got \[\]"),
        ("run.json", {"options": "x"}, ", options: expected an object but got 'x'"),
        ("run.json", {"untrained": {"f1": "x"}}, ", untrained, f1: expected a number but got 'x'"),
        ("run.json", {"command": 5}, ", command: expected a text but got 5"),
        ("run.json", {"git": {"commit": 5}}, ", git, commit: expected a text but got 5"),
        ("run.json", {"versions": ["x"]}, r", versions: expected an object but got \['x'\]"),
        ("result.json", [], r": expected an object but got \[\]"),
        ("result.json", {"dev": [1]}, r", dev: expected an object but got \[1\]"),
        ("result.json", {"table": 5}, ", table: expected a list but got 5"),
        ("result.json", {"table": ["x"]}, ", table, item 1: expected a list but got 'x'"),
        ("result.json", {"confusion": [["x"]]}, ", confusion, item 1, item 1: expected a whole number but got 'x'"),
        ("result.json", {"samples": [1]}, ", samples, item 1: expected an object but got 1"),
        ("result.json", {"steps": "x"}, ", steps: expected a whole number but got 'x'"),
        ("result.json", {"seconds": "x"}, ", seconds: expected a number but got 'x'"),
    ],
)
def test_what_a_run_wrote_may_have_been_edited(
    name: str, edit: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "run.json", RUN)
    write_json(tmp_path / "result.json", RESULT)
    write_json(tmp_path / name, {**(RUN if name == "run.json" else RESULT), **edit} if edit else edit)
    with pytest.raises(ValueError, match=rf"^run: .*{name}{message}$") as bad:
        reports.facts_of(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        report_main([str(tmp_path)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"python -m objkern report: error: {bad.value}\n"
    assert not (tmp_path / "report.html").exists()


def test_a_page_of_what_may_be_in_them(tmp_path: Path) -> None:
    """Everything may be null or empty, and samples may hold anything."""
    write_json(tmp_path / "run.json", dict.fromkeys(RUN))
    odd = [None, 5, [], ["a", 1], {"words": 5}, {"words": [1, None]}, {"text": 5}, {"text": None}, {"text": [1]}]
    samples = [{"input": a, "truth": b, "predicted": c} for a in odd for b in odd for c in odd]
    for result in (dict.fromkeys(RESULT), {"table": [[]], "confusion": [], "samples": [{}, *samples]}):
        write_json(tmp_path / "result.json", result)
        reports.write_report(tmp_path)
        Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        report_main([str(tmp_path)])
    assert stopped.value.code == 2
    assert "error: run: expected a run's folder, with run.json, but" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_curves_say_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, records(1, 2))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        reports.write_curves(tmp_path)


@pytest.mark.parametrize("name", ["cost $x_", "$\\frac{$", "\ud800 half", "a$b$"])
def test_curves_of_any_name(name: str, tmp_path: Path) -> None:
    """No name is a formula to matplotlib, and none is without letters."""
    written(tmp_path, [dict(record) | {name: 1.0, f"dev_{name}": 0.5} for record in records(2, 2)])
    assert reports.write_curves(tmp_path).stat().st_size > 1000


def test_smoothing_is_the_mean_of_the_last_values() -> None:
    assert reports.smoothed([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("truth", "answer", "judged"),
    [("a", "a", "good"), (1, "1", "good"), ("a", "b", "bad"), (1.5, 1.49, ""), (None, "a", ""),
     (["y", "x"], ["x", "y"], "good"), (["y"], ["x", "y"], "bad"), ({"text": ["a", "b"]}, "b", "good"),
     ({"text": []}, "", "good"), ({"text": []}, "a", "bad")],
)  # fmt: skip
def test_answers_are_judged(truth: Any, answer: Any, judged: str) -> None:
    assert reports._judged(truth, answer) == judged


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.87312, "0.8731"), (5e-5, "5e-05"), (0.0, "0.0000"), (12345, "12,345"), (True, "True"), (None, "–"),
     (123456.0, "1.23e+05"), ([1, "a"], '[1, "a"]')],
)  # fmt: skip
def test_numbers(value: Any, text: str) -> None:
    assert reports.number(value) == text


def test_formulas_that_cannot_be_parsed_have_no_table() -> None:
    assert reports.terms_of("CrossEntropy() + <tensor>*KLDivergence()") == []
    assert reports.terms_of("CrossEntropy() + Custom()") == []
