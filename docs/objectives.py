"""Writes the generated parts of docs/objectives.md: the table of statistics, and a section and a plot for every term.

    python docs/objectives.py           # write the page and docs/images/*.svg (needs matplotlib)
    python docs/objectives.py --check   # exit 1 if the page is stale or a plot is missing

What a term's docstring says (eager line, formula, arguments, source) is taken from there. What it does not say stands
in ENTRIES below: closed-form gradients, as text and as functions that tests/test_docs.py holds against autograd, and
advice. The prose around the generated parts is written by hand in the page itself.
"""

from __future__ import annotations

import argparse
import inspect
import io
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import objkern
from objkern.objective import Term

PAGE = Path(__file__).with_suffix(".md")
IMAGES = Path(__file__).parent / "images"


# ---- closed-form gradients ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row: (V) logits, its target, and what the closed forms need of it."""

    z: Tensor
    y: int

    @property
    def p(self) -> Tensor:
        return self.z.softmax(0)

    @property
    def p_target(self) -> Tensor:
        return self.p[self.y]

    @property
    def p_others(self) -> Tensor:
        """1 − p_y, as a sum: the difference has no digits left where p_y is near 1."""
        p = self.p.clone()
        p[self.y] = 0.0
        return p.sum()

    @property
    def classes(self) -> int:
        return self.z.numel()


# (row, term) -> ∂value/∂z_y, and (V) ∂value/∂z_j of which the tests read j ≠ y.
Gradient = Callable[[Row, Term], tuple[Tensor, Tensor]]


def through_p(a: Tensor, row: Row) -> tuple[Tensor, Tensor]:
    """For a function of p_y alone: a = −p_y ∂value/∂p_y, 1 for cross-entropy, is all that differs."""
    return -a * row.p_others, a * row.p


def everywhere(gradient: Tensor, row: Row) -> tuple[Tensor, Tensor]:
    """For a term that does not know which class is the target."""
    return gradient[row.y], gradient


def cross_entropy(row: Row, term: Term) -> tuple[Tensor, Tensor]:
    weight = torch.ones_like(row.z) if term.weight is None else term.weight
    hard, soft, own = 1 - term.parameter, term.parameter / row.classes, weight[row.y]
    target = -hard * own * row.p_others + soft * (weight.sum() * row.p_target - own)
    return target, hard * own * row.p + soft * (weight.sum() * row.p - weight)


def z_loss(row: Row, term: Term) -> tuple[Tensor, Tensor]:
    return everywhere(2 * row.z.logsumexp(0) * row.p, row)


def max_z_loss(row: Row, term: Term) -> tuple[Tensor, Tensor]:
    gradient = torch.zeros_like(row.z)
    gradient[row.z.argmax()] = 2 * row.z.max()
    return everywhere(gradient, row)


def entropy(row: Row, term: Term) -> tuple[Tensor, Tensor]:
    log_p = row.z.log_softmax(0)
    return everywhere(-row.p * (log_p - (row.p * log_p).sum()), row)


def focal(row: Row, term: Term) -> tuple[Tensor, Tensor]:
    gamma, own, others = term.parameter, row.p_target, row.p_others
    return through_p(others ** (gamma - 1) * (others - gamma * own * own.log()), row)


def poly1(row: Row, term: Term) -> tuple[Tensor, Tensor]:
    return through_p(1 + term.parameter * row.p_target, row)


def generalized_cross_entropy(row: Row, term: Term) -> tuple[Tensor, Tensor]:
    return through_p(row.p_target**term.parameter, row)


def unlikelihood(row: Row, term: Term) -> tuple[Tensor, Tensor]:
    return through_p(-row.p_target / row.p_others, row)


def margin(row: Row, term: Term) -> tuple[Tensor, Tensor]:
    lowered = row.z.clone()
    lowered[row.y] -= term.parameter
    moved = Row(lowered, row.y)
    return -moved.p_others, moved.p


def logit_l2(row: Row, term: Term) -> tuple[Tensor, Tensor]:
    return everywhere(2 * row.z / row.classes, row)


