"""The API reference: every example runs, every public name has a docstring and a place in docs/reference."""

import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import objkern
from objkern.__main__ import main

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "reference"
PLACED = re.compile(r"^\.\. (?:auto(?:class|function|method|property)|py:data):: ([\w.]+)", re.MULTILINE)
NEED_TRANSFORMERS = ("objkern.transformers", "objkern.finetune")

WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "objkern").rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


def placed() -> set[str]:
    """The names that the pages document."""
    return {name for page in PAGES.glob("*.rst") for name in PLACED.findall(page.read_text(encoding="utf-8"))}


def found(name: str) -> Any:
    """The object of a full name."""
    words = name.split(".")
    for count in range(len(words) - 1, 0, -1):
        try:
            thing = importlib.import_module(".".join(words[:count]))
        except ModuleNotFoundError:
            continue
        for word in words[count:]:
            thing = inspect.getattr_static(thing, word) if inspect.isclass(thing) else getattr(thing, word)
        return thing
    raise ModuleNotFoundError(name)


def is_documented(thing: Any) -> bool:
    """By a docstring of its own: dataclasses and named tuples without one get their signature."""
    text = inspect.getdoc(thing) or ""
    return bool(text) and not (inspect.isclass(thing) and text.startswith(f"{thing.__name__}("))


def public(module: str) -> list[str]:
    return [f"{module}.{name}" for name in importlib.import_module(module).__all__]


def problems(names: list[str]) -> list[str]:
    of_pages = placed()
    return [f"{name}: no place in docs/reference" for name in names if name not in of_pages] + [
        f"{name}: no docstring"
        for name in names
        if (inspect.isclass(found(name)) or callable(found(name))) and not is_documented(found(name))
    ]


def failures(module: Any) -> str:
    """What doctest says of the examples of a module; nothing if all are right."""
    # What docs/reference/index.rst tells readers to import.
    names = {"torch": torch, "nn": nn, "F": F} | {name: getattr(objkern, name) for name in objkern.__all__}
    runner, said, count = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS), [], 0
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=None, globs=names):
        torch.manual_seed(0)
        runner.run(test, out=said.append)
        count += len(test.examples)
    return "".join(said) if count else "there is no example"


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # a process group puts its own there, and leaves it
    if module.startswith(NEED_TRANSFORMERS):
        pytest.importorskip("transformers")
    assert failures(importlib.import_module(module)) == ""


def test_a_wrong_example_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = objkern.ZLoss.__doc__
    monkeypatch.setattr(objkern.ZLoss, "__doc__", right.replace("tensor(5.7966)", "tensor(5.7967)"))
    assert "Got:\n    tensor(5.7966)" in failures(objkern.terms)


MODULES = (
    "objkern", "objkern.distributed", "objkern.transformers", "objkern.finetune.run", "objkern.finetune.training",
    "objkern.finetune.schedules", "objkern.finetune.saved", "objkern.finetune.small", "objkern.finetune.retention",
    "objkern.finetune.data", "objkern.finetune.tasks",
)  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    if module.startswith(NEED_TRANSFORMERS):
        pytest.importorskip("transformers")
    assert problems(public(module)) == []


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def novel() -> None: ...

    monkeypatch.setattr(objkern, "novel", novel, raising=False)
    monkeypatch.setattr(objkern, "__all__", [*objkern.__all__, "novel"])
    assert problems(public("objkern")) == ["objkern.novel: no place in docs/reference", "objkern.novel: no docstring"]


def test_all_that_the_pages_name_is_there() -> None:
    """Methods of the Objective among it; each has a docstring."""
    pytest.importorskip("transformers")
    names = sorted(placed())
    assert {f"objkern.Objective.{name}" for name in ("forward", "linear", "accumulate_", "weighted_terms")} < set(names)
    assert problems(names) == []


def test_every_command_is_in_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.search(r"\{([\w,]+)\}", capsys.readouterr().out)[1].split(",")
    page = (PAGES / "commands.rst").read_text(encoding="utf-8")
    assert set(commands) <= {words.split()[0] for words in re.findall(r"^\.\. command:: (.+)$", page, re.MULTILINE)}


@pytest.mark.trust
def test_the_pages_build(tmp_path: Path) -> None:
    """As `make reference` builds them: a warning is an error. Each name has its anchor."""
    pytest.importorskip("sphinx")
    words = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", str(PAGES), str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = "".join(page.read_text(encoding="utf-8") for page in tmp_path.glob("*.html"))
    assert [name for name in sorted(placed()) if f'id="{name}"' not in pages] == []
