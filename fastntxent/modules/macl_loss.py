"""MACL, whose temperature adapts to the batch, as a module."""

from __future__ import annotations

from torch import Tensor

from ..losses import macl
from ..validation import check_parameter
from .base import ModuleOptions, TemperatureLoss, Unpack


class MACLLoss(TemperatureLoss):
    r"""MACL as a module; see `macl` for `alpha` and `a_0`. The other arguments are as of `NTXentLoss`.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.MACLLoss(temperature=0.5, alpha=1.0)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(1.6934)
    """

    _shown = ("alpha", "a_0")

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        alpha: float = 0.5,
        a_0: float = 0.0,
        **options: Unpack[ModuleOptions],
    ):
        super().__init__(temperature, **options)
        self.alpha = check_parameter("alpha", alpha)
        self.a_0 = check_parameter("a_0", a_0)

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        return macl(z_i, z_j, self.temperature, alpha=self.alpha, a_0=self.a_0, **self._options)
