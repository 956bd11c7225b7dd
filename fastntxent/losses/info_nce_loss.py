"""InfoNCE: queries against keys, in one direction."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra import log_add, product, row_dots, row_losses, scale_gradient
from ..batch import Batch
from ..distributed import Group
from ..opening import open_batch
from ..options import (
    HARDNESS_MODES,
    POSITIVES,
    SEVERAL_FORMS,
    BackendName,
    HardnessMode,
    Positives,
    Reduction,
    SeveralForm,
)
from ..scale import factor, is_per_row
from ..sides import Side
from ..validation import (
    FLOAT_DTYPES,
    check_choice,
    check_features,
    check_flag,
    check_parameter,
    check_rows,
    check_same,
    check_tensor,
)
from ..watching import watched
from .false_negatives import Limits


@watched
def info_nce(
    query: Tensor,
    key: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    negatives: Tensor | None = None,
    in_batch_negatives: bool | None = None,
    ids: Tensor | None = None,
    positives: Positives = "pair",
    form: SeveralForm = "out",
    label_smoothing: float = 0.0,
    margin: float | None = None,
    relative_margin: float | None = None,
    ceiling: float | None = None,
    hardness_mode: HardnessMode = "all_negatives",
    hardness_strength: float = 0.0,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""InfoNCE: each query tells its own key from the negatives.

    .. math::
        L_n = \log(1 + e^{\nu_n - s_n/\tau}), \quad
        \nu_n = \log \sum_{j \in \text{negatives}(n)} e^{s_{nj}/\tau}

    van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018. s_n is the similarity of
    query n to its own key. Queries pick keys, but keys do not pick queries; `clip` has both directions.

    With positives="same_id" and form "out", the positives are part of the denominator. Near convergence the gradient
    then has an absolute error of about eps / tau, the rounding error of a logit (eps is the machine epsilon). The
    gradient of form "in" keeps its relative accuracy. If every row has one positive, both forms give the same loss.

    The options `margin`, `relative_margin` and `ceiling` leave a negative out only if its similarity exceeds the limit
    by more than rounding. A negative whose similarity is NaN stays in. No gradient flows through the choice of
    negatives. Limits apply to explicit negatives too.

    The hardness options follow Lan et al., "LLaVE: Large Language and Vision Embedding Models with Hardness-Weighted
    Contrastive Learning", 2025, as in sentence-transformers. There, all queries share the explicit negatives, but
    "hard_negatives" selects only the query's own, and the rest count as in-batch negatives. Here it selects all
    explicit negatives.

    On the same device with the same number of threads, the same input gives the same bits. Extra memory is O((N + K) D)
    with K shared negatives, and O(N K D) with one set per query, which is the size of the sets; the reference backend
    takes O(N (N + K)) more.

    Args:
        query: (N, D) embeddings of the queries, float16, bfloat16, float32 or float64. Row n belongs to sample n.
        key: (N, D) embeddings of the keys, with the shape, dtype and device of `query`. Row n is the positive of row n
            of `query`.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. A tensor (N,) holds one temperature per
            query.
        negatives: Explicit negatives with the dtype and device of `query`: (K, D), shared by all queries, or (N, K, D),
            one set per query. None: the keys of other samples are the negatives.
        in_batch_negatives: Whether the keys of other samples are negatives. None: only without explicit negatives.
        ids: (N,) integers, the group of each sample. Samples of the same group are not negatives of each other, which
            removes false negatives. An id must mean the same on every rank. None: every other sample is a negative.
            Explicit negatives have no ids.
        positives: "pair": row n of the other side is the only positive of row n. "same_id": all rows of the other side
            with the id of row n are its positives; this needs `ids` and cannot be combined with label smoothing,
            margins, a ceiling, explicit negatives, hardness or in_batch_negatives=False.
        form: With positives="same_id", how the positives are combined. "out" averages their negative log-probabilities,
            which gives nu' - mean_p s_np / tau, with nu' the log-sum-exp over all columns. "in" takes the negative
            logarithm of their mean probability.
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
        hardness_mode: Which negatives get harder logits: "in_batch_negatives", "hard_negatives" (the explicit ones) or
            "all_negatives".
        hardness_strength: Add this multiple (0 or more) of the similarity to the logits of the negatives that
            `hardness_mode` selects. No gradient flows through the addend. Cannot be combined with `label_smoothing`.
        reduction: "mean" over the N queries, "sum", or "none" for one loss per query.
        normalize: True divides each row by max(||z||, 1e-12) like `torch.nn.functional.normalize` (by max(||z||,
            6.1e-5) in float16). False takes the rows as they are, and their products must not overflow.
        backend: "auto", which chooses one for the device, or a name from `backends()`.
        group: The ranks that hold the batch: "world" (the default process group, looked up at each call), a process
            group, a one-dimensional DeviceMesh, or a `Sharding`, which adds options. Each rank passes its own samples,
            any number of them, even none. Negatives come from all ranks. "mean" and "sum" cover the whole batch and are
            equal on every rank. Once DistributedDataParallel has averaged the parameters' gradients, these equal the
            gradients of one process with the whole batch. "none" returns this rank's losses. None: this rank's samples
            are the whole batch. Explicit negatives (K, D) are shared by all ranks too; each rank passes any number of
            them.

    Returns:
        A 0-d tensor, or (N,) for "none"; float64 for float64 embeddings, else float32.

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
        >>> fastntxent.info_nce(z, z, temperature=1.0)  # log(e + 3) - 1
        tensor(0.7437)
    """
    label_smoothing = check_parameter("label_smoothing", label_smoothing)
    hardness_strength = check_hardness(hardness_mode, hardness_strength, label_smoothing)
    limits = Limits.checked(margin, relative_margin, ceiling, label_smoothing)
    check_positives(
        positives, form, limits, label_smoothing=label_smoothing, hardness_strength=hardness_strength,
        in_batch_negatives=in_batch_negatives,
    )  # fmt: skip
    if positives == "same_id":
        check_ids_given(ids)
        if negatives is not None:
            raise ValueError(f"negatives must be None with positives 'same_id', got {type(negatives).__name__}")
    if negatives is not None:
        _check_negatives(negatives, query, may_be_empty=group is not None)
    if in_batch_negatives is None:
        in_batch_negatives = negatives is None
    batch = open_batch(
        group, "info_nce", {"query": query, "key": key}, ids=ids, reduction=reduction, normalize=normalize,
        backend=backend, temperature=temperature, in_batch_negatives=in_batch_negatives,
        label_smoothing=label_smoothing, hardness_mode=hardness_mode, hardness_strength=hardness_strength,
        positives=positives, form=form, limits=limits,
        negatives="none" if negatives is None else f"{negatives.ndim}-d",
    )  # fmt: skip
    if negatives is None and not in_batch_negatives:
        raise ValueError("negatives must be given when in_batch_negatives is False")
    inv_tau = batch.inverse_temperature(temperature, per_row=query.shape[0])
    if ids is None and negatives is None and not label_smoothing and not hardness_strength and limits is None:
        loss = batch.info_nce_at_once(query, key, inv_tau, both=False)
        if loss is not None:
            return loss
    u, v = batch.unit_rows(query), batch.unit_rows(key)
    if positives == "same_id":
        assert ids is not None
        return batch.reduce(several_positives(batch, Side(u, ids), Side(v, ids), inv_tau, form))
    sims = row_dots(u, v)
    pos, of_rows = inv_tau * sims, None if limits is None else limits.of(sims, u, v)
    terms = []
    if in_batch_negatives:
        hardness = 0.0 if hardness_mode == "hard_negatives" else hardness_strength
        groups = batch.sample_ids() if ids is None else ids
        query_side = Side(u, groups, of_rows)
        terms.append(_of_batch(batch, query_side, v, inv_tau, hardness, summed=label_smoothing > 0))
    if negatives is not None:
        hardness = 0.0 if hardness_mode == "in_batch_negatives" else hardness_strength
        w = batch.unit_rows(negatives)
        if w.ndim == 2:
            others = batch.beside(negatives)
            terms.append(_of_all(batch, u, w, others, inv_tau, hardness, of_rows, summed=label_smoothing > 0))
        else:
            terms.append(_of_each(u, w, inv_tau, hardness, of_rows))
    nu = functools.reduce(log_add, [term.nu for term in terms])
    losses = row_losses(nu, pos)
    if label_smoothing:
        candidates = 1 + sum(term.number for term in terms)
        mean = pos / candidates + inv_tau * (sum(term.sims for term in terms) / candidates)
        losses = losses + label_smoothing * (pos - mean)
    return batch.reduce(losses)


