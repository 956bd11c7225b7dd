"""Supervised contrastive losses: the positives of a row are all rows of its class."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..backends import check_name as check_backend
from ..backends.base import row_dots, row_losses
from ..common import (
    group_counts,
    inverse_temperature,
    neg_lse_of_rows,
    positive_dots,
    positive_lse,
    positive_sum,
    reduce,
    sum_of_ranks,
    unit_rows,
    watched,
)
from ..distributed import Group, Shard, open_shard
from ..ops import autocast_off
from ..options import FORMS, BackendName, Reduction, SupConForm
from ..validation import ID_DTYPES, check_choice, check_ids, check_reduction, check_rows, check_tensor


@watched
def sup_con(
    z: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    form: SupConForm = "out",
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""SupCon: contrastive loss whose positives are all other rows with the same label.

    With P(i) the positives of row i, and sums over j that leave out row i itself ("all") or its class ("neg"):

    .. math::
        L^{out}_i = \log \sum_{all} e^{s_{ij}/\tau} - \frac{1}{|P(i)|} \sum_{p \in P(i)} s_{ip}/\tau

        L^{in}_i = \log \sum_{all} e^{s_{ij}/\tau} - \log \frac{1}{|P(i)|} \sum_{p \in P(i)} e^{s_{ip}/\tau}

        L^{pairs}_i = \frac{1}{|P(i)|} \sum_{p \in P(i)} \log \Big(1 + \sum_{neg} e^{(s_{ij} - s_{ip})/\tau}\Big)

    L_out and L_in are equations 2 and 3 of Khosla et al., "Supervised Contrastive Learning", 2020; the third has one
    NT-Xent term for each positive, in whose denominator the other positives are not (pytorch-metric-learning's
    `NTXentLoss`).

    A row without a positive counts for nothing: it is 0 in "none" and "sum", and left out of the mean, which is over
    the rows with a positive, and 0 where there are none. It still is a negative of the others.

    Args:
        z: (M, D) embeddings, all views of all samples, in any order. float16, bfloat16, float32 or float64.
        labels: (M,) integers. Or several labels a row: (M, C), bool or integer, not 0 where row i has label c. A pair
            then counts once for each label it shares, for "out" alone: without a mask of all pairs it cannot be known
            which pairs share at least one.
        temperature: as in `nt_xent`.
        form: "out", "in" or "pairs".
        reduction: "mean" (over the rows with a positive), "sum", or "none".
        normalize, backend: as in `nt_xent`.
        group: as in `nt_xent`. Positives are those of all ranks too.

    Returns:
        A 0-d tensor, or (M,) for "none"; float64 for float64 embeddings, else float32.

    Raises:
        TypeError, ValueError: as `nt_xent` does, and for labels of another shape or dtype.

    Deterministic. "out" takes the time of `nt_xent` and O(M D) memory (with several labels O((M + D) C) beside it);
    "in" and "pairs" look at each positive pair too: with n_c rows in class c that is sum n_c^2 D more work, in tiles,
    and one wait for the device. In "out" the positives are part of the sum, as the formula has it: unlike the other
    two, its gradient has the accuracy of a logit, eps / tau, not of the loss.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4).repeat(2, 1)
        >>> labels = torch.tensor([0, 1, 2, 3]).repeat(2)
        >>> fastntxent.sup_con(z, labels, temperature=1.0)  # two views: SimCLR's log(e + 6) - 1
        tensor(1.1654)
    """
    check_rows("z", z, may_be_empty=group is not None)
    check_choice("form", form, FORMS)
    check_reduction(reduction)
    check_backend(backend)
    n_classes = _check_labels(labels, z, form)
    shard = open_shard(
        group, "sup_con", z, backend, temperature=temperature, form=form, reduction=reduction, normalize=normalize,
        n_classes=n_classes,
    )  # fmt: skip
    inv_tau = inverse_temperature(temperature, z, shard=shard)
    u = unit_rows(z, normalize)
    if shard:
        u = shard.as_sent(u)
    if n_classes is not None:
        return _out(u, *_over_shared_labels(u, labels, shard), inv_tau, reduction, backend, shard)
    labels = labels.to(torch.int64)
    counts = group_counts(labels, shard) - 1
    if form == "out":
        return _out(u, positive_dots(u, labels, shard), counts, inv_tau, reduction, backend, shard)
    losses = (_in if form == "in" else _pairs)(u, labels, counts, inv_tau, backend, shard)
    return reduce(losses.masked_fill(counts == 0, 0), reduction, counted=counts > 0, shard=shard)