def reference(classes: int, target: int) -> Tensor:
    """Logits of a reference with a margin of 2 for the target."""
    r = torch.linspace(-1.0, 1.0, classes, dtype=torch.float64)
    r[target] = r.max() + 2.0
    return r


def kl_divergence(row: Row, term: Term) -> tuple[Tensor, Tensor]:
    t = term.parameter
    log_p, log_q = (row.z / t).log_softmax(0), (reference(row.classes, row.y) / t).log_softmax(0)
    if term.direction == "forward":
        return everywhere(t * (log_p.exp() - log_q.exp()), row)
    apart = log_p - log_q
    return everywhere(t * log_p.exp() * (apart - (log_p.exp() * apart).sum()), row)


def options(row: Row, term: Term) -> dict[str, Any]:
    """What a call of the term takes beside logits and target."""
    return {"reference": reference(row.classes, row.y)} if term.reads_reference else {}


# ---- what the docstrings do not say ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """The gallery's own text about a term. The first example is drawn; all are tested."""

    examples: tuple[Term, ...]
    gradient: Gradient
    target: str  # ∂/∂z_y in LaTeX
    others: str  # ∂/∂z_j for j ≠ y
    when: str
    where: tuple[str, str] | None = None  # a symbol of the gradients, and what it is


ENTRIES = {
    "CrossEntropy": Entry(
        examples=(
            objkern.CrossEntropy(label_smoothing=0.1),
            objkern.CrossEntropy(),
            objkern.CrossEntropy(torch.linspace(0.5, 2.0, 10, dtype=torch.float64), label_smoothing=0.1),
        ),
        gradient=cross_entropy,
        target=r"-(1 - \varepsilon)\, w_y (1 - p_y) + \tfrac{\varepsilon}{V} (W p_y - w_y)",
        others=r"(1 - \varepsilon)\, w_y\, p_j + \tfrac{\varepsilon}{V} (W p_j - w_j)",
        where=("W", r"\textstyle\sum_k w_k"),
        when="The default: without smoothing and weights it is a proper scoring rule, so its expectation is least at "
        "the true probabilities. Smoothing keeps the margin finite, which helps when labels are noisy or confidence "
        "outruns accuracy; class weights buy accuracy on rare classes; both move the optimum away from the true "
        "probabilities.",
    ),
    "ZLoss": Entry(
        examples=(objkern.ZLoss(),),
        gradient=z_loss,
        target=r"2\, \mathrm{lse}\; p_y",
        others=r"2\, \mathrm{lse}\; p_j",
        when="Cross-entropy does not see a constant added to all logits of a row, so nothing stops them from drifting "
        "to where half precision has no digits left. A small multiple, 1e-4 in PaLM, holds lse near 0 and hardly "
        "touches the probabilities.",
    ),
    "MaxZLoss": Entry(
        examples=(objkern.MaxZLoss(),),
        gradient=max_z_loss,
        target=r"2\, z_y\, [y = \mathrm{argmax}_k\, z_k]",
        others=r"2\, z_j\, [j = \mathrm{argmax}_k\, z_k]",
        when="The purpose of the z-loss, with a pull on one class per row instead of all. Prefer it where the largest "
        "logit itself must stay small, as for samplers whose repetition penalty multiplies logits, which a common "
        "offset distorts.",
    ),
    "Entropy": Entry(
        examples=(objkern.Entropy(),),
        gradient=entropy,
        target=r"-p_y\, (\log p_y + H)",
        others=r"-p_j\, (\log p_j + H)",
        when="Subtract a small multiple to keep predictions from collapsing onto one class: the confidence penalty in "
        "classification, the exploration bonus in policy gradients. Add it to sharpen predictions, also on rows "
        "without a label, since it reads no target.",
    ),
    "Focal": Entry(
        examples=(objkern.Focal(2.0), objkern.Focal(0.5), objkern.Focal(0.0)),
        gradient=focal,
        target=r"-a\, (1 - p_y)",
        others=r"a\, p_j",
        where=("a", r"(1 - p_y)^{\gamma - 1}\, (1 - p_y - \gamma\, p_y \log p_y)"),
        when="For imbalance where easy rows are so many that their small losses drown the hard ones, as background "
        "does in object detection; the paper settles on γ = 2. It is not a proper scoring rule, so recalibrate "
        "before you read its probabilities as such.",
    ),
    "Poly1": Entry(
        examples=(objkern.Poly1(2.0), objkern.Poly1(-1.0)),
        gradient=poly1,
        target=r"-(1 + \varepsilon\, p_y)\, (1 - p_y)",
        others=r"(1 + \varepsilon\, p_y)\, p_j",
        when="A knob of one number, tuned on validation data: ε > 0 pushes longer on rows that are already "
        "right, ε < 0 lets go of them earlier. The best sign depends on the task and the data.",
    ),
    "GeneralizedCrossEntropy": Entry(
        examples=(objkern.GeneralizedCrossEntropy(0.7), objkern.GeneralizedCrossEntropy(1.0)),
        gradient=generalized_cross_entropy,
        target=r"-p_y^{\,q}\, (1 - p_y)",
        others=r"p_y^{\,q}\, p_j",
        when="For labels of which a good part is wrong: a row pulls as in cross-entropy times p_y^q, so one that the "
        "model finds implausible is all but ignored. The price is a slow start, worse with many classes, because at "
        "first every p_y is small.",
    ),
    "Unlikelihood": Entry(
        examples=(objkern.Unlikelihood(),),
        gradient=unlikelihood,
        target=r"p_y",
        others=r"-\frac{p_y}{1 - p_y}\, p_j",
        when="For labels that are known to be wrong: tokens that would repeat, answers that were rejected. Evaluate it "
        "with those labels as its target, in a call of its own beside the likelihood of the right ones.",
    ),
    "Margin": Entry(
        examples=(objkern.Margin(2.0), objkern.Margin(-0.5)),
        gradient=margin,
        target=r"-(1 - p'_y)",
        others=r"p'_j",
        where=("p'", r"\mathrm{softmax}(z - m\, e_y) \quad \text{with the unit vector } e_y"),
        when="For embeddings that are compared by angle, such as faces or speakers: with normalised features and class "
        "vectors, the right class has to win by m before its gradient fades. The margin is in units of z, so m on "
        "cosines under a scale s is `Margin(s * m)`.",
    ),
    "LogitL2": Entry(
        examples=(objkern.LogitL2(),),
        gradient=logit_l2,
        target=r"\tfrac{2}{V}\, z_y",
        others=r"\tfrac{2}{V}\, z_j",
        when="A plain brake on the size of every logit, and with it on confidence, where the z-loss holds only lse. "
        "The pull grows with the logit, so it acts on outliers first; a softcap is the hard version.",
    ),
    "KLDivergence": Entry(
        examples=(
            objkern.KLDivergence("forward"),
            objkern.KLDivergence("reverse"),
            objkern.KLDivergence("forward", 2.0),
            objkern.KLDivergence("reverse", 0.5),
        ),
        gradient=kl_divergence,
        target=r"T (p_y - q_y)",
        others=r"T (p_j - q_j)",
        where=(
            r"\tfrac{\partial}{\partial z_j}\,\text{reverse}",
            r"T\, p_j \left(\log p_j - \log q_j - \mathrm{KL}(p \,\|\, q)\right)",
        ),
        when="Forward against a teacher is distillation: a T of 2 to 4 shows what the teacher knows of the wrong "
        "classes. Either direction against the model before training keeps it from forgetting; reverse is the usual "
        "penalty of policy gradients, and what lets a small student leave out what it cannot cover. Both, between two "
        "passes under dropout, are R-Drop.",
    ),
}


