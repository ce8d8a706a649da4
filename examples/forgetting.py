"""What a model forgets while it learns something else, and what keeps it: L2-SP, EWC, a KL divergence to its old self.

    python examples/forgetting.py

A small BERT learns which of the words of a sentence are animals (task A: tags A0 and A1). Then it learns which of the
same words are blue (task B: tags B0 and B1). Nothing of A is seen during B, and without a penalty A is gone. Of seeds 0
to 5 the KL divergence keeps all of it, L2-SP 92 to 100 %, and EWC, whose quadratic hardly holds for steps this large,
between 56 and 99 %, where nothing keeps 34 to 49 %, which is chance; B is learned in every case. Words are numbers here
and nothing is downloaded; `objkern.finetune.retention` is the same for your own model and task.
"""

import copy
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

from objkern import CrossEntropy, Objective
from objkern.finetune import retention
from objkern.finetune.tasks import Evaluation
from objkern.finetune.tasks.token_classification import TokenClassification
from objkern.finetune.training import TrainingOptions, train

WORDS, LENGTH, TAGS = 60, 10, ["A0", "A1", "B0", "B1"]
PENALTIES = {"nothing": None, "l2sp": "l2sp:0.1", "ewc": "ewc:3000", "kl": "kl:1"}


def a_task() -> TokenClassification:
    vocabulary = {"<pad>": 0, "<unk>": 1} | {f"w{k}": k + 2 for k in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", model_max_length=LENGTH)
    return TokenClassification(fast, labels=TAGS)


def rows_of(letter: str, kinds: torch.Tensor, count: int, generator: torch.Generator) -> list[dict]:
    """Sentences of `count` × `LENGTH` words; the tag of a word is its kind."""
    words = torch.randint(WORDS, (count, LENGTH), generator=generator)
    tags = kinds[words]
    return [
        {"words": [f"w{w}" for w in some], "tags": [f"{letter}{y}" for y in of_them]}
        for some, of_them in zip(words.tolist(), tags.tolist(), strict=True)
    ]


@torch.no_grad()
def accuracy(model: BertForTokenClassification, task: TokenClassification, rows: list[dict]) -> float:
    """Between the two tags of the rows' task."""
    batch = task.collate(task.examples(rows))
    first = TAGS.index(rows[0]["tags"][0][0] + "0")
    model.eval()
    best = model(**batch.inputs).logits[..., first : first + 2].argmax(-1) + first
    return (best == batch.target).float().mean().item()


def learn(
    model: BertForTokenClassification, task: TokenClassification, rows: list[dict], objective: Objective,
    learning_rate: float, reference: BertForTokenClassification | None = None,
) -> None:  # fmt: skip
    options = TrainingOptions(epochs=1, batch_size=16, learning_rate=learning_rate, weight_decay=0.0)
    with tempfile.TemporaryDirectory() as folder:
        train(model, task, task.examples(rows), lambda: Evaluation({"accuracy": 0.0}), objective, options, Path(folder),
              reference=reference)  # fmt: skip


def main(seed: int = 0) -> dict[str, tuple[float, float]]:
    """Accuracy on A and on B after B, by what kept A."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    task = a_task()
    (train_a, test_a), (train_b, test_b) = (
        [rows_of(letter, kinds, count, generator) for count in (960, 100)]
        for letter, kinds in (("A", torch.randperm(WORDS, generator=generator) % 2),
                              ("B", torch.randperm(WORDS, generator=generator) % 2))
    )  # fmt: skip
    config = BertConfig(vocab_size=WORDS + 2, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=LENGTH, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0, **task.model_options())  # fmt: skip
    start = BertForTokenClassification(config)
    # Smoothed: a model that is certain of every tag has no gradients left, and no Fisher information to find.
    learn(start, task, train_a, CrossEntropy(label_smoothing=0.1), 5e-3)
    print(f"{'kept by':10} {'A':>6} {'B':>6}\n{'(before)':10} {accuracy(start, task, test_a):6.3f}")
    found = {}
    for name, spec in PENALTIES.items():
        model, objective, reference = copy.deepcopy(start), CrossEntropy(), None
        if spec is not None:
            objective, reference = retention.apply(spec, objective, model, task, task.examples(train_a[:100]), 20)
        learn(model, task, train_b, objective, 1e-2, reference)
        found[name] = accuracy(model, task, test_a), accuracy(model, task, test_b)
        print(f"{spec or name:10} {found[name][0]:6.3f} {found[name][1]:6.3f}")
    before = found["nothing"][0]
    assert before < 0.6, "nothing was forgotten: there is nothing to be shown"
    assert found["kl"][0] > 0.95
    assert found["l2sp"][0] > 0.85
    assert found["ewc"][0] > before + 0.05
    assert min(b for _, b in found.values()) > 0.95, "what keeps A must leave B"
    return found


if __name__ == "__main__":
    main()
