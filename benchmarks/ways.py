"""Paths through a kernel's machine code: its blocks and loops, and the shortest path for each amount of work.

The only instructions that this module understands are branches; sass.py interprets the others.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_\w+)\)|\b(0x[0-9a-f]+)\b")
_CONDITION = re.compile(r"\bU?P\d|\bUR(\d|Z)")
_BRANCHES = ("BRA", "BRX", "JMP")
_ENDS = ("EXIT", "RET", "KILL")


class Graph:
    """The basic blocks of a kernel (instructions without a branch, call or exit between them), and its loops.

    Attributes:
        blocks: the instructions of each block.
        after: the successors of each reachable block.
        loops: for the first block of each loop, the blocks of the loop. The largest loop comes first.
    """

    def __init__(self, text: str):
        instructions, places = _listing(text)
        starts = _starts(instructions, places)
        number = {start: block for block, start in enumerate(starts)}
        self.blocks = [instructions[a:b] for a, b in zip(starts, [*starts[1:], len(instructions)], strict=True)]
        self.after: dict[int, list[int]] = {}
        waiting = [0]
        while waiting:  # only reachable blocks: code for diverged warps is left out
            block = waiting.pop()
            if block not in self.after:
                last = starts[block] + len(self.blocks[block]) - 1
                self.after[block] = [number[i] for i in _successors(instructions, last, places)]
                waiting += self.after[block]
        self.loops = self._find_loops()

    def _find_loops(self) -> dict[int, set[int]]:
        before: dict[int, set[int]] = {block: set() for block in self.after}
        for block, successors in self.after.items():
            for successor in successors:
                before[successor].add(block)
        every_way = _dominators(before)
        loops: dict[int, set[int]] = {}
        for block, successors in self.after.items():
            for first in every_way[block].intersection(successors):
                inside, waiting = loops.setdefault(first, {first}), [block]
                while waiting:
                    found = waiting.pop()
                    if found not in inside:
                        inside.add(found)
                        waiting += before[found]
        return dict(sorted(loops.items(), key=lambda loop: -len(loop[1])))


def _listing(text: str) -> tuple[list[str], dict[str, int]]:
    """Return the instructions, and the positions of labels and addresses among them."""
    instructions: list[str] = []
    places: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            places[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            places[hex(int(found[1], 16))] = len(instructions)
            instructions.append(found[2])
    return instructions, places


def _starts(instructions: list[str], places: dict[str, int]) -> list[int]:
    """Return the positions where blocks begin: at the start, after each branch, call and exit, and at their targets."""
    starts = {0}
    for i, instruction in enumerate(instructions):
        if opcode(instruction) in (*_BRANCHES, *_ENDS, "CALL"):
            starts.update((i + 1, *_targets(instruction, places)))
    return sorted(starts & {*range(len(instructions))})


def _successors(instructions: list[str], i: int, places: dict[str, int]) -> list[int]:
    """Return the possible successors of an instruction. A branch for diverged warps is assumed never to be taken. A
    call is assumed to return to the next instruction. Compilers also use a conditional call as a branch, so its target
    and the next instruction are both successors."""
    instruction, name = instructions[i], opcode(instructions[i])
    following = [i + 1] if i + 1 < len(instructions) else []
    guarded = instruction.startswith("@")
    if name in _ENDS:
        return following if guarded else []
    if (name in _BRANCHES and ".DIV" not in instruction) or (name == "CALL" and guarded):
        sometimes = guarded or _CONDITION.search(instruction.partition(" ")[2])
        return _targets(instruction, places) + (following if sometimes else [])
    return following


def _targets(instruction: str, places: dict[str, int]) -> list[int]:
    return [places[label or address] for label, address in _TARGET.findall(instruction) if (label or address) in places]


@functools.cache
def opcode(instruction: str) -> str:
    """Return the opcode, without guard and modifiers."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].partition(".")[0]


def _dominators(before: dict[int, set[int]]) -> dict[int, set[int]]:
    """For each block, return the blocks on every path from the first block to it, including the block itself."""
    found = {block: {*before} if block else {0} for block in before}
    changed = True
    while changed:
        changed = False
        for block in sorted(before):
            if block:
                now = {block} | set.intersection(*(found[other] for other in before[block]))
                changed |= now != found[block]
                found[block] = now
    return found


class Way(NamedTuple):
    """A path through a kernel or one iteration of a loop. Its steps are nodes: blocks, or whole inner loops. Its length
    is the sum of the nodes' lengths (see `worth` in `shortest`)."""

    length: int
    steps: tuple[int, ...]


Worth = tuple[float, int]  # two numbers that add up along a path


def shortest(
    begin: int, after: dict[int, set[int]], ends: set[int], worth: Callable[[int], tuple[Worth, int]]
) -> dict[Worth, Way]:
    """Return the shortest path from a node to any end, for each amount of work that a path may do. `worth` returns a
    node's work and length."""
    found: dict[int, dict[Worth, Way]] = {}
    for node in _last_first(begin, after):
        work, length = worth(node)
        ways: dict[Worth, Way] = {work: Way(length, (node,))} if node in ends else {}
        for other in sorted(after[node]):
            for more, way in found.get(other, {}).items():
                both = work[0] + more[0], work[1] + more[1]
                if both not in ways or length + way.length < ways[both].length:
                    ways[both] = Way(length + way.length, (node, *way.steps))
        found[node] = ways
    assert found[begin], "a loop without a path back, or a program without an end"
    return found[begin]


def _last_first(begin: int, after: dict[int, set[int]]) -> Iterator[int]:
    """Yield every reachable node after its successors."""
    seen, open_nodes = {begin}, [(begin, iter(sorted(after[begin])))]
    while open_nodes:
        node, followers = open_nodes[-1]
        unseen = next((other for other in followers if other not in seen), None)
        if unseen is None:
            open_nodes.pop()
            yield node
        else:
            seen.add(unseen)
            open_nodes.append((unseen, iter(sorted(after[unseen]))))
