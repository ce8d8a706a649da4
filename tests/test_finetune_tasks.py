"""Data and tasks of fine-tuning: what is read, what counts, how answers are scored, and errors that name row and field."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import objkern  # noqa: E402
from objkern.finetune import data, small  # noqa: E402
from objkern.finetune.tasks import TASKS  # noqa: E402
from objkern.finetune.tasks.task import IGNORED  # noqa: E402
from objkern.transformers import attach, detach, is_attached  # noqa: E402

WORDS = [
    "the", "cat", "sat", "on", "a", "mat", "and", "who", "is", "there", "?", "it", "was", "not", "dog", ",", "nor", "blue",
    "1", "2", "3", ".", "user", "assistant", "system", ":", "good", "bad", "say", "hello", "world", "yes", "no",
]  # fmt: skip


def tokenizer_of_words(**names: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: k for k, token in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=64, **names,
    )  # fmt: skip


# ---- files ----------------------------------------------------------------------------------------------------------

ROWS = [{"text": "the cat", "label": "good"}, {"text": "a dog, nor", "label": "bad"}]


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row) for row in ROWS)
    paths = [written(tmp_path, "a.jsonl", f"\ufeff{lines}\n\n"), written(tmp_path, "b.json", json.dumps(ROWS)),
             written(tmp_path, "c.csv", 'text,label\nthe cat,good\n"a dog, nor",bad\n'),
             written(tmp_path, "d.tsv", "text\tlabel\nthe cat\tgood\na dog, nor\tbad\n")]  # fmt: skip
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "e.parquet")
    for path in [*paths, tmp_path / "e.parquet"]:
        assert data.read(path) == ROWS, path.name


def test_a_folder_has_splits(tmp_path: Path) -> None:
    written(tmp_path, "train.jsonl", json.dumps(ROWS[0]))
    written(tmp_path, "validation.csv", "text,label\nx,good\n")
    assert data.read(tmp_path) == ROWS[:1]
    assert data.read_all(tmp_path) == {"train": ROWS[:1], "dev": [{"text": "x", "label": "good"}]}
    with pytest.raises(
        ValueError,
        match=r"has no test split: expected one called test or testing \(\.jsonl, .* found train\.jsonl, validation\.csv",
    ):
        data.read(tmp_path, "test")


def test_a_folder_has_files_of_rows_and_others(tmp_path: Path) -> None:
    written(tmp_path, "train.jsonl", json.dumps(ROWS[0]))
    written(tmp_path, "dev.txt", "notes")
    (tmp_path / "test.jsonl").mkdir()
    assert data.read_all(tmp_path) == {"train": ROWS[:1]}


@pytest.mark.parametrize("count", [20, 21])
def test_errors_do_not_list_everything(count: int, tmp_path: Path) -> None:
    names = [f"{k:02}.md" for k in range(count)]
    for name in names:
        written(tmp_path, name, "")
    with pytest.raises(ValueError, match="has no train split") as caught:
        data.read(tmp_path)
    assert str(caught.value).endswith(f"found {', '.join(names[:20])}" + (", ..." if count > 20 else ""))
    assert data._short("x" * (count + 58)) == repr("x" * 78) if count == 20 else f"'{'x' * 76}..."


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jsonl", "a.json", "a.csv"):
        (tmp_path / name).write_bytes(b'{"text": "\xff"}')
        with pytest.raises(ValueError, match=rf"{name} is not UTF-8: "):
            data.read(tmp_path / name)

    def refused(path: Path, **options: Any) -> str:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", refused)
        with pytest.raises(ValueError, match=r"a\.json can't be read: Permission denied"):
            data.read(tmp_path / "a.json")
    for package, source in (("pyarrow", written(tmp_path, "a.parquet", "")), ("datasets", "squad")):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, package, None)
            with pytest.raises(ValueError, match=rf"data: .* needs (the package )?{package}: pip install {package}"):
                data.read(source)


def test_a_name_on_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or {"train": table})
    for source in ("squad", "glue:mrpc"):
        assert data.read(source) == ROWS
    assert asked == [("squad",), ("glue", "mrpc")]


def test_a_split_in_pieces(tmp_path: Path) -> None:
    for k, row in enumerate(ROWS):
        written(tmp_path, f"train-{k:05}-of-00002.jsonl", json.dumps(row))
    assert data.read(tmp_path) == ROWS
    (tmp_path / "train-00001-of-00002.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"expected one file for a split, or all of its pieces, but got train-00000-of"
    ):
        data.read(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train.csv", "train.jsonl"), r"expected one file for a split, .* but got train\.csv and train\.jsonl"),
        (("train.jsonl", "dev.jsonl", "validation.jsonl"), r"expected one dev split but got validation and dev"),
        (("Train.jsonl", "train.jsonl.gz"), r"called train or training .* but found Train\.jsonl, train\.jsonl\.gz"),
        (("dataset_dict.json",), r"can't be loaded by datasets\.load_from_disk: \w+: .*"),
        ((), r"has no train split: .* but found nothing"),
    ],
)
def test_a_folder_that_does_not_say_what_to_read(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for name in names:
        written(tmp_path, name, "{}")
    with pytest.raises(ValueError, match=message):
        data.read_all(tmp_path)


def test_a_folder_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    table = datasets.Dataset.from_list([{"text": "the cat", "label": 1}, {"text": "a dog, nor", "label": 0}], features)
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(str(tmp_path / "saved"))
    assert data.read(tmp_path / "saved") == ROWS  # by the names of the classes
    assert data.read(tmp_path / "saved", "dev") == ROWS
    with pytest.raises(ValueError, match="has no test split"):
        data.read(tmp_path / "saved", "test")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: "),
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"a\.jsonl, line 2: expected an object with columns but got '\[1\]'"),
        ("a.json", "[{]", r"a\.json, line 1: "),
        ("a.csv", "text,label\nx\n", r"a\.csv, line 2: expected the 2 columns of the first line but got 1"),
        ("a.csv", "text,label\nx,1,2\n", r"a\.csv, line 2: expected the 2 columns of the first line but got 3"),
        ("a.txt", "x", r"a\.txt: expected a file ending in"),
        ("a.parquet", "no parquet", r"a\.parquet: "),
        ("a.jsonl", '\n{"label": 1, "label": 2}', r"a\.jsonl, line 2: expected one 'label' but got 2"),
        ("a.csv", "label,text,label\n", r"a\.csv, line 1: expected one 'label' but got 2"),
        (
            "a.jsonl",
            f'{{}}\n{{"label": {"[" * 99999}\n',
            r"a\.jsonl, line 2: expected brackets less deep within each other",
        ),
        ("a.jsonl", f'{{}}\n{{"label": {"1" * 5000}}}', r"a\.jsonl, line 2: expected a number of .* but got 5000"),
        ("a.json", f'[{{"label": {"1" * 5000}}}]', r"a\.json, line 1: expected a number of .* but got 5000"),
        ("a.json", "7", r"a\.json: expected a list of rows but got 7"),
        ("a.json", "[{}, 5]", r"a\.json, row 2: expected an object with columns but got '5'"),
        ("a.csv", 'text\n"a"b\n', r"a\.csv, line 1: ',' expected after"),
        (
            "a.csv",
            f"label\n1.5\n{'1' * 5000}\n",
            r"a\.csv, row 2, column 'label': expected a class or a finite number but",
        ),
        (
            "a.csv",
            "label\npos\nnan\n",
            r"a\.csv, row 2, column 'label': expected a class or a finite number but got 'nan'",
        ),
        (
            "a.csv",
            "label\n1\n-Inf\n",
            r"a\.csv, row 2, column 'label': expected a class or a finite number but got '-Inf'",
        ),
    ],
)
def test_a_bad_file_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        data.read(written(tmp_path, name, text))
    assert "\n" not in str(caught.value)


def test_a_document_with_its_rows_as_data(tmp_path: Path) -> None:
    assert data.read(written(tmp_path, "a.json", json.dumps({"version": 1, "data": ROWS}, indent=1))) == ROWS
    assert data.read(written(tmp_path, "b.json", json.dumps(ROWS[0], indent=1))) == ROWS[:1]
    assert data.read(written(tmp_path, "c.json", "\n".join(map(json.dumps, ROWS)))) == ROWS
    assert data.read(written(tmp_path, "d.json", json.dumps({"version": 1, "data": ROWS}) + "\n")) == ROWS


def test_what_does_not_exist(tmp_path: Path) -> None:
    for source in (tmp_path / "no.jsonl", "./nowhere", "missing.csv"):
        with pytest.raises(ValueError, match="does not exist"):
            data.read(source)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.jsonl").symlink_to("nowhere.jsonl")
    for source, message in (
        (tmp_path / "pipe.jsonl", "expected a file or a folder but got a pipe or a device"),
        (tmp_path / "link.jsonl", "is a link to 'nowhere.jsonl', which does not exist"),
        ("x" * 300, "can't be read: File name too long"),
    ):
        with pytest.raises(ValueError, match=message):
            data.read(source)


BAD = {
    "sequence-classification": ({"text": "x", "label": None}, "column 'label': expected a class"),
    "token-classification": ({"words": "the cat", "tags": ["O"]}, "column 'words': expected a list of words"),
    "question-answering": ({"question": "x", "context": "y", "answers": "z"}, "column 'answers': expected {\"text\""),
    "causal-lm": ({"messages": [{"role": "user"}]}, "column 'messages': expected a list of"),
    "seq2seq": ({"source": "x", "target": " "}, "column 'target': expected a text but got ' '"),
}
GOOD: dict[str, dict[str, Any]] = {
    "sequence-classification": {"text": "the cat", "label": "good"},
    "token-classification": {"words": ["the", "cat"], "tags": ["O", "B-animal"]},
    "question-answering": {"question": "who", "context": "the cat", "answers": {"text": ["cat"], "answer_start": [4]}},
    "causal-lm": {"text": "the cat sat"},
    "seq2seq": {"source": "the cat", "target": "a dog"},
}


@pytest.mark.parametrize("name", TASKS)
def test_the_first_bad_row_and_field_are_named(name: str) -> None:
    bad, message = BAD[name]
    with pytest.raises(ValueError, match=rf"corpus, row 2, {message}"):
        TASKS[name](tokenizer_of_words(), [GOOD[name], bad], source="corpus")
    with pytest.raises(ValueError, match=r"corpus: there are no rows"):
        data.checked([], TASKS[name].columns, "corpus")
    needed = [column.name for column in TASKS[name].columns if column.needed]
    if needed:
        with pytest.raises(
            ValueError, match=rf"row 1, column '{needed[0]}': expected .* but there are only \['a\\nb'\]"
        ):
            TASKS[name](tokenizer_of_words(), [{"a\nb": 1}])


def test_rows_keep_their_numbers(tmp_path: Path) -> None:
    """Whichever of them are left: errors name the row of the file, and so do batches."""
    rows = data.read(
        written(tmp_path, "a.jsonl", "".join(json.dumps({"text": "cat", "label": str(k)}) + "\n" for k in range(9)))
    )
    kept = pickle.loads(pickle.dumps(rows[::2]))  # rows 1, 3, 5, 7, 9
    task = classification(kept)
    assert task.collate(task.examples(kept[1:3])).rows == [3, 5]
    assert task.collate(task.examples([dict(row) for row in kept[1:3]])).rows == [1, 2]
    with pytest.raises(ValueError, match=r"a\.jsonl, row 8, column 'label': '7' does not occur in training"):
        task.examples([rows[2], rows[7]], "dev data")
    kept[3]["text"] = " "
    with pytest.raises(ValueError, match=r"^[^ ]*a\.jsonl, row 7, column 'text': expected a text but got ' '"):
        data.checked(kept, task.columns, "dev data")


@pytest.mark.parametrize("name", TASKS)
def test_every_task_names_rows_by_their_own_numbers(name: str) -> None:
    row = data.FoundRow(GOOD[name], "a.jsonl", 7)
    task = TASKS[name](tokenizer_of_words(), [row])
    assert task.collate(task.examples([row])).rows == [7]


def test_texts_in_a_packed_sequence_are_all_named() -> None:
    task = causal(max_length=12, pack=True)
    examples = task.examples([{"text": "the cat sat"}, {"text": "yes"}])
    assert sorted(task.collate(examples).rows) == [1, 2]


HALF = "cat \ud83d"  # the first half of a character that has two in UTF-16


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        ("sequence-classification", "text", HALF),
        ("sequence-classification", "label", HALF),
        ("sequence-classification", "label", ["x", HALF]),
        ("token-classification", "words", ["the", HALF]),
        ("question-answering", "answers", {"text": [HALF], "answer_start": [4]}),
        ("causal-lm", "messages", [{"role": "user", "content": HALF}]),
        ("seq2seq", "target", HALF),
    ],
)
def test_half_a_character_is_no_text(name: str, column: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"row 2, column '{column}': expected whole characters but got half of one in 'cat \\ud83d'"
    ):
        data.checked([GOOD[name], {**GOOD[name], column: value}], TASKS[name].columns)
    data.checked([{**GOOD[name], "note": HALF}], TASKS[name].columns)  # which nobody reads


def test_a_small_model_reads_what_its_task_reads(tmp_path: Path) -> None:
    rows = [{**GOOD["seq2seq"], "note": HALF}, {**GOOD["seq2seq"], "note": "dog " * 99}]
    folder = small.make(tmp_path, TASKS["seq2seq"], rows, small.SmallModel(16, 1, 2), 32, 0)
    assert "dog" in transformers.AutoTokenizer.from_pretrained(folder).decode([*range(3, 400)])  # of the target, once
    assert "note" not in (folder / "tokenizer.json").read_text()


# ---- sequence classification ----------------------------------------------------------------------------------------


def classification(rows: list[dict[str, Any]]) -> Any:
    return TASKS["sequence-classification"](tokenizer_of_words(), rows)


def test_the_labels_decide_what_is_learned() -> None:
    of_class = classification([{"text": "a", "label": 10}, {"text": "b", "label": 2}])
    assert (of_class.labels, of_class.formula(), of_class.metric) == (["2", "10"], "CrossEntropy()", "accuracy")
    several = classification([{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}])
    assert (several.labels, several.formula(), several.metric) == (["x", "y"], "BinaryCrossEntropy()", "micro_f1")
    assert [e.label for e in several.examples([{"text": "a", "label": ["y"]}])] == [[0.0, 1.0]]
    number = classification([{"text": "a", "label": 1.5}, {"text": "b", "label": 2}])
    assert (number.formula(), number.metric, number.model_options()["num_labels"]) == ("MeanSquaredError()", "r2", 1)
    batch = several.collate(several.examples([{"text": "a", "label": []}, {"text": "the cat sat", "label": ["x"]}]))
    assert (batch.count, batch.target.dtype, batch.inputs["input_ids"].shape) == (4, torch.float32, (2, 5))
    assert batch.inputs["attention_mask"].sum().item() == 3 + 5


def test_labels_that_do_not_fit_the_others() -> None:
    for labels, message in (
        ((["x"], "x"), "row 2, column 'label': expected a list of labels, as row 1 has, but got 'x'"),
        (("x", 1.5), "row 1, column 'label': expected a number, as row 2 has, but got 'x'"),
        ((0, True), "row 1, column 'label': expected true or false, as row 2 has, but got 0"),
        (([], []), "data, column 'label': expected a label in some row but every list is empty"),
        ((1.5, float("nan")), "row 2, column 'label': expected a class .* but got nan"),
        (("x", float("-inf")), "row 2, column 'label': expected a class .* but got -inf"),
        ((1.5, 10**400), "row 2, column 'label': expected a class .* but got 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            classification([{"text": "a", "label": label} for label in labels])
    with pytest.raises(ValueError, match=r"row 1, column 'label': expected a number, as training has, but got nan"):
        classification([{"text": "a", "label": 0.5}]).examples([{"text": "a", "label": float("nan")}])
    task = classification([{"text": "a", "label": "x"}])
    with pytest.raises(ValueError, match=r"dev, row 1, column 'label': 'z' does not occur in training, which has x"):
        task.examples([{"text": "a", "label": "z"}], "dev")
    with pytest.raises(ValueError, match=r"row 2, column 'text_pair': expected a text, as other rows have one"):
        task.examples([{"text": "a", "text_pair": "b"}, {"text": "a"}])


def test_scores_of_classes_labels_and_numbers() -> None:
    rows = [{"text": "a", "label": label} for label in ("x", "x", "y", "z")]
    found = classification(rows).evaluate(rows, ["x", "y", "y", "x"])
    assert found.metrics["accuracy"] == 0.5
    assert found.metrics["macro_f1"] == pytest.approx((0.5 + 2 / 3 + 0) / 3)
    assert found.confusion == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert found.table[1] == ["x", 0.5, 0.5, 0.5, 2]
    rows = [{"text": "a", "label": label} for label in (["x"], ["x", "y"], [])]
    found = classification(rows).evaluate(rows, [["x"], ["y"], ["x"]])
    assert found.metrics["accuracy"] == pytest.approx(1 / 3)
    assert found.metrics["micro_f1"] == pytest.approx(2 * 2 / (3 + 3))
    rows = [{"text": "a", "label": label} for label in (["spam"], [], [], [])]  # one label: not its complement
    found = classification(rows).evaluate(rows, [[], [], ["spam"], []])
    assert found.table[1:] == [["spam", 0.0, 0.0, 0.0, 1]]
    assert found.metrics == {"accuracy": 0.5, "micro_f1": 0.0, "macro_f1": 0.0}
    found = classification(rows).evaluate(rows, [["spam"], [], ["spam"], []])
    assert found.table[1:] == [["spam", 0.5, 1.0, pytest.approx(2 / 3), 1]]
    rows = [{"text": "a", "label": label} for label in (1.0, 2.5, 4.0)]
    assert classification(rows).evaluate(rows, [1.0, 2.5, 3.0]).metrics["mse"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("several", [False, True])
def test_scores_are_those_of_sklearn(several: bool) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    names, generator = ["a", "b", "c", "d"], torch.Generator().manual_seed(1)

    def labels() -> list[Any]:
        if several:
            marks = torch.rand(40, 4, generator=generator) < 0.4
            return [[name for name, mark in zip(names, row, strict=True) if mark] for row in marks.tolist()]
        return [names[k] for k in torch.randint(4, (40,), generator=generator).tolist()]

    truth, answers = labels(), labels()
    rows = [{"text": "x", "label": label} for label in truth]
    found = classification(rows).evaluate(rows, answers)
    if several:
        truth, answers = ([[name in some for name in names] for some in labels] for labels in (truth, answers))
    for kind in ("micro", "macro"):
        assert found.metrics[f"{kind}_f1"] == pytest.approx(metrics.f1_score(truth, answers, average=kind))
    assert found.metrics["accuracy"] == pytest.approx(metrics.accuracy_score(truth, answers))
    by_class = zip(*metrics.precision_recall_fscore_support(truth, answers), strict=True)
    assert [row[1:] for row in found.table[1:]] == [pytest.approx(list(map(float, scores))) for scores in by_class]


# ---- token classification -------------------------------------------------------------------------------------------


def test_the_first_sub_word_carries_the_tag() -> None:
    rows = [{"words": ["the", "cat,nor", "dog"], "tags": ["O", "B-x", "I-x"]}]
    task = TASKS["token-classification"](tokenizer_of_words(), rows)
    assert task.labels == ["O", "B-x", "I-x"]
    (example,) = task.examples(rows)
    assert example.label == [IGNORED, 0, 1, IGNORED, IGNORED, 2, IGNORED]
    assert task.collate([example]).count == 3
    with pytest.raises(ValueError, match=r"row 1, column 'tags': expected 3 tags, one for every word, but got 1"):
        task.examples([{**rows[0], "tags": ["O"]}])
    with pytest.raises(ValueError, match=r"row 1, column 'tags': 'B-y' does not occur in training"):
        task.examples([{**rows[0], "tags": ["O", "O", "B-y"]}])


@pytest.mark.parametrize("seed", range(20))
def test_entities_are_scored_as_seqeval_scores_them(seed: int) -> None:
    seqeval = pytest.importorskip("seqeval.metrics")
    generator = torch.Generator().manual_seed(seed)
    names = ["O", "B-x", "I-x", "B-y", "I-y"]

    def tags() -> list[list[str]]:
        lengths = torch.randint(1, 12, (8,), generator=generator).tolist()
        torch.manual_seed(0)
        return [[names[k] for k in torch.randint(5, (n,), generator=generator).tolist()] for n in lengths]

    truth = tags()
    noise = [[tag if torch.rand((), generator=generator) < 0.6 else names[0] for tag in row] for row in truth]
    rows = [{"words": ["the"] * len(row), "tags": row} for row in truth]
    found = TASKS["token-classification"](tokenizer_of_words(), rows).evaluate(rows, noise).metrics
    for name, function in (("f1", "f1_score"), ("precision", "precision_score"), ("recall", "recall_score")):
        assert found[name] == pytest.approx(getattr(seqeval, function)(truth, noise)), name
    assert found["accuracy"] == pytest.approx(seqeval.accuracy_score(truth, noise))


def test_tags_that_mark_no_entities_are_scored_one_by_one() -> None:
    rows = [{"words": ["the", "cat", "sat"], "tags": ["DET", "NOUN", "VERB"]},
            {"words": ["a", "dog"], "tags": ["DET", "NOUN"]}]  # fmt: skip
    task = TASKS["token-classification"](tokenizer_of_words(), rows)
    found = task.evaluate(rows, [["DET", "NOUN", "NOUN"], ["DET", "VERB"]])
    assert (task.metric, found.metrics) == ("accuracy", {"accuracy": 0.6})
    assert found.table == [["tag", "precision", "recall", "f1", "words"], ["DET", 1.0, 1.0, 1.0, 2],
                           ["NOUN", 0.5, 0.5, 0.5, 2], ["VERB", 0.0, 0.0, 0.0, 1]]  # fmt: skip
    for tags in (["B-x", "I-x"], ["B", "I"], ["O", "I-x"]):
        row = {"words": ["the", "cat"], "tags": tags}
        assert TASKS["token-classification"](tokenizer_of_words(), [row]).metric == "f1"


def test_words_without_a_token() -> None:
    rows = [{"words": ["", " "], "tags": ["O", "B-x"]}]
    task = TASKS["token-classification"](tokenizer_of_words(), rows)
    with pytest.raises(ValueError, match="corpus: nothing is left to learn: no word has a token"):
        task.examples(rows, "corpus")
    assert len(task.examples([{"words": rows[0]["words"]}])) == 1  # to be predicted: O, O
    assert len(task.examples([*rows, {"words": ["cat"], "tags": ["O"]}])) == 2


# ---- question answering ---------------------------------------------------------------------------------------------


def test_windows_and_their_answers() -> None:
    context = "the cat sat on a mat and it was not a dog"
    row = {
        "question": "who is there ?",
        "context": context,
        "answers": {"text": ["a dog"], "answer_start": [context.index("a dog")]},
    }
    task = TASKS["question-answering"](tokenizer_of_words(), [row], max_length=14)
    examples = task.examples([row])
    assert len(examples) > 1
    for example in examples:
        first, last = example.label
        if (first, last) != (0, 0):
            assert context[example.about[first][0] : example.about[last][1]] == "a dog"
    assert [example.label != (0, 0) for example in examples].count(True) >= 1
    assert examples[0].label == (0, 0)
    for texts, starts in ((["a cat"], [4]), (["cat", "a cat"], [4, 4]), (["cat"], [10**30])):
        wrong = {**row, "answers": {"text": texts, "answer_start": starts}}
        with pytest.raises(
            ValueError,
            match=rf"row 2, column 'answers': expected '{texts[-1]}' at place {starts[-1]} of the context but",
        ):
            task.examples([row, wrong])
    for text, start in (("dog", -3), ("", 4), (" ", 3)):
        wrong = {**row, "answers": {"text": [text], "answer_start": [start]}}
        with pytest.raises(ValueError, match=r"row 2, column 'answers': expected .* but got"):
            data.checked([row, wrong], task.columns)


def test_answers_are_compared_as_squad_compares_them() -> None:
    rows = [{"question": "q", "context": "c", "answers": {"text": texts, "answer_start": [0] * len(texts)}}
            for texts in (["The cat!"], ["a big dog", "dog"], [], ["x"])]  # fmt: skip
    found = TASKS["question-answering"](tokenizer_of_words()).evaluate(rows, ["cat", "big dogs", "", "y"]).metrics
    assert found["exact_match"] == pytest.approx(2 / 4)
    assert found["f1"] == pytest.approx((1 + 0.5 + 1 + 0) / 4)


# ---- language models ------------------------------------------------------------------------------------------------


def causal(**options: Any) -> Any:
    return TASKS["causal-lm"](options.pop("tokenizer", None) or tokenizer_of_words(), **options)


def said(task: Any, row: dict[str, Any]) -> str:
    (example,) = task.examples([row])
    return task.tokenizer.decode([y for y in example.label if y != IGNORED])


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
CHAT = [{"role": "system", "content": "good"}, {"role": "user", "content": "say hello"},
        {"role": "assistant", "content": "hello world"}, {"role": "user", "content": "no"},
        {"role": "assistant", "content": "yes"}]  # fmt: skip


def test_only_what_the_model_is_to_say_counts() -> None:
    task = causal()
    assert said(task, {"text": "the cat"}) == "<s> the cat </s>"  # the first one is shifted away
    assert task.collate(task.examples([{"text": "the cat"}])).count == 3
    assert said(task, {"prompt": "the cat", "completion": "sat on"}) == "sat on </s>"
    assert said(task, {"messages": CHAT}) == "hello world </s> yes </s>"
    templated = causal(tokenizer=tokenizer_of_words(chat_template=TEMPLATE))
    assert said(templated, {"messages": CHAT}) == "hello world </s> yes </s>"
    (example,) = templated.examples([{"messages": CHAT}])
    assert templated.tokenizer.decode(example.inputs["input_ids"]).startswith(
        "system : good </s> user : say hello </s>"
    )
    changing = causal(tokenizer=tokenizer_of_words(chat_template="{{ messages|length }} " + TEMPLATE))
    with pytest.raises(ValueError, match=r"row 1, column 'messages': .* does not put an answer"):
        changing.examples([{"messages": CHAT}])
    with pytest.raises(ValueError, match=r"row 1: expected a column text, or prompt and completion, or messages"):
        task.examples([{"prompt": "x"}])


def test_long_texts_go_on_and_packed_ones_share_a_sequence() -> None:
    task = causal(max_length=8)
    row = {"text": "the cat sat on a mat and who is there"}
    assert [example.length for example in task.examples([row])] == [8, 4]
    packed = causal(max_length=12, pack=True)
    rows = [{"text": "the cat sat on a mat"}, {"text": "yes"}, {"text": "no"}, {"text": "it was blue"}]
    examples = packed.examples(rows)
    assert [example.length for example in examples] == [11, 8]
    assert examples[0].inputs["position_ids"] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2]
    alone = causal().examples(rows)
    assert packed.collate(examples).count == sum(y != IGNORED for e in alone for y in e.label[1:])


def tiny_llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )).train()  # fmt: skip


def test_packing_changes_no_gradient() -> None:
    rows = [{"text": "the cat sat on a mat"}, {"text": "yes"}, {"text": "no dog"}, {"text": "it was blue"}]
    found = []
    for task in (causal(max_length=12), causal(max_length=12, pack=True)):
        objective = objkern.CrossEntropy() + 0.1 * objkern.ZLoss()
        model = tiny_llama()
        batch = task.collate(task.examples(rows))
        loss, _ = task.loss(model, batch, objective, batch.count)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_likelihood_and_continuations(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = tiny_llama(), causal()
    rows = [{"prompt": "the cat", "completion": "sat"}, {"prompt": "a", "completion": "mat and a dog"}]
    found = task.score(model, rows, batch_size=2).metrics
    examples = task.examples(rows)
    total = count = 0.0
    for example in examples:
        ids, y = (torch.tensor([x]) for x in (example.inputs["input_ids"], example.label))
        total += torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], y[0, 1:], reduction="sum").item()
        count += (y[0, 1:] != IGNORED).sum().item()
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)
    with monkeypatch.context() as patched:  # logits are never made
        patched.setattr(objkern.transformers.DeferredLogits, "materialize", lambda self: pytest.fail("logits"))
        assert task.score(model, rows, batch_size=1).metrics["loss"] == pytest.approx(found["loss"], rel=1e-6)
    assert not is_attached(model)
    assert model.training
    attach(model, objective := objkern.CrossEntropy() + objkern.ZLoss())
    assert task.score(model, rows, batch_size=2).metrics == found
    assert is_attached(model, objective)
    model.eval()
    assert isinstance(model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).logits, torch.Tensor)
    model.train()
    detach(model)
    answers = task.predict(model, rows, batch_size=2)
    alone = [task.predict(model, [row])[0] for row in rows]
    assert answers == alone  # padding on the left changes nothing
    assert model.training


def test_what_begins_anew_is_kept_apart() -> None:
    model = tiny_llama()
    causal(pack=True).check(model)
    assert model.training
    for module in model.modules():  # in its eyes all is one text
        if hasattr(module, "is_causal"):
            forward = module.forward
            module.forward = lambda *a, forward=forward, **o: forward(*a, **{**o, "attention_mask": None})
    causal().check(model)
    with pytest.raises(ValueError, match="pack: texts of one sequence would see each other in LlamaForCausalLM"):
        causal(pack=True).check(model)
    without, forward = tiny_llama(), transformers.LlamaForCausalLM.forward
    without.forward = lambda input_ids, attention_mask=None, use_cache=None: forward(without, input_ids, attention_mask)
    causal().check(without)
    with pytest.raises(ValueError, match="pack: texts of one sequence would see each other"):
        causal(pack=True).check(without)


def test_a_prompt_without_a_token_begins_as_texts_do() -> None:
    model, tokenizer = tiny_llama(), tokenizer_of_words()
    begun = causal().predict(model, [{"prompt": ""}])
    tokenizer.bos_token = None
    task = causal(tokenizer=tokenizer)
    ended = task.predict(model, [{"prompt": ""}, {"prompt": "the cat"}])
    assert (ended[0], begun[0]) == tuple(
        task.tokenizer.decode(model.generate(torch.tensor([[k]]), max_new_tokens=32, do_sample=False, pad_token_id=0)[0, 1:],
                              skip_special_tokens=True).strip() for k in (2, 1)
    )  # fmt: skip


def test_seq2seq() -> None:
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, pad_token_id=0, decoder_start_token_id=0,
        eos_token_id=2,
    ))  # fmt: skip
    task = TASKS["seq2seq"](tokenizer_of_words(), prefix="say : ")
    rows = [GOOD["seq2seq"], {"source": "the cat sat on a mat", "target": "it was not blue"}]
    batch = task.collate(task.examples(rows))
    assert batch.count == sum(len(row["target"].split()) + 2 for row in rows)
    assert task.tokenizer.decode(batch.inputs["input_ids"][0]).startswith("<s> say : the cat </s>")
    found = task.score(model, rows).metrics
    assert found["loss"] == pytest.approx(model.eval()(**batch.inputs, labels=batch.target).loss.item(), rel=1e-4)
    assert len(task.predict(model, rows)) == 2
    seen: list[int] = []
    write = model.generate
    model.generate = lambda **options: seen.append(options["max_new_tokens"]) or write(**options)
    task.predict(model, rows)
    task.max_new_tokens = 3
    task.predict(model, rows)
    assert seen == [task.max_length, 3]
    assert task.evaluate(rows, ["a dog", "it was blue"]).metrics["exact_match"] == 0.5
    assert task.evaluate(rows, [row["target"] for row in rows]).metrics["chrf"] == pytest.approx(100.0)


def test_labels_that_a_dataset_does_not_have(tmp_path: Path) -> None:
    """−1 and None are no labels; never the last class."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, -1, None]}, features=features)
    table.save_to_disk(tmp_path / "rows")
    assert [row["label"] for row in data.read(tmp_path / "rows")] == ["yes", None, None]


