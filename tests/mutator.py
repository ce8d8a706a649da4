"""Where a source can be made wrong in a small way, and what would stand there: operators, constants, indices,
conditions, dropped statements. tests/mutants.py draws from these places, and sees whether the tests notice.

Python is read by its own parser. C++ is read as clang-format leaves it: binary operators stand between spaces,
template brackets do not. What comes out wrong all the same does not compile, and is left out there.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

KINDS = ("operator", "constant", "index", "condition", "dropped")


class Place(NamedTuple):
    """source[begin:end] and the wrong text for it. A statement's wrong text is nothing, or another statement."""

    kind: str
    begin: int
    end: int
    wrong: str
    statement: bool = False


# ---- C++ --------------------------------------------------------------------------------------------------------------

OPERATORS = {
    "+": "-", "-": "+", "*": "/", "/": "*", "%": "*", "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=",
    "!=": "==", "&&": "||", "||": "&&", "&": "|", "|": "&",
}  # fmt: skip
PRECEDENCE = {
    "*": 10, "/": 10, "%": 10, "+": 9, "-": 9, "<<": 8, ">>": 8, "<": 7, "<=": 7, ">": 7, ">=": 7, "==": 6, "!=": 6,
    "&": 5, "^": 4, "|": 3, "&&": 2, "||": 1, "?": 0, ":": 0,
}  # fmt: skip
_BINARY = re.compile(r"(?<=\s)(\*|/|%|\+|-|<<|>>|<=|>=|<|>|==|!=|&&|\|\||&|\||\^|\?|:)(?=\s)")
_ASSIGNMENT = re.compile(r"(?<=\s)[-+*/%&|^]?=(?=\s)")
_OPENING, _CLOSING = "([{", ")]}"


def masked(text: str) -> str:
    """The text without comments, strings and directives, each letter of them a blank, so that places stay."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    text = re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'', blank, text, flags=re.DOTALL)
    return re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", blank, text, flags=re.MULTILINE)


def compiled(source: str, macros: Collection[str]) -> str:
    """The text without the branches of #if that are for others: those are compiled that these macros lead to."""
    branches: list[tuple[bool, bool]] = []  # of every #if around: whether this branch is compiled, whether one was
    lines = []
    for line in source.split("\n"):
        directive = re.match(r"\s*#\s*(if|ifdef|ifndef|elif|else|endif)\b(.*)", line)
        if directive is None:
            lines.append(line if all(here for here, _ in branches) else " " * len(line))
            continue
        lines.append(line)
        word, rest = directive[1], directive[2].split("//")[0]
        if word == "endif":
            branches.pop()
            continue
        known = any(name in macros for name in re.findall(r"\w+", rest))
        there = known != (word == "ifndef") if word != "else" else True
        was = branches.pop()[1] if word in ("elif", "else") else False
        branches.append((there and not was, there or was))
    return "\n".join(lines)


def _left(text: str, at: int, level: int) -> int:
    """Where the operand in front of `at` begins, behind an operator that binds so tightly or less."""
    depth = 0
    i = at
    while i > 0:
        c = text[i - 1]
        if c in _CLOSING:
            if c == "}" and depth == 0:
                break
            depth += 1
        elif c in _OPENING:
            if depth == 0:
                break
            depth -= 1
        elif depth == 0:
            if c in ",;":
                break
            if c.isspace():
                word = re.search(r"(?:^|\s)(\S+)\s+$", text[max(0, i - 40) : i])
                token = word[1] if word else ""
                if PRECEDENCE.get(token, 99) < level or re.fullmatch(r"[-+*/%&|^]?=", token):
                    break
                if token in ("return", "case", "else", "=", "do"):
                    break
        i -= 1
    while text[i].isspace():
        i += 1
    return i


def _right(text: str, at: int, level: int) -> int:
    """Where the operand behind `at` ends, in front of an operator that binds so tightly or less."""
    depth = 0
    i = at
    while i < len(text):
        c = text[i]
        if c in _OPENING:
            if c == "{" and depth == 0:
                break
            depth += 1
        elif c in _CLOSING:
            if depth == 0:
                break
            depth -= 1
        elif depth == 0:
            if c in ",;":
                break
            found = _BINARY.match(text, i)
            if (found and PRECEDENCE[found[1]] <= level) or _ASSIGNMENT.match(text, i):
                break
        i += 1
    while text[i - 1].isspace():
        i -= 1
    return i


