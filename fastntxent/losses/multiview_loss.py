"""NT-Xent of any number of views, with false negatives removed, smoothed labels or a temperature for each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra import row_losses
from ..batch import Batch
from ..distributed import Group
from ..opening import open_batch
from ..ops import autocast_off
from ..options import BackendName, Reduction
from ..scale import is_per_row
from ..validation import check_parameter, check_row_count, check_rows, check_same, check_tensor
from ..watching import watched
from .false_negatives import Limits


@watched
def multiview_nt_xent(
    views: Tensor | Sequence[Tensor],
    temperature: float | Tensor = 0.5,
    *,
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    margin: float | None = None,
    relative_margin: float | None = None,
    ceiling: float | None = None,
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
        margin, relative_margin, ceiling: as in `nt_xent`; of several positives the least similar one counts.
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
    label_smoothing = check_parameter("label_smoothing", label_smoothing)
    limits = Limits.checked(margin, relative_margin, ceiling, label_smoothing)
    batch = open_batch(
        group, "multiview_nt_xent", {"each view": z[0]}, ids=ids, views=len(z), reduction=reduction,
        normalize=normalize, backend=backend, temperature=temperature, label_smoothing=label_smoothing,
        limits=limits,
    )  # fmt: skip
    inv_tau = batch.inverse_temperature(temperature, per_row=z.shape[0] * z.shape[1])
    return batch.reduce(multiview_losses(batch, z, inv_tau, ids, label_smoothing, limits))


def multiview_losses(
    batch: Batch,
    z: Tensor,
    inv_tau: float | Tensor,
    ids: Tensor | None,
    label_smoothing: float,
    limits: Limits | None,
) -> Tensor:
    """The mean over each row's positives: (V, N, D) -> (V N,). `inv_tau` is 0-d or (V N,)."""
    V, N, _ = z.shape
    u = batch.unit_rows(z)
    rows = u.flatten(0, 1)
    groups = (batch.sample_ids() if ids is None else ids).repeat(V)
    itself = torch.eye(V, dtype=torch.bool, device=z.device).unsqueeze(2)
    sims = torch.stack([(view * u).sum(dim=2) for view in u.unbind()])  # (V, V, N), of each view's row n with each's
    of_rows = None
    if limits is not None:
        to_positive, which = sims.masked_fill(itself, torch.inf).min(dim=1)  # the least similar one, and its view
        of_positive = u.gather(0, which.unsqueeze(2).expand_as(u))
        of_rows = limits.of(to_positive.flatten(), rows, of_positive.flatten(0, 1))
    nu = batch.neg_lse(rows, groups, inv_tau, of_rows)
    by_view = inv_tau.view(V, 1, N) if is_per_row(inv_tau) else inv_tau
    pos = by_view * sims
    losses = row_losses(nu.view(V, 1, N), pos)
    if label_smoothing:
        # Cross-entropy's smoothing adds eps times (the positive's logit - the mean logit of the candidates).
        summed = batch.all_dots(rows, rows) - batch.group_dots(rows, rows, groups)
        negatives = (inv_tau * summed).view(V, 1, N)
        candidates = (V * batch.n_samples - batch.group_counts(groups) + 1).view(V, 1, N)
        losses = losses + label_smoothing * (pos - (pos + negatives) / candidates)
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
    check_row_count(len(views) * views[0].shape[0], "views together")
    return views if isinstance(views, Tensor) else stack_views(views)


def stack_views(views: Sequence[Tensor]) -> Tensor:
    """(V, N, D). Autocast has an opinion on stacking, and on float16 in bfloat16 an error."""
    with autocast_off(views[0]):
        return torch.stack(tuple(views))
