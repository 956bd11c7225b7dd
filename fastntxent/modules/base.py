"""The base class of the modules: a temperature that may be learnt, and the options of every loss."""

from __future__ import annotations

import inspect
import math
import sys
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from ..algebra import in_double
from ..backends import check_name as check_backend
from ..distributed import Group, Sharding
from ..options import BackendName, Reduction
from ..validation import check_flag, check_positive, check_reduction, check_temperature

if sys.version_info >= (3, 11):
    from typing import Unpack as Unpack
else:
    from typing_extensions import Unpack as Unpack  # PyTorch depends on it

_P = ParamSpec("_P")
_R_co = TypeVar("_R_co", covariant=True)


class _HasForward(Protocol[_P, _R_co]):
    def forward(self, *args: _P.args, **kwargs: _P.kwargs) -> _R_co: ...


class LossOptions(TypedDict, total=False):
    """The keyword arguments that every loss takes, whether a function or a module."""

    reduction: Reduction
    normalize: bool
    backend: BackendName
    group: Group | None


class ModuleOptions(LossOptions, total=False):
    """The keyword arguments that every module takes. `TemperatureLoss` sets the defaults."""

    learn_temperature: bool


class TypedModule(nn.Module):
    """A module whose `__call__` has, for type checkers, the signature of its `forward`. The `__call__` of nn.Module
    takes and returns Any."""

    if TYPE_CHECKING:

        def __call__(self: _HasForward[_P, _R_co], *args: _P.args, **kwargs: _P.kwargs) -> _R_co: ...


class TemperatureLoss(TypedModule):
    """A module with a temperature, a reduction, row normalisation, a backend and a group of ranks.

    The constructor of a loss takes all of these but the temperature as `**options` and passes them on. Its
    `__signature__` still lists each of them.
    """

    _shown: tuple[str, ...] = ()  # attributes of the subclass that repr() shows

    def __init__(
        self,
        temperature: float | Tensor,
        *,
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: BackendName = "auto",
        group: Group | None = None,
        learn_temperature: bool = False,
        **unknown: object,
    ):
        if unknown:
            name = next(iter(unknown))
            raise TypeError(f"{type(self).__qualname__}.__init__() got an unexpected keyword argument {name!r}")
        super().__init__()
        temperature = check_temperature(temperature)
        check_reduction(reduction)
        check_backend(backend)
        self.reduction = reduction
        self.normalize = check_flag("normalize", normalize)
        self.backend = backend
        self.group = group if group is None or isinstance(group, Sharding) else Sharding(group)
        self.learn_temperature = check_flag("learn_temperature", learn_temperature)
        if learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(_log(temperature)))
        else:
            self._temperature = temperature

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        constructor = vars(cls).get("__init__")
        ours = cls.__module__.startswith(f"{__package__}.")  # a user's `**options` may mean something else
        if ours and constructor is not None:
            constructor.__signature__ = _with_options_named(inspect.signature(constructor))

    @property
    def temperature(self) -> float | Tensor:
        """tau as it was given or set. With `learn_temperature`, a 0-d tensor computed from the parameter, in float64
        where the device supports it. Can be set, for example by a schedule."""
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
    def _options(self) -> LossOptions:
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


def _with_options_named(signature: inspect.Signature) -> inspect.Signature:
    """Return the signature with TemperatureLoss's keyword arguments in place of `**options`.

    If a loss sets its own default, as CLIPLoss does for learn_temperature, the signature has the loss's default.
    """
    own = dict(signature.parameters)
    if own.pop("options", None) is None:
        return signature
    base = inspect.signature(TemperatureLoss.__init__).parameters
    options = {name: parameter for name, parameter in base.items() if parameter.kind is parameter.KEYWORD_ONLY}
    others = {name: parameter for name, parameter in own.items() if name not in options}
    return signature.replace(parameters=[*(others | options | own).values()])


def _log(temperature: float | Tensor) -> float:
    number = temperature.item() if isinstance(temperature, Tensor) else temperature
    check_positive("temperature", number)  # `check_temperature` does not read a tensor on an accelerator
    return math.log(number)
