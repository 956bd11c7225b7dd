"""The `cuda` backend, which calls a module of compiled kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from ...algebra import norm_eps
from ..native import DTYPES, NativeBackend, SideArguments, address, count_rows
from ..towers import ComposedTowers

_KINDS = {dtype: (code, norm_eps(dtype)) for dtype, code in DTYPES.items()}


class CudaBackend(ComposedTowers, NativeBackend):
    """A backend that calls a module built from csrc/cuda.

    The module is `fastntxent._cuda`, or a build for the emulated device, which takes tensors in host memory.
    """

    dtypes = (torch.float16, torch.bfloat16, torch.float32)

    def __init__(self, kernels: ModuleType, device_type: str = "cuda"):
        self.device_types = (device_type,)
        self.kernels = kernels
        self.workspace = functools.lru_cache(maxsize=1024)(kernels.workspace)
        self.blocks = 0  # the largest grid, in blocks; 0: as many blocks as run at once

    def forms(self, device: torch.device, dtype: torch.dtype) -> Sequence[str]:
        # The grid size determines how the work is split into tasks. A single block runs all tasks in turn.
        return ("", "grid=1", "grid=3")

    @contextlib.contextmanager
    def forced(self, form: str) -> Iterator[None]:
        before, self.blocks = self.blocks, int(form.removeprefix("grid=") or 0)
        try:
            yield
        finally:
            self.blocks = before

    def run(
        self,
        phases: int,
        inv_tau: float | Tensor,
        normalize: bool,
        rows: SideArguments,
        *,
        cols: SideArguments | None = None,
        pos: Tensor | None = None,
        d_pos: Tensor | None = None,
        loss: Tensor | None = None,
        weight: float = 1.0,
        d_inv_tau: Tensor | None = None,
    ) -> None:
        # Attribute look-ups here cost time in every training step, so use only those that PyTorch implements in C.
        z = rows.first
        on_gpu = z.is_cuda
        index, D = (z.get_device() if on_gpu else 0), z.size(1)
        dtype, eps = _KINDS[z.dtype]
        of_rows, of_cols = rows.addresses(), None if cols is None else cols.addresses()
        n_rows, n_cols = count_rows(of_rows), 0 if of_cols is None else count_rows(of_cols)
        workspace = z.new_empty(self.workspace(index, dtype, n_rows, n_cols, D, self.blocks), dtype=torch.uint8)
        self.kernels.run(
            phases,
            dtype,
            normalize,
            D,
            0.0 if isinstance(inv_tau, Tensor) else inv_tau,
            inv_tau.data_ptr() if isinstance(inv_tau, Tensor) else 0,
            eps,
            of_rows,
            of_cols,
            address(pos),
            address(d_pos),
            address(loss),
            weight,
            address(d_inv_tau),
            workspace.data_ptr(),
            self.blocks,
            index,
            torch._C._cuda_getCurrentRawStream(index) if on_gpu else 0,
        )

    def kernel_ids(self, *ids: Tensor) -> list[Tensor]:
        return [each.to(torch.int64).contiguous() for each in ids]
