"""Builds objkern's native core with the compiler and ninja; see `make build`.

Torch-free sources (the kernels) become objects by a ninja file of our own, because each wants its own flags: one
object per CPU instruction set. The binding is an ordinary torch extension that links them.

    OBJKERN_CPU_CAPABILITIES   which instruction sets to build, e.g. "default,avx2" (default: all that apply here)
"""

import os
import platform
import subprocess
from pathlib import Path

from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.resolve()
INCLUDES = ["csrc", *cpp_extension.include_paths()]
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
# ATen's headers use pragmas of other compilers, and pass vectors by value as GCC < 4.6 would not have.
WARNINGS = ["-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]

# name -> (ATen's name for it, compiler flags)
CAPABILITIES = {
    "default": ("DEFAULT", []),
    "avx2": ("AVX2", ["-mavx2", "-mfma", "-mf16c"]),
    "avx512": ("AVX512", ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"]),
}


def chosen_capabilities() -> list[str]:
    names = os.environ.get("OBJKERN_CPU_CAPABILITIES")
    if names is None:
        return list(CAPABILITIES) if platform.machine() in ("x86_64", "AMD64") else ["default"]
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    unknown = set(chosen) - set(CAPABILITIES)
    if unknown:
        raise SystemExit(
            f"OBJKERN_CPU_CAPABILITIES: expected names out of {list(CAPABILITIES)} but got {sorted(unknown)}"
        )
    return ["default", *(name for name in chosen if name != "default")]


def kernel_objects(build_dir: Path) -> dict[Path, tuple[Path, list[str]]]:
    """Every torch-free object: path -> (source, flags)."""
    capabilities = chosen_capabilities()
    built = [f"-DOBJKERN_HAS_{name.upper()}" for name in capabilities]
    objects = {
        build_dir / "dispatch.o": (ROOT / "csrc/cpu/dispatch.cpp", built),
        build_dir / "buffers.o": (ROOT / "csrc/cpu/buffers.cpp", []),
    }
    for name in capabilities:
        aten_name, machine = CAPABILITIES[name]
        variant = "baseline" if name == "default" else name
        flags = [f"-DCPU_CAPABILITY={aten_name}", f"-DCPU_CAPABILITY_{aten_name}", f"-DOBJKERN_VARIANT={variant}"]
        objects[build_dir / f"kernels_{name}.o"] = (ROOT / "csrc/cpu/kernels.cpp", flags + machine)
    return objects


def escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def compile_objects(build_dir: Path) -> list[str]:
    """Compile what is out of date; returns the objects' paths."""
    build_dir.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{ROOT / path}" if not os.path.isabs(path) else f"-I{path}" for path in INCLUDES]
    objects = kernel_objects(build_dir)
    rules = [
        "rule cxx",
        f"  command = {os.environ.get('CXX', 'g++')} -MMD -MF $out.d {' '.join(FLAGS + WARNINGS)} "
        + " ".join(f"'{flag}'" for flag in includes)
        + " $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    for target, (source, flags) in objects.items():
        rules += [f"build {escape(target)}: cxx {escape(source)}", f"  flags = {' '.join(flags)}"]
    (build_dir / "build.ninja").write_text("\n".join(rules) + "\n")
    subprocess.run(["ninja", "-C", str(build_dir)], check=True)
    return [str(path) for path in objects]


class BuildExtension(cpp_extension.BuildExtension):
    def build_extensions(self) -> None:
        for extension in self.extensions:
            extension.extra_objects = compile_objects(Path(self.build_temp).resolve() / "kernels")
        super().build_extensions()


setup(
    ext_modules=[
        cpp_extension.CppExtension(
            "objkern._C",
            ["csrc/bindings.cpp", "csrc/bindings_cpu.cpp", "csrc/autograd.cpp"],
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args=[*FLAGS, *WARNINGS],
            depends=[
                "csrc/arguments.h",
                "csrc/batch.h",
                "csrc/objective.h",
                "csrc/rows.h",
                "csrc/dtypes.h",
                "csrc/cpu/kernels.h",
            ],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
