"""What setup.py knows about CUDA: where nvcc is, what it can compile for, and the flags to call it with.

    OBJKERN_CUDA           auto (default): build the CUDA kernels if there is an nvcc; 1: an error if not; 0: never
    TORCH_CUDA_ARCH_LIST   what to compile for, e.g. "9.0" or "8.0;9.0a;10.0+PTX" (default: DEFAULT_ARCHITECTURES)
    CUDACXX                the nvcc to use; else that of CUDA_HOME, of CUDA_PATH, on PATH, or in /usr/local/cuda
    NVCC_CCBIN, CXX        the host compiler that nvcc calls

No torch in here: kernels are compiled without its headers, so any nvcc will do, whatever CUDA this torch has, if any.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"  # A100, H100 and H200, B200, and by its PTX what comes after
OLDEST_NVCC = (12, 0)  # the first that reads C++20
USUAL_HOME = "/usr/local/cuda"
FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]


class NoCudaError(Exception):
    """Why the CUDA kernels cannot be built."""


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    version: str  # "13.0.88"
    known: frozenset[str]  # the architectures it compiles for: {"8.0", "9.0", ...}
    libraries: str  # the folder of libcudart_static.a


@dataclass(frozen=True)
class Build:
    toolkit: Toolkit
    architectures: tuple[str, ...]  # ("8.0", "9.0", "10.0+PTX")
    host_compiler: str | None = None

    def command(self) -> list[str]:
        """What compiles a .cu file, less its name and the object's."""
        host = [] if self.host_compiler is None else ["-ccbin", self.host_compiler]
        return [self.toolkit.nvcc, *FLAGS, *host, *(flag for a in self.architectures for flag in gencode(a))]


# ---- architectures --------------------------------------------------------------------------------------------------


def gencode(architecture: str) -> list[str]:
    """The flags for "9.0a" or "10.0+PTX": machine code, and with +PTX what later devices compile for themselves."""
    number = architecture.removesuffix("+PTX").replace(".", "")
    kinds = ["sm", "compute"] if architecture.endswith("+PTX") else ["sm"]
    return [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]


