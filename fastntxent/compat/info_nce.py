"""`info_nce.InfoNCE` and `info_nce.info_nce` of info-nce-pytorch."""

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
    """InfoNCE from queries to keys as a module; see `info_nce`.

    Args:
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there.
        reduction: "mean", "sum" or "none".
        negative_mode: "unpaired" if all queries share the negative_keys, or "paired" if each query has its own.

    Raises:
        TypeError: when called, an argument has the wrong type or dtype.
        ValueError: when called, shapes, dtypes or devices do not match, the batch is empty, a number is out of range,
            or an option is unknown.

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
        """Return the loss: a 0-d tensor, or (N,) for reduction "none".

        Args:
            query: (N, D), normalised here.
            positive_key: (N, D), normalised here.
            negative_keys: None, (K, D) if negative_mode is "unpaired", or (N, K, D) if it is "paired".
        """
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
    """InfoNCE from queries to keys, in one direction only: `fastntxent.info_nce`.

    Args:
        query: (N, D), normalised here.
        positive_key: (N, D), normalised here.
        negative_keys: Negatives that replace the other samples' keys. (K, D), shared by all queries, if negative_mode
            is "unpaired"; (N, K, D), separate for each query, if it is "paired". None uses the other samples' keys.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there.
        reduction: "mean", "sum" or "none".
        negative_mode: "unpaired" or "paired".

    Returns:
        A 0-d tensor, or (N,) for "none"; float64 for float64 embeddings, else float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, dtypes or devices do not match, the batch is empty, a number is out of range, or an option
            is unknown.

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
            raise ValueError(
                f"negative_keys must have {len(query)} sets, one per query, got shape {tuple(negative_keys.shape)}"
            )
        if not negative_keys.shape[-2]:
            raise ValueError(f"negative_keys must have at least one key, got shape {tuple(negative_keys.shape)}")
        check_features("query", query, "negative_keys", negative_keys)
    return losses.info_nce(query, positive_key, temperature, negatives=negative_keys, reduction=reduction)
