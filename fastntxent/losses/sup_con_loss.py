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
    r"""SupCon: a contrastive loss whose positives are all other rows with the same label.

    .. math::
        L^{out}_i = \log \sum_{all} e^{s_{ij}/\tau} - \frac{1}{|P(i)|} \sum_{p \in P(i)} s_{ip}/\tau

        L^{in}_i = \log \sum_{all} e^{s_{ij}/\tau} - \log \frac{1}{|P(i)|} \sum_{p \in P(i)} e^{s_{ip}/\tau}

        L^{pairs}_i = \frac{1}{|P(i)|} \sum_{p \in P(i)} \log(1 + \sum_{neg} e^{(s_{ij} - s_{ip})/\tau})

    P(i) are the positives of row i. The sums over "all" leave out row i itself; the sums over "neg" leave out the whole
    class of row i. "out" and "in" are equations 2 and 3 of Khosla et al., "Supervised Contrastive Learning", 2020.
    "pairs" has one NT-Xent term for each positive, without the other positives in its denominator, as in
    pytorch-metric-learning's `NTXentLoss`.

    With `pair_weights` W, every other row j is a positive of row i, with the weight W[y_i, y_j]; y are the labels:

    .. math::
        L^{W}_i = \log \sum_{all} e^{s_{ij}/\tau}
            - \frac{\sum_{j \ne i} W_{y_i y_j} s_{ij}/\tau}{\sum_{j \ne i} W_{y_i y_j}}

    A row without a positive has loss 0 in "none" and "sum", and "mean" leaves it out. If no row has a positive, "mean"
    is 0. A row without a positive is still a negative of the other rows. With `pair_weights`, a row has no positive if
    all other rows have weight 0 for it. The identity matrix as W gives the same loss as no weights. A ceiling removes
    negatives only.

    In "out" the positives are part of the sum over "all". Near convergence its gradient then has an absolute error of
    about eps / tau, the rounding error of a logit (eps is the machine epsilon). The gradients of "in" and "pairs" keep
    their relative accuracy.

    On the same device with the same number of threads, the same input gives the same bits. "out" takes the time of
    `nt_xent` and O(M D) memory. Several labels per row take O((M + D) C) more memory, and `pair_weights` takes
    O((C + D) C) more. "in" and "pairs", and "out" with a ceiling, compute the products of positives once more, in
    tiles. For n_c rows in class c, that takes sum_c n_c^2 D multiplications for the value and up to three times as many
    for the gradient, and the host waits for an accelerator once or twice. The reference backend takes O(M^2) memory.

    Args:
        z: (M, D) embeddings of all views of all samples, in any order, float16, bfloat16, float32 or float64.
        labels: (M,) integers, the class of each row; or (M, C), bool or integer, nonzero where row i has label c. With
            several labels per row, a pair of rows counts once for each label that both rows have, and the form must be
            "out".
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there.
        form: "out", "in" or "pairs", the formulas above.
        ceiling: Leave a negative out of row i's sum where its similarity to row i is above this finite float. None sets
            no limit. Cannot be combined with `pair_weights` or several labels per row.
        pair_weights: (C, C) finite floats, at least 0: W[a, b] is the weight of a row of class b as a positive of a row
            of class a. Only the proportions within a row of W count. Needs one label per row, in [0, C), and the form
            "out". No gradient flows through the weights. Every rank must pass the same tensor.
        reduction: "mean" over the rows with a positive, "sum", or "none" for one loss per row.
        normalize: True divides each row by max(||z||, 1e-12) like `torch.nn.functional.normalize` (by max(||z||,
            6.1e-5) in float16). False takes the rows as they are, and their products must not overflow.
        backend: "auto", which chooses one for the device, or a name from `backends()`.
        group: The ranks that hold the batch: "world" (the default process group, looked up at each call), a process
            group, a one-dimensional DeviceMesh, or a `Sharding`, which adds options. Each rank passes its own samples,
            any number of them, even none. Negatives come from all ranks. "mean" and "sum" cover the whole batch and are
            equal on every rank. Once DistributedDataParallel has averaged the parameters' gradients, these equal the
            gradients of one process with the whole batch. "none" returns this rank's losses. None: this rank's samples
            are the whole batch. Positives come from all ranks too.

    Returns:
        A 0-d tensor, or (M,) for "none"; float64 for float64 embeddings, else float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, dtypes or devices do not match, the batch is empty, a number is out of range, or an option
            is unknown, differs between ranks or cannot be combined with another.
        RuntimeError: the backend is not available here (the message says why), a rank of the group does not answer or
            is in a different call, or a second derivative is requested, which only backend="reference" without a group
            supports.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4).repeat(2, 1)
        >>> labels = torch.tensor([0, 1, 2, 3]).repeat(2)
        >>> fastntxent.sup_con(z, labels, temperature=1.0)  # two views: SimCLR's log(e + 6) - 1
        tensor(1.1654)
    """
    # Check labels before the ranks exchange anything: a rank that raises later would leave the others hanging.
    check_rows("z", z, may_be_empty=group is not None)
    check_choice("form", form, FORMS)
    n_classes = _check_labels(labels, z, form)
    limits = Limits.checked(None, None, ceiling)
    if limits is not None and n_classes is not None:
        raise ValueError(f"ceiling must be None with several labels per row, got {ceiling}")
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
    """Return the loss L_out, which is linear in the positives.

    It needs only each row's product with the sum of its positives (`dots`), and the positives' number or total weight
    (`counts`).
    """
    # The mean is formed first, so that its backward runs last, after the kernel's backward has freed its workspace.
    mean = inv_tau * (dots / counts.masked_fill(counts == 0, 1))
    return batch.neg_lse_less(u, batch.row_ids(), inv_tau, mean, counted=counts > 0)


