"""The CPU kernels on aarch64, cross-compiled: their machine code, and their results under an emulator."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = "aarch64-linux-gnu-g++"
needs_compiler = pytest.mark.skipif(not shutil.which(COMPILER), reason="needs apt-get install g++-aarch64-linux-gnu")
needs_emulator = pytest.mark.skipif(not shutil.which("qemu-aarch64"), reason="needs apt-get install qemu-user")


@pytest.mark.slow
@needs_compiler
@needs_emulator
def test_kernels_under_emulation_agree_with_their_definition():
    done = subprocess.run(["make", "arm", "OPTIONS=--quick"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def innermost_loops(assembly: str) -> list[list[str]]:
    """Return the instructions from each label to the first branch back to it, if no other label lies between."""
    loops = []
    for label, body in re.findall(r"^(\.L\d+):\n((?:\t.*\n)+)", assembly, re.MULTILINE):
        code = [line.strip() for line in body.splitlines() if not line.startswith("\t.")]
        ends = [i for i, line in enumerate(code) if re.fullmatch(rf"b\S*\t(?:\w+, )?{re.escape(label)}", line)]
        loops += [code[: ends[0] + 1]] if ends else []
    return loops


@pytest.mark.slow
@needs_compiler
def test_sums_of_products_stay_in_registers():
    command = [COMPILER, "-std=c++17", "-O3", "-S", "-o", "-", "csrc/cpu/kernels.cpp"]
    assembly = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    # 8 rows x 3 vectors make 24 products; loads, addresses and the loop itself take at most 16 instructions.
    blocks = [loop for loop in innermost_loops(assembly) if sum("fmla" in line for line in loop) == 24]
    assert len(blocks) >= 20
    for loop in blocks:
        assert len(loop) <= 40, loop
        assert not any(re.search(r"\bsp\b|^st|^bl\b", line) for line in loop), loop
