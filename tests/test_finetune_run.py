"""Runs from files to a folder, by the command line; small models from scratch; the search."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

import objkern  # noqa: E402
from objkern.__main__ import main as command  # noqa: E402
from objkern.finetune import checkpoints, cli, saved, search, small  # noqa: E402
from objkern.finetune import run as runs  # noqa: E402
from objkern.finetune.lock import alone_in  # noqa: E402
from objkern.finetune.run import RunOptions  # noqa: E402
from objkern.finetune.small import SmallModel  # noqa: E402
from objkern.finetune.tasks import TASKS  # noqa: E402
from objkern.finetune.training import TrainingOptions  # noqa: E402

from .test_finetune_tasks import tokenizer_of_words  # noqa: E402
from .test_finetune_training import rows_of, task_of  # noqa: E402

SIZES = ["--hidden-size", "32", "--layers", "2", "--heads", "2", "--vocabulary", "400", "--max-length", "64"]
QUICK = [*SIZES, "--epochs", "2", "--batch-size", "4", "--device", "cpu"]


def written(folder: Path, name: str, count: int = 24) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows_of(name, count))), encoding="utf-8")
    return path


def finetune(*words: str | Path) -> int:
    return command(["finetune", *map(str, words)])


@pytest.mark.parametrize("name", list(TASKS))
def test_a_run_from_a_file_to_a_folder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = written(tmp_path, name)
    out = tmp_path / "run"
    assert finetune(name, data, "--output", out, *QUICK) == 0
    printed = capsys.readouterr().out
    assert "epoch 2" in printed
    assert "Written to" in printed
    asked = json.loads((out / "run.json").read_text())
    assert (asked["task"], asked["model"]) == (name, "from scratch")
    assert asked["data"] == {"train": 22, "dev": 2}
    result = json.loads((out / "result.json").read_text())
    assert result["how"] == "finished"
    assert result["untrained"].keys() == result["dev"].keys()
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["event"] for r in records].count("step") == result["steps"] == 12
    model, task = saved.load(out / "model")
    rows = rows_of(name, 24)[:2]
    assert len(task.predict(model, rows)) == 2
    assert (out / "report.html").stat().st_size > 10_000

    assert finetune(name, data, "--output", out, *QUICK) == 2  # which would overwrite it
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.slow
def test_interrupted_and_resumed_by_the_same_command(tmp_path: Path) -> None:
    """SIGTERM in the middle of an epoch: exit status 3, and with --resume the very weights of an undisturbed run."""
    data = written(tmp_path, "sequence-classification", 40)
    base = ["sequence-classification", data, *QUICK, "--dropout", "0.2"]
    assert finetune(*base, "--output", tmp_path / "whole") == 0
    code = f"""
import os, signal, sys
from objkern.finetune import cli, run
original = cli.main.__globals__["_show"]
from objkern.finetune import record
called = record.Recorder.__call__
def counted(self, entry):
    called(self, entry)
    if entry["event"] == "step" and entry["step"] == 4:
        os.kill(os.getpid(), signal.SIGTERM)