# ---- elementwise terms ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ElementEntry:
    """A term that compares element by element: what its docstring does not say."""

    examples: tuple[Term, ...]
    gradient: Callable[[Tensor, Tensor, Term], Tensor]  # of z and y to ∂value/∂z
    formula: str  # the same in LaTeX
    when: str
    targets: tuple[float, ...] = (0.0,)  # of the curves in the plot


def binary_cross_entropy(z: Tensor, y: Tensor, term: Term) -> Tensor:
    y = y * (1 - term.parameter) + term.parameter / 2
    a = 1.0 if term.pos_weight is None else term.pos_weight
    w = 1.0 if term.weight is None else term.weight
    return w * ((1 - y) * torch.sigmoid(z) - a * y * torch.sigmoid(-z))


ELEMENT_ENTRIES = {
    "BinaryCrossEntropy": ElementEntry(
        examples=(
            objkern.BinaryCrossEntropy(),
            objkern.BinaryCrossEntropy(label_smoothing=0.1),
            objkern.BinaryCrossEntropy(
                weight=torch.tensor([0.5], dtype=torch.float64), pos_weight=torch.tensor([3.0], dtype=torch.float64)
            ),
        ),
        gradient=binary_cross_entropy,
        formula=r"w\left((1 - y')\,\sigma(z) - a\,y'\,\sigma(-z)\right) \quad \text{which is } "
        r"\sigma(z) - y \text{ without weights and smoothing}",
        when="Each element is a question of its own: several labels at once, or one against the rest. `pos_weight` "
        "above 1 buys recall for precision; (negatives / positives) of each class balances them.",
        targets=(0.0, 1.0),
    ),
    "BernoulliEntropy": ElementEntry(
        examples=(objkern.BernoulliEntropy(),),
        gradient=lambda z, y, term: -z * torch.sigmoid(z) * torch.sigmoid(-z),
        formula=r"-z\,\sigma(z)\,\sigma(-z)",
        when="The confidence penalty of independent labels: subtract a little of it from `BinaryCrossEntropy`. Added, "
        "it sharpens, as in semi-supervised training.",
    ),
    "MeanSquaredError": ElementEntry(
        examples=(objkern.MeanSquaredError(),),
        gradient=lambda z, y, term: 2 * (z - y),
        formula=r"2\,(z - y)",
        when="Regression whose errors are of one size: it estimates the mean. An outlier of ten times the error "
        "weighs a hundred times as much; then take `Huber`.",
    ),
    "MeanAbsoluteError": ElementEntry(
        examples=(objkern.MeanAbsoluteError(),),
        gradient=lambda z, y, term: torch.sign(z - y),
        formula=r"\mathrm{sign}(z - y)",
        when="It estimates the median, so outliers do not move it; but its gradient is as large near the target as far "
        "from it, and the learning rate has to fall for the last digits.",
    ),
    "Huber": ElementEntry(
        examples=(objkern.Huber(), objkern.Huber(delta=0.3)),
        gradient=lambda z, y, term: (z - y).clamp(-term.parameter, term.parameter),
        formula=r"\max(-\delta, \min(\delta,\, z - y))",
        when="Squares near the target and absolute values far from it. δ is the error from which on an example is an "
        "outlier.",
    ),
}  # fmt: skip


