"""Faults that are drawn from a seed, and whether the tests notice them.

    python -m tests.mutants --count 400 --seed 1               # a quarter each of C++, CUDA (emulated), Triton, Python
    python -m tests.mutants --count 40 --rooms cpu,python      # fewer, in some of them
    python -m tests.mutants --seed 1 --only 17,230 --verbose   # these of that draw, with what pytest says

A drawn fault is a place of tests/mutator.py. Those in C++ sleep in one build (tests/faults.py) and are woken one at a
time; those in Python stand in a copy of the package. A fault is caught if a test fails or ends in a crash, or if the
tests take far longer than without it. One that no test notices gets a test, or a line in NEUTRAL, which says of its
place why it changes nothing; nothing is drawn from such places.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch.utils import cpp_extension

from . import mutator, reached
from .emulation import build as emulation
from .faults import REACHED, ROOT, VARIABLE, Span, plant_spans
from .fork_server import Server
from .neutral import NEUTRAL, Neutral

KEPT = ROOT / "build/mutants"


class Room(NamedTuple):
    files: tuple[str, ...]  # patterns
    tests: tuple[tuple[str, ...], ...]  # runs of pytest by their arguments, in this order, until one fails; as of a
    # shell's commands, the first ones may set the environment: "NAME=value"
    environment: Mapping[str, str] = MappingProxyType({})
    by_file: Mapping[str, tuple[tuple[str, ...], ...]] = MappingProxyType({})  # instead of `tests`


def files(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_{name}.py" for name in names)


INTERPRETED = "tests/interpreted/cases.py"
EMULATED = "tests/emulation/cases.py"
# What takes seconds a case: compilation, derivatives of derivatives by differences, random objectives.
LONG = (
    "compile or opcheck or gradgradcheck or opinfo or random_objectives or anything_for_any_argument or module_inputs or "
    "second_derivatives"
)


def quick(*names: str) -> tuple[str, ...]:
    return (*files(*names), "-k", f"not ({LONG})")


# What runs in ranks, which are processes that serve many tests: which of them reaches a place is not known.
IN_RANKS = ("distributed", "finetune_ranks", "transformers_sharded")
RANKS = (*files("finetune_ranks"), "-m", "not trust")  # these are slow ones
SHARDED = (*files("transformers_sharded"), "-m", "not trust")
OF_PYTHON = (
    "terms", "objective", "errors", "default_call", "corners", "functional", "elementwise", "divergence", "precision",
    "pitfalls", "kernels", "linear", "penalties", "buffers", "parser", "torch", "transformers", "without_core", "finetune",
    "finetune_tasks", "finetune_retention", "finetune_reports", "finetune_saved", "finetune_training", "finetune_run",
)  # fmt: skip
WHOLE = quick(*OF_PYTHON)
LATER = (
    *files("objective", "torch", "corners", "functional", "linear", "transformers", "elementwise", "penalties"),
    "-k",
    LONG,
)
INSIDE = quick("kernels", "pitfalls", "terms", "elementwise")
AROUND = quick(
    "precision", "objective", "divergence", "corners", "default_call", "buffers", "errors", "functional", "torch"
)
BEYOND = quick("linear", "penalties")
# Compiled code calls the same kernels, and other ranks do.
DERIVATIVES = (
    *files("objective", "torch", "elementwise", "functional", "divergence"),
    "-k",
    f"({LONG}) and not compile",
)
ROOMS = {
    "cpu": Room(
        ("csrc/*.h", "csrc/autograd.cpp", "csrc/default_call.cpp", "csrc/bindings_cpu.cpp", "csrc/cpu/*"),
        (INSIDE, AROUND, BEYOND, DERIVATIVES),
        {"OBJKERN_CPU_CAPABILITY": "default"},
        {
            "csrc/autograd": (quick("objective", "torch"), INSIDE, AROUND, BEYOND, DERIVATIVES),
            "csrc/default_call": (quick("default_call", "objective"), INSIDE, AROUND, BEYOND, DERIVATIVES),
            "csrc/divergence": (quick("divergence"), AROUND, INSIDE, BEYOND, DERIVATIVES),
            "csrc/cpu/reference": (quick("divergence"), AROUND, INSIDE, BEYOND, DERIVATIVES),
            "csrc/elementwise": (quick("elementwise"), AROUND, DERIVATIVES),
            "csrc/cpu/elementwise": (quick("elementwise"), AROUND, DERIVATIVES),
            "csrc/cpu/buffers": (quick("buffers"), INSIDE, AROUND),
            "csrc/cpu/dispatch": (INSIDE, AROUND, (*files("house"), "-k", "capability"), BEYOND),
            "csrc/batch": (INSIDE, quick("functional", "errors", "torch"), AROUND, BEYOND, DERIVATIVES),
        },
    ),
    "cuda": Room(
        ("csrc/cuda/*", "csrc/bindings_cuda.cpp", "csrc/numbers.h", "csrc/objective.h", "csrc/divergence.h"),
        (
            (EMULATED, "-k", "every_depth or options or elementwise or many_parameters"),
            (EMULATED, "-k", "not (every_depth or options or elementwise or many_parameters or random_objectives)"),
            (*emulation.EXISTING, "-k", f"({emulation.OF_A_GPU}) and not ({LONG})"),
        ),
        {"MALLOC_PERTURB_": "129"},
    ),
    "triton": Room(
        ("objkern/triton/*.py",),
        (
            ("TRITON_INTERPRET=1", INTERPRETED, "-k", "each_term or reductions or elementwise_options or softcap"),
            ("TRITON_INTERPRET=1", INTERPRETED, "tests/interpreted/functions.py", "-k",
             "not (each_term or reductions or elementwise_options or softcap)"),
            files("triton"),  # which compiles
        ),
        {"MALLOC_PERTURB_": "129"},
    ),
    "python": Room(
        ("objkern/*.py", "objkern/finetune/*.py"),
        (WHOLE, LATER, files("distributed")),
        by_file={
            "distributed": (files("distributed"), WHOLE, RANKS, SHARDED),
            "scale": (files("distributed"), WHOLE, LATER),
            "penalties": (WHOLE, LATER, files("distributed"), RANKS),
            "transformers": (WHOLE, LATER, SHARDED, RANKS),
            "native": (files("without_core", "house"),),
            **{f"finetune/{name}": (WHOLE, RANKS) for name in ("training", "parallel", "checkpoints", "strategies", "run")},
            "finetune/": (WHOLE,),
        },
    ),
}  # fmt: skip

# What is defined where the faults are compiled: kernels for any processor, and CUDA's as the emulation has them.
MACROS = ("OBJKERN_EMULATED", "OBJKERN_CUDA_KEY", "OBJKERN_VARIANT", "_SC_LEVEL2_CACHE_SIZE")

# What presents results to people, and says why something cannot be had, is no mathematics and no loop.
LEFT_OUT = (
    "objkern/finetune/reports.py", "objkern/finetune/card.py", "objkern/finetune/tables.py", "objkern/finetune/cli.py",
    "objkern/finetune/demo.py", "objkern/finetune/small.py", "objkern/finetune/__init__.py", "objkern/__main__.py",
    "csrc/build_facts.h", "csrc/cuda/kernels.h", "csrc/cuda/device.h",
)  # fmt: skip


KEY = ("room", "file", "line", "kind", "right", "wrong")


class Fault(NamedTuple):
    number: int
    room: str
    file: str
    line: int
    place: mutator.Place

    def describe(self, source: str) -> dict[str, Any]:
        right = source[self.place.begin : self.place.end]
        return {
            "number": self.number, "room": self.room, "file": self.file, "line": self.line, "kind": self.place.kind,
            "right": right, "wrong": self.place.wrong,
        }  # fmt: skip

    def key(self, source: str) -> tuple[Any, ...]:
        """What it is whatever its number: that of one behind a fault which is found to change nothing is another."""
        return tuple(self.describe(source)[name] for name in KEY)


@functools.cache
def every_place(room: str) -> tuple[tuple[str, str, mutator.Place], ...]:
    """(file, lines, place), also those that change nothing."""
    found = []
    for path in sorted(path for pattern in ROOMS[room].files for path in ROOT.glob(pattern)):
        file = str(path.relative_to(ROOT))
        if file in LEFT_OUT or path.suffix not in (".py", ".h", ".cpp", ".cu"):
            continue
        source = path.read_text(encoding="utf-8")
        for place in mutator.of_python(source) if path.suffix == ".py" else mutator.of_cpp(source, MACROS):
            begin, end = source.rfind("\n", 0, place.begin) + 1, source.find("\n", place.end)
            found.append((file, source[begin:end], place))
    return tuple(found)


def is_neutral(known: Neutral, room: str, file: str, lines: str, place: mutator.Place) -> bool:
    if known.room not in ("", room):
        return False
    return file == known.file and bool(re.search(known.line, lines)) and bool(re.search(known.wrong, place.wrong))


@functools.cache
def places(room: str) -> dict[str, list[tuple[str, mutator.Place, bool]]]:
    """(file, place, whether it changes nothing) by kind."""
    found: dict[str, list[tuple[str, mutator.Place, bool]]] = {kind: [] for kind in mutator.KINDS}
    for file, lines, place in every_place(room):
        neutral = any(is_neutral(known, room, file, lines, place) for known in NEUTRAL)
        found[place.kind].append((file, place, neutral))
    return found


def draw(name: str, seed: int, first: int) -> Iterator[Fault]:
    """Without an end, but for the places': the kinds take turns; no two faults touch the same lines. One that is found
    to change nothing leaves its place to the next of its kind; the others stay."""
    generator = random.Random(f"{name} {seed}")
    found = {kind: generator.sample(some, len(some)) for kind, some in places(name).items()}
    taken: dict[str, set[int]] = {}
    number = first
    while any(found.values()):
        for of_kind in found.values():
            while of_kind:
                file, place, neutral = of_kind.pop()
                if neutral:
                    continue
                source = (ROOT / file).read_text(encoding="utf-8")
                line = source.count("\n", 0, place.begin) + 1
                lines = range(line, source.count("\n", 0, place.end) + 2)
                if file.endswith(".py") and not mutator.is_python(source, place):
                    continue
                if not taken.setdefault(file, set()).intersection(lines):
                    taken[file].update(lines)
                    yield Fault(number, name, file, line, place)
                    number += 1
                    break


# ---- builds -----------------------------------------------------------------------------------------------------------


def planted(name: str, faults: Iterator[Fault], count: int) -> tuple[Path, list[Fault]]:
    """A build of the C++ room with `count` faults, and those that it has: what does not compile is replaced."""
    folder = KEPT / name
    chosen = list(itertools.islice(faults, count + count // 4))
    while True:
        spans = {fault.number: Span(fault.file.removeprefix("csrc/"), *fault.place[1:]) for fault in chosen}
        plant_spans(folder / "csrc", spans)
        output = compile_cpu(folder) if name == "cpu" else compile_cuda(folder)
        if output is None:
            return folder, chosen[:count]
        wrong = {
            (os.path.normpath(f"csrc/{path.split('/csrc/')[-1]}"), int(line))
            for path, line in re.findall(r"^(\S+/csrc/\S+?):(\d+):(?:\d+:)? (?:fatal )?error:", output, re.MULTILINE)
        }
        named = {int(number) for number in re.findall(r"planted\((\d+)\)", output)}
        bad = {fault.number for fault in chosen if _lines(fault) & wrong or fault.number in named}
        if not bad:
            raise RuntimeError(f"the faults do not compile:\n{output[-6000:]}")
        chosen = [fault for fault in chosen if fault.number not in bad]
        print(f"{name}: {len(bad)} faults do not compile", flush=True)
        chosen += itertools.islice(faults, max(0, count - len(chosen)))


def _lines(fault: Fault) -> set[tuple[str, int]]:
    source = (ROOT / fault.file).read_text(encoding="utf-8")
    last = fault.line + source.count("\n", fault.place.begin, fault.place.end)
    return {(fault.file, line) for line in range(fault.line, last + 1)}


def compile_cpu(folder: Path) -> str | None:
    """None, or what the compiler says. One set of kernels, which is the baseline."""
    import setup

    csrc = folder / "csrc"
    build = emulation.Build(folder)
    includes = [f"-isystem{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_paths()["include"])]
    common = [*(flag for flag in setup.FLAGS if flag != "-O3"), "-O1", "-w", f"-I{csrc}", *includes]
    aten, _ = setup.CAPABILITIES["default"]
    variant = [f"-DCPU_CAPABILITY={aten}", f"-DCPU_CAPABILITY_{aten}", "-DOBJKERN_VARIANT=baseline"]
    for source in (
        "cpu/kernels",
        "cpu/dispatch",
        "cpu/buffers",
        "bindings",
        "bindings_cpu",
        "autograd",
        "default_call",
    ):
        more = {"cpu/kernels": variant, "cpu/dispatch": ["-DOBJKERN_HAS_DEFAULT"]}.get(source, [])
        macros = [] if source.startswith("cpu/") else ["-DTORCH_EXTENSION_NAME=_C", "-DTORCH_API_INCLUDE_EXTENSION_H"]
        build.compile(csrc / f"{source}.cpp", [*common, *macros, *more])
    build.compile(csrc / "build_facts.cpp", common)
    return build.problems([])


def compile_cuda(folder: Path) -> str | None:
    return emulation.emulated_kernels(folder).problems(emulation.ordinary_objects())


# ---- runs -------------------------------------------------------------------------------------------------------------


class Reach(NamedTuple):
    """A test that passes without a fault."""

    test: str
    seconds: float
    faults: frozenset[int]  # whose places it reaches


class Runner:
    """pytest in folders of their own, two at a time; each run is seen to pass without a fault before it counts."""

    def __init__(self, faults: Sequence[Fault], verbose: bool) -> None:
        self.faults = faults
        self.verbose = verbose
        self.sound: dict[tuple[str, ...], tuple[float, list[Reach]]] = {}
        self.lock = threading.Lock()
        self.locks: dict[tuple[str, ...], threading.Lock] = {}
        self.own = threading.local()
        self.servers: list[Server] = []

    def server(self, own: Mapping[str, str]) -> Server:
        """This thread's, of such an environment."""
        servers, key = self.own.__dict__, str(sorted(own.items()))
        if key not in servers:
            environment = {
                "PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/tmp"), "OMP_NUM_THREADS": "1",
                "PYTHONDONTWRITEBYTECODE": "1", "TORCHINDUCTOR_CACHE_DIR": f"{KEPT}/inductor", **own,
            }  # fmt: skip
            servers[key] = Server(environment)
            with self.lock:
                self.servers.append(servers[key])
        return servers[key]

    def close(self) -> None:
        for server in self.servers:
            server.close()

    def pytest(
        self, folder: Path, room: Room, arguments: tuple[str, ...], number: int, limit: float, **environment: str
    ) -> tuple[int, str]:
        options = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "tests.reached")
        named, rest = split(arguments)
        own = {**room.environment, **dict(each.split("=", 1) for each in named)}
        with tempfile.TemporaryDirectory() as temporary:
            environment |= {"TMPDIR": temporary, VARIABLE: str(number)}
            return self.server(own).run(folder, (*options, *rest), environment, limit)

    def without(self, folder: Path, room: Room, arguments: tuple[str, ...]) -> tuple[float, list[Reach]]:
        """How long it takes without a fault, and which tests reach what; kept for these sources and faults."""
        key = (*room.files, *arguments)
        with self.lock:  # a lock for each, so that the others go on
            lock = self.locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self.sound:
                own = [fault for fault in self.faults if ROOMS[fault.room] is room]
                kept = KEPT / f"without-{fingerprint(str((key, room.environment, own)))}.json"
                if not kept.exists():
                    kept.write_text(json.dumps(self.run_without(folder, room, arguments, own)))
                seconds, tests = json.loads(kept.read_text())
                self.sound[key] = seconds, [Reach(test, time, frozenset(k)) for test, (time, k) in tests.items()]
        return self.sound[key]

    def run_without(
        self, folder: Path, room: Room, arguments: tuple[str, ...], faults: Sequence[Fault]
    ) -> tuple[float, dict[str, Any]]:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as temporary:
            if INTERPRETED in arguments or tells_by_marks(room, arguments):
                folder = marked(copy_of_package(Path(temporary)), faults)
            out = Path(temporary, "reached.json")
            status, output = self.pytest(folder, room, arguments, -1, 3600, **{reached.OUT: str(out)})
            if status != 0:
                raise RuntimeError(f"{' '.join(arguments)} fails without a fault:\n{output[-6000:]}")
            seconds = time.monotonic() - begin
            print(f"without a fault: {seconds:.0f} s: {' '.join(arguments)}", flush=True)
            return seconds, json.loads(out.read_text())

    def runs(
        self, folder: Path, fault: Fault, tests: tuple[tuple[str, ...], ...]
    ) -> Iterator[tuple[tuple[str, ...], float]]:
        """Arguments, and how long they take without the fault.

        A minute of tests that reach the place, three of each function, by which most faults are seen at once; then all
        others that do, and those of which it is not known, for they work in other processes. A place that a test or two
        reach may be one that is reached once in a process, by whoever comes first: then it is all tests.
        """
        begun: set[str] = set()
        room = ROOMS[fault.room]
        known = [each for each in tests if room is not ROOMS["python"] or tells_by_marks(room, each)]
        reach = {each: self.without(folder, room, each)[1] for each in known}
        once = all(sum(fault.number in each.faults for each in some) < 3 for some in reach.values())
        for named in dict.fromkeys(split(arguments)[0] for arguments in reach):
            functions: dict[str, list[Reach]] = {}
            there = {each for arguments, some in reach.items() if split(arguments)[0] == named for each in some}
            for each in sorted(there, key=lambda each: (each.seconds, each.test)):
                if fault.number in each.faults:
                    functions.setdefault(each.test.partition("[")[0], []).append(each)
            chosen = {each for of in functions.values() for each in (of[0], of[len(of) // 2], of[-1])}
            ordered = sorted(chosen, key=lambda each: (each.seconds, each.test))
            ends = itertools.accumulate(each.seconds for each in ordered)
            if some := [each for each, end in zip(ordered, ends, strict=True) if end <= 60]:
                begun.update(each.test for each in some)
                yield (*named, *(each.test for each in some)), sum(each.seconds for each in some)
        for arguments in tests:
            if arguments not in reach or once:
                yield arguments, self.without(folder, room, arguments)[0]
                continue
            others = [each for each in reach[arguments] if fault.number in each.faults or not each.faults]
            if others := [each for each in others if each.test not in begun]:
                yield (*split(arguments)[0], *(each.test for each in others)), sum(each.seconds for each in others)

    def run(self, folder: Path, fault: Fault) -> dict[str, Any]:
        """What became of it."""
        room = ROOMS[fault.room]
        inside = fault.file.removeprefix("objkern/").removesuffix(".py")
        tests = next(
            (t for name, t in room.by_file.items() if inside == name or inside.startswith(f"{name}")), room.tests
        )
        begin = time.monotonic()
        found: dict[str, Any] = {"outcome": "survived", "by": ""}
        for arguments, seconds in self.runs(folder, fault, tests):
            whole, limit = arguments in tests, 60 + 4 * seconds
            status, output = self.with_fault(folder, fault, arguments, limit)
            if self.verbose:
                print(output[-3000:], flush=True)
            if status == 5 or "no tests ran" in output:
                raise RuntimeError(f"no tests: {arguments}\n{output}")
            if status != 0:
                first = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
                if not whole and not self.passes(folder, room, arguments, first[1] if first else "", limit):
                    continue  # it takes the others that come before it, or its name is none that pytest takes
                found = {"outcome": "caught", "by": first[1] if first else f"status {status}"}
                break
        source = (ROOT / fault.file).read_text(encoding="utf-8")
        return fault.describe(source) | found | {"seconds": round(time.monotonic() - begin, 1)}

    def passes(self, folder: Path, room: Room, arguments: tuple[str, ...], failed: str, limit: float) -> bool:
        """Whether the test that failed, or all, if it is not known, pass without the fault."""
        again = (*split(arguments)[0], failed) if failed in arguments else arguments
        return self.pytest(folder, room, again, 0, limit)[0] == 0

    def with_fault(self, folder: Path, fault: Fault, arguments: tuple[str, ...], limit: float) -> tuple[int, str]:
        room, path = ROOMS[fault.room], folder / fault.file
        if not fault.file.endswith(".py"):
            return self.pytest(folder, room, arguments, fault.number, limit)
        source = (ROOT / fault.file).read_text(encoding="utf-8")
        wrong = source[: fault.place.begin] + fault.place.wrong + source[fault.place.end :]
        path.write_text(wrong, encoding="utf-8")
        try:
            return self.pytest(folder, room, arguments, fault.number, limit)
        finally:
            path.write_text(source, encoding="utf-8")


def tells_by_marks(room: Room, arguments: tuple[str, ...]) -> bool:
    """Whether tests of a room in Python run in this process, and so can say what they reach, and nothing is compiled."""
    return room is ROOMS["python"] and arguments == WHOLE


# For the processes that a test starts, which are no pytest: each place once, to a file.
OUTSIDE = f"""\
import builtins, os

def reached(number, seen=set()):
    if number not in seen and {reached.OUTSIDE!r} in os.environ:
        seen.add(number)
        with open(os.environ[{reached.OUTSIDE!r}], "a") as file:
            file.write(f"{{number}}\\n")

if not hasattr(builtins, {REACHED!r}):
    builtins.{REACHED} = reached
"""


def marked(folder: Path, faults: Sequence[Fault]) -> Path:
    """With places in Python that tell that they are reached, as planted ones in C++ do; no compiler of kernels takes
    such a source. Lines stay where they are."""
    for fault in sorted(faults, key=lambda fault: -fault.place.begin):  # from the end, so that places stay
        if not fault.file.endswith(".py"):
            continue
        source, (_, begin, end, _, statement) = (folder / fault.file).read_text(encoding="utf-8"), fault.place
        right, call = source[begin:end], f"{REACHED}({fault.number})"
        place = f"{call}; {right}" if statement else f"({call} or ({right}))"
        with contextlib.suppress(SyntaxError):
            ast.parse(new := source[:begin] + place + source[end:])
            (folder / fault.file).write_text(new, encoding="utf-8")
    (folder / "objkern/_reached.py").write_text(OUTSIDE, encoding="utf-8")
    first, source = folder / "objkern/__init__.py", (folder / "objkern/__init__.py").read_text(encoding="utf-8")
    module = ast.parse(source)
    place = next(s for s in module.body if not isinstance(s, ast.Expr) and getattr(s, "module", "") != "__future__")
    lines = source.splitlines(keepends=True)
    lines[place.lineno - 1] = f"from . import _reached; {lines[place.lineno - 1]}"
    first.write_text("".join(lines), encoding="utf-8")
    return folder


def split(arguments: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The settings of the environment, and what pytest is given."""
    count = sum(re.match(r"[A-Z_]+=", argument) is not None for argument in arguments)
    return arguments[:count], arguments[count:]


@functools.cache
def _sources() -> bytes:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    of_interest = [ROOT / name for name in names if name.startswith(("csrc/", "objkern/", "tests/"))]
    return b"".join(path.read_bytes() for path in of_interest if path.exists())


def fingerprint(what: str) -> str:
    """Of it and of the sources and tests."""
    return hashlib.sha256(_sources() + what.encode()).hexdigest()[:24]


def copy_of_package(folder: Path, native: bool = True) -> Path:
    """Everything that tests read, and with `native` the library that was built."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):
        if (ROOT / name).exists() and not name.startswith(("benchmarks/results/", "csrc/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for library in (ROOT / "objkern").glob("*.so") if native else ():
        link = folder / "objkern" / library.name
        link.unlink(missing_ok=True)
        link.symlink_to(library)
    return folder


def shares(count: int, names: Sequence[str]) -> dict[str, int]:
    return {name: count // len(names) + (k < count % len(names)) for k, name in enumerate(names)}


def examine(
    rooms: Mapping[str, int], seed: int, only: set[int] | None = None, out: Path | None = None, verbose: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """So many faults of each room; what became of each. `out`: a file that says so too; those in it are not run again."""
    known = [json.loads(line) for line in out.read_text().splitlines()] if out and out.exists() else []
    done = {tuple(each[name] for name in KEY): each for each in known}
    work: list[tuple[Path | None, Fault]] = []
    for k, (name, count) in enumerate(rooms.items()):
        faults = draw(name, seed, 1000 * k + 1)
        if name in ("cpu", "cuda"):
            folder, chosen = planted(name, faults, count)
            copy_of_package(folder, native=False)
            work += [(folder, fault) for fault in chosen]
        else:
            work += [(None, fault) for fault in itertools.islice(faults, count)]
    every = [fault for _, fault in work]
    keys = {fault.number: fault.key((ROOT / fault.file).read_text(encoding="utf-8")) for fault in every}
    before = [done[key] for key in keys.values() if key in done]
    if known and not before:
        raise SystemExit(f"{out} is of another draw, or of other sources")
    work = [each for each in work if (only is None or each[1].number in only) and keys[each[1].number] not in done]
    work.sort(key=lambda each: each[1].number % 1000)  # rooms take turns: a draw that is stopped says something of each
    KEPT.mkdir(parents=True, exist_ok=True)
    runner, found = Runner(every, verbose), []
    own = threading.local()
    with tempfile.TemporaryDirectory() as parent, ThreadPoolExecutor(2) as pool:

        def one(folder: Path | None, fault: Fault) -> dict[str, Any]:
            if folder is None:
                if not hasattr(own, "folder"):
                    own.folder = copy_of_package(Path(tempfile.mkdtemp(dir=parent)))
                folder = own.folder
            return runner.run(folder, fault)

        try:
            for ended in as_completed([pool.submit(one, *each) for each in work]):
                found.append(ended.result())
                print(line_of(found[-1]), flush=True)
                if out:
                    with out.open("a") as file:
                        file.write(json.dumps(found[-1]) + "\n")
        finally:
            pool.shutdown(cancel_futures=True)
            runner.close()
    return before + found


def line_of(found: Mapping[str, Any]) -> str:
    mark = "       " if found["outcome"] == "caught" else "SURVIVED"
    return (
        f"{found['number']:5} {mark} {found['seconds']:6.1f} s {found['file']}:{found['line']} {found['kind']}: "
        f"{found['right'][:60]!r} -> {found['wrong'][:60]!r}  {found['by'].split('::')[-1][:60]}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description="Draw faults and see them caught.")
    parser.add_argument("--count", type=int, default=40, help="how many in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rooms", default=",".join(ROOMS), help="of these (default: %(default)s)")
    parser.add_argument("--only", help="numbers, with commas, of the faults to run")
    parser.add_argument("--out", type=Path, help="a file of what became of each; those in it are not run again")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    only = set(map(int, options.only.split(","))) if options.only else None
    rooms = shares(options.count, options.rooms.split(","))
    found = examine(rooms, options.seed, only, options.out, options.verbose)
    caught = sum(each["outcome"] == "caught" for each in found)
    print(f"{caught} of {len(found)} faults were caught ({100 * caught / max(1, len(found)):.1f} %)")
    return 0 if caught >= 0.97 * len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
