"""Tables of results, in Markdown that is also readable in a terminal. No torch: the report needs none."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from . import figures, peers
from .figures import Entry, Interval

Form = Callable[[float], str]

MARK = "✗"  # a missed target


def every(entries: list[Entry]) -> Iterator[tuple[str, str]]:
    """Title and table, for each kind of benchmark that was run."""
    steps = of_kind(entries, "step")
    for title in TIMES:
        if chosen := [entry for entry in steps if entry["workload"] == title.lower()]:
            yield title, times(chosen)
    for title, (name, make) in OF_STEPS.items():
        if chosen := [entry for entry in steps if (name in entry["ratio"] if name else peers_of(entry))]:
            yield title, make(chosen)
    for kind, (title, make) in OF_KIND.items():
        if chosen := of_kind(entries, kind):
            yield title, make(chosen)
    if chosen := [entry for entry in entries if entry.get("errors")]:
        yield ERRORS, errors(chosen)


def of_kind(entries: list[Entry], kind: str) -> list[Entry]:
    return [entry for entry in entries if entry["kind"] == kind]


def times(entries: list[Entry]) -> str:
    """A line for each shape, and one more where half-precision logits go through float32."""
    price = any(figures.figure(entry, "price") for entry in entries)
    header = ["logits", "from", "eager", "compiled", "objkern", "eager / objkern", "compiled / objkern", "GB/s"]
    header += ["of a copy", "price"] if price else ["of a copy"]
    lines = []
    for entry in entries:
        line = [
            logits(entry), entry["why"], time(entry, "eager"), time(entry, "compiled"), time(entry, "objkern"),
            ratio(entry, "eager"), ratio(entry, "compiled"),
            f"{figures.gb_per_second(entry, 'objkern'):.1f}", ratio(entry, "copy", percent),
        ]  # fmt: skip
        lines.append(line + ([ratio(entry, "price")] if price else []))
        if "eager, float32" in entry["seconds"]:
            line = [
                f"{logits(entry)}, `.float()`", "", time(entry, "eager, float32"),
                time(entry, "compiled, float32"), '"', ratio(entry, "eager, float32"),
                ratio(entry, "compiled, float32"), "", "",
            ]  # fmt: skip
            lines.append(line + ([""] if price else []))
    return table(header, lines)


def forward(entries: list[Entry]) -> str:
    name = "objkern, forward"
    return table(["logits", "objective", "backward", "forward", "forward / backward", "GB/s", "of a copy"], [
        [
            logits(entry), entry["workload"], time(entry, "objkern"),
            time(entry, name), ratio(entry, name),
            f"{figures.gb_per_second(entry, name):.1f}",
            percent(figures.gb_per_second(entry, name) / figures.copy_gb_per_second(entry)),
        ]
        for entry in entries
    ])  # fmt: skip


def reuse(entries: list[Entry]) -> str:
    name = "objkern, fresh pages"
    return table(["logits", "memory reused", "fresh pages", "fresh / reused", "kept between steps"], [
        [
            logits(entry), time(entry, "objkern"), time(entry, name),
            ratio(entry, name), megabytes(entry["kept_bytes"]),
        ]
        for entry in entries
    ])  # fmt: skip


def drop_in(entries: list[Entry]) -> str:
    """On small shapes, where a call costs more than its arithmetic."""
    names = ["eager", "objkern.cross_entropy", "objkern"]
    return table(["logits", "torch.nn.functional.cross_entropy", *names[1:], "drop-in / objkern"], [
        [logits(entry), *(time(entry, name) for name in names), ratio(entry, "objkern.cross_entropy")]
        for entry in entries
    ])  # fmt: skip


def instruction_sets(entries: list[Entry]) -> str:
    names = [name for name in ("avx512", "avx2", "default") if name in entries[0]["seconds"]]
    header = ["logits", "objective", *names, *(f"{name}: speed" for name in names[1:])]
    return table(header, [
        [
            logits(entry), entry["workload"], *(time(entry, name) for name in names),
            *(
                ratio(entry, "avx2", percent) if name == "avx2"
                else interval(figures.inverse(entry["ratio"][name]), percent)
                for name in names[1:]
            ),
        ]
        for entry in entries
    ])  # fmt: skip


def memory(entries: list[Entry]) -> str:
    return table(["logits", "objective", "contestant", "forward", "forward and backward"], [
        [
            f"{logits(entry)}, {megabytes(logits_bytes(entry))}", entry["workload"], name,
            megabytes(forward) + (marked(entry, "forward_mb") if name == "objkern" else ""), megabytes(both),
        ]
        for entry in entries for name, (forward, both) in entry["bytes"].items()
    ])  # fmt: skip


def linearity(entries: list[Entry]) -> str:
    names = list(dict.fromkeys(name for entry in entries for name in entry["seconds"]))
    return table(["logits", *names], [[logits(entry), *(time(entry, name) for name in names)] for entry in entries])


def errors(entries: list[Entry]) -> str:
    """Of loss and gradient; columns for those who take part everywhere, and one for the others."""
    names = ["eager", "compiled", "objkern", "objkern, forward"]

    def cell(error: list[float]) -> str:
        return "{:.0e}, {:.0e}".format(*error)

    def of(entry: Entry) -> dict[str, list[float]]:
        """By contestant; where there is one for each number of terms, the largest."""
        if "terms" not in entry:
            return entry["errors"]
        several = {who: [e for name, e in entry["errors"].items() if name.startswith(f"{who}, ")] for who in names}
        return {who: [max(column) for column in zip(*some, strict=True)] for who, some in several.items() if some}

    return table(["benchmark", "objective", *names, "others"], [
        [
            f"{entry['kind']}, {place(entry)}", entry["workload"],
            *(cell(of(entry)[name]) if name in of(entry) else "" for name in names),
            "; ".join(f"{name}: {cell(error)}" for name, error in of(entry).items() if name not in names),
        ]
        for entry in entries
    ])  # fmt: skip


def peers_of(entry: Entry) -> list[str]:
    """Other libraries that took part, or could not."""
    return [name for name in [*entry["seconds"], *entry.get("failed", {})] if name in peers.NAMES]


def others(entries: list[Entry]) -> str:
    return table(["logits", "library", "its time", "objkern", "its time / objkern's", "why it failed"], [
        [logits(entry), name, time(entry, name), time(entry, "objkern"), ratio(entry, name),
         entry.get("failed", {}).get(name, "")]
        for entry in entries for name in peers_of(entry)
    ])  # fmt: skip


def linear(entries: list[Entry]) -> str:
    names = ["eager", "compiled", "torch, chunked", "objkern", "objkern, recompute", "GEMMs alone"]
    names += sorted({name for entry in entries for name in peers_of(entry)})
    header = ["rows × features × classes", "objective", *names, "eager / objkern", "chunked / objkern", "of the GEMMs"]
    return table(header, [
        [
            layer(entry), entry["workload"],
            *(time(entry, name) or entry.get("failed", {}).get(name, "") for name in names),
            ratio(entry, "eager"), ratio(entry, "chunked"), ratio(entry, "GEMMs alone", percent),
        ]
        for entry in entries
    ])  # fmt: skip


def linear_memory(entries: list[Entry]) -> str:
    header = ["rows × features × classes", "objective", "contestant", "forward and backward", "beyond the gradients"]
    return table(header, [
        [
            layer(entry), entry["workload"], name,
            megabytes(count) + (marked(entry, "memory_share") if name == "objkern" else ""),
            megabytes(figures.beyond_gradients(entry, name)),
        ]
        for entry in entries for name, count in entry["bytes"].items()
    ])  # fmt: skip


def linear_law(entries: list[Entry]) -> str:
    """Beyond the gradients, in forward and in recompute mode: a line for each number of classes."""
    rows = sorted({entry["rows"] for entry in entries})
    lines = []
    for classes in sorted({entry["classes"] for entry in entries}):
        found = {entry["rows"]: entry for entry in entries if entry["classes"] == classes}
        cells = [
            " / ".join(megabytes(figures.beyond_gradients(found[n], name)) for name in found[n]["bytes"])
            + marked(found[n], "beyond_gradients_mb")
            if n in found
            else ""
            for n in rows
        ]
        lines.append([str(classes), *cells])
    return table(["classes", *(f"{n} rows" for n in rows)], lines)


def elementwise(entries: list[Entry]) -> str:
    names = ["eager", "compiled", "objkern", "objkern, forward"]
    return table(["elements", "objective", *names, "eager / objkern", "compiled / objkern"], [
        [
            logits(entry), entry["workload"], *(time(entry, name) for name in names),
            ratio(entry, "eager"), ratio(entry, "compiled"),
        ]
        for entry in entries
    ])  # fmt: skip


def six_terms(entries: list[Entry]) -> str:
    names = ["eager", "objkern, plain", "objkern", "objkern, plain, forward", "objkern, forward"]
    return table(["logits", *names, "eager / objkern", "price"], [
        [logits(entry), *(time(entry, name) for name in names), ratio(entry, "eager"), ratio(entry, "price")]
        for entry in entries
    ])  # fmt: skip


def penalties(entries: list[Entry]) -> str:
    return table(["parameters", "term", "eager", "objkern", "eager / objkern"], [
        [
            f"{entry['classes'] / 1e6:.1f} M {entry['dtype']}", entry["workload"], time(entry, "eager"),
            time(entry, "objkern"), ratio(entry, "eager"),
        ]
        for entry in entries
    ])  # fmt: skip


def finetune_steps(entries: list[Entry]) -> str:
    header = ["model", "tokens", "classes", "objective", "loss by", "a step", "tokens/s", "others / objkern", "memory"]
    return table(header, [
        [
            f"{entry['training']}: {entry['why']}", str(entry["rows"]), str(entry["classes"]), entry["workload"], name,
            time(entry, name), f"{entry['rows'] / entry['seconds'][name][1]:,.0f}", ratio(entry, name),
            megabytes(entry["bytes"][name]) if name in entry["bytes"] else "",
        ]
        for entry in entries for name in ("stock", "eager", "objkern") if name in entry["seconds"]
    ])  # fmt: skip


def added_terms(entries: list[Entry]) -> str:
    """Everyone's time for the first term alone is 1."""
    lines = []
    for entry in entries:
        for number, term in enumerate(entry["terms"], 1):
            names = [f"{who}, {number}" for who in ("eager", "objkern")]
            price = [entry["seconds"][name][1] / entry["seconds"][name.split(",")[0] + ", 1"][1] for name in names]
            lines.append([logits(entry), term, *(time(entry, name) for name in names), *map(digits, price)])
    return table(["logits", "objective", "eager", "objkern", "eager, relative", "objkern, relative"], lines)


