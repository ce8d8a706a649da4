"""The checks of a built wheel notice what they are for; `make check-wheel` runs them on the real one."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import build_cuda
from tests import check_wheel

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ("8.0", "9.0", "10.0+PTX")
PACKAGE = [str(path.relative_to(ROOT)) for path in (ROOT / "objkern").rglob("*.py")]
LIBRARY = "objkern/_C.cpython-311-x86_64-linux-gnu.so"
METADATA = "objkern-0.1.0.dist-info/METADATA"


def listing(*kinds: str) -> str:
    """As cuobjdump prints it."""
    return "".join(
        f"{'PTX' if kind.endswith('ptx') else 'ELF'} file    {i}: _C.cpython-311-x86_64-linux-gnu.{i}.{kind}\n"
        for i, kind in enumerate(kinds, 1)
    )


ONE_FILE = ["sm_80.cubin", "sm_90.cubin", "sm_100.ptx", "sm_100.cubin"]


def test_complete_code_has_no_problems() -> None:
    assert check_wheel.code_problems(listing(*ONE_FILE, *ONE_FILE), ARCHITECTURES, files=2) == []
    assert check_wheel.code_problems(listing("sm_90a.cubin"), ("9.0a",), files=1) == []
    assert check_wheel.code_problems("", (), files=2) == []


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ([*ONE_FILE, "sm_90.cubin"], "expected 2 × sm_80.cubin but found 1"),  # built for one architecture
        (["sm_90.cubin", "sm_90.cubin"], "expected 2 × sm_100.ptx but found 0"),
        (ONE_FILE, "expected 2 × sm_90.cubin but found 1"),  # a file that was not linked
        ([kind for kind in ONE_FILE * 2 if kind != "sm_100.ptx"], "expected 2 × sm_100.ptx but found 0"),
        ([*ONE_FILE * 2, "sm_75.cubin"], "expected 0 × sm_75.cubin but found 1"),
        ([], "expected 2 × sm_80.cubin but found 0"),
    ],
)
def test_missing_code_is_noticed(found: list[str], problem: str) -> None:
    """Such a wheel installs and passes every test on a CPU, and fails on a user's device."""
    assert problem in check_wheel.code_problems(listing(*found), ARCHITECTURES, files=2)


def test_code_in_a_build_without_cuda_is_noticed() -> None:
    assert check_wheel.code_problems(listing("sm_90.cubin"), (), files=1) == ["expected 0 × sm_90.cubin but found 1"]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (
            "(NEEDED)             Shared library: [libcudart.so.13]",
            "needs libcudart.so.13, which only some machines have",
        ),
        (
            "(NEEDED)             Shared library: [libc10_cuda.so]",
            "needs libc10_cuda.so, which only some machines have",
        ),
        ("(RUNPATH)            Library runpath: [/opt/python/lib]", "looks for libraries in /opt/python/lib"),
    ],
)
def test_libraries_of_the_building_machine_are_noticed(entry: str, problem: str) -> None:
    good = " 0x0000000000000001 (NEEDED)             Shared library: [libtorch_cpu.so]\n"
    assert check_wheel.library_problems(good) == []
    assert check_wheel.library_problems(f"{good} 0x000000000000001d {entry}\n") == [problem]
    assert check_wheel.library_problems("") == ["readelf lists no library at all"]


def test_contents() -> None:
    """A module that was deleted comes back out of an older build; one that was not packaged fails only at its import."""
    assert check_wheel.content_problems([*PACKAGE, LIBRARY, METADATA]) == []
    assert check_wheel.content_problems([*PACKAGE, LIBRARY, "objkern/gone.py"]) == [
        "objkern/gone.py does not belong in a wheel"
    ]
    assert check_wheel.content_problems([*PACKAGE[1:], LIBRARY]) == [f"{PACKAGE[0]} is missing"]
    assert check_wheel.content_problems(PACKAGE) == ["expected one library but found []"]


def test_names() -> None:
    assert check_wheel.name_problems("objkern-0.1.0-cp311-cp311-linux_x86_64.whl") == []
    assert check_wheel.name_problems("objkern-0.1.0+local-cp311-cp311-linux_x86_64.whl") != []


def test_folders_of_this_machine_are_noticed() -> None:
    assert check_wheel.folder_problems(b"csrc/bindings.cpp\0") == []
    assert check_wheel.folder_problems(f"{ROOT}/csrc/bindings.cpp".encode()) == [f"names the folder {ROOT}"]


def test_the_source_distribution_can_be_built(tmp_path: Path) -> None:
    """Every source and the build's own module: what is missing here fails on the machine of whoever installs it."""
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    expected = {*sources, "setup.py", "build_cuda.py", "build_sbom.py", "pyproject.toml", "LICENSE", "README.md"}
    assert expected - found == set()


@pytest.mark.parametrize("wanted", ["0", "1"])
def test_the_bill_of_materials_is_made_where_nothing_is_compiled(wanted: str, tmp_path: Path) -> None:
    """pip asks for the metadata in a process of its own, and puts those into the wheel that it builds afterwards."""
    environment = os.environ | {"OBJKERN_CUDA": wanted}
    try:
        cuda = build_cuda.plan(environment)
    except SystemExit as without:
        pytest.skip(str(without))
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "dist_info", "-o", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120, env=environment)
    (bill,) = tmp_path.glob("*.dist-info/sboms/*")
    with zipfile.ZipFile(tmp_path / "objkern.whl", "w") as archive:
        archive.write(bill, str(bill.relative_to(tmp_path)))
        assert check_wheel.bill_problems(archive, True, cuda) == []
