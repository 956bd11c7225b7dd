"""`losses.SupConLoss` of SupContrast."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .. import ops
from ..algebra import row_dots, unit_rows
from ..losses import nt_xent, sup_con
from ..modules.base import TypedModule
from ..ops.groups import sums_and_counts
from ..options import Reduction
from ..primitives import cross_neg_lse, neg_lse
from ..scale import inverse_temperature
from ..validation import check_choice, check_rows, check_temperature
from ..watching import watch
from .shared import as_ids, check_dense

__all__ = ["SupConLoss"]

ContrastMode: TypeAlias = Literal["all", "one"]
CONTRAST_MODES: tuple[str, ...] = get_args(ContrastMode)


class SupConLoss(TypedModule):
    r"""SupCon's L_out, times temperature / base_temperature, averaged over all anchors.

    .. math:: L_i = \frac{\tau}{\tau_0} \Big[ \log \sum_{j \ne i} e^{s_{ij}/\tau}
        - \frac{1}{\sum_{j \ne i} m_{ij}} \sum_{j \ne i} m_{ij} s_{ij}/\tau \Big]

    where s_ij is the similarity of rows i and j, and m_ij is the mask's entry for their samples. With labels instead of
    a mask, m_ij is 1 for samples with the same label and 0 otherwise. With neither, m_ij is 1 for rows of the same
    sample and 0 otherwise. An anchor without a positive counts as 0 in the mean.

    Args:
        temperature: tau, a float or a 0-d tensor.
        contrast_mode: "all" to use all rows as anchors, "one" to use the rows of the first view.
        base_temperature: tau_0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a number is out of range, an option is unknown, or, when called, shapes or devices do not match, or
            labels and mask are both given.

    Memory is O(B V D), plus the mask, which is never repeated for the views. A mask that needs a gradient is copied
    once. With a mask, the formula needs only the weighted sum of an anchor's positives. These sums are the product of
    the mask with the rows, which takes 2 B^2 D flops in the forward and again in the backward.

    Example:
        >>> import torch
        >>> loss = SupConLoss(temperature=1.0, base_temperature=1.0)
        >>> loss(torch.eye(4)[:, None].repeat(1, 2, 1))
        tensor(1.1654)
    """

    def __init__(
        self, temperature: float | Tensor = 0.07, contrast_mode: ContrastMode = "all", base_temperature: float = 0.07
    ):
        super().__init__()
        check_choice("contrast_mode", contrast_mode, CONTRAST_MODES)
        check_temperature(temperature)
        check_temperature(base_temperature, name="base_temperature")
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the loss, a 0-d tensor.

        Args:
            features: (B, V, ...) for B samples and V views, normalised by the caller.
            labels: (B,) or (B, 1), of any dtype, or None.
            mask: (B, B), bool or numbers, not necessarily symmetric, or None. Entry (i, j) is m_ij for the rows of
                samples i and j. Without labels and mask the loss is SimCLR's.
        """
        check_dense("features", features)
        if features.ndim < 3:
            raise ValueError(f"features must have shape (B, V, ...), got {tuple(features.shape)}")
        if labels is not None and mask is not None:
            raise ValueError("labels and mask must not both be given")
        views = features.flatten(2).transpose(0, 1)  # (V, B, D)
        rows = views.flatten(0, 1)
        check_rows("features", rows)
        check_choice("contrast_mode", self.contrast_mode, CONTRAST_MODES)
        scale = self.temperature / self.base_temperature
        V, B, _ = views.shape
        if mask is not None:
            _check_mask(mask, rows, B)
            loss = _masked(views, mask.to(rows.device), self.temperature, self.contrast_mode)
            return watch(scale * loss, self.temperature, mask)
        if labels is None and self.contrast_mode == "all" and V == 2:
            return scale * nt_xent(views[0], views[1], self.temperature, normalize=False)
        ids = torch.arange(B, device=rows.device) if labels is None else _sample_labels(labels, rows[:B])
        if self.contrast_mode == "all":
            # With several views every row has a positive, so sup_con's mean over rows with a positive is over all rows.
            reduction: Reduction = "mean" if V > 1 else "sum"
            loss = sup_con(rows, torch.cat([ids] * V), self.temperature, reduction=reduction, normalize=False)
            factor = scale if V > 1 else scale / B
            return watch(_times(factor, loss), self.temperature, labels)
        return watch(scale * _first_view(views, ids, self.temperature), self.temperature, labels)


