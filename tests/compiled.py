"""Triton kernels compiled for a GPU that need not be there: signatures of the shipped launches, and what SASS says."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    "target": "*i64", "scales": "*fp64", "upstream": "*fp32", "coefficient_tensor": "*fp64", "normalizer": "*fp64",
    "centred": "*fp64", "partials": "*fp64",
}  # fmt: skip
INTEGERS = {
    "rows": "i64", "row_stride": "i64", "dense_stride": "i64", "class_stride": "i64", "upstream_stride": "i64",
    "reference_stride": "i64", "ignore_index": "i64",
    "V": "i32", "count": "i32", "programs": "i64", "elements": "i64", "weight_period": "i64", "pos_weight_period": "i64",
}  # fmt: skip
ALIGNED = [["tt.divisibility", 16]]
WITHOUT_REFERENCE = {"reference": None, "divergence": None, "BESIDE": False}  # unless a test says otherwise
GIVEN = object()  # in `present`: a tensor after all
UNALIGNED = ("x", "target", "dense", "class_weight", "logit_scale", "upstream", "gradient", "coefficient_tensor",
             "weight", "pos_weight", "reference")  # fmt: skip


@dataclass
class Compiled:
    name: str
    registers: int
    stack: int
    spills: int  # instructions that reach local memory
    sass: str

    def widths(self, operation: str) -> list[int]:
        """Bits of every global access of a kind, "LDG" or "STG"."""
        found = re.findall(rf"\b{operation}\.E([.\w]*)", self.sass)
        width = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
        return [next((width[part] for part in modifiers.split(".") if part in width), 32) for modifiers in found]


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def compile_kernel(
    kernel: Any, arch: int, element: str, warps: int, present: dict[str, Any], terms: int = 1, gradient: str = ""
) -> Compiled:
    """A kernel with logits of type `element`; `present`: constexprs by name, and None for tensors that are absent.

    gradient: the type of what it writes, that of the logits if it is not given.
    """
    names = kernel.arg_names
    present = {name: value for name, value in WITHOUT_REFERENCE.items() if name in names} | present
    total = "fp64" if element == "fp64" else "fp32"
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(names):
        if name in present and present[name] is not GIVEN:
            signature[name] = "constexpr"
            constants[(place,)] = present[name]
        elif name in ("transform", "temperature"):
            signature[name] = ("i32",) * (6 if name == "transform" else 3)
        elif name == "numbers":
            signature[name] = ("i32",) * (6 * terms)
        elif name in INTEGERS:
            signature[name] = INTEGERS[name]
        elif name in ("x", "dense", "gradient", "reference") or (name == "target" and "elements" in names):
            signature[name] = "*" + (gradient if gradient and name == "gradient" else element)
        elif name == "values":
            signature[name] = "*fp64"
        else:
            signature[name] = POINTERS.get(name, "*" + total)
        if signature[name][0] == "*" and name not in UNALIGNED:
            attributes[(place,)] = ALIGNED
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage = run(tool("cuobjdump"), "-res-usage", str(cubin))
        sass = run(tool("nvdisasm"), "-c", str(cubin))
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return Compiled(kernel.fn.__name__, registers, stack, spills, sass)
