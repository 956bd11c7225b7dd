"""DCL and DCLW, the decoupled losses, as modules."""

from __future__ import annotations

from torch import Tensor

from ..losses import dcl, dclw
from ..validation import check_positive_number
from .base import ModuleOptions, TemperatureLoss, Unpack


class DCLLoss(TemperatureLoss):
    r"""DCL as a module; see `dcl`. Arguments as of `NTXentLoss`.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.DCLLoss(temperature=1.0)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(0.7918)
    """

    def __init__(self, temperature: float | Tensor = 0.1, **options: Unpack[ModuleOptions]):
        super().__init__(temperature, **options)

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        return dcl(z_i, z_j, self.temperature, **self._options)


class DCLWLoss(TemperatureLoss):
    r"""DCLW as a module; see `dclw` for `sigma`. The other arguments are as of `NTXentLoss`.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.DCLWLoss(temperature=1.0)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(0.7918)
    """

    _shown = ("sigma",)

    def __init__(self, temperature: float | Tensor = 0.1, *, sigma: float = 0.5, **options: Unpack[ModuleOptions]):
        super().__init__(temperature, **options)
        self.sigma = check_positive_number("sigma", sigma)

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        return dclw(z_i, z_j, self.temperature, sigma=self.sigma, **self._options)
