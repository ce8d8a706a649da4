"""The demo: spans and scores by hand, an honest corpus, the same run twice; and schedules of coefficients."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from objkern.finetune.demo import main
from objkern.finetune.demo.baseline import most_frequent_tags
from objkern.finetune.demo.comparison import Trained, check_agreement
from objkern.finetune.demo.corpus import TAGS, kind_of, label_topic, load_corpus
from objkern.finetune.metrics import NOTHING, Score, Span, extract_spans, score_sets, score_spans
from objkern.finetune.schedules import Schedule, cosine, linear

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
    found = score_spans([["O"]], [["B-z"]])
    assert found == {"z": Score(0.0, 0.0, 0.0, 0), "micro": Score(0.0, 0.0, 0.0, 0)}, "nothing is there to be found"
    assert score_spans([["O"]], [["O"]]) == {"micro": Score(0.0, 0.0, 0.0, 0)}
    assert Score(0.0, 0.0, 0.0, 0) == NOTHING
    for scores_of, rows in ((score_spans, [["O"]]), (score_sets, [{"x"}])):
        with pytest.raises(ValueError, match="shorter"):
            scores_of(rows, [])


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


# ---- schedules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: linear(0.0, 1.0, until=0.0), "until"),
        (lambda: cosine(0.0, math.inf), "end"),
        (lambda: linear(-1.5e300, 0.0), "begin"),
        (lambda: linear(0.0, 1.5e300), "end"),
        (lambda: linear(0.0, 1.0, until=1.5), "until"),
        (lambda: Schedule(0.5, linear(0, 1)), "0-dim"),
        (lambda: Schedule(torch.tensor(1.0), linear(0, 1)).set(-1, 3), "step"),
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


def test_schedules_by_hand() -> None:
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    for until, values in ((1.0, (2.0, 2.5, 3.0, 3.5, 4.0)), (0.5, (2.0, 3.0, 4.0, 4.0, 4.0))):
        assert [linear(2.0, 4.0, until)(share) for share in shares] == list(values)
    assert [linear(2.0, 4.0)(share) for share in shares] == [2.0, 2.5, 3.0, 3.5, 4.0]
    quarter = 3.0 - math.sqrt(0.5)
    for until, values in ((1.0, (2.0, quarter, 3.0, 6.0 - quarter, 4.0)), (0.5, (2.0, 3.0, 4.0, 4.0, 4.0))):
        assert [cosine(2.0, 4.0, until)(share) for share in shares] == pytest.approx(list(values))
    assert [cosine(2.0, 4.0)(share) for share in (0.0, 0.5, 1.0)] == pytest.approx([2.0, 3.0, 4.0])
    coefficient = torch.tensor(0.0)
    schedule = Schedule(coefficient, linear(2.0, 4.0))
    for step, total, value in ((0, 1, 2.0), (0, 2, 2.0), (1, 2, 4.0), (1, 3, 3.0), (2, 3, 4.0)):
        schedule.set(step, total)
        assert coefficient.item() == value
    with pytest.raises(TypeError, match="shape: expected a function"):
        Schedule(coefficient, 0.5)


# ---- the demo -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fused_and_native_learn_the_same(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--quick", "--device", "cpu", "--output", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "FAILED" not in printed
    assert "ok      loss over the first" in printed
    fused, native = Trained.read(tmp_path / "fused"), Trained.read(tmp_path / "native")
    assert len(fused.losses) == len(native.losses) == fused.result["steps"] >= 10
    assert fused.losses[-1] < 0.8 * fused.losses[0]
    assert all(check.holds for check in check_agreement(fused, native))
    parts = {"cross_entropy", "z_loss", "entropy", "total", "learning_rate", "gradient_norm"}
    assert parts <= fused.steps[0].keys()
    assert parts <= native.steps[0].keys()
    for name in ("curves.png", "summary.json", "fused/report.html", "fused/model/model.safetensors"):
        assert (tmp_path / name).stat().st_size > 0

    assert main(arguments) == 0, "an earlier demo's folder is replaced"
    assert Trained.read(tmp_path / "fused").losses == fused.losses, "the same seed, the same bits"


def test_the_baseline_is_a_table_of_words() -> None:
    train = label_topic("a", 'You may use "for" here and use "for" there with ease.')
    test = label_topic("b", 'Nothing but a "for" statement comes close to "while" loops.')
    (tags,) = most_frequent_tags(train, test)
    assert dict(zip(test[0].words, tags, strict=True))["for"] == "B-keyword"
    assert dict(zip(test[0].words, tags, strict=True))["while"] == "O"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda:99"], "device: 'cuda:99' can't be used"),
        (["--output", "/dev/null/x"], "/dev/null/x"),
    ],
)
def test_bad_options_fail_before_training(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([*(["--output", str(tmp_path)] if "--output" not in options else []), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_example_learns() -> None:
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "examples/token_classification.py"],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step 200: cross_entropy" in done.stdout
