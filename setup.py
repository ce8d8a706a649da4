"""Builds objkern's native core with the compiler, nvcc if there is one, and ninja; see `make build`.

Torch-free sources (the kernels) become objects by a ninja file of our own, because each wants its own flags: one
object per CPU instruction set, and nvcc's per CUDA source. The binding is an ordinary torch extension that links them.

    OBJKERN_NATIVE             1 (default): build the kernels; 0: install the Python files alone, without a compiler
    OBJKERN_CPU_CAPABILITIES   which instruction sets to build, e.g. "default,avx2" (default: all that apply here)
    OBJKERN_CUDA, TORCH_CUDA_ARCH_LIST   whether to build the CUDA kernels, and for what; see build_cuda.py
"""

import functools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:  # it came with the environment, and pip was told to use it
    raise SystemExit(f'objkern: setuptools is {setuptools.__version__}; first: pip install "setuptools>=77"')
try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise SystemExit(
        "objkern: there is no torch to build against; first: pip install torch, and then: pip install "
        "--no-build-isolation ."
    ) from None

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))  # pip runs this file without its folder on the path

import build_cuda  # noqa: E402
import build_sbom  # noqa: E402

INCLUDES = ["csrc", *cpp_extension.include_paths()]
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
# What belongs to the machine that builds stays there: the debug information that Python's own flags ask for (two
# thirds of the library), and the folders of the source files, which error messages name.
FLAGS += ["-g0", *(f"-ffile-prefix-map={folder}/=" for folder in (ROOT, Path(torch.__file__).parent.parent))]
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


def kernel_objects(build_dir: Path, cuda: build_cuda.Build | None) -> dict[Path, tuple[str, Path, list[str]]]:
    """Every torch-free object: path -> (rule, source, flags)."""
    capabilities = chosen_capabilities()
    built = [f"-DOBJKERN_HAS_{name.upper()}" for name in capabilities]
    objects = {
        build_dir / "build_facts.o": ("cxx", ROOT / "csrc/build_facts.cpp", [] if cuda is None else cuda_facts(cuda)),
        build_dir / "dispatch.o": ("cxx", ROOT / "csrc/cpu/dispatch.cpp", built),
        build_dir / "buffers.o": ("cxx", ROOT / "csrc/cpu/buffers.cpp", []),
    }
    for name in capabilities:
        aten_name, machine = CAPABILITIES[name]
        variant = "baseline" if name == "default" else name
        flags = [f"-DCPU_CAPABILITY={aten_name}", f"-DCPU_CAPABILITY_{aten_name}", f"-DOBJKERN_VARIANT={variant}"]
        objects[build_dir / f"kernels_{name}.o"] = ("cxx", ROOT / "csrc/cpu/kernels.cpp", flags + machine)
    if cuda is not None:
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            objects[build_dir / f"cuda_{source.stem}.o"] = ("nvcc", source, [])
    return objects


def cuda_facts(cuda: build_cuda.Build) -> list[str]:
    facts = {"ARCHS": ";".join(cuda.architectures), "COMPILER": f"nvcc {cuda.toolkit.version}"}
    return [f'-DOBJKERN_CUDA_{name}="{fact}"' for name, fact in facts.items()]


