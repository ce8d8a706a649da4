"""Reading formulas: ``parse(repr(objective))``.

    sum      = product (("+" | "-") product)*
    product  = factor ("*" factor)*                   all of them numbers but one at most
    factor   = ("+" | "-")* (number | term | "(" sum ")")
    term     = name "(" [argument ("," argument)* [","]] ")"
    argument = [name "="] (product of numbers | string)

Nothing is ever evaluated as code, and what a text can cost is bounded by its length.
"""

from __future__ import annotations

import inspect
import math
import re
from typing import NamedTuple, NoReturn

from .objective import Coefficient, Objective, Term

_LONGEST = 100_000  # characters
_DEEPEST = 100  # parentheses
_TOKEN = re.compile(
    r"""[ \t\r\n\f]*(?:
        (?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)(?![A-Za-z0-9_.])
      | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
      | (?P<string>"[^"\\\n]*"|'[^'\\\n]*')
      | (?P<sign>[-+*(),=])
      | (?P<end>\Z)
    )""",
    re.VERBOSE,
)

Value = float | list[tuple[float, Term]]  # a number, or terms and what multiplies them


class _Token(NamedTuple):
    kind: str
    text: str
    place: int


def parse(text: str) -> Objective:
    """The objective that a formula describes: ``parse(repr(objective))`` for objectives made of numbers.

    ``parse("CrossEntropy(label_smoothing=0.1) + 1e-4*ZLoss() - 0.01*Entropy()")``. The grammar is sums, differences and
    numeric multiples of terms with numeric arguments; nothing is ever evaluated as code.

    Raises:
        ValueError: says what could not be read. Terms that hold tensors, functions or models cannot be parsed.

    >>> parse("CrossEntropy(label_smoothing=0.1) + 1e-4*ZLoss() - 0.01*Entropy()")
    CrossEntropy(label_smoothing=0.1) + 0.0001*ZLoss() - 0.01*Entropy()
    >>> parse("CrossEntropie()")
    Traceback (most recent call last):
    ValueError: objective: 'CrossEntropie' is not one of BernoulliEntropy, BinaryCrossEntropy, CrossEntropy, ...
    """
    if not isinstance(text, str):
        raise TypeError(f"objective: expected a string but got {type(text).__name__}")
    if len(text) > _LONGEST:
        raise ValueError(f"objective: expected a formula of at most {_LONGEST} characters but got {len(text)}")
    if held := re.search(r"<[^<>]*>", text):
        raise ValueError(
            f"objective: {text[:200]!r} cannot be parsed, because a term in it holds a tensor, a function or a model: "
            f"{held[0][:200]}"
        )
    reader = _Reader(text)
    value = reader.sum()
    if reader.next.kind != "end":
        reader.refuse("'+', '-', '*' or the end")
    if isinstance(value, float):
        raise ValueError(f"objective: {text[:200]!r} is a number; expected a term such as ZLoss()")
    return Objective((Coefficient.of(number), term) for number, term in value)


class _Reader:
    """A text, and the token that comes next."""

    def __init__(self, text: str) -> None:
        self.text, self.depth = text, 0
        self.next = self.token(0)

    def token(self, place: int) -> _Token:
        found = _TOKEN.match(self.text, place)
        if found is None:
            begin = re.compile(r"[ \t\r\n\f]*").match(self.text, place).end()  # type: ignore[union-attr]
            return _Token("unknown", self.text[begin : begin + 20], begin)
        kind = str(found.lastgroup)
        return _Token(kind, found[kind], found.start(kind))

    def take(self, text: str | None = None) -> str | None:
        """The next token if it is this one, or whatever it is."""
        token = self.next
        if text is not None and (token.kind, token.text) != ("sign", text):
            return None
        self.next = self.token(token.place + len(token.text))
        return token.text

    def expect(self, text: str) -> None:
        if self.take(text) is None:
            self.refuse(repr(text))

    def refuse(self, expected: str) -> NoReturn:
        got = repr(self.next.text) if self.next.kind != "end" else "its end"
        raise ValueError(
            f"objective: cannot read {self.text[:200]!r}: expected {expected} but got {got} at character "
            f"{self.next.place}"
        )

    def deeper(self) -> None:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise ValueError(f"objective: {self.text[:200]!r} is too deeply nested: at most {_DEEPEST} parentheses")

    def sum(self) -> Value:
        value = self.product()
        while (sign := self.take("+") or self.take("-")) is not None:
            place, more = self.next.place, self.product()
            if isinstance(value, float) or isinstance(more, float):
                raise ValueError(
                    f"objective: {self.text[:200]!r} adds a number, before or at character {place}; only terms add up"
                )
            value += more if sign == "+" else [(-number, term) for number, term in more]
        return value

    def product(self) -> Value:
        value = self.factor()
        while self.take("*") is not None:
            place, more = self.next.place, self.factor()
            if isinstance(more, float):
                value, more = more, value
            if isinstance(more, float) and isinstance(value, float):
                value = value * more
            elif isinstance(value, float):
                value = [(value * number, term) for number, term in more]
            else:
                raise ValueError(
                    f"objective: {self.text[:200]!r} multiplies terms by terms at character {place}; expected a number "
                    "times a term"
                )
        return value

    def factor(self) -> Value:
        sign = 1.0
        while (found := self.take("+") or self.take("-")) is not None:
            sign = -sign if found == "-" else sign
        if self.next.kind == "number":
            number = float(str(self.take()))
            if not math.isfinite(number):
                raise ValueError(f"objective: {self.text[:200]!r} has a number that is too large")
            return sign * number
        if self.next.kind == "name":
            return [(sign, self.term())]
        if self.take("(") is None:
            self.refuse("a term such as ZLoss(), or a number that multiplies one,")
        self.deeper()
        value = self.sum()
        self.expect(")")
        self.depth -= 1
        return sign * value if isinstance(value, float) else [(sign * number, term) for number, term in value]

    def term(self) -> Term:
        name = str(self.take())
        if name not in Term.registry:
            raise ValueError(f"objective: {name[:200]!r} is not one of {', '.join(sorted(Term.registry))}")
        self.expect("(")
        self.deeper()
        positional: list[float | str] = []
        by_name: dict[str, float | str] = {}
        while self.take(")") is None:
            if self.next.kind == "name":
                keyword = str(self.take())
                if self.take("=") is None:
                    raise ValueError(f"objective: {name}: expected a number but got {keyword[:200]!r}; {_HELD}")
                if keyword in by_name:
                    raise ValueError(f"objective: {name}: {keyword[:200]} is given twice")
                by_name[keyword] = self.argument(name, keyword)
            elif by_name:
                raise ValueError(f"objective: {name}: an argument without a name comes behind one with a name")
            else:
                positional.append(self.argument(name, "argument"))
            if self.take(",") is None and self.next.text != ")":
                self.refuse("',' or ')'")
        self.depth -= 1
        kind = Term.registry[name]
        try:
            inspect.signature(kind).bind(*positional, **by_name)
            return kind(*positional, **by_name)
        except (TypeError, ValueError) as error:
            raise ValueError(f"objective: {name}: {error}") from None

    def argument(self, term: str, name: str) -> float | str:
        if self.next.kind == "string":
            return str(self.take())[1:-1]
        if self.next.kind == "name":
            raise ValueError(f"objective: {term}: {name}: expected a number but got {self.next.text[:200]!r}; {_HELD}")
        value = self.product()
        if not isinstance(value, float):
            raise ValueError(f"objective: {term}: {name[:200]}: expected a number but got a term")
        return value


_HELD = "terms that hold tensors, functions or models cannot be parsed"