def check_hardness(hardness_mode: str, hardness_strength: float, label_smoothing: float) -> float:
    """Check the hardness options, and return the strength as a number."""
    check_choice("hardness_mode", hardness_mode, HARDNESS_MODES)
    hardness_strength = check_parameter("hardness_strength", hardness_strength)
    if label_smoothing and hardness_strength:
        raise ValueError("label_smoothing and hardness_strength cannot both be given")
    return hardness_strength


def check_positives(
    positives: str,
    form: str,
    limits: Limits | None,
    *,
    label_smoothing: float,
    hardness_strength: float = 0.0,
    in_batch_negatives: bool | None = None,
) -> None:
    """Check how positives are chosen and combined, and that positives="same_id" comes without the options that it does
    not support."""
    check_choice("positives", positives, POSITIVES)
    check_choice("form", form, SEVERAL_FORMS)
    if in_batch_negatives is not None:
        check_flag("in_batch_negatives", in_batch_negatives)
    if positives != "same_id":
        return
    for name, number in (("label_smoothing", label_smoothing), ("hardness_strength", hardness_strength)):
        if number:
            raise ValueError(f"{name} must be 0 with positives 'same_id', got {number}")
    for name, limit in ({} if limits is None else limits._asdict()).items():
        if limit is not None:
            raise ValueError(f"{name} must be None with positives 'same_id', got {limit}")
    if in_batch_negatives is False:
        raise ValueError(f"in_batch_negatives must be None or True with positives 'same_id', got {in_batch_negatives}")


