"""Token classification with transformers: tokenizer, batches, model, predictions.

Shapes: B sentences, T sub-words (the longest sentence of the batch), V tags.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .config import FinetuneConfig
from .corpus import TAGS, Sentence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One encoded sentence. `labels[t]` is a tag's number where sub-word t begins a word, IGNORED elsewhere."""

    input_ids: list[int]
    labels: list[int]
    word_starts: list[tuple[int, int]]  # (word, t) of the words that are in; truncation leaves the last ones out


def train_tokenizer(sentences: Iterable[Sentence], size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer with BERT's special tokens, learned from these sentences. Case is kept: True isn't true."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    texts = [" ".join(sentence.words) for sentence in sentences]
    # Every letter is given in advance, first and inner (##). Otherwise a letter that training never saw in its place
    # would make the whole word unknown; and the vocabulary would differ from process to process, because among equally
    # frequent pairs the trainer prefers the lower numbers, and it numbers the letters as a hash table brings them.
    letters = sorted({*string.ascii_letters, *string.digits, *string.punctuation, *"".join(texts)} - {" "})
    given = special + letters + [f"##{letter}" for letter in letters]
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    learner.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=given, show_progress=False)
    )
    tokenizer = Tokenizer(models.WordPiece(learner.get_vocab(), unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{token.strip('[]').lower()}_token": token for token in special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **names)


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a pretrained model or of a folder; raises a ValueError for one that can't be used."""
    from transformers import AutoTokenizer

    if (Path(name).is_absolute() or name.startswith(".")) and not Path(name).is_dir():
        raise ValueError(f"model folder {name!r} does not exist")
    try:
        # RoBERTa and GPT-2 need the prefix space for words that come already cut; the others ignore it.
        tokenizer = AutoTokenizer.from_pretrained(name, add_prefix_space=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer can be loaded from model {name!r}: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"model {name!r} has no fast tokenizer, which is what tells the words of its sub-words")
    return tokenizer


def build_model(config: FinetuneConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The pretrained model with a new head for our tags, or a small BERT from scratch, seeded by torch."""
    from transformers import AutoModelForTokenClassification, ModernBertConfig

    names = {"id2label": dict(enumerate(TAGS)), "label2id": {tag: number for number, tag in enumerate(TAGS)}}
    if config.model is not None:
        try:
            return AutoModelForTokenClassification.from_pretrained(
                config.model, num_labels=len(TAGS), ignore_mismatched_sizes=True, **names
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"model {config.model!r} can't be loaded: {_first_line(error)}") from error
    # ModernBERT, because some 1,400 entities have to teach the model what "the word before" means: its rotary positions
    # and local windows reach a test F1 of 50, the first BERT's absolute positions 32 in as many steps.
    return AutoModelForTokenClassification.from_config(
        ModernBertConfig(
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id,
            cls_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            sep_token_id=tokenizer.sep_token_id,
            hidden_size=config.hidden_size,
            intermediate_size=2 * config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.max_length,
            local_attention=config.window,
            embedding_dropout=config.dropout,
            attention_dropout=config.dropout,
            mlp_dropout=config.dropout,
            classifier_dropout=config.dropout,
            **names,
        )
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def encode(sentences: Sequence[Sentence], tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[Example]:
    """Sub-words and labels of every sentence: the first sub-word of a word carries its tag, the others nothing."""
    encoding = tokenizer(
        [list(sentence.words) for sentence in sentences],
        is_split_into_words=True,
        truncation=True,
        max_length=min(max_length, tokenizer.model_max_length),
    )
    examples = []
    for number, sentence in enumerate(sentences):
        labels, word_starts, previous = [], [], None
        for position, word in enumerate(encoding.word_ids(number)):
            begins = word is not None and word != previous
            labels.append(TAGS.index(sentence.tags[word]) if begins else IGNORED)
            if begins:
                word_starts.append((word, position))
            previous = word
        examples.append(Example(encoding["input_ids"][number], labels, word_starts))
    return examples


def batches(
    examples: Sequence[Example], batch_size: int, generator: torch.Generator | None = None
) -> Iterator[list[int]]:
    """Numbers of the examples of each batch, similar lengths together; in random order if there is a generator."""
    if generator is None:
        order = list(range(len(examples)))
        pool = len(examples)
    else:
        order = torch.randperm(len(examples), generator=generator).tolist()
        pool = 8 * batch_size  # sorting a few batches at a time saves the padding and keeps the order random enough
    groups = []
    for start in range(0, len(order), pool):
        by_length = sorted(order[start : start + pool], key=lambda number: len(examples[number].input_ids))
        groups += [by_length[first : first + batch_size] for first in range(0, len(by_length), batch_size)]
    if generator is not None:
        groups = [groups[place] for place in torch.randperm(len(groups), generator=generator).tolist()]
    yield from groups


def collate(
    examples: Sequence[Example], pad_token_id: int, device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Model inputs, each (B, T), and the target (B, T) with IGNORED on padding, special tokens and inner sub-words."""
    longest = max(len(example.input_ids) for example in examples)

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows], device=device)

    inputs = {
        "input_ids": padded([example.input_ids for example in examples], pad_token_id),
        "attention_mask": padded([[1] * len(example.input_ids) for example in examples], 0),
    }
    return inputs, padded([example.labels for example in examples], IGNORED)


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    sentences: Sequence[Sentence],
    examples: Sequence[Example],
    pad_token_id: int,
    batch_size: int = 64,
) -> list[list[str]]:
    """A tag for every word of every sentence; a word that truncation left out is O."""
    training = model.training
    model.eval()
    tags = [["O"] * len(sentence.words) for sentence in sentences]
    for numbers in batches(examples, batch_size):
        inputs, _ = collate([examples[number] for number in numbers], pad_token_id, model.device)
        best = model(**inputs).logits.argmax(-1).tolist()  # (B, T)
        for row, number in zip(best, numbers, strict=True):
            for word, position in examples[number].word_starts:
                tags[number][word] = TAGS[row[position]]
    model.train(training)
    return tags
