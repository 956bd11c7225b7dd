"""torchmultimodal's `modules.losses.contrastive_loss_with_temperature`."""

from __future__ import annotations

import math
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common import factor, reduce
from ..losses.two_towers import clip_directions
from ..validation import check_in_range, check_reduction, check_rows, check_same
from .shared import Logits, require_one_process

__all__ = [
    "DEFAULT_LOGIT_SCALE",
    "BackpropType",
    "ContrastiveLossOutput",
    "ContrastiveLossWithTemperature",
    "contrastive_loss_with_temperature",
]

DEFAULT_LOGIT_SCALE = math.log(1 / 0.07)


class BackpropType(Enum):
    """To which processes a gathered row's gradient goes; of no consequence in one."""

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


def contrastive_loss_with_temperature(
    embeddings_a: Tensor,
    embeddings_b: Tensor,
    logit_scale: Tensor,
    mask: Tensor | None = None,
    backprop_type: BackpropType = BackpropType.GLOBAL,
    cross_entropy_kwargs: dict[str, Any] | None = None,
) -> ContrastiveLossOutput:
    """CLIP's loss of rows as they are, both directions from one pass over the similarities.

    Args:
        embeddings_a, embeddings_b: (N, D); the caller normalises them.
        logit_scale: the logarithm of what multiplies the similarities.
        mask: (N,) bool: the rows whose losses count; the others still are negatives. Without any the loss is 0
            (torchmultimodal's is NaN).
        backprop_type: of no consequence in one process.
        cross_entropy_kwargs: `label_smoothing` and `reduction`; the other options of cross_entropy are refused.

    Returns:
        A named tuple (loss, logits_a, logits_b, loss_a, loss_b).

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit together, or an option of cross_entropy is none of the two.
        RuntimeError: in a group of several processes, for now.

    Example:
        >>> import torch
        >>> contrastive_loss_with_temperature(torch.eye(4), torch.eye(4), torch.tensor(0.0)).loss
        tensor(0.7437)
    """
    require_one_process("contrastive_loss_with_temperature")
    check_rows("embeddings_a", embeddings_a)
    check_rows("embeddings_b", embeddings_b)
    check_same("embeddings_a", embeddings_a, "embeddings_b", embeddings_b, "shape", "dtype", "device")
    smoothing, reduction = _cross_entropy_options(**(cross_entropy_kwargs or {}))
    scale = factor(logit_scale.exp(), embeddings_a)
    losses = clip_directions(embeddings_a, embeddings_b, scale, None, smoothing, "auto")
    logits_a, logits_b = embeddings_a, embeddings_b
    counted = None
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != embeddings_a.shape[:1]:
            raise ValueError(
                f"mask must be bool of shape ({embeddings_a.shape[0]},), got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        logits_a, logits_b = embeddings_a[mask], embeddings_b[mask]
        if reduction == "none":
            losses = type(losses)(*(loss[mask] for loss in losses))
        else:
            counted = mask
            losses = type(losses)(*(loss.masked_fill(~mask, 0) for loss in losses))
    loss_a, loss_b = (reduce(loss, reduction, counted=counted) for loss in losses)
    return ContrastiveLossOutput(
        (loss_a + loss_b) / 2,
        Logits(logits_a, embeddings_b, scale),
        Logits(logits_b, embeddings_a, scale),
        loss_a,
        loss_b,
    )


class ContrastiveLossWithTemperature(nn.Module):
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
        return contrastive_loss_with_temperature(
            embeddings_a, embeddings_b, self.logit_scale, mask, backprop_type, cross_entropy_kwargs
        ).loss


def _cross_entropy_options(
    label_smoothing: float = 0.0, reduction: str = "mean", **others: object
) -> tuple[float, str]:
    if others:
        raise ValueError(f"cross_entropy_kwargs must be of label_smoothing and reduction, got {', '.join(others)} too")
    check_in_range("label_smoothing", label_smoothing, 0, 1, with_low=True, with_high=False)
    check_reduction(reduction)
    return label_smoothing, reduction
