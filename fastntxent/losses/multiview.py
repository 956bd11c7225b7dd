"""NT-Xent of any number of views, with false negatives removed, smoothed labels or a temperature for each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import check_name as check_backend
from ..backends.base import row_losses
from ..common import (
    group_counts,
    group_dots,
    inverse_temperature,
    n_samples,
    neg_lse_of_rows,
    reduce,
    sample_ids,
    unit_rows,
    watched,
)
from ..distributed import Group, Shard, open_shard
from ..ops import autocast_off
from ..options import BackendName, Reduction
from ..validation import (
    check_ids,
    check_in_range,
    check_reduction,
    check_row_count,
    check_rows,
    check_same,
    check_tensor,
)


@watched
def multiview_nt_xent(
    views: Tensor | Sequence[Tensor],
    temperature: float | Tensor = 0.5,
    *,
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""NT-Xent of V views: every other view of a row's sample is a positive of its own, and never a negative.

    .. math::
        L = \frac{1}{V N (V - 1)} \sum_{i=1}^{V N} \sum_{p \in P(i)} \log\big(1 + e^{\nu_i - s_{ip}/\tau}\big), \qquad
        \nu_i = \log \sum_{j : n(j) \ne n(i)} e^{s_{ij}/\tau}

    One term for each ordered pair of views, as of Tian et al., "Contrastive Multiview Coding", 2020, with the
    negatives of all views; with V = 2 it is `nt_xent`.

    Args:
        views: (V, N, D), or a sequence of V tensors (N, D), V >= 2; row n of each view belongs to sample n.
        temperature: as in `nt_xent`; a tensor (V N,) is one for each row, view after view.
        ids, label_smoothing, reduction, normalize, backend, group: as in `nt_xent`.

    Returns:
        A 0-d tensor, or (V N,) for "none", view after view; float64 for float64 embeddings, else float32.

    Raises:
        TypeError, ValueError, RuntimeError: as `nt_xent`; ValueError for fewer than two views.

    Deterministic, and O(V N D + V^2 N) memory.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4)
        >>> fastntxent.multiview_nt_xent([z, z, z], temperature=1.0)  # log(e + 9) - 1
        tensor(1.4612)
    """
    z = _stacked(views, may_be_empty=group is not None)
    check_reduction(reduction)
    check_backend(backend)
    label_smoothing = check_in_range("label_smoothing", label_smoothing, 0, 1, with_low=True, with_high=False)
    if ids is not None:
        check_ids("ids", ids, "each view", z[0])
    shard = open_shard(
        group, "multiview_nt_xent", z[0], backend, views=len(z), temperature=temperature, ids_given=ids is not None,
        label_smoothing=label_smoothing, reduction=reduction, normalize=normalize,
    )  # fmt: skip
    inv_tau = inverse_temperature(temperature, z, per_row=z.shape[0] * z.shape[1], shard=shard)
    losses = multiview_losses(z, inv_tau, ids, label_smoothing, normalize, backend, shard)
    return reduce(losses, reduction, shard=shard)


def multiview_losses(
    z: Tensor,
    inv_tau: Tensor,
    ids: Tensor | None,
    label_smoothing: float,
    normalize: bool,
    backend: str,
    shard: Shard | None,
) -> Tensor:
    """The mean over each row's positives: (V, N, D) -> (V N,). `inv_tau` is 0-d or (V N,)."""
    V, N, _ = z.shape
    u = unit_rows(z, normalize)
    rows = u.flatten(0, 1)
    groups = (sample_ids(z[0], shard) if ids is None else ids).repeat(V)
    nu = neg_lse_of_rows(rows, groups, inv_tau, backend, shard)
    by_view = inv_tau.view(V, 1, N) if inv_tau.ndim else inv_tau
    with autocast_off(z):
        pos = by_view * torch.einsum("and,bnd->abn", u, u)  # of view a's row n with view b's
    losses = row_losses(nu.view(V, 1, N), pos)
    if label_smoothing:
        # Cross-entropy's smoothing adds eps times (the positive's logit - the mean logit of the candidates).
        sims = group_dots(rows, rows, None, shard) - group_dots(rows, rows, groups, shard)
        negatives = (inv_tau * sims).view(V, 1, N)
        candidates = (V * n_samples(z[0], shard) - group_counts(groups, shard) + 1).view(V, 1, N)
        losses = losses + label_smoothing * (pos - (pos + negatives) / candidates)
    itself = torch.eye(V, dtype=torch.bool, device=z.device).unsqueeze(2)
    return losses.masked_fill(itself, 0).sum(dim=1).flatten() / (V - 1)


def _stacked(views: Tensor | Sequence[Tensor], *, may_be_empty: bool) -> Tensor:
    """The views as one checked tensor (V, N, D)."""
    if isinstance(views, Tensor):
        check_tensor("views", views)
        if views.ndim != 3:
            raise ValueError(f"views must have shape (V, N, D), got {tuple(views.shape)}")
    elif not isinstance(views, (list, tuple)):
        raise TypeError(f"views must be a tensor or a sequence of tensors, got {type(views).__name__}")
    if len(views) < 2:
        raise ValueError(f"views must hold at least two views, got {len(views)}")
    for index, view in enumerate(views):
        check_rows(f"views[{index}]", view, may_be_empty=may_be_empty)
        check_same("views[0]", views[0], f"views[{index}]", view, "shape", "dtype", "device")
    check_row_count("views together", len(views) * views[0].shape[0])
    return views if isinstance(views, Tensor) else stack_views(views)


def stack_views(views: Sequence[Tensor]) -> Tensor:
    """(V, N, D). Autocast has an opinion on stacking, and on float16 in bfloat16 an error."""
    with autocast_off(views[0]):
        return torch.stack(tuple(views))
