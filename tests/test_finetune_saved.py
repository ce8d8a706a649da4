"""Models that were saved: stock for transformers and bit-equal, answers that stay the same, no pickles, deployment."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

import objkern  # noqa: E402
from objkern.finetune import saved  # noqa: E402
from objkern.finetune.deploy import export_main, predict_main  # noqa: E402
from objkern.finetune.record import write_json  # noqa: E402
from objkern.finetune.tasks import Task  # noqa: E402
from objkern.finetune.training import TrainingOptions  # noqa: E402
from objkern.transformers import is_attached  # noqa: E402

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
        patched.setattr(saved, "write_json", lambda path, value: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            saved.save(tmp_path / "model", model, task)
    assert (tmp_path / "model" / "stale").exists()
    saved.save(tmp_path / "model", model, task)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "stale").exists()


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
    with pytest.raises(ValueError, match=r"model: the tokenizer of .* can't be read: "):
        saved.load(folder)
    (folder / "objkern.json").write_text('{"task": "poetry"}')
    with pytest.raises(ValueError, match=r"objkern\.json: expected one of sequence-classification, .* as task"):
        saved.load(folder)
    (folder / "objkern.json").write_text("[")
    with pytest.raises(ValueError, match=r"objkern\.json can't be read"):
        saved.load(folder)


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
        (["--text", "x", "--device", "cuda:99"], "device: cuda:99 is not there; torch sees "),
        (["--text", " "], "text, row 1, column 'text': expected a text but got ' '"),
        (["--input", "nowhere.jsonl"], "data: 'nowhere.jsonl' does not exist"),
        (["--input", "-"], "standard input, line 2: "),
        (
            ["--text", "x", "--output", "/nowhere/out.jsonl"],
            "output: /nowhere/out.jsonl can't be written: No such file",
        ),
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
