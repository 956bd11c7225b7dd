"""Backends that are broken, each in one way. Verification must find each fault and say what it is.

Each backend that loads runs the CPU kernels. It then passes d_z_j of `nt_xent_scalar` to a function that changes it or
fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastntxent.backends import select

RIGHT: Any = select("cpu", "cpu", torch.float32)


class Broken(type(RIGHT)):
    """The CPU kernels, except that d_z_j of `nt_xent_scalar` passes through `change`."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change

    def nt_xent_scalar(self, *args: Any) -> tuple[Tensor, ...]:
        loss, d_z_i, d_z_j, d_inv_tau = super().nt_xent_scalar(*args)
        return loss, d_z_i, self.change(d_z_j), d_inv_tau
