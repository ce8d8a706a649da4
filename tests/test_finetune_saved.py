"""Models that were saved: stock for transformers and bit-equal, answers that stay the same, no pickles, deployment."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

import objkern  # noqa: E402
from objkern.finetune import adapters, card, deploy, extras, onnx, saved  # noqa: E402
from objkern.finetune.deploy import export_main, predict_main  # noqa: E402
from objkern.finetune.record import write_json  # noqa: E402
from objkern.finetune.tasks import Task  # noqa: E402
from objkern.finetune.training import TrainingOptions  # noqa: E402
from objkern.finetune.whole import whole_file, whole_folder  # noqa: E402
from objkern.transformers import is_attached  # noqa: E402

from .test_finetune_reports import full_disk  # noqa: E402
from .test_finetune_training import NAMES, model_of, rows_of, run, task_of  # noqa: E402

INPUTS = ("text", "words", "question", "context", "prompt", "source")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models as small as these compute for less time than threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(name: str, folder: Path, strategy: str = "full") -> tuple[nn.Module, Task, list[dict[str, Any]]]:
    """A model after one epoch, its task, and rows that it has not seen, without labels."""
    options = TrainingOptions(epochs=1, batch_size=4, learning_rate=1e-2, strategy=strategy)
    _, model, _ = run(name, folder, options)
    rows = [{column: row[column] for column in INPUTS if column in row} for row in rows_of(name, 16)[8:]]
    return model.eval(), task_of(name, rows_of(name, 8)), rows


def asked(task: Task, rows: list[dict[str, Any]]) -> list[Any]:
    """By the task itself, which wants a text where there is a prompt alone."""
    return [{"text": row["prompt"]} if task.name == "causal-lm" else row for row in rows]


def logits(model: nn.Module, task: Task) -> list[torch.Tensor]:
    """Of token numbers that no tokenizer decided."""
    ids = torch.tensor([[1, 5, 9, 17, 2], [1, 8, 2, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    if task.name == "seq2seq":
        inputs["decoder_input_ids"] = ids[:, :3]
    with torch.no_grad():
        out = model(**inputs)
    return [out[key] for key in ("logits", "start_logits", "end_logits") if key in out]


def plain(folder: Path, task: Task) -> tuple[nn.Module, Any]:
    """As somebody without objkern loads them."""
    model = getattr(transformers, task.auto_model).from_pretrained(folder)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_trained_is_what_is_loaded(name: str, tmp_path: Path) -> None:
    model, task, rows = trained(name, tmp_path / "run")
    expected, answers = logits(model, task), task.predict(model, asked(task, rows))
    saved.save(tmp_path / "run" / "model", model, task, {"loss": 1.0})
    saved.export(tmp_path / "run", tmp_path / "out")
    stock, tokenizer = plain(tmp_path / "out", task)
    assert not task.linear_head or (is_attached(model) and not is_attached(stock))
    for ours, theirs in zip(expected, logits(stock, task), strict=True):
        assert torch.equal(ours, theirs)
    assert tokenizer("the cat sat")["input_ids"] == task.tokenizer("the cat sat")["input_ids"]
    for folder in ("run", "run/model", "out"):
        assert saved.predict(tmp_path / folder, rows) == answers
    loaded, again = saved.load(tmp_path / "out")
    assert (type(again), again.labels, again.max_length) == (type(task), task.labels, task.max_length)
    assert getattr(again, "problem", None) == getattr(task, "problem", None)
    assert again.score(loaded, rows_of(name, 8)).metrics == task.score(model, rows_of(name, 8)).metrics
    assert json.loads((tmp_path / "out" / "objkern.json").read_text())["metrics"] == {"loss": 1.0}


@pytest.mark.parametrize("name", ["sequence-classification", "causal-lm"])
def test_adapters_are_merged(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, task, rows = trained(name, tmp_path / "run", "lora:2")
    before = logits(model, task)
    saved.save(tmp_path / "run" / "model", model, task)
    for ours, theirs in zip(before, logits(model, task), strict=True):
        assert torch.equal(ours, theirs)  # saving has not merged the model itself
    saved.export(tmp_path / "run", tmp_path / "out")
    stock, _ = plain(tmp_path / "out", task)
    names = [key for key, _ in stock.named_parameters()]
    assert names == [key for key, _ in model_of(task).named_parameters()]
    for ours, theirs in zip(before, logits(stock, task), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # the sum of two products, and one product
    merged = model.merge_and_unload()
    for ours, theirs in zip(logits(merged, task), logits(stock, task), strict=True):
        assert torch.equal(ours, theirs)
    assert saved.predict(tmp_path / "out", rows) == task.predict(merged, asked(task, rows))


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # peft, whenever such a model writes
@pytest.mark.parametrize("name", ["sequence-classification", "causal-lm"])
def test_prompt_vectors_are_saved_beside_their_model(name: str, tmp_path: Path) -> None:
    """One from scratch, which nobody else could load by its name, lies in base/."""
    pytest.importorskip("peft")
    model, task, rows = trained(name, tmp_path / "run", "prompt:3")
    answers = task.predict(model, asked(task, rows))
    saved.save(tmp_path / "run" / "model", model, task)
    saved.export(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "base" / "model.safetensors").exists()
    assert saved.predict(tmp_path / "out", rows) == answers
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "PeftModel.from_pretrained(model, folder)" in card
    with pytest.raises(ValueError, match=r"onnx: "):
        saved.export(tmp_path / "run", tmp_path / "other", onnx=True)
    weights = tmp_path / "out" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model: the adapters of .* can't be loaded: "):
        saved.load(tmp_path / "out")
    base = tmp_path / "out" / "base"
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"base holds pytorch_model\.bin, which may be pickles"):
        saved.load(tmp_path / "out")
    config = tmp_path / "out" / adapters.CONFIG
    (tmp_path / "out" / "base").rename(tmp_path / "base")
    for text, message in (
        ("[]", ": expected an object but got"),
        ("{", " can't be read: "),
        ("{}", " can't be loaded"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=rf"^model: .*{message}"):
            saved.load(tmp_path / "out")


def test_whose_adapters_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    names = ("bert-base-cased", "org/name", "a/b/c", "/a", "", "there")
    assert [adapters.is_hub_name(name) for name in names] == [True, True, False, False, False, False]
    for name in ("org/name", None):
        (tmp_path / adapters.CONFIG).write_text(json.dumps({"base_model_name_or_path": name}))
        assert adapters.base_of(tmp_path) == (name or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"model: .* holds adapters, which need peft: pip install peft"):
        saved._with_adapters(tmp_path, None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, as it is after training."""
    folder = tmp_path_factory.mktemp("runs") / "reviews"
    model, task, _ = trained("sequence-classification", folder)
    saved.save(folder / "model", model, task)
    write_json(folder / "run.json", {
        "name": "reviews", "task": task.name, "model": "bert-base-cased", "data": {"train": 8, "dev": 2},
        "objective": "CrossEntropy(label_smoothing=0.1) - 0.01*Entropy()", "options": {"train": "reviews.jsonl"},
        "command": "python -m objkern finetune ...", "versions": {"torch": "2.13.0"},
        "git": {"commit": "abc123", "dirty": False},
    })  # fmt: skip
    write_json(folder / "result.json", {
        "untrained": {"accuracy": 0.5, "macro_f1": 0.3}, "dev": {"accuracy": 0.9, "macro_f1": 0.8}, "test": {},
        "table": [["class", "f1", "rows"], ["a|b", 0.75, 4]],
    })  # fmt: skip
    return folder


