"""Other libraries as wheels, in a folder of the run's own: they take part, and the environment is as it was."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .run import LOGS

PEERS = LOGS / "peers"


def importable(folder: Path) -> list[str]:
    """Makes the wheels in a folder importable for the processes that this one starts; returns their names.

    Raises:
        SystemExit: there are none, or pip cannot install one of them here.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"--wheels: there is no .whl in {folder}")
    shutil.rmtree(PEERS, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", PEERS, *wheels],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"--wheels: pip could not install them: {done.stderr.strip().splitlines()[-1]}")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PEERS), os.environ.get("PYTHONPATH")]))
    return [wheel.name for wheel in wheels]
