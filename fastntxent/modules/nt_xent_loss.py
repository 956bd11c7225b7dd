"""NT-Xent, the loss of SimCLR, as a module."""

from __future__ import annotations

from torch import Tensor

from ..losses import nt_xent
from ..losses.false_negatives import Limits
from ..validation import check_parameter
from .base import ModuleOptions, TemperatureLoss, Unpack


class NTXentLoss(TemperatureLoss):
    r"""NT-Xent, the loss of SimCLR, as a module; see `nt_xent` for the formula, shapes, dtypes and errors.

    Args:
        temperature: tau > 0, a float, or a 0-d tensor.
        label_smoothing: in [0, 1).
        margin, relative_margin, ceiling: as in `nt_xent`.
        reduction: "mean" (the paper's 1/(2N)), "sum" or "none".
        normalize: whether rows are scaled to unit length first.
        backend: "auto", or a name from `backends()`.
        group: the ranks over which the batch is spread, as in `nt_xent`.
        learn_temperature: make the temperature a parameter. It is held as its logarithm, `log_temperature`, so no
            step of an optimiser can make it negative; leave it out of the weight decay.

    Its call takes `ids` too, to leave false negatives out.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.NTXentLoss(temperature=1.0)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(1.1654)
    """

    _shown = ("label_smoothing", "margin", "relative_margin", "ceiling")

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        label_smoothing: float = 0.0,
        margin: float | None = None,
        relative_margin: float | None = None,
        ceiling: float | None = None,
        **options: Unpack[ModuleOptions],
    ):
        super().__init__(temperature, **options)
        self.label_smoothing = check_parameter("label_smoothing", label_smoothing)
        Limits.checked(margin, relative_margin, ceiling, label_smoothing)
        self.margin, self.relative_margin, self.ceiling = margin, relative_margin, ceiling

    def forward(self, z_i: Tensor, z_j: Tensor, ids: Tensor | None = None) -> Tensor:
        return nt_xent(
            z_i,
            z_j,
            self.temperature,
            ids=ids,
            label_smoothing=self.label_smoothing,
            margin=self.margin,
            relative_margin=self.relative_margin,
            ceiling=self.ceiling,
            **self._options,
        )