def overhead(entries: list[Entry]) -> str:
    """A line for each way to call."""
    return table(["call", "inputs", "by", "forward and backward", "eager / it"], [
        [
            entry["workload"], logits(entry), name, time(entry, name),
            "" if name == "eager" else ratio(entry, "eager") if name == "objkern"
            else digits(entry["seconds"]["eager"][1] / entry["seconds"][name][1]),
        ]
        for entry in entries for name in entry["seconds"]
    ])  # fmt: skip


def seconds(entries: list[Entry]) -> str:
    return table(["what", "median", "20 %", "80 %"], [
        [name, milliseconds(median), milliseconds(low), milliseconds(high)]
        for entry in entries for name, (low, median, high) in entry["seconds"].items()
    ])  # fmt: skip


def floors(entries: list[Entry]) -> str:
    return table(["on one core", "objective", "objkern", "yardstick", "processes"], [
        [
            logits(entry), entry["workload"],
            *(milliseconds(min(entry["times"][name])) for name in ("objkern", "yardstick")), str(entry["rounds"]),
        ]
        for entry in entries
    ])  # fmt: skip


def over_classes(entries: list[Entry]) -> str:
    return table(["logits", "logits alone", "eager", "objkern", "eager / objkern"], [
        [
            logits(entry), megabytes(logits_bytes(entry)),
            *(" / ".join(map(megabytes, entry["bytes"][name])) for name in ("eager", "objkern")),
            digits(entry["bytes"]["eager"][1] / entry["bytes"]["objkern"][1]),
        ]
        for entry in sorted(entries, key=lambda entry: entry["classes"])
    ])  # fmt: skip


