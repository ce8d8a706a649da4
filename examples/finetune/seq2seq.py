"""Fine-tune a model that writes a text from a text: dates as people write them, to dates as machines do.

    python examples/finetune/seq2seq.py

"the 3rd of May 1998" becomes "1998-05-03". The objective is attached to the model's head, so that no logits are
materialised. For your own: `python -m objkern finetune seq2seq pairs.jsonl --model t5-small`.
"""

import calendar
import random
import sys
import tempfile
from pathlib import Path

from objkern.finetune.run import RunOptions, run
from objkern.finetune.small import SmallModel
from objkern.finetune.training import TrainingOptions

OBJECTIVE = "CrossEntropy(label_smoothing=0.05) + 1e-4*ZLoss()"
FORMS = ("the {day} of {month} {year}", "{month} {day} , {year}", "{year} , {day} {month}")


def rows(count: int, seed: int = 0) -> list[dict]:
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        year, month, day = chance.randrange(1990, 2010), chance.randrange(1, 13), chance.randrange(1, 29)
        source = chance.choice(FORMS).format(year=year, month=calendar.month_name[month], day=day)
        found.append({"source": source, "target": f"{year}-{month:02}-{day:02}"})
    return found


def main() -> dict:
    splits = {"train": rows(1000), "dev": rows(50, 1), "test": rows(50, 2)}
    with tempfile.TemporaryDirectory() as folder:
        result = run(
            RunOptions(
                task="seq2seq", train="dates", output=Path([*sys.argv[1:], folder][0]),
                objective=OBJECTIVE, max_length=32,
                new_model=SmallModel(hidden_size=64, layers=2, heads=2, dropout=0.0, vocabulary=400),
                training=TrainingOptions(epochs=8, batch_size=16, learning_rate=3e-3),
            ),
            splits=splits,
        )  # fmt: skip
    before, after = result["untrained"]["chrf"], result["test"]["chrf"]
    print(f"{len(splits['train'])} rows: chrF {before:.1f} untrained, {after:.1f} trained")
    assert after > before + 30, "it should have learned more"
    return result


if __name__ == "__main__":
    main()
