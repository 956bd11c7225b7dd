"""What the built CUDA kernels take of every chip: registers, stack, and instructions of its matrix units.

python -m benchmarks.binary reads `fastntxent._cuda` by the cuobjdump that Triton ships; no GPU has to be there. --check
fails if a kernel spills, or misses the matrix units.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CHIPS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")
# A form is built for all chips, `Hopper` in earnest for one.
FORMS = {"Tall": CHIPS, "Flat": CHIPS, "Hopper": ("sm_90a",)}
_MATRIX = {"Tall": re.compile(r"\bHMMA"), "Flat": re.compile(r"\bHMMA"), "Hopper": re.compile(r"\bHGMMA")}
_WAIT = re.compile(r"\bWARPGROUP\.DEPBAR")
_NAME = re.compile(r"kernel_([a-z]+)_cu.*nt_xentINS_\d+([A-Z][a-z]+)E")


class Report(NamedTuple):
    """A kernel on a chip.

    Registers and bytes of stack (spilled registers among them) a thread; matrix instructions, and waits for those of
    warpgroups."""

    chip: str
    operands: str
    form: str
    registers: int
    stack: int
    matrix: int
    waits: int

    def faults(self) -> list[str]:
        """What must not be."""
        found = [] if self.stack == 0 else [f"{self.stack} bytes of stack"]
        if not self.matrix:
            found.append("no matrix instruction")
        elif self.waits >= self.matrix:  # what the compiler does where it loses sight of the sums
            found.append("every product waits for the one before")
        return found


def built() -> Path | None:
    """The module's file; None where it was not built."""
    spec = importlib.util.find_spec("fastntxent._cuda")
    return Path(spec.origin) if spec and spec.origin else None


def reports(module: Path) -> list[Report]:
    """Every kernel on every chip that it is for."""
    usage: dict[tuple[str, ...], dict[str, int]] = {}
    for key, line in _by_kernel("--dump-resource-usage", module):
        if "REG:" in line:
            usage[key] = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
    matrix, waits = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    for key, line in _by_kernel("-sass", module):
        matrix[key] += _MATRIX[key[2]].search(line) is not None
        waits[key] += _WAIT.search(line) is not None
    return [
        Report(*key, numbers["REG"], numbers["STACK"] + numbers["LOCAL"], matrix[key], waits[key])
        for key, numbers in usage.items()
        if key[0] in FORMS[key[2]]
    ]


def _by_kernel(option: str, module: Path) -> Iterator[tuple[tuple[str, str, str], str]]:
    """What cuobjdump says of every kernel, line by line: chip, operands and form, and the line."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    chip, kernel = "", None
    with subprocess.Popen([tool, option, module], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("arch = "):
                chip, kernel = line.split()[-1], None
            elif "Function" in line:
                kernel = _NAME.search(line)
            elif kernel:
                yield (chip, *kernel.groups()), line
    if process.returncode:
        raise RuntimeError(f"{tool} {option} {module}: exit status {process.returncode}")


def main() -> None:
    """Print every report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.binary", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if any kernel is not as it must be")
    check = parser.parse_args().check
    module = built()
    if module is None:
        raise SystemExit("fastntxent._cuda was not built: there is nothing to report")
    found = reports(module)
    for report in found:
        print(
            f"{report.chip:8} {report.operands:6} {report.form:6} registers {report.registers:3} "
            f"stack {report.stack:3} matrix {report.matrix:4} waits {report.waits:2} {'; '.join(report.faults())}"
        )
    if check and any(report.faults() for report in found):
        raise SystemExit("not all kernels are as they must be")


if __name__ == "__main__":
    main()
