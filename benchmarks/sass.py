"""What a compiled kernel makes a multiprocessor do, read from its machine code (SASS): no GPU has to be here.

`program` reads a cubin by Triton's nvdisasm, `programs` every kernel of a CUDA module by cuobjdump. A program is a
region of code: what one warp executes once, and the loops on its way, which are regions again.

    issue slots of a tile     instructions of the loop for a warp, times the program's warps, over 4: a multiprocessor
                              has 4 schedulers, and each issues an instruction of one warp in a cycle
    tensor cycles of a tile   its flops over those that the matrix units of a multiprocessor do in a cycle (chips.py)

The tile cannot take fewer cycles than either. Where code branches, a region counts the way that meets the most work of
the matrix units, and among those ways the shortest: masks that few tiles need, spin-waits, slow paths of a division and
code for diverged warps are left out. `most` is the longest of those ways, which a tile that needs its mask may take.
Instructions under a predicate count, since they are issued whether or not they do anything.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from .ways import Graph, Way, opcode, shortest

SCHEDULERS = 4  # of a multiprocessor
_KINDS = {
    "tensor": "HMMA HGMMA QGMMA IMMA IGMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA",
    "exp": "MUFU",  # exponentials, logarithms, reciprocals
    "shared": "LDS LDSM STS STSM ATOMS LDGSTS",
    "shuffle": "SHFL REDUX MATCH",
    "barrier": "BAR",  # all warps of the program meet
    "drain": "WARPGROUP.DEPBAR",  # until a warpgroup's products are done
    "wait": "DEPBAR WARPGROUP SYNCS LDGDEPBAR ARRIVES WARPSYNC FENCE MEMBAR NANOSLEEP UTCBAR",
    "branch": "BRA BRX JMP BSSY BSYNC BREAK CALL RET EXIT",
    "global": "LDG STG LD ST RED ATOM ATOMG LDL STL LDC ULDC LDCU",
    "tensor memory": "LDTM STTM",
    "fma": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 IMAD HADD2 HMUL2 HFMA2",
    "alu": "FSEL FSETP FMNMX FMNMX3 ISETP IADD IADD3 VIADD IMNMX VIMNMX LEA LOP3 SHF SEL PRMT PLOP3 F2FP F2F I2F F2I "
    "I2FP SGXT BMSK MOV P2R R2P FLO POPC",
}
_KIND_OF = {opcode: kind for kind, opcodes in _KINDS.items() for opcode in opcodes.split()}

_WARPGROUP_SHAPE = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")
_WARP_DEPTH = re.compile(r"HMMA\.168(8|16)")  # 16 rows, 8 columns, and as many features


class Region(NamedTuple):
    """A program or a loop of it: what a warp executes once beside its inner loops, by kind; cycles in which that moves
    128 bytes of shared memory, or shuffles; flops of the matrix units for a warp; the inner loops, in order;
    instructions of the longest way, an inner loop counted once; and, for each number of matrix instructions that a way
    beside the inner loops may meet, the fewest instructions beside them.

    Products by tcgen05 are not in `shared` and `flops`: the machine code does not name their shape."""

    counts: Counter[str]
    shared: float
    flops: float
    inner: tuple[Region, ...]
    most: int
    ways: dict[int, int]

    @property
    def instructions(self) -> int:
        """What a warp issues beside inner loops."""
        return self.counts.total()

    @property
    def tensor(self) -> int:
        """Matrix instructions, an inner loop counted once."""
        return self.counts["tensor"] + sum(loop.tensor for loop in self.inner)

    @property
    def work(self) -> tuple[float, int]:
        """Flops (of tcgen05: matrix instructions) and exponentials, an inner loop counted once."""
        products = (self.flops or self.counts["tensor"]) + sum(loop.work[0] for loop in self.inner)
        return products, self.counts["exp"] + sum(loop.work[1] for loop in self.inner)

    @property
    def loop(self) -> Region | None:
        """The inner loop with the most work, of equals the one with the fewest instructions; None without products."""
        busy = [loop for loop in self.inner if loop.tensor]
        return max(
            busy, key=lambda loop: (loop.work, -loop.total([], lambda region: region.instructions)), default=None
        )

    @property
    def depth(self) -> int:
        """Loops from here to the innermost of the busiest."""
        return 0 if self.loop is None else 1 + self.loop.depth

    @property
    def main(self) -> Region:
        """The innermost of the busiest loops: a tile, or a chunk of its features."""
        return self if self.loop is None else self.loop.main

    def slots(self, num_warps: int) -> float:
        """Issue slots that a program's warps take of each scheduler."""
        return self.instructions * num_warps / SCHEDULERS

    def total(self, trips: Iterable[float], of: Callable[[Region], float]) -> float:
        """A figure of all that is executed, where the busiest loop, the busiest in it and so on make these trips. Loops
        without products make one, others (tiles with a mask) none."""
        first, *rest = trips = [*trips] or [1.0]
        found = of(self)
        for loop in self.inner:
            if loop is self.loop:
                found += first * loop.total(rest, of)
            elif not loop.tensor:
                found += loop.total([], of)
        return found


