"""InfoNCE from queries to keys as a module."""

from __future__ import annotations

from torch import Tensor

from ..losses import info_nce
from ..losses.false_negatives import Limits
from ..losses.info_nce_loss import check_hardness, check_positives
from ..options import HardnessMode, Positives, SeveralForm
from ..validation import check_parameter
from .base import ModuleOptions, TemperatureLoss, Unpack


class InfoNCELoss(TemperatureLoss):
    r"""InfoNCE from queries to keys as a module; see `info_nce` for the formula and the options that are named there.

    Its call takes query, key, and optionally explicit negatives (K, D) or (N, K, D) and `ids`. The other arguments are
    as of `NTXentLoss`.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.InfoNCELoss(temperature=1.0)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(0.7437)
    """

    _shown = (
        "in_batch_negatives",
        "positives",
        "form",
        "label_smoothing",
        "margin",
        "relative_margin",
        "ceiling",
        "hardness_mode",
        "hardness_strength",
    )

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        in_batch_negatives: bool | None = None,
        positives: Positives = "pair",
        form: SeveralForm = "out",
        label_smoothing: float = 0.0,
        margin: float | None = None,
        relative_margin: float | None = None,
        ceiling: float | None = None,
        hardness_mode: HardnessMode = "all_negatives",
        hardness_strength: float = 0.0,
        **options: Unpack[ModuleOptions],
    ):
        super().__init__(temperature, **options)
        self.label_smoothing = check_parameter("label_smoothing", label_smoothing)
        limits = Limits.checked(margin, relative_margin, ceiling, label_smoothing)
        self.margin, self.relative_margin, self.ceiling = margin, relative_margin, ceiling
        self.hardness_mode = hardness_mode
        self.hardness_strength = check_hardness(hardness_mode, hardness_strength, label_smoothing)
        check_positives(
            positives, form, limits, label_smoothing=label_smoothing, hardness_strength=hardness_strength,
            in_batch_negatives=in_batch_negatives,
        )  # fmt: skip
        self.positives, self.form = positives, form
        self.in_batch_negatives = in_batch_negatives

    def forward(self, query: Tensor, key: Tensor, negatives: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        return info_nce(
            query,
            key,
            self.temperature,
            negatives=negatives,
            ids=ids,
            positives=self.positives,
            form=self.form,
            in_batch_negatives=self.in_batch_negatives,
            label_smoothing=self.label_smoothing,
            margin=self.margin,
            relative_margin=self.relative_margin,
            ceiling=self.ceiling,
            hardness_mode=self.hardness_mode,
            hardness_strength=self.hardness_strength,
            **self._options,
        )
