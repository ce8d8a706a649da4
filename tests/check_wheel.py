"""A built wheel holds what it should and runs where it was not built: `make check-wheel`.

    python -m tests.check_wheel dist/objkern-*.whl

Its bill of materials names what was built with; machine code for every architecture in every CUDA file, asked of
cuobjdump; no CUDA library, run path or folder of the machine that built it; and in a fresh environment, from an empty
directory, an import, a loss and `objkern info`. What was to be built is what build_cuda.plan says of this environment,
as it said to setup.py. No GPU is needed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import torch
from torch.utils import cpp_extension

import build_cuda
import build_sbom

ROOT = Path(__file__).parent.parent

LOSS = """
import objkern, torch
logits, target = torch.randn(5, 33, requires_grad=True), torch.arange(5)
(objkern.CrossEntropy() + 1e-4 * objkern.ZLoss())(logits, target, backend="cpu").backward()
expected = logits.detach().clone().requires_grad_()
(torch.nn.functional.cross_entropy(expected, target) + 1e-4 * expected.logsumexp(-1).square().mean()).backward()
torch.testing.assert_close(logits.grad, expected.grad)
print(objkern.__file__)
"""


def name_problems(name: str) -> list[str]:
    """A version with a local part, as in 0.1.0+cu130, cannot be published."""
    return [] if re.fullmatch(r"objkern-[\d.]+-cp3\d+-cp3\d+-\w+\.whl", name) else [f"a wheel called {name}"]


def content_problems(names: list[str], native: bool = True) -> list[str]:
    """The package and its metadata, one library (none in a wheel without kernels), nothing from a build before."""
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "objkern").rglob("*.py")}
    found = {name for name in names if not re.match(r"objkern-[\d.]+\.dist-info/", name)}
    libraries = {name for name in found if re.fullmatch(r"objkern/_C\.[\w-]+\.so", name)}
    strange = sorted(found - libraries - expected)
    return [
        *(
            []
            if len(libraries) == native
            else [f"expected {'one' if native else 'no'} library but found {sorted(libraries)}"]
        ),
        *(f"{name} is missing" for name in sorted(expected - found)),
        *(f"{name} does not belong in a wheel" for name in strange),
    ]


def bill_problems(archive: zipfile.ZipFile, native: bool, cuda: build_cuda.Build | None) -> list[str]:
    """The bill of materials: there, where PEP 770 wants it, and made of what this environment builds with."""
    bills = [name for name in archive.namelist() if re.fullmatch(r"objkern-[\d.]+\.dist-info/sboms/[^/]+", name)]
    if [Path(name).name for name in bills] != [build_sbom.NAME]:
        return [f"expected one bill of materials, {build_sbom.NAME}, but found {bills}"]
    bill = json.loads(archive.read(bills[0]))
    expected = {"torch": torch.__version__}
    if native:
        expected["pybind11"] = build_sbom.pybind11_version(cpp_extension.include_paths())
    if cuda is not None:
        expected["cudart_static"] = cuda.toolkit.version
    found = {part["name"]: part["version"] for part in bill["components"]}
    main = bill["metadata"]["component"]
    of_wheel = re.match(r"objkern-([\d.]+)\.dist-info", bills[0])[1]
    (whole, *_) = bill["dependencies"]
    return [
        *([] if bill["bomFormat"] == "CycloneDX" else [f"a bill of materials in {bill['bomFormat']}"]),
        *([] if found == expected else [f"the bill of materials lists {found} instead of {expected}"]),
        *([] if main["version"] == of_wheel else [f"the bill of materials is of objkern {main['version']}"]),
        *([] if set(whole["dependsOn"]) == set(expected) else [f"objkern depends on {whole['dependsOn']} by its bill"]),
    ]


def library_problems(dynamic_section: str) -> list[str]:
    """From `readelf -d`: torch's CPU libraries and the system's are all that may be needed, found as torch found them."""
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic_section)
    paths = re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.+)\]", dynamic_section)
    return [
        *([] if needed else ["readelf lists no library at all"]),
        *(f"needs {name}, which only some machines have" for name in needed if "cuda" in name.lower()),
        *(f"looks for libraries in {path}" for path in paths),
    ]


def code_problems(listing: str, architectures: tuple[str, ...], files: int) -> list[str]:
    """From `cuobjdump --list-elf --list-ptx`: machine code for each architecture from each CUDA file, PTX where asked."""
    found = Counter(re.findall(r"\.(sm_\w+\.(?:cubin|ptx))$", listing, re.M))
    expected = Counter()
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        expected[f"sm_{number}.cubin"] = files
        if architecture.endswith("+PTX"):
            expected[f"sm_{number}.ptx"] = files
    return [
        f"expected {expected[kind]} × {kind} but found {found[kind]}"
        for kind in sorted(expected | found)
        if expected[kind] != found[kind]
    ]


def folder_problems(library: bytes) -> list[str]:
    """Names of folders of this machine, as debug information and error messages carry them."""
    folders = {str(ROOT), sys.prefix, str(Path(torch.__file__).parent.parent)}
    return [f"names the folder {folder}" for folder in sorted(folders) if folder.encode() in library]


def cuobjdump() -> str:
    """The CUDA toolkit's, or the one that triton brings along."""
    try:
        from triton import backends

        bundled = str(Path(backends.__file__).parent / "nvidia" / "bin")
    except ImportError:
        bundled = ""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=bundled)
    if found is None:
        raise SystemExit("check_wheel: needs cuobjdump, of the CUDA toolkit or of triton's package")
    return found


