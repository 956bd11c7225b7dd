"""Resources of the built CUDA kernels on every chip: registers, stack, matrix instructions, and issue slots per tile.

python -m benchmarks.binary reads `fastntxent._cuda` with the cuobjdump that Triton ships; no GPU is needed. For the
forward and the gradient it prints the issue slots (sass.py) that the warps of a block take per step, which is 64
features of a tile of columns. The slots are a range, because the last steps have nothing left to load. It also prints
the slots of a tile outside its steps (in the gradient, for three chunks of features). For code with products it also
prints the cycles of the matrix units, at an A100's rate of 1,024 multiply-adds per cycle per multiprocessor. --check
fails if a kernel uses stack (spilled registers, for instance), does not use the matrix units, or keeps float32 sums in
the matrix units.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import sass

WARPS = 8  # per block, as in csrc/cuda/arguments.h
FLOPS_PER_CYCLE = 2048
_MATRIX = re.compile(r"\bHMMA")
_FRESH = re.compile(r"\bHMMA\S* .*, RZ ;")
_NAME = re.compile(r"kernel_([a-z]+)_cu.*nt_xent")


class BuiltKernel(NamedTuple):
    """A kernel compiled for one chip.

    `registers` and `stack` (in bytes, including spilled registers) are per thread. `matrix` counts matrix instructions,
    and `fresh` counts those whose accumulator starts at zero.
    """

    chip: str
    operands: str
    registers: int
    stack: int
    matrix: int
    fresh: int
    code: sass.Region

    def faults(self) -> list[str]:
        """Return a description of each fault."""
        found = [] if self.stack == 0 else [f"{self.stack} bytes of stack"]
        if not self.matrix:
            found.append("no matrix instruction")
        elif self.operands == "split" and self.matrix != 3 * self.fresh:  # three products, then an ordinary addition
            found.append("float32 sums stay in the matrix units")
        return found

    def tiles(self) -> list[tuple[sass.Region, sass.Region]]:
        """Return the loop over tiles and the loop over steps inside it, for the forward and for the gradient."""
        found = []
        for tile in self.code.inner:
            while tile.loop and tile.loop.loop:
                tile = tile.loop
            if tile.loop:
                found.append((tile, tile.loop))
        return found


def built() -> Path | None:
    """Return the file of `fastntxent._cuda`, or None if it was not built."""
    spec = importlib.util.find_spec("fastntxent._cuda")
    return Path(spec.origin) if spec and spec.origin else None


def built_kernels(module: Path) -> list[BuiltKernel]:
    """Return every kernel of the module, for every chip."""
    usage = {
        key: {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        for key, text in _by_kernel("--dump-resource-usage", module)
    }
    return [
        BuiltKernel(
            *key,
            usage[key]["REG"],
            usage[key]["STACK"] + usage[key]["LOCAL"],
            len(_MATRIX.findall(text)),
            len(_FRESH.findall(text)),
            sass.parse(text),
        )
        for key, text in _by_kernel("-sass", module)
    ]


def _by_kernel(option: str, module: Path) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield each kernel's chip and operands, with cuobjdump's output for that kernel."""
    for of_chip in sass.output_of("cuobjdump", option, module).split("\narch = ")[1:]:
        for of_kernel in re.split(r"\bFunction\b", of_chip)[1:]:
            name, _, text = of_kernel.partition("\n")
            if kernel := _NAME.search(name):
                yield (of_chip.split()[0], kernel[1]), text


def line(report: BuiltKernel) -> str:
    """Return the report as a line of text."""
    words = [
        f"{report.chip:7} {report.operands:6} registers {report.registers:3} stack {report.stack} "
        f"matrix {report.matrix:3} fresh {report.fresh:3}"
    ]
    for name, (tile, step) in zip(("forward", "gradient"), report.tiles(), strict=True):
        beside = f"tile {_slots(tile.instructions)}"
        words.append(f"{name}: step {_slots(step.instructions)}-{_slots(step.most)} of {_cycles(step)}, {beside}")
        if tile.flops:
            words[-1] += f" of {_cycles(tile)}"
    return "; ".join([*words, *report.faults()])


def _slots(instructions: int) -> int:
    return instructions * WARPS // sass.SCHEDULERS


def _cycles(region: sass.Region) -> int:
    return round(region.flops * WARPS / FLOPS_PER_CYCLE)


def main() -> None:
    """Print all reports."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.binary", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if any kernel has faults")
    check = parser.parse_args().check
    module = built()
    if module is None:
        raise SystemExit("fastntxent._cuda was not built: there is nothing to report")
    found = built_kernels(module)
    for report in found:
        print(line(report))
    if check and any(report.faults() for report in found):
        raise SystemExit("some kernels have faults")


if __name__ == "__main__":
    main()
