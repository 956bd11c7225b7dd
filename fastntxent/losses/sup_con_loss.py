"""Supervised contrastive losses: the positives of a row are all rows of its class."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..algebra import in_double, log_add, product, row_dots, row_losses
from ..batch import Batch
from ..distributed import Alike, Group
from ..opening import open_batch
from ..ops.groups import add_at, taken
from ..options import FORMS, BackendName, Reduction, SupConForm
from ..validation import (
    FLOAT_DTYPES,
    ID_DTYPES,
    check_choice,
    check_ids,
    check_rows,
    check_same,
    check_tensor,
    extremes,
)
from ..watching import watched
from .false_negatives import Limits


@watched
def sup_con(
    z: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    form: SupConForm = "out",
    ceiling: float | None = None,
    pair_weights: Tensor | None = None,
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

    With `pair_weights` W all other rows are positives, each with the weight of its class for row i's, y the labels:

    .. math::
        L^{W}_i = \log \sum_{all} e^{s_{ij}/\tau}
            - \frac{\sum_{j \ne i} W_{y_i y_j} s_{ij}/\tau}{\sum_{j \ne i} W_{y_i y_j}}

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
        ceiling: negatives that are more similar than it leave a row's sum, as in `nt_xent`; positives stay. Not with
            several labels a row.
        pair_weights: (C, C), finite floats of at least 0, through which no gradient goes: W[a, b] is the weight of a
            row of class b as a positive of a row of class a; a row's weights count in proportion. Labels are one a row
            and in [0, C) then, and the form is "out", without a ceiling. The identity gives `sup_con` without weights.
            A row whose others all weigh 0 has no positive. The same on every rank, which the ranks compare.
        reduction: "mean" (over the rows with a positive), "sum", or "none".
        normalize, backend: as in `nt_xent`.
        group: as in `nt_xent`. Positives are those of all ranks too.

    Returns:
        A 0-d tensor, or (M,) for "none"; float64 for float64 embeddings, else float32.

    Raises:
        TypeError, ValueError: as `nt_xent` does, and for labels of another shape or dtype.

    Deterministic. "out" takes the time of `nt_xent` and O(M D) memory (with several labels O((M + D) C) beside it, with
    pair_weights O((C + D) C)). "in" and "pairs" form the products of positives once more, sum n_c^2 D multiplications
    forward and again backward with n_c rows in class c, in tiles, and off the CPU one wait for the device. In "out"
    the positives are part of the sum, as the formula has it: unlike the other two, its gradient has the accuracy of a
    logit, eps / tau, not of the loss.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4).repeat(2, 1)
        >>> labels = torch.tensor([0, 1, 2, 3]).repeat(2)
        >>> fastntxent.sup_con(z, labels, temperature=1.0)  # two views: SimCLR's log(e + 6) - 1
        tensor(1.1654)
    """
    # Labels are checked before the ranks meet, so that a rank that raises leaves none in the middle of the loss.
    check_rows("z", z, may_be_empty=group is not None)
    check_choice("form", form, FORMS)
    n_classes = _check_labels(labels, z, form)
    limits = Limits.checked(None, None, ceiling)
    if limits is not None and n_classes is not None:
        raise ValueError("ceiling must be None where a row has several labels")
    if pair_weights is not None:
        _check_pair_weights(pair_weights, labels, z, form, ceiling)
    batch = open_batch(
        group, "sup_con", {"z": z}, reduction=reduction, normalize=normalize, backend=backend,
        temperature=temperature, form=form, n_classes=n_classes, limits=limits,
        pair_weights=None if pair_weights is None else Alike(pair_weights),
    )  # fmt: skip
    inv_tau = batch.inverse_temperature(temperature)
    if pair_weights is not None:
        u = batch.as_compared(batch.unit_rows(z))
        return _out(batch, u, *_over_weighted_classes(batch, u, labels, pair_weights), inv_tau)
    if n_classes is None and limits is None and (loss := batch.sup_con_at_once(z, labels, inv_tau, form)) is not None:
        return loss
    u = batch.as_compared(batch.unit_rows(z))
    if n_classes is not None:
        return _out(batch, u, *_over_shared_labels(batch, u, labels), inv_tau)
    labels = labels.to(torch.int64)
    counts = batch.group_counts(labels) - 1
    dots = batch.positive_dots(u, labels) if form == "out" else None
    if dots is not None and limits is None:
        return _out(batch, u, dots, counts, inv_tau)
    of_rows = None if limits is None else limits.of(torch.zeros_like(counts, dtype=u.dtype), u, u)
    nu = batch.neg_lse(u, labels, inv_tau, of_rows)
    if dots is not None:
        lse = batch.positive_lse(u, labels, inv_tau).masked_fill(counts == 0, 0)
        losses = log_add(nu, lse) - inv_tau * (dots / counts.clamp_min(1))
    elif form == "in":
        lse = batch.positive_lse(u, labels, inv_tau).masked_fill(counts == 0, 0)
        losses = row_losses(nu, lse) + counts.clamp_min(1).to(u.dtype).log()
    else:
        losses = batch.positive_sum(u, labels, inv_tau, nu) / counts.clamp_min(1)
    return batch.reduce(losses.masked_fill(counts == 0, 0), counted=counts > 0)


