"""Runs from files to a folder, by the command line; small models from scratch; the search."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
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

from .test_finetune_training import rows_of  # noqa: E402

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
    assert asked["task"] == name
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
    assert finetune("sequence-classification", data, "--output", out, *QUICK) == 0
    words = ["sequence-classification", data, "--output", out, "--resume", *QUICK]
    assert finetune(*words, "--objective", "CrossEntropy() + 0.1*ZLoss()") == 2
    assert "objective None → 'CrossEntropy() + 0.1*ZLoss()'" in capsys.readouterr().err
    assert finetune(*words, "--clip", "2") == 2
    assert "clip 1.0 → 2.0" in capsys.readouterr().err


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
    assert other["dev"] != splits["dev"]
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
    for seed in range(20):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        options = RunOptions("sequence-classification", str(path), tmp_path, training=TrainingOptions(seed=seed))
        splits = runs.splits_of(options)
        assert {row["label"] for row in splits["train"]} == {"0", "1", "2", "3", "4", "rest"}
        assert len(splits["dev"]) == 2


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
    ],
)
def test_bad_sizes(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


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
    ],
)
def test_bad_braces(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search.variables_of(["--learning-rate", word])


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
