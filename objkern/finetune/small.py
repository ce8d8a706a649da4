"""A small model and its tokenizer, from a configuration and the texts at hand: nothing is downloaded.

texts ──▶ tokenizer (WordPiece to read, byte-level BPE to write)     encoders: ModernBERT
              └──▶ configuration ──▶ model with random weights       causal: Llama       seq2seq: T5
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .data import Row

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from .tasks import Task

__all__ = ["SmallModel", "make"]

_ANSWERS = ("label", "tags")  # columns that are no text
LARGEST = 2**20  # of every size
_LETTERS = string.ascii_letters + string.digits + string.punctuation


@dataclass(frozen=True)
class SmallModel:
    """Sizes of a model that is made from nothing.

    Attributes:
        hidden_size: features, a multiple of 2 · heads.
        layers: so many; of a T5 so many on either side.
        heads: of attention.
        window: tokens that a local attention layer of an encoder sees, half on each side.
        dropout: in [0, 1).
        vocabulary: tokens, at most.

    Raises:
        ValueError: names the size, what was expected and what came.

    >>> from objkern.finetune.small import SmallModel
    >>> SmallModel(hidden_size=64, heads=3)
    Traceback (most recent call last):
    ValueError: hidden_size: expected a multiple of 2 * heads = 6, for rotary positions, but got 64
    """

    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    window: int = 16
    dropout: float = 0.1
    vocabulary: int = 3000

    def __post_init__(self) -> None:
        for name in ("hidden_size", "layers", "heads", "window", "vocabulary"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= LARGEST:  # memory is asked for before it is needed
                raise ValueError(f"{name}: expected a whole number in [1, {LARGEST}] but got {value!r}")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size: expected a multiple of 2 * heads = {2 * self.heads}, for rotary positions, but got "
                f"{self.hidden_size}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a number in [0, 1) but got {self.dropout!r}")


def make(folder: Path, task: type[Task], rows: Sequence[Row], sizes: SmallModel, max_length: int, seed: int) -> Path:
    """Writes a model without a head of the task's own, and a tokenizer that was learned from the rows' texts."""
    names = [column.name for column in task.columns]  # what else a row has is nobody's business
    texts = [text for row in rows for text in texts_of({name: row.get(name) for name in names})]
    reads = task.auto_model not in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
    if reads:
        tokenizer = word_pieces(texts, sizes.vocabulary, max_length)
    else:
        tokenizer = byte_pairs(texts, sizes.vocabulary, max_length, ends=task.auto_model == "AutoModelForSeq2SeqLM")
    torch.manual_seed(seed)
    _model(task, tokenizer, sizes, max_length).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a row, words of a list as one."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in _ANSWERS:
                yield from texts_of(inner)
    elif isinstance(value, list | tuple):
        if value and all(isinstance(part, str) for part in value):
            yield " ".join(value)
        else:
            for inner in value:
                yield from texts_of(inner)


def word_pieces(texts: Iterable[str], size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer with BERT's special tokens, learned from these texts. Case is kept: True isn't true."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    texts = list(texts)
    # Every letter is given in advance, first and inner (##). Otherwise a letter that training never saw in its place
    # would make the whole word unknown; and the vocabulary would differ from process to process, because among equally
    # frequent pairs the trainer prefers the lower numbers, and it numbers the letters as a hash table brings them.
    letters = sorted({*_LETTERS, *(letter for text in texts for letter in text if not letter.isspace())})
    given = special + letters + [f"##{letter}" for letter in letters]
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    learner.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=given, show_progress=False)
    )
    tokenizer = Tokenizer(models.WordPiece(learner.get_vocab(), unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = {f"{token.strip('[]').lower()}_token": token for token in special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **names)


def byte_pairs(texts: Iterable[str], size: int, max_length: int, ends: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, which writes any text back as it was; `ends`: a text ends with </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def _model(task: type[Task], tokenizer: PreTrainedTokenizerFast, sizes: SmallModel, max_length: int) -> PreTrainedModel:
    import transformers

    config: PreTrainedConfig
    size, pad = len(tokenizer), tokenizer.pad_token_id
    if task.auto_model == "AutoModelForCausalLM":
        config = transformers.LlamaConfig(
            vocab_size=size, hidden_size=sizes.hidden_size, intermediate_size=2 * sizes.hidden_size,
            num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, max_position_embeddings=max_length + 64,
            attention_dropout=sizes.dropout, pad_token_id=pad, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)
    if task.auto_model == "AutoModelForSeq2SeqLM":
        config = transformers.T5Config(
            vocab_size=size, d_model=sizes.hidden_size, d_kv=sizes.hidden_size // sizes.heads,
            d_ff=2 * sizes.hidden_size, num_layers=sizes.layers, num_heads=sizes.heads, dropout_rate=sizes.dropout,
            pad_token_id=pad, decoder_start_token_id=pad, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config)
    # ModernBERT, because its rotary positions and local windows learn what "the word before" means from some hundred
    # examples, where absolute positions need many times as many.
    config = transformers.ModernBertConfig(
        vocab_size=size, hidden_size=sizes.hidden_size, intermediate_size=2 * sizes.hidden_size,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, max_position_embeddings=max_length,
        local_attention=sizes.window, embedding_dropout=sizes.dropout, attention_dropout=sizes.dropout,
        mlp_dropout=sizes.dropout, classifier_dropout=sizes.dropout, pad_token_id=pad,
        bos_token_id=tokenizer.cls_token_id, cls_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id, sep_token_id=tokenizer.sep_token_id,
    )  # fmt: skip
    return transformers.ModernBertModel(config)
