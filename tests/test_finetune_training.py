"""The training loop: exact however a window is cut, bit-equal after any interruption, and nothing lost."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

import objkern  # noqa: E402
from objkern.finetune import checkpoints, parallel, strategies, training  # noqa: E402
from objkern.finetune.parallel import Layout  # noqa: E402
from objkern.finetune.schedules import Schedule, linear  # noqa: E402
from objkern.finetune.tasks import TASKS, Evaluation, Task  # noqa: E402
from objkern.finetune.training import Outcome, Progress, TrainingOptions, train  # noqa: E402

from .test_finetune_tasks import WORDS, tokenizer_of_words  # noqa: E402

REGULARIZED = "CrossEntropy(label_smoothing=0.1) + 0.01*ZLoss()"


def texts(count: int, seed: int = 0) -> list[list[str]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    return [[WORDS[k] for k in torch.randint(len(WORDS), (n,), generator=generator).tolist()] for n in lengths]


def rows_of(name: str, count: int) -> list[dict[str, Any]]:
    """Rows whose labels can be learned: a class is whether a word occurs, a tag is the word's own, ..."""
    found: list[dict[str, Any]] = []
    for words in texts(count):
        text, good = " ".join(words), any(word < "h" for word in words[:2])
        found.append({
            "sequence-classification": {"text": text, "label": "good" if good else "bad"},
            "several": {"text": text, "label": [word for word in ("the", "cat", "dog") if word in words]},
            "number": {"text": text, "label": len(words) / 4},
            "token-classification": {"words": words, "tags": ["B-early" if word < "h" else "O" for word in words]},
            "question-answering": {"question": "who ?", "context": text,
                                   "answers": {"text": [words[1]], "answer_start": [len(words[0]) + 1]}},
            "causal-lm": {"prompt": words[0], "completion": " ".join(words[1:])},
            "seq2seq": {"source": text, "target": " ".join(words[:2])},
        }[name])  # fmt: skip
    return found


def task_of(name: str, rows: list[dict[str, Any]]) -> Task:
    task = {"several": "sequence-classification", "number": "sequence-classification"}.get(name, name)
    return TASKS[task](tokenizer_of_words(), rows)


def model_of(task: Task, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    size = len(task.tokenizer)
    if task.name == "causal-lm":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=size,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=64,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                attention_dropout=dropout,
            )
        )
    if task.name == "seq2seq":
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=size,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=1,
                num_heads=4,
                dropout_rate=dropout,
                pad_token_id=0,
                decoder_start_token_id=0,
                eos_token_id=2,
            )
        )
    return getattr(transformers, task.auto_model).from_config(transformers.BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, pad_token_id=0,
        **task.model_options()))  # fmt: skip


NAMES = ["sequence-classification", "several", "number", "token-classification", "question-answering", "causal-lm",
         "seq2seq"]  # fmt: skip


def run(
    name: str,
    folder: Path,
    options: TrainingOptions,
    count: int = 8,
    dropout: float = 0.0,
    formula: str | None = None,
    **others: Any,
) -> tuple[Outcome, nn.Module, list[dict[str, Any]]]:
    """A run on a few rows, scored on its own training rows; and what it logged."""
    rows = rows_of(name, count)
    task = task_of(name, rows)
    model = strategies.apply(model_of(task, dropout), options.strategy, task.name)
    model = parallel.apply(model, parallel.layout_of(options.parallel))
    if options.parallel != "data":  # as a run begins and ends
        task.test(model, rows)
        task.predict(model, rows[:2])
    objective = objkern.parse(formula or task.formula())
    records: list[dict[str, Any]] = []
    log: Callable[[dict[str, Any]], None] = others.pop("log", records.append)
    outcome = train(
        model, task, task.examples(rows), lambda: task.score(model, rows), objective, options, folder, log, **others
    )
    return outcome, model, records


