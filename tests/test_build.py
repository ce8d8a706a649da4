"""What is built for CUDA, and what the build says of it; nvcc is a script that answers like one."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import build_cuda
from objkern import _C, __main__, __version__
from objkern import cuda as cuda_backend
from tests import check_oldest_torch

KNOWN = {
    "12.4.131": "80 86 90",
    "13.0.88": "75 80 90 100 120",
    "11.8.89": "80 90",
    "14.1.0": "100 110",
    "15.0.0": "120",
}

FRESH_WHY_NOT = cuda_backend.why_not.__wrapped__  # less its memory of earlier answers


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests must not depend on the toolkit of the machine that runs them."""
    monkeypatch.setattr(build_cuda, "USUAL_HOME", "/nowhere")


def fake_nvcc(home: Path, version: str = "13.0.88", static_runtime: bool = True) -> Path:
    """A toolkit in `home` with an nvcc that answers what build_cuda asks."""
    (home / "bin").mkdir(parents=True)
    (home / "lib").mkdir()
    if static_runtime:
        (home / "lib" / "libcudart_static.a").touch()
    nvcc = home / "bin" / "nvcc"
    archs = "\\n".join(f"compute_{number}" for number in KNOWN[version].split())
    nvcc.write_text(
        "#!/bin/sh\ncase $* in\n"
        f"*--version*) echo 'Cuda compilation tools, release {version[:4]}, V{version}';;\n"
        f"*--list-gpu-arch*) printf '{archs}\\n';;\n"
        f'*--dryrun*) echo \'#$ LIBRARIES=  "-L{home}/stubs" "-L{home}/lib"\' >&2;;\n'
        "esac\n"
    )
    nvcc.chmod(0o755)
    return nvcc


def plan(home: Path, **environment: str) -> build_cuda.Build | None:
    return build_cuda.plan({"PATH": f"/usr/bin:/bin:{home}/bin", **environment})


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("9.0", ["9.0"]),
        ("8.0;9.0a;10.0+PTX", ["8.0", "9.0a", "10.0+PTX"]),
        (" 8.0 9.0  12.0+PTX ", ["8.0", "9.0", "12.0+PTX"]),  # as images with torch set it
        ("8.0; 8.0;", ["8.0"]),
        ("", ["8.0", "9.0", "10.0+PTX"]),
        (None, ["8.0", "9.0", "10.0+PTX"]),
    ],
)
def test_architecture_lists(tmp_path: Path, asked: str | None, expected: list[str]) -> None:
    fake_nvcc(tmp_path)
    build = plan(tmp_path, **({} if asked is None else {"TORCH_CUDA_ARCH_LIST": asked}))
    assert list(build.architectures) == expected


def test_ptx_is_added_to_machine_code(tmp_path: Path) -> None:
    """10.0+PTX without code=compute_100 would leave later devices without kernels."""
    fake_nvcc(tmp_path)
    assert plan(tmp_path, TORCH_CUDA_ARCH_LIST="9.0a;10.0+PTX").command()[-3:] == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


@pytest.mark.parametrize("asked", ["Hopper", "9", "9.0,8.0", "sm_90", "8.0;9.0b", "9.0+SASS"])
def test_what_is_no_architecture_is_named(tmp_path: Path, asked: str) -> None:
    fake_nvcc(tmp_path)
    with pytest.raises(SystemExit, match=r'TORCH_CUDA_ARCH_LIST: expected architectures like "8.0;9.0a;10.0\+PTX"'):
        plan(tmp_path, TORCH_CUDA_ARCH_LIST=asked)


@pytest.mark.parametrize("asked", ["7.5", "7.0+PTX", "9.0;6.1"])
def test_an_architecture_that_is_too_old_is_named(tmp_path: Path, asked: str) -> None:
    fake_nvcc(tmp_path)
    with pytest.raises(SystemExit, match=r'TORCH_CUDA_ARCH_LIST: "\d\.\d(\+PTX)?" is too old: .* takes 8\.0 or newer'):
        plan(tmp_path, TORCH_CUDA_ARCH_LIST=asked)


def test_an_architecture_that_nvcc_does_not_know_is_named(tmp_path: Path) -> None:
    """nvcc would say so too, but for the first file only and in the middle of a log."""
    fake_nvcc(tmp_path, "12.4.131")
    with pytest.raises(SystemExit, match=r'"10.0\+PTX" is not known to nvcc 12.4.131 .* for 8.0, 8.6, 9.0$'):
        plan(tmp_path, TORCH_CUDA_ARCH_LIST="9.0 10.0+PTX")


@pytest.mark.parametrize(("version", "expected"), [("12.4.131", ("8.0", "9.0+PTX")), ("14.1.0", ("10.0+PTX",))])
def test_the_default_is_what_nvcc_knows_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], version: str, expected: tuple[str, ...]
) -> None:
    """An older nvcc must build without being told how, and its newest architecture carry the PTX."""
    fake_nvcc(tmp_path, version)
    assert plan(tmp_path).architectures == expected
    assert f"nvcc {version} does not know" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "static_runtime", "reason"),
    [
        ("11.8.89", True, r"is 11.8.89; C\+\+20 takes nvcc 12.0 or newer"),
        ("13.0.88", False, "has no libcudart_static.a in .*stubs, .*lib"),
        ("15.0.0", True, "knows none of 8.0;9.0;10.0"),
    ],
)
def test_a_toolkit_that_will_not_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], version: str, static_runtime: bool, reason: str
) -> None:
    """With `auto` the CPU's kernels are built all the same; OBJKERN_CUDA=1 is taken at its word."""
    fake_nvcc(tmp_path, version, static_runtime)
    assert plan(tmp_path) is None
    assert "no CUDA kernels: " in capsys.readouterr().out
    with pytest.raises(SystemExit, match=reason):
        plan(tmp_path, OBJKERN_CUDA="1")