def output(command: list[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"check_wheel: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def run_problems(wheel: Path, cuda: build_cuda.Build | None, scratch: Path) -> list[str]:
    """Installed beside this environment's torch, and used from a directory that holds nothing."""
    output([sys.executable, "-m", "venv", "--without-pip", str(scratch / "venv")])
    python = str(scratch / "venv" / "bin" / "python")
    output([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", str(wheel)])
    (site,) = (scratch / "venv" / "lib").glob("python*/site-packages")
    of_torch = [folder for folder in sys.path if folder.endswith(("site-packages", "dist-packages"))]
    (site / "torch.pth").write_text("\n".join(of_torch))  # torch's own dependencies may lie in another one
    (scratch / "empty").mkdir()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    problems = []
    imported = output([python, "-W", "error", "-c", LOSS], cwd=scratch / "empty", env=clean).strip()
    if not Path(imported).is_relative_to(site):
        problems.append(f"import objkern took {imported} instead of the wheel")
    info = output([python, "-m", "objkern", "info"], cwd=scratch / "empty", env=clean)
    print(info, end="")
    built = "none" if cuda is None else f"for {', '.join(cuda.architectures)}, by nvcc {cuda.toolkit.version}"
    if not re.search(rf"^cuda kernels +{re.escape(built)}$", info, re.M):
        problems.append(f'objkern info should say "cuda kernels {built}"')
    return problems


def problems_of(wheel: Path, cuda: build_cuda.Build | None) -> list[str]:
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        problems = name_problems(wheel.name) + content_problems(archive.namelist())
        problems += bill_problems(archive, True, cuda)
        library = next(Path(archive.extract(name, folder)) for name in archive.namelist() if name.endswith(".so"))
        problems += library_problems(output(["readelf", "-dW", str(library)]))
        problems += folder_problems(library.read_bytes())
        listing = output([cuobjdump(), "--list-elf", "--list-ptx", str(library)]) if cuda is not None else ""
        files = len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
        problems += code_problems(listing, () if cuda is None else cuda.architectures, files)
        sizes = f"{wheel.stat().st_size / 1e6:.1f} MB, its library {library.stat().st_size / 1e6:.1f} MB"
        print(f"{wheel.name}: {sizes}, {listing.count('.cubin')} cubins, {listing.count('.ptx')} PTX")
        return problems + run_problems(wheel, cuda, Path(folder))


def main(arguments: list[str]) -> int:
    wheel = max((Path(name).resolve() for name in arguments), key=lambda path: path.stat().st_mtime)
    problems = problems_of(wheel, build_cuda.plan(os.environ))
    for problem in problems:
        print(f"check_wheel: {problem}")
    print(f"{wheel.name}: {f'{len(problems)} problems' if problems else 'as it should be'}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
