"""Reading SASS: functions, the graph of their jumps, the innermost loops, and the shortest way round one.

A kernel's common path is not a span of addresses: the compiler moves rare blocks elsewhere and jumps back. So the loops
here are natural loops of the control-flow graph, and what a turn costs is the shortest way round that still makes the
most of the accesses in question, which is the one where nothing rare comes up.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;|^(\.L_\w+):", re.M)
_JUMP = re.compile(r"\b(?:BRA|BSYNC|EXIT|RET|BRX|JMP)\b")
_PREDICATE = r"(?:@!?U?P\w+ +)?"


class Graph(NamedTuple):
    blocks: list[list[str]]  # instructions
    after: list[list[int]]  # where each block may go on


class Loop(NamedTuple):
    graph: Graph
    head: int
    body: list[int]  # in an order that follows the jumps

    @property
    def instructions(self) -> list[str]:
        return [text for block in self.body for text in self.graph.blocks[block]]

    def turn(self, pattern: str) -> tuple[list[str], int]:
        """The shortest way round of those with most instructions of a pattern, and how many it has."""
        ways: dict[int, dict[int, tuple[int, list[int]]]] = {self.head: {0: (0, [])}}
        done: dict[int, tuple[int, list[int]]] = {}
        for block in self.body:
            text = self.graph.blocks[block]
            for found, (cost, way) in ways.get(block, {}).items():
                key, new = found + count(text, pattern), (cost + len(text), [*way, block])
                for follower in self.graph.after[block]:
                    if follower == self.head:
                        to = done
                    elif follower in self.body:
                        to = ways.setdefault(follower, {})
                    else:
                        continue
                    if key not in to or new[0] < to[key][0]:
                        to[key] = new
        most = max(done)
        return [text for block in done[most][1] for text in self.graph.blocks[block]], most


def count(instructions: list[str], pattern: str) -> int:
    return sum(re.match(_PREDICATE + pattern, text) is not None for text in instructions)


def functions(cubin: Path, nvdisasm: str, wanted: str) -> dict[str, str]:
    """SASS of the functions whose name matches; disassembling those alone takes a fraction of the time."""

    def run(*command: object) -> str:
        return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout

    symbols = re.findall(r"^ *(\d+): .* FUNC .* (\S+)$", run("readelf", "-sW", cubin), re.M)
    chosen = {name: index for index, name in symbols if re.search(wanted, name) and not name.startswith("$")}
    parts = re.split(r"^\.text\.(\S+):$", run(nvdisasm, "-c", "-fun", ",".join(chosen.values()), cubin), flags=re.M)
    return {name: body for name, body in zip(parts[1::2], parts[2::2], strict=True) if name in chosen}


def graph_of(sass: str) -> Graph:
    blocks: list[list[str]] = [[]]
    after: list[list[int]] = [[]]
    labels: dict[str, int] = {}
    targets: list[tuple[int, str]] = []
    joins: dict[int, str] = {}  # blocks that end in BSYNC: its barrier register

    def close(falls_through: bool) -> None:
        if falls_through:
            after[-1].append(len(blocks))
        blocks.append([])
        after.append([])

    for text, label in _LINE.findall(sass):
        if label:
            if blocks[-1]:
                close(True)
            labels[label] = len(blocks) - 1
            continue
        blocks[-1].append(text)
        jump = _JUMP.search(text)
        if jump is None:
            continue
        if jump[0] == "BSYNC":
            joins[len(blocks) - 1] = re.search(r"BSYNC\S* (B\d+)", text)[1]
        elif target := re.search(r"`\((\.L_\w+)\)", text):
            targets.append((len(blocks) - 1, target[1]))
        close(text.startswith("@") or re.search(r"BRA\S*\s+!?U?P\d", text) is not None)
    for block, label in targets:
        if label in labels:
            after[block].append(labels[label])
    after = [[follower for follower in followers if follower < len(blocks)] for followers in after]
    _join(blocks, after, labels, joins)
    return Graph(blocks, after)


def _join(blocks: list[list[str]], after: list[list[int]], labels: dict[str, int], joins: dict[int, str]) -> None:
    """BSYNC goes on at the label that the BSSY named which is in force there: flow that to every block."""
    entry: list[dict[str, frozenset[str]]] = [{} for _ in blocks]
    work, seen = [0], {0}
    while work:
        block = work.pop()
        state = dict(entry[block])
        for text in blocks[block]:
            if named := re.search(r"BSSY\S* (B\d+), `\((\.L_\w+)\)", text):
                state[named[1]] = frozenset([named[2]])
        for label in state.get(joins.get(block, ""), ()):
            if labels[label] not in after[block]:
                after[block].append(labels[label])
        for follower in after[block]:
            merged = {
                k: entry[follower].get(k, frozenset()) | state.get(k, frozenset()) for k in entry[follower] | state
            }
            if merged != entry[follower] or follower not in seen:
                seen.add(follower)
                entry[follower] = merged
                work.append(follower)


def innermost_loops(graph: Graph) -> list[Loop]:
    order = _reverse_postorder(graph)
    before = defaultdict(list)
    for block in order:
        for follower in graph.after[block]:
            before[follower].append(block)
    above = _dominators(order, before)
    bodies: dict[int, set[int]] = {}
    for block in order:
        for head in graph.after[block]:
            up = block
            while up not in (head, 0):
                up = above[up]
            if up != head:
                continue
            body, rest = bodies.setdefault(head, {head}), [block]
            while rest:
                if (one := rest.pop()) not in body:
                    body.add(one)
                    rest += before[one]
    return [
        Loop(graph, head, [block for block in order if block in body])
        for head, body in bodies.items()
        if not (body - {head}) & bodies.keys()
    ]


def _reverse_postorder(graph: Graph) -> list[int]:
    seen, post, stack = {0}, [], [(0, iter(graph.after[0]))]
    while stack:
        block, rest = stack[-1]
        follower = next((one for one in rest if one not in seen), None)
        if follower is None:
            post.append(block)
            stack.pop()
        else:
            seen.add(follower)
            stack.append((follower, iter(graph.after[follower])))
    return post[::-1]


def _dominators(order: list[int], before: dict[int, list[int]]) -> dict[int, int]:
    """Immediate dominators. Source: Cooper, Harvey and Kennedy 2001, "A Simple, Fast Dominance Algorithm"."""
    place = {block: i for i, block in enumerate(order)}
    above, changed = {0: 0}, True
    while changed:
        changed = False
        for block in order[1:]:
            known = [one for one in before[block] if one in above]
            common = known[0]
            for other in known[1:]:
                while common != other:
                    if place[common] < place[other]:
                        other = above[other]
                    else:
                        common = above[common]
            if above.get(block) != common:
                above[block], changed = common, True
    return above
