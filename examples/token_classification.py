"""Fine-tune a token classifier with a fused objective, in your own loop: the few lines that matter.

    python examples/token_classification.py

The model is a small BERT built from a config and the sentences are made up, so that nothing is downloaded; put your
own model and batches in their place. `python -m objkern.finetune.demo` is the whole story on real text.
"""

import torch
from transformers import BertConfig, BertForTokenClassification

from objkern import CrossEntropy, Entropy, ZLoss

TAGS, VOCABULARY, IGNORED = 3, 50, -100


def batch(generator: torch.Generator, sentences: int = 16, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Words below 10 are entities, with the word that follows; the second half of a sentence does not count."""
    words = torch.randint(0, VOCABULARY, (sentences, length), generator=generator)
    begins = words < 10
    tags = torch.where(begins, 1, torch.where(begins.roll(1, dims=1), 2, 0))
    tags[:, length // 2 :] = IGNORED
    return words, tags


def main() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=16, num_labels=TAGS,
    )  # fmt: skip
    model = BertForTokenClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    objective = CrossEntropy(label_smoothing=0.1) + 1e-4 * ZLoss() - 0.01 * Entropy()
    print(objective)
    for step in range(1, 201):
        words, tags = batch(generator)
        loss, parts = objective(model(words).logits, tags, return_parts=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: " + ", ".join(f"{name} {value.item():.4f}" for name, value in parts.items()))
    assert parts["accuracy"] > 0.95, "the task is easy: something is wrong"


if __name__ == "__main__":
    main()
