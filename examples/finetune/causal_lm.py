"""Fine-tune a language model from start to end: chats in which the assistant says what a built-in function is for.

    python examples/finetune/causal_lm.py

Only the assistant's turns count; several chats share a sequence. The logits are never materialised: the objective is
attached to the model's head. For your own: `python -m objkern finetune causal-lm chats.jsonl --model NAME --pack`.
"""

import builtins
import importlib
import inspect
import random
import sys
import tempfile
from pathlib import Path

from objkern.finetune.run import RunOptions, run
from objkern.finetune.small import SmallModel
from objkern.finetune.training import TrainingOptions

OBJECTIVE = "CrossEntropy() + 1e-4*ZLoss()"


def rows() -> list[dict]:
    found = {}
    names = ("os", "string", "shutil", "statistics", "random", "decimal")
    for module in (builtins, *map(importlib.import_module, names)):
        for holder in (module, *(x for x in vars(module).values() if inspect.isclass(x))):
            for name, thing in vars(holder).items():
                doc = (inspect.getdoc(thing) or "").partition("\n\n")[0]
                if callable(thing) and not name.startswith("_") and len(doc.split()) >= 4:
                    found.setdefault(" ".join(doc.split())[:200], name)
    return [
        {"messages": [{"role": "user", "content": f"What does {name} do?"}, {"role": "assistant", "content": doc}]}
        for doc, name in sorted(found.items())
    ]


def main() -> dict:
    everything = rows()
    random.Random(0).shuffle(everything)
    tenth = len(everything) // 10
    splits = {"dev": everything[:tenth], "train": everything[tenth:]}
    with tempfile.TemporaryDirectory() as folder:
        result = run(
            RunOptions(
                task="causal-lm", train="docstrings", output=Path([*sys.argv[1:], folder][0]),
                objective=OBJECTIVE, max_length=128, pack=True,
                new_model=SmallModel(hidden_size=96, layers=2, heads=2, vocabulary=1000),
                training=TrainingOptions(epochs=8, batch_size=4, learning_rate=3e-3, patience=8),
            ),
            splits=splits,
        )  # fmt: skip
    before, after = result["untrained"]["perplexity"], result["dev"]["perplexity"]
    print(f"{len(splits['train'])} chats: perplexity of a token {before:.0f} untrained, {after:.1f} trained")
    assert after < before / 5, "it should have learned more"
    return result


if __name__ == "__main__":
    main()