def check_ids_given(ids: Tensor | None) -> None:
    """Check that ids are given; positives="same_id" finds the positives by them."""
    if ids is None:
        raise ValueError("ids must be given with positives 'same_id', got None")


def several_positives(batch: Batch, rows: Side, cols: Side, inv_tau: float | Tensor, form: str) -> Tensor:
    """Return the losses (N,) of rows whose positives are all columns with the row's id. Each row has at least one."""
    ids = rows.ids.to(torch.int64)
    counts = batch.group_counts(ids).to(rows.u.dtype)
    if form == "out":
        mean = batch.group_dots(rows.u, cols.u, ids) / counts
        # All columns count, including the positives, since no column shares an id with a row.
        everything = Side(rows.u, torch.zeros_like(ids)), Side(cols.u, torch.ones_like(ids))
        return batch.neg_lse_to(*everything, inv_tau) - inv_tau * mean
    rows, cols = Side(rows.u, ids), Side(cols.u, ids)
    lse = batch.positive_lse_to(rows, cols, inv_tau)
    return row_losses(batch.neg_lse_to(rows, cols, inv_tau), lse) + counts.log()


class _Negatives(NamedTuple):
    """For one kind of negatives, the log-sum-exp nu of each query and, for label smoothing, the sum of the similarities
    and the number of negatives."""

    nu: Tensor
    sims: Tensor | float
    number: Tensor | int