def element_sections() -> str:
    links = ", ".join(f"[{name}](#{name.lower()})" for name in ELEMENT_ENTRIES)
    return "\n\n".join([f"{links}.", *(element_section(name, entry) for name, entry in ELEMENT_ENTRIES.items())])


def element_section(name: str, entry: ElementEntry) -> str:
    gradient = rf"\frac{{\partial}}{{\partial z}} = {entry.formula}"
    against = "the prediction, for each target" if len(entry.targets) > 1 else "the prediction, for a target of 0"
    return section_of(name, entry.examples[0], gradient, against, entry.when)


def draw_element(name: str, entry: ElementEntry) -> None:
    z = torch.linspace(-6.0, 6.0, 161, dtype=torch.float64)

    def curves(left: Any, right: Any) -> None:
        for target, color in zip(entry.targets, (INK, ACCENT), strict=False):
            leaf = z.clone().requires_grad_()
            value = entry.examples[0](leaf, torch.full_like(z, target), reduction="none")
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            label = repr(entry.examples[0]) + (f", y = {target:.0f}" if len(entry.targets) > 1 else "")
            left.plot(z, value.detach(), color=color, label=label)
            right.plot(z, gradient, color=color, label=f"y = {target:.0f}" if len(entry.targets) > 1 else None)

    plot(name, curves, "prediction", [-6, -3, 0, 3, 6])


