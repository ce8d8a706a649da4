"""A step's own end: its options, and the entries that it hands over one by one, so that a time limit loses none."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..results import rounded

if TYPE_CHECKING:
    from .device import Device

Entry = dict[str, Any]


@dataclass
class Step:
    lines: Path | None  # a JSON entry a line
    stand_in: bool  # a dry run on the CPU, in the place of a CUDA device
    quick: bool
    seconds: float  # to aim at
    began: float = field(default_factory=monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (monotonic() - self.began)

    def record(self, entry: Entry) -> None:
        line = json.dumps(rounded(entry), separators=(",", ":"))
        print(line, flush=True)
        if self.lines is not None:
            with self.lines.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def device(self) -> Device:
        from .device import Cuda, StandIn

        return StandIn() if self.stand_in else Cuda()


def parse(argv: list[str] | None = None) -> Step:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lines", type=Path, help="append the results to this file, a JSON entry a line")
    parser.add_argument("--stand-in", action="store_true", help="a dry run on the CPU")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repetitions")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to take, about (%(default)s)")
    return Step(**vars(parser.parse_args(argv)))


def main(run: Callable[[Step], int | None]) -> None:
    raise SystemExit(run(parse()) or 0)
