"""Suite `kernels`: the Triton kernels compiled ahead of time for GPUs that need not be here: registers, memory, spills.

Every tile of fastntxent.backends.triton's table, as NT-Xent of normalised rows launches it ("usual"), and as a
rectangle of rows of any length with the temperature on the device does ("general"). What no GPU would report before a
user's first step is found here: shared memory beyond the chip's, spilled registers, products beside the matrix units.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from .chips import CHIPS

FEATURES = (64, 128, 256, 768)
GENERAL = (128, 768)  # features at which the general variants are compiled too
TORCH = {"bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}
LENGTHS = ("DP", "s_g", "s_part", "s_gathered", "s_radial", "s_row_plane", "s_col_plane", "s_plane")
AROUND = (
    "pack",
    "finish",
    "survey",
    "largest",
    "bounds",
    "unpack",
)  # kernels around the products: one tile, no matrix unit


class Report(NamedTuple):
    """What a compiled kernel takes. Registers and bytes of stack a thread, programs a multiprocessor; None where the
    tool cannot tell."""

    kernel: str
    target: str
    dtype: str
    d: int
    variant: str
    shifted: bool | None
    tile: tuple[int, ...] | None
    shared: int
    registers: int | None
    stack: int | None
    spilled: int | None
    matrix: int
    resident: int | None

    def faults(self) -> list[str]:
        """What must not be."""
        found = []
        if self.shared > CHIPS[self.target].shared:
            found.append(f"{self.shared} bytes of shared memory, the chip has {CHIPS[self.target].shared}")
        if self.stack or self.spilled:
            found.append(f"{self.stack} bytes of stack, {self.spilled} spilled")
        if self.matrix == 0 and self.tile is not None:
            found.append("no matrix instruction")
        return found


def run(arguments: argparse.Namespace) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Every kernel for every target."""
    results = []
    for target in arguments.targets or CHIPS:
        for dtype in TORCH:
            for d in arguments.d or FEATURES:
                for report in compile_all(target, dtype, d):
                    results.append({**report._asdict(), "faults": report.faults()})
                    print(line(report), flush=True)
    if arguments.check and (faulty := [result for result in results if result["faults"]]):
        raise SystemExit(f"{len(faulty)} of {len(results)} kernels are not as they must be")
    return results, {}


def line(report: Report) -> str:
    """A report for the screen."""
    tile = ",".join(str(size) for size in report.tile or "-" if size is not None)
    return (
        f"{report.target:7} {report.kernel:8} {report.dtype} D {report.d:4} {report.variant} {tile:17} "
        f"shifted {report.shifted!s:5} shared {report.shared:6} registers {report.registers!s:4} stack "
        f"{report.stack!s:4} spilled {report.spilled!s:4} matrix {report.matrix:4} resident {report.resident!s:4} "
        f"{'; '.join(report.faults())}"
    )


def compile_all(target: str, dtype: str, d: int) -> list[Report]:
    """The kernels that such rows take, in batches of any size."""
    from fastntxent.backends.triton import config, pack

    family, DP = CHIPS[target].family, pack.padded_features(d)
    reports = []
    if dtype == "tf32" and CHIPS[target].backend == "hip":
        return reports
    for variant in ("usual", "general") if d in GENERAL else ("usual",):
        if d == GENERAL[0] and dtype != "tf32":  # there is one tile
            reports += [compile_one(target, kernel, dtype, d, variant) for kernel in AROUND]
        if dtype == "tf32" and variant == "usual":  # the same tiles as float32: once is enough
            continue
        for kernel in config.KERNELS:
            limits = [rows for rows, *_ in config.entries(family, kernel, _width(dtype))]
            tiles = {config.look_up(family, kernel, _width(dtype), rows, DP) for rows in [*limits, math.inf]}
            fused = config.look_up(family, "fused", _width(dtype), math.inf, DP) is not None
            if kernel in ("form", "gather") and fused:
                continue
            shifts = (False, True) if kernel in ("fused", "form") else (None,)
            reports += [
                compile_one(target, kernel, dtype, d, variant, tile, shifted)
                for tile in sorted(tiles - {None})
                for shifted in shifts
            ]
    return reports