# ---- docstrings as Markdown -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Docstring:
    """A term's docstring: ``eager line``, prose, "Args:" and "Source:", examples."""

    eager: str
    prose: str
    arguments: list[tuple[str, str]]
    source: str

    @classmethod
    def of(cls, term: type[Term]) -> Docstring:
        text = inspect.getdoc(term) or ""
        match = re.fullmatch(
            r"``(?P<eager>.+?)``\n\n(?P<prose>.*?)\s*(Args:\n(?P<arguments>.*?)\s*)?Source: "
            r"(?P<source>.*?)(\n\n>>> .*)?",
            text, re.DOTALL,
        )  # fmt: skip
        if match is None:
            raise SystemExit(f"{term.__name__}: the docstring should read ``eager``, prose, Args:, Source:")
        arguments = re.findall(r"^(\w+): (.*?)(?=^\w|\Z)", textwrap.dedent(match["arguments"] or ""), re.M | re.DOTALL)
        return cls(
            eager=joined(match["eager"]),
            prose=markdown(match["prose"]),
            arguments=[(name, markdown(meaning)) for name, meaning in arguments],
            source=markdown(match["source"]),
        )


def joined(text: str) -> str:
    return " ".join(text.split())


def markdown(text: str) -> str:
    """reST's double backquotes become single; what Markdown would take for markup is escaped, outside of code."""
    pieces = joined(text).replace("``", "`").split("`")
    pieces[::2] = [re.sub(r"([*|<]|(?<!\w)_|_(?!\w))", r"\\\1", piece) for piece in pieces[::2]]
    return "`".join(pieces)


def statistics_table() -> str:
    """The fields of objkern.Statistics, as its docstring defines them."""
    fields = re.findall(r"^ {4}(\w+): (.*)$", inspect.getdoc(objkern.Statistics), re.M)
    if [name for name, _ in fields] != list(objkern.Statistics._fields):
        raise SystemExit("Statistics: every field should have a line in the docstring, in order")
    rows = [f"| `{name}` | {markdown(meaning)} |" for name, meaning in fields]
    return "\n".join(["| statistic | is |", "| --- | --- |", *rows])


def term_sections() -> str:
    links = ", ".join(f"[{name}](#{name.lower()})" for name in ENTRIES)
    return "\n\n".join([f"{links}.", *(section(name, entry) for name, entry in ENTRIES.items())])


def section(name: str, entry: Entry) -> str:
    """Paragraphs are single lines: a wrapped one might begin with a "+", which Markdown takes for a list."""
    gradient = [
        rf"\frac{{\partial}}{{\partial z_y}} &= {entry.target}",
        rf"\frac{{\partial}}{{\partial z_j}} &= {entry.others}",
        *([" &= ".join(entry.where)] if entry.where else []),
    ]
    aligned = "\\begin{aligned}\n" + " \\\\\n".join(gradient) + "\n\\end{aligned}"
    return section_of(name, entry.examples[0], aligned, "the margin", entry.when)


def section_of(name: str, example: Term, gradient: str, against: str, when: str) -> str:
    doc = Docstring.of(Term.registry[name])
    facts = [f"- `{argument}`: {meaning}" for argument, meaning in doc.arguments]
    facts += [f"- **When:** {when}", f"- **Source:** {doc.source}"]
    return "\n\n".join([
        f"### {name}",
        f"`objkern.{name}({signature(Term.registry[name])})` is `{doc.eager}`",
        doc.prose,
        f"```math\n{gradient}\n```",
        f"![Value and gradient of {example!r} against {against}]({IMAGES.name}/{image(name).name})",
        "\n".join(facts),
    ])  # fmt: skip


def signature(term: type[Term]) -> str:
    if "__init__" not in vars(term):  # no arguments of its own
        return ""
    parameters = inspect.signature(term).parameters.values()
    return ", ".join(str(parameter.replace(annotation=parameter.empty)) for parameter in parameters)


def page(current: str) -> str:
    """The page with its generated parts renewed."""
    parts = {"statistics": statistics_table(), "terms": term_sections(), "elements": element_sections()}
    for part, text in parts.items():
        begin, end = f"<!-- begin {part} -->", f"<!-- end {part} -->"
        before, found, rest = current.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"{PAGE.name}: expected {begin} and {end}")
        current = f"{before}{begin}\n\n{text}\n\n{end}{after}"
    return current