def _out(
    u: Tensor, dots: Tensor, counts: Tensor, inv_tau: Tensor, reduction: str, backend: str, shard: Shard | None
) -> Tensor:
    """L_out is linear in the positives: a row's product with the sum of theirs, and their number, is all it takes."""
    some = counts > 0
    # First, so that its backward comes last, when the kernel's has given its memory back.
    mean = inv_tau * dots / counts.clamp_min(1)
    every = shard.row_ids(u) if shard else torch.arange(u.shape[0], device=u.device)
    if shard or reduction == "none":
        nu = neg_lse_of_rows(u, every, inv_tau, backend, shard)
        return reduce((nu - mean).masked_fill(~some, 0), reduction, counted=some, shard=shard)
    weights = some.to(mean.dtype)
    if reduction == "mean":
        weights = weights / weights.sum().clamp_min(1)
    # Linear in nu too, so its gradient is known with its value.
    return ops.neg_lse_sum(u, every, inv_tau, weights, backend) - (weights * mean).sum()


def _over_shared_labels(u: Tensor, labels: Tensor, shard: Shard | None) -> tuple[Tensor, Tensor]:
    """Of each row its product with the sum of the others, each as often as it shares a label, and how often that is in
    all."""
    belongs = (labels != 0).to(u.dtype)
    own = belongs.sum(dim=1)
    with autocast_off(u):
        sums = belongs @ sum_of_ranks(belongs.T @ u, shard) - own[:, None] * u
        return row_dots(u, sums), belongs @ sum_of_ranks(belongs.sum(dim=0), shard) - own


def _in(u: Tensor, labels: Tensor, counts: Tensor, inv_tau: Tensor, backend: str, shard: Shard | None) -> Tensor:
    nu = neg_lse_of_rows(u, labels, inv_tau, backend, shard)
    lse = positive_lse(u, labels, inv_tau, backend, shard).masked_fill(counts == 0, 0)
    return row_losses(nu, lse) + counts.clamp_min(1).to(u.dtype).log()


def _pairs(u: Tensor, labels: Tensor, counts: Tensor, inv_tau: Tensor, backend: str, shard: Shard | None) -> Tensor:
    nu = neg_lse_of_rows(u, labels, inv_tau, backend, shard)
    return positive_sum(u, labels, inv_tau, nu, backend, shard) / counts.clamp_min(1)


def _check_labels(labels: Tensor, z: Tensor, form: str) -> int | None:
    """The number of classes where a row has several labels, None where it has one."""
    check_tensor("labels", labels)
    if labels.ndim != 2:
        check_ids("labels", labels, "z", z)
        return None
    _check_multi_labels(labels, z, form)
    return labels.shape[1]


def _check_multi_labels(labels: Tensor, z: Tensor, form: str) -> None:
    if labels.dtype not in (torch.bool, *ID_DTYPES):
        raise TypeError(f"labels must be bool or have an integer dtype, got {labels.dtype}")
    if labels.shape[0] != z.shape[0] or labels.shape[1] == 0:
        raise ValueError(
            f"labels must have shape ({z.shape[0]},) or ({z.shape[0]}, C), one row per row of z, "
            f"got {tuple(labels.shape)}"
        )
    if labels.shape[1] == 1 and labels.dtype != torch.bool:
        raise ValueError(f"labels must have shape ({z.shape[0]},) for one class a row, got a column: labels.squeeze(1)")
    if labels.device != z.device:
        raise ValueError(f"labels must be on the device of z, {z.device}, got {labels.device}")
    if form != "out":
        raise ValueError(
            f"form must be 'out' where a row has several labels, got {form!r}: it needs every pair that shares a "
            "label once, which takes a mask of all pairs"
        )
