"""The losses as modules."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .backends import check_name as check_backend
from .functional import nt_xent
from .validation import check_reduction, check_temperature


class NTXentLoss(nn.Module):
    r"""NT-Xent, the loss of SimCLR, as a module; see `nt_xent` for the formula, shapes, dtypes and errors.

    Args:
        temperature: tau > 0, a float, or a 0-d tensor.
        reduction: "mean" (the paper's 1/(2N)), "sum" or "none".
        normalize: whether rows are scaled to unit length first.
        backend: "auto", or a name from `backends()`.
        learn_temperature: make the temperature a parameter. It is held as its logarithm, `log_temperature`, so no
            step of an optimiser can make it negative; leave it out of the weight decay.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.NTXentLoss(temperature=1.0)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(1.1654)
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        reduction: str = "mean",
        normalize: bool = True,
        backend: str = "auto",
        learn_temperature: bool = False,
    ):
        super().__init__()
        check_temperature(temperature)
        check_reduction(reduction)
        check_backend(backend)
        self.reduction = reduction
        self.normalize = normalize
        self.backend = backend
        self.learn_temperature = learn_temperature
        if learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(_log(temperature)))
        else:
            self._temperature = temperature

    @property
    def temperature(self) -> float | Tensor:
        """tau: as it was given, or a 0-d tensor that follows the parameter. May be set, to schedule it."""
        return self.log_temperature.exp() if self.learn_temperature else self._temperature

    @temperature.setter
    def temperature(self, value: float | Tensor) -> None:
        check_temperature(value)
        if self.learn_temperature:
            with torch.no_grad():
                self.log_temperature.fill_(_log(value))
        else:
            self._temperature = value

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        return nt_xent(
            z_i,
            z_j,
            self.temperature,
            reduction=self.reduction,
            normalize=self.normalize,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        temperature = "learn_temperature=True" if self.learn_temperature else f"temperature={self._temperature}"
        return f"{temperature}, reduction={self.reduction!r}, normalize={self.normalize}, backend={self.backend!r}"


def _log(temperature: float | Tensor) -> float:
    return math.log(temperature.item() if isinstance(temperature, Tensor) else temperature)