def test_the_card_says_what_the_model_is(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub = pytest.importorskip("huggingface_hub")
    assert export_main([str(finished), str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    card = hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-classification", "base_model": "bert-base-cased",
        "metrics": ["accuracy", "f1"], "tags": ["objkern"],
    }  # fmt: skip
    for line in ("# reviews", "Labels: `bad`, `good`.", "| -0.01 | `Entropy()` | `torch.distributions.Categorical(",
                 "| accuracy | 0.5000 | 0.9000 |", "| a\\|b | 0.7500 | 4 |", "reviews.jsonl (train 8, dev 2)",
                 "model = AutoModelForSequenceClassification.from_pretrained(folder)", "commit `abc123`"):  # fmt: skip
        assert line in card.text, line
    code = card.text.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {"folder": str(tmp_path / "out")}
    exec(code, names)
    assert type(names["model"]).__name__ == "BertForSequenceClassification"
    for code in card.text.split("```python\n")[2:]:
        exec(code.split("```")[0], names)


EVIL = "<script>alert('x')</script>\n\n# a | `b` \\\\| *c* ```d```"


def test_nothing_in_a_card_is_taken_for_markdown(finished: Path) -> None:
    about = {"task": "sequence-classification", "labels": [EVIL, "`", ""], "max_length": 8}
    run = {"name": EVIL, "model": EVIL, "data": {"train": 8}, "options": {"train": EVIL}, "command": EVIL,
           "versions": {EVIL: EVIL}, "git": {"commit": EVIL}, "objective": "CrossEntropy()"}  # fmt: skip
    result = {"dev": {EVIL: 0.5}, "table": [[EVIL, "f1"], [EVIL, 0.5], ["b", EVIL]]}
    text = card.card_of("x", about, run, result, finished / "model")
    fenced = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text.partition("\n---\n")[2], flags=re.M | re.S)  # blocks of code
    assert fenced.count("\n# ") == 1
    plain = re.sub(r"(?<!\\)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", fenced)  # and code within lines
    assert "<" not in plain
    assert not re.search(r"(?<!\\)[*`]", plain)
    for table in re.findall(r"(?:^\|.*\n?)+", fenced, flags=re.M):
        cells = [len(re.findall(r"(?:\\.|[^|\\])+", line.strip("|"))) for line in table.splitlines()]
        assert len(set(cells)) == 1, table
    assert "Labels: ```` <script>alert('x')</script> # a | `b`" in text
    assert "&lt;script&gt;alert('x')&lt;/script&gt; # a \\| \\`b\\`" in text


def test_a_run_that_knows_little_has_a_card(finished: Path) -> None:
    about = {"task": "sequence-classification", "labels": ["a"], "max_length": 8}
    text = card.card_of("x", about, {"git": {}, "versions": {}}, {"table": [[]]}, finished / "model")
    assert "# x\n\nA model for sequence-classification" in text
    assert "##" not in text.replace("## How to load it", "")


def test_a_destination_is_not_overwritten(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match=r"destination: .* is there already; name a new folder"):
            saved.export(finished, taken)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_saving_again_replaces_the_whole(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = saved.load(finished)
    saved.save(tmp_path / "model", model, task)
    (tmp_path / "model" / "stale").touch()
    with monkeypatch.context() as patched:  # ended half way
        patched.setattr(saved, "json_text", lambda value: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            saved.save(tmp_path / "model", model, task)
    assert (tmp_path / "model" / "stale").exists()
    saved.save(tmp_path / "model", model, task)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "stale").exists()


@pytest.mark.parametrize("name", [".{}.old", ".{}.partial", ".{}.objkern-mynotes1", ".{}.objkern-x"])
def test_what_lies_beside_stays(name: str, finished: Path, tmp_path: Path) -> None:
    """Folders of others, whatever they are called, when a model is saved, exported, and when that fails."""
    for target in ("model", "out"):
        (tmp_path / name.format(target)).mkdir()
        (tmp_path / name.format(target) / "precious").write_text("x")
    pair = saved.load(finished)
    for _ in range(2):
        saved.save(tmp_path / "model", *pair)
    saved.export(tmp_path / "model", tmp_path / "out")
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "out"):
        raise ZeroDivisionError
    assert {path.name for path in tmp_path.iterdir()} == {
        "model", "out", name.format("model"), name.format("out")
    }  # fmt: skip
    assert all((tmp_path / name.format(target) / "precious").exists() for target in ("model", "out"))


def test_what_is_replaced_is_on_the_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []
    target = tmp_path / "a" / "b"
    sync = lambda descriptor: synced.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, target.exists()))  # noqa: E731
    monkeypatch.setattr(os, "fsync", sync)
    with whole_folder(target) as new:  # whose parent is made too
        (new / "part").touch()
    assert sorted(synced) == [("new", False), ("part", False)]
    synced.clear()
    with whole_file(tmp_path / "file") as new:
        new.touch()
    assert synced == [("new", True)]