def _closing(text: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] in _OPENING) - (text[i] in _CLOSING)
        if depth == 0:
            return i
    raise ValueError("a bracket that is not closed")


def _openings(text: str, begin: int, end: int) -> Iterator[int]:
    """Of the outermost square brackets in a declaration, as in `float a[n], b[m]`."""
    at = begin
    while (at := text.find("[", at, end)) >= 0:
        yield at
        at = _closing(text, at)


_LITERAL = re.compile(r"(?<![\w.'])(\d+\.\d*(?:e-?\d+)?|\d+)(f?)(?![\w.'])")
_STATEMENT = re.compile(
    r"^[ ]*((?:\*?[a-z_][\w.]*(?:->\w+|\.\w+|\[[^\n]*?\])*(?: [-+*/|&]?= [^\n]*|\([^\n]*\)|(?:\+\+|--)))|[A-Z_]{4,}\([^\n]*\)|break|continue);$",
    re.MULTILINE,
)


def of_cpp(source: str, macros: Collection[str] = ()) -> Iterator[Place]:
    text = masked(compiled(source, macros))
    sizes = [  # of arrays in their declarations: what is too large changes nothing
        (at, _closing(text, at))
        for found in re.finditer(r"^[ ]*(?!return\b)(?:[\w:<>(),]+ )+\w+\[[^;=\n]*", text, re.MULTILINE)
        for at in _openings(text, *found.span())
    ]
    # And of references to arrays.
    sizes += [(found.end() - 1, _closing(text, found.end() - 1)) for found in re.finditer(r"\(&\w+\)\[", text)]

    def in_size(at: int) -> bool:
        return any(begin <= at <= end for begin, end in sizes)

    for found in _BINARY.finditer(text):
        op = found[1]
        if in_size(found.start()):
            continue
        if op == "?":
            begin, end = _left(text, found.start() - 1, 1), found.start() - 1
            if begin < end:
                yield Place("condition", begin, end, f"!({source[begin:end]})")
        elif op in OPERATORS:
            level = PRECEDENCE[op]
            begin, end = _left(text, found.start() - 1, level), _right(text, found.end(), level)
            left, right = source[begin : found.start()].rstrip(), source[found.end() : end].lstrip()
            if left and right:
                yield Place("operator", begin, end, f"{left} {OPERATORS[op]} {right}")
    for found in re.finditer(r"\bstd::(min|max)(?:<[^()]*?>)?\(", text):
        end = _closing(text, found.end() - 1) + 1
        other = {"min": "max", "max": "min"}[found[1]]
        yield Place("operator", found.start(), end, source[found.start() : end].replace(found[1], other, 1))
    for found in _LITERAL.finditer(text):
        if in_size(found.start()):
            continue
        digits = found[1]
        wrong = repr(float(digits) * 2 or 1.0) if "." in digits else str(int(digits) + 1)
        yield Place("constant", found.start(), found.end(), wrong + found[2])
    for found in re.finditer(r"(?<=[\w\])])\[", text):
        end = _closing(text, found.start())
        inner = source[found.end() : end]
        if inner.strip() and not inner.strip().isdigit() and not in_size(found.start()):
            yield Place("index", found.end(), end, "0")
    for found in re.finditer(r"\b(?:if|while) \(", text):
        end = _closing(text, found.end() - 1)
        condition = source[found.end() : end]
        if " = " not in text[found.end() : end]:
            yield Place("condition", found.end(), end, f"!({condition})")
    for found in re.finditer(r"(?<![\w)\]])!(?=[\w(])", text):
        end = _right(text, found.end(), 11)
        yield Place("condition", found.start(), end, source[found.end() : end])
    for found in _STATEMENT.finditer(text):
        before = text[: found.start()].rstrip()
        if (
            not before
            or before.endswith((";", "{", "}", ")", "]", "else"))
            or re.search(r"(?:case [\w:]+|default):$", before)
        ):
            yield Place("dropped", found.start(1), found.end(), "", statement=True)


# ---- Python -----------------------------------------------------------------------------------------------------------

_PYTHON = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.BitAnd: "|",
    ast.BitOr: "&", ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in", ast.And: "or", ast.Or: "and",
}  # fmt: skip


