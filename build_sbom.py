"""The software bill of materials of a wheel: what its one library was made of, as CycloneDX JSON.

setup.py puts it into `.dist-info/sboms/` (PEP 770), where scanners of vulnerabilities and licences look. Listed is what
is in the library: objkern's own code, the headers that were compiled in, NVIDIA's static runtime where the CUDA
kernels were built; and torch, which a wheel needs beside it. No torch is imported in here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

NAME = "objkern.cdx.json"


def pybind11_version(include_folders: list[str]) -> str:
    """Of the headers that the binding is compiled with: those that torch brings along."""
    number = re.compile(r"#\s*define PYBIND11_VERSION_(?:MAJOR|MINOR|MICRO|PATCH) +(\w+)")
    for folder in include_folders:
        header = Path(folder) / "pybind11" / "detail" / "common.h"
        if header.exists():
            return ".".join(number.findall(header.read_text())[:3])
    raise SystemExit(f"build_sbom: no pybind11 among the headers in {', '.join(include_folders)}")


def component(name: str, version: str, license: dict[str, str], purl: str, description: str) -> dict[str, Any]:
    return {
        "type": "library", "bom-ref": name, "name": name, "version": version, "licenses": [{"license": license}],
        "purl": purl, "description": description,
    }  # fmt: skip


def document(version: str, torch: str, pybind11: str | None, cuda: str | None) -> dict[str, Any]:
    """torch: the version that was built against; pybind11: None where there is no library; cuda: nvcc's version."""
    bsd, own = {"id": "BSD-3-Clause"}, {"id": "Apache-2.0"}
    main = component("objkern", version, own, f"pkg:pypi/objkern@{version}", "this wheel")
    public = torch.partition("+")[0]  # a local part, as in +cpu, says how it was built
    headers = "" if pybind11 is None else "; its vectors (ATen/cpu/vec) are compiled in"
    beside = f"needed beside this wheel, linked to{headers}"
    parts = [component("torch", torch, bsd, f"pkg:pypi/torch@{public}", beside)]
    if pybind11 is not None:
        purl = f"pkg:github/pybind/pybind11@v{pybind11}"
        parts.append(component("pybind11", pybind11, bsd, purl, "headers, compiled in; as torch brings them along"))
    if cuda is not None:
        toolkit = {"name": "NVIDIA CUDA Toolkit End User License Agreement"}
        purl = f"pkg:generic/cudart_static@{cuda}?vendor=nvidia"
        parts.append(component("cudart_static", cuda, toolkit, purl, "NVIDIA's CUDA runtime, linked statically"))
    return {
        "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "metadata": {"component": main},
        "components": parts,
        "dependencies": [
            {"ref": "objkern", "dependsOn": [part["bom-ref"] for part in parts]},
            *({"ref": part["bom-ref"], "dependsOn": []} for part in parts),
        ],
    }  # fmt: skip