def _out(batch: Batch, u: Tensor, dots: Tensor, counts: Tensor, inv_tau: float | Tensor) -> Tensor:
    """L_out is linear in the positives: a row's product with the sum of theirs, and their number or weight, is all it
    takes."""
    # First, so that its backward comes last, when the kernel's has given its memory back.
    mean = inv_tau * (dots / counts.masked_fill(counts == 0, 1))
    return batch.neg_lse_less(u, batch.row_ids(), inv_tau, mean, counted=counts > 0)


def _over_shared_labels(batch: Batch, u: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row its product with the sum of the others, each as often as it shares a label, and how often that is in
    all."""
    belongs = (labels != 0).to(u.dtype)
    own = belongs.sum(dim=1)
    of_classes = batch.sum_of_ranks(product(belongs.T, u))
    counts = product(belongs, batch.sum_of_ranks(belongs.sum(dim=0)).unsqueeze(1)).squeeze(1)
    return row_dots(u, product(belongs, of_classes) - own[:, None] * u), counts - own


def _over_weighted_classes(batch: Batch, u: Tensor, labels: Tensor, pair_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row its product with the sum of the others, each by the weight of its class, and their weight in all."""
    weights = in_double(pair_weights.detach())
    # A row's weights count in proportion alone. With 1 for the largest, no sum of theirs overflows.
    largest = weights.amax(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    weights, classes, n_classes = (weights / largest).to(u.dtype), labels.to(torch.int64), weights.shape[0]
    counts = batch.sum_of_ranks(add_at(u.new_zeros(n_classes), classes, torch.ones_like(u[:, 0])))
    sums = batch.sum_of_ranks(add_at(u.new_zeros(n_classes, u.shape[1]), classes, u))
    sums = taken(product(weights, sums), classes) - taken(weights.diagonal(), classes)[:, None] * u
    # The row itself is left out before its class is weighed, so that a weight of 0 in all is exactly that.
    totals = (weights * (counts - torch.eye(n_classes, dtype=u.dtype, device=u.device))).sum(dim=1)
    return row_dots(u, sums), taken(totals, classes)


def _check_pair_weights(pair_weights: Tensor, labels: Tensor, z: Tensor, form: str, ceiling: float | None) -> None:
    """Weights of all pairs of classes, and labels that are such classes."""
    check_tensor("pair_weights", pair_weights)
    if pair_weights.dtype not in FLOAT_DTYPES:
        raise TypeError(f"pair_weights must be float16, bfloat16, float32 or float64, got {pair_weights.dtype}")
    n_classes = len(pair_weights) if pair_weights.ndim else 0
    if n_classes == 0 or pair_weights.shape != (n_classes, n_classes):
        raise ValueError(
            "pair_weights must have shape (C, C), a row and a column for each class, got shape "
            f"{tuple(pair_weights.shape)}"
        )
    check_same("z", z, "pair_weights", pair_weights, "device")
    if form != "out":
        raise ValueError(f"form must be 'out' with pair_weights, got {form!r}")
    if ceiling is not None:
        raise ValueError(f"ceiling must be None with pair_weights, got {ceiling}")
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape ({z.shape[0]},) with pair_weights, got {tuple(labels.shape)}")
    for weight in extremes(pair_weights) or ():
        if not 0 <= weight < math.inf:
            raise ValueError(f"pair_weights must be finite and at least 0, got {weight}")
    for label in extremes(labels) or ():
        if not 0 <= label < n_classes:
            raise ValueError(f"labels must be in [0, {n_classes}), the classes of pair_weights, got {label}")


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
