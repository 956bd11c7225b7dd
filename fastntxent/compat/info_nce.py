"""info-nce-pytorch's `info_nce.InfoNCE` and `info_nce.info_nce`."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from torch import Tensor

from .. import losses
from ..modules.base import TypedModule
from ..options import Reduction
from ..validation import check_choice, check_features, check_rows, check_same
from .shared import check_dense

__all__ = ["InfoNCE", "info_nce"]

NegativeMode: TypeAlias = Literal["unpaired", "paired"]
NEGATIVE_MODES: tuple[str, ...] = get_args(NegativeMode)


class InfoNCE(TypedModule):
    """`info_nce` as a module: call it with query, positive_key and optionally negative_keys.

    Example:
        >>> import torch
        >>> InfoNCE(temperature=1.0)(torch.eye(4), torch.eye(4))
        tensor(0.7437)
    """

    def __init__(
        self, temperature: float | Tensor = 0.1, reduction: Reduction = "mean", negative_mode: NegativeMode = "unpaired"
    ):
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        return info_nce(
            query,
            positive_key,
            negative_keys,
            temperature=self.temperature,
            reduction=self.reduction,
            negative_mode=self.negative_mode,
        )


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    negative_mode: NegativeMode = "unpaired",
) -> Tensor:
    """InfoNCE from queries to keys, one direction, 1/N: `fastntxent.info_nce`.

    Args:
        query, positive_key: (N, D), normalised here.
        negative_keys: in place of the other samples' keys: (K, D), all queries', if negative_mode is "unpaired";
            (N, K, D), each query's own, if "paired".
        temperature: as in `nt_xent`.
        reduction: "mean", "sum" or "none".

    Returns:
        A 0-d tensor, or (N,) for "none".

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit together; ValueError also for an empty batch.

    Example:
        >>> import torch
        >>> info_nce(torch.eye(4), torch.eye(4), temperature=1.0)  # log(e + 3) - 1
        tensor(0.7437)
    """
    check_choice("negative_mode", negative_mode, NEGATIVE_MODES)
    check_rows("query", query)
    check_rows("positive_key", positive_key)
    check_same("query", query, "positive_key", positive_key, "shape", "dtype", "device")
    if negative_keys is not None:
        check_dense("negative_keys", negative_keys)
        check_same("query", query, "negative_keys", negative_keys, "dtype", "device")
        expected = 2 if negative_mode == "unpaired" else 3
        if negative_keys.ndim != expected:
            raise ValueError(
                f"negative_keys must have {expected} dimensions if negative_mode is {negative_mode!r}, "
                f"got shape {tuple(negative_keys.shape)}"
            )
        if negative_mode == "paired" and len(negative_keys) != len(query):
            raise ValueError(f"negative_keys must be of {len(query)} queries, got shape {tuple(negative_keys.shape)}")
        if not negative_keys.shape[-2]:
            raise ValueError(f"negative_keys must have at least one key, got shape {tuple(negative_keys.shape)}")
        check_features("query", query, "negative_keys", negative_keys)
    return losses.info_nce(query, positive_key, temperature, negatives=negative_keys, reduction=reduction)
