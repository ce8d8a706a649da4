"""Labelled sentences from the manual that every Python carries: find the names of code in plain prose.

`pydoc_data.topics` is the language reference as `help()` shows it. Its authors put code in double quotes, some 3,900
times. Here the quotes are taken away and become the labels: what stood in them is an entity, and its kind comes from
Python's own `keyword` and `builtins`. Nothing is downloaded and nobody annotated anything.

What keeps the labels out of the text:

* prose is told from program text, and sentences from one another, on the text without quotes;
* words are cut by one pattern that knows nothing of the quotes, and the model sees words, so no blank betrays a quote;
* the stars of *emphasis* and typographic quotes go too: they tell where code is not.

What keeps test sentences out of training: many paragraphs stand in several topics. Topics that share a sentence form
one group, groups are never divided, and a sentence occurs once in the whole corpus.
"""

from __future__ import annotations

import builtins
import keyword
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

KINDS = ("keyword", "exception", "special", "builtin", "code")
TAGS = ("O", *(f"{prefix}-{kind}" for kind in KINDS for prefix in "BI"))

WORD = re.compile(r"\w+|[^\w\s]")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(\[])")
BULLET = re.compile(r"^(\*|#\.|\d+\.|[a-z]\.|\[\d+\])\s+")
TYPOGRAPHY = re.compile(r"[*“”‘]|’(?!\w)")  # an apostrophe inside a word stays
PLAIN_WORD = re.compile(r"[(\[]*[A-Za-z][a-z]*([-’'/][A-Za-z]+)*[.,:;!?)\]]*")
NOT_PROSE = re.compile(
    r"""^\s*(\+[-=]|\||>>>|\.\.\.|[*=\-~^"#]{3,}\s*$)   # tables, doctests, underlined headings
      | ^\s*(@|\#|import\s|from\s\S+\simport\s|Traceback)  # program text
      | ^(\s*)\S.*:\n\2\s+\S                             # a suite: a colon, then a deeper line
      | ::= | \S\s{2,}\# | (^|\s)[-+*/|&^]?=(\s|$)       # grammar, trailing comments, assignments""",
    re.MULTILINE | re.VERBOSE,
)
SHORTEST_PARAGRAPH = 5  # words; below that, signatures and fragments outnumber prose
SHARED_SENTENCE = 8  # words; a shorter sentence ("Changed in version 3.7.") shared by two topics doesn't make them one
SPLIT_SHARES = {"test": 0.20, "dev": 0.15}  # of the sentences; the rest is for training


@dataclass(frozen=True)
class Sentence:
    """Words of a sentence with one BIO tag each; `offsets[i]` is where word i stands in `text`."""

    topic: str
    text: str
    words: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...]
    tags: tuple[str, ...]


def kind_of(code: str) -> str:
    """Kind of a piece of code, as `keyword` and `builtins` have it: `"async for"` → keyword, `"len(s)"` → builtin."""
    if all(_is_keyword(word.removesuffix("*")) for word in code.split()):  # `except*` is written with its star
        return "keyword"
    name = re.fullmatch(r"(?P<path>[A-Za-z_][\w.]*)(\(.*\))?", code)  # a dotted name, called or not
    if name is None:
        return "code"
    path = name["path"].split(".")
    if re.fullmatch(r"__\w+__", path[-1]):
        return "special"
    value = getattr(builtins, path[0], None)
    if isinstance(value, type) and issubclass(value, BaseException):
        return "exception"
    return "builtin" if hasattr(builtins, path[0]) else "code"


def _is_keyword(word: str) -> bool:
    # `type` is a soft keyword since 3.12, but the manual nearly always means the class.
    return keyword.iskeyword(word) or (keyword.issoftkeyword(word) and not hasattr(builtins, word))


