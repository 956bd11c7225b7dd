"""InfoNCE with a guide as a module."""

from __future__ import annotations

from torch import Tensor

from ..losses import guided_info_nce
from ..options import MARGIN_STRATEGIES, MarginStrategy
from ..validation import check_choice, check_parameter
from .base import ModuleOptions, TemperatureLoss, Unpack


class GuidedInfoNCELoss(TemperatureLoss):
    r"""InfoNCE without the negatives that a guide takes for positives, as a module; see `guided_info_nce` for the
    formula and the options that are named there.

    Its call takes query, key, the guide's of both, and optionally explicit negatives (K, D) and the guide's of those.
    The other arguments are as of `NTXentLoss`.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(3)
        >>> guide = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])  # samples 0 and 2 are alike
        >>> fastntxent.GuidedInfoNCELoss(temperature=1.0, margin=0.5, reduction="none")(z, z, guide, guide)
        tensor([0.7437, 1.1654, 0.7437])
    """

    _shown = ("margin", "margin_strategy", "contrast_anchors", "contrast_positives")

    def __init__(
        self,
        temperature: float | Tensor = 0.01,
        *,
        margin: float = 0.0,
        margin_strategy: MarginStrategy = "absolute",
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        **options: Unpack[ModuleOptions],
    ):
        super().__init__(temperature, **options)
        check_choice("margin_strategy", margin_strategy, MARGIN_STRATEGIES)
        self.margin = check_parameter("margin", margin)
        self.margin_strategy = margin_strategy
        self.contrast_anchors = contrast_anchors
        self.contrast_positives = contrast_positives

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        guide_query: Tensor,
        guide_key: Tensor,
        negatives: Tensor | None = None,
        guide_negatives: Tensor | None = None,
    ) -> Tensor:
        return guided_info_nce(
            query,
            key,
            guide_query,
            guide_key,
            self.temperature,
            margin=self.margin,
            margin_strategy=self.margin_strategy,
            negatives=negatives,
            guide_negatives=guide_negatives,
            contrast_anchors=self.contrast_anchors,
            contrast_positives=self.contrast_positives,
            **self._options,
        )
