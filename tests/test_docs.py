"""The documentation: generated pages are current, stated gradients are right, and every Python block runs."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from objkern.objective import Term

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "objectives.md",
    ROOT / "docs" / "penalties.md",
    ROOT / "docs" / "huggingface.md",
]


def script(path: str) -> ModuleType:
    """A script of the repository as a module; docs/ and benchmarks/ are not on the path."""
    name = path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


gallery = script("docs/objectives.py")
EXAMPLES = [(name, example) for name, entry in gallery.ENTRIES.items() for example in entry.examples]


def test_gallery_is_current() -> None:
    """The page holds what the generator writes from today's docstrings, every term has an entry and a plot."""
    assert gallery.problems() == []


def test_gallery_notices_a_term_without_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Term.registry, "Novel", Term)
    with pytest.raises(SystemExit, match="without an entry: \\['Novel'\\]"):
        gallery.problems()


def test_guarantees_are_current() -> None:
    """Each has a test, and the page names all of them."""
    assert script("docs/guarantees.py").problems() == []


def test_performance_page_is_current() -> None:
    """Every figure of docs/performance.md comes from a file in benchmarks/results."""
    assert script("benchmarks/report.py").problems() == []


def test_gpu_status_is_current() -> None:
    """Every claim about a GPU stands on docs/gpu-status.md, with its file in benchmarks/results or as not measured."""
    from benchmarks.gpu import status

    assert status.problems() == []


@pytest.mark.parametrize(("name", "term"), EXAMPLES, ids=[repr(example) for _, example in EXAMPLES])
@pytest.mark.parametrize("seed", range(5))
def test_stated_gradients(name: str, term: Term, seed: int) -> None:
    """The closed forms that the gallery states, against autograd through the kernels in float64."""
    generator = torch.Generator().manual_seed(seed)
    z = (2 * torch.randn(10, generator=generator, dtype=torch.float64)).requires_grad_()
    y = int(torch.randint(10, (), generator=generator))
    row = gallery.Row(z.detach(), y)
    (expected,) = torch.autograd.grad(term(z, torch.tensor(y), reduction="none", **gallery.options(row, term)), z)
    target, others = gallery.ENTRIES[name].gradient(row, term)
    stated = others.clone()
    stated[y] = target
    torch.testing.assert_close(stated, expected, rtol=1e-9, atol=1e-14)


ELEMENT_EXAMPLES = [(name, example) for name, entry in gallery.ELEMENT_ENTRIES.items() for example in entry.examples]


@pytest.mark.parametrize(("name", "term"), ELEMENT_EXAMPLES, ids=[repr(example) for _, example in ELEMENT_EXAMPLES])
def test_stated_elementwise_gradients(name: str, term: Term) -> None:
    z, y = (3 * torch.randn(50, dtype=torch.float64)).requires_grad_(), torch.rand(50, dtype=torch.float64)
    (expected,) = torch.autograd.grad(term(z, y, reduction="sum"), z)
    stated = gallery.ELEMENT_ENTRIES[name].gradient(z.detach(), y, term)
    torch.testing.assert_close(stated, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path) -> None:
    """In one namespace, top to bottom, as a reader would; a block fenced with more than "python" is not run."""
    text, namespace = page.read_text(encoding="utf-8"), {"__name__": "__main__"}
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        blank = "\n" * text.count("\n", 0, block.start(1))  # so that a traceback names the page's own line
        exec(compile(blank + block[1], str(page), "exec"), namespace)


def test_the_tests_that_pages_name_are_there() -> None:
    there = {
        name
        for path in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text("utf-8"))
    }
    there |= {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = {(page.name, name) for page in pages for name in re.findall(r"`(test_\w+)`", page.read_text("utf-8"))}
    assert len(named) > 50
    assert sorted((page, name) for page, name in named if name not in there) == []
