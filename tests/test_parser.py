"""Whatever a string holds, `parse` gives an objective or says in its own words what is wrong: random text and formulas,
and libFuzzer, where it is installed (pip install atheris), for as long as OBJKERN_FUZZ_MINUTES says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from time import process_time

import hypothesis
import pytest
from hypothesis import strategies as st

import objkern
from objkern import parse

from .fuzz_parse import SEEDS, check
from .properties import settings

ROOT = Path(__file__).parent.parent
MINUTES = float(os.environ.get("OBJKERN_FUZZ_MINUTES", 5))
WORDS = [
    *objkern.objective.Term.registry, *"+-*(),= \t\n\0.<>[]{}'\"\\#:;/%@&|^~!?_", "**", "1", "0.5", "1e-4", "1e999", "0x1f",
    "1_0", "2j", "gamma", "label_smoothing", "temperature", "weight", "lambda", "if", "else", "True", "None", "not", "é", "１",
    "∑", "\u202e", "\ud800", "<tensor>", "__import__", "9" * 400,
]  # fmt: skip


def formulas() -> st.SearchStrategy[str]:
    """What parses, most of it."""
    numbers = st.one_of(st.integers(0, 10**6), st.floats(0, 1e6)).map(repr)
    of_term = {"Focal": "gamma", "Poly1": "epsilon", "Margin": "m", "GeneralizedCrossEntropy": "q", "Huber": "delta"}
    terms = st.one_of(
        st.sampled_from(
            ["ZLoss()", "Entropy( )", "KLDivergence('reverse', temperature=2)", 'KLDivergence("forward",)']
        ),
        st.tuples(st.sampled_from(sorted(of_term)), st.sampled_from(["", "="]), numbers).map(
            lambda t: f"{t[0]}({of_term[t[0]] + t[1] if t[1] else ''}{t[2]})"
        ),
    )
    return st.recursive(terms, lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([" + ", "-", "+-", "\n- "]), inner).map("".join),
        st.tuples(numbers, inner).map(lambda t: f"{t[0]}*({t[1]})"), inner.map(lambda f: f"-({f})*2*-3"),
    ), max_leaves=12)  # fmt: skip


@settings(500)
@hypothesis.given(formulas())
def test_formulas(text: str) -> None:
    hypothesis.assume("GeneralizedCrossEntropy(" not in text and "Huber(" not in text)  # whose numbers have bounds
    assert check(text) is not None


@settings(1000)
@hypothesis.given(st.one_of(
    st.text(), st.lists(st.sampled_from(WORDS), max_size=30).map("".join),
    st.tuples(formulas(), st.integers(0, 200), st.integers(0, 3), st.sampled_from(WORDS)).map(
        lambda t: t[0][: t[1]] + t[3] + t[0][t[1] + t[2] :]
    ),
))  # fmt: skip
def test_anything_else(text: str) -> None:
    check(text)


@pytest.mark.parametrize("text", [
    "(" * 50_000, "-" * 90_000 + "ZLoss()", "Focal(" * 10_000, "2*" * 40_000 + "ZLoss()", "ZLoss()" + "*2" * 40_000,
    "ZLoss()" + "+ZLoss()" * 1_000, "(2*" * 99 + "ZLoss()" + ")" * 99, "2*(" * 30_000, "9" * 90_000 + "*ZLoss()",
    "0x" + "f" * 90_000, "1." * 40_000, "a." * 40_000, "a" * 90_000, "<" * 90_000, "<" + "a" * 90_000, "'" * 90_000,
    " " * 90_000, "ZLoss(" + "1," * 40_000 + ")", "ZLoss(" + "a=1," * 20_000, "e" * 90_000, "1e" * 40_000, "ZLoss()" * 10**6,
    "[" * 90_000, "{" * 90_000, "lambda:" * 10_000, "\\\n" * 40_000, "#" * 90_000, "\0" * 90_000, "f'{" * 30_000,
], ids=lambda text: f"{text[:12]!r} x{len(text)}")  # fmt: skip
def test_a_long_text_takes_no_long_time(text: str) -> None:
    begin = process_time()
    check(text)
    assert process_time() - begin < 5


@pytest.mark.parametrize(("text", "message"), [
    ("", "expected a term such as ZLoss(), or a number that multiplies one, but got its end at character 0"),
    ("ZLoss() +", "expected a term such as ZLoss(), or a number that multiplies one, but got its end at character 9"),
    ("ZLoss() ZLoss()", "expected '+', '-', '*' or the end but got 'ZLoss' at character 8"),
    ("ZLoss()\0", "expected '+', '-', '*' or the end but got '\\x00' at character 7"),
    ("ZLoss", "expected '(' but got its end at character 5"), ("ZLoss(", "but got its end at character 6"),
    ("ZLoss(1 2)", "expected ',' or ')' but got '2' at character 8"), ("0x1f*ZLoss()", "but got '0x1f*ZLoss()' at character 0"),
    ("1_0*ZLoss()", "but got '1_0*ZLoss()' at character 0"), ("2*3", "'2*3' is a number; expected a term such as ZLoss()"),
    ("1 + ZLoss()", "adds a number, before or at character 4"), ("ZLoss()*ZLoss()", "multiplies terms by terms at character 8"),
    ("zloss()", "'zloss' is not one of BernoulliEntropy, "), ("Focal()", "Focal: missing a required argument: 'gamma'"),
    ("Focal(1, 2)", "Focal: too many positional arguments"), ("Focal(2, beta=2)", "Focal: got an unexpected keyword argument 'beta'"),
    ("Focal(gamma=2, gamma=3)", "Focal: gamma is given twice"), ("Focal(gamma=1, 2)", "Focal: an argument without a name comes behind"),
    ("Focal(gamma=x)", "Focal: gamma: expected a number but got 'x'; terms that hold tensors"),
    ("Focal(gamma=(ZLoss()))", "Focal: gamma: expected a number but got a term"), ("Focal(-1)", "Focal: gamma: expected a number >= 0.0 but got -1.0"),
    ("CrossEntropy(weight=2)", "CrossEntropy: weight: expected a floating-point tensor"),
    ("KLDivergence('sideways')", "KLDivergence: direction: expected \"forward\" or \"reverse\" but got 'sideways'"),
    ("9" * 400 + "*ZLoss()", "has a number that is too large"), ("(" * 101 + "ZLoss()" + ")" * 101, "is too deeply nested"),
    ("-" * 200_000, "expected a formula of at most 100000 characters but got 200000"),
    ("<tensor>*ZLoss()", "holds a tensor, a function or a model: <tensor>"),
])  # fmt: skip
def test_the_words(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="^objective: .*" + re.escape(message)):
        parse(text)


def test_what_it_reads() -> None:
    for text, formula in {
        "((2))*((ZLoss()))": "2.0*ZLoss()", "+ZLoss()": "ZLoss()", "--ZLoss()": "ZLoss()", "2*3*ZLoss()*4": "24.0*ZLoss()",
        ".5*Focal(2.,)": "0.5*Focal(gamma=2.0)", "Focal(gamma=-2*-3)": "Focal(gamma=6.0)", "-(ZLoss() - 2*Entropy())*3": "-3.0*ZLoss() + 6.0*Entropy()",
        "\n ZLoss ( )\t+\r\nEntropy()\f": "ZLoss() + Entropy()", "0*-ZLoss()": "-0.0*ZLoss()",
        'KLDivergence("reverse")': "KLDivergence('reverse')",
    }.items():  # fmt: skip
        assert repr(parse(text)) == formula == repr(parse(formula))


def test_many_parentheses_that_are_closed_are_not_deep() -> None:
    assert repr(parse(" + ".join(["(2*ZLoss())"] * 150))) == " + ".join(["2.0*ZLoss()"] * 150)
    assert parse("(" * 99 + "ZLoss()" + ")" * 99) is not None


def test_every_seed_of_the_fuzzer_parses() -> None:
    for text in SEEDS:
        assert check(text) is not None, text


@pytest.mark.trust
@pytest.mark.skipif(find_spec("atheris") is None, reason="libFuzzer for Python is not installed: pip install atheris")
def test_libfuzzer(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """By the coverage of the parser. A text that takes 5 seconds or 1 GiB is a failure too."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz_parse", f"-max_total_time={60 * MINUTES:.0f}", "-timeout=5", "-rss_limit_mb=3000",
         "-max_len=400", f"-artifact_prefix={tmp_path}/", "-print_final_stats=1", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, errors="replace", env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    texts = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
    covered = re.findall(r"cov: (\d+)", done.stderr)
    assert texts is not None, done.stderr[-4000:]
    assert int(covered[-1]) > 50, "it did not see the parser's branches"
    record_property("texts", int(texts[1]))
    record_property("branches reached", int(covered[-1]))