# ---- plots ----------------------------------------------------------------------------------------------------------

CLASSES = 10
INK, ACCENT, PALE = "#1f4e79", "#c55a11", "#a6a6a6"


def image(name: str) -> Path:
    return IMAGES / f"{Term.registry[name].name}.svg"


def curves(term: Term) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Margins, and at each the value, the gradient to z_y and the gradient to the largest other logit."""
    margins = torch.linspace(-8.0, 8.0, 161, dtype=torch.float64)
    others = torch.linspace(-1.0, 0.0, CLASSES - 1, dtype=torch.float64).expand(len(margins), -1)
    logits = torch.cat([margins[:, None], others], dim=1).requires_grad_()
    beside = {"reference": reference(CLASSES, 0).expand_as(logits)} if term.reads_reference else {}
    value = term(logits, torch.zeros(len(margins), dtype=torch.int64), reduction="none", **beside)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return margins, value.detach(), gradient[:, 0], gradient[:, -1]


def draw(name: str, term: Term) -> None:
    def lines(left: Any, right: Any) -> None:
        if term.target != "none":
            margins, value, own, _ = curves(objkern.CrossEntropy())
            left.plot(margins, value, color=PALE, linewidth=1.0, label="CrossEntropy()")
            right.plot(margins, own, color=PALE, linewidth=1.0, label="CrossEntropy(), target")
        margins, value, own, other = curves(term)
        left.plot(margins, value, color=INK, label=repr(term))
        right.plot(margins, own, color=INK, label="target")
        right.plot(margins, other, color=ACCENT, label="largest other", linestyle=(0, (4, 1.5)))

    plot(name, lines, "margin", [-8, -4, 0, 4, 8])


def plot(name: str, lines: Callable[[Any, Any], None], variable: str, ticks: list[int]) -> None:
    """Value and gradient side by side; `lines` draws on the two axes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    style = {
        "svg.hashsalt": name, "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"], "font.size": 8,
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#808080", "axes.linewidth": 0.6,
        "axes.titlesize": 8, "axes.titlelocation": "left", "lines.linewidth": 1.5, "legend.frameon": False,
        "legend.fontsize": 7, "xtick.color": "#404040", "ytick.color": "#404040",
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=(6.8, 2.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        lines(left, right)
        left.set_title("value")
        right.set_title("gradient")
        for axes in (left, right):
            axes.axhline(0.0, color="#d0d0d0", linewidth=0.6, zorder=0)
            axes.axvline(0.0, color="#d0d0d0", linewidth=0.6, zorder=0)
            axes.set_xlabel(variable)
            axes.set_xticks(ticks)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="best")
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    # Six decimals of a point are half of the file.
    text = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", svg.getvalue())
    image(name).write_text(re.sub(r" +$", "", text, flags=re.M), encoding="utf-8")


# ---- command line ---------------------------------------------------------------------------------------------------


def check_entries() -> None:
    entries = {*ENTRIES, *ELEMENT_ENTRIES}
    missing, unknown = sorted(set(Term.registry) - entries), sorted(entries - set(Term.registry))
    if missing or unknown:
        raise SystemExit(f"ENTRIES: terms without an entry: {missing}; entries without a term: {unknown}")


def problems() -> list[str]:
    """Why the page is stale; empty if it is not."""
    check_entries()
    text = PAGE.read_text(encoding="utf-8")
    found = [] if page(text) == text else [f"{PAGE.name} is stale: run make docs"]
    return found + [f"{image(name)} is missing" for name in (*ENTRIES, *ELEMENT_ENTRIES) if not image(name).is_file()]


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the generated parts of docs/objectives.md.")
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is stale")
    if parser.parse_args().check:
        found = problems()
        print("\n".join(found) or f"{PAGE.name} is up to date")
        return 1 if found else 0
    check_entries()
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    IMAGES.mkdir(exist_ok=True)
    for name, entry in ENTRIES.items():
        draw(name, entry.examples[0])
    for name, entry in ELEMENT_ENTRIES.items():
        draw_element(name, entry)
    return 0


if __name__ == "__main__":
    sys.exit(main())
