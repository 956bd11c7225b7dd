"""The backend on this machine's devices."""

from __future__ import annotations

import torch

try:
    import fastntxent._cuda as _cuda  # type: ignore[import-not-found]  # by its full name: the package is still loading
except ModuleNotFoundError as error:
    raise RuntimeError(
        "the CUDA kernels were not built: there was no nvcc where fastntxent was installed, it failed, or "
        "FASTNTXENT_CUDA=0 left them out (FASTNTXENT_CUDA=1 makes a failure an error)"
    ) from error

from .calls import CudaBackend

if not torch.cuda.is_available() or _cuda.devices() == 0:  # a driver too old for the kernels raises
    raise RuntimeError("no CUDA device here")

BACKEND = CudaBackend(_cuda)