def test_a_file_with_such_a_name_stays(tmp_path: Path) -> None:
    (tmp_path / ".out.objkern-mynotes1").write_text("x")
    with whole_folder(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".out.objkern-mynotes1", "out"}


def replaced(folder: Path, text: str, kill_after: int | None = None) -> None:
    """By a process of its own, which is killed after so many renames, 0: in the midst of writing."""
    child = os.fork()
    if child == 0:
        rename, count = Path.rename, 0

        def counted(path: Path, target: Path) -> Path:
            nonlocal count
            found, count = rename(path, target), count + 1
            if count == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        Path.rename = counted  # type: ignore[method-assign]
        with whole_folder(folder) as new:
            (new / "a").write_text(text)
            if kill_after == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            (new / "b").write_text(text)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) if kill_after is not None else status == 0


@pytest.mark.filterwarnings("ignore:.*fork")  # of a process with threads, which these children do not use
@pytest.mark.parametrize(("kill_after", "left"), [(0, "first"), (1, None), (2, "second")])
def test_killed_while_a_folder_is_replaced(kill_after: int, left: str | None, tmp_path: Path) -> None:
    """It is whole or not there; the next one knows what the killed one left."""
    folder = tmp_path / "folder [x]"
    replaced(folder, "first")
    for again in (False, True):
        replaced(folder, "second", kill_after)
        assert len(list(tmp_path.iterdir())) == (1 if left is None else 2)
        assert folder.exists() == (left is not None)
        if left is not None:
            assert [(folder / name).read_text() for name in "ab"] == [left, left]
        if again:
            replaced(folder, "first")
            continue
        with pytest.raises(ZeroDivisionError), whole_folder(folder):
            raise ZeroDivisionError  # what was being replaced when that one was killed is back
        assert [(folder / name).read_text() for name in "ab"] == [left or "first"] * 2
        replaced(folder, "first")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert [(folder / name).read_text() for name in "ab"] == ["first", "first"]


