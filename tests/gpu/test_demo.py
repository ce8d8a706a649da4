"""What `make demo` does, in small, on the device."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")


@pytest.mark.once
def test_the_demo_runs(device: torch.device, tmp_path: Path) -> None:
    """Fused and native training take the same steps; act 2's accuracy holds."""
    from objkern.finetune.demo import main

    assert main(["--quick", "--device", str(device), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "summary.json").exists()
