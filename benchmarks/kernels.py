"""Suite `kernels`: compiles the Triton kernels ahead of time for every chip, and reports their registers, memory and
faults. No GPU is needed.

For each chip, dtype and number of features, every kernel is compiled with every tile that the table of
fastntxent.backends.triton has for it. Compile-time options come in two variants:

usual      normalised rows compared with themselves, as in NT-Xent; the temperature is a float
general    rows that are not normalised, compared with other rows; the temperature is on the device

The report shows faults that users would otherwise meet on their GPUs:

- more shared memory than the chip has
- spilled registers
- products that do not use the matrix units, that wait for each other, or in which warps repeat each other's work
- float32 sums that the compiler has moved back into the matrix units, which truncate them
- more instructions, shuffles or barriers in a hot loop than LIMITS allows
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from . import sass
from .chips import CHIPS, Chip

VARIANTS = ("usual", "general")
FEATURES = (64, 128, 256, 768)
GENERAL = (128, 768)  # features for which the general variant is compiled too
# The cases that --quick compiles: (dtype, features) -> variants. TF32 aside, any two values of dtype, variant and
# features (of GENERAL) occur together in a case.
QUICK = {
    ("bf16", 128): ("usual",),
    ("bf16", 768): ("usual", "general"),
    ("fp32", 128): ("general",),
    ("fp32", 768): ("usual",),
    ("tf32", 128): ("general",),
}
TORCH = {"bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}
OPERANDS = {**TORCH, "fp32": torch.float16}  # a float32 operand is two float16 parts
# Integer arguments (a width and strides) that are compiled as multiples of 16, like all addresses. At a launch, Triton
# detects such multiples and specialises the kernel for them.
MULTIPLES = (
    "DP",
    "stride_g",
    "stride_scaled",
    "stride_rows_w",
    "stride_cols_w",
    "stride_gathered",
    "stride_radial",
    "stride_row_plane",
    "stride_col_plane",
    "stride_plane",
)
FLOATS = ("log_terms", "eps", "factor", "pos_factor", "share", "loss_factor", "limit_scale", "limit_shift")
AROUND = (
    "pack",
    "finish",
    "survey",
    "scale",
    "bounds",
    "unpack",
    "end",
)  # kernels before and after the products: they have no tiles in the table, and no matrix instructions
# Kernels for sigmoid losses and for similarity limits -> the name under which the table lists their tiles.
TILED_AS = {
    "pair_sums": "sums",
    "pairs": "pairs",
    "form_pairs": "form_pairs",
    "gather_pairs": "gather",
    "owned_limited": "sums",
    "fused_limited": "pairs",
    "form_limited": "form_pairs",
}


class Limit(NamedTuple):
    """Upper limits for a hot loop, the innermost loop with products.

    Attributes:
        slots: issue slots (sass.py) per 2^20 flops. That is a product of 128 rows by 64 columns by 64 features.
        shuffles: shuffles per warp and iteration.
        barriers: barriers per iteration.
    """

    slots: int
    shuffles: int
    barriers: int


# Limits for bfloat16 in large batches, by chip, kernel and features. The slots are about a tenth above the figures of
# the table's tiles. For 2^20 flops the matrix units need 512 cycles on sm_80, 256 on sm_90 and 128 on sm_100 (256 if
# the tile has 64 rows). If a loop has fewer slots than these cycles, all its instructions can be issued while the
# matrix units work.
#
# Barriers: each step of asynchronous copies needs two. The first waits until the new data has arrived, the second until
# the old data may be overwritten. At 128 features, `direct` has more: its innermost loop covers whole tiles, and the
# row sums of each tile go through shared memory to their plane. At 768 features its innermost loop covers only a chunk
# of the features, and has no row sums. On sm_100, a program also waits for each product and exchanges its sums.
#
# Shuffles: only `direct` at 128 features has any, for the row sums. It has the most on sm_80.
LIMITS = {
    ("sm_80", "direct", 128): Limit(375, 32, 6),
    ("sm_80", "direct", 768): Limit(180, 0, 2),
    ("sm_80", "fused", 128): Limit(325, 0, 3),
    ("sm_80", "form", 768): Limit(180, 0, 2),
    ("sm_80", "gather", 768): Limit(195, 0, 3),
    ("sm_90", "direct", 128): Limit(255, 8, 4),
    ("sm_90", "direct", 768): Limit(95, 0, 2),
    ("sm_90", "fused", 128): Limit(200, 0, 2),
    ("sm_90", "form", 768): Limit(95, 0, 2),
    ("sm_90", "gather", 768): Limit(60, 0, 2),
    ("sm_100", "direct", 128): Limit(286, 4, 5),
    ("sm_100", "direct", 768): Limit(115, 0, 3),
    ("sm_100", "fused", 128): Limit(285, 0, 4),
    ("sm_100", "form", 768): Limit(205, 0, 3),
    ("sm_100", "gather", 768): Limit(115, 0, 3),
}


class CompiledKernel(NamedTuple):
    """A compiled kernel and its resources. A figure is None if it is unknown.

    Attributes:
        target: name of the chip in CHIPS.
        shifted: whether the kernel is compiled for the shifted regime (sides.py of the Triton backend). None for
            kernels without this option.
        tile: the sizes of a `config.TileConfig`. None for kernels without a tile in the table.
        shared: bytes of shared memory per program.
        registers: registers per thread.
        stack: bytes of stack per thread.
        spilled: spilled bytes (NVIDIA) or registers (AMD) per thread.
        matrix: number of matrix instructions.
        resident: number of programs that a multiprocessor holds at once.
        products: number of products of tiles.
        fresh: number of products whose accumulator starts at zero.
        restored: number of multiply-adds that add the result of a product to a sum and at the same time make up for the
            matrix units' truncation (`add_product` in tiles.py).
        repeated: number of products in which some warps repeat the work of others, because the tile is too small for so
            many warps.
        disassemble: function that returns the machine code; None for AMD. Its first call takes a third of a second.
    """

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
    products: int
    fresh: int
    restored: int
    repeated: int = 0
    disassemble: Callable[[], sass.Region] | None = None

    @property
    def machine_code(self) -> sass.Region:
        """The machine code of a kernel for an NVIDIA chip."""
        assert self.disassemble is not None
        return self.disassemble()

    @property
    def warps(self) -> int:
        """Warps per program."""
        return 4 if self.tile is None else self.tile[3]

    @property
    def slots(self) -> float | None:
        """Issue slots per iteration of the innermost loop with products, or None if there is no such loop."""
        if self.disassemble is None or not self.machine_code.tensor:
            return None
        return self.machine_code.main.slots(self.warps)

    @property
    def flops(self) -> float:
        """Flops per iteration of the innermost loop with products. The machine code does not show the shapes of
        tcgen05's products, so for these the flops are computed from the tile."""
        return self.machine_code.main.flops * self.warps or flops_of_iteration(
            self.kernel, self.tile, self.d, self.dtype
        )

    @property
    def tensor_cycles(self) -> float:
        """Cycles that a multiprocessor's matrix units need for these `flops`, at their full rate for this tile."""
        chip = CHIPS[self.target]
        return self.flops / rate(chip, self.dtype, self.tile) * chip.known_rates.cycles

    @property
    def limit(self) -> Limit | None:
        """The kernel's entry in LIMITS. None for dtypes other than bfloat16, for variants other than "usual", for the
        shifted regime, and for any tile other than the one that the table has for the largest batches."""
        from fastntxent.backends.triton import config, pack

        family, DP = CHIPS[self.target].family, pack.padded_features(self.d)
        if (self.dtype, self.variant) != ("bf16", "usual") or self.shifted or self.kernel not in config.KERNELS:
            return None
        large = self.tile == config.look_up(family, self.kernel, 2, math.inf, DP)
        return LIMITS.get((self.target, self.kernel, self.d)) if large else None

    def faults(self) -> list[str]:
        """Return a description of each fault."""
        found = []
        if self.target == "sm_90" and self.matrix:
            code = self.machine_code
            if 0 < code.tensor <= code.main.counts["drain"]:
                found.append("every product waits for the previous one")
        if self.repeated:
            found.append(f"{self.repeated} products in which some warps repeat the work of others")
        if limit := self.limit:
            main = self.machine_code.main
            slots = main.slots(self.warps) * 2**20 / self.flops
            taken = Limit(math.ceil(slots), main.counts["shuffle"], main.counts["barrier"])
            found += [
                f"{now} {name} in the loop, but the limit is {most}"
                for name, now, most in zip(Limit._fields, taken, limit, strict=True)
                if now > most
            ]
        if self.shared > CHIPS[self.target].shared:
            found.append(f"{self.shared} bytes of shared memory, the chip has {CHIPS[self.target].shared}")
        if self.stack or self.spilled:
            found.append(f"{self.stack} bytes of stack, {self.spilled} spilled")
        if self.matrix == 0 and self.tile is not None:
            found.append("no matrix instruction")
        restored = self.restored or CHIPS[self.target].backend == "hip"  # AMD's matrix units round to nearest
        # Float32 rows have two float16 parts. The first of their three products must start at zero, and an ordinary
        # addition must add the result to the sum.
        if self.dtype == "fp32" and self.products and (self.products > 3 * self.fresh or not restored):
            found.append("float32 sums stay in the matrix units")
        return found


