"""Calls of the kernels on a device."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from ..base import norm_eps
from ..native import DTYPES, NativeBackend, Side, address


class CudaBackend(NativeBackend):
    """The kernels of a module built from csrc/cuda: `fastntxent._cuda`, or the same on an emulated device, for tensors
    in host memory."""

    dtypes = (torch.float16, torch.bfloat16, torch.float32)

    def __init__(self, kernels: ModuleType, device_type: str = "cuda"):
        self.device_types = (device_type,)
        self.kernels = kernels
        self.workspace = functools.lru_cache(maxsize=1024)(kernels.workspace)

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
        device, dtype, D = z.device, DTYPES[z.dtype], z.shape[1]
        on_gpu, k_on_host = device.type == "cuda", inv_tau.device.type == "cpu"
        index = device.index or 0
        size = self.workspace(index, dtype, rows.n_rows(), 0 if cols is None else cols.n_rows(), D)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        self.kernels.run(
            phases,
            dtype,
            normalize,
            D,
            inv_tau.item() if k_on_host else 0.0,
            0 if k_on_host else inv_tau.data_ptr(),
            norm_eps(z.dtype),
            rows.pack(),
            None if cols is None else cols.pack(),
            address(pos),
            address(d_pos),
            address(loss),
            weight,
            address(d_inv_tau),
            workspace.data_ptr(),
            index,
            torch._C._cuda_getCurrentRawStream(index) if on_gpu else 0,
        )

    def groups(self, *ids: Tensor) -> list[Tensor]:
        return [each.to(torch.int64).contiguous() for each in ids]
