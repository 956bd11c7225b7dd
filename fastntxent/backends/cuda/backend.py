"""The `cuda` backend on this machine's GPUs."""

from __future__ import annotations

import torch

try:
    # The full name is needed because the package is still loading.
    import fastntxent._cuda as _cuda  # type: ignore[import-not-found]
except ModuleNotFoundError as error:
    raise RuntimeError(
        "the CUDA kernels were not built: when fastntxent was installed there was no nvcc, nvcc failed, or "
        "FASTNTXENT_CUDA=0 disabled the build (FASTNTXENT_CUDA=1 makes a failed build an error)"
    ) from error

from .calls import CudaBackend

if not torch.cuda.is_available() or _cuda.devices() == 0:  # devices() raises if the driver is too old for the kernels
    raise RuntimeError("no CUDA device is available")

BACKEND = CudaBackend(_cuda)