def _over_shared_labels(batch: Batch, u: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's product with the sum of the other rows, and the number of other rows.

    Each other row counts once for every label it shares with the row.
    """
    belongs = (labels != 0).to(u.dtype)
    of_labels = batch.sum_of_ranks(belongs.sum(dim=0))
    # Drop labels that only one row has. Such a label would add only the row itself to the row's sum. The row is
    # subtracted again below, but the sum might lose the other rows to rounding.
    belongs = belongs * (of_labels > 1)
    own = belongs.sum(dim=1)
    of_classes = batch.sum_of_ranks(product(belongs.T, u))
    counts = product(belongs, of_labels.unsqueeze(1)).squeeze(1)
    return row_dots(u, product(belongs, of_classes) - own[:, None] * u), counts - own


def _over_weighted_classes(batch: Batch, u: Tensor, labels: Tensor, pair_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's product with the weighted sum of the other rows, and the total weight of the other rows.

    The weight of another row is the entry of `pair_weights` for the classes of both rows.
    """
    weights = in_double(pair_weights.detach())
    # Only the proportions within a row of weights count. With 1 as the largest weight no sum overflows.
    largest = weights.amax(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    weights, classes, n_classes = (weights / largest).to(u.dtype), labels.to(torch.int64), weights.shape[0]
    counts = batch.sum_of_ranks(add_at(u.new_zeros(n_classes), classes, torch.ones_like(u[:, 0])))
    sums = batch.sum_of_ranks(add_at(u.new_zeros(n_classes, u.shape[1]), classes, u))
    # Subtract the row itself before weighting its class. Otherwise a large weight of its class would lose the other
    # classes to rounding, and a total weight of 0 would not be exactly 0.
    own = weights.diagonal() * (counts > 1)
    others = product(weights.diagonal_scatter(torch.zeros_like(own)), sums)
    sums = taken(others, classes) + taken(own, classes)[:, None] * (taken(sums, classes) - u)
    totals = (weights * (counts - torch.eye(n_classes, dtype=u.dtype, device=u.device))).sum(dim=1)
    return row_dots(u, sums), taken(totals, classes)


def _check_pair_weights(pair_weights: Tensor, labels: Tensor, z: Tensor, form: str, ceiling: float | None) -> None:
    """Check the weights of all pairs of classes, and that every label is one of these classes."""
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
    """Check the labels. Return the number of classes if rows have several labels, or None if each row has one."""
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
            f"labels must have shape ({z.shape[0]},) or ({z.shape[0]}, C), one entry per row of z, "
            f"got {tuple(labels.shape)}"
        )
    if labels.shape[1] == 1 and labels.dtype != torch.bool:
        raise ValueError(
            f"labels must have shape ({z.shape[0]},) for one class per row, got a column; pass labels.squeeze(1)"
        )
    if labels.device != z.device:
        raise ValueError(f"labels must be on the device of z ({z.device}), got {labels.device}")
    if form != "out":
        raise ValueError(
            f"form must be 'out' with several labels per row, got {form!r}: the other forms would count a "
            "pair once for all its shared labels, which takes a mask of all pairs"
        )