TIMES = ("Plain", "Regularized")  # of steps, by workload
OF_STEPS: dict[str, tuple[str | None, Callable[[list[Entry]], str]]] = {  # with whom took part; None: other libraries
    "Other libraries": (None, others),
    "Gradient in the forward pass": ("objkern, forward", forward),
    "What reuse of the gradient's memory buys": ("objkern, fresh pages", reuse),
    "The drop-in, objkern.cross_entropy": ("objkern.cross_entropy", drop_in),
}
OF_KIND: dict[str, tuple[str, Callable[[list[Entry]], str]]] = {
    "instruction set": ("Instruction sets", instruction_sets),
    "memory": ("Memory", memory),
    "memory over classes": ("Memory over the number of classes", over_classes),
    "linearity": ("Time over size", linearity),
    "linear": ("The fused linear path", linear),
    "linear memory": ("Memory of the fused linear path", linear_memory),
    "linear memory law": ("Memory of the fused linear path over the number of rows", linear_law),
    "elementwise": ("Elementwise objectives", elementwise),
    "divergence": ("Divergence from a reference", elementwise),
    "six terms": ("Six terms", six_terms),
    "added terms": ("One term more, and one more", added_terms),
    "penalty": ("Terms on parameters", penalties),
    "finetune step": ("Whole steps of fine-tuning", finetune_steps),
    "overhead": ("What a call costs", overhead),
    "import": ("Importing", seconds),
    "first call": ("The first call of a process", seconds),
    "build": ("Building", seconds),
    "floor": ("Least times, for bench compare", floors),
}
ERRORS = "Errors against float64"
TITLES = (*TIMES, *OF_STEPS, *(title for title, _ in OF_KIND.values()), ERRORS)  # in the order of `every`