def test_what_another_one_writes_stays(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "folder") as mine:
        (mine / "a").write_text("mine")
        with whole_folder(tmp_path / "folder") as theirs:
            (theirs / "b").write_text("theirs")
        assert [path.name for path in (tmp_path / "folder").iterdir()] == ["b"]
    assert (tmp_path / "folder" / "a").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_full_disk_is_one_line(finished: Path, tmp_path: Path, capsys: Any) -> None:
    pair = saved.load(finished)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "the cat", "more": 9000 * "x"}))
    before = rows.read_text()
    with full_disk():
        with pytest.raises(ValueError, match=r"^output: .*model can't be written: .*File too large"):
            saved.save(tmp_path / "model", *pair)
        for main, arguments, place in (
            (export_main, [str(finished), str(tmp_path / "out")], f"destination: {tmp_path / 'out'}"),
            (predict_main, [str(finished), "--input", str(rows), "--output", str(rows)], f"output: {rows}"),
        ):
            capsys.readouterr()
            with pytest.raises(SystemExit) as stopped:
                main(arguments)
            assert stopped.value.code == 2
            assert capsys.readouterr().err.endswith(f"error: {place} can't be written: File too large\n")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert rows.read_text() == before


def test_pickles_are_refused(finished: Path, tmp_path: Path) -> None:
    """A folder that plain transformers would load, and that would run code."""

    class Malicious:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    model, task = saved.load(finished)
    folder = tmp_path / "model"
    saved.save(folder, model, task)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model: .* has no model\.safetensors"):
        saved.load(folder)
    torch.save(Malicious(), folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"holds pytorch_model\.bin, which may be pickles.*expected model\.safetensors"
    ):
        saved.load(folder)
    (folder / "objkern.json").unlink()
    with pytest.raises(ValueError, match=r"holds pytorch_model\.bin, which may be pickles"):
        saved.load(folder)
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_loaded(finished: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match=r"model: expected a folder that a run wrote, with objkern\.json, but"):
        saved.load(tmp_path / "nowhere")
    write_json(tmp_path / "run.json", {})
    with pytest.raises(ValueError, match=r"model: .* is a run that has not finished, and has no model; resume it"):
        saved.load(tmp_path)
    (tmp_path / "run.json").unlink()
    write_json(tmp_path / "search.json", {})
    with pytest.raises(ValueError, match=r"model: .* is a search; its best run is named at the top of .*search\.json"):
        saved.load(tmp_path)
    model, task = saved.load(finished)
    folder = tmp_path / "model"
    saved.save(folder, model, task)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({key: x for key, x in tensors.items() if key != "classifier.weight"}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights: classifier\.weight"):
        saved.load(folder)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model: .* can't be loaded: "):
        saved.load(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"model: no tokenizer can be loaded from .*: "):
        saved.load(folder)
    (folder / "objkern.json").write_text("[")
    with pytest.raises(ValueError, match=r"objkern\.json can't be read"):
        saved.load(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"task": "poetry"}, r", task: expected one of sequence-classification, .* but got 'poetry'"),
        ({"task": ["x"]}, r", task: expected one of sequence-classification, .* but got \['x'\]"),
        ({"task": None}, r", task: expected one of sequence-classification, .* but got nothing"),
        ({"labels": 5}, r", labels: expected a list but got 5"),
        ({"labels": ["good", 5]}, r", labels, item 2: expected a text but got 5"),
        ({"labels": ["good"]}, r", labels: expected 2, as the model has, but got 1"),
        ({"labels": []}, r", labels: expected 2, as the model has, but got 0"),
        ({"max_length": "x"}, r", max_length: expected a whole number but got 'x'"),
        ({"max_length": 0}, r", max_length: expected at least 1 but got 0"),
        ({"problem": "riddle"}, r", problem: expected one of single_label_classification, .* but got 'riddle'"),
        ({"metrics": [1]}, r", metrics: expected an object but got \[1\]"),
        ([], r": expected an object but got \[\]"),
    ],
)
def test_what_the_task_knows_may_have_been_edited(edit: Any, message: str, finished: Path, tmp_path: Path) -> None:
    model, task = saved.load(finished)
    saved.save(tmp_path / "model", model, task)
    path = tmp_path / "model" / "objkern.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit} if edit else edit))
    for use in (saved.load, lambda folder: saved.export(folder, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"^model: .*objkern\.json" + message + "$"):
            use(tmp_path / "model")
    assert not (tmp_path / "out").exists()


def broken(folder: Path) -> dict[str, Callable[[], Any]]:
    """What may have happened to a model's folder."""
    weights = folder / "model.safetensors"
    return {
        "a pickle alone": lambda: weights.rename(folder / "pytorch_model.bin"),
        "weights cut short": lambda: weights.write_bytes(weights.read_bytes()[:1000]),
        "an empty configuration": lambda: (folder / "config.json").write_text("{}"),
        "an empty tokenizer": lambda: (folder / "tokenizer.json").write_text("{}"),
        "another head": lambda: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": 16')
        ),
    }


