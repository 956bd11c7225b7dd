"""The C++ kernels of csrc/cpu: normalisation, tiles of the upper triangle, loss and every gradient in one call.

The schedule is that of `blocked`, on register tiles: u/2 flops forward and 3u/2 backward, of which a bounded workspace
of exponentials saves u/2 for the tiles that fit (u = 2 M^2 D). Memory beside it is three (M, D) matrices. Threads are
PyTorch's: `torch.set_num_threads` holds here too.
"""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from torch import Tensor

try:
    import fastntxent._cpu as _cpu  # type: ignore[import-not-found]  # by its full name: the package is still loading
except ModuleNotFoundError as error:
    raise RuntimeError(
        f"the CPU kernels were not built beside {Path(__file__).parents[1]}: there was no C++17 compiler or it failed "
        "(pip install -v shows why), or this is a checkout that shadows the installed package (pip install -e . builds "
        "them here)"
    ) from error

from .base import norm_eps
from .native import DTYPES, NativeBackend, Side, address

# Bytes of exponentials kept from the forward to the backward of one call. Those of N = 4096 fit, and nothing is held
# between calls.
WORKSPACE = 144 * 2**20


class CpuBackend(NativeBackend):
    """csrc/cpu on CPU tensors."""

    def details(self) -> str:
        threads = torch.get_num_threads()
        return f"{_cpu.instruction_set()}, {threads} thread{'s' if threads > 1 else ''}"

    def run(
        self,
        phases: int,
        inv_tau: Tensor,
        normalize: bool,
        rows: Side,
        *,
        cols: Side | None = None,
        pos: Tensor | None = None,
        d_pos: Tensor | None = None,
        loss: Tensor | None = None,
        weight: float = 1.0,
        d_inv_tau: Tensor | None = None,
    ) -> None:
        z = rows.first
        _cpu.run(
            phases,
            DTYPES[z.dtype],
            normalize,
            torch.get_num_threads(),
            z.shape[1],
            inv_tau.item(),
            norm_eps(z.dtype),
            rows.pack(),
            None if cols is None else cols.pack(),
            address(pos),
            address(d_pos),
            address(loss),
            weight,
            address(d_inv_tau),
            WORKSPACE,
            threading.get_ident() == threading.main_thread().ident,
        )

    def groups(self, *ids: Tensor) -> list[Tensor]:
        # The same groups in [0, 2^31).
        if any(low < 0 or high >= 2**31 for low, high in (each.aminmax() for each in ids)):
            codes = torch.unique(torch.cat([each.to(torch.int64) for each in ids]), return_inverse=True)[1]
            ids = codes.split([len(each) for each in ids])
        return [each.to(torch.int64).contiguous() for each in ids]


BACKEND = CpuBackend()
