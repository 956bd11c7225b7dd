"""SigLIP's and NT-Logistic's losses as modules, which may hold a temperature and a bias that are learnt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..losses import nt_logistic, siglip
from ..validation import check_bias, check_range
from .base import LossOptions, ModuleOptions, TemperatureLoss, Unpack


class _Biased:
    """Logits with a bias, a parameter `learnt_bias` where it is learnt."""

    learn_bias: bool
    learnt_bias: nn.Parameter
    _bias: float | Tensor

    def _set_bias(self, bias: float | Tensor, learn_bias: bool) -> None:
        bias = check_bias("bias", bias)
        self.learn_bias = learn_bias
        if learn_bias:
            self.learnt_bias = nn.Parameter(torch.tensor(_value(bias, torch.get_default_dtype())))
        else:
            self.__dict__["_bias"] = bias  # a parameter that is given stays its giver's

    @property
    def bias(self) -> float | Tensor:
        """b: as it was given, or the parameter. May be set."""
        return self.learnt_bias if self.learn_bias else self._bias

    @bias.setter
    def bias(self, value: float | Tensor) -> None:
        value = check_bias("bias", value)
        if self.learn_bias:
            with torch.no_grad():
                self.learnt_bias.fill_(_value(value, self.learnt_bias.dtype))
        else:
            self.__dict__["_bias"] = value


def _value(bias: float | Tensor, dtype: torch.dtype) -> float:
    """A bias as the first value of a parameter of that dtype."""
    value = float(bias.detach()) if isinstance(bias, Tensor) else bias
    check_range("bias", value, dtype)
    return value


class SigLIPLoss(_Biased, TemperatureLoss):
    r"""SigLIP's loss as a module, which holds its own temperature and bias; see `siglip`.

    Args:
        temperature: where it is learnt, its first value.
        bias: where it is learnt, its first value.
        learn_temperature: make the temperature a parameter, `log_temperature`; on by default, as in SigLIP.
        learn_bias: make the bias a parameter, `learnt_bias`; on by default, as in SigLIP.
        reduction, normalize, backend, group: as of `NTXentLoss`.

    Its call takes image and text features and `ids`.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.SigLIPLoss(temperature=1.0, bias=0.0)
        >>> loss(torch.eye(2), torch.eye(2)).detach()  # log(1 + 1/e) + log(2)
        tensor(1.0064)
    """

    _shown = ("learn_bias",)

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        bias: float | Tensor = -10.0,
        learn_temperature: bool = True,
        learn_bias: bool = True,
        **options: Unpack[LossOptions],
    ):
        super().__init__(temperature, learn_temperature=learn_temperature, **options)
        self._set_bias(bias, learn_bias)

    def forward(self, image_features: Tensor, text_features: Tensor, ids: Tensor | None = None) -> Tensor:
        return siglip(image_features, text_features, self.temperature, bias=self.bias, ids=ids, **self._options)


class NTLogisticLoss(_Biased, TemperatureLoss):
    r"""NT-Logistic as a module; see `nt_logistic`.

    Args:
        temperature: as in `nt_logistic`.
        bias: as in `nt_logistic`; where it is learnt, its first value.
        learn_bias: make the bias a parameter, `learnt_bias`.
        reduction, normalize, backend, group, learn_temperature: as of `NTXentLoss`.

    Its call takes the two views and `ids`.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.NTLogisticLoss(temperature=1.0)
        >>> loss(torch.eye(2), torch.eye(2))  # log(1 + 1/e) + 2 log(2)
        tensor(1.6996)
    """

    _shown = ("learn_bias",)

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        bias: float | Tensor = 0.0,
        learn_bias: bool = False,
        **options: Unpack[ModuleOptions],
    ):
        super().__init__(temperature, **options)
        self._set_bias(bias, learn_bias)

    def forward(self, z_i: Tensor, z_j: Tensor, ids: Tensor | None = None) -> Tensor:
        return nt_logistic(z_i, z_j, self.temperature, bias=self.bias, ids=ids, **self._options)
