"""Fine-tune a model that answers questions with a span of a text: what, where and when in short reports.

    python examples/finetune/question_answering.py

A question, a context and where the answer stands in it, as SQuAD has them; some questions have no answer. For your own:
`python -m objkern finetune question-answering squad --model bert-base-uncased`.
"""

import calendar
import keyword
import random
import sys
import tempfile
from pathlib import Path

from objkern.finetune.run import RunOptions, run
from objkern.finetune.small import SmallModel
from objkern.finetune.training import TrainingOptions

OBJECTIVE = "CrossEntropy(label_smoothing=0.05)"
QUESTIONS = {"day": "when ?", "place": "where ?", "word": "what ?"}
PARTS = {"day": "on {}", "place": "in {}", "word": "about {}"}
PLACES = ["Basel", "Berlin", "Bilbao", "Dublin", "Florence", "Lyon", "Oslo", "Portland", "Prague", "Rimini", "Vilnius"]


def rows(count: int, seed: int = 0) -> list[dict]:
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        values = {"day": f"{chance.choice(list(calendar.month_name)[1:])} {chance.randrange(1, 29)}",
                  "place": chance.choice(PLACES), "word": chance.choice(keyword.kwlist)}  # fmt: skip
        named = chance.sample(list(PARTS), chance.choice((2, 3)))
        context = "they talk " + " ".join(PARTS[kind].format(values[kind]) for kind in named)
        asked = chance.choice(list(QUESTIONS))
        answer = PARTS[asked].format(values[asked])
        start = context.find(answer) + len(answer) - len(values[asked])
        there = asked in named
        answers = {"text": [values[asked]] if there else [], "answer_start": [start] if there else []}
        found.append({"question": QUESTIONS[asked], "context": context, "answers": answers})
    return found


def main() -> dict:
    splits = {"train": rows(800), "dev": rows(80, 1), "test": rows(80, 2)}
    with tempfile.TemporaryDirectory() as folder:
        result = run(
            RunOptions(
                task="question-answering", train="reports", output=Path([*sys.argv[1:], folder][0]),
                objective=OBJECTIVE, max_length=48,
                new_model=SmallModel(hidden_size=64, layers=2, heads=2, dropout=0.0),
                training=TrainingOptions(epochs=8, batch_size=16, learning_rate=3e-3),
            ),
            splits=splits,
        )  # fmt: skip
    before, after = result["untrained"]["f1"], result["test"]["f1"]
    print(f"{len(splits['train'])} rows: F1 of the answers' words {before:.3f} untrained, {after:.3f} trained")
    assert after > before + 0.3, "it should have learned more"
    return result


if __name__ == "__main__":
    main()
