"""torchmultimodal's `modules.losses.contrastive_loss_with_temperature`."""

from __future__ import annotations

import math
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common import factor, reduce, unit_rows
from ..distributed import Shard, open_shard
from ..losses.two_towers import clip_directions
from ..modules.base import TypedModule
from ..validation import (
    check_factor,
    check_in_range,
    check_positive,
    check_reduction,
    check_rows,
    check_same,
    extremes,
)
from .shared import Logits, check_dense, default_group

__all__ = [
    "DEFAULT_LOGIT_SCALE",
    "BackpropType",
    "ContrastiveLossOutput",
    "ContrastiveLossWithTemperature",
    "contrastive_loss_with_temperature",
]

DEFAULT_LOGIT_SCALE = math.log(1 / 0.07)


class BackpropType(Enum):
    """To which processes a gathered row's gradient goes. Of no consequence here: the gradient is that of GLOBAL."""

    GLOBAL = 0
    LOCAL = 1
    NONE = 2


class ContrastiveLossOutput(NamedTuple):
    """What `contrastive_loss_with_temperature` returns: the logits are not formed, `dense()` forms them."""

    loss: Tensor
    logits_a: Logits
    logits_b: Logits
    loss_a: Tensor
    loss_b: Tensor


class _Terms(NamedTuple):
    a: Tensor
    b: Tensor
    scale: Tensor
    loss_a: Tensor
    loss_b: Tensor
    shard: Shard | None


def contrastive_loss_with_temperature(
    embeddings_a: Tensor,
    embeddings_b: Tensor,
    logit_scale: Tensor,
    mask: Tensor | None = None,
    backprop_type: BackpropType = BackpropType.GLOBAL,
    cross_entropy_kwargs: dict[str, Any] | None = None,
) -> ContrastiveLossOutput:
    """CLIP's loss of rows as they are, both directions from one pass over the similarities.

    As torchmultimodal's, in a process group it is that of the batch of all ranks: `group=` of `fastntxent.clip`. "mean"
    and "sum" are the whole batch's, on every rank (theirs are of the rank's own rows).

    Args:
        embeddings_a, embeddings_b: (N, D); the caller normalises them.
        logit_scale: the logarithm of what multiplies the similarities.
        mask: (N,) bool: the rows whose losses count; the others still are negatives. Without any the loss is 0
            (torchmultimodal's is NaN).
        backprop_type: of no consequence: the gradient is that of GLOBAL, the right one. In torchmultimodal LOCAL and
            NONE lack what a rank's rows are as other ranks' columns, NONE also as its own.
        cross_entropy_kwargs: `label_smoothing` and `reduction`; the other options of cross_entropy are refused.

    Returns:
        A named tuple (loss, logits_a, logits_b, loss_a, loss_b); the logits are those of this rank's rows.

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit together, or an option of cross_entropy is none of the two.

    Example:
        >>> import torch
        >>> contrastive_loss_with_temperature(torch.eye(4), torch.eye(4), torch.tensor(0.0)).loss
        tensor(0.7437)
    """
    a, b, scale, loss_a, loss_b, shard = _terms(embeddings_a, embeddings_b, logit_scale, mask, cross_entropy_kwargs)
    columns_a, columns_b = (shard.columns(rows).whole() if shard else rows for rows in (a, b))
    if mask is not None:
        a, b = a[mask], b[mask]
    return ContrastiveLossOutput(
        loss_a / 2 + loss_b / 2, Logits(a, columns_b, scale), Logits(b, columns_a, scale), loss_a, loss_b
    )


class ContrastiveLossWithTemperature(TypedModule):
    """`contrastive_loss_with_temperature` with its own logit scale, a parameter that is clamped at every call.

    Args:
        logit_scale: the logarithm of the scale at first, or a parameter that is used as it is.
        logit_scale_min, logit_scale_max: between which the logarithm is kept; one of them may be None.

    Example:
        >>> import torch
        >>> ContrastiveLossWithTemperature(logit_scale=0.0)(torch.eye(4), torch.eye(4)).detach()
        tensor(0.7437)
    """

    def __init__(
        self,
        logit_scale: float | nn.Parameter = DEFAULT_LOGIT_SCALE,
        logit_scale_min: float | None = math.log(1),
        logit_scale_max: float | None = math.log(100),
    ):
        super().__init__()
        if logit_scale_min is None and logit_scale_max is None:
            raise ValueError("logit_scale_min and logit_scale_max must not both be None")
        self.logit_scale_min = logit_scale_min
        self.logit_scale_max = logit_scale_max
        if not isinstance(logit_scale, nn.Parameter):
            logit_scale = nn.Parameter(torch.tensor(float(logit_scale)))
        self.logit_scale: nn.Parameter = logit_scale

    def forward(
        self,
        embeddings_a: Tensor,
        embeddings_b: Tensor,
        backprop_type: BackpropType = BackpropType.GLOBAL,
        cross_entropy_kwargs: dict[str, Any] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        self.logit_scale.data.clamp_(self.logit_scale_min, self.logit_scale_max)
        terms = _terms(embeddings_a, embeddings_b, self.logit_scale, mask, cross_entropy_kwargs)
        return terms.loss_a / 2 + terms.loss_b / 2


def _terms(
    embeddings_a: Tensor,
    embeddings_b: Tensor,
    logit_scale: Tensor,
    mask: Tensor | None,
    cross_entropy_kwargs: dict[str, Any] | None,
) -> _Terms:
    group = default_group()
    check_rows("embeddings_a", embeddings_a, may_be_empty=group is not None)
    check_rows("embeddings_b", embeddings_b, may_be_empty=group is not None)
    check_same("embeddings_a", embeddings_a, "embeddings_b", embeddings_b, "shape", "dtype", "device")
    smoothing, reduction = _cross_entropy_options(**(cross_entropy_kwargs or {}))
    check_factor("logit_scale", logit_scale, embeddings_a)
    if mask is not None:
        check_dense("mask", mask)
        check_same("mask", mask, "embeddings_a", embeddings_a, "device")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != embeddings_a.shape[:1]):
        raise ValueError(
            f"mask must be bool of shape ({embeddings_a.shape[0]},), got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    shard = open_shard(
        group, "contrastive_loss_with_temperature", embeddings_a, "auto", logit_scale=logit_scale,
        masked=mask is not None, label_smoothing=smoothing, reduction=reduction,
        b_requires_grad=embeddings_b.requires_grad,
    )  # fmt: skip
    a, b = (unit_rows(rows, normalize=False) for rows in (embeddings_a, embeddings_b))
    scale = factor(logit_scale, a, shard).exp()
    for extreme in extremes(scale) or ():
        check_positive("exp(logit_scale)", extreme)
    losses: tuple[Tensor, Tensor] = clip_directions(a, b, scale, None, smoothing, "auto", shard)
    if mask is not None and reduction == "none":
        losses = losses[0][mask], losses[1][mask]
    elif mask is not None:
        losses = losses[0].masked_fill(~mask, 0), losses[1].masked_fill(~mask, 0)
    loss_a, loss_b = (reduce(loss, reduction, counted=mask, shard=shard) for loss in losses)
    return _Terms(a, b, scale, loss_a, loss_b, shard)


def _cross_entropy_options(
    label_smoothing: float = 0.0, reduction: str = "mean", **others: object
) -> tuple[float, str]:
    if others:
        raise ValueError(f"cross_entropy_kwargs must be of label_smoothing and reduction, got {', '.join(others)} too")
    label_smoothing = check_in_range("label_smoothing", label_smoothing, 0, 1, with_low=True, with_high=False)
    check_reduction(reduction)
    return label_smoothing, reduction