def architectures(asked: str | None, toolkit: Toolkit) -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST as a tuple; if it says nothing, the default as far as this nvcc knows it."""
    found = tuple(dict.fromkeys((asked or "").replace(";", " ").split()))
    for name in found:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise SystemExit(
                f'TORCH_CUDA_ARCH_LIST: expected architectures like "8.0;9.0a;10.0+PTX" but got "{name}" in "{asked}"'
            )
        if float(generation(name)) < 8.0:
            raise SystemExit(
                f'TORCH_CUDA_ARCH_LIST: "{name}" is too old: the kernels copy asynchronously, which takes 8.0 or newer'
            )
        if generation(name) not in toolkit.known:
            raise SystemExit(
                f'TORCH_CUDA_ARCH_LIST: "{name}" is not known to nvcc {toolkit.version} ({toolkit.nvcc}), which '
                f"compiles for {', '.join(sorted(toolkit.known, key=float))}"
            )
    return found or known_defaults(toolkit)


def known_defaults(toolkit: Toolkit) -> tuple[str, ...]:
    names = [name.removesuffix("+PTX") for name in DEFAULT_ARCHITECTURES.split(";")]
    known = [name for name in names if name in toolkit.known]
    if not known:
        raise NoCudaError(f"nvcc {toolkit.version} knows none of {DEFAULT_ARCHITECTURES}; set TORCH_CUDA_ARCH_LIST")
    if known != names:
        unknown = ", ".join(name for name in names if name not in known)
        say(f"nvcc {toolkit.version} does not know {unknown}: left out (10.0 takes nvcc 12.8)")
    return (*known[:-1], known[-1] + "+PTX")


def generation(architecture: str) -> str:
    """ "9.0a+PTX" → "9.0"."""
    return architecture.removesuffix("+PTX").rstrip("af")


# ---- the compiler ---------------------------------------------------------------------------------------------------


def find_nvcc(environment: Mapping[str, str]) -> str:
    path = environment.get("PATH", "")
    if named := environment.get("CUDACXX"):
        if found := shutil.which(named, path=path):
            return found
        raise SystemExit(f'CUDACXX: expected the path of an nvcc but got "{named}", which is no program')
    homes = {name: environment[name] for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)}
    places = {f"{name} ({home})": f"{home}/bin" for name, home in homes.items()}
    places |= {"PATH": path, USUAL_HOME: f"{USUAL_HOME}/bin"}
    for folders in places.values():
        if found := shutil.which("nvcc", path=folders):
            return found
    unset = [name for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH") if name not in homes]
    raise NoCudaError(f"no nvcc was found in {', '.join(places)} (not set: {', '.join(unset)})")


def inspect(nvcc: str, host_compiler: str | None) -> Toolkit:
    """Ask nvcc itself, since it may be a wrapper or lie outside its toolkit."""
    version = re.search(r"release .*, V((\d+)\.(\d+)[.\d]*)", output([nvcc, "--version"]))
    if version is None:
        raise NoCudaError(f"{nvcc} --version does not read like that of an nvcc")
    if (int(version[2]), int(version[3])) < OLDEST_NVCC:
        raise NoCudaError(f"{nvcc} is {version[1]}; C++20 takes nvcc {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or newer")
    known = frozenset(f"{n[:-1]}.{n[-1]}" for n in re.findall(r"compute_(\d+)", output([nvcc, "--list-gpu-arch"])))
    host = [] if host_compiler is None else ["-ccbin", host_compiler]
    steps = output([nvcc, *host, "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"])
    folders = [folder for line in re.findall(r"LIBRARIES=(.*)", steps) for folder in re.findall(r'-L([^"\s]+)', line)]
    for folder in folders:
        if (Path(folder) / "libcudart_static.a").exists():
            return Toolkit(nvcc, version[1], known, str(Path(folder).resolve()))
    raise NoCudaError(f"the toolkit of {nvcc} has no libcudart_static.a in {', '.join(folders)}")


def output(command: list[str]) -> str:
    """Both streams, for --dryrun writes to stderr."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise NoCudaError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise NoCudaError(f"{shlex.join(command)} failed: {done.stdout.strip()}")
    return done.stdout


def host_compiler(environment: Mapping[str, str]) -> str | None:
    """CXX, less a compiler cache before it; or none where nvcc reads NVCC_CCBIN, which a -ccbin would overrule."""
    words = [] if environment.get("NVCC_CCBIN") else shlex.split(environment.get("CXX", ""))
    return next((word for word in words if Path(word).name not in ("ccache", "sccache", "distcc")), None)


# ---- the decision ---------------------------------------------------------------------------------------------------


def plan(environment: Mapping[str, str]) -> Build | None:
    """How to build the CUDA kernels, or None: not at all. Prints which."""
    asked = environment.get("OBJKERN_CUDA", "auto")
    if asked not in ("auto", "0", "1"):
        raise SystemExit(f'OBJKERN_CUDA: expected "auto", "0" or "1" but got "{asked}"')
    if asked == "0":
        say("no CUDA kernels: OBJKERN_CUDA=0")
        return None
    try:
        host = host_compiler(environment)
        toolkit = inspect(find_nvcc(environment), host)
        build = Build(toolkit, architectures(environment.get("TORCH_CUDA_ARCH_LIST"), toolkit), host)
    except NoCudaError as reason:
        if asked == "1":
            raise SystemExit(f"OBJKERN_CUDA=1 asks for the CUDA kernels, but {reason}") from reason
        say(f"no CUDA kernels: {reason}")
        return None
    say(f"CUDA kernels for {', '.join(build.architectures)} by nvcc {toolkit.version}")
    return build


def say(what: str) -> None:
    print(f"==> {what}", flush=True)


if __name__ == "__main__":  # for make, which shows this before a build that takes minutes
    plan(os.environ)