record.Recorder.__call__ = counted
sys.exit(cli.main({[*map(str, base), "--output", str(tmp_path / "cut")]!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert done.returncode == 3, done.stderr
    assert "Interrupted after step" in done.stdout
    assert json.loads((tmp_path / "cut" / "result.json").read_text())["how"] == "interrupted"
    assert finetune(*base, "--output", tmp_path / "cut", "--resume") == 0
    whole, cut = (saved.load(tmp_path / name / "model")[0].state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    steps = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if s["event"] == "step"] == list(range(1, 19))
    result = json.loads((tmp_path / "cut" / "result.json").read_text())
    assert sum(s["seconds"] for s in steps if s["event"] == "step") < result["seconds"] < 180  # of both sessions


def test_a_resumed_run_must_be_the_same(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = written(tmp_path, "sequence-classification")
    out = tmp_path / "run"
    assert finetune("sequence-classification", data, "--output", out, "--resume", *QUICK) == 2
    assert "holds no run" in capsys.readouterr().err
    assert not out.exists()
    assert finetune("sequence-classification", data, "--output", out, *QUICK) == 0
    words = ["sequence-classification", data, "--output", out, "--resume", *QUICK]
    assert finetune(*words, "--objective", "CrossEntropy() + 0.1*ZLoss()") == 2
    assert "objective None → 'CrossEntropy() + 0.1*ZLoss()'" in capsys.readouterr().err
    assert finetune(*words, "--clip", "2") == 2
    assert "clip 1.0 → 2.0" in capsys.readouterr().err
    rows = data.read_text()
    data.write_text(rows.replace("the", "thy"))
    assert finetune(*words) == 2
    assert "other rows in the data" in capsys.readouterr().err
    data.write_text(rows)
    start = out / "start" / "model.safetensors"  # which is not made anew
    save_file({name: x.neg() for name, x in load_file(start).items()}, start, metadata={"format": "pt"})
    assert finetune(*words) == 2
    assert "another model or tokenizer" in capsys.readouterr().err


def test_one_process_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data, out = written(tmp_path, "sequence-classification"), tmp_path / "run"
    out.mkdir()
    with alone_in(out):
        assert finetune("sequence-classification", data, *QUICK, "--output", out) == 2
        assert "another process is at work in" in capsys.readouterr().err
        words = ["--learning-rate", "{1e-4..1e-2}", "--search", "2"]
        assert finetune("sequence-classification", data, *QUICK, "--output", out, *words) == 2
        assert "another process is at work in" in capsys.readouterr().err
    with alone_in(out):  # it went with the one who had it
        pass


def test_what_is_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data, out = written(tmp_path, "sequence-classification"), tmp_path / "run"
    base = ["sequence-classification", data, *QUICK, "--output", out]
    (out / "checkpoints" / "step-00000012").mkdir(parents=True)
    assert finetune(*base) == 2
    assert "holds checkpoints of something else" in capsys.readouterr().err
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000012"]
    (out / "checkpoints" / "step-00000012").rmdir()
    (out / "checkpoints").rmdir()
    pytest.importorskip("optuna")
    mine = out / "trial-0000" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("precious")
    searched = [*base, "--learning-rate", "{1e-4..1e-2}", "--search", "1"]
    assert finetune(*searched) == 2
    assert "trial-0000 is there already, of something else" in capsys.readouterr().err
    assert mine.read_text() == "precious"
    assert finetune(*base) == 2
    assert "holds study.db of something else" in capsys.readouterr().err
    (out / "study.db").write_bytes(b"no database")
    assert finetune(*searched) == 2
    assert "study.db can't be used as a study" in capsys.readouterr().err


def test_a_run_goes_on_with_what_it_began_with(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data, out = written(tmp_path, "sequence-classification"), tmp_path / "run"
    base = ["sequence-classification", data, *QUICK]
    assert finetune(*base, "--output", tmp_path / "first") == 0
    words = [*base, "--model", tmp_path / "first" / "model", "--output", out]
    assert finetune(*words) == 0
    weights = tmp_path / "first" / "model" / "model.safetensors"
    tensors = {name: x.neg() for name, x in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    assert finetune(*words, "--resume") == 2
    assert "another model or tokenizer" in capsys.readouterr().err
    options = cli.options_from(cli.parser().parse_args(list(map(str, [*base, "--output", tmp_path / "first"]))))
    with pytest.raises(ValueError, match=r"objective CrossEntropy\(\) → ZLoss\(\)"):
        runs.run(options, resume=True, objective=objkern.ZLoss())
    weights.write_bytes(weights.read_bytes()[:1000])
    assert finetune(*words[:-1], tmp_path / "other") == 2
    assert "can't be loaded for sequence-classification" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("run.json", "{}"), ("run.json", "[]"), ("run.json", '{"a'),
        ("state.json", "{}"), ("state.json", "[]"), ("state.json", None),
        ("best", None),
    ],
)  # fmt: skip
def test_an_edited_record_is_refused_when_a_run_is_resumed(
    file: str, text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data, out = written(tmp_path, "sequence-classification"), tmp_path / "run"
    words = ["sequence-classification", data, *QUICK, "--output", out]
    assert finetune(*words) == 0
    (path,) = [path for path in out.rglob(file) if "best" not in path.parts or file == "best"]
    if file == "best":
        shutil.rmtree(path)
    elif text is None:  # a step that is no number
        state = json.loads(path.read_text())
        state["progress"]["step"] = str(state["progress"]["step"])
        path.write_text(json.dumps(state))
    else:
        path.write_text(text)
    capsys.readouterr()
    assert finetune(*words, "--resume") == 2
    error = capsys.readouterr().err
    assert str(path if file == "run.json" else out / "checkpoints") in error
    assert "is not what" in error or file == "best"
    assert error.count("\n") == 1


def test_a_checkpoint_without_some_of_its_tensors_is_refused(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, "step-00000001", {"a": torch.ones(2), "optimizer.0.exp_avg": torch.ones(2)}, {})
    path = tmp_path / "step-00000001" / "tensors.safetensors"
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="2 tensors were written, 1 are there"):
        checkpoints.load(path.parent)


def test_words_beyond_what_the_model_has_places_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data, out = tmp_path / "long.jsonl", tmp_path / "run"
    rows = [{"text": f"{'the cat ' * 30}{k}", "label": str(k % 2)} for k in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tmp_path / "model"
    assert finetune("sequence-classification", data, *QUICK, "--output", out) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    tokenizer.model_max_length = 10**30  # as of many that nobody told
    tokenizer.save_pretrained(model)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(model)
    words = ["--model", model, "--max-length", "64", "--output", tmp_path / "other"]
    assert finetune("sequence-classification", data, *QUICK, *words) == 2
    assert "model: it can't take these texts, of up to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "/nowhere/at/all"], "folder '/nowhere/at/all' does not exist"),
        (["--device", "cuda:99"], "device: 'cuda:99' can't be used"),
        (["--output", "/dev/null/x"], "/dev/null/x"),
        (["--epochs", "-1"], "epochs: expected a whole number of at least 1 but got -1"),
        (["--objective", "CrossEntropy() + Nothing()"], "Nothing"),
        (["--objective", "BinaryCrossEntropy()"], "objective: expected terms over classes"),
        (["--pack"], "pack: expected the task causal-lm"),
        (["--hidden-size", "30"], "hidden_size: expected a multiple of 2 * heads"),
        (["--dropout", "1"], "dropout: expected a number in [0, 1) but got 1.0"),
        (["--retain", "memory:1"], "retain"),
        (["--retain", "l2sp:1", "--strategy", "gradual"], "retain: expected kl beside gradual"),
        (["--retain", "ewc:1"], "retain_data: expected data"),
        (["--metric", "beauty"], "metric: expected one of accuracy"),
        (["--strategy", "last:7"], "strategy: expected at most last:2, which is all its layers"),
        (["--strategy", "prompt:3", "--retain", "kl:1"], "retain: expected another strategy than prompt beside kl"),
        (["--learning-rate", "{1e-4..1e-3}"], "braces are for a search: add --search RUNS"),
        (["--device", "meta"], "device: 'meta' can't be used"),
        (["--learning-rate", "1e38"], "learning_rate: expected a positive number below 1e+06 but got 1e+38"),
        (["--seed", str(10**30)], "seed: expected a whole number in [0, 2**32)"),
        (["--output", ""], "output: expected the name of a folder"),
        (["--objective", ""], "python -m objkern finetune: error: "),
    ],
)  # fmt: skip
def test_bad_options_fail_before_training(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = written(tmp_path, "sequence-classification")
    output = [] if "--output" in words else ["--output", tmp_path / "run"]
    assert finetune("sequence-classification", data, *QUICK, *output, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_rows_are_held_back_where_a_source_has_no_others(tmp_path: Path) -> None:
    options = RunOptions("sequence-classification", str(written(tmp_path, "sequence-classification", 30)), tmp_path)
    splits = runs.splits_of(options)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 27, "dev": 3}
    assert splits == runs.splits_of(options)
    texts = [row["text"] for rows in splits.values() for row in rows]
    assert sorted(texts) == sorted(row["text"] for row in rows_of("sequence-classification", 30))
    other = runs.splits_of(replace(options, training=TrainingOptions(seed=1)))
    assert other == splits  # runs of several seeds are judged by the same rows
    assert splits["dev"] != rows_of("sequence-classification", 30)[:3]
    (tmp_path / "folder").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "folder" / f"{split}.jsonl").write_text('{"text": "the cat", "label": "x"}\n')
    named = runs.splits_of(replace(options, train=str(tmp_path / "folder")))
    assert {name: len(rows) for name, rows in named.items()} == {"train": 1, "dev": 1, "test": 1}


def test_dropout_is_set_everywhere_but_for_whole_layers() -> None:
    config = transformers.BertConfig(hidden_dropout_prob=0.3)
    runs._set_dropout(config, 0.05)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.classifier_dropout) == (0.05,) * 3
    bart = transformers.BartConfig(encoder_layerdrop=0.25)
    runs._set_dropout(bart, 0.05)
    assert (bart.dropout, bart.encoder_layerdrop) == (0.05, 0.25)


@pytest.mark.parametrize("name", ["sequence-classification", "token-classification", "question-answering"])
def test_adapters_beside_a_head_that_trains_whole(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    assert (
        finetune(name, written(tmp_path, name, 12), "--output", tmp_path / "run", "--strategy", "lora:2", *QUICK) == 0
    )
    start = transformers.AutoModel.from_pretrained(tmp_path / "run" / "start").state_dict()
    model, _ = saved.load(tmp_path / "run" / "model")
    body = model.base_model.state_dict()
    changed = {key for key, x in start.items() if not torch.equal(x, body[key])}
    linear = {key for key in start if key.endswith(("Wqkv.weight", "Wo.weight", "Wi.weight"))}
    assert changed == linear  # by the adapters, which are merged
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    head = sum(p.numel() for key, p in model.named_parameters() if not key.startswith("model."))
    adapters = sum(2 * sum(start[key].shape) for key in linear)
    assert result["trained_parameters"] == head + adapters


def test_prompt_vectors_are_refused_where_each_token_has_an_answer(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("peft")
    data = written(tmp_path, "token-classification", 12)
    assert finetune("token-classification", data, "--output", tmp_path / "run", "--strategy", "prompt:2", *QUICK) == 2
    assert "strategy: prompt vectors would be tokens with answers" in capsys.readouterr().err


def test_every_row_is_checked_before_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = written(tmp_path, "sequence-classification")
    words = ["sequence-classification", data, "--output", tmp_path / "run", *QUICK]
    for name, text, message in (
        ("empty", "", "dev data: there are no rows"),
        ("other", '{"words": ["a"]}', "other.jsonl, row 1, column 'text'"),
        ("unlabelled", '{"text": "a"}', "unlabelled.jsonl, row 1, column 'label'"),
        ("unknown", '{"text": "a", "label": "neither"}', "'neither' does not occur in training"),
    ):
        (tmp_path / f"{name}.jsonl").write_text(text)
        assert finetune(*words, "--dev", tmp_path / f"{name}.jsonl") == 2
        assert message in capsys.readouterr().err
    (tmp_path / "alike.jsonl").write_text('{"text": "a", "label": "x"}\n' * 9)
    assert finetune(words[0], tmp_path / "alike.jsonl", *words[2:]) == 2
    assert "column 'label': expected at least two classes but every row has 'x'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_label_that_occurs_once_stays_in_training(tmp_path: Path) -> None:
    rows = [{"text": f"text {k}", "label": str(k) if k < 5 else "rest"} for k in range(20)]
    for first in range(20):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, [*rows[first:], *rows[:first]])))
        splits = runs.splits_of(RunOptions("sequence-classification", str(path), tmp_path))
        assert {row["label"] for row in splits["train"]} == {"0", "1", "2", "3", "4", "rest"}
        assert len(splits["dev"]) == 2


@pytest.mark.parametrize(
    ("task", "rows"),
    [
        ("causal-lm", [{"text": f"text {k}", "label": f"id-{k}", "tags": [str(k)]} for k in range(50)]),
        ("sequence-classification", [{"text": f"text {k}", "label": k if k % 7 else k + 0.5} for k in range(50)]),
    ],
)
def test_columns_without_classes_do_not_say_what_is_held_back(
    task: str, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    dev = runs.splits_of(RunOptions(task, str(path), tmp_path))["dev"]
    assert len(dev) == 5
    assert any(isinstance(row["label"], int | str) for row in dev)


def test_rows_that_are_held_back_leave_one_of_every_label() -> None:
    rows = [{"text": "x", "label": label} for label in "aabbc"]
    assert runs._held(rows, [4, 0, 1, 2, 3], 2, "label") == {0, 2}
    assert runs._held(rows, [4, 0, 1, 2, 3], 9, "label") == {0, 2}
    assert runs._held(rows, [4, 0, 1, 2, 3], 2, None) == {4, 0}
    assert runs._held(rows[3:], [1, 0], 1, "label") == {1}  # there has to be one
    tagged = [{"tags": tags} for tags in (["O", "B-x"], ["O"], ["B-x", "O"], ["B-y"])]
    assert runs._held(tagged, [3, 2, 1, 0], 4, "tags") == {2, 1}
    for label, classes in ((None, set()), (1, {"1"}), (("x", "y"), {"x", "y"}), (["O", "B-x"], {"O", "B-x"})):
        assert runs._classes_in(label) == classes


def test_two_rows_are_enough(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    options = RunOptions("causal-lm", str(path), tmp_path)
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert {name: len(rows) for name, rows in runs.splits_of(options).items()} == {"train": 1, "dev": 1}
    path.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="train: expected at least 2 rows, one of them to judge by, but got 1"):
        runs.splits_of(options)


def test_weights_are_float32_whatever_they_were_saved_in(tmp_path: Path) -> None:
    data = written(tmp_path, "sequence-classification", 12)
    assert finetune("sequence-classification", data, "--output", tmp_path / "first", *QUICK) == 0
    transformers.AutoModel.from_pretrained(tmp_path / "first" / "start", dtype=torch.bfloat16).save_pretrained(
        tmp_path / "half"
    )
    transformers.AutoTokenizer.from_pretrained(tmp_path / "first" / "start").save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    words = ["sequence-classification", data, "--output", tmp_path / "second", "--model", tmp_path / "half", *QUICK]
    assert finetune(*words) == 0
    assert {p.dtype for p in saved.load(tmp_path / "second" / "model")[0].parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "formula"),
    [("number", "CrossEntropy()"), ("several", "CrossEntropy()"), ("causal-lm", "MeanSquaredError()")],
)
def test_an_objective_of_another_kind_is_refused(name: str, formula: str, tmp_path: Path, capsys: Any) -> None:
    task = name if name in TASKS else "sequence-classification"
    assert finetune(task, written(tmp_path, name), "--output", tmp_path / "run", "--objective", formula, *QUICK) == 2
    assert "objective: expected terms" in capsys.readouterr().err


# ---- small models ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_small_model_is_the_same_from_process_to_process(tmp_path: Path) -> None:
    """One of each kind: words and tags, a decoder, an encoder and a decoder."""
    code = """
import hashlib, sys
from pathlib import Path
from objkern.finetune.small import SmallModel, make
from objkern.finetune.tasks import TASKS
from tests.test_finetune_training import rows_of
for name in ("token-classification", "causal-lm", "seq2seq"):
    folder = make(Path(sys.argv[1], name), TASKS[name], rows_of(name, 60), SmallModel(32, 2, 2), 64, 3)
    for file in ("tokenizer.json", "model.safetensors"):
        print(hashlib.sha256((folder / file).read_bytes()).hexdigest())
"""
    printed = [
        subprocess.run([sys.executable, "-c", code, str(tmp_path / k)], capture_output=True, text=True,
                       env={"PYTHONHASHSEED": k, "PYTHONPATH": str(Path(__file__).parent.parent)}, check=True).stdout
        for k in ("1", "2")
    ]  # fmt: skip
    assert printed[0] == printed[1]
    assert len(set(printed[0].split())) == 6


def test_what_a_byte_level_tokenizer_writes_is_what_it_read() -> None:
    tokenizer = small.byte_pairs(["the cat sat", "naïve 東京"], 300, 64, ends=True)
    for text in ("the  dog\n sat.", "東京 🙂", ""):
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_texts_of_rows() -> None:
    row = {"text": "a b", "label": "no", "words": ["c", "d"], "messages": [{"role": "user", "content": "e"}],
           "answers": {"text": ["f"], "answer_start": [1]}}  # fmt: skip
    assert list(small.texts_of(row)) == ["a b", "c d", "user", "e", "f"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SmallModel(layers=0), "layers: expected a whole number"),
        (lambda: SmallModel(hidden_size=12, heads=4), "hidden_size: expected a multiple of 2"),
        (lambda: SmallModel(dropout=1.0), "dropout"),
        (lambda: RunOptions("poetry", "x", Path("y")), "task: expected one of"),
        (lambda: RunOptions("causal-lm", "x", Path("y"), limit=0), "limit"),
        (
            lambda: RunOptions("causal-lm", "x", Path("y"), max_length=7),
            r"max_length: expected a whole number in \[8, 1048576\] but got 7",
        ),
        (lambda: RunOptions("causal-lm", "x", Path("y"), dropout=-0.1), r"dropout: expected a number in \[0, 1\)"),
        (lambda: RunOptions("causal-lm", "x", Path("y"), dropout=1.0), r"dropout: expected a number in \[0, 1\)"),
        (
            lambda: RunOptions("causal-lm", "x", Path("y"), pack=True, training=TrainingOptions(strategy="prompt:3")),
            "pack: expected no prompt vectors",
        ),
        (
            lambda: RunOptions("token-classification", "x", Path("y"), training=TrainingOptions(parallel="tensor")),
            "parallel: tensor splits the head of a language model",
        ),
    ],
)
def test_bad_sizes(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_nobody_asks_for() -> None:
    """As the documentation has it; and the least that can be asked for."""
    options = RunOptions("causal-lm", "x", Path("y"))
    assert options == RunOptions("causal-lm", "x", Path("y"), device="auto", max_length=256, pack=False)
    assert {options.dev, options.test, options.model, options.objective, options.retain, options.limit} == {None}
    RunOptions("causal-lm", "x", Path("y"), max_length=8, limit=1, dropout=0.0, pack=True)
    RunOptions("causal-lm", "x", Path("y"), dropout=0.9)


# ---- parts of a run -------------------------------------------------------------------------------------------------


def prepared(folder: Path, name: str, *words: str | Path) -> Any:
    options = cli.parser().parse_args(
        [*map(str, (name, written(folder, name, 12), *QUICK, "--output", folder, *words))]
    )
    return runs.prepare(cli.options_from(options))


def test_a_new_head_is_one_of_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another task's model here, which has as many classes as this one has not."""
    prepared(tmp_path, "token-classification")
    (tmp_path / "start").rename(tmp_path / "other")
    same: list[Any] = []
    monkeypatch.setattr(runs.parallel, "same_weights", same.append)
    heads = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = prepared(tmp_path, "sequence-classification", "--model", tmp_path / "other").model
        heads.append(model.classifier.weight)
        assert same.pop() is model
    assert torch.equal(*heads)


def test_texts_are_packed_and_what_was_is_kept_in_mind(tmp_path: Path) -> None:
    found = prepared(tmp_path, "causal-lm", "--pack", "--retain", "l2sp:0.5")
    assert found.task.pack
    assert len(found.examples) < 11
    assert "0.5*L2SP(" in str(found.objective)
    kept = written(tmp_path, "sequence-classification", 12)
    found = prepared(tmp_path, "sequence-classification", "--retain", "ewc:0.5", "--retain-data", kept)
    assert "0.5*EWC(" in str(found.objective)
    found = prepared(tmp_path, "sequence-classification", "--retain", "kl:0.5")
    assert "0.5*KLDivergence(" in str(found.objective)
    assert found.reference is not None


def test_what_a_run_needs_and_what_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two checkpoints, the best weights twice and the model; scores of the split that was meant for them."""
    needed, drawn = [], []
    monkeypatch.setattr(runs, "check_writable", lambda folder, size: (folder.mkdir(exist_ok=True), needed.append(size)))
    monkeypatch.setattr(runs, "write_curves", drawn.append)
    for name, rows in (("train", 8), ("dev", 3), ("test", 9)):
        lines = [json.dumps({**row, "note": "x"}) for row in rows_of("sequence-classification", 30)[-rows:]]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    assert finetune("sequence-classification", tmp_path, *QUICK, "--output", tmp_path / "run") == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    weights = 4 * result["parameters"]
    assert result["parameters"] == result["trained_parameters"]
    assert needed == [2**24, 2 * (weights + 2 * weights) + 3 * weights + 2**22]
    assert drawn == [tmp_path / "run"]
    assert sum(sum(row) for row in result["confusion"]) == 9
    assert {round(9 * result[name]["accuracy"], 6) % 1 for name in ("untrained", "test")} == {0.0}
    assert round(3 * result["dev"]["accuracy"], 6) % 1 == 0.0
    assert [sample["input"] for sample in result["samples"]] == [
        {"text": row["text"]} for row in rows_of("sequence-classification", 30)[-9:][:8]
    ]  # fmt: skip
    assert [sample["truth"] for sample in result["samples"]] == [
        row["label"] for row in rows_of("sequence-classification", 30)[-9:][:8]
    ]  # fmt: skip


def test_a_folder_is_looked_at_again_by_who_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_run", lambda options, resume, *others: {"resume": resume})
    options = RunOptions("causal-lm", "x", tmp_path / "run")
    assert runs.run(options) == {"resume": False}

    @contextmanager
    def late(folder: Path) -> Iterator[None]:
        (folder / "run.json").write_text("{}")  # by the one who had it before
        yield

    monkeypatch.setattr(runs, "alone_in", late)
    with pytest.raises(ValueError, match="holds a run already"):
        runs.run(options)


def test_the_longest_examples_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    raised: list[Exception] = []

    def loss(model: Any, batch: Any, objective: Any, count: int, **others: Any) -> None:
        tried.append((batch, others))
        raise raised[0]

    def batch(examples: list[Any]) -> Any:
        return SimpleNamespace(to=lambda device: SimpleNamespace(count=1, lengths=[e.length for e in examples]))

    task = SimpleNamespace(
        collate=batch, loss=loss, reference=lambda reference, batch: "r", name="poetry", max_length=9
    )
    model = torch.nn.Linear(1, 1)
    model.config = transformers.BertConfig(max_position_embeddings=5)
    examples = [SimpleNamespace(length=length) for length in (3, 9, 2, 7)]
    for error, message in (
        (
            IndexError("no place"),
            r"model: it can't take these texts, of up to 9 tokens \(max_length: 9, its places: 5\): no",
        ),
        (TypeError("no reference"), "objective: formula does not go with poetry: no reference"),
    ):
        raised[:] = [error]
        for reference, others in ((None, {}), (model, {"reference": "r"})):
            with pytest.raises(ValueError, match=message):
                runs._try(model, task, examples, "formula", reference)
            found, given = tried.pop()
            assert (found.lengths, given) == ([9, 7], others)


def test_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(is_fast=True, pad_token=None, eos_token="</s>")
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name, **o: seen.append(o) or found)
    assert runs.load_tokenizer("x", "token-classification").pad_token == "</s>"
    found.pad_token = "<pad>"
    assert runs.load_tokenizer("x", "causal-lm").pad_token == "<pad>"
    assert seen == [{"trust_remote_code": False, "add_prefix_space": True}, {"trust_remote_code": False}]
    found.is_fast = False
    with pytest.raises(ValueError, match="model: 'x' has no fast tokenizer"):
        runs.load_tokenizer("x", "causal-lm")

    def missing(name: str, **options: Any) -> None:
        raise KeyError("added_tokens") if name == "y" else OSError("nobody has it")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", missing)
    with pytest.raises(ValueError, match="model: no tokenizer can be loaded from 'x': nobody has it"):
        runs.load_tokenizer("x", "causal-lm")
    with pytest.raises(ValueError, match=r"model: no tokenizer can be loaded from 'y': .*added_tokens"):
        runs.load_tokenizer("y", "causal-lm")


def test_names_of_models(tmp_path: Path) -> None:
    for name in ("bert-base-cased", "org/name", str(tmp_path)):
        runs._must_exist(name)
    for name in ("a/b/c", "./a", str(tmp_path / "a")):
        with pytest.raises(ValueError, match=f"model: folder '{name}' does not exist"):
            runs._must_exist(name)
        with pytest.raises(ValueError, match=f"model: folder '{name}' does not exist"):
            runs.load_model(name, task_of("number", rows_of("number", 2)))


def test_models(tmp_path: Path) -> None:
    """A head that does not fit is new; rates of dropout and padding are as they have to be."""
    rows = [{"text": "cat", "label": label} for label in "abc"]
    task = task_of("sequence-classification", rows)
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=8, n_layer=1, n_head=2, n_positions=32, num_labels=7, bos_token_id=1, eos_token_id=2
    )  # fmt: skip
    assert config.pad_token_id is None
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    transformers.logging.set_verbosity_warning()
    model = runs.load_model(str(tmp_path), task, 0.25)
    assert transformers.logging.get_verbosity() == transformers.logging.WARNING
    with runs._quiet():
        assert transformers.logging.get_verbosity() == transformers.logging.ERROR
    assert model.score.weight.shape[0] == 3
    assert model.config.pad_token_id == task.tokenizer.pad_token_id
    assert model.transformer.drop.p == 0.25
    with pytest.raises(ValueError, match=r"dropout: \w+ has no rate that could be set"):
        runs._set_dropout(transformers.PretrainedConfig(), 0.1)


def test_a_model_that_was_pickled_is_not_loaded(tmp_path: Path) -> None:
    task = task_of("sequence-classification", [{"text": "cat", "label": label} for label in "abc"])
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertForSequenceClassification(config)
    config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="can't be loaded for sequence-classification"):
        runs.load_model(str(tmp_path), task)
    model.save_pretrained(tmp_path)
    runs.load_model(str(tmp_path), task)


def test_a_model_with_code_of_its_own_is_not_run(tmp_path: Path) -> None:
    """Nor is anybody asked: a "y" on standard input would be an answer."""
    data, folder = written(tmp_path, "causal-lm"), tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard", "auto_map": {
        "AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model", "AutoTokenizer": ["theirs.T", "theirs.T"],
    }}))  # fmt: skip
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    tokenizer_of_words().save_pretrained(folder)
    for words in (["finetune", "causal-lm", str(data), "--model", str(folder), "--output", str(tmp_path / "run")],
                  ["predict", str(folder), "--text", "the cat"]):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "objkern", *words], input="y\n" * 9, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_fingerprint_is_one_of_names_and_contents(tmp_path: Path) -> None:
    found = set()
    for name, text in (("a.json", "x"), ("b.json", "x"), ("b.json", "y")):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / name).write_text(text)
        found.add(runs.fingerprint(str(tmp_path / "model")))
    assert len(found) == 3
    (tmp_path / "model" / "notes.md").write_text("x")
    assert runs.fingerprint(str(tmp_path / "model")) in found


def test_the_device_is_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert runs.device_of("auto") == torch.device(device)


# ---- search ---------------------------------------------------------------------------------------------------------


def test_braces() -> None:
    argv = ["--learning-rate", "{1e-5..1e-3:log}", "--batch-size", "{4..16}", "--optimizer={sgd,adamw}",
            "--objective", "CrossEntropy(label_smoothing={0..0.3}) + {z=1e-6..1e-2:log}*ZLoss()"]  # fmt: skip
    variables = search.variables_of(argv)
    assert [v.name for v in variables] == ["learning_rate", "batch_size", "optimizer", "objective_1", "z"]
    assert [v.whole for v in variables] == [False, True, False, False, False]
    assert [v.log for v in variables] == [True, False, False, False, True]
    words = search.filled(argv, ["2e-5", "8", "sgd", "0.1", "1e-4"])
    assert words[:5] == ["--learning-rate", "2e-5", "--batch-size", "8", "--optimizer=sgd"]
    assert words[-1] == "CrossEntropy(label_smoothing=0.1) + 1e-4*ZLoss()"
    objkern.parse(words[-1])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("{1..}", "expected {low..high}"),
        ("{5..1}", "a smaller and a larger number"),
        ("{0..1:log}", "number above 0"),
        ("{a..b}", "two numbers"),
        ("{x}", "expected {low..high}"),
        ("{1..1}", "a smaller and a larger number around"),
        ("{1..2} {name=3..4} {name=5..6}", "but name occurs twice"),
    ],
)
def test_bad_braces(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search.variables_of(["--learning-rate", word])


def test_values_of_variables() -> None:
    optuna = pytest.importorskip("optuna")
    argv = ["--a", "{1..3}", "--b", "{sgd,adamw,adam}", "--c", "{0.5..2:log}"]
    variables = search.variables_of(argv)
    assert [variable.ends for variable in variables] == [["1", "3"], ["sgd", "adamw", "adam"], ["0.5", "2.0"]]
    assert list(search._corners(variables)) == [
        ["1", "sgd", "0.5"], ["3", "sgd", "0.5"], ["1", "adamw", "0.5"], ["1", "adam", "0.5"], ["1", "sgd", "2.0"]
    ]  # fmt: skip
    trial = optuna.trial.FixedTrial({"a": 2, "b": "adam", "c": 0.75})
    assert [variable.suggested(trial) for variable in variables] == ["2", "adam", "0.75"]
    assert [trial.distributions[name].log for name in "ac"] == [False, True]
    words = ["a", "--search", "3", "b", "--output=x", "--search=4", "--output", "y", "c"]
    assert search._fixed(words) == ["a", "b", "c"]


def test_a_search_that_cannot_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    words = ["sequence-classification", str(written(tmp_path, "sequence-classification")), *QUICK, "--learning-rate",
             "{1e-4..1e-2}", "--output", str(tmp_path / "run"), "--search"]  # fmt: skip
    with pytest.raises(ValueError, match="search: expected a number of runs of at least 1 but got 0"):
        search.main([*words, "0"])
    with pytest.raises(ValueError, match="resume: a search that was interrupted goes on by itself"):
        search.main([*words, "1", "--resume"])
    with pytest.raises(ValueError, match="output: expected one folder"):
        search.main([*words, "1", "--output", str(tmp_path / "run-{0..1}")])
    needed: list[int] = []
    monkeypatch.setattr(search, "check_writable", lambda folder, size: needed.append(size))
    monkeypatch.setattr(search, "alone_in", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        search.main([*words, "1"])
    assert needed == [2**24]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run, and a search has many; name another folder"):
        search.main([*words, "1"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="search: expected one process"):
        search.main([*words, "1"])
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match="search: needs optuna"):
        search.main([*words, "1"])


def searched(study: Any, folder: Path, count: int) -> int:
    variables = search.variables_of(["--learning-rate", "{1e-4..1e-2:log}"])
    arguments = SimpleNamespace(search=count, seed=0)
    return search._search(study, variables, arguments, ["--learning-rate", "{1e-4..1e-2:log}"], folder)


def test_what_a_search_tries_hangs_on_its_seed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """However often it is interrupted, which the last run's end is not; a run that was under way is the next one."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    monkeypatch.setattr(search, "_keep_the_best_model", lambda study, folder: None)
    monkeypatch.setattr(search, "_write", lambda study, folder, command: None)
    ends: list[Any] = []

    def trial(optuna: Any, study: Any, trial: Any, command: Any, folder: Path) -> bool:
        assert folder.name == f"trial-{trial.number:04d}"
        assert command == ["--learning-rate", repr(trial.params["learning_rate"])]
        end = ends.pop(0) if ends else None
        if end == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if end == "under way":
            return False
        if end == "failed":
            search._failed(study, trial, "why")
        else:
            study.tell(trial, -abs(trial.params["learning_rate"] - 3e-3))
        return True

    monkeypatch.setattr(search, "_run_trial", trial)
    whole, cut = optuna.create_study(direction="maximize"), optuna.create_study(direction="maximize")
    assert searched(whole, tmp_path, 14) == 0
    printed = capsys.readouterr().out
    assert "run 14 of 14: learning_rate 0.00" in printed
    assert f"best: learning_rate {whole.best_params['learning_rate']:.4g}" in printed
    assert f"Written to {tmp_path}: search.html" in printed
    for some, count, status in ((["", "signal"], 14, 3), (["", "under way"], 14, 3), (["signal"], 4, 0), ([], 14, 0)):
        ends[:] = some
        assert searched(cut, tmp_path, count) == status
        assert ("Interrupted, and saved" in capsys.readouterr().out) == (status == 3)
    assert [trial.params for trial in cut.trials] == [trial.params for trial in whole.trials]
    failing = optuna.create_study(direction="maximize")
    ends[:] = ["failed"] * 2
    assert searched(failing, tmp_path, 2) == 1
    assert "search: no run finished" in capsys.readouterr().err


def test_a_run_of_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    class Pruner(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            return trial.last_step == 7

    study = optuna.create_study(direction="maximize", pruner=Pruner())
    command = ["sequence-classification", "x.jsonl"]
    folder, begins, results = tmp_path / "trial", [], []

    def run(options: Any, resume: bool, command: Any, on_record: Callable[..., None]) -> dict[str, Any]:
        assert options.output == folder
        assert command[:4] == ["python", "-m", "objkern", "finetune"]
        begins.append((resume, sorted(path.name for path in folder.iterdir()) if folder.exists() else None))
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "run.json").touch()
        on_record({"event": "step", "step": 1})
        on_record({"event": "epoch", "epoch": 1 + resume, "score": 0.5})
        result = results.pop()
        if isinstance(result, Exception):
            raise result
        if result == "pruned":
            on_record({"event": "epoch", "epoch": 7, "score": 0.1})
        return {"best_score": 0.5, "dev": {"accuracy": 0.5}, "how": "finished", **result}

    monkeypatch.setattr(runs, "run", run)

    def ended(trial: Any, result: Any) -> Any:
        """What became of it, beside whether it ended."""
        results.append(result)
        found = search._run_trial(optuna, study, trial, command, folder)
        frozen = study.trials[trial.number]
        assert found == frozen.state.is_finished() == (not (folder / "checkpoints").exists())
        return frozen

    results.append(ValueError("no such option"))
    with pytest.raises(ValueError, match="no such option"):  # all would be refused so
        search._run_trial(optuna, study, study.ask(), command, folder)
    assert study.trials[0].state.name == "FAIL"
    assert search._counted(study) == 0
    shutil.rmtree(folder)
    trial = study.ask()
    assert ended(trial, {"how": "interrupted"}).state.name == "RUNNING"
    assert search._under_way(study).number == trial.number
    again = ended(search._under_way(study), {})  # of another process, which knows the study alone
    assert (again.value, again.intermediate_values, again.user_attrs["dev"]) == (
        0.5,
        {1: 0.5, 2: 0.5},
        {"accuracy": 0.5},
    )
    assert search._under_way(study) is None
    assert "    0.5\n" in capsys.readouterr().out
    assert begins == [(False, None), (False, None), (True, ["checkpoints", "run.json"])]
    trial = study.ask()
    with pytest.raises(ValueError, match="trial is there already, of something else"):
        search._run_trial(optuna, study, trial, command, folder)
    assert study.trials[trial.number].state.name == "FAIL"
    for result, state, why in (
        ("pruned", "PRUNED", "pruned after epoch 7"), (ValueError("a\nb"), "FAIL", "failed: ValueError: a\n"),
        (RuntimeError("no memory"), "FAIL", "failed: RuntimeError: no memory"),
        ({"best_score": float("nan")}, "FAIL", "failed: the dev metric is not defined on these rows"),
    ):  # fmt: skip
        shutil.rmtree(folder)
        trial = study.ask()
        trial.set_user_attr("begun", True)  # and killed before there was anything to go on with
        folder.mkdir()
        (folder / "half").touch()
        (folder / "checkpoints").mkdir()
        assert ended(trial, result).state.name == state
        assert begins.pop() == (False, None)
        assert why in capsys.readouterr().out
    assert search._counted(study) == 5


def test_the_table_of_a_search(tmp_path: Path) -> None:
    """The best first; and what a few runs cannot tell."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = search._study(optuna, tmp_path, search.variables_of(["--a", "{0..1}"]), ["x"])

    def tried(value: float, score: float | None, epochs: int = 1, state: Any = None) -> Any:
        trial = study.ask()
        trial.suggest_float("a", 0.0, 1.0)
        for epoch in range(1, epochs + 1):
            trial.report(value, epoch)
        study.tell(trial, score, state=state)
        return trial

    for score in (0.25, 0.5):
        tried(score, score, 2)
    search._failed(study, study.ask(), "why")
    pruned = tried(0.1, None, 3, optuna.trial.TrialState.PRUNED)
    study.enqueue_trial({"a": 0.5})
    header, rows = search._rows(study)
    assert header == ["run", "a", "score", "epochs", "state"]
    assert [[row[0], *row[2:]] for row in rows] == [
        ["trial-0001", "0.5", "2", "complete"], ["trial-0000", "0.25", "2", "complete"],
        ["trial-0003", "", "3", "pruned"], ["trial-0002", "", "0", "why"],
    ]  # fmt: skip
    assert rows[2][1] == f"{pruned.params['a']:.4g}"
    late = study.ask()  # one of three ended runs is not enough to judge it by
    late.report(0.0, 1)
    assert not late.should_prune()
    tried(0.5, 0.5)
    assert late.should_prune()
    assert search._importance(study) == {}
    pytest.importorskip("sklearn")
    tried(0.5, 0.5)
    assert set(search._importance(study)) == {"a"}
    alike = optuna.create_study(direction="maximize")
    alike.optimize(lambda trial: 0.0 * trial.suggest_float("a", 0.0, 1.0), n_trials=4)
    assert search._importance(alike) == {}


def test_a_search_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("optuna")
    data = written(tmp_path, "sequence-classification", 40)
    missing = ["sequence-classification", tmp_path / "no.jsonl", *QUICK, "--output", tmp_path / "refused"]
    assert finetune(*missing, "--learning-rate", "{1e-4..1e-2:log}", "--search", "2") == 2
    assert "no.jsonl' does not exist" in capsys.readouterr().err
    words = ["sequence-classification", data, *QUICK, "--output", tmp_path / "search", "--learning-rate", "{1e-4..1e-2:log}",
             "--objective", "CrossEntropy(label_smoothing={0..0.3})"]  # fmt: skip
    assert finetune(*words, "--search", "2") == 0
    assert finetune(*words, "--search", "4") == 0  # two more
    printed = capsys.readouterr().out
    assert "run 3 of 4" in printed
    assert printed.count("run 1 of") == 1
    found = json.loads((tmp_path / "search" / "search.json").read_text())
    assert len(found["runs"]) == 4
    assert set(found["best"]["values"]) == {"learning_rate", "objective"}
    best = tmp_path / "search" / found["best"]["run"]
    saved.load(best / "model")
    assert sum((folder / "model").exists() for folder in (tmp_path / "search").glob("trial-*")) == 1
    page = (tmp_path / "search" / "search.html").read_text()
    assert "trial-0003" in page
    assert "http" not in page.split("<main>")[0]
    rows = data.read_text()
    data.write_text(rows.replace("the", "thy"))
    assert finetune(*words, "--search", "4") == 2
    assert "or other rows" in capsys.readouterr().err
    data.write_text(rows)
    for more in (["--clip", "{0.5..2}"], ["--clip", "2"]):
        assert finetune(*words, "--search", "4", *more) == 2
        assert "a search over something else" in capsys.readouterr().err
    assert finetune(*words, "--search", "4", "--clip", "{0..2}") == 2
    assert "clip: expected a positive number but got 0" in capsys.readouterr().err
    assert finetune(*words[:-4], "--search", "4") == 2
    assert "expected something to search for" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_search_is_that_of_an_undisturbed_one(tmp_path: Path) -> None:
    """Ended by SIGTERM in the midst of a run and before its first step, and by SIGKILL: it goes on with that run."""
    pytest.importorskip("optuna")
    data = written(tmp_path, "sequence-classification", 40)
    words = ["finetune", "sequence-classification", str(data), *QUICK, "--dropout", "0.1", "--search", "3",
             "--learning-rate", "{1e-4..1e-2:log}", "--output"]  # fmt: skip
    assert command([*words, str(tmp_path / "whole")]) == 0
    code = """
import os, signal, sys
from objkern.__main__ import main
from objkern.finetune import record, run
signals = {"step": signal.SIGTERM, "epoch": signal.SIGKILL}
called, prepare, when = record.Recorder.__call__, run.prepare, sys.argv[1]
def recording(self, entry):
    called(self, entry)
    if entry["event"] == when and entry["step"] > 2:
        os.kill(os.getpid(), signals[when])
def preparing(*args, **options):
    if when == "start":
        os.kill(os.getpid(), signal.SIGTERM)
    return prepare(*args, **options)
record.Recorder.__call__, run.prepare = recording, preparing
sys.exit(main(sys.argv[2:]))
"""
    for when, status in (("step", 3), ("start", 3), ("epoch", -9), ("never", 0)):
        done = subprocess.run([sys.executable, "-c", code, when, *words, str(tmp_path / "cut")], capture_output=True,
                              text=True, timeout=180)  # fmt: skip
        assert done.returncode == status, done.stderr
    whole, cut = (json.loads((tmp_path / name / "search.json").read_text()) for name in ("whole", "cut"))
    assert cut["runs"] == whole["runs"]
    assert [one["state"] for one in cut["runs"]] == ["complete"] * 3
    assert sorted(path.name for path in (tmp_path / "cut").glob("trial-*")) == [f"trial-000{k}" for k in range(3)]


def test_a_model_that_sees_what_it_is_to_tell_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = written(tmp_path, "causal-lm")
    assert finetune("causal-lm", data, *QUICK, "--output", tmp_path / "run") == 0
    config = transformers.BertConfig(
        vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )  # fmt: skip
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model").save_pretrained(tmp_path / "bert")
    words = ["--model", tmp_path / "bert", "--output", tmp_path / "other"]
    assert finetune("causal-lm", data, *QUICK, *words) == 2
    assert "reads from left to right but got BertLMHeadModel" in capsys.readouterr().err


def test_texts_that_would_see_each_other_are_not_packed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = written(tmp_path, "causal-lm")
    assert finetune("causal-lm", data, *QUICK, "--output", tmp_path / "run") == 0
    config = transformers.OPTConfig(
        vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, word_embed_proj_dim=16,
        max_position_embeddings=300, init_std=0.5,
    )  # fmt: skip
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model").save_pretrained(tmp_path / "opt")
    words = ["--model", tmp_path / "opt", "--output", tmp_path / "other"]
    assert finetune("causal-lm", data, *QUICK, "--pack", *words) == 2
    assert "pack: texts of one sequence would see each other in OPTForCausalLM" in capsys.readouterr().err
    assert finetune("causal-lm", data, *QUICK, *words) == 0


def test_rows_without_a_prompt_and_a_tokenizer_without_a_beginning(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"completion": f"the cat sat {k}"}) + "\n" for k in range(12)))
    assert finetune("causal-lm", data, *QUICK, "--output", tmp_path / "run") == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    shutil.copytree(tmp_path / "run" / "model", tmp_path / "start")
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path / "start")
    words = ["--model", tmp_path / "start", "--output", tmp_path / "other"]
    assert finetune("causal-lm", data, *QUICK, *words) == 0
    assert len(json.loads((tmp_path / "other" / "result.json").read_text())["samples"]) == 1


def test_what_a_model_says_ends_with_its_places(tmp_path: Path) -> None:
    """GPT-2 has a vector for every place, and none behind them."""
    data = tmp_path / "long.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": "the cat " * 9, "completion": f" sat {k}"}) + "\n" for k in range(12))
    )
    assert finetune("causal-lm", data, *QUICK, "--output", tmp_path / "run") == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    words = [*QUICK, "--max-length", "32", "--model", tmp_path / "gpt2", "--output", tmp_path / "other"]
    assert finetune("causal-lm", data, *words) == 0
    assert json.loads((tmp_path / "other" / "result.json").read_text())["samples"]