def escape(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def compile_objects(build_dir: Path, cuda: build_cuda.Build | None) -> list[str]:
    """Compile what is out of date, also by its command; returns the objects' paths."""
    build_dir.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{ROOT / path}" if not os.path.isabs(path) else f"-I{path}" for path in INCLUDES]
    commands = {"cxx": [*shlex.split(os.environ.get("CXX", "g++")), *FLAGS, *WARNINGS, *includes]}
    if cuda is not None:
        commands["nvcc"] = cuda.command()
    rules = []
    for name, command in commands.items():
        quoted = shlex.join(command).replace("$", "$$")
        rules += [f"rule {name}", f"  command = {quoted} -MMD -MF $out.d $flags -c $in -o $out"]
        rules += ["  depfile = $out.d", "  deps = gcc"]
    objects = kernel_objects(build_dir, cuda)
    for target, (rule, source, flags) in objects.items():
        rules += [f"build {escape(target)}: {rule} {escape(source)}", f"  flags = {shlex.join(flags)}"]
    (build_dir / "build.ninja").write_text("\n".join(rules) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []  # as torch's own ninja reads it
    if subprocess.run(["ninja", "-C", str(build_dir), *jobs]).returncode:
        without = "" if cuda is None else "; OBJKERN_CUDA=0 builds without the CUDA kernels"
        raise SystemExit(f"objkern: the kernels did not compile, see above{without}")
    return [str(path) for path in objects]


WITHOUT_COMPILER = (
    'To install without kernels, for backend="reference" and "triton" alone: OBJKERN_NATIVE=0 pip install '
    "--no-build-isolation . (docs/building.md)"
)


def is_native() -> bool:
    asked = os.environ.get("OBJKERN_NATIVE", "1")
    if asked not in ("0", "1"):
        raise SystemExit(f'OBJKERN_NATIVE: expected "0" or "1" but got "{asked}"')
    return asked == "1"


def check_tools() -> None:
    """A compiler that reads C++20, Python's headers and ninja: what is missing shows here and not in a long log."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    wanted = "Install GCC 11 or newer (Debian: apt-get install g++) or name a C++20 compiler by CXX. "
    if shutil.which(compiler[0]) is None:
        raise SystemExit(f"objkern: there is no C++ compiler: {compiler[0]} is no program. {wanted}{WITHOUT_COMPILER}")
    program = "#include <Python.h>\n#include <bit>\nstatic_assert(std::has_single_bit(8u));\nint main() { return 0; }\n"
    command = [*compiler, "-std=c++20", f"-I{sysconfig.get_path('include')}", "-x", "c++", "-fsyntax-only", "-"]
    tried = subprocess.run(command, input=program, capture_output=True, text=True)
    if tried.returncode:
        raise SystemExit(
            f"objkern: {compiler[0]} compiles no C++20 with Python's headers (Debian: python3-dev):\n{tried.stderr}"
            f"{wanted}{WITHOUT_COMPILER}"
        )
    if shutil.which("ninja") is None:
        raise SystemExit(f"objkern: there is no ninja: pip install ninja. {WITHOUT_COMPILER}")


class BuildExtension(cpp_extension.BuildExtension):
    @functools.cached_property
    def cuda(self) -> build_cuda.Build | None:
        """What is built; asked also where a wheel's metadata are made and nothing is compiled."""
        return build_cuda.plan(os.environ)

    def build_extensions(self) -> None:
        check_tools()
        cuda = self.cuda
        (extension,) = self.extensions
        extension.extra_objects = compile_objects(Path(self.build_temp).resolve() / "kernels", cuda)
        if cuda is not None:
            extension.sources.append("csrc/bindings_cuda.cpp")
            extension.extra_compile_args.append("-DOBJKERN_HAS_CUDA")
            extension.library_dirs.append(cuda.toolkit.libraries)
            extension.libraries += ["cudart_static", "rt", "dl", "pthread"]
            self.build_temp = os.path.join(self.build_temp, "with_cuda")  # another binding: neither replaces the other
        # Some Pythons link with their own library folder as a run path: no place on another machine.
        for linker in ("linker_so", "linker_so_cxx"):
            words = getattr(self.compiler, linker)
            setattr(self.compiler, linker, [word for word in words if not word.startswith("-Wl,-rpath")])
        super().build_extensions()


class Wheel(bdist_wheel):
    def egg2dist(self, egginfo_path: str, distinfo_path: str) -> None:
        """And the bill of materials, which has a place among the metadata."""
        super().egg2dist(egginfo_path, distinfo_path)
        native = self.distribution.has_ext_modules()
        cuda = self.get_finalized_command("build_ext").cuda if native else None
        found = build_sbom.document(
            self.distribution.get_version(), torch.__version__,
            build_sbom.pybind11_version(cpp_extension.include_paths()) if native else None,
            None if cuda is None else cuda.toolkit.version,
        )  # fmt: skip
        folder = Path(distinfo_path) / "sboms"
        folder.mkdir()
        (folder / build_sbom.NAME).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def extension() -> cpp_extension.CppExtension:
    return cpp_extension.CppExtension(
        "objkern._C",
        ["csrc/bindings.cpp", "csrc/bindings_cpu.cpp", "csrc/autograd.cpp", "csrc/default_call.cpp"],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=[*FLAGS, *WARNINGS],
    )


if __name__ == "__main__":  # tests read the flags above
    native = is_native()
    if not native:
        build_cuda.say("no native kernels: OBJKERN_NATIVE=0")
    setup(
        ext_modules=[extension()] if native else [],
        cmdclass={"bdist_wheel": Wheel} | ({"build_ext": BuildExtension} if native else {}),
    )