# ---- cells ----------------------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns are padded, for those who read the source."""
    widths = [max(3, *(len(line[i]) for line in [header, *rows])) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def logits(entry: Entry) -> str:
    return f"{entry['rows']} × {entry['classes']} {entry['dtype']}"


def place(entry: Entry) -> str:
    return layer(entry) if "features" in entry else logits(entry)


def layer(entry: Entry) -> str:
    return f"{entry['rows']} × {entry['features']} × {entry['classes']} {entry['dtype']}"


def logits_bytes(entry: Entry) -> int:
    return entry["rows"] * entry["classes"] * (4 if entry["dtype"] == "float32" else 2)


def time(entry: Entry, name: str) -> str:
    """The median; nothing for who did not take part."""
    return milliseconds(entry["seconds"][name][1]) if name in entry["seconds"] else ""


def ratio(entry: Entry, name: str, form: Form | None = None) -> str:
    found = figures.figure(entry, name)
    return interval(found, form or digits) + marked(entry, name) if found else ""


def marked(entry: Entry, name: str) -> str:
    return f" {MARK} {figures.bound(entry, name)}" if figures.misses(entry, name) else ""


def interval(found: Interval, form: Form) -> str:
    low, median, high = map(form, found)
    return f"**{median}** [{low}, {high}]"


def digits(x: float) -> str:
    return f"{x:.2f}" if x < 10 else f"{x:.1f}"


def percent(x: float) -> str:
    return f"{100 * x:.0f} %"


def milliseconds(seconds: float) -> str:
    """Three digits."""
    value = seconds * 1e3
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f} ms"


def megabytes(count: float) -> str:
    value = count / 1e6
    return f"{value:.1f} MB" if value < 10 else f"{value:.0f} MB"