def tool(name: str) -> Path:
    """A program that Triton ships: nvdisasm, cuobjdump."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def program(cubin: bytes) -> Region:
    """The only kernel of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    return parse(text)


def programs(module: Path, chip: str) -> dict[str, Region]:
    """Every kernel of a module for a chip, by its (mangled) name."""
    command = [tool("cuobjdump"), "-sass", "-arch", chip, module]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)[1:]
    return {name: parse(code) for name, code in zip(parts[::2], parts[1::2], strict=True)}


def parse(text: str) -> Region:
    """A kernel, from what nvdisasm -c or cuobjdump -sass print of it."""
    return _region(Graph(text), None)


def _region(graph: Graph, first: int | None) -> Region:
    """The loop that begins with a block, or the whole program."""
    members = {*graph.after} if first is None else graph.loops[first]
    begin = 0 if first is None else first
    node_of = {block: block for block in members}  # a block, or the first of the inner loop that has it
    inner: dict[int, Region] = {}
    for other, inside in graph.loops.items():
        if other != first and inside <= members and node_of[other] == other and other not in inner:
            inner[other] = _region(graph, other)
            node_of.update(dict.fromkeys(inside, other))
    after: dict[int, set[int]] = {node: set() for node in node_of.values()}
    ends: set[int] = set()
    for block, node in node_of.items():
        followers = graph.after[block]
        if opcode(graph.blocks[block][-1]) == "EXIT" if first is None else begin in followers:
            ends.add(node)
        after[node].update(node_of[b] for b in followers if b in members and b != begin)
        after[node].discard(node)

    def worth(node: int) -> tuple[tuple[float, int], int]:
        """Work, and the fewest instructions, an inner loop gone through once. Exponentials tell loops over tiles of two
        sizes apart; beside loops the regime with more of them is no better."""
        if node in inner:
            return inner[node].work, int(inner[node].total([], lambda region: region.instructions))
        code = graph.blocks[node]
        return (sum(map(_flops, code)) or _kinds_of(code)["tensor"], 0), len(code)

    def most(node: int) -> tuple[tuple[float, int], int]:
        return worth(node)[0], -(inner[node].most if node in inner else len(graph.blocks[node]))

    def own(way: Way) -> list[str]:
        return [instruction for node in way.steps if node not in inner for instruction in graph.blocks[node]]

    ways = shortest(begin, after, ends, worth)
    longest = shortest(begin, after, ends, most)
    code, loops = own(ways[max(ways)]), [inner[node] for node in ways[max(ways)].steps if node in inner]
    return Region(
        _kinds_of(code), sum(map(_shared, code)), sum(map(_flops, code)), tuple(loops), -longest[max(longest)].length,
        {_kinds_of(own(way))["tensor"]: len(own(way)) for _, way in sorted(ways.items())},
    )  # fmt: skip


def _kinds_of(code: Iterable[str]) -> Counter[str]:
    return Counter(_kind(instruction) for instruction in code)


def _kind(instruction: str) -> str:
    name = "WARPGROUP.DEPBAR" if "WARPGROUP.DEPBAR" in instruction else opcode(instruction)
    if name.startswith("U") and name not in _KIND_OF:
        return "uniform"  # once for a warp, beside the lanes
    return _KIND_OF.get(name, "other")


def _shared(instruction: str) -> float:
    """Cycles of shared memory, without conflicts: 128 bytes each. Operands of a warpgroup's product (64 rows; the first
    too where it is no register) count a quarter for each of its four warps."""
    name = opcode(instruction)
    if name == "HGMMA":
        _, columns, _ = _WARPGROUP_SHAPE.search(instruction).groups()
        rows = 0 if re.search(r"HGMMA\S* R\d+, R\d+", instruction) else 64
        return (rows + int(columns)) * 32 / 128 / 4
    if name == "SHFL":
        return 1
    if name in ("LDS", "STS", "LDGSTS"):
        bits = re.search(r"\.(64|128)\b", instruction)
        return int(bits[1]) / 32 if bits else 1
    if name in ("LDSM", "STSM"):  # matrices of 8 rows of 16 bytes
        matrices = re.match(r"\S+?M\S*?\.([24])\b", instruction.partition(name)[2])
        return int(matrices[1]) if matrices else 1
    return 0


def _flops(instruction: str) -> float:
    """Of the matrix units, for a warp: a warpgroup's product counts a quarter for each of its four."""
    if shape := _WARPGROUP_SHAPE.search(instruction):
        return 2 * math.prod(map(int, shape.groups())) / 4
    depth = _WARP_DEPTH.search(instruction)
    return 2 * 16 * 8 * int(depth[1]) if depth else 0
