"""The debiased loss and HCL, its loss with hard negatives, as modules."""

from __future__ import annotations

from torch import Tensor

from ..losses import debiased, hard_negative
from ..validation import check_parameter
from .base import ModuleOptions, TemperatureLoss, Unpack


class DebiasedLoss(TemperatureLoss):
    r"""The debiased contrastive loss as a module; see `debiased` for `tau_plus`. The other arguments are as of
    `NTXentLoss`.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.DebiasedLoss(temperature=1.0, tau_plus=0.1)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(1.0246)
    """

    _shown = ("tau_plus",)

    def __init__(self, temperature: float | Tensor = 0.5, *, tau_plus: float = 0.1, **options: Unpack[ModuleOptions]):
        super().__init__(temperature, **options)
        self.tau_plus = check_parameter("tau_plus", tau_plus)

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        return debiased(z_i, z_j, self.temperature, tau_plus=self.tau_plus, **self._options)


class HardNegativeLoss(TemperatureLoss):
    r"""HCL as a module; see `hard_negative` for `tau_plus` and `beta`. The other arguments are as of `NTXentLoss`.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.HardNegativeLoss(temperature=1.0, tau_plus=0.1, beta=1.0)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(1.0246)
    """

    _shown = ("tau_plus", "beta")

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        tau_plus: float = 0.1,
        beta: float = 1.0,
        **options: Unpack[ModuleOptions],
    ):
        super().__init__(temperature, **options)
        self.tau_plus = check_parameter("tau_plus", tau_plus)
        self.beta = check_parameter("beta", beta)

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        return hard_negative(z_i, z_j, self.temperature, tau_plus=self.tau_plus, beta=self.beta, **self._options)
