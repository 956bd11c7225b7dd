"""NT-Xent of any number of views, optionally without false negatives, with smoothed labels, or with a temperature per
row."""

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
    r"""NT-Xent of V views: a row's other views are its positives, never its negatives.

    .. math::
        L = \frac{1}{V N (V - 1)} \sum_{i=1}^{V N} \sum_{p \in P(i)} \log(1 + e^{\nu_i - s_{ip}/\tau}), \quad
        \nu_i = \log \sum_{j : n(j) \ne n(i)} e^{s_{ij}/\tau}

    P(i) are the other views of row i's sample n(i). Each ordered pair of views has one term, as in Tian et al.,
    "Contrastive Multiview Coding", 2020, with the negatives of all views. With V = 2 the loss is `nt_xent`.

    The options `margin`, `relative_margin` and `ceiling` leave a negative out only if its similarity exceeds the limit
    by more than rounding. A negative whose similarity is NaN stays in. No gradient flows through the choice of
    negatives. The least similar positive of a row sets the row's limit.

    On the same device with the same number of threads, the same input gives the same bits. Extra memory is O(V N D +
    V^2 N); the reference backend takes O(V^2 N^2).

    Args:
        views: (V, N, D), or a list or tuple of V tensors (N, D), with V >= 2. Row n of each view belongs to sample n.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. A tensor (V N,) holds one temperature per
            row, view after view, and doubles the work.
        ids: (N,) integers, the group of each sample. Samples of the same group are not negatives of each other, which
            removes false negatives. An id must mean the same on every rank. None: every other sample is a negative.
        label_smoothing: The share of the target, in [0, 1), that is spread evenly over the positive and the negatives,
            as in `torch.nn.functional.cross_entropy`.
        margin: Leave a negative out of row i's sum where its similarity to row i is above s_pos - margin, with s_pos
            the similarity of row i to its positive. A finite float; None sets no limit. Cannot be combined with
            `relative_margin` or `label_smoothing`.
        relative_margin: Leave a negative out of row i's sum where its similarity to row i is above (1 -
            relative_margin) s_pos. A float in [0, 1]; None sets no limit. Cannot be combined with `margin` or
            `label_smoothing`.
        ceiling: Leave a negative out of row i's sum where its similarity to row i is above this finite float. If there
            is also a margin, the smaller limit applies. None sets no limit. Cannot be combined with `label_smoothing`.
        reduction: "mean" over the V N rows, "sum", or "none" for one loss per row.
        normalize: True divides each row by max(||z||, 1e-12) like `torch.nn.functional.normalize` (by max(||z||,
            6.1e-5) in float16). False takes the rows as they are, and their products must not overflow.
        backend: "auto", which chooses one for the device, or a name from `backends()`.
        group: The ranks that hold the batch: "world" (the default process group, looked up at each call), a process
            group, a one-dimensional DeviceMesh, or a `Sharding`, which adds options. Each rank passes its own samples,
            any number of them, even none. Negatives come from all ranks. "mean" and "sum" cover the whole batch and are
            equal on every rank. Once DistributedDataParallel has averaged the parameters' gradients, these equal the
            gradients of one process with the whole batch. "none" returns this rank's losses. None: this rank's samples
            are the whole batch.

    Returns:
        A 0-d tensor, or (V N,), view after view, for "none"; float64 for float64 embeddings, else float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, dtypes or devices do not match, the batch is empty, a number is out of range, or an option
            is unknown, differs between ranks or cannot be combined with another.
        RuntimeError: the backend is not available here (the message says why), a rank of the group does not answer or
            is in a different call, or a second derivative is requested, which only backend="reference" without a group
            supports.

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
    """Return each row's loss, the mean over its positives: (V, N, D) -> (V N,). `inv_tau` is a number or (V N,)."""
    V, N, _ = z.shape
    u = batch.unit_rows(z)
    rows = u.flatten(0, 1)
    groups = (batch.sample_ids() if ids is None else ids).repeat(V)
    itself = torch.eye(V, dtype=torch.bool, device=z.device).unsqueeze(2)
    sims = torch.stack([(view * u).sum(dim=2) for view in u.unbind()])  # (V, V, N): row n of each pair of views
    of_rows = None
    if limits is not None:
        to_positive, which = sims.masked_fill(itself, torch.inf).min(dim=1)  # the least similar positive, and its view
        of_positive = u.gather(0, which.unsqueeze(2).expand_as(u))
        of_rows = limits.of(to_positive.flatten(), rows, of_positive.flatten(0, 1))
    nu = batch.neg_lse(rows, groups, inv_tau, of_rows)
    by_view = inv_tau.view(V, 1, N) if is_per_row(inv_tau) else inv_tau
    pos = by_view * sims
    losses = row_losses(nu.view(V, 1, N), pos)
    if label_smoothing:
        # Label smoothing in cross-entropy adds label_smoothing times (the positive's logit - the mean logit of the
        # candidates).
        summed = batch.all_dots(rows, rows) - batch.group_dots(rows, rows, groups)
        negatives = (inv_tau * summed).view(V, 1, N)
        candidates = (V * batch.n_samples - batch.group_counts(groups) + 1).view(V, 1, N)
        losses = losses + label_smoothing * (pos - (pos + negatives) / candidates)
    return losses.masked_fill(itself, 0).sum(dim=1).flatten() / (V - 1)


def _stacked(views: Tensor | Sequence[Tensor], *, may_be_empty: bool) -> Tensor:
    """Return the views as one checked tensor (V, N, D)."""
    if isinstance(views, Tensor):
        check_tensor("views", views)
        if views.ndim != 3:
            raise ValueError(f"views must have shape (V, N, D), got {tuple(views.shape)}")
    elif not isinstance(views, (list, tuple)):
        raise TypeError(f"views must be a tensor, or a list or tuple of tensors, got {type(views).__name__}")
    if len(views) < 2:
        raise ValueError(f"views must hold at least two views, got {len(views)}")
    for index, view in enumerate(views):
        check_rows(f"views[{index}]", view, may_be_empty=may_be_empty)
        check_same("views[0]", views[0], f"views[{index}]", view, "shape", "dtype", "device")
    check_row_count(len(views) * views[0].shape[0], "views together")
    return views if isinstance(views, Tensor) else stack_views(views)


def stack_views(views: Sequence[Tensor]) -> Tensor:
    """Return the views as one tensor (V, N, D), with autocast off. Under autocast, torch.stack may change the dtype,
    and it raises for float16 views under bfloat16 autocast."""
    with autocast_off(views[0]):
        return torch.stack(tuple(views))