def _times(factor: float | Tensor, loss: Tensor) -> Tensor:
    return loss if type(factor) is float and factor == 1 else factor * loss


def _first_view(views: Tensor, ids: Tensor, temperature: float | Tensor) -> Tensor:
    total = unit_rows(views, normalize=False).sum(dim=0)
    sums, counts = sums_and_counts(total, ids)
    weights = (len(views) * (counts - 1)).to(sums.dtype)
    return _mean_loss(views, "one", temperature, total, sums - total, weights, torch.ones_like(weights))


def _masked(views: Tensor, mask: Tensor, temperature: float | Tensor, contrast_mode: str) -> Tensor:
    total = unit_rows(views, normalize=False).sum(dim=0)
    found = ops.mask_product(mask, torch.cat((total, total.new_ones(total.shape[0], 1)), dim=1))
    sums, weights = found[:, :-1], len(views) * found[:, -1]
    return _mean_loss(views, contrast_mode, temperature, total, sums, weights, mask.diagonal().to(total.dtype))


def _mean_loss(
    views: Tensor,
    contrast_mode: str,
    temperature: float | Tensor,
    total: Tensor,
    sums: Tensor,
    weights: Tensor,
    own: Tensor,
) -> Tensor:
    """Return the mean loss of the anchors.

    For each sample, `total` (B, D) is the sum of its rows, `sums` (B, D) the weighted sum of other samples' rows,
    `weights` (B,) the sum of these weights, and `own` (B,) the weight of the sample's own rows. L_out is linear in the
    positives, so it needs only their weighted sum: `sums`, plus `own` times the sum of the sample's rows other than the
    anchor.
    """
    rows = unit_rows(views, normalize=False).flatten(0, 1)
    every = torch.arange(rows.shape[0], device=rows.device)
    if contrast_mode == "all":
        anchors, n_views = rows, len(views)
        nu = neg_lse(rows, every, temperature)
    else:
        anchors, n_views = rows[: sums.shape[0]], 1
        nu = cross_neg_lse(anchors, rows, every[: sums.shape[0]], every, temperature).rows
    own = own.repeat(n_views)
    weights = weights.repeat(n_views) + (len(views) - 1) * own
    positives = sums.repeat(n_views, 1)
    if len(views) > 1:  # with one view the term is 0, but its gradient would be the difference of two large numbers
        positives = positives + own[:, None] * (total.repeat(n_views, 1) - anchors)
    logits = inverse_temperature(temperature, rows) * row_dots(anchors, positives)
    nu = nu.masked_fill(nu == -torch.inf, 0)  # a single row has nothing to compare with and no positive
    return ((weights * nu - logits) / torch.where(weights < 1e-6, 1, weights)).mean()


def _sample_labels(labels: Tensor, rows: Tensor) -> Tensor:
    check_dense("labels", labels)
    if labels.numel() != rows.shape[0]:
        raise ValueError(
            f"labels must have shape ({rows.shape[0]},) or ({rows.shape[0]}, 1), got {tuple(labels.shape)}"
        )
    return as_ids("labels", labels.reshape(-1), rows)


def _check_mask(mask: Tensor, rows: Tensor, n_samples: int) -> None:
    check_dense("mask", mask)
    if mask.is_meta and not rows.is_meta:
        raise TypeError(f"mask must hold numbers or bool, got {mask.dtype} on {mask.device}")
    if mask.shape != (n_samples, n_samples):
        raise ValueError(f"mask must have shape ({n_samples}, {n_samples}), got {tuple(mask.shape)}")
