"""Restrict the CPU kernels to an instruction set, in this process and in processes started with the arguments that
`module` returns.

python -m benchmarks.instruction_set: print the set in use.
python -m benchmarks.instruction_set SET MODULE ...: run a module with this set.
"""

from __future__ import annotations

import runpy
import sys

NAMES = ("amx", "avx512_bf16", "avx512", "avx2", "neon", "portable")

held: str | None = None  # None: the kernels use the fastest set of this machine


def hold(name: str | None) -> None:
    """Use this instruction set from now on; None changes nothing. Raise ImportError if the kernels were not built, and
    ValueError if the set cannot be used here."""
    global held
    if name is None:
        return
    from fastntxent import _cpu

    _cpu.use_instruction_set(name)
    held = name


def in_use() -> str | None:
    """Return the set that the kernels use, or None if the kernels were not built."""
    try:
        from fastntxent import _cpu
    except ImportError:
        return None
    return _cpu.instruction_set()


def module(name: str) -> list[str]:
    """Return the arguments with which a new Python process runs a module with the same set."""
    return ["-m", name] if held is None else ["-m", "benchmarks.instruction_set", held, name]


if __name__ == "__main__":
    from benchmarks import instruction_set  # this file, under the name by which other modules import it

    if len(sys.argv) == 1:
        print(instruction_set.in_use() or "none")
    else:
        instruction_set.hold(sys.argv[1])
        del sys.argv[:2]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
