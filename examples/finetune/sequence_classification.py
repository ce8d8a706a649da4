"""Fine-tune a sequence classifier from start to end: which module of the standard library does a docstring belong to?

    python examples/finetune/sequence_classification.py

Everything is made here: rows from Python's own docstrings, a small model from scratch. For your own, name a file and a
model: `python -m objkern finetune sequence-classification train.jsonl --model bert-base-uncased`.
"""

import importlib
import inspect
import random
import re
import sys
import tempfile
import types
from pathlib import Path

from objkern.finetune.run import RunOptions, run
from objkern.finetune.small import SmallModel
from objkern.finetune.training import TrainingOptions

MODULES = {"asyncio": "asyncio", "decimal": "_pydecimal", "email": "email.message", "logging": "logging",
           "pathlib": "pathlib", "turtle": "turtle", "unittest": "unittest.case"}  # fmt: skip
OBJECTIVE = "CrossEntropy(label_smoothing=0.1) - 0.01*Entropy() + 1e-4*ZLoss()"


def rows() -> list[dict]:
    """Sentences of docstrings of functions and methods, labelled by their module; none twice."""
    found = {}
    for label, name in MODULES.items():
        if name == "turtle":  # which would open a window's library
            text = Path(importlib.util.find_spec("turtle").origin).read_text(encoding="utf-8")
            docs = re.findall(r'"""(.+?)"""', text, re.DOTALL)
        else:
            module = importlib.import_module(name)
            things = vars(module).values()
            docs = [inspect.getdoc(part) or "" for thing in things if isinstance(thing, type | types.FunctionType)
                    for part in (thing, *vars(thing).values())]  # fmt: skip
        for doc in docs:
            for sentence in re.split(r"(?<=[.:])\s+|\n\n", doc):
                words = " ".join(sentence.split())
                if len(words.split()) >= 6:
                    found.setdefault(words[:300], label)
    return sorted(({"text": text, "label": label} for text, label in found.items()), key=lambda row: row["text"])


def main() -> dict:
    everything = rows()
    random.Random(0).shuffle(everything)
    fifth = len(everything) // 5
    splits = {"test": everything[:fifth], "dev": everything[fifth : 2 * fifth], "train": everything[2 * fifth :]}
    with tempfile.TemporaryDirectory() as folder:
        result = run(
            RunOptions(
                task="sequence-classification", train="docstrings", output=Path([*sys.argv[1:], folder][0]),
                objective=OBJECTIVE, max_length=48, new_model=SmallModel(hidden_size=64, layers=2, heads=2),
                training=TrainingOptions(epochs=5, batch_size=16, learning_rate=2e-3),
            ),
            splits=splits,
        )  # fmt: skip
    before, after = result["untrained"]["accuracy"], result["test"]["accuracy"]
    print(f"{len(splits['train'])} rows: accuracy on the test rows {before:.3f} untrained, {after:.3f} trained")
    assert after > before + 0.3, "it should have learned more"
    return result


if __name__ == "__main__":
    main()
