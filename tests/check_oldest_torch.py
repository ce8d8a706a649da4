"""The C++ compiles against the headers of the oldest torch that objkern takes: `make check-oldest-torch`.

The tests run with one torch, and its headers gain and lose functions with every version. This reads the oldest version
from pyproject.toml, downloads its wheel without dependencies (half a gigabyte, once), keeps its headers in build/, and
has the compiler read every file that includes torch, with the build's own flags.

Exit status: 0 all compile; 1 some do not; 77 not checked, because that wheel cannot be had here.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setup

ROOT = Path(__file__).parent.parent
NOT_CHECKED = 77  # what automake calls a skipped test


def oldest_torch() -> str:
    return re.search(r'^dependencies = \["torch>=([\d.]+),<\d+"\]', (ROOT / "pyproject.toml").read_text(), re.M)[1]


def headers(version: str) -> Path:
    """The folder of that torch's headers, downloaded unless an earlier call did."""
    folder = ROOT / "build" / f"torch-{version}"
    if folder.exists():
        return folder / "torch" / "include"
    print(f"downloading the wheel of torch {version} for its headers", flush=True)
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", scratch]
        if subprocess.run([*pip, f"torch=={version}.*"]).returncode:
            print(f"NOT CHECKED: pip cannot get torch {version} for this Python; the errors above say why")
            raise SystemExit(NOT_CHECKED)
        (wheel,) = Path(scratch).glob("torch-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("torch/include/")]
            archive.extractall(Path(scratch) / "unpacked", names)
        (Path(scratch) / "unpacked").rename(folder)  # last, so that what was interrupted is not taken for whole
    return folder / "torch" / "include"


def commands(include: Path) -> dict[str, list[str]]:
    """What to compile: its name -> the compiler's command. The CUDA binding too: it needs no nvcc."""
    folders = [ROOT / "csrc", include, include / "torch/csrc/api/include", sysconfig.get_path("include")]
    compiler = [os.environ.get("CXX", "g++"), *setup.FLAGS, *setup.WARNINGS, *(f"-I{folder}" for folder in folders)]
    compiler += ["-fsyntax-only", "-DTORCH_EXTENSION_NAME=_C", "-DOBJKERN_HAS_CUDA"]
    found = {source.name: [*compiler, str(source)] for source in sorted((ROOT / "csrc").glob("*.cpp"))}
    for target, (_, source, flags) in setup.kernel_objects(Path(), None).items():
        found[target.stem] = [*compiler, *flags, str(source)]
    return found


def errors(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr or f"{command[0]} failed" if done.returncode else ""


def main() -> int:
    version = oldest_torch()
    jobs = commands(headers(version))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(jobs, pool.map(errors, jobs.values()), strict=True))
    failed = {name: text for name, text in found.items() if text}
    for name, text in failed.items():
        print(f"{name} does not compile against torch {version}:\n{text}")
    print(f"against the headers of torch {version}: {len(jobs) - len(failed)} of {len(jobs)} sources compile")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