def test_line_ends_within_a_text(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\u0085c", "label": "x"}, {"text": "d", "label": "y"}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert data.read(written(tmp_path, "rows.jsonl", text)) == rows


def test_cells_that_look_like_numbers(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.csv", "text,text_pair,label\n42,,1\nnan,7,2\n")
    assert data.read(path) == [
        {"text": "42", "text_pair": None, "label": 1}, {"text": "nan", "text_pair": "7", "label": 2},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (["3", "-2", "0"], [3, -2, 0]),
        (["3", "2.5", "1e-05"], [3, 2.5, 1e-05]),
        (["007", "7", "07", "8"], ["007", "7", "07", "8"]),
        (["1e5", "2E3"], ["1e5", "2E3"]),
        (["1", "1_0"], ["1", "1_0"]),
        (["1", "two"], ["1", "two"]),
        (["1", ""], [1, None]),
    ],
)
def test_a_column_is_numbers_or_texts(cells: list[str], labels: list[Any], tmp_path: Path) -> None:
    path = written(tmp_path, "rows.csv", "text,label\n" + "".join(f"x,{cell}\n" for cell in cells))
    found = [row["label"] for row in data.read(path)]
    assert (found, list(map(type, found))) == (labels, list(map(type, labels)))


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    text = "cat " * 50_000
    assert data.read(written(tmp_path, "rows.csv", f'text\n"{text}"\n')) == [{"text": text}]


def test_answers_and_questions_that_do_not_fit() -> None:
    task = TASKS["question-answering"](tokenizer_of_words(), max_length=32)
    row = {"question": "who ?", "context": "the cat", "answers": {"text": "cat", "answer_start": 4}}
    with pytest.raises(ValueError, match="row 1, column 'answers'"):
        data.checked([row], task.columns)
    with pytest.raises(ValueError, match=r"row 1, column 'question': expected at most \d+ tokens"):
        task.examples([{"question": "cat " * 25, "context": "the cat"}])


def test_a_template_that_leaves_out_earlier_thoughts_makes_an_example_of_every_answer() -> None:
    """Each as the model sees it: the thought stands in the last answer alone."""
    template = (
        "{% for m in messages %}{{ m['role'] }} {% if m['role'] == 'assistant' and loop.last %}the mat {% endif %}"
        "{{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    task = causal(tokenizer=tokenizer_of_words(chat_template=template))
    chat = [{"role": "user", "content": "who ?"}, {"role": "assistant", "content": "a dog"},
            {"role": "user", "content": "where ?"}, {"role": "assistant", "content": "a cat"}]  # fmt: skip
    counted = [
        task.tokenizer.decode([y for y in example.label if y != -100])
        for example in task.examples([{"messages": chat}])
    ]
    assert counted == ["the mat a dog </s>", "the mat a cat </s>"]


def test_a_template_that_refuses_a_chat_names_the_row() -> None:
    task = causal(tokenizer=tokenizer_of_words(chat_template="{{ raise_exception('no system turns') }}"))
    with pytest.raises(ValueError, match=r"row 1, column 'messages': .* no system turns"):
        task.examples([{"messages": CHAT}])


def test_a_chat_is_saved_with_the_template_that_it_was_learned_by() -> None:
    """Piece by piece in training, by the template where others serve the model: the same tokens."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"},
                {"role": "assistant", "content": "Four, I think."}, {"role": "user", "content": "naïve 東京"},
                {"role": "assistant", "content": "Yes."}]  # fmt: skip
    tokenizer = small.byte_pairs([turn["content"] for turn in messages], 300, 256, ends=False)
    task = TASKS["causal-lm"](tokenizer, [{"messages": messages}])
    (example,) = task.examples([{"messages": messages}])
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == example.inputs["input_ids"]
    asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert tokenizer(asked, add_special_tokens=False)["input_ids"] == task._prompt({"messages": messages})
    plain = small.byte_pairs(["the cat"], 300, 256, ends=False)
    TASKS["causal-lm"](plain, [{"text": "the cat"}])
    assert plain.chat_template is None