class _Python(ast.NodeVisitor):
    def __init__(self, source: str) -> None:
        self.places: list[Place] = []
        self.source = source
        self.lines = [0]
        for line in source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.texts = source.splitlines()

    def at(self, line: int, column: int) -> int:
        return self.lines[line - 1] + len(self.texts[line - 1].encode()[:column].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def text(self, node: ast.AST) -> str:
        begin, end = self.span(node)
        return self.source[begin:end]

    def add(self, kind: str, node: ast.AST, wrong: str, statement: bool = False) -> None:
        self.places.append(Place(kind, *self.span(node), wrong, statement))

    # What is no behaviour: annotations, docstrings, decorators, the words of messages.
    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_arg(self, node: ast.arg) -> None:
        pass

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(default)
        self.body(node.body)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.body(node.body)

    def body(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self.visit(statement)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_Import(self, node: ast.Import) -> None:
        pass

    visit_ImportFrom = visit_Import  # noqa: N815

    def visit_Raise(self, node: ast.Raise) -> None:
        self.add("dropped", node, "pass", statement=True)

    def visit_Assert(self, node: ast.Assert) -> None:
        pass

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return
        self.add("dropped", node, "pass", statement=True)
        self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add("dropped", node, "pass", statement=True)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.targets[0], (ast.Attribute, ast.Subscript)):
            self.add("dropped", node, "pass", statement=True)
        self.generic_visit(node)

    def visit_Delete(self, node: ast.Delete) -> None:
        pass  # it frees memory, or a name

    # What is.
    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.generic_visit(node)
        texts = isinstance(node.left, (ast.JoinedStr, ast.Constant)) and not _is_number(node.left)
        if (op := _PYTHON.get(type(node.op))) and not texts and not _is_type(node):
            self.add("operator", node, f"(({self.text(node.left)}) {op} ({self.text(node.right)}))")

    def visit_Compare(self, node: ast.Compare) -> None:
        self.generic_visit(node)
        if (op := _PYTHON.get(type(node.ops[-1]))) is not None:
            begin, end = self.span(node)
            middle = self.span(node.comparators[-2] if len(node.ops) > 1 else node.left)[1]
            right = self.text(node.comparators[-1])
            between = self.source[middle : self.span(node.comparators[-1])[0]]
            if "(" not in between and ")" not in between:
                self.places.append(Place("operator", begin, end, f"{self.source[begin:middle]} {op} {right}"))

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.generic_visit(node)
        op = _PYTHON[type(node.op)]
        self.add("operator", node, "(" + f" {op} ".join(f"({self.text(value)})" for value in node.values) + ")")

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        self.generic_visit(node)
        if isinstance(node.op, ast.Not):
            self.add("condition", node, f"bool({self.text(node.operand)})")
        elif isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self.add("operator", node, f"(+({self.text(node.operand)}))")

    def negate(self, test: ast.expr) -> None:
        if self.text(test) != "TYPE_CHECKING" and not any(isinstance(n, ast.NamedExpr) for n in ast.walk(test)):
            self.add("condition", test, f"(not ({self.text(test)}))")

    def visit_If(self, node: ast.If) -> None:
        self.negate(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.negate(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self.negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.negate(test)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.value, ast.Name) and node.value.id in _TYPES:
            return
        self.visit(node.value)
        if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, int):
            self.add("index", node.slice, str(node.slice.value + 1))
        elif isinstance(node.slice, (ast.Name, ast.BinOp)):
            self.add("index", node.slice, "0")
            self.visit(node.slice)
        else:
            self.visit(node.slice)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.add("constant", node, repr(not node.value))
        elif isinstance(node.value, int):
            self.add("constant", node, repr(node.value + 1))
        elif isinstance(node.value, float):
            self.add("constant", node, repr(node.value * 2 or 1.0))

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("min", "max"):
            begin, end = self.span(node.func)
            self.places.append(Place("operator", begin, end, {"min": "max", "max": "min"}[node.func.id]))
        self.generic_visit(node)


_TYPES = {"list", "dict", "tuple", "Callable", "Sequence", "Iterable", "Iterator", "Literal", "Mapping", "type", "set"}


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float))


def _is_type(node: ast.BinOp) -> bool:
    """Tensor | None."""
    sides = (node.left, node.right)
    return isinstance(node.op, ast.BitOr) and any(
        isinstance(side, ast.Constant) and side.value is None for side in sides
    )


def of_python(source: str) -> list[Place]:
    found = _Python(source)
    found.visit(ast.parse(source))
    return found.places


def is_python(source: str, place: Place) -> bool:
    """With the fault: a bracket may have belonged to an operand's neighbour."""
    try:
        ast.parse(source[: place.begin] + place.wrong + source[place.end :])
    except SyntaxError:
        return False
    return True
