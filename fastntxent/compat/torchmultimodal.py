"""`modules.losses.contrastive_loss_with_temperature` of torchmultimodal."""

from __future__ import annotations

import math
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..losses.clip_loss import clip_directions
from ..modules.base import TypedModule
from ..opening import open_batch
from ..validation import (
    check_factor,
    check_parameter,
    check_positive,
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
    """The processes that receive the gradient of gathered rows. No effect here: the gradient is always GLOBAL's."""

    GLOBAL = 0
    LOCAL = 1
    NONE = 2


class ContrastiveLossOutput(NamedTuple):
    """The result of `contrastive_loss_with_temperature`. The logits are not formed until `dense()` is called.

    Attributes:
        loss: The mean of `loss_a` and `loss_b`: a 0-d tensor, or one value per row for reduction "none".
        logits_a: The logits of the rows of a against the rows of b.
        logits_b: The logits of the rows of b against the rows of a.
        loss_a: The loss of the rows of a.
        loss_b: The loss of the rows of b.

    Example:
        >>> import torch
        >>> output = contrastive_loss_with_temperature(torch.eye(4), torch.eye(4), torch.tensor(0.0))
        >>> output.loss_a, output.loss_b
        (tensor(0.7437), tensor(0.7437))
    """

    loss: Tensor
    logits_a: Logits
    logits_b: Logits
    loss_a: Tensor
    loss_b: Tensor


class _Opened(NamedTuple):
    batch: Batch
    scale: Tensor
    label_smoothing: float


def contrastive_loss_with_temperature(
    embeddings_a: Tensor,
    embeddings_b: Tensor,
    logit_scale: Tensor,
    mask: Tensor | None = None,
    backprop_type: BackpropType = BackpropType.GLOBAL,
    cross_entropy_kwargs: dict[str, Any] | None = None,
) -> ContrastiveLossOutput:
    """CLIP's loss of rows that the caller has normalised, in both directions from one pass over the similarities.

    As in torchmultimodal, in a process group the batch is spread over all ranks. "mean" and "sum" cover the whole batch
    and are the same on every rank (torchmultimodal's cover only the rank's rows).

    Args:
        embeddings_a: (N, D), normalised by the caller.
        embeddings_b: (N, D), normalised by the caller.
        logit_scale: Logarithm of the factor of the similarities, a 0-d tensor.
        mask: (N,) bool, the rows whose losses count, or None for all. The other rows are still negatives. If no row
            counts, the loss is 0 (torchmultimodal's is NaN).
        backprop_type: No effect: the gradient is always exact, as with GLOBAL. In torchmultimodal, LOCAL and NONE leave
            out the gradient that a rank's rows get as columns on other ranks. NONE also leaves out the gradient that
            they get as columns on their own rank.
        cross_entropy_kwargs: A dict that may have `label_smoothing` and `reduction`; other options of cross_entropy are
            an error.

    Returns:
        A named tuple (loss, logits_a, logits_b, loss_a, loss_b). The logits are for this rank's rows, or, with a mask,
        for the rows that the mask selects.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, dtypes or devices do not match, a number is out of range, or another option of cross_entropy
            is given.

    Example:
        >>> import torch
        >>> contrastive_loss_with_temperature(torch.eye(4), torch.eye(4), torch.tensor(0.0)).loss
        tensor(0.7437)
    """
    opened = _opened(embeddings_a, embeddings_b, logit_scale, mask, cross_entropy_kwargs)
    batch, scale, _ = opened
    a, b = batch.unit_rows(embeddings_a), batch.unit_rows(embeddings_b)
    loss_a, loss_b = _losses(opened, a, b, mask)
    columns_a, columns_b = batch.all_rows(a), batch.all_rows(b)
    if mask is not None:
        a, b = a[mask], b[mask]
    return ContrastiveLossOutput(
        loss_a / 2 + loss_b / 2, Logits(a, columns_b, scale), Logits(b, columns_a, scale), loss_a, loss_b
    )


class ContrastiveLossWithTemperature(TypedModule):
    """`contrastive_loss_with_temperature` with a learnt logit scale, which is clamped at every call.

    Args:
        logit_scale: Initial logarithm of the scale, or a parameter to use as it is.
        logit_scale_min: Lower bound of the logarithm, or None.
        logit_scale_max: Upper bound of the logarithm, or None. At least one of the bounds must be given.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: both bounds are None, or, when called, shapes, dtypes or devices do not match, a number is out of
            range, or another option of cross_entropy is given.

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
        """Return the loss, a 0-d tensor, or (N,) for reduction "none".

        Args:
            embeddings_a: (N, D), normalised by the caller.
            embeddings_b: (N, D), normalised by the caller.
            backprop_type: No effect: the gradient is always exact, as with GLOBAL. In torchmultimodal, LOCAL and NONE
                leave out the gradient that a rank's rows get as columns on other ranks. NONE also leaves out the
                gradient that they get as columns on their own rank.
            cross_entropy_kwargs: A dict that may have `label_smoothing` and `reduction`.
            mask: (N,) bool, the rows whose losses count, or None for all. The other rows are still negatives.
        """
        self.logit_scale.data.clamp_(self.logit_scale_min, self.logit_scale_max)
        opened = _opened(embeddings_a, embeddings_b, self.logit_scale, mask, cross_entropy_kwargs)
        if mask is None and not opened.label_smoothing:
            loss = opened.batch.info_nce_at_once(embeddings_a, embeddings_b, opened.scale, both=True)
            if loss is not None:
                return loss
        a, b = opened.batch.unit_rows(embeddings_a), opened.batch.unit_rows(embeddings_b)
        loss_a, loss_b = _losses(opened, a, b, mask)
        return loss_a / 2 + loss_b / 2


def _opened(
    embeddings_a: Tensor,
    embeddings_b: Tensor,
    logit_scale: Tensor,
    mask: Tensor | None,
    cross_entropy_kwargs: dict[str, Any] | None,
) -> _Opened:
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
    batch = open_batch(
        group, "contrastive_loss_with_temperature", {"embeddings_a": embeddings_a, "embeddings_b": embeddings_b},
        normalize=False, reduction=reduction, logit_scale=logit_scale, masked=mask is not None,
        label_smoothing=smoothing,
    )  # fmt: skip
    log_scale = batch.factor(logit_scale)
    assert isinstance(log_scale, Tensor)  # because logit_scale is a tensor
    scale = log_scale.exp()
    for extreme in extremes(scale) or ():
        check_positive("exp(logit_scale)", extreme)
    return _Opened(batch, scale, smoothing)


def _losses(opened: _Opened, a: Tensor, b: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the reduced losses of both directions."""
    batch, scale, smoothing = opened
    of_a, of_b = clip_directions(batch, a, b, scale, None, smoothing)
    if mask is None:
        return batch.reduce(of_a), batch.reduce(of_b)
    if batch.reduction == "none":
        return of_a[mask], of_b[mask]
    return tuple(batch.reduce(losses.masked_fill(~mask, 0), counted=mask) for losses in (of_a, of_b))  # type: ignore


def _cross_entropy_options(
    label_smoothing: float = 0.0, reduction: str = "mean", **others: object
) -> tuple[float, str]:
    if others:
        raise ValueError(f"cross_entropy_kwargs may have label_smoothing and reduction, got {', '.join(others)} too")
    return check_parameter("label_smoothing", label_smoothing), reduction
