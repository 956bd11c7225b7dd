"""Normalisation of rows and its gradient, for kernels that do not normalise."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algebra import accumulation_dtype, norm_eps, overflow_factor, row_dots


class UnitRows:
    """Rows in the accumulation dtype, optionally normalised."""

    def __init__(self, z: Tensor, normalize: bool):
        self.z_dtype = z.dtype
        self.u = z.to(accumulation_dtype(z.dtype)).contiguous()  # so that results do not depend on strides
        self.norm: Tensor | None = None
        self._factor: Tensor | None = None
        if normalize:
            self._factor = overflow_factor(self.u, z.dtype)
            if self._factor is not None:
                self.u = self.u * self._factor
            self.norm = torch.linalg.vector_norm(self.u, dim=1, keepdim=True)
            self.u = self.u / self.norm.clamp_min(norm_eps(self.z_dtype))

    def backward(self, d_u: Tensor) -> Tensor:
        """Return d/dz: (d_u - u (u . d_u)) / |z| where |z| > eps, else d_u / eps. If not normalised, return d_u."""
        if self.norm is None:
            return d_u
        eps = norm_eps(self.z_dtype)
        radial = torch.where(self.norm > eps, row_dots(self.u, d_u).unsqueeze(1), 0)
        d_z = torch.addcmul(d_u, self.u, radial, value=-1).div_(self.norm.clamp_min(eps))
        return d_z if self._factor is None else d_z.mul_(self._factor)