def _width(dtype: str) -> int:
    return 2 if dtype == "bf16" else 4


@functools.cache
def compile_one(
    target: str,
    kernel: str,
    dtype: str,
    d: int,
    variant: str,
    tile: tuple[int, ...] | None = None,
    shifted: bool | None = None,
) -> Report:
    """Compile a kernel as it is launched, and read what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastntxent.backends.triton import backward, config, forward, pack, unpack

    chip, usual = CHIPS[target], variant == "usual"
    split, tf32 = dtype == "fp32", dtype == "tf32"
    DP = pack.padded_features(d)
    tile_or_any = config.Tile(*(tile or (128, 128, 64, 4, 3)))
    block_m, block_n, block_d, num_warps, *_ = tile_or_any
    function = {
        "direct": forward._direct_kernel,
        "owned": forward._owned_kernel,
        "finish": forward._finish_kernel,
        "fused": backward._fused_kernel,
        "form": backward._form_kernel,
        "gather": backward._gather_kernel,
        "survey": backward._survey_kernel,
        "largest": backward._largest_kernel,
        "pack": pack._pack_kernel,
        "bounds": pack._bounds_kernel,
        "unpack": unpack.unpack_kernel,
    }[kernel]
    constants = {
        "ONE_SIDE": usual, "BOUNDED": not usual, "ON_DEVICE": not usual, "ALWAYS": usual, "LOSS": usual,
        "NORMALIZE": usual, "PAIRED": usual, "SCALED": usual or dtype != "bf16", "GIVEN_IDS": not usual,
        "SPLIT": split, "TF32": tf32, "UPCAST": False, "SHIFTED": shifted, "G_SCALE": 1.0, "SPAN": pack.SPAN,
        "BLOCK": block_m, "BLOCK_M": block_m, "BLOCK_N": block_n,
        "BLOCK_D": DP if kernel == "fused" else block_d, "WHOLE_D": block_d == DP,
        "s_first_d": 1, "s_second_d": 1,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    operand = {"bf16": "*bf16", "fp32": "*fp16", "tf32": "*fp32"}[dtype]
    types = {
        **dict.fromkeys(("rows_x", "rows_lo", "cols_x", "cols_lo", "x_ptr", "lo_ptr"), operand),
        "g_ptr": "*bf16" if dtype == "bf16" else "*fp32",
        **dict.fromkeys(("first_ptr", "second_ptr"), "*bf16" if dtype == "bf16" else "*fp32"),
        **dict.fromkeys(("rows_ids", "cols_ids", "rows_low", "rows_high", "cols_low", "cols_high"), "*i64"),
        **dict.fromkeys(("ids_ptr", "out_ids_ptr", "low_ptr", "high_ptr"), "*i64"),
        **dict.fromkeys(("log_terms", "eps", "factor", "pos_factor", "share", "loss_factor"), "fp32"),
        "inv_tau": "fp32" if usual else "*fp32",
    }
    numbers = ("n_", "s_")
    counts = ("n", "D", "DP", "squares", "edge", "part_cols", "first_row")
    multiples = []  # of 16, as Triton finds at a launch: addresses, and lengths of packed rows
    signature = {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
        elif name.startswith(numbers) or name in counts:
            signature[name] = "i32"
        else:
            signature[name] = "*fp32"
        if signature[name].startswith("*") or name in LENGTHS:
            multiples.append(index)
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(function.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in multiples},
    )
    compiled = triton.compile(source, target=GPUTarget(chip.backend, chip.arch, chip.warp), options=tile_or_any.options)
    assembly = compiled.asm["ptx"] if chip.backend == "cuda" else compiled.asm["amdgcn"]
    registers, stack, spilled = _cuda_usage(compiled.asm["cubin"]) if chip.backend == "cuda" else _hip_usage(assembly)
    instruction = chip.matrix if block_m >= 64 else r"mma\.sync|v_mfma"  # fewer rows than the newest instructions take
    shared, matrix = compiled.metadata.shared, len(re.findall(instruction, assembly))
    resident = chip.resident(registers, shared, num_warps, getattr(compiled.metadata, "tmem_size", 0))
    return Report(kernel, target, dtype, d, variant, shifted, tile, shared, registers, stack, spilled, matrix, resident)


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