@pytest.mark.parametrize("what", broken(Path()))
def test_what_does_not_load_is_not_exported(what: str, finished: Path, tmp_path: Path) -> None:
    model, task = saved.load(finished)
    saved.save(tmp_path / "model", model, task)
    broken(tmp_path / "model")[what]()
    with pytest.raises(ValueError, match="model: ") as loading:
        saved.load(tmp_path / "model")
    with pytest.raises(ValueError, match=f"^{re.escape(str(loading.value))}$"):
        saved.export(tmp_path / "model", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_loading_does_not_read_is_not_exported(finished: Path, tmp_path: Path) -> None:
    """Pickles beside the weights, and whatever else lies in the folder; also an export that stands within."""
    model, task = saved.load(finished)
    folder = tmp_path / "model"
    saved.save(folder, model, task)
    parts = {path.name for path in folder.iterdir()}
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "a.pkl", "notes.md", "tokenizer.joblib"):
        (folder / name).write_bytes(b"x")
    (folder / "more").mkdir()
    (folder / "more" / "secret.json").write_text("{}")
    (folder / "base.json").mkdir()
    for destination in (tmp_path / "out", folder / "deploy", folder / "deploy" / "again"):
        saved.export(folder, destination)
        assert {path.name for path in destination.iterdir()} - {"again"} == parts | {"README.md"}
        assert saved.load(destination)[1].labels == task.labels


# ---- the command line -----------------------------------------------------------------------------------------------


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_answers_on_the_command_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": "the cat", "label": "good"}, {"text": "nor it"}]
    answers = saved.predict(finished, rows)
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    capsys.readouterr()
    assert predict_main([str(finished), "--input", str(source), "--text", "it was", "--batch-size", "1"]) == 0
    found = lines(capsys.readouterr().out)
    assert found[:2] == [{**row, "predicted": answer} for row, answer in zip(rows, answers, strict=True)]
    assert found[2]["text"] == "it was"
    monkeypatch.setattr(sys, "stdin", io.StringIO(source.read_text() + "\n\n"))
    assert predict_main([str(finished), "--input", "-", "--output", str(tmp_path / "out.jsonl")]) == 0
    assert lines((tmp_path / "out.jsonl").read_text()) == found[:2]