def _of_batch(
    batch: Batch, queries: Side, v: Tensor, inv_tau: float | Tensor, hardness: float, *, summed: bool
) -> _Negatives:
    """Return nu and the sums over the keys of other samples."""
    u, ids, _ = queries
    nu = hardened_neg_lse(batch, queries, Side(v, ids), inv_tau, hardness)
    if not summed:
        return _Negatives(nu, 0.0, 0)
    sims = batch.all_dots(u, v) - batch.group_dots(u, v, ids)
    return _Negatives(nu, sims, batch.n_samples - batch.group_counts(ids))


def _of_all(
    batch: Batch,
    u: Tensor,
    w: Tensor,
    others: Batch,
    inv_tau: float | Tensor,
    hardness: float,
    limits: Tensor | None,
    *,
    summed: bool,
) -> _Negatives:
    """Return nu and the sums over explicit negatives that all queries share.

    The queries get the id 0 and the negatives the id 1, so every negative counts.
    """
    queries, negatives = (Side(x, torch.full((x.shape[0],), i, device=u.device)) for i, x in enumerate((u, w)))
    queries = queries._replace(limits=limits)
    nu = hardened_neg_lse(batch, queries, negatives, inv_tau, hardness, beside=others)
    return _Negatives(nu, batch.all_dots(u, w, beside=others) if summed else 0.0, others.n_samples)


def _of_each(u: Tensor, w: Tensor, inv_tau: float | Tensor, hardness: float, limits: Tensor | None) -> _Negatives:
    """Return nu and the sums over explicit negatives that come as one set per query."""
    sims = product(w, u.unsqueeze(2)).squeeze(2)
    by_row = inv_tau.unsqueeze(1) if is_per_row(inv_tau) else inv_tau
    logits = hardened(sims, by_row, hardness)
    if limits is not None:
        logits = logits.masked_fill(sims > limits.unsqueeze(1), -torch.inf)
    return _Negatives(torch.logsumexp(logits, dim=1), sims.sum(dim=1), w.shape[1])


def hardened(sims: Tensor, inv_tau: float | Tensor, hardness: float) -> Tensor:
    """Return the logits k s + hardness * s, without a gradient through the second s."""
    return inv_tau * sims + hardness * sims.detach()


def hardened_neg_lse(
    batch: Batch, rows: Side, cols: Side, inv_tau: float | Tensor, hardness: float, *, beside: Batch | None = None
) -> Tensor:
    """Return nu with logits k s + hardness * s, without a gradient through the second s.

    The value and the gradient with respect to k are the same as at an inverse temperature of k + hardness. The gradient
    with respect to the rows is k / (k + hardness) times the gradient there.
    """
    if not hardness:
        return batch.neg_lse_to(rows, cols, inv_tau, beside=beside)
    hard = factor(inv_tau + hardness, rows.u)
    share = inv_tau / hard
    if isinstance(hard, Tensor) and isinstance(share, Tensor):
        share = share.detach()
        hard = scale_gradient(hard, 1 / share)
    return scale_gradient(batch.neg_lse_to(rows, cols, hard, beside=beside), share)


def _check_negatives(negatives: Tensor, query: Tensor, *, may_be_empty: bool) -> None:
    check_rows("query", query, may_be_empty=may_be_empty)
    check_tensor("negatives", negatives)
    if negatives.ndim == 3:
        if negatives.dtype not in FLOAT_DTYPES:
            raise TypeError(f"negatives must be float16, bfloat16, float32 or float64, got {negatives.dtype}")
        if negatives.shape[0] != query.shape[0] or negatives.shape[1] == 0:
            raise ValueError(
                f"negatives must have shape (K, D) or ({query.shape[0]}, K, D), one set per query, "
                f"got {tuple(negatives.shape)}"
            )
    else:
        check_rows("negatives", negatives, may_be_empty=may_be_empty)
    check_same("query", query, "negatives", negatives, "dtype", "device")
    check_features("query", query, "negatives", negatives)
