"""Fine-tune a token classifier from start to end: files, lines and functions in the words of error reports.

    python examples/finetune/token_classification.py

The reports are made up from names in the standard library. For your own: a line of data has "words" and "tags",
`python -m objkern finetune token-classification train.jsonl --model bert-base-cased`.
"""

import random
import sys
import sysconfig
import tempfile
from pathlib import Path

from objkern.finetune.run import RunOptions, run
from objkern.finetune.small import SmallModel
from objkern.finetune.training import TrainingOptions

OBJECTIVE = "Focal(gamma=1.0) + 1e-4*ZLoss()"
FORMS = (
    "{file} fails in {function} at line {line}",
    "line {line} of {file} calls {function} twice",
    "after {number} tries {function} gave up , see {file} line {line}",
    "{function} in {file} , line {line} , took {number} seconds",
    "in line {line} {function} reads {number} bytes of {file}",
)


def rows(count: int, seed: int = 0) -> list[dict]:
    chance = random.Random(seed)
    files = sorted(path.name for path in Path(sysconfig.get_path("stdlib")).glob("*.py"))
    functions = sorted({name.removesuffix(".py") for name in files} | set(dir(str)) | set(dir(dict)))
    found = []
    for _ in range(count):
        words, tags = [], []
        for piece in chance.choice(FORMS).split():
            kind = piece.strip("{}")
            number = str(chance.randrange(1, 999))
            value = {"file": chance.choice(files), "function": chance.choice(functions) + " ( )",
                     "line": number, "number": number}.get(kind, piece)  # fmt: skip
            for place, word in enumerate(value.split()):
                words.append(word)
                entity = piece.startswith("{") and kind != "number"
                tags.append(f"{'I' if place else 'B'}-{kind}" if entity else "O")
        found.append({"words": words, "tags": tags})
    return found


def main() -> dict:
    splits = {"train": rows(300), "dev": rows(60, 1), "test": rows(60, 2)}
    with tempfile.TemporaryDirectory() as folder:
        result = run(
            RunOptions(
                task="token-classification", train="reports", output=Path([*sys.argv[1:], folder][0]),
                objective=OBJECTIVE, max_length=64, new_model=SmallModel(hidden_size=64, layers=2, heads=2),
                training=TrainingOptions(epochs=8, batch_size=16, learning_rate=3e-3),
            ),
            splits=splits,
        )  # fmt: skip
    before, after = result["untrained"]["f1"], result["test"]["f1"]
    print(f"{len(splits['train'])} rows: F1 of whole entities {before:.3f} untrained, {after:.3f} trained")
    assert after > before + 0.6, "it should have learned more"
    return result


if __name__ == "__main__":
    main()