def test_how_long_an_answer_may_be(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task, rows = trained("causal-lm", tmp_path / "run")
    saved.save(tmp_path / "model", model, task)
    words = [str(tmp_path / "model"), "--text", asked(task, rows)[0]["text"]]
    seen: list[int] = []
    generate = type(model).generate
    monkeypatch.setattr(
        type(model), "generate", lambda self, **o: seen.append(o["max_new_tokens"]) or generate(self, **o)
    )
    for more in ([], ["--max-new-tokens", "5"]):
        assert predict_main([*words, *more]) == 0
    assert seen[1] == 5 < seen[0]
    capsys.readouterr()
    for bad, message in (
        ([*words, "--max-new-tokens", "0"], "max_new_tokens: expected a whole number of at least 1 but got 0"),
        ([str(finished), "--text", "x", "--max-new-tokens", "5"], "max_new_tokens: sequence-classification writes no"),
    ):
        with pytest.raises(SystemExit):
            predict_main(bad)
        assert message in capsys.readouterr().err


def test_answers_may_replace_the_rows(finished: Path, tmp_path: Path, capsys: Any) -> None:
    """Half of a surrogate pair, which UTF-8 can't hold, is as it was; a link goes on pointing to the file."""
    path, link = tmp_path / "rows.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(path)
    path.write_text('{"text": "the cat", "more": "\\ud83d ä"}\n')
    path.chmod(0o640)
    assert predict_main([str(finished), "--input", str(path), "--output", str(link)]) == 0
    assert "ä" in path.read_text(encoding="utf-8")
    (found,) = lines(path.read_text(encoding="utf-8"))
    assert found == {"text": "the cat", "more": "\ud83d ä", "predicted": found["predicted"]}
    assert (link.is_symlink(), path.stat().st_mode & 0o777) == (True, 0o640)
    assert predict_main([str(finished), "--input", str(path)]) == 0
    assert lines(capsys.readouterr().out) == [found]
    assert {file.name for file in tmp_path.iterdir()} == {"rows.jsonl", "link.jsonl"}


def test_a_link_that_somebody_left_is_replaced(tmp_path: Path) -> None:
    """What it points to is none of a run's."""
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "link").symlink_to("mine")
    (tmp_path / "nowhere").symlink_to("gone")
    for name in ("link", "nowhere"):
        with whole_file(tmp_path / name) as new:
            new.write_text("report")
        assert (tmp_path / name).read_text() == "report"
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "mine").read_text() == "kept"
    assert not (tmp_path / "gone").exists()


