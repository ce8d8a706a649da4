"""Faults planted in the C++ sources, all of them in one build and asleep: the environment wakes one.

A test that passes although a kernel is wrong is no test. Building every wrong kernel by itself would take most of an
hour, so each place reads `planted(n) ? wrong : right`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
VARIABLE = "OBJKERN_PLANTED_FAULT"
REACHED, MOST = "objkern_reached", 1 << 13
_SWITCH = f"""#pragma once
#include <cstdlib>
namespace objkern {{
inline const int planted_fault = [] {{
  const char* const number = std::getenv("{VARIABLE}");
  return number == nullptr ? 0 : std::atoi(number);
}}();
// A negative number wakes none: then it is kept which places are reached.
extern "C" {{
inline __attribute__((visibility("default"), used)) unsigned char {REACHED}[{MOST}];
}}
inline bool planted(int number) {{
  if (planted_fault < 0) [[unlikely]] {REACHED}[number] = 1;
  return planted_fault == number;
}}
}}  // namespace objkern
"""


class Span(NamedTuple):
    """source[begin:end] of a file in csrc, and what stands there wrong."""

    file: str
    begin: int
    end: int
    wrong: str
    statement: bool


class Replacement(NamedTuple):
    """What stands wrong. `text` occurs once in the file; what it says between ⟦ and ⟧ (all of it, without them) is
    replaced: statements if it ends in a semicolon or is empty, an expression otherwise."""

    file: str
    text: str
    wrong: str


def plant(csrc: Path, faults: Iterable[Iterable[Replacement]]) -> None:
    """Write a copy of the C++ sources to `csrc`, with fault n (from 1 on) planted. Files that stay as they are keep
    their date."""
    sources = _sources()
    changed: set[Path] = set()
    for number, replacements in enumerate(faults, 1):
        for file, text, wrong in replacements:
            before, right, after = _parts(text)
            source, context = sources[Path(file)], before + right + after
            # Other faults may have been planted between the same words.
            found = source.count(context)
            if found != 1:
                raise AssertionError(f"{context!r} stands {found} times in {file}")
            statement = not right.strip() or right.rstrip().endswith((";", "}"))
            sources[Path(file)] = source.replace(context, before + _switch(number, right, wrong, statement) + after)
            changed.add(Path(file))
    _write(csrc, sources, changed)


def plant_spans(csrc: Path, spans: Mapping[int, Span]) -> None:
    """The same, of places that do not overlap, by number. Lines stay where they are."""
    sources = _sources()
    for number, (file, begin, end, wrong, statement) in sorted(spans.items(), key=lambda item: -item[1].begin):
        text = sources[Path(file)]
        place = _switch(number, text[begin:end], wrong, statement).replace("{\n", "{ ").replace("\n}", " }")
        sources[Path(file)] = text[:begin] + place.removesuffix("\n") + text[end:]
    _write(csrc, sources, {Path(span.file) for span in spans.values()})


def _switch(number: int, right: str, wrong: str, statement: bool) -> str:
    if statement:
        return f"if (!planted({number})) {{\n{right}\n}} else {{\n{wrong}\n}}\n"
    return f"(planted({number}) ? ({wrong}) : ({right}))"


def _sources() -> dict[Path, str]:
    return {path.relative_to(ROOT / "csrc"): path.read_text() for path in sorted((ROOT / "csrc").rglob("*.*"))}


def _write(csrc: Path, sources: dict[Path, str], changed: set[Path]) -> None:
    for name in changed:
        sources[name] = '#include "planted.h"\n#line 1\n' + sources[name]
    sources[Path("planted.h")] = _SWITCH
    for name, text in sources.items():
        path = csrc / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    for path in csrc.rglob("*.*"):
        if path.relative_to(csrc) not in sources:
            path.unlink()


def _parts(text: str) -> tuple[str, str, str]:
    if "⟦" not in text:
        return "", text, ""
    before, rest = text.split("⟦")
    right, after = rest.split("⟧")
    return before, right, after


def copy_python(folder: Path) -> None:
    """The package and its tests, without what was built."""
    for name in ("objkern", "tests"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored, dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", folder)
