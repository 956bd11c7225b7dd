"""Supervised contrastive loss as a module."""

from __future__ import annotations

from torch import Tensor

from ..distributed import Group
from ..losses import sup_con
from ..options import FORMS, BackendName, Reduction, SupConForm
from ..validation import check_choice
from .base import TemperatureLoss


class SupConLoss(TemperatureLoss):
    r"""SupCon as a module; see `sup_con` for the formulas and `form`. The other arguments are as of `NTXentLoss`.

    Its call takes the embeddings (M, D) and their labels, (M,) or (M, C).

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.SupConLoss(temperature=1.0)
        >>> loss(torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2))
        tensor(1.1654)
    """

    _shown = ("form",)

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        form: SupConForm = "out",
        reduction: Reduction = "mean",
        normalize: bool = True,
        backend: BackendName = "auto",
        group: Group | None = None,
        learn_temperature: bool = False,
    ):
        super().__init__(
            temperature,
            reduction=reduction,
            normalize=normalize,
            backend=backend,
            group=group,
            learn_temperature=learn_temperature,
        )
        check_choice("form", form, FORMS)
        self.form = form

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return sup_con(z, labels, self.temperature, form=self.form, **self._options)
