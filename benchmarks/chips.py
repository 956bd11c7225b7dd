"""GPUs that need not be here: what the compiler is told of them, what a program may take, and their data sheets' rates.

Rates are of dense products at the boost clock. Exponentials: 16 a cycle and multiprocessor on all of these (CUDA C++
programming guide, arithmetic instructions). The second-level cache's bandwidth is on no data sheet: microbenchmarks
find about 5.5 TB/s on an H100, near 23 bytes a cycle and multiprocessor, and the same is taken for the others.
"""

from __future__ import annotations

from typing import NamedTuple


class Rates(NamedTuple):
    """A second's worth: of 16-bit flops, TF32 flops, exponentials, bytes of shared memory (128 a cycle and
    multiprocessor), of memory and of the second-level cache."""

    product: float
    tf32: float
    exp: float
    shared: float
    memory: float
    cache: float


class Chip(NamedTuple):
    """How Triton names it, the family of its tiles, its matrix instruction; bytes of shared memory for a program and
    for all that run on a multiprocessor, and their threads (None: not known here); multiprocessors and their rates."""

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

    def resident(self, registers: int | None, shared: int, num_warps: int, tensor_columns: int = 0) -> int | None:
        """Programs that a multiprocessor of NVIDIA's holds at once: registers come in eights, by the warp; of tensor
        memory, where there is any, there are 512 columns."""
        if self.threads is None or registers is None:
            return None
        by_registers = 65_536 // (-(-registers // 8) * 8 * 32 * num_warps)
        by_shared = self.shared_of_all // (shared + 1024)
        by_tensor_memory = 512 // tensor_columns if tensor_columns else by_registers
        return min(by_registers, by_shared, by_tensor_memory, self.threads // (32 * num_warps))


def _rates(sms: int, ghz: float, product: float, tf32: float, memory: float) -> Rates:
    cycles = sms * ghz * 1e9
    return Rates(product * 1e12, tf32 * 1e12, 16 * cycles, 128 * cycles, memory * 1e12, 23 * cycles)


CHIPS = {
    # A100 SXM 80 GB, H100 SXM, B200
    "sm_80": Chip(
        "cuda", 80, 32, "sm_80", r"mma\.sync", 166_912, 167_936, 2048, 108, _rates(108, 1.41, 312, 156, 2.04)
    ),
    "sm_90": Chip(
        "cuda", 90, 32, "sm_90", r"wgmma\.mma_async", 232_448, 233_472, 2048, 132, _rates(132, 1.83, 989, 495, 3.35)
    ),
    "sm_100": Chip(
        "cuda", 100, 32, "sm_100", r"tcgen05\.mma", 232_448, 233_472, 2048, 148, _rates(148, 1.86, 2250, 1125, 8.0)
    ),
    "sm_120": Chip("cuda", 120, 32, "small", r"mma\.sync", 101_376, 102_400, 1536, 170),
    "gfx942": Chip("hip", "gfx942", 64, "gfx942", r"v_mfma", 65_536, 65_536, None, 304),
}
