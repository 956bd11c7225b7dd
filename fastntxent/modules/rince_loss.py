"""Robust InfoNCE as a module."""

from __future__ import annotations

from torch import Tensor

from ..losses import rince
from ..validation import check_parameter
from .base import ModuleOptions, TemperatureLoss, Unpack


class RINCELoss(TemperatureLoss):
    r"""Robust InfoNCE as a module; see `rince` for `q` and `lam`. The other arguments are as of `NTXentLoss`.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.RINCELoss(temperature=1.0, q=1.0, lam=0.5)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(1.6409)
    """

    _shown = ("q", "lam")

    def __init__(
        self, temperature: float | Tensor = 0.5, *, q: float = 0.5, lam: float = 0.01, **options: Unpack[ModuleOptions]
    ):
        super().__init__(temperature, **options)
        self.q = check_parameter("q", q)
        self.lam = check_parameter("lam", lam)

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        return rince(z_i, z_j, self.temperature, q=self.q, lam=self.lam, **self._options)