def test_a_file_that_is_not_finished_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    with suppress(ZeroDivisionError), whole_file(tmp_path / "file") as new:
        new.write_text("half")
        raise ZeroDivisionError
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "before")]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """As a device is."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with whole_file(pipe) as new:
            new.write_text("x")
        assert pipe.is_fifo()
        assert os.read(reader, 9) == b"x"
    finally:
        os.close(reader)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("token-classification", {"words": ["the", "cat"]}),
        ("causal-lm", {"prompt": "the cat"}),
        ("seq2seq", {"source": "the cat"}),
        ("question-answering", None),
    ],
)
def test_a_text_for_every_task(name: str, row: dict[str, Any] | None, tmp_path: Path, capsys: Any) -> None:
    task = task_of(name, rows_of(name, 8))
    saved.save(tmp_path / "model", model_of(task), task)
    capsys.readouterr()
    if row is None:
        with pytest.raises(SystemExit):
            predict_main([str(tmp_path / "model"), "--text", "the cat"])
        message = "text: question-answering takes question and context; give rows with them by --input"
        assert message in capsys.readouterr().err
        return
    assert predict_main([str(tmp_path / "model"), "--text", "the cat"]) == 0
    (found,) = lines(capsys.readouterr().out)
    assert found == {**row, "predicted": found["predicted"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "input: expected --input or --text, and got neither"),
        (["--text", "x", "--batch-size", "0"], "batch_size: expected a whole number of at least 1 but got 0"),
        (["--text", "x", "--device", "tpu9"], "device: expected cpu, cuda or cuda:1 but got 'tpu9'"),
        (["--text", "x", "--device", "meta"], "device: expected cpu, cuda or cuda:1 but got 'meta'"),
        (["--text", "x", "--device", "cuda:99"], "device: cuda:99 is not there; torch sees "),
        (["--text", " "], "text, row 1, column 'text': expected a text but got ' '"),
        (["--input", "nowhere.jsonl"], "data: 'nowhere.jsonl' does not exist"),
        (["--input", "-"], "standard input, line 2: "),
        (
            ["--text", "x", "--output", "/nowhere/out.jsonl"],
            "output: /nowhere/out.jsonl can't be written: No such file",
        ),
        (["--text", "x", "--output", "."], "output: . can't be written: Is a directory"),
        (["--text", "x", "--output", 300 * "x"], f"output: {300 * 'x'} can't be written: File name too long"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, finished: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"text": "x"}\n{"text":\n'))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        predict_main([str(finished), *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("python -m objkern predict: error: ")
    assert message in error


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b'{"text": "\xff"}', "standard input is not UTF-8: "),
        (b"[1]", "standard input, line 1: expected an object with columns but got '[1]'"),
        (b"\n" + 100_000 * b"[", "standard input, line 2: "),
        (b'{"x": 1' + 5000 * b"0" + b"}", "standard input, line 1: "),
    ],
)
def test_bad_lines_of_standard_input(
    given: bytes, message: str, finished: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        predict_main([str(finished), "--input", "-"])
    assert stopped.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"python -m objkern predict: error: {message}")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device: torch.ones(()))
    for name in ("cpu", "cuda", "cuda:0"):
        assert deploy._device(name) == torch.device(name)
    with pytest.raises(ValueError, match="device: cuda:1 is not there; torch sees 1 GPUs"):
        deploy._device("cuda:1")


def test_what_is_missing_is_one_line(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in ("tokenizers", "tqdm") else name)
    with pytest.raises(SystemExit):
        predict_main(["model", "--text", "x"])
    assert "error: fine-tuning needs tokenizers, tqdm: pip install tokenizers tqdm" in capsys.readouterr().err


def test_a_name_that_is_too_long(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        predict_main([300 * "x", "--text", "x"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("x/objkern.json: File name too long\n")


def test_missing_weights_are_one_line(finished: Path, tmp_path: Path, capsys: Any, caplog: Any) -> None:
    """Without the table that transformers prints of them."""
    from safetensors.torch import load_file, save_file

    saved.save(tmp_path / "model", *saved.load(finished))
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    save_file({key: x for key, x in tensors.items() if key != "classifier.weight"}, weights, {"format": "pt"})
    transformers.logging.set_verbosity_warning()
    capsys.readouterr()
    caplog.clear()
    with pytest.raises(SystemExit):
        predict_main([str(tmp_path / "model"), "--text", "x"])
    assert caplog.records == []
    (error,) = capsys.readouterr().err.splitlines()
    assert error.endswith("model lacks weights: classifier.weight")


def test_a_language_model_needs_something_to_continue(tmp_path: Path) -> None:
    task = task_of("causal-lm", rows_of("causal-lm", 8))
    pair = (model_of(task), task)
    rows = [{"prompt": "the cat"}, {"text": "the cat"}, {"prompt": "the cat", "completion": "sat"}]
    assert len(set(saved.predict(pair, rows))) == 1
    with pytest.raises(
        ValueError, match=r"rows, row 1: expected a column prompt, text or messages but got \['words'\]"
    ):
        saved.predict(pair, [{"words": 1}])


# ---- ONNX -----------------------------------------------------------------------------------------------------------

WITH_ONNX = all(find_spec(name) is not None for name in ("onnx", "onnxscript"))


@pytest.mark.skipif(WITH_ONNX, reason="onnx is here")
def test_onnx_says_what_it_needs(finished: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        export_main([str(finished), str(tmp_path / "out"), "--onnx"])
    assert stopped.value.code == 2
    assert "pip install onnx" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["sequence-classification", "question-answering", "causal-lm", "seq2seq"])
def test_what_onnx_is_given(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass of tensors alone, its inputs with names, and sizes that may be others."""
    task = task_of(name, rows_of(name, 8))
    model = model_of(task).eval()
    given: list[Any] = []
    monkeypatch.setattr(torch.onnx, "export", lambda *arguments, **options: given.append((arguments, options)))
    onnx.write_onnx(tmp_path / "model.onnx", model, task)
    (((wrapped, inputs, path), options),) = given
    assert path == str(tmp_path / "model.onnx")
    assert options["dynamo"]
    assert not options["external_data"]
    names = options["input_names"]
    assert names[:2] == ["input_ids", "attention_mask"]
    assert ("token_type_ids" in names) == ("token_type_ids" in task.tokenizer.model_input_names)
    assert ("decoder_input_ids" in names) == (name == "seq2seq")
    assert len({x.shape for x in inputs}) == (2 if name == "seq2seq" else 1)
    for x in inputs:  # no size is 1, and no token without a vector
        assert x.ndim == 2
        assert min(x.shape) > 1
        assert x.max() < model.config.vocab_size
    assert len(set(inputs[0].flatten().tolist())) > 2
    (sizes,) = options["dynamic_shapes"]
    answers = [place for place, given_name in enumerate(names) if given_name.startswith("decoder")]
    for place, size in enumerate(sizes):
        assert [size[k].__name__ for k in (0, 1)] == ["rows", "answer_tokens" if place in answers else "tokens"]
    found = wrapped(*inputs)
    assert len(found) == len(options["output_names"]) == (2 if name == "question-answering" else 1)
    with torch.no_grad():
        expected = model(**dict(zip(names, inputs, strict=True)))
    for key, x in zip(options["output_names"], found, strict=True):
        torch.testing.assert_close(x, expected[key])
    assert wrapped.options == ({"use_cache": False} if task.name in ("causal-lm", "seq2seq") else {})
    monkeypatch.setattr(torch.onnx, "export", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ValueError, match=r"onnx: \w+ can't be written: division by zero"):
        onnx.write_onnx(tmp_path / "model.onnx", model, task)


