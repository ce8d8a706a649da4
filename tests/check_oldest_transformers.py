"""objkern.transformers works with the oldest transformers that it takes: `make check-oldest-transformers`.

The tests run with the newest one. This reads the oldest version from pyproject.toml, installs it beside the environment
(its own hub client and tokenizers with it, for those of today are too new for it), and runs tests/test_transformers.py.

Exit status: pytest's; 77 not checked, because that version cannot be had here.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from .check_oldest_torch import NOT_CHECKED, ROOT

# What 4.57 asks for where that differs from the newest one's wishes, and what goes with that: its Trainer imports
# datasets where there is one, and the newest datasets asks the newest hub client. pip takes no torch, which is there.
BESIDE = ["tokenizers>=0.22,<0.23.1", "huggingface_hub>=0.34,<1", "peft==0.18.*", "datasets==3.6.*", "requests", "regex",
          "urllib3", "charset_normalizer", "idna", "certifi"]  # fmt: skip


def oldest_transformers() -> str:
    return re.search(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]


def installed(version: str) -> Path:
    """The folder with that transformers, installed unless an earlier call did."""
    folder = ROOT / "build" / f"transformers-{version}"
    if folder.exists():
        return folder
    scratch = folder.with_suffix(".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(scratch)]
    if subprocess.run([*pip, f"transformers=={version}.*", *BESIDE]).returncode:
        print(f"NOT CHECKED: pip cannot get transformers {version} for this Python; the errors above say why")
        raise SystemExit(NOT_CHECKED)
    scratch.rename(folder)  # last, so that what was interrupted is not taken for whole
    return folder


def main() -> int:
    folder = installed(oldest_transformers())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    which = "import transformers; print('transformers', transformers.__version__)"
    subprocess.run([sys.executable, "-c", which], env=environment, check=True)
    command = [sys.executable, "-m", "pytest", "tests/test_transformers.py", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
