"""What the modules share: a temperature that may be learnt, and the options of every loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from ..backends import check_name as check_backend
from ..common import in_double
from ..distributed import Group, Sharding
from ..options import BackendName, Reduction
from ..validation import check_reduction, check_temperature

_P = ParamSpec("_P")
_R_co = TypeVar("_R_co", covariant=True)


class _HasForward(Protocol[_P, _R_co]):
    def forward(self, *args: _P.args, **kwargs: _P.kwargs) -> _R_co: ...


class _Options(TypedDict):
    """What every loss takes by these names."""

    reduction: Reduction
    normalize: bool
    backend: BackendName
    group: Group | None


class TypedModule(nn.Module):
    """A module whose call has, for type checkers, the signature of its `forward`: nn.Module's takes and returns Any."""

    if TYPE_CHECKING:

        def __call__(self: _HasForward[_P, _R_co], *args: _P.args, **kwargs: _P.kwargs) -> _R_co: ...


class TemperatureLoss(TypedModule):
    """A temperature, a reduction, whether rows are normalised, a backend, and the ranks of the batch."""

    _shown: tuple[str, ...] = ()  # attributes of a subclass that repr() shows

    def __init__(
        self,
        temperature: float | Tensor,
        *,
        reduction: Reduction,
        normalize: bool,
        backend: BackendName,
        group: Group | None,
        learn_temperature: bool,
    ):
        super().__init__()
        temperature = check_temperature(temperature)
        check_reduction(reduction)
        check_backend(backend)
        self.reduction = reduction
        self.normalize = normalize
        self.backend = backend
        self.group = group if group is None or isinstance(group, Sharding) else Sharding(group)
        self.learn_temperature = learn_temperature
        if learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(_log(temperature)))
        else:
            self._temperature = temperature

    @property
    def temperature(self) -> float | Tensor:
        """tau: as it was given, or a 0-d tensor that follows the parameter, in float64 where the device has it. May be
        set, to schedule it."""
        return in_double(self.log_temperature).exp() if self.learn_temperature else self._temperature

    @temperature.setter
    def temperature(self, value: float | Tensor) -> None:
        value = check_temperature(value)
        if self.learn_temperature:
            with torch.no_grad():
                self.log_temperature.fill_(_log(value))
        else:
            self._temperature = value

    @property
    def _options(self) -> _Options:
        return {
            "reduction": self.reduction,
            "normalize": self.normalize,
            "backend": self.backend,
            "group": self.group,
        }

    def extra_repr(self) -> str:
        temperature = "learn_temperature=True" if self.learn_temperature else f"temperature={self._temperature}"
        shown = [f"{name}={getattr(self, name)!r}" for name in ("reduction", "normalize", "backend", *self._shown)]
        return ", ".join([temperature, *shown])


def _log(temperature: float | Tensor) -> float:
    return math.log(temperature.item() if isinstance(temperature, Tensor) else temperature)
