"""Costs of a compiled kernel on a multiprocessor, read from its machine code (SASS). No GPU is needed.

`program` reads the kernel of a cubin with Triton's nvdisasm. `programs` reads every kernel of a CUDA module with
cuobjdump. Both return regions of code (`Region`). The region of a kernel has the instructions that a warp executes
once, and the loops. Each loop is again a region, with the instructions of one iteration.

The instructions of the innermost loop give two lower bounds for the cycles of an iteration, which processes a tile or a
chunk of its features:

    issue slots      instructions per warp, times the warps of a program (a thread block), divided by 4. A
                     multiprocessor has 4 schedulers, and each issues one instruction of one warp per cycle
    tensor cycles    flops, divided by the flops per cycle of a multiprocessor's matrix units (chips.py)

If the code of a region branches, only one path is counted: the one with the most work for the matrix units, and if
several have the same work, the shortest of these. So masks that few tiles need, spin-waits, slow paths of a division
and code for diverged warps are not counted. `Region.most` is different: of the paths with the most work, it counts the
longest, which includes the mask. Predicated instructions are always counted, since they are issued whether or not they
have an effect.
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

SCHEDULERS = 4  # per multiprocessor
_KINDS = {
    "tensor": "HMMA HGMMA QGMMA IMMA IGMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA",
    "exp": "MUFU",  # exponentials, logarithms, reciprocals
    "shared": "LDS LDSM STS STSM ATOMS LDGSTS",
    "shuffle": "SHFL REDUX MATCH",
    "barrier": "BAR",  # for all warps of the program
    "drain": "WARPGROUP.DEPBAR",  # waits until a warpgroup's products are done
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
_WARP_DEPTH = re.compile(r"HMMA\.168(8|16)")  # 16 rows, 8 columns, and 8 or 16 features


class Region(NamedTuple):
    """The code of a kernel, or of one iteration of a loop. The figures are for one warp, on the path that the module's
    docstring describes. They leave out inner loops unless stated otherwise.

    Attributes:
        counts: instructions by kind.
        shared: cycles that shared memory needs: for accesses, at 128 bytes per cycle, and for shuffles. Products with
            tcgen05 are missing, because the machine code does not show their shapes.
        flops: flops of the matrix units. Products with tcgen05 are missing here too.
        inner: the inner loops, in order.
        most: instructions on the longest of the paths with the most work, including one iteration of each inner loop.
        ways: fewest instructions of a path, for each number of matrix instructions that a path may have.
    """

    counts: Counter[str]
    shared: float
    flops: float
    inner: tuple[Region, ...]
    most: int
    ways: dict[int, int]

    @property
    def instructions(self) -> int:
        """Instructions that a warp issues outside inner loops."""
        return self.counts.total()

    @property
    def tensor(self) -> int:
        """Matrix instructions, including one iteration of each inner loop."""
        return self.counts["tensor"] + sum(loop.tensor for loop in self.inner)

    @property
    def work(self) -> tuple[float, int]:
        """Flops (for tcgen05: matrix instructions) and exponentials, including one iteration of each inner loop."""
        products = (self.flops or self.counts["tensor"]) + sum(loop.work[0] for loop in self.inner)
        return products, self.counts["exp"] + sum(loop.work[1] for loop in self.inner)

    @property
    def loop(self) -> Region | None:
        """The inner loop with the most work. If several have the same work, the one with the fewest instructions. None
        if no inner loop has products."""
        busy = [loop for loop in self.inner if loop.tensor]
        return max(
            busy, key=lambda loop: (loop.work, -loop.total([], lambda region: region.instructions)), default=None
        )

    @property
    def depth(self) -> int:
        """The length of the chain of nested loops `self.loop`, `self.loop.loop` and so on."""
        return 0 if self.loop is None else 1 + self.loop.depth

    @property
    def around_main(self) -> Region:
        """The region around `main`, or this region if the chain is empty."""
        return self if self.loop is None or self.loop.loop is None else self.loop.around_main

    @property
    def main(self) -> Region:
        """The last loop of the chain of `depth`, or this region if the chain is empty. An iteration of the last loop
        processes a tile, or a chunk of its features."""
        return self if self.loop is None else self.loop.main

    def slots(self, num_warps: int) -> float:
        """Return the issue slots that a program with this number of warps takes on each scheduler."""
        return self.instructions * num_warps / SCHEDULERS

    def total(self, trips: Iterable[float], of: Callable[[Region], float]) -> float:
        """Return the sum of a figure over everything that a warp executes in this region.

        `of` returns the figure of a single region without its inner loops. `trips` are the numbers of iterations of the
        loops in the chain of `depth`, outermost first. If there are too few numbers, the remaining loops of the chain
        run once. Loops without products run once too. All other loops process tiles that need a mask, and are assumed
        not to run.
        """
        first, *rest = trips = [*trips] or [1.0]
        found = of(self)
        for loop in self.inner:
            if loop is self.loop:
                found += first * loop.total(rest, of)
            elif not loop.tensor:
                found += loop.total([], of)
        return found


def output_of(tool: str, *arguments: str | Path) -> str:
    """Return the output of a program that Triton ships: nvdisasm or cuobjdump."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def program(cubin: bytes) -> Region:
    """Return the only kernel of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return parse(output_of("nvdisasm", "-c", file.name))


def programs(module: Path, chip: str) -> dict[str, Region]:
    """Return every kernel of a module for a chip, by its mangled name."""
    text = output_of("cuobjdump", "-sass", "-arch", chip, module)
    parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)[1:]
    return {name: parse(code) for name, code in zip(parts[::2], parts[1::2], strict=True)}


def parse(text: str) -> Region:
    """Return a kernel from the output of nvdisasm -c or cuobjdump -sass."""
    return _region(Graph(text), None)


def _region(graph: Graph, first: int | None) -> Region:
    """Return the loop that begins with block `first`, or the whole kernel if `first` is None."""
    members = {*graph.after} if first is None else graph.loops[first]
    begin = 0 if first is None else first
    # Block -> its node: the block itself or, for a block in an inner loop, the first block of this loop.
    node_of = {block: block for block in members}
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
        """Return the work and the fewest instructions of a node: a block, or one iteration of an inner loop.

        The exponentials of an inner loop count as work. With tcgen05, loops over tiles of two sizes may have equally
        many matrix instructions, and only the exponentials show which tile is larger. The exponentials of a block do
        not count, since they do not show that a path does more for the matrix units.
        """
        if node in inner:
            return inner[node].work, int(inner[node].total([], lambda region: region.instructions))
        code = graph.blocks[node]
        return (sum(map(_flops, code)) or _kinds_of(code)["tensor"], 0), len(code)

    def most(node: int) -> tuple[tuple[float, int], int]:
        """Return the work and minus the most instructions of a node, so that `shortest` finds the longest path."""
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
        return "uniform"  # executed once per warp, not per lane
    return _KIND_OF.get(name, "other")


def _shared(instruction: str) -> float:
    """Return the cycles that shared memory needs for a warp's instruction, at 128 bytes per cycle without conflicts.

    A warpgroup's product reads its columns from shared memory, and also its 64 rows unless they are in registers. Each
    of the four warps is assigned a quarter of these cycles.
    """
    name = opcode(instruction)
    if name == "HGMMA":
        shape = _WARPGROUP_SHAPE.search(instruction)
        assert shape is not None
        rows = 0 if re.search(r"HGMMA\S* R\d+, R\d+", instruction) else 64
        return (rows + int(shape[2])) * 32 / 128 / 4
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
    """Return the flops of a warp's instruction in the matrix units. Each of a warpgroup's four warps is assigned a
    quarter of the flops of its product."""
    if shape := _WARPGROUP_SHAPE.search(instruction):
        return 2 * math.prod(map(int, shape.groups())) / 4
    depth = _WARP_DEPTH.search(instruction)
    return 2 * 16 * 8 * int(depth[1]) if depth else 0
