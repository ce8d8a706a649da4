"""Writes docs/guarantees.md: what objkern guarantees, the tests that hold it, and the last figures of the long ones.

    python docs/guarantees.py           # write the page
    python docs/guarantees.py --check   # exit 1 if it is stale

A test says by the numbers at the beginning of its docstring which guarantees it holds; the figures are those of
`make trust`, in tests/results/.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = Path(__file__).with_suffix(".md")
RESULTS = ROOT / "tests" / "results"

# Each is the answer to a bug that shipped in a fused loss somewhere.
GUARANTEES = {
    1: "What you pass in is never written to: another loss on the same logits sees what you gave.",
    2: "A graph can be gone through any number of times, each time with an upstream gradient of its own.",
    3: 'Under `reduction="none"` each row has its own upstream gradient.',
    4: "An upstream gradient may be anything: nothing is tried with 1 alone.",
    5: "The gradient of the target is not the rounded p minus 1: rows that are almost certain keep its digits.",
    6: "Neither loss nor gradient vanishes where the model is sure: margins of 5 to 80 keep their relative precision.",
    7: "A number that all logits have in common changes nothing, up to 10⁷ in float32.",
    8: "The gradient of a weight does not depend on how many chunks it is added up from, nor lose digits by them.",
    9: "Half-precision logits have a float32 loss; the drop-ins return torch's dtype, and say so.",
    10: "More than 2³¹ and 2³² logits are as right in their last rows as in their first.",
    11: "Any strides: transposed, sliced and expanded logits, and expanded upstream gradients.",
    12: "All rows ignored: a stated value, a gradient of zeros, a graph that goes through, on one rank and on all.",
    13: "A label out of range reads no memory and is an error that names it; where nobody asked, its row is NaN.",
    14: "`ignore_index` may be a class, a padded column or anything else.",
    15: "What pads a row counts for nothing, however negative the logits.",
    16: "A logit of −inf excludes its class: no NaN comes of it, wherever in the row the finite ones are.",
    17: "Means divide by the rows that count.",
    18: "`torch.compile` gives eager's numbers in one graph, ignored labels and all.",
    19: "Under autocast every combination of dtypes of hidden states, weight and bias does what autocast says.",
    20: "A call never makes the host wait for the device, and a CUDA graph can capture it.",
    21: "Kernels run where their tensors are, in the stream that is current.",
    22: "A head that FSDP shards is read while it is gathered, trained, frozen or tied; else it is an error.",
    23: "Whatever of the last layer trains has its gradient, LoRA too; what does not has none, and no memory for it.",
    24: "Batches, accumulation and ranks do not change a step's gradient: it is that of one big batch.",
    25: "A vocabulary that is split among ranks has the loss and gradients of a whole one, for every term.",
    26: "Statistics of rows are those of a whole vocabulary where it is split; so is what users make of them.",
    27: "Reported parts are detached and true; what is to be differentiated comes from `row_statistics`.",
    28: "A run that is interrupted, or killed, goes on as if nothing had been; ranks stop together or not at all.",
    29: "Errors against float64 are at most twice torch's in the same dtype, by norm and in the worst row.",
    30: "The same call gives the same bits, in every run, whatever else has run before.",
}


def numbered(docstring: str) -> list[int]:
    """The numbers that a docstring begins with: "24: ...", "3 and 4: ...", "25, and 20: ...", "12 (of ranks): ..."."""
    found = re.match(r"(\d+(?:(?:, and | and |, )\d+)*)(?: \([^)]*\))?[:,;]", docstring)
    return [int(number) for number in re.findall(r"\d+", found[1])] if found else []


def tests() -> dict[int, list[tuple[str, str]]]:
    """By number: (file, test)."""
    found: dict[int, list[tuple[str, str]]] = {number: [] for number in GUARANTEES}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for number in numbered(ast.get_docstring(node) or ""):
                    found[number].append((str(path.relative_to(ROOT)), node.name))
    return found


def page() -> str:
    lines = [
        "# Guarantees", "",
        "What objkern promises, and the tests that hold it to it. Each guarantee is the answer to a bug that shipped",
        "in a fused loss somewhere; a test names by number those that it holds. Tests in `tests/gpu` run on devices;",
        "[gpu-status.md](gpu-status.md) says which have. `make test` and `make test-slow` run all but the long ones,",
        "which `make trust` runs; this page is written by `make docs`.", "",
    ]  # fmt: skip
    of_numbers = tests()
    missing = [number for number, found in of_numbers.items() if not found]
    if missing:
        raise SystemExit(f"guarantees without a test: {missing}")
    for number, text in GUARANTEES.items():
        lines += [f"**{number}.** {text}", ""]
        by_file: dict[str, list[str]] = {}
        for file, test in of_numbers[number]:
            by_file.setdefault(file, []).append(test)
        lines += [f"- [{file}](../{file}): {', '.join(f'`{t}`' for t in names)}" for file, names in by_file.items()]
        lines += [""]
    return "\n".join([*lines, *long_ones()]) + "\n"


def long_ones() -> list[str]:
    """The last run of each of the long tests."""
    last: dict[str, tuple[dict[str, Any], str]] = {}
    for path in sorted(RESULTS.glob("trust-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        last |= {test["name"]: (test, path.name) for test in result["tests"]}
    lines = ["## The long ones", ""]
    if not last:
        return [*lines, "None has been recorded yet."]
    lines += ["| test | outcome | figures | minutes | file |", "| --- | --- | --- | --- | --- |"]
    for name, (test, file) in sorted(last.items()):
        figures = "; ".join(f"{key}: {value}" for key, value in test["figures"].items())
        lines.append(
            f"| `{name}` | {test['outcome']} | {figures} | {test['seconds'] / 60:.1f} | "
            f"[{file}](../tests/results/{file}) |"
        )
    return lines


def problems() -> list[str]:
    current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    return [] if current == page() else [f"{PAGE} is stale: run python docs/guarantees.py"]


def main() -> int:
    found = argparse.ArgumentParser(description="Write docs/guarantees.md.")
    found.add_argument("--check", action="store_true", help="exit 1 if it is stale")
    if found.parse_args().check:
        print("\n".join(wrong := problems()))
        return 1 if wrong else 0
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
