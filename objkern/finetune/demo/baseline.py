"""What a model must beat: every word gets the tag that it had most often in training."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from .corpus import Sentence


def most_frequent_tags(train: Sequence[Sentence], sentences: Sequence[Sentence]) -> list[list[str]]:
    """Tags of `sentences`, word by word, without context; a word that training never saw is O."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for sentence in train:
        for word, tag in zip(sentence.words, sentence.tags, strict=True):
            counts[word][tag] += 1
    best = {word: tags.most_common(1)[0][0] for word, tags in counts.items()}
    return [[best.get(word, "O") for word in sentence.words] for sentence in sentences]