def test_without_nvcc(tmp_path: Path) -> None:
    home = str(tmp_path / "none")
    assert plan(tmp_path, CUDA_HOME=home) is None
    with pytest.raises(SystemExit, match=rf"CUDA_HOME \({home}\), PATH, /nowhere \(not set: CUDACXX, CUDA_PATH\)"):
        plan(tmp_path, CUDA_HOME=home, OBJKERN_CUDA="1")


def test_where_nvcc_is_taken_from(tmp_path: Path) -> None:
    """A toolkit that was named goes before the one that happens to be on PATH."""
    homes = {name: tmp_path / name for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH")}
    nvcc = {name: fake_nvcc(home) for name, home in homes.items()}
    environment = {name: str(home) for name, home in homes.items()}
    environment |= {"CUDACXX": str(nvcc["CUDACXX"]), "PATH": f"{homes['PATH']}/bin:/usr/bin:/bin"}
    for name in homes:
        build = build_cuda.plan(environment)
        assert build.toolkit.nvcc == str(nvcc[name])
        assert build.toolkit.libraries == str(homes[name] / "lib")
        del environment[name]


def test_what_is_named_and_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match='CUDACXX: expected the path of an nvcc but got "/no/nvcc"'):
        plan(tmp_path, CUDACXX="/no/nvcc")
    with pytest.raises(SystemExit, match='OBJKERN_CUDA: expected "auto", "0" or "1" but got "yes"'):
        plan(tmp_path, OBJKERN_CUDA="yes")


def test_zero_asks_no_compiler(tmp_path: Path) -> None:
    fake_nvcc(tmp_path)
    assert plan(tmp_path, OBJKERN_CUDA="0", CUDACXX="/no/nvcc") is None


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"CXX": "ccache g++-12 -m64"}, "g++-12"),
        ({"CXX": "g++-12", "NVCC_CCBIN": "/opt/gcc"}, None),  # nvcc reads it itself
    ],
)
def test_host_compiler(tmp_path: Path, environment: dict[str, str], expected: str | None) -> None:
    """nvcc calls g++ unless told otherwise, which may be newer than it can read."""
    fake_nvcc(tmp_path)
    command = plan(tmp_path, **environment).command()
    assert ("-ccbin" in command) == (expected is not None)
    assert expected is None or command[command.index("-ccbin") + 1] == expected


# ---- what the build says of itself ----------------------------------------------------------------------------------


def test_facts_and_doors_agree() -> None:
    """A build without CUDA has no trace of it, and one with it answers, driver or no driver."""
    facts = _C.build_info()
    assert (facts["cuda_archs"] is None) == (facts["cuda_compiler"] is None) == (not hasattr(_C, "cuda_support"))
    if hasattr(_C, "cuda_support"):
        devices, reason = _C.cuda_support()
        assert devices > 0 or reason  # the device count is left unwritten by a runtime that finds no driver
        assert devices >= 0


def info(monkeypatch: pytest.MonkeyPatch, archs: str | None, cuda: str | None, **doors: object) -> dict[str, str]:
    facts = {**_C.build_info(), "cuda_archs": archs, "cuda_compiler": archs and "nvcc 13.0.88"}
    for module in (__main__, cuda_backend):
        monkeypatch.setattr(module, "_C", SimpleNamespace(build_info=lambda: facts, **doors))
    monkeypatch.setattr(cuda_backend, "why_not", FRESH_WHY_NOT)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device}")
    return {line[:18].strip(): line[19:] for line in __main__.info().splitlines()}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        __main__.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"objkern {__version__}\n"


def test_info_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both things that are missing, not only the first."""
    facts = info(monkeypatch, None, None)
    assert facts["cuda kernels"] == "none"
    assert facts["cuda backend"].startswith("cannot run: built without CUDA kernels (they take nvcc, and OBJKERN_CUDA")
    assert facts["cuda backend"].endswith(f"; torch {torch.__version__} is a build without CUDA")


def test_info_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = info(monkeypatch, "8.0;9.0;10.0+PTX", "13.0", cuda_support=lambda: (0, "no driver"))
    assert facts["cuda kernels"] == "for 8.0, 9.0, 10.0+PTX, by nvcc 13.0.88"
    assert facts["cuda backend"] == "cannot run: no driver"


def test_info_with_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an old card beside a new one: what runs, and why not on the other."""
    reasons = [None, "no kernel image", None]
    doors = {"cuda_support": lambda: (3, None), "cuda_why_not": reasons.__getitem__}
    facts = info(monkeypatch, "9.0", "13.0", **doors)
    assert facts["cuda backend"] == "runs on 2 devices: Card 0, Card 2; cannot run on device 1, Card 1: no kernel image"
    reasons[:] = ["no kernel image"]
    doors["cuda_support"] = lambda: (1, None)
    assert info(monkeypatch, "9.0", "13.0", **doors)["cuda backend"] == (
        "cannot run on device 0, Card 0: no kernel image"
    )


# ---- the oldest torch -----------------------------------------------------------------------------------------------


def test_a_torch_that_cannot_be_had_is_not_a_torch_that_was_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """An offline machine must neither fail nor report success."""
    monkeypatch.setattr(check_oldest_torch, "ROOT", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit) as stopped:
        check_oldest_torch.headers("1.0")
    assert stopped.value.code == check_oldest_torch.NOT_CHECKED
    assert "NOT CHECKED" in capfd.readouterr().out


def test_the_oldest_torch_is_what_the_package_asks_for() -> None:
    assert check_oldest_torch.oldest_torch() == "2.11"
