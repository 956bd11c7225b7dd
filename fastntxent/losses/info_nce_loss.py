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
    r"""InfoNCE: for each query, pick its key among the negatives.

    .. math:: L_n = \log\big(1 + e^{\nu_n - s_n/\tau}\big), \qquad
        \nu_n = \log \sum_{j \in \text{negatives}(n)} e^{s_{nj}/\tau}

    van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018. The mean is 1/N, from
    queries to keys alone; for both directions see `clip`.

    Args:
        query, key: (N, D) embeddings; row n of key is the positive of row n of query.
        temperature: as in `nt_xent`; a tensor (N,) is one for each query.
        negatives: explicit negatives: (K, D), shared by all queries, or (N, K, D), each query's own. None: the other
            samples' keys.
        in_batch_negatives: whether the other samples' keys are negatives. By default, only without explicit ones.
        ids: (N,) integers: keys of the same id are no negatives of each other's queries. Explicit
            negatives have none.
        positives: "pair", the query's own key alone; or "same_id", all keys of its id, as `sup_con` has them for one
            set of rows. The latter needs ids, and takes neither explicit negatives nor the options below.
        form: with several positives P, "out": the mean of their log-probabilities, nu' - mean_p s_np / tau, nu' over
            all keys; or "in": the logarithm of the mean of their probabilities. In "out" the positives are in the
            denominator that they are compared with, so its gradient has the accuracy of a logit, eps / tau, also where
            the loss is tiny; "in" keeps its relative accuracy, and with one positive a row is the same loss.
        label_smoothing: as in `nt_xent`.
        margin, relative_margin, ceiling: as in `nt_xent`, for the batch's negatives and for explicit ones.
        hardness_mode, hardness_strength: add hardness_strength times the similarity, through which no gradient goes, to
            the logits of the negatives: "in_batch_negatives", "hard_negatives" (the explicit ones) or "all_negatives".
            Lan et al., "LLaVE: Large Language and Vision Embedding Models with Hardness-Weighted Contrastive
            Learning", 2025, as sentence-transformers has it (which, of negatives that queries share, hardens a
            query's own alone).
        reduction: "mean" (1/N), "sum" or "none".
        normalize, backend: as in `nt_xent`.
        group: as in `nt_xent`; explicit negatives (K, D) are those of all ranks, of any number on each.

    Returns:
        A 0-d tensor, or (N,) for "none"; float64 for float64 embeddings, else float32.

    Raises:
        TypeError, ValueError, RuntimeError: as `nt_xent`.

    Deterministic. Memory is O((N + K) D); with each query's own negatives O(N K D), which is their size.

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
        raise ValueError("negatives must be given where in_batch_negatives is False: a query needs some")
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
    """Check what is added to the logits of negatives, and return the strength as a number."""
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
    """Check which columns are a row's positives, and that no option is given that several positives do not take."""
    check_choice("positives", positives, POSITIVES)
    check_choice("form", form, SEVERAL_FORMS)
    if positives != "same_id":
        return
    for name, number in (("label_smoothing", label_smoothing), ("hardness_strength", hardness_strength)):
        if number:
            raise ValueError(f"{name} must be 0 with positives 'same_id', got {number}")
    for name, limit in ({} if limits is None else limits._asdict()).items():
        if limit is not None:
            raise ValueError(f"{name} must be None with positives 'same_id', got {limit}")
    if in_batch_negatives is not None and not in_batch_negatives:
        raise ValueError(f"in_batch_negatives must be None or True with positives 'same_id', got {in_batch_negatives}")


def check_ids_given(ids: Tensor | None) -> None:
    """The ids by which positives "same_id" are found."""
    if ids is None:
        raise ValueError("ids must be given with positives 'same_id', got None")


def several_positives(batch: Batch, rows: Side, cols: Side, inv_tau: float | Tensor, form: str) -> Tensor:
    """The losses (N,) of rows whose positives are all columns of their id; each has one at least."""
    ids = rows.ids.to(torch.int64)
    counts = batch.group_counts(ids).to(rows.u.dtype)
    if form == "out":
        mean = batch.group_dots(rows.u, cols.u, ids) / counts
        # Over all columns: no row is of the group of any.
        everything = Side(rows.u, torch.zeros_like(ids)), Side(cols.u, torch.ones_like(ids))
        return batch.neg_lse_to(*everything, inv_tau) - inv_tau * mean
    rows, cols = Side(rows.u, ids), Side(cols.u, ids)
    lse = batch.positive_lse_to(rows, cols, inv_tau)
    return row_losses(batch.neg_lse_to(rows, cols, inv_tau), lse) + counts.log()


class _Negatives(NamedTuple):
    """Of each query's negatives of one kind: nu, and for smoothed labels the sum of their similarities and their
    number."""

    nu: Tensor
    sims: Tensor | float
    number: Tensor | int


def _of_batch(
    batch: Batch, queries: Side, v: Tensor, inv_tau: float | Tensor, hardness: float, *, summed: bool
) -> _Negatives:
    """The keys of other samples."""
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
    """Explicit negatives of all queries. They belong to no query: their ids are nobody's."""
    queries, negatives = (Side(x, torch.full((x.shape[0],), i, device=u.device)) for i, x in enumerate((u, w)))
    queries = queries._replace(limits=limits)
    nu = hardened_neg_lse(batch, queries, negatives, inv_tau, hardness, beside=others)
    return _Negatives(nu, batch.all_dots(u, w, beside=others) if summed else 0.0, others.n_samples)


def _of_each(u: Tensor, w: Tensor, inv_tau: float | Tensor, hardness: float, limits: Tensor | None) -> _Negatives:
    """Each query's own."""
    sims = product(w, u.unsqueeze(2)).squeeze(2)
    by_row = inv_tau.unsqueeze(1) if is_per_row(inv_tau) else inv_tau
    logits = hardened(sims, by_row, hardness)
    if limits is not None:
        logits = logits.masked_fill(sims > limits.unsqueeze(1), -torch.inf)
    return _Negatives(torch.logsumexp(logits, dim=1), sims.sum(dim=1), w.shape[1])


def hardened(sims: Tensor, inv_tau: float | Tensor, hardness: float) -> Tensor:
    """The logits k s + hardness * s, no gradient through the second s."""
    return inv_tau * sims + hardness * sims.detach()


def hardened_neg_lse(
    batch: Batch, rows: Side, cols: Side, inv_tau: float | Tensor, hardness: float, *, beside: Batch | None = None
) -> Tensor:
    """nu of the rows against the columns with logits k s + hardness * s, no gradient through the second s.

    The value is that at an inverse temperature of k + hardness, and so is the gradient in k; the gradient in the rows
    is k / (k + hardness) of that one's.
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