def run(arguments: argparse.Namespace) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Compile every kernel for every chip, and return the reports. With --check, raise SystemExit if any kernel has a
    fault."""
    if arguments.quick and arguments.d:
        raise SystemExit("error: --quick compiles cases of 128 and 768 features: leave out --d")
    results = []
    for target in arguments.targets or CHIPS:
        if CHIPS[target].since > _triton_version():
            print(f"{target}: Triton {'.'.join(map(str, _triton_version()))} does not compile for it", flush=True)
            continue
        for dtype in TORCH:
            for d in arguments.d or FEATURES:
                variants = QUICK.get((dtype, d), ()) if arguments.quick else VARIANTS
                for report in compile_all(target, dtype, d, variants):
                    figures = report._asdict()
                    del figures["disassemble"]
                    results.append({**figures, "faults": report.faults()})
                    print(line(report, with_loop=not arguments.quick), flush=True)
    if arguments.check and (faulty := [result for result in results if result["faults"]]):
        raise SystemExit(f"{len(faulty)} of {len(results)} kernels have faults")
    return results, {}


def line(report: CompiledKernel, *, with_loop: bool = True) -> str:
    """Return the report as a line of text. `with_loop` adds figures of the hot loop, which need the machine code."""
    tile = ",".join(str(size) for size in report.tile or "-" if size is not None)
    loop = ""
    if with_loop and report.slots and CHIPS[report.target].rates:
        counts = report.machine_code.main.counts
        loop = (
            f"iteration: slots {report.slots:.0f} tensor {report.tensor_cycles:.0f} shuffles {counts['shuffle']} "
            f"barriers {counts['barrier']} "
        )
    return (
        f"{report.target:7} {report.kernel:8} {report.dtype} D {report.d:4} {report.variant} {tile:17} "
        f"shifted {report.shifted!s:5} shared {report.shared:6} registers {report.registers!s:4} stack "
        f"{report.stack!s:4} spilled {report.spilled!s:4} matrix {report.matrix:4} resident {report.resident!s:4} "
        f"{loop}{'; '.join(report.faults())}"
    )


def compile_all(target: str, dtype: str, d: int, variants: Sequence[str] = VARIANTS) -> list[CompiledKernel]:
    """Return reports of all kernels for d features in this dtype, with every tile that the table has for them.

    The variant "usual" is compiled for every d, and "general" only if d is in GENERAL. TF32 is compiled only as
    "general", and not for AMD.
    """
    from fastntxent.backends.triton import config, pack

    family, DP = CHIPS[target].family, pack.padded_features(d)
    reports: list[CompiledKernel] = []
    if dtype == "tf32" and CHIPS[target].backend == "hip":
        return reports
    for variant in variants:
        if variant == "general" and d not in GENERAL:
            continue
        if d == GENERAL[0] and dtype != "tf32":  # the code of these kernels is the same for every d
            reports += [compile_one(target, kernel, dtype, d, variant) for kernel in AROUND]
        if dtype == "tf32" and variant == "usual":  # the general variant suffices: TF32 uses float32's tiles
            continue
        for kernel in (*config.KERNELS, *TILED_AS):
            tiled_as = TILED_AS.get(kernel, kernel)
            limits = [rows for rows, *_ in config.entries(family, tiled_as, _width(dtype))]
            tiles = {config.look_up(family, tiled_as, _width(dtype), rows, DP) for rows in [*limits, math.inf]}
            fused = config.look_up(family, "fused", _width(dtype), math.inf, DP) is not None
            if tiled_as in ("form", "form_pairs", "gather") and fused:  # not used if `fused` has a tile
                continue
            shifts = (False, True) if kernel in ("fused", "form") else (None,)
            reports += [
                compile_one(target, kernel, dtype, d, variant, tile, shifted)
                for tile in sorted(tile for tile in tiles if tile is not None)
                for shifted in shifts
            ]
    return reports


def _width(dtype: str) -> int:
    return 2 if dtype == "bf16" else 4


def _triton_version() -> tuple[int, ...]:
    import triton

    return tuple(int(number) for number in triton.__version__.split(".")[:2])


def flops_of_iteration(kernel: str, tile: tuple[int, ...] | None, d: int, dtype: str) -> float:
    """Return the flops per iteration of a kernel's innermost loop. An iteration covers a whole tile, or a chunk of its
    features (in `gather`, of its columns)."""
    from fastntxent.backends.triton import pack

    assert tile is not None
    block_m, block_n, block_d, *_ = tile
    fused = TILED_AS.get(kernel, kernel) in ("fused", "pairs")
    products = (2 if fused else 1) * (3 if dtype == "fp32" else 1)
    return 2 * products * block_m * block_n * (pack.padded_features(d) if fused else block_d)


def rate(chip: Chip, dtype: str, tile: tuple[int, ...] | None) -> float:
    """Return the flops per second of the matrix units for a tile. A tile of fewer than 64 rows is too small for
    warpgroup instructions and tcgen05, so its products run at the rate of mma.sync. tcgen05 stores sums in 128 lanes of
    tensor memory, so we assume half its rate for tiles of 64 to 127 rows."""
    rates, rows = chip.known_rates, 64 if tile is None else tile[0]
    full = rates.product if rows >= 64 else rates.by_warps
    if chip.family == "sm_100" and 64 <= rows < 128:
        full /= 2
    return full * rates.tf32 / rates.product if dtype == "tf32" else full


@functools.cache
def compile_one(
    target: str,
    kernel: str,
    dtype: str,
    d: int,
    variant: str,
    tile: tuple[int, ...] | None = None,
    shifted: bool | None = None,
) -> CompiledKernel:
    """Compile a kernel with the options of its launches, and return its report. The variant "transposed" is "usual"
    with transposed inputs: their stride between rows is 1."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fastntxent.backends import ranges
    from fastntxent.backends.triton import (
        backward,
        config,
        finish,
        forward,
        pack,
        panels,
        sides,
        softplus,
        tiles,
        unpack,
        weights,
    )

    chip, usual = CHIPS[target], variant != "general"
    if chip.backend == "hip":  # Triton 3.3 calls ROCm's linker. Its output is not needed, so `true` replaces it
        os.environ.setdefault("TRITON_HIP_LLD_PATH", shutil.which("true") or "")
    split, tf32 = config.products_at_once(target) if dtype == "fp32" else 0, dtype == "tf32"
    DP = pack.padded_features(d)
    tile_or_any = config.TileConfig(*(tile or (128, 128, 64, 4, 3)))
    block_m, block_n, block_d, num_warps, *_ = tile_or_any
    function = {
        "direct": forward._direct_kernel,
        "owned": forward._owned_kernel,
        "finish": finish._finish_kernel,
        "fused": backward._fused_kernel,
        "form": panels._form_kernel,
        "gather": panels._gather_kernel,
        "survey": weights._survey_kernel,
        "scale": weights._scale_kernel,
        "pack": pack._pack_kernel,
        "bounds": sides._bounds_kernel,
        "unpack": unpack._unpack_kernel,
        "pair_sums": softplus._pairs_kernel,
        "pairs": softplus._pairs_kernel,
        "form_pairs": softplus._form_pairs_kernel,
        "gather_pairs": panels._gather_kernel,
        "owned_limited": forward._owned_kernel,
        "fused_limited": backward._fused_kernel,
        "form_limited": panels._form_kernel,
        "end": softplus._end_kernel,
    }[kernel]
    if not isinstance(function, triton.JITFunction):
        raise TypeError("kernels that are interpreted cannot be compiled: unset TRITON_INTERPRET")
    fused, limited = TILED_AS.get(kernel, kernel) in ("fused", "pairs"), kernel.endswith("_limited")
    shifted = True if limited else shifted
    constants = {
        "ONE_SIDE": usual, "BOUNDED": not usual, "ON_DEVICE": not usual, "ALWAYS": usual, "LOSS": usual,
        "WEIGHED": usual,
        "NORMALIZE": usual, "PAIRED": usual, "SCALED": usual or dtype != "bf16", "GIVEN_IDS": not usual,
        "SPLIT": split, "TF32": tf32, "UPCAST": False, "SHIFTED": shifted, "SPAN": pack.SPAN,
        "G_SCALE": ranges.G_SCALE[OPERANDS[dtype]], "PADDED_ROWS": pack.PADDED_ROWS,
        "BLOCK": block_m, "BLOCK_M": block_m, "BLOCK_N": block_n,
        "BLOCK_D": DP if fused else block_d, "WHOLE_D": fused or block_d == DP,
        "GRADIENT": kernel != "pair_sums", "WEIGHTED": not usual, "POSITIVES": True, "BIAS_ON_DEVICE": not usual,
        "BY_ROW": not usual, "SUMS": softplus.SUMS.value if kernel == "gather_pairs" else 1,
        "IN_UNITS": kernel == "gather_pairs" and dtype == "fp32", "LIMITED": limited,
        **({"stride_first_m": 1, "stride_second_m": 1} if variant == "transposed" else
           {"stride_first_d": 1, "stride_second_d": 1}),
        "ROWS_HELD": config.rows_held(target),
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    operand = {"bf16": "*bf16", "fp32": "*fp16", "tf32": "*fp32"}[dtype]
    types = {
        **{f"{side}{name}_ptr": operand for side in ("rows_", "cols_", "") for name in ("x", "lo")},
        **{f"{side}{name}_ptr": "*i64" for side in ("rows_", "cols_", "") for name in ("ids", "low", "high")},
        "out_ids_ptr": "*i64",
        **dict.fromkeys(("first_ptr", "second_ptr", "g_ptr"), "*bf16" if dtype == "bf16" else "*fp32"),
        **dict.fromkeys(FLOATS, "fp32"),
        **dict.fromkeys(("inv_tau", "bias"), "fp32" if usual else "*fp32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    signature = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in function.arg_names}
    multiples = [
        index
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (name in MULTIPLES and kind != "constexpr")
    ]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(function.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in multiples},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget(chip.backend, chip.arch, chip.warp),
        options={**tiles.NO_CONTRACTION, **tile_or_any.options},
    )
    assembly = compiled.asm["ptx"] if chip.backend == "cuda" else compiled.asm["amdgcn"]
    cubin = compiled.asm["cubin"] if chip.backend == "cuda" else None
    registers, stack, spilled = _cuda_usage(cubin) if cubin else _hip_usage(assembly)
    instruction = chip.matrix if block_m >= 64 else r"mma\.sync|v_mfma"  # the newest instructions need 64 rows
    shared, matrix = compiled.metadata.shared, len(re.findall(instruction, assembly))
    resident = chip.resident(registers, shared, num_warps, getattr(compiled.metadata, "tmem_size", 0))
    return CompiledKernel(
        kernel, target, dtype, d, variant, shifted, tile, shared, registers, stack, spilled, matrix, resident,
        *_sums(compiled.asm["ttgir"]), _repeated(compiled.asm["ttgir"]),
        functools.cache(lambda: sass.program(cubin)) if cubin else None,
    )  # fmt: skip


# Patterns in TTGIR, Triton's intermediate code for a chip. Each captures the name of one value:
#   _ACCUMULATED       the accumulator of a product
#   _IN_TENSOR_MEMORY  for tcgen05: the flag of a product that says whether it adds to its accumulator
#   _ZERO              a constant of zeros
#   _RESTORING         a constant slightly above 1: the factor of `add_product` (tiles.py) that makes up for truncation
#   _FACTOR            the second factor of a multiply-add
_ACCUMULATED = re.compile(r"(?:tt\.dot|ttng\.warp_group_dot) \S+, \S+, (%[\w#]+)")
_IN_TENSOR_MEMORY = re.compile(r"ttng\.tc_gen5_mma \S+, \S+, \S+, (%\w+)")
_ZERO = re.compile(r"(%\w+) = arith\.constant dense<0\.0+e\+00> : tensor<\d+x\d+xf32")
_RESTORING = re.compile(r"(%\w+) = arith\.constant dense<1\.0000\d+> : tensor<\d+x\d+xf32")
_FACTOR = re.compile(r"math\.fma \S+, (%\w+), .* : tensor<\d+x\d+xf32")


def _sums(ttgir: str) -> tuple[int, int, int]:
    """Return `products`, `fresh` and `restored` of a `CompiledKernel`, counted in TTGIR."""
    zeros = {"%false", *_ZERO.findall(ttgir)}
    starts = _ACCUMULATED.findall(ttgir) + _IN_TENSOR_MEMORY.findall(ttgir)
    factors = set(_RESTORING.findall(ttgir))
    restored = sum(factor in factors for factor in _FACTOR.findall(ttgir))
    return len(starts), sum(start in zeros for start in starts), restored


# Patterns in TTGIR. The first captures a layout's name, its numbers of warps along rows and along columns, and the rows
# and columns of a warp's instruction. The second captures the rows and columns of a product, and the name of its
# layout.
_WARPS_OF = re.compile(r"(#\w+) = #ttg\.nvidia_mma<\{.*?warpsPerCTA = \[(\d+), (\d+)\], instrShape = \[(\d+), (\d+)")
_PRODUCT_OF = re.compile(r"(?:tt\.dot|ttng\.warp_group_dot) .*-> tensor<(\d+)x(\d+)xf32, (#\w+)>")


def _repeated(ttgir: str) -> int:
    """Return `repeated` of a `CompiledKernel`: the number of products in TTGIR whose warps together cover more rows or
    columns than the tile has."""
    spans = {name: (int(m) * int(of_m), int(n) * int(of_n)) for name, m, n, of_m, of_n in _WARPS_OF.findall(ttgir)}
    products = [(int(rows), int(cols), spans.get(name, (0, 0))) for rows, cols, name in _PRODUCT_OF.findall(ttgir)]
    return sum(rows < span[0] or cols < span[1] for rows, cols, span in products)


def _cuda_usage(cubin: bytes) -> tuple[int, int, int]:
    """Return registers, stack bytes and spilled bytes per thread, from the cuobjdump that Triton ships."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = sass.output_of("cuobjdump", "--dump-resource-usage", file.name)
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return numbers["REG"], numbers["STACK"], numbers["LOCAL"]


def _hip_usage(assembly: str) -> tuple[int, int, int]:
    """Return an AMD kernel's registers, stack bytes and spilled registers per thread, from the metadata in its assembly
    code."""
    names = r"vgpr_count|private_segment_fixed_size|vgpr_spill_count"
    found = {name: int(value) for name, value in re.findall(rf"\.({names}):\s+(\d+)", assembly)}
    return found["vgpr_count"], found["private_segment_fixed_size"], found["vgpr_spill_count"]
