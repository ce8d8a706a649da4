"""CONTRIBUTING.md's worked example: a built-in term in three files, on every backend that can run here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# In each file, what stands behind the place of each part of the example.
PLACES = {
    "objkern/terms.py": ["def checked_number("],
    "csrc/objective.h": [
        "};\nconstexpr int64_t kTermKinds", "  }\n  return 0;\n}", "  }\n  return R(std::numeric_limits<float>::quiet_NaN());"
    ],
    "objkern/triton/objective.py": ['    else:\n        tl.static_assert(KIND == 11, "a term that is not known")'],
}  # fmt: skip
ELSEWHERE = {  # what the text says beside the patches
    "objkern/terms.py": ('    "CrossEntropy",\n', '    "AbsoluteError",\n    "CrossEntropy",\n'),
    "csrc/objective.h": ("kTermKinds = 12;", "kTermKinds = 13;"),
}
CHECKS = """
import torch, objkern
from objkern import AbsoluteError, CrossEntropy
from torch.nn import functional as F

torch.manual_seed(0)
term = AbsoluteError()
assert repr(objkern.parse("CrossEntropy() + 0.5*AbsoluteError()")) == repr(CrossEntropy() + 0.5 * term)
z = (3 * torch.randn(9, 130, dtype=torch.float64)).requires_grad_()
y = torch.randint(0, 130, (9,))
truth = (F.one_hot(y, 130) - z.softmax(-1)).abs().sum(-1).mean()
(gradient,) = torch.autograd.grad(truth, z)
for backend in BACKENDS:
    x = z.detach().to(torch.float32 if backend == "triton" else torch.float64).requires_grad_()
    loss = (CrossEntropy() * 0.0 + term)(x, y, backend=backend)
    loss.backward()
    close = {"rtol": 1e-5, "atol": 1e-7} if backend == "triton" else {"rtol": 1e-12, "atol": 1e-15}
    torch.testing.assert_close(loss.double(), truth, **close)
    torch.testing.assert_close(x.grad.double(), gradient, **close)
if "cpu" in BACKENDS:
    h, w = torch.randn(9, 4, dtype=torch.float64), torch.randn(130, 4, dtype=torch.float64)
    torch.testing.assert_close(term.linear(h, w, y), term(h @ w.t(), y))
"""


def snippets(file: str) -> list[str]:
    """The parts of the example for a file."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"<!-- patch {re.escape(file)} -->\n```\w+\n(.*?)```\n<!-- /patch -->", text, re.DOTALL)
    parts = re.split(r"^// \w.*\n", found, flags=re.MULTILINE)
    return [part for part in parts if part]


def test_the_example_fits_the_sources() -> None:
    for file, places in PLACES.items():
        source = (ROOT / file).read_text(encoding="utf-8")
        assert len(snippets(file)) == len(places)
        assert all(source.count(place) == 1 for place in places)
        before, _ = ELSEWHERE.get(file, ("", ""))
        assert before in source


@pytest.mark.trust
def test_a_term_by_the_book(tmp_path: Path) -> None:
    for name in ("objkern", "csrc", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "build_cuda.py", "build_sbom.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for file, places in PLACES.items():
        path = tmp_path / file
        source = path.read_text(encoding="utf-8").replace(*ELSEWHERE.get(file, ("", "")))
        for part, place in zip(snippets(file), places, strict=True):
            gap = "\n\n" if file == "objkern/terms.py" else ""
            source = source.replace(place, f"{part}{gap}{place}")
        path.write_text(source, encoding="utf-8")
    environment = os.environ | {"OBJKERN_CUDA": "0", "OBJKERN_CPU_CAPABILITIES": "avx2", "PYTHONPATH": str(tmp_path)}
    for words, more in (
        (["setup.py", "-q", "build_ext", "--inplace"], {}),
        (["-c", f"BACKENDS = ['cpu', 'reference']{CHECKS}"], {}),
        (["-c", f"BACKENDS = ['triton']{CHECKS}"], {"TRITON_INTERPRET": "1"}),
        (["-m", "pytest", "-q", "tests/test_terms.py", "-k", "twin or agree"], {}),
    ):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment | more, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
