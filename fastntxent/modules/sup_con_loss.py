"""Supervised contrastive loss as a module."""

from __future__ import annotations

from torch import Tensor

from ..losses import sup_con
from ..losses.false_negatives import Limits
from ..options import FORMS, SupConForm
from ..validation import check_choice
from .base import ModuleOptions, TemperatureLoss, Unpack


class SupConLoss(TemperatureLoss):
    r"""SupCon as a module; see `sup_con` for the formulas, `form`, `ceiling` and `pair_weights`, here a buffer. The
    others are as of `NTXentLoss`.

    Its call takes the embeddings (M, D) and their labels, (M,) or (M, C).

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.SupConLoss(temperature=1.0)
        >>> loss(torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2))
        tensor(1.1654)
    """

    _shown = ("form", "ceiling")

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        form: SupConForm = "out",
        ceiling: float | None = None,
        pair_weights: Tensor | None = None,
        **options: Unpack[ModuleOptions],
    ):
        super().__init__(temperature, **options)
        check_choice("form", form, FORMS)
        Limits.checked(None, None, ceiling)
        self.form, self.ceiling = form, ceiling
        self.pair_weights: Tensor | None
        self.register_buffer("pair_weights", pair_weights)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return sup_con(
            z,
            labels,
            self.temperature,
            form=self.form,
            ceiling=self.ceiling,
            pair_weights=self.pair_weights,
            **self._options,
        )