def test_what_onnx_cannot_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == missing else name)
    missing = "onnxscript"
    with pytest.raises(ValueError, match="onnx: needs onnxscript: pip install onnxscript"):
        onnx.require_onnx(tmp_path)
    missing = ""
    onnx.require_onnx(tmp_path)
    (tmp_path / adapters.CONFIG).touch()
    with pytest.raises(ValueError, match="onnx: a model with prompt vectors can't be written"):
        onnx.require_onnx(tmp_path)


@pytest.mark.skipif(not WITH_ONNX, reason="needs onnx and onnxscript")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["question-answering", "seq2seq"])
def test_onnx_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    """For other numbers of rows and tokens than it was written with, by ONNX's own slow evaluator or by its runtime."""
    task = task_of(name, rows_of(name, 8))
    model = model_of(task).eval()
    saved.save(tmp_path / "model", model, task)
    saved.export(tmp_path / "model", tmp_path / "out", onnx=True)
    ids = torch.tensor([[1, 5, 9, 17, 2], [1, 8, 2, 0, 0], [1, 4, 4, 2, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    if name == "seq2seq":
        inputs["decoder_input_ids"] = ids[:, :4]
    arrays = {key: x.numpy() for key, x in inputs.items()}
    with torch.no_grad():
        out = model(**inputs)
    expected = [out[key] for key in ("logits", "start_logits", "end_logits") if key in out]
    path = str(tmp_path / "out" / "model.onnx")
    if find_spec("onnxruntime") is not None:
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        wanted = {given.name for given in session.get_inputs()}
    else:
        from onnx.reference import ReferenceEvaluator

        session = ReferenceEvaluator(path)
        wanted = set(session.input_names)
    found = session.run(None, {key: x for key, x in arrays.items() if key in wanted})
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=1e-4, atol=1e-5)


def test_the_objective_stays_attached_to_what_is_trained(tmp_path: Path) -> None:
    """Saving in the midst of training changes nothing about the model."""
    model, task, _ = trained("causal-lm", tmp_path / "run")
    objective = objkern.CrossEntropy()
    objkern.transformers.attach(model, objective)
    saved.save(tmp_path / "model", model, task)
    assert is_attached(model, objective)
