"""Named faults in the Python rooms and in the Triton kernels, one at a time: the named tests must notice each."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from .faults import ROOT
from .mutants import copy_of_package

pytestmark = pytest.mark.trust


class Fault(NamedTuple):
    """`right` stands once in the file."""

    file: str
    right: str
    wrong: str
    tests: str  # pytest's arguments


FAULTS = {
    "class weights left out of the mean": Fault(
        "objkern/linear.py", "mean = weights if weights is not None and kind == 0 else number", "mean = number",
        "tests/test_linear.py -k weight",
    ),
    "normalizer left unread": Fault(
        "objkern/linear.py", "found.append(one * normalizer)", "found.append(number)", "tests/test_linear.py -k normalizer"
    ),
    "the weight's gradient of the last rows alone": Fault(
        "objkern/linear.py", "_multiply(g.t(), h, weight_sum, add=piece.start > 0)",
        "_multiply(g.t(), h, weight_sum, add=False)", "tests/test_linear.py -k chunk",
    ),
    "the maximum of other logits than the forward pass had": Fault(
        "objkern/linear.py", "    tile.logits.scatter_(1, place, old)\n", "", "tests/test_linear.py"
    ),
    "sums of ranks not moved to a common maximum": Fault(
        "objkern/distributed.py", "sum_e=(factor * parts.sum_e).sum(0)", "sum_e=parts.sum_e.sum(0)",
        "tests/test_distributed.py",
    ),
    "label smoothing over a rank's own classes": Fault(
        "objkern/distributed.py", "sum_wt=(parts.sum_wt + parts.sum_w * shift).sum(0)",
        "sum_wt=(parts.sum_wt + parts.sum_w * shift)[0]", "tests/test_distributed.py",
    ),
    "ties of ranks to the last": Fault(
        "objkern/distributed.py", "torch.where(holds, ranks, len(at.sizes)).amin(0)",
        "torch.where(holds, ranks, -1).amax(0)", "tests/test_distributed.py",
    ),
    "distance from zero instead of from the start": Fault(
        "objkern/penalties.py", "    for d, f in _distances(theta, origins, weights, k):\n        square",
        "    for d, f in _distances(theta, [], weights, k):\n        square", "tests/test_penalties.py",
    ),
    "biases and norms penalized": Fault(
        "objkern/penalties.py", "if include_all or not is_bias_or_norm(name, module):", "if True:", "tests/test_penalties.py"
    ),
    "the sign of a difference lost": Fault(
        "objkern/parser.py", "[(-number, term) for number, term in more]", "more",
        "tests/test_objective.py -k pars",
    ),
    "a tied weight's penalty twice": Fault(
        "objkern/penalties.py", "if id(parameter) in seen or not", "if not", "tests/test_penalties.py"
    ),
    "a batch's own count instead of the window's": Fault(
        "objkern/finetune/training.py", "for batch in window for example in batch)", "for batch in window[:1] for example in batch)",
        "tests/test_finetune_training.py -k window",
    ),
    "the rate one step late": Fault(
        "objkern/finetune/training.py", "return (step + 1) / rising", "return step / rising",
        "tests/test_finetune_training.py tests/test_finetune.py",
    ),
    "an optimizer that begins anew": Fault(
        "objkern/finetune/training.py", "            load_moments(model, optimizer, tensors)\n", "",
        "tests/test_finetune_training.py -k interrupt",
    ),
    "the same order in every epoch": Fault(
        "objkern/finetune/training.py", "manual_seed(options.seed * 1_000_003 + epoch)", "manual_seed(options.seed)",
        "tests/test_finetune_training.py tests/test_finetune_run.py",
    ),
    "decay of biases": Fault(
        "objkern/finetune/training.py", "if p.ndim >= 2]", "if p.ndim >= 0]", "tests/test_finetune_training.py"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_package(tmp_path_factory.mktemp("package"))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name: str, package: Path) -> None:
    file, right, wrong, tests = FAULTS[name]
    path = package / file
    source = (ROOT / file).read_text(encoding="utf-8")
    assert source.count(right) == 1, f"{right!r} stands {source.count(right)} times in {file}"
    path.write_text(source.replace(right, wrong), encoding="utf-8")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *re.split(r" (?=-k|tests/)|(?<=-k) ", tests)],
            cwd=package, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
    finally:
        path.write_text(source, encoding="utf-8")
    assert done.returncode == 1, f"the tests did not notice: {name}\n{done.stdout[-3000:]}"
    assert " failed" in done.stdout
