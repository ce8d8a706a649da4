"""The command line of the package.

``python -m objkern info`` says what this installation can run, ``python -m objkern finetune`` trains a model, which
``predict``, ``export`` and ``report`` use, and ``python -m objkern bench`` runs the benchmarks of the checkout.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
from pathlib import Path

import torch

from . import __version__, cuda, native, triton
from .native import _C


def info() -> str:
    """Version, backends and what they were built for, one fact a line."""
    build = None if _C is None else _C.build_info()
    facts = {
        "objkern": __version__,
        "torch": torch.__version__ + ("" if build is None else f" (built against {build['torch']})"),
        "python": f"{platform.python_version()} on {platform.machine()}",
        "compiler": "none: no native kernels" if build is None else f"GCC {build['compiler']}",
        "cpu backend": f"cannot run: {native.why_not()}" if build is None else _cpu(build["cpu_capability"]),
        "cuda backend": _cuda(),
        "cuda kernels": "none" if build is None else _cuda_kernels(build["cuda_archs"], build["cuda_compiler"]),
        "triton backend": triton.summary(),
        "reference backend": "runs on any device (eager torch)",
        "threads": str(torch.get_num_threads()),
    }
    return "\n".join(f"{name:18} {fact}" for name, fact in facts.items())


def _cpu(capability: str | None) -> str:
    if capability is None:
        return "cannot run: OBJKERN_CPU_CAPABILITY asks for what this build or this processor has not"
    return f"runs, with {'default' if capability == 'baseline' else capability} kernels"


def _cuda_kernels(archs: str | None, compiler: str | None) -> str:
    return "none" if archs is None else f"for {', '.join(archs.split(';'))}, by {compiler}"


def _cuda() -> str:
    reasons = cuda.missing()
    return f"cannot run: {'; '.join(reasons)}" if reasons else "; ".join(_cuda_devices(_C.cuda_support()[0]))


def _cuda_devices(count: int) -> list[str]:
    """Which devices the kernels run on, then why not on each of the others."""
    why_not = {device: cuda.why_not(device) for device in range(count)}
    names = {device: torch.cuda.get_device_name(device) for device in why_not}
    fit = [names[device] for device, reason in why_not.items() if reason is None]
    facts = [f"runs on {len(fit)} device{'s' if len(fit) > 1 else ''}: {', '.join(fit)}"] if fit else []
    return facts + [f"cannot run on device {i}, {names[i]}: {reason}" for i, reason in why_not.items() if reason]


def bench(arguments: list[str]) -> int:
    """The benchmarks of the checkout, wherever it is called from."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / "benchmarks" / "conftest.py").exists():
        print(
            f"objkern bench: there are no benchmarks beside {Path(__file__).parent}. They come with a checkout of the "
            "repository, not with an installed package: clone it, build it (make build), and run make bench there",
            file=sys.stderr,
        )
        return 2
    if _C is None:
        print(f"objkern bench: {native.why_not()}", file=sys.stderr)
        return 2
    missing = [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"objkern bench: needs {' and '.join(missing)} (pip install pytest pytest-benchmark)", file=sys.stderr)
        return 2
    sys.path.insert(0, str(checkout))
    from benchmarks.__main__ import main

    return main(arguments)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["finetune"]:  # it has options of its own, and needs packages that the rest does not
        from .finetune.cli import main as finetune

        return finetune(argv[1:])
    if argv[:1] in (["predict"], ["export"], ["report"]):
        from .finetune import deploy

        return getattr(deploy, f"{argv[0]}_main")(argv[1:])
    if argv[:1] == ["bench"]:
        return bench(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m objkern", description="Fused objective functions.")
    parser.add_argument("--version", action="version", version=f"objkern {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="version, backends that can run here, CPU capability, CUDA architectures")
    commands.add_parser("finetune", help="train a model with an objective given as a formula; see finetune --help")
    commands.add_parser("predict", help="answers of a model that finetune trained; see predict --help")
    commands.add_parser("export", help="a trained model as a folder for the hub or a server; see export --help")
    commands.add_parser("report", help="write a run's report and curves anew")
    commands.add_parser("bench", help="compare with torch and others on this machine; see bench --help")
    parser.parse_args(argv)
    print(info())
    return 0


if __name__ == "__main__":
    sys.exit(main())