def load_corpus() -> dict[str, list[Sentence]]:
    """Sentences of the running Python's manual by split, `"train"`, `"dev"` and `"test"`; always the same ones."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RuntimeError("this Python comes without pydoc_data.topics, the text that the demo learns from") from error
    return split_corpus({topic: label_topic(topic, text) for topic, text in topics.items()})


def label_topic(topic: str, text: str) -> list[Sentence]:
    """Labelled sentences of one topic of the manual, in order, without its program text, tables and headings."""
    return [sentence for paragraph in text.split("\n\n") for sentence in _label_paragraph(topic, paragraph)]


def _label_paragraph(topic: str, paragraph: str) -> list[Sentence]:
    if NOT_PROSE.search(paragraph):
        return []
    pieces = BULLET.sub("", " ".join(paragraph.split())).split('"')  # prose, code, prose, code, ..., prose
    if not _quotes_are_clear(pieces):
        return []
    text, codes = "", []
    for position, piece in enumerate(pieces):
        if position % 2:
            codes.append((len(text), len(text) + len(piece)))
            text += piece
        else:
            text += TYPOGRAPHY.sub("", piece)
    words = text.split()
    if len(words) < SHORTEST_PARAGRAPH or 0.6 * len(words) > sum(bool(PLAIN_WORD.fullmatch(word)) for word in words):
        return []
    cuts = [0, *(match.end() for match in SENTENCE_END.finditer(text)), len(text)]
    if any(start < cut < end for start, end in codes for cut in cuts):
        return []
    return [_label_sentence(topic, text, codes, start, end) for start, end in pairwise(cuts)]


def _quotes_are_clear(pieces: list[str]) -> bool:
    """Whether every code quote opens and closes a whole word: not so in `"ExceptionGroup"s` and `""quoted" code"`."""
    return len(pieces) % 2 == 1 and not any(
        code != code.strip() or not code or re.search(r"\w$", before) or re.match(r"\w", after)
        for before, code, after in zip(pieces[0::2], pieces[1::2], pieces[2::2], strict=False)
    )


def _label_sentence(topic: str, text: str, codes: list[tuple[int, int]], start: int, end: int) -> Sentence:
    words, offsets, tags = [], [], []
    for match in WORD.finditer(text, start, end):
        code = next((code for code in codes if code[0] <= match.start() < code[1]), None)
        words.append(match.group())
        offsets.append((match.start() - start, match.end() - start))
        tags.append("O" if code is None else ("B-" if match.start() == code[0] else "I-") + kind_of(text[slice(*code)]))
    return Sentence(topic, text[start:end].rstrip(), tuple(words), tuple(offsets), tuple(tags))


def split_corpus(topics: Mapping[str, list[Sentence]]) -> dict[str, list[Sentence]]:
    """Divides whole groups of topics among train, dev and test, and keeps the first copy of every sentence only."""
    topics_of: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for topic, sentences in topics.items():
        for sentence in sentences:
            topics_of[_identity(sentence)].append(topic)

    group = {topic: topic for topic in topics}  # topic → the group's first topic
    for words, sharing in topics_of.items():
        if len(words) >= SHARED_SENTENCE:
            merged = {group[topic] for topic in sharing}
            group = {topic: min(merged) if first in merged else first for topic, first in group.items()}

    size = Counter(group[sharing[0]] for sharing in topics_of.values())
    # By checksum, not by name: the alphabet keeps neighbours such as "typesseq" and "typesmapping" together. And not by
    # a shuffle, which would deal anew whenever a release of Python adds a topic.
    order = sorted(size, key=lambda first: zlib.crc32(first.encode()))
    splits: dict[str, list[Sentence]] = {split: [] for split in ("train", *SPLIT_SHARES)}
    split_of: dict[str, str] = {}
    for split, share in SPLIT_SHARES.items():
        room = share * size.total()
        for first in order:
            if first not in split_of and size[first] <= room:
                split_of[first] = split
                room -= size[first]

    seen: set[tuple[str, ...]] = set()
    # Train first: a short sentence that several groups share belongs to it, and leaves dev and test.
    for split, chosen in splits.items():
        for topic in sorted(topics):
            for sentence in topics[topic]:
                if split_of.get(group[topic], "train") == split and _identity(sentence) not in seen:
                    seen.add(_identity(sentence))
                    chosen.append(sentence)
    return splits


def _identity(sentence: Sentence) -> tuple[str, ...]:
    return tuple(word.lower() for word in sentence.words)
