"""NT-Xent of several views as a module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..losses import multiview_nt_xent
from ..losses.false_negatives import Limits
from ..validation import check_parameter
from .base import ModuleOptions, TemperatureLoss, Unpack


class MultiViewNTXentLoss(TemperatureLoss):
    r"""NT-Xent of V views as a module; see `multiview_nt_xent`. Arguments as of `NTXentLoss`; its call takes the views,
    (V, N, D) or a sequence of (N, D), and `ids`.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.MultiViewNTXentLoss(temperature=1.0)
        >>> loss(torch.eye(4).repeat(3, 1, 1))
        tensor(1.4612)
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

    def forward(self, views: Tensor | Sequence[Tensor], ids: Tensor | None = None) -> Tensor:
        return multiview_nt_xent(
            views,
            self.temperature,
            ids=ids,
            label_smoothing=self.label_smoothing,
            margin=self.margin,
            relative_margin=self.relative_margin,
            ceiling=self.ceiling,
            **self._options,
        )
