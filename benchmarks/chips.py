"""GPUs that we compile for and model, present or not: their names in the compiler, their limits and their rates.

Rates are from data sheets unless noted, for dense products at the boost clock. The CUDA C++ programming guide
(throughput of native arithmetic instructions) gives the results per cycle per multiprocessor: 16 exponentials on all of
these chips except the B300, for which NVIDIA states twice as many; 64 integer operations, comparisons and selections;
and 128 float32 operations, or 64 on the A100.

No data sheet states the bandwidth of the L2 cache. github.com/te42kyfo/gpu-benches measured 5.4 TB/s on an A100, 6.9 on
an H100 PCIe (114 multiprocessors at 1.755 GHz) and 9.7 on an H200. That is 34 to 37 bytes per cycle per multiprocessor,
and it holds at least until the data fills two thirds of the cache. We take 34 for all chips.

Products of single warps (mma.sync) run at the full rate on an A100. On an H100 they reach 63 % of the rate of
warpgroups (Luo et al., arXiv 2402.13499). We know of no figure for the B200 and the B300, and take the A100's flops per
cycle per multiprocessor.
"""

from __future__ import annotations

from typing import NamedTuple


class Rates(NamedTuple):
    """Rates per second of a whole chip. `cycles` counts the cycles of all multiprocessors. `product`, `tf32` and
    `by_warps` are flops: in 16 bits, in TF32, and in 16 bits with mma.sync. `exp` counts exponentials. `shared` (128
    per cycle per multiprocessor), `memory` and `cache` (the L2 cache) are bytes. Two fields are not rates per second:
    `l2` is the L2 cache's size in bytes, and `float32` the float32 operations per cycle of one multiprocessor."""

    cycles: float
    product: float
    tf32: float
    by_warps: float
    exp: float
    shared: float
    memory: float
    cache: float
    l2: float
    float32: int


class Chip(NamedTuple):
    """A chip.

    Attributes:
        backend: with `arch` and `warp`, identifies the chip to Triton.
        family: the chip's key in the table of tiles.
        matrix: a pattern for its newest matrix instruction in the assembly code.
        shared: maximum shared memory of one program, in bytes.
        shared_of_all: shared memory of a multiprocessor in bytes, for all its programs together.
        threads: maximum number of threads on a multiprocessor, or None if unknown.
        since: the first version of Triton known to compile for the chip.
    """

    backend: str
    arch: int | str
    warp: int
    family: str
    matrix: str
    shared: int
    shared_of_all: int
    threads: int | None
    multiprocessors: int
    rates: Rates | None = None
    since: tuple[int, int] = (3, 3)

    @property
    def known_rates(self) -> Rates:
        """`rates`, which must not be None."""
        assert self.rates is not None
        return self.rates

    def resident(self, registers: int | None, shared: int, num_warps: int, tensor_columns: int = 0) -> int | None:
        """Return the number of programs that an NVIDIA multiprocessor holds at once, or None if `threads` or
        `registers` is unknown. Registers are allocated per warp in multiples of eight per thread. Tensor memory, where
        a chip has it, has 512 columns."""
        if self.threads is None or registers is None:
            return None
        by_registers = 65_536 // (-(-registers // 8) * 8 * 32 * num_warps)
        by_shared = self.shared_of_all // (shared + 1024)
        by_tensor_memory = 512 // tensor_columns if tensor_columns else by_registers
        return min(by_registers, by_shared, by_tensor_memory, self.threads // (32 * num_warps))


def _rates(
    sms: int,
    ghz: float,
    product: float,
    tf32: float,
    memory: float,
    l2: float,
    *,
    by_warps: float,
    exps: int = 16,
    float32: int = 128,
) -> Rates:
    cycles = sms * ghz * 1e9
    return Rates(
        cycles, product * 1e12, tf32 * 1e12, by_warps * 1e12, exps * cycles, 128 * cycles, memory * 1e12, 34 * cycles,
        l2 * 1e6, float32,
    )  # fmt: skip


_A100 = _rates(108, 1.41, 312, 156, 2.04, 40, by_warps=312, float32=64)
_H100 = _rates(132, 1.83, 989, 495, 3.35, 50, by_warps=0.63 * 989)  # SXM
_B200 = _rates(148, 1.86, 2250, 1125, 8.0, 126, by_warps=2048 * 148 * 1.86e-3)
_B300 = _rates(160, 1.92, 2500, 1250, 8.0, 126, by_warps=2048 * 160 * 1.92e-3, exps=32)
_TCGEN05 = r"tcgen05\.mma"
CHIPS = {
    "sm_80": Chip("cuda", 80, 32, "sm_80", r"mma\.sync", 166_912, 167_936, 2048, 108, _A100),
    "sm_90": Chip("cuda", 90, 32, "sm_90", r"wgmma\.mma_async", 232_448, 233_472, 2048, 132, _H100),
    "sm_100": Chip("cuda", 100, 32, "sm_100", _TCGEN05, 232_448, 233_472, 2048, 148, _B200),
    "sm_103": Chip("cuda", 103, 32, "sm_100", _TCGEN05, 232_448, 233_472, 2048, 160, _B300, since=(3, 6)),
    "sm_86": Chip("cuda", 86, 32, "small", r"mma\.sync", 101_376, 102_400, 1536, 84),  # A40
    "sm_89": Chip("cuda", 89, 32, "small", r"mma\.sync", 101_376, 102_400, 1536, 142),  # L40S
    "sm_120": Chip("cuda", 120, 32, "small", r"mma\.sync", 101_376, 102_400, 1536, 170),
    "gfx942": Chip("hip", "gfx942", 64, "gfx942", r"v_mfma", 65_536, 65_536, None, 304),
}
