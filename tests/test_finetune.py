"""The fine-tuning room: spans and scores by hand, an honest corpus, a loop that learns, the same run twice."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from objkern import CrossEntropy, ZLoss
from objkern.finetune.baseline import most_frequent_tags
from objkern.finetune.comparison import check_agreement
from objkern.finetune.config import FinetuneConfig
from objkern.finetune.corpus import TAGS, kind_of, label_topic, load_corpus
from objkern.finetune.demo import main
from objkern.finetune.loop import EarlyStopping, parameter_groups, rate_at
from objkern.finetune.metrics import Span, extract_spans, score_spans
from objkern.finetune.native import fused_objective, native_objective
from objkern.finetune.run import load_splits, model_folder, predict_with_saved, prepare, run
from objkern.finetune.schedules import Schedule, cosine, linear
from objkern.finetune.token_classification import IGNORED, collate, encode, load_tokenizer

# ---- spans and scores, by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O O O", []),
        ("B-x I-x O", [("x", 0, 2)]),
        ("O B-x", [("x", 1, 2)]),
        ("B-x B-x I-x", [("x", 0, 1), ("x", 1, 3)]),  # adjacent entities of one kind
        ("B-x I-y", [("x", 0, 1), ("y", 1, 2)]),  # the kind changes without B-
        ("I-x I-x O I-x", [("x", 0, 2), ("x", 3, 4)]),  # I- without B- opens
        ("B-x I-x I-x", [("x", 0, 3)]),  # ends with the sentence
        ("B-x O I-x", [("x", 0, 1), ("x", 2, 3)]),
        ("", []),
    ],
)
def test_spans_by_hand(tags: str, spans: list) -> None:
    assert extract_spans(tags.split()) == [Span(*span) for span in spans]


def test_scores_by_hand() -> None:
    truth = [["B-x", "I-x", "O", "B-y"], ["B-x", "O"]]
    predicted = [["B-x", "I-x", "O", "B-x"], ["O", "O"]]
    scores = score_spans(truth, predicted)
    # x: one right of two predicted and two true; y: none predicted; pooled: 1 right, 2 predicted, 3 true
    assert (scores["x"].precision, scores["x"].recall, scores["x"].f1, scores["x"].support) == (0.5, 0.5, 0.5, 2)
    assert (scores["y"].precision, scores["y"].recall, scores["y"].f1, scores["y"].support) == (0.0, 0.0, 0.0, 1)
    assert scores["micro"].f1 == pytest.approx(2 * 1 / (2 + 3))
    half = score_spans([["B-x", "I-x"]], [["B-x", "O"]])
    assert half["micro"].f1 == 0.0, "half an entity is nothing"
    with pytest.raises(ValueError, match="sentence 0 has 1 true tags and 2 predicted ones"):
        score_spans([["O"]], [["O", "O"]])


# ---- the corpus -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("for", "keyword"), ("async for", "keyword"), ("except*", "keyword"), ("match", "keyword"),
        ("ValueError", "exception"), ("__init__()", "special"), ("object.__len__", "special"), ("len(s)", "builtin"),
        ("type", "builtin"), ("x + 1", "code"), ("mymodule.f", "code"),
    ],
)  # fmt: skip
def test_kinds_come_from_python_itself(code: str, kind: str) -> None:
    assert kind_of(code) == kind


def test_quotes_become_labels_and_leave_no_trace() -> None:
    (sentence,) = label_topic("t", 'The "for" statement may raise "ValueError" when it calls "x.f(1)" again.')
    assert '"' not in sentence.text
    assert [sentence.text[a:b] for a, b in sentence.offsets] == list(sentence.words)
    labelled = [(w, t) for w, t in zip(sentence.words, sentence.tags, strict=True) if t != "O"]
    assert labelled == [
        ("for", "B-keyword"), ("ValueError", "B-exception"),
        ("x", "B-code"), (".", "I-code"), ("f", "I-code"), ("(", "I-code"), ("1", "I-code"), (")", "I-code"),
    ]  # fmt: skip


def test_the_splits_share_no_sentence_and_are_always_the_same() -> None:
    corpus, again = load_corpus(), load_corpus()
    assert corpus == again
    seen = [{tuple(word.lower() for word in s.words) for s in sentences} for sentences in corpus.values()]
    assert sum(map(len, seen)) == len(set().union(*seen))
    assert all(len(corpus[split]) > 200 for split in ("train", "dev", "test"))
    for sentences in corpus.values():
        for s in sentences:
            assert '"' not in s.text
            assert len(s.words) == len(s.tags) == len(s.offsets)
            assert set(s.tags) <= set(TAGS)


# ---- a tiny run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    config = replace(
        FinetuneConfig(output=tmp_path_factory.mktemp("run"), device="cpu").quick(), epochs=3, sentences=96
    )
    prepare(config, load_splits(config))
    return config


def test_labels_stand_on_first_subwords(tiny: FinetuneConfig) -> None:
    sentences = load_splits(tiny)["dev"][:8]
    tokenizer = load_tokenizer(str(model_folder(tiny)))
    examples = encode(sentences, tokenizer, tiny.max_length)
    for sentence, example in zip(sentences, examples, strict=True):
        labelled = [label for label in example.labels if label != IGNORED]
        assert [TAGS[label] for label in labelled] == list(sentence.tags)
        assert example.labels[0] == example.labels[-1] == IGNORED  # [CLS], [SEP]
    inputs, target = collate(examples, tokenizer.pad_token_id, torch.device("cpu"))
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == target.shape
    assert (target[inputs["attention_mask"] == 0] == IGNORED).all()


def test_fused_and_native_learn_the_same(tiny: FinetuneConfig) -> None:
    fused = run(tiny, fused_objective(), "fused", True)
    native = run(tiny, native_objective, "native", False)
    assert fused.losses[-1] < 0.8 * fused.losses[0]
    for ours, theirs in list(zip(fused.losses, native.losses, strict=True))[:10]:
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert all(check.holds for check in check_agreement(fused, native)), check_agreement(fused, native)
    assert fused.losses == run(tiny, fused_objective(), "again", False).losses, "the same seed, the same bits"
    records = [json.loads(line) for line in (tiny.output / "fused.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["event"] == "step"]
    assert len(steps) == len(fused.losses)
    assert {"cross_entropy", "z_loss", "entropy", "total", "learning_rate", "gradient_norm"} <= steps[0].keys()
    assert (model_folder(tiny) / "model.safetensors").exists()
    sentences = load_splits(tiny)["test"][:3]
    assert [len(tags) for tags in predict_with_saved(tiny, sentences)] == [len(s.words) for s in sentences]


def test_coefficients_follow_their_schedules(tiny: FinetuneConfig, tmp_path: Path) -> None:
    """In place before every step; what the loop logs is what the loss was made of."""
    config = replace(tiny, output=tmp_path, epochs=2, sentences=40)
    prepare(config, load_splits(config))
    strength, sharp = torch.tensor(5.0), torch.tensor(-1.0)
    schedules = [Schedule(strength, linear(0.0, 0.01, until=0.5)), Schedule(sharp, cosine(0.5, 1.0))]
    result = run(config, sharp * CrossEntropy() + strength * ZLoss(), "scheduled", save=False, schedules=schedules)
    steps = result.training.steps
    last = len(steps) - 1
    assert last >= 3
    for number, step in enumerate(steps):
        assert step["coefficient_0"] == pytest.approx(min(0.01, 0.01 * number / last / 0.5), abs=1e-7)
        parts = step["coefficient_1"] * step["cross_entropy"] + step["coefficient_0"] * step["z_loss"]
        assert step["total"] == pytest.approx(parts, rel=1e-5)
    assert (steps[0]["coefficient_1"], steps[-1]["coefficient_1"]) == (pytest.approx(0.5), pytest.approx(1.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear(0.0, 1.0, until=0.0), "until"),
        (lambda: cosine(0.0, math.inf), "end"),
        (lambda: Schedule(torch.tensor(1.0), linear(0, 1)).set(3, 3), "step"),
        (lambda: Schedule(torch.tensor(1.0), lambda share: math.nan).set(0, 3), "shape"),
        (lambda: Schedule(torch.ones(2), linear(0, 1)), "0-dim"),
        (lambda: Schedule(torch.tensor(1), linear(0, 1)), "floating-point"),
        (lambda: Schedule(torch.tensor(1.0, requires_grad=True), linear(0, 1)), "learned"),
    ],
)
def test_bad_schedules_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_early_stopping_keeps_the_best_weights() -> None:
    model = torch.nn.Linear(1, 1)
    stopping = EarlyStopping(patience=2)
    stops = []
    for epoch, score in enumerate([0.1, 0.5, 0.5, 0.4], start=1):
        torch.nn.init.constant_(model.weight, epoch)
        stops.append(stopping.should_stop(epoch, score, model))
    assert stops == [False, False, False, True]
    assert stopping.best_epoch == 2
    stopping.restore(model)
    assert model.weight.item() == 2.0


def test_schedule_and_decay() -> None:
    rates = [rate_at(step, 10, 0.2) for step in range(10)]
    assert rates[:2] == [0.5, 1.0]
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.2
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    decayed, spared = parameter_groups(model, 0.01)
    assert [p.ndim for p in decayed["params"]] == [2]
    assert [p.ndim for p in spared["params"]] == [1, 1, 1]
    assert spared["weight_decay"] == 0.0


def test_the_baseline_is_a_table_of_words() -> None:
    train = label_topic("a", 'You may use "for" here and use "for" there with ease.')
    test = label_topic("b", 'Nothing but a "for" statement comes close to "while" loops.')
    (tags,) = most_frequent_tags(train, test)
    assert dict(zip(test[0].words, tags, strict=True))["for"] == "B-keyword"
    assert dict(zip(test[0].words, tags, strict=True))["while"] == "O"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "-1"], "epochs must be at least 1, not -1"),
        (["--model", "/nowhere/at/all"], "model folder '/nowhere/at/all' does not exist"),
        (["--device", "cuda:99"], "device 'cuda:99' can't be used"),
        (["--output", "/dev/null/x"], "output folder '/dev/null/x' can't be written"),
    ],
)
def test_bad_options_fail_before_training(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*(["--output", str(tmp_path)] if "--output" not in options else []), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_example_learns() -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "examples/token_classification.py"],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step 200: cross_entropy" in done.stdout