def differences(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max((x.double() - y.double()).abs().max().item() for x, y in pairs)


ONE_STEP: dict[str, Any] = {"epochs": 1, "optimizer": "sgd", "learning_rate": 0.1, "warmup": 0.0, "clip": 1e9,
                            "weight_decay": 0.0, "schedule": "constant"}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_window_is_one_big_batch_however_it_is_cut(name: str, tmp_path: Path) -> None:
    """24: rows of other lengths and numbers of labels; 8 in one batch, in 2 of 4, in 3 of 3, in 8 of 1."""
    formula = {"several": "BinaryCrossEntropy() + 0.1*LogitL2()", "number": "MeanSquaredError()"}.get(name, REGULARIZED)
    _, whole, logged = run(name, tmp_path / "whole", TrainingOptions(batch_size=8, **ONE_STEP), formula=formula)
    start = model_of(task_of(name, rows_of(name, 8)))
    moved = differences(whole, start)
    assert moved > 1e-4
    for size, accumulation in ((4, 2), (3, 3), (1, 8)):
        options = TrainingOptions(batch_size=size, accumulation=accumulation, **ONE_STEP)
        _, cut, records = run(name, tmp_path / f"{size}", options, formula=formula)
        assert differences(whole, cut) < 1e-5 * max(1.0, moved), (size, accumulation)
        assert records[0].keys() == logged[0].keys()
        for part, value in logged[0].items():
            if part not in ("seconds", "event"):
                assert records[0][part] == pytest.approx(value, rel=1e-4, abs=1e-6), part


@pytest.mark.parametrize("name", ["token-classification", "causal-lm"])
def test_interruptions_change_nothing(name: str, tmp_path: Path) -> None:
    """28: ended by SIGTERM in the midst of epochs and resumed, the weights, losses and patience are bit-equal."""
    options = TrainingOptions(epochs=4, batch_size=4, learning_rate=1e-2, patience=2)
    outcome, undisturbed, expected = run(name, tmp_path / "a", options, count=20, dropout=0.2)
    records: list[dict[str, Any]] = []

    def log(record: dict[str, Any]) -> None:
        records.append(record)
        if record["event"] == "step" and record["step"] in (2, 5, 6, 11):
            os.kill(os.getpid(), signal.SIGTERM)

    found, times = None, 0
    while found is None or found.how == "interrupted":
        found, resumed, _ = run(name, tmp_path / "b", options, count=20, dropout=0.2, log=log, resume=times > 0)
        times += 1
        assert times < 10
    assert times == 5
    assert found == outcome
    assert differences(undisturbed, resumed) == 0.0
    for kind in ("step", "epoch"):
        ours, theirs = ([{k: v for k, v in r.items() if k != "seconds"} for r in some if r["event"] == kind]
                        for some in (records, expected))  # fmt: skip
        assert ours == theirs
    assert [path.name for path in sorted((tmp_path / "b" / "checkpoints").iterdir())] == [
        "best", checkpoints.name_of(outcome.progress.step)
    ]  # fmt: skip


def forked(folder: Path, kill_after: int | None) -> None:
    """A run in a process of its own, from the newest checkpoint on; killed in the step after so many, if any."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        options = TrainingOptions(epochs=8, batch_size=4, learning_rate=1e-2, patience=9, checkpoint_steps=1)
        _, model, _ = run("token-classification", folder, options, count=20, dropout=0.2, resume=True,
                          log=lambda record: os.write(writes, b"."))  # fmt: skip
        checkpoints.save(folder, "final", model.state_dict(), {})
        os._exit(0)
    os.close(writes)
    steps = 0
    while os.read(reads, 1):
        steps += 1
        if steps == kill_after:
            os.kill(child, signal.SIGKILL)
    os.close(reads)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) if kill_after else status == 0


def kill_and_resume(folder: Path) -> None:
    """In a process that has only imported: no thread of it is lost in a fork."""
    forked(folder / "undisturbed", None)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        forked(folder / "killed", int(torch.randint(1, 5, (), generator=generator)))
    forked(folder / "killed", None)


@pytest.mark.slow
def test_killed_at_any_time_and_resumed(tmp_path: Path) -> None:
    """28: SIGKILL ten times, wherever it hits; the final weights are bit-equal to an undisturbed run's."""
    root = Path(__file__).parent.parent
    code = "import pathlib, sys; from tests.test_finetune_training import *; kill_and_resume(pathlib.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=500,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (a, _), (b, _) = (checkpoints.load(tmp_path / name / "final") for name in ("undisturbed", "killed"))
    assert a.keys() == b.keys()
    assert all(torch.equal(x, b[name]) for name, x in a.items())


def test_a_loss_that_is_not_finite_stops_and_says_where(tmp_path: Path) -> None:
    rows = rows_of("token-classification", 8)
    task = task_of("token-classification", rows)
    model = model_of(task)

    def poison(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            with torch.no_grad():
                model.classifier.bias[0] = torch.nan

    options = TrainingOptions(batch_size=2, checkpoint_steps=1)
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan in step 3: \{'cross_entropy': nan.*rows of the batch: \["
    ):
        train(model, task, task.examples(rows), lambda: task.score(model, rows), objkern.CrossEntropy(), options,
              tmp_path, poison)  # fmt: skip
    newest = checkpoints.newest(tmp_path / "checkpoints")
    assert newest.name == checkpoints.name_of(2)


def test_early_stopping_keeps_the_best_epoch(tmp_path: Path) -> None:
    rows = rows_of("token-classification", 8)
    task = task_of("token-classification", rows)
    model = model_of(task)
    scores = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    kept: list[dict[str, Tensor]] = []

    def score() -> Evaluation:
        kept.append({name: x.clone() for name, x in model.state_dict().items()})
        return Evaluation({"f1": next(scores)})

    options = TrainingOptions(epochs=9, patience=2, batch_size=4)
    outcome = train(model, task, task.examples(rows), score, objkern.CrossEntropy(), options, tmp_path)
    assert (outcome.how, outcome.progress.best_epoch, len(kept)) == ("stopped early", 2, 4)
    assert all(torch.equal(x, kept[1][name]) for name, x in model.state_dict().items())
    with pytest.raises(ValueError, match=r"metric: expected one of f1 but got 'loss'"):
        train(model, task, task.examples(rows), lambda: Evaluation({"f1": 1.0}), objkern.CrossEntropy(),
              TrainingOptions(metric="loss"), tmp_path / "other")  # fmt: skip


@pytest.mark.parametrize(("metric", "best"), [("accuracy", 2), ("loss", 3), (None, 3)])
def test_the_best_epoch_is_that_of_the_metric_asked_for(metric: str | None, best: int, tmp_path: Path) -> None:
    """More is better of an accuracy, also of a task whose own metric is a loss."""
    rows = rows_of("causal-lm", 4)
    task = task_of("causal-lm", rows)
    scores = iter([{"loss": 2.0, "accuracy": 0.1}, {"loss": 3.0, "accuracy": 0.4}, {"loss": 1.0, "accuracy": 0.3}])
    outcome = train(model_of(task), task, task.examples(rows), lambda: Evaluation(next(scores)), objkern.CrossEntropy(),
                    TrainingOptions(epochs=3, metric=metric), tmp_path)  # fmt: skip
    assert outcome.progress.best_epoch == best


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run("sequence-classification", tmp_path, TrainingOptions(epochs=1))
    with pytest.raises(ValueError, match=r"is of a run with other options: learning_rate 5e-05 → 0\.1"):
        run("sequence-classification", tmp_path, TrainingOptions(epochs=1, learning_rate=0.1), resume=True)
    run("sequence-classification", tmp_path, TrainingOptions(epochs=1, learning_rate=0.1))  # which begins anew


def test_pickles_are_refused(tmp_path: Path) -> None:
    """A folder whose weights would run code when they are read."""

    class Malicious:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    place = tmp_path / "checkpoints" / checkpoints.name_of(7)
    place.mkdir(parents=True)
    torch.save(Malicious(), place / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds pytorch_model\.bin, which may be pickles"):
        run("sequence-classification", tmp_path, TrainingOptions(epochs=1), resume=True)
    (place / "tensors.safetensors").write_bytes((place / "pytorch_model.bin").read_bytes())
    (place / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="can't be read"):
        run("sequence-classification", tmp_path, TrainingOptions(epochs=1), resume=True)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_is_whole_or_not_there(tmp_path: Path) -> None:
    tied = torch.randn(3)
    tensors = {"a": tied, "b": tied, "c": torch.randn(2, 2).t()}
    checkpoints.save(tmp_path, "best", tensors, {"n": 1})
    partial = tmp_path / ".best.partial"
    partial.mkdir()
    (partial / "tensors.safetensors").write_bytes(b"half")
    found, state = checkpoints.load(tmp_path / "best")
    assert state == {"n": 1}
    assert all(torch.equal(found[name], x) for name, x in tensors.items())
    (tmp_path / "best").rename(tmp_path / ".best.old")  # ended between two renames
    checkpoints.restore_interrupted(tmp_path)
    assert checkpoints.load(tmp_path / "best")[1] == {"n": 1}
    checkpoints.keep_newest(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    for name in (".best.partial", ".best.old"):  # what was ended is in nobody's way
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    checkpoints.save(tmp_path, "best", tensors, {"n": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    for name in ("tensors.safetensors", "state.json"):
        checkpoints.save(tmp_path, "step-00000001", tensors, {})
        (tmp_path / "step-00000001" / name).unlink()
        with pytest.raises(ValueError, match=r"has no tensors\.safetensors \(or parts\) and state\.json"):
            checkpoints.load(tmp_path / "step-00000001")


def test_the_newest_checkpoint_is_that_of_the_latest_step(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path / "nowhere") is None
    for step in (2, 10, 3):
        checkpoints.save(tmp_path, checkpoints.name_of(step), {"a": torch.ones(1)}, {})
    (tmp_path / "step-99999999.txt").touch()
    assert checkpoints.newest(tmp_path) == tmp_path / "step-00000010"
    checkpoints.keep_newest(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-99999999.txt"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []
    final = tmp_path / "best"
    sync = lambda descriptor: synced.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, final.exists()))  # noqa: E731
    monkeypatch.setattr(os, "fsync", sync)
    checkpoints.save(tmp_path, "best", {"a": torch.ones(1)}, {})
    assert sorted(name for name, there in synced if not there) == [".best.partial", "state.json", "tensors.safetensors"]
    assert [name for name, there in synced if there] == [tmp_path.name]


def test_a_checkpoint_on_a_full_disk(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoints.save(tmp_path, "best", {"a": torch.ones(9000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize(("strategy", "trains"), [("head", 0), ("last:1", 1), ("last", 2), ("full", 3)])
@pytest.mark.parametrize("name", ["token-classification", "causal-lm"])
def test_strategies(name: str, strategy: str, trains: int, tmp_path: Path) -> None:
    start = model_of(task_of(name, rows_of(name, 8)))
    options = TrainingOptions(epochs=1, strategy=strategy, learning_rate=1e-2, weight_decay=0.1)
    _, model, _ = run(name, tmp_path, options)
    changed = {key for key, x in model.state_dict().items() if not torch.equal(x, start.state_dict()[key])}
    layers = {int(part) for key in changed for part in key.split(".") if part.isdecimal()}
    assert layers == set(range(3 - trains, 3))
    assert any(key.startswith(("classifier", "lm_head")) for key in changed)
    assert any("embed" in key for key in changed) == (strategy == "full")


def test_gradual_unfreezing(tmp_path: Path) -> None:
    rows = rows_of("token-classification", 8)
    task = task_of("token-classification", rows)
    model = strategies.apply(model_of(task), "gradual", task.name)
    seen = []

    def log(record: dict[str, Any]) -> None:
        if record["event"] == "step":
            layers = strategies.layers_of(model)
            seen.append(sum(all(p.requires_grad for p in layer.parameters()) for layer in layers))

    train(model, task, task.examples(rows), lambda: task.score(model, rows), objkern.CrossEntropy(),
          TrainingOptions(epochs=3, strategy="gradual", patience=9), tmp_path, log)  # fmt: skip
    assert seen == [0, 1, 2]


def test_what_strategies_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [strategies.parse(name) for name in ("last", "lora", "prompt", "head", "lora:1")] == [
        ("last", 2), ("lora", 8), ("prompt", 20), ("head", 0), ("lora", 1)
    ]  # fmt: skip
    for lists in ([], [nn.ModuleList()]):
        with pytest.raises(ValueError, match="strategy: Sequential has no list of layers"):
            strategies.layers_of(nn.Sequential(*lists))
    one = nn.ModuleList([nn.Linear(1, 1)])
    assert strategies.layers_of(nn.Sequential(one)) is one
    both = [nn.ModuleList([nn.Linear(1, 1)] * 2) for _ in range(2)]
    assert strategies.layers_of(nn.Sequential(*both, one)) is both[-1]
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    strategies.train_last(gpt2, 0)  # whose head is tied to what the body reads
    assert [name for name, p in gpt2.named_parameters() if p.requires_grad] == ["transformer.wte.weight"]
    bert = model_of(task_of("number", rows_of("number", 4)))
    for p in bert.parameters():
        p.requires_grad_(False)
    strategies.train_last(bert, 1)
    trains = {name.rsplit(".", 1)[0] for name, p in bert.named_parameters() if p.requires_grad}
    assert "classifier" in trains
    assert {name.split(".")[3] for name in trains if name.startswith("bert.")} == {"2"}
    with pytest.raises(ValueError, match="strategy: BertModel is a body without a head"):
        strategies.train_last(bert.bert, 1)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="strategy: lora needs peft: pip install"):
        strategies.apply(bert, "lora:4", "sequence-classification")


def test_adapters_count_twice() -> None:
    pytest.importorskip("peft")
    model = strategies.apply(model_of(task_of("causal-lm", rows_of("causal-lm", 4))), "lora:4", "causal-lm")
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.0)


@pytest.mark.parametrize("strategy", ["lora:2", "prompt:3"])
def test_adapters(strategy: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    start = model_of(task_of("causal-lm", rows_of("causal-lm", 8)))
    options = TrainingOptions(epochs=2, strategy=strategy, learning_rate=5e-2)
    _, model, records = run("causal-lm", tmp_path, options)
    base = model.get_base_model().state_dict()
    for key, x in start.state_dict().items():
        assert torch.equal(x, base.get(key, base.get(key.replace(".weight", ".base_layer.weight"))))
    epochs = [record["dev_loss"] for record in records if record["event"] == "epoch"]
    assert epochs[-1] < epochs[0]


def test_schedules_of_coefficients_and_a_reference(tmp_path: Path) -> None:
    rows = rows_of("token-classification", 8)
    task = task_of("token-classification", rows)
    model, frozen = model_of(task), model_of(task).eval()
    beta = torch.tensor(0.0)
    objective = objkern.CrossEntropy() + beta * objkern.KLDivergence()
    records: list[dict[str, Any]] = []
    train(model, task, task.examples(rows), lambda: task.score(model, rows), objective,
          TrainingOptions(epochs=2, batch_size=4, learning_rate=1e-2), tmp_path, records.append,
          schedules=[Schedule(beta, linear(0.0, 0.3))], reference=frozen)  # fmt: skip
    steps = [record for record in records if record["event"] == "step"]
    assert [record["coefficient_0"] for record in steps] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert steps[0]["kl_divergence"] == pytest.approx(0.0, abs=1e-7)
    assert steps[-1]["kl_divergence"] > 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected a whole number of at least 1 but got 0"),
        ({"batch_size": 2.5}, "batch_size: expected a whole number"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a positive number"),
        ({"learning_rate": 1e6}, r"learning_rate: expected a positive number below 1e\+06"),
        ({"clip": float("inf")}, "clip: expected a positive number but got inf"),
        ({"seed": 2**32}, r"seed: expected a whole number in \[0, 2\*\*32\)"),
        ({"seed": -1}, "seed: expected a whole number"),
        ({"checkpoint_steps": -1}, "checkpoint_steps: expected a whole number of at least 0 but got -1"),
        ({"checkpoint_steps": 1.5}, "checkpoint_steps: expected a whole number"),
        ({"parallel": "both"}, "parallel: expected data, fsdp, tensor or tensor:K but got 'both'"),
        ({"strategy": "bitfit"}, "strategy: expected full, head, last:K"),
        ({"warmup": 1.0}, r"warmup: expected a number in \[0, 1\) but got 1\.0"),
        ({"optimizer": "lion"}, "optimizer: expected one of adamw, adam, sgd but got 'lion'"),
        ({"strategy": "lora:0"}, "strategy: expected full, head, last:K"),
        ({"strategy": "head:3"}, "strategy: expected full, head, last:K"),
        ({"precision": "float8"}, "precision: expected one of float32, bfloat16"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**options)


def test_what_nobody_asks_for() -> None:
    """As the documentation has it; runs that were begun without saying so go on with these."""
    assert TrainingOptions() == TrainingOptions(
        epochs=3, batch_size=16, accumulation=1, optimizer="adamw", learning_rate=5e-5, schedule="linear", warmup=0.1,
        weight_decay=0.01, clip=1.0, patience=3, metric=None, precision="float32", checkpointing=False, strategy="full",
        parallel="data", seed=0, checkpoint_steps=0,
    )  # fmt: skip


def test_every_epoch_has_an_order_of_its_own() -> None:
    """Of all examples, each once; the seed decides."""
    examples = [SimpleNamespace(number=number, length=number % 5) for number in range(64)]

    def order(epoch: int, seed: int = 0) -> list[int]:
        steps = training.windows(examples, TrainingOptions(seed=seed, batch_size=4), epoch, 2)
        return [example.number for window in steps for batch in window for example in batch]

    assert order(1) == order(1)
    assert sorted(order(1)) == list(range(64))
    assert order(1) != order(2)
    assert order(1) != order(1, seed=1)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_order_is_that_of_a_seed_for_every_epoch(grouped: bool) -> None:
    """What goes on after another version's checkpoint needs the same one. Of eight batches at a time those of similar
    lengths are together, if that is asked for."""
    lengths = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    examples = [SimpleNamespace(number=number, length=length) for number, length in enumerate(lengths)]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3 * 1_000_003 + 2)).tolist()
    expected = set()
    for some in (order[:16], order[16:]):
        some = sorted(some, key=lambda number: lengths[number]) if grouped else some
        expected |= {tuple(some[k : k + 2]) for k in range(0, len(some), 2)}
    windows = training.windows(examples, TrainingOptions(seed=3, batch_size=2, group_by_length=grouped), 2, 1)
    assert {tuple(example.number for example in batch) for (batch,) in windows} == expected


def test_rates() -> None:
    for name, half in (("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)):
        rates = [training.rate_at(step, 20, 0.2, training.RATES[name]) for step in range(20)]
        assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
        assert rates[4] == 1.0
        assert rates[12] == pytest.approx(half)
        assert rates[-1] > 0.0


def test_what_is_logged_is_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses as the untrained model has them, an epoch's as the means of its steps', and the optimizer's own rates."""
    rates: list[set[float]] = []

    class Spied(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            rates.append({group["lr"] for group in self.param_groups})
            super().step(closure)

    monkeypatch.setitem(training.OPTIMIZERS, "sgd", Spied)
    rows = rows_of("causal-lm", 8)
    task = task_of("causal-lm", rows)
    untrained = task.score(model_of(task), rows).metrics
    options = TrainingOptions(epochs=2, batch_size=4, learning_rate=1e-3, warmup=0.5, optimizer="sgd", patience=9)
    _, _, records = run("causal-lm", tmp_path / "a", replace(options, batch_size=8))
    for part, name in (("cross_entropy", "loss"), ("total", "loss"), ("accuracy", "accuracy")):
        assert records[0][part] == pytest.approx(untrained[name], rel=1e-4)
    assert rates == [{1e-3}, {1e-3}]
    rates.clear()
    _, _, records = run("causal-lm", tmp_path / "b", options)
    steps = [record for record in records if record["event"] == "step"]
    assert [record["learning_rate"] for record in steps] == [5e-4, 1e-3, 1e-3, 5e-4]
    assert rates == [{record["learning_rate"]} for record in steps]
    for epoch, some in ((records[2], steps[:2]), (records[5], steps[2:])):
        for part in ("cross_entropy", "total", "accuracy", "gradient_norm"):
            assert epoch[part] == pytest.approx(sum(record[part] for record in some) / 2), part


def test_seconds_are_those_of_all_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for every loss, ten for what follows a step, a hundred for a score."""
    now = 1000.0

    def passes(seconds: float, call: Callable[..., Any]) -> Callable[..., Any]:
        def passed(*arguments: Any, **options: Any) -> Any:
            nonlocal now
            now += seconds
            return call(*arguments, **options)

        return passed

    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: now))
    rows = rows_of("number", 8)
    task = task_of("number", rows)
    monkeypatch.setattr(task, "loss", passes(1, task.loss))
    records: list[dict[str, Any]] = []

    def log(record: dict[str, Any]) -> None:
        nonlocal now
        records.append(record)
        now += 10 if record["event"] == "step" else 0
        if len(records) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    for seconds, resume in ((123.0, False), (123.0 + 1 + 10 + 100, True)):
        outcome = train(model_of(task), task, task.examples(rows), passes(100, lambda: Evaluation({"r2": 0.5})),
                        objkern.MeanSquaredError(), TrainingOptions(epochs=2, batch_size=4), tmp_path, log, resume)  # fmt: skip
        assert outcome.progress.seconds == seconds
        now += 5000
    assert [record["seconds"] for record in records] == [1, 1, 102, 1, 1, 102]


def test_a_model_that_comes_evaluating_trains(tmp_path: Path) -> None:
    rows = rows_of("number", 8)
    task = task_of("number", rows)
    model, seen = model_of(task).eval(), []

    def score() -> Evaluation:
        model.eval()
        return Evaluation({"r2": 0.5})

    train(model, task, task.examples(rows), score, objkern.MeanSquaredError(), TrainingOptions(epochs=2), tmp_path,
          lambda record: seen.append((record["event"], model.training)))  # fmt: skip
    assert seen == [("step", True), ("epoch", False)] * 2


def test_a_metric_that_is_not_defined_is_worse_than_any(tmp_path: Path) -> None:
    rows = rows_of("number", 8)
    task = task_of("number", rows)
    scores = iter([float("nan"), -5.0, float("nan")])
    outcome = train(model_of(task), task, task.examples(rows), lambda: Evaluation({"r2": next(scores)}),
                    objkern.MeanSquaredError(), TrainingOptions(epochs=3), tmp_path)  # fmt: skip
    assert (outcome.progress.best, outcome.progress.best_epoch) == (-5.0, 2)


@pytest.mark.parametrize("penalized", [False, True])
def test_what_has_no_label_changes_nothing(penalized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch without one is not computed; in a window without one, terms on parameters alone move the model."""
    rows = rows_of("token-classification", 4)
    task = task_of("token-classification", rows)
    options = TrainingOptions(epochs=1, batch_size=1, accumulation=2, learning_rate=1e-2)
    (first, _), _ = training.windows(task.examples(rows), options, 1, 2)
    examples = [e if e == first[0] else replace(e, label=[-100] * len(e.label)) for e in task.examples(rows)]
    computed: list[int] = []
    own = task.loss
    monkeypatch.setattr(task, "loss", lambda m, batch, *a, **o: computed.append(batch.count) or own(m, batch, *a, **o))
    model = model_of(task)
    seen: list[list[Tensor]] = []
    records: list[dict[str, Any]] = []

    def log(record: dict[str, Any]) -> None:
        seen.append([p.detach().clone() for p in model.parameters()])
        records.append(record)

    penalty = 0.1 * objkern.L2(model)
    objective = objkern.CrossEntropy() + penalty if penalized else objkern.CrossEntropy()
    train(model, task, examples, lambda: Evaluation({"f1": 1.0}), objective, options, tmp_path, log)
    assert len(computed) == 1
    assert all(value == value for record in records for value in record.values())
    assert all(map(torch.equal, *seen[:2])) == (not penalized)
    if penalized:
        assert records[0]["total"] == pytest.approx(records[0]["cross_entropy"] + 0.1 * records[0]["l2"])
        assert records[1]["total"] == pytest.approx(0.1 * records[1]["l2"])
    else:
        assert records[1]["gradient_norm"] == 0.0


def test_a_gradient_that_is_not_finite_stops_before_it_is_taken(tmp_path: Path) -> None:
    """Of a loss that is: the root at 0, say."""
    rows = rows_of("sequence-classification", 8)
    task = task_of("sequence-classification", rows)
    model = model_of(task)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steep = objkern.custom(lambda s: (s.logprob - s.logprob.detach()).abs().sqrt(), needs=("logprob",), name="steep")
    options = TrainingOptions(batch_size=4, checkpoint_steps=1)
    with pytest.raises(FloatingPointError, match=r"the gradient is not finite in step 1: .*nan.*its rows: \["):
        train(
            model, task, task.examples(rows), lambda: Evaluation({"accuracy": 0.5}), objkern.CrossEntropy() + steep,
            options, tmp_path,
        )  # fmt: skip
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any((tmp_path / "checkpoints").glob("*.safetensors"))


@pytest.mark.parametrize("strategy", ["last:1", "lora:4"])
def test_checkpointing_trains_what_would_train_without(strategy: str, tmp_path: Path) -> None:
    rows, found = rows_of("causal-lm", 4), []
    for checkpointing in (False, True):
        task = task_of("causal-lm", rows)
        torch.manual_seed(0)
        model = strategies.apply(model_of(task), strategy, "causal-lm")
        options = TrainingOptions(
            batch_size=4, epochs=1, checkpointing=checkpointing, strategy=strategy, optimizer="sgd", learning_rate=0.1
        )
        train(
            model, task, task.examples(rows), lambda: Evaluation({"loss": 0.5}), objkern.CrossEntropy(), options,
            tmp_path / str(checkpointing),
        )  # fmt: skip
        found.append([p.detach() for p in model.parameters() if p.requires_grad])
    assert len(found[0]) > 1
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_terms_on_parameters_alone(tmp_path: Path) -> None:
    rows = rows_of("number", 4)
    task = task_of("number", rows)
    model = model_of(task)
    rest = (lambda: Evaluation({"r2": 0.5}), 0.1 * objkern.L2(model), TrainingOptions(epochs=1), tmp_path)
    with pytest.raises(ValueError, match=r"objective: expected a term that reads the model's answers but got 0\.1\*L2"):
        train(model, task, task.examples(rows), *rest)
    with torch.no_grad():
        model.classifier.weight.fill_(1e30)
        model.classifier.bias.fill_(torch.nan)  # of a batch's own loss first
    score, penalty, options, _ = rest
    with pytest.raises(FloatingPointError, match=r"the loss is nan in step 1: .*rows of the batch"):
        train(model, task, task.examples(rows), score, objkern.MeanSquaredError() + penalty, options, tmp_path)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
        model.bert.pooler.dense.weight.fill_(1e30)
    with pytest.raises(FloatingPointError, match=r"the loss is inf in step 1: .*, of the parameters alone"):
        train(model, task, task.examples(rows), score, objkern.MeanSquaredError() + penalty, options, tmp_path)


def test_matrices_decay_and_vectors_do_not() -> None:
    model = model_of(task_of("number", rows_of("number", 4)))
    decay = {p: group["weight_decay"] for group in training.parameter_groups(model, 0.1) for p in group["params"]}
    assert all(decay[p] == (0.1 if p.ndim >= 2 else 0.0) for p in model.parameters())


def test_dropout_is_one_of_seed_step_and_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two batches have the same, and what goes on after another version's checkpoint has that one's."""
    rows = rows_of("number", 8)
    task = task_of("number", rows)
    seeds: list[int] = []
    own = task.loss
    monkeypatch.setattr(task, "loss", lambda *a, **o: seeds.append(torch.initial_seed()) or own(*a, **o))
    options = TrainingOptions(epochs=1, batch_size=2, accumulation=2, seed=5)
    train(model_of(task), task, task.examples(rows), lambda: Evaluation({"r2": 0.5}), objkern.MeanSquaredError(), options,
          tmp_path)  # fmt: skip
    assert seeds == [(5 * 1_000_003 + step) * 2 + place for step in range(2) for place in range(2)]


def test_where_a_run_stands(tmp_path: Path) -> None:
    """Interrupted behind its first step; and what a file may say of it."""

    def log(record: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    outcome, _, _ = run("number", tmp_path, TrainingOptions(batch_size=2), log=log)
    sums = outcome.progress.sums
    assert outcome == Outcome("interrupted", Progress(batches=1, epoch=1, window=1, step=1, sums=sums))
    assert (outcome.progress.best, outcome.progress.best_epoch, outcome.progress.stale) == (None, 0, 0)
    for wrong, message in (
        ({"batches": 0}, "batches: expected a whole number of at least 1 but got 0"),
        ({"epoch": 0}, "epoch: expected a whole number of at least 1 but got 0"),
        ({"window": -1}, "window: expected a whole number of at least 0 but got -1"),
        ({"stale": 1.5}, "stale: expected a whole number of at least 0 but got 1.5"),
        ({"finished": "yes"}, "finished: expected true or false but got 'yes'"),
        ({"best": [1]}, r"best: expected a number but got \[1\]"),
        ({"seconds": None}, "seconds: expected a number but got None"),
        ({"sums": {"total": "1"}}, "total: expected a number but got '1'"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(outcome.progress, **wrong).check()


def test_what_a_checkpoint_may_not_hold(tmp_path: Path) -> None:
    """Each is said in a line, before anything is trained."""
    from safetensors.torch import load_file, save_file

    options = TrainingOptions(epochs=3, batch_size=4)
    log = lambda record: os.kill(os.getpid(), signal.SIGTERM) if record["step"] == 3 else None  # noqa: E731
    assert run("number", tmp_path, options, log=log)[0].how == "interrupted"
    newest = checkpoints.newest(tmp_path / "checkpoints")
    assert newest is not None
    files = {place: load_file(place / "tensors.safetensors") for place in (newest, newest.parent / "best")}
    states = {place: (place / "state.json").read_text() for place in files}
    first = next(name for name in files[newest] if name.startswith("model."))
    moment = next(name for name in files[newest] if name.endswith(".exp_avg"))
    step = moment.replace(".exp_avg", ".step")

    def changed(place: Path, message: str, tensors: dict[str, Tensor | None]) -> None:
        kept = {name: x for name, x in (files[place] | tensors).items() if x is not None}
        save_file(kept, place / "tensors.safetensors")
        state = json.loads(states[place]) | {"tensors": len(kept)}
        (place / "state.json").write_text(json.dumps(state))
        seen: list[Any] = []
        with pytest.raises(ValueError, match=message):
            run("number", tmp_path, options, log=seen.append, resume=True)
        assert seen == []
        save_file(files[place], place / "tensors.safetensors")
        (place / "state.json").write_text(states[place])

    for place in files:
        weight = files[place][first]
        changed(place, "is not what this run wrote: .*expected such a weight", {first: None})
        changed(place, "nobody has such a weight", {"model.more": torch.ones(1)})
        changed(place, "but got a torch.int32 tensor", {first: weight.to(torch.int32)})
        changed(place, "expected a torch.float32 tensor", {first: torch.ones(2)})
    changed(newest, "expected the shape of its parameter", {moment: torch.ones(2)})
    changed(newest, "expected the shape of its parameter", {step: torch.ones(2)})
    of_all = {name: None for name in files[newest] if name.endswith(".exp_avg_sq")}
    changed(newest, r"optimizer: expected \['exp_avg', 'exp_avg_sq', 'step'\]", of_all)
    (newest / "state.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="can't be read"):
        run("number", tmp_path, options, resume=True)
    (newest / "state.json").write_text(states[newest])
    assert run("number", tmp_path, options, resume=True)[0].how == "finished"


def test_the_best_weights_are_there_before_a_run_goes_on(tmp_path: Path) -> None:
    """Also those that were being replaced when it ended, which are put back."""
    options = TrainingOptions(epochs=3, batch_size=4)
    log = lambda record: os.kill(os.getpid(), signal.SIGTERM) if record["step"] == 3 else None  # noqa: E731
    assert run("number", tmp_path, options, log=log)[0].how == "interrupted"
    best = tmp_path / "checkpoints" / "best"
    best.rename(best.with_name("gone"))
    seen: list[Any] = []
    with pytest.raises(ValueError, match="best has no"):
        run("number", tmp_path, options, log=seen.append, resume=True)
    assert seen == []
    best.with_name("gone").rename(best.with_name(".best.old"))
    assert run("number", tmp_path, options, resume=True)[0].how == "finished"


def test_interruptions_within_others_are_the_same() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with training.interruptions() as outer, training.interruptions() as inner:
        assert not outer()
        os.kill(os.getpid(), signal.SIGTERM)
        assert outer()
        assert inner()
    assert signal.getsignal(signal.SIGTERM) is before
    with training.interruptions() as again:
        assert not again()


# ---- what ranks share, as far as one process can tell -------------------------------------------------------------------


def test_layouts() -> None:
    for spec in ("both", "fsdp:2", "data:", "tensor:0", "tensor:x", "tensor:", ""):
        with pytest.raises(ValueError, match="parallel: expected data, fsdp, tensor or tensor:K but got"):
            parallel.parse(spec)
    for spec, parsed in (("data", ("data", 0)), ("tensor", ("tensor", 0)), ("tensor:1", ("tensor", 1))):
        assert parallel.parse(spec) == parsed
    token, causal = TASKS["token-classification"], TASKS["causal-lm"]
    for name, strategy, task in (
        ("data", "gradual", token), ("data", "prompt:3", token), ("fsdp", "lora:2", token), ("tensor:2", "gradual", causal),
    ):  # fmt: skip
        parallel.check(name, strategy, task)
    for name, strategy, task in (("fsdp", "gradual", causal), ("fsdp", "prompt:3", causal), ("tensor", "full", token)):
        with pytest.raises(ValueError, match=f"parallel: {name} "):
            parallel.check(name, strategy, task)
    assert [Layout("data", rank, 3).places(4) for rank in range(3)] == [[0, 3], [1], [2]]
    assert [Layout("fsdp", rank, 3).places(4) for rank in range(3)] == [[0, 3], [1, None], [2, None]]
    assert Layout().places(2) == [0, 1]


def test_gradients_are_clipped() -> None:
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    assert parallel.clip(weights, 1.0) == 0.0
    weights[0].grad, weights[2].grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert parallel.clip(weights, 1.0) == 5.0
    torch.testing.assert_close(
        torch.cat([weights[0].grad, weights[2].grad]), torch.tensor([0.6, 0.8]), rtol=1e-4, atol=0
    )
    assert weights[1].grad is None


def test_ranks_wait_for_the_first_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = nn.Linear(2, 2), []
    assert parallel.whole(model).keys() == model.state_dict().keys()
    monkeypatch.setattr(parallel, "world", lambda: 2)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: seen.append("wait"))
    monkeypatch.setattr(torch.distributed, "broadcast", lambda x, src: seen.append(src))
    for name in ("save", "keep_newest", "restore_interrupted", "newest"):
        monkeypatch.setattr(checkpoints, name, lambda *arguments, name=name: seen.append(name))
    optimizer, options = torch.optim.SGD(model.parameters()), TrainingOptions()
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        training._checkpoint(tmp_path, model, optimizer, Progress(1), options)
        assert seen == ["wait"] if rank else ["save", "keep_newest", "wait"]
        seen.clear()
        assert training._resumed(tmp_path, model, optimizer, options) is None
        assert seen == ["wait", "newest"] if rank else ["restore_interrupted", "wait", "newest"]
        seen.clear()
        assert len(parallel.whole(model)) == (0 if rank else 2)
    parallel.same_weights(model)
    assert seen == [0, 0]
    for backend, device in (("nccl", "cuda"), ("gloo", "cpu")):
        monkeypatch.setattr(torch.distributed, "get_backend", lambda backend=backend: backend)
        assert parallel._device_type() == device
        assert training._place_of_objects() == torch.device(device)


# ---- the same as plain torch ----------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """REGULARIZED as people write it: every term a pass of its own."""
    logits, labels = logits.flatten(0, -2), labels.flatten()
    logits, labels = logits[labels != -100], labels[labels != -100]
    plain = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum")
    return (plain + 0.01 * logits.logsumexp(-1).square().sum()) / count


def native_loss(task: Task) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """What a task's loss is, by transformers' own logits and torch's own functions."""

    def loss(model: Any, batch: Any, objective: Any, count: int, **_: Any) -> tuple[Tensor, dict[str, Tensor]]:
        y, inputs = batch.target, batch.inputs
        if task.name == "question-answering":
            out, padding = model(**inputs), inputs["attention_mask"] == 0
            both = [z.masked_fill(padding, -torch.inf) for z in (out.start_logits, out.end_logits)]
            # Smoothed over the classes that there are.
            total = sum(
                cross_entropy(z[keep][None], k[None], count)
                for logits, labels in zip(both, y.unbind(1), strict=True)
                for z, k in zip(logits, labels, strict=True)
                if (keep := z > -torch.inf) is not None
            )
            return total / 2, {"total": (total / 2).detach()}
        if task.name == "seq2seq":
            value = cross_entropy(model(**inputs, labels=y).logits, y, count)
        elif task.name == "causal-lm":
            value = cross_entropy(model(**inputs, use_cache=False).logits[:, :-1], y[:, 1:], count)
        elif task.name == "token-classification" or task.problem == "single_label_classification":
            value = cross_entropy(model(**inputs).logits, y, count)
        elif task.problem == "regression":
            value = nn.functional.mse_loss(model(**inputs).logits[:, 0], y, reduction="sum") / count
        else:
            z = model(**inputs).logits
            value = nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum") / count
            value = value + 0.1 * z.square().sum() / count
        return value, {"total": value.detach()}

    return loss


@pytest.mark.parametrize("name", NAMES)
def test_fused_and_native_curves_are_the_same(name: str, tmp_path: Path) -> None:
    """Fifty steps of AdamW in float32, losses within 1e-4: objkern's objective, and the formula in plain torch."""
    formula = {"several": "BinaryCrossEntropy() + 0.1*LogitL2()", "number": "MeanSquaredError()"}.get(name, REGULARIZED)
    options = TrainingOptions(epochs=13, batch_size=4, accumulation=2, learning_rate=1e-3, patience=99)
    curves = []
    for how in ("fused", "native"):
        rows = rows_of(name, 30)
        task = task_of(name, rows)
        if how == "native":
            task.loss = native_loss(task)  # type: ignore[method-assign]
        model, records = model_of(task), []
        train(model, task, task.examples(rows), lambda task=task, model=model, rows=rows: task.score(model, rows[:2]),
              objkern.parse(formula), options, tmp_path / how, records.append)  # fmt: skip
        curves.append([record["total"] for record in records if record["event"] == "step"][:50])
    fused, native = map(torch.tensor, curves)
    assert len(fused) == 50
    assert fused[-5:].mean() < fused[:5].mean()
    torch.testing.assert_close(fused, native, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["token-classification", "causal-lm", "seq2seq"])
def test_activations_that_are_computed_anew_change_nothing(name: str, tmp_path: Path) -> None:
    """Not a bit, and dropout falls on the same places."""
    options = TrainingOptions(epochs=2, batch_size=4, learning_rate=1e-3)
    _, kept, _ = run(name, tmp_path / "kept", options, dropout=0.2)
    options = TrainingOptions(epochs=2, batch_size=4, learning_rate=1e-3, checkpointing=True)
    _, anew, _ = run(name, tmp_path / "anew", options, dropout=0.2)
    assert any(getattr(module, "gradient_checkpointing", False) for module in anew.modules())
    assert differences(kept, anew) == 0.0


@pytest.mark.parametrize("name", ["sequence-classification", "causal-lm"])
def test_mixed_precision(name: str, tmp_path: Path) -> None:
    """Products in bfloat16, weights and moments in float32: near, and not the same."""
    rows = []
    for precision in ("float32", "bfloat16"):
        options = TrainingOptions(epochs=3, batch_size=4, learning_rate=1e-3, precision=precision)
        _, model, records = run(name, tmp_path / precision, options)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        rows.append(torch.tensor([record["total"] for record in records if record["event"] == "step"]))
    assert not torch.equal(*rows)
    torch.testing.assert_close(*rows, rtol=2e-2, atol=0.0)
