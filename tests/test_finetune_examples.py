"""The five examples of fine-tuning, one for each task: they end, and say how much better the model got."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.stem for path in (ROOT / "examples" / "finetune").glob("*.py"))


def test_there_is_one_for_every_task() -> None:
    from objkern.finetune.tasks import TASKS

    assert {name.replace("_", "-") for name in EXAMPLES} == set(TASKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_learns(name: str, tmp_path: Path) -> None:
    """The margin is in the example, which fails without it. One thread: the models are too small for two."""
    done = subprocess.run(
        [sys.executable, f"examples/finetune/{name}.py", str(tmp_path / "run")], cwd=ROOT, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert " untrained, " in done.stdout
    assert (tmp_path / "run" / "report.html").exists()
