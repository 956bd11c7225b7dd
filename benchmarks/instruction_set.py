"""The CPU kernels held to an instruction set, in this process and in those that it starts.

python -m benchmarks.instruction_set: print the set that they use.
python -m benchmarks.instruction_set SET MODULE ...: run a module, held.
"""

from __future__ import annotations

import runpy
import sys

NAMES = ("amx", "avx512_bf16", "avx512", "avx2", "neon", "portable")

held: str | None = None  # None: the kernels take the fastest that this machine has


def hold(name: str | None) -> None:
    """Use this instruction set from now on; None leaves it as it is. ValueError where this machine lacks it."""
    global held
    if name is None:
        return
    from fastntxent import _cpu

    _cpu.use_instruction_set(name)
    held = name


def in_use() -> str | None:
    """Return the set that the kernels run with; None if they were not built."""
    try:
        from fastntxent import _cpu
    except ImportError:
        return None
    return _cpu.instruction_set()


def module(name: str) -> list[str]:
    """Python's arguments that run a module, held as here."""
    return ["-m", name] if held is None else ["-m", "benchmarks.instruction_set", held, name]


if __name__ == "__main__":
    from benchmarks import instruction_set  # this file under the name by which others import it

    if len(sys.argv) == 1:
        print(instruction_set.in_use() or "none")
    else:
        instruction_set.hold(sys.argv[1])
        del sys.argv[:2]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
