"""libFuzzer on `objkern.parse`: python -m tests.fuzz_parse [libFuzzer's options] CORPUS_FOLDER

Needs `pip install atheris`. What it finds wrong it writes to a file, and goes on from there with the file as argument.
"""

from __future__ import annotations

import sys
from pathlib import Path

import objkern

SEEDS = (
    "CrossEntropy(label_smoothing=0.1) + 1e-4*ZLoss() - 0.01*Entropy()", "Focal(2.0)*0.5", "-2*(Margin(m=0.35) - 3*LogitL2())",
    "KLDivergence('reverse', temperature=2.0)", "BinaryCrossEntropy(label_smoothing=0.2) + .5*Huber(delta=1)",
    "GeneralizedCrossEntropy(q=0.7) + Poly1(epsilon=-1.0) - MaxZLoss() + Unlikelihood()",
)  # fmt: skip


def check(text: str) -> objkern.Objective | None:
    """An objective that reads back as itself, or an error in the parser's own words."""
    try:
        objective = objkern.parse(text)
    except ValueError as error:
        if not str(error).startswith(("objective: ", "coefficient: expected a finite number")):
            raise AssertionError(f"{text[:200]!r}: {error}") from error
        return None
    again = objkern.parse(repr(objective))
    if repr(again) != repr(objective):
        raise AssertionError(f"{text[:200]!r}: {objective!r} reads back as {again!r}")
    return objective


def one_input(data: bytes) -> None:
    check(data.decode("utf-8", "surrogateescape"))


def main() -> None:
    import atheris

    reader = sys.modules["objkern.parser"]._Reader
    for name, method in list(vars(reader).items()):
        if callable(method):
            setattr(reader, name, atheris.instrument_func(method))  # what is looked for is new branches of these
    corpus = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("-")]
    for folder in corpus:
        if folder.is_dir():
            for number, text in enumerate(SEEDS):
                (folder / f"seed{number}").write_text(text, encoding="utf-8")
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
