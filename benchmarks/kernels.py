"""Suite `kernels`: the Triton kernels compiled ahead of time for GPUs that need not be here: registers, memory, spills.

The tiles of fastntxent.backends.triton.config are compiled as NT-Xent of normalised rows launches them. What no GPU
would report before a user's first step is found here: shared memory beyond the chip's, spilled registers, products that
miss the matrix units.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

FEATURES = (64, 128, 256, 768)


class Target(NamedTuple):
    """A chip: how Triton names it, the family of its tiles, shared memory of a program, its matrix instruction."""

    backend: str
    arch: int | str
    warp: int
    family: str
    shared: int
    matrix: str


TARGETS = {
    "sm_80": Target("cuda", 80, 32, "sm_80", 166_912, r"mma\.sync"),
    "sm_90": Target("cuda", 90, 32, "sm_90", 232_448, r"wgmma\.mma_async"),
    "sm_100": Target("cuda", 100, 32, "sm_100", 232_448, r"tcgen05\.mma"),
    "sm_120": Target("cuda", 120, 32, "small", 101_376, r"mma\.sync"),
    "gfx942": Target("hip", "gfx942", 64, "gfx942", 65_536, r"v_mfma"),
}


class Report(NamedTuple):
    """What a compiled kernel takes. Registers and bytes of stack a thread; None where the tool cannot tell."""

    kernel: str
    target: str
    dtype: str
    d: int
    shifted: bool | None
    shared: int
    registers: int | None
    stack: int | None
    spilled: int | None
    matrix: int

    def faults(self) -> list[str]:
        """What must not be."""
        found = []
        if self.shared > TARGETS[self.target].shared:
            found.append(f"{self.shared} bytes of shared memory, the chip has {TARGETS[self.target].shared}")
        if self.stack or self.spilled:
            found.append(f"{self.stack} bytes of stack, {self.spilled} spilled")
        if self.matrix == 0:
            found.append("no matrix instruction")
        return found


def run(arguments: argparse.Namespace) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Every kernel for every target."""
    results = []
    for target in arguments.targets or TARGETS:
        for dtype in ("bf16", "fp32"):
            for d in arguments.d or FEATURES:
                for report in compile_all(target, dtype, d):
                    results.append({**report._asdict(), "faults": report.faults()})
                    print(line(report), flush=True)
    if arguments.check and (faulty := [result for result in results if result["faults"]]):
        raise SystemExit(f"{len(faulty)} of {len(results)} kernels are not as they must be")
    return results, {}


def line(report: Report) -> str:
    """A report for the screen."""
    return (
        f"{report.target:7} {report.kernel:8} {report.dtype} D {report.d:4} shifted {report.shifted!s:5} "
        f"shared {report.shared:6} registers {report.registers!s:4} stack {report.stack!s:4} spilled "
        f"{report.spilled!s:4} matrix {report.matrix:4} {'; '.join(report.faults())}"
    )


def compile_all(target: str, dtype: str, d: int) -> list[Report]:
    """The kernels that such rows take."""
    from fastntxent.backends.triton import config, pack

    fused = config.fuses(TARGETS[target].family, _width(dtype), pack.padded_features(d))
    backward = ["fused"] if fused else ["form", "gather"]
    regimes = {"direct": [None], "shifted": [None], "fused": [False, True], "form": [False, True], "gather": [None]}
    return [
        compile_one(target, kernel, dtype, d, shifted)
        for kernel in ("direct", "shifted", *backward)
        for shifted in regimes[kernel]
    ]


def _width(dtype: str) -> int:
    return 4 if dtype == "fp32" else 2


@functools.cache
def compile_one(target: str, kernel: str, dtype: str, d: int, shifted: bool | None) -> Report:
    """Compile a kernel as it is launched for NT-Xent of normalised rows, and read what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastntxent.backends.triton import backward, config, forward, pack

    chip = TARGETS[target]
    split = dtype == "fp32"
    DP = pack.padded_features(d)
    tile = config.look_up(chip.family, kernel, _width(dtype), DP)
    function = {
        "direct": forward._direct_kernel,
        "shifted": forward._shifted_kernel,
        "fused": backward._fused_kernel,
        "form": backward._form_kernel,
        "gather": backward._gather_kernel,
    }[kernel]
    constants = {
        "ONE_SIDE": True, "BOUNDED": False, "ON_DEVICE": False, "SPLIT": split, "TF32": False, "UPCAST": False,
        "SHIFTED": shifted, "G_SCALE": 1.0, "NORMALIZE": True, "PAIRED": True, "SPAN": pack.SPAN,
        "BLOCK": tile.block_m, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "BLOCK_D": DP if kernel == "fused" else tile.block_d, "WHOLE_D": tile.block_d == DP,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    operand = "*fp16" if split else "*bf16"
    types = {
        **dict.fromkeys(("rows_x", "rows_lo", "cols_x", "cols_lo"), operand),
        "g_ptr": "*fp32" if split else operand,
        **dict.fromkeys(("first_ptr", "second_ptr"), f"*{dtype}"),
        **dict.fromkeys(("rows_ids", "cols_ids", "rows_low", "rows_high", "cols_low", "cols_high"), "*i64"),
        **dict.fromkeys(("inv_tau", "log_terms", "eps", "weight", "pos_factor", "share"), "fp32"),
    }
    numbers = ("n_rows", "n_cols", "n_first", "D", "DP", "squares", "tiles", "n_parts", "first_row", "s_")
    multiples = []  # of 16, as Triton finds at a launch: addresses, and lengths of packed rows
    signature = {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
        elif name.startswith(numbers):
            signature[name] = "i32"
        else:
            signature[name] = "*fp32"
        if signature[name].startswith("*") or name in ("DP", "s_g", "s_part"):
            multiples.append(index)
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(function.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in multiples},
    )
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    compiled = triton.compile(source, target=GPUTarget(chip.backend, chip.arch, chip.warp), options=options)
    assembly = compiled.asm["ptx"] if chip.backend == "cuda" else compiled.asm["amdgcn"]
    usage = _cuda_usage(compiled.asm["cubin"]) if chip.backend == "cuda" else _hip_usage(assembly)
    return Report(
        kernel, target, dtype, d, shifted, compiled.metadata.shared, *usage, len(re.findall(chip.matrix, assembly))
    )


def _cuda_usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, stack and spilled bytes, by the cuobjdump that Triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return numbers["REG"], numbers["STACK"], numbers["LOCAL"]


def _hip_usage(assembly: str) -> tuple[int, int, int]:
    """The same, from the assembler's own notes."""
    names = r"vgpr_count|private_segment_fixed_size|vgpr_spill_count"
    found = {name: int(value) for name, value in re.findall(rf"\.({names}):\s+(\d+)", assembly)}
    return found["vgpr_count"], found["private_segment_fixed_size"], found["vgpr_spill_count"]
