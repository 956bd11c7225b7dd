"""InfoNCE: queries against keys, in one direction."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import check_name as check_backend
from ..backends.base import row_dots, row_losses
from ..common import (
    group_counts,
    group_dots,
    inverse_temperature,
    log_add,
    n_samples,
    neg_lse_of_columns,
    reduce,
    sample_ids,
    scale_gradient,
    unit_rows,
    watched,
)
from ..distributed import Group, Shard, open_shard
from ..ops import autocast_off
from ..options import HARDNESS_MODES, BackendName, HardnessMode, Reduction
from ..validation import (
    FLOAT_DTYPES,
    check_choice,
    check_features,
    check_ids,
    check_in_range,
    check_reduction,
    check_rows,
    check_same,
    check_tensor,
)


@watched
def info_nce(
    query: Tensor,
    key: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    negatives: Tensor | None = None,
    in_batch_negatives: bool | None = None,
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
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
        label_smoothing: as in `nt_xent`.
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
    check_rows("query", query, may_be_empty=group is not None)
    check_rows("key", key, may_be_empty=group is not None)
    check_same("query", query, "key", key, "shape", "dtype", "device")
    check_reduction(reduction)
    check_backend(backend)
    check_choice("hardness_mode", hardness_mode, HARDNESS_MODES)
    hardness_strength = check_in_range(
        "hardness_strength", hardness_strength, 0, torch.inf, with_low=True, with_high=False
    )
    label_smoothing = check_in_range("label_smoothing", label_smoothing, 0, 1, with_low=True, with_high=False)
    if label_smoothing and hardness_strength:
        raise ValueError("label_smoothing and hardness_strength cannot both be given")
    N = query.shape[0]
    if ids is not None:
        check_ids("ids", ids, "query", query)
    if negatives is not None:
        _check_negatives(negatives, query, may_be_empty=group is not None)
    if in_batch_negatives is None:
        in_batch_negatives = negatives is None
    own_negatives = negatives is not None and negatives.ndim == 3
    shard = open_shard(
        group, "info_nce", query, backend, temperature=temperature, in_batch_negatives=in_batch_negatives,
        ids_given=ids is not None, label_smoothing=label_smoothing, hardness_mode=hardness_mode,
        hardness_strength=hardness_strength, reduction=reduction, normalize=normalize,
        key_requires_grad=key.requires_grad, negatives_given=negatives is not None, own_negatives=own_negatives,
    )  # fmt: skip
    if negatives is None and not in_batch_negatives:
        raise ValueError("negatives must be given where in_batch_negatives is False: a query needs some")
    inv_tau = inverse_temperature(temperature, query, per_row=N, shard=shard)
    in_batch_hardness = 0.0 if hardness_mode == "hard_negatives" else hardness_strength
    explicit_hardness = 0.0 if hardness_mode == "in_batch_negatives" else hardness_strength

    u, v = unit_rows(query, normalize), unit_rows(key, normalize)
    pos = inv_tau * row_dots(u, v)
    nu = torch.full_like(pos, -torch.inf)
    # The sum of the negatives' logits, and their number, for the smoothed labels.
    negative_sum, n_negatives = torch.zeros_like(pos), torch.zeros_like(pos)
    if in_batch_negatives:
        groups = sample_ids(u, shard) if ids is None else ids
        nu = hardened_neg_lse(u, v, groups, groups, inv_tau, in_batch_hardness, backend, shard, shard)
        if label_smoothing:
            negative_sum = group_dots(u, v, None, shard) - group_dots(u, v, groups, shard)
            n_negatives = n_samples(u, shard) - group_counts(groups, shard)
    if negatives is not None:
        w = unit_rows(negatives, normalize)
        if w.ndim == 2:
            # Explicit negatives belong to no query: their ids are nobody's.
            here, there = (torch.full((x.shape[0],), i, device=u.device) for i, x in enumerate((u, w)))
            w_shard = open_shard(group, "info_nce", negatives, backend)
            explicit = hardened_neg_lse(u, w, here, there, inv_tau, explicit_hardness, backend, shard, w_shard)
            sums = group_dots(u, w, None, shard, w_shard) if label_smoothing else torch.zeros_like(pos)
            n_explicit = n_samples(w, w_shard)
        else:
            with autocast_off(u):
                sims = torch.bmm(w, u.unsqueeze(2)).squeeze(2)
            by_row = inv_tau.unsqueeze(1) if inv_tau.ndim else inv_tau
            explicit = torch.logsumexp(hardened(sims, by_row, explicit_hardness), dim=1)
            sums, n_explicit = sims.sum(dim=1), w.shape[1]
        nu = log_add(nu, explicit)
        negative_sum, n_negatives = negative_sum + sums, n_negatives + n_explicit
    losses = row_losses(nu, pos)
    if label_smoothing:
        losses = losses + label_smoothing * (pos - (pos + inv_tau * negative_sum) / (1 + n_negatives))
    return reduce(losses, reduction, shard=shard)


def hardened(sims: Tensor, inv_tau: Tensor, hardness: float) -> Tensor:
    """The logits k s + hardness * s, no gradient through the second s."""
    return inv_tau * sims + hardness * sims.detach()


def hardened_neg_lse(
    u: Tensor,
    v: Tensor,
    u_ids: Tensor,
    v_ids: Tensor,
    inv_tau: Tensor,
    hardness: float,
    backend: str,
    u_shard: Shard | None = None,
    v_shard: Shard | None = None,
) -> Tensor:
    """nu of the rows u against the columns v with logits k s + hardness * s, no gradient through the second s.

    The value is that at an inverse temperature of k + hardness, and so is the gradient in k; the gradient in the rows
    is k / (k + hardness) of that one's.
    """
    if not hardness:
        return neg_lse_of_columns(u, v, u_ids, v_ids, inv_tau, backend, u_shard, v_shard)
    hard = inv_tau + hardness
    share = (inv_tau / hard).detach()
    nu = neg_lse_of_columns(u, v, u_ids, v_ids, scale_gradient(hard, 1 / share), backend, u_shard, v_shard)
    return scale_gradient(nu, share)


def _check_negatives(negatives: Tensor, query: Tensor, *, may_be_empty: bool) -> None:
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
