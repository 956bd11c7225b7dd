"""pytorch-metric-learning's `losses.NTXentLoss`, `SupConLoss` and `SelfSupervisedLoss`, and its wrapper over ranks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import ops
from ..backends.base import row_dots, row_losses
from ..common import batch_sum, group_counts, inverse_temperature, unit_rows
from ..distributed import open_shard
from ..losses import info_nce, nt_xent, sup_con
from ..ops.groups import counts_of_groups, group_sums
from ..validation import check_features, check_rows, check_same, check_temperature, check_tensor
from .pairs import IndicesTuple, checked_pairs, lse_by_anchor, pair_dots, sum_by_anchor
from .shared import as_ids, default_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DistributedLossWrapper", "NTXentLoss", "SelfSupervisedLoss", "SupConLoss"]

# By the name of the class: whether it normalises is asked of the object.
_DISTANCES = ("CosineSimilarity", "DotProductSimilarity")


class _PairLoss(nn.Module):
    """What both losses take, and which pairs a call is about."""

    _reducer: str  # the library's default, the only one whose mean is formed here

    def __init__(
        self,
        temperature: float,
        *,
        distance: object = None,
        reducer: object = None,
        collect_stats: bool | None = None,
        embedding_regularizer: object = None,
        embedding_reg_weight: float = 1,
    ):
        super().__init__()
        self.temperature = check_temperature(temperature)
        self.normalize = _check_distance(distance)
        name = type(self).__name__
        if reducer is not None and type(reducer).__name__ != self._reducer:
            raise ValueError(f"reducer of {name} must be None or {self._reducer}, got {type(reducer).__name__}")
        if embedding_regularizer is not None:
            raise ValueError(f"embedding_regularizer of {name} must be None: add its loss to this one")
        if collect_stats:
            raise ValueError(f"collect_stats of {name} must be None or False: no distances are held to collect from")

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: IndicesTuple | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        if labels is None and indices_tuple is None:
            raise ValueError("labels and indices_tuple must not both be None")
        check_tensor("embeddings", embeddings)
        if len(embeddings) == 0:
            return embeddings.sum() * 0
        check_rows("embeddings", embeddings)
        u = unit_rows(embeddings, self.normalize)
        v = u
        if ref_emb is not None:
            check_rows("ref_emb", ref_emb)
            v = unit_rows(ref_emb, self.normalize)
            check_same("embeddings", u, "ref_emb", v, "device", "dtype")
            check_features("embeddings", u, "ref_emb", v)
            if ref_labels is None and indices_tuple is None:
                raise ValueError("ref_labels must be given with ref_emb and labels")
        if indices_tuple is not None:
            return self._of_pairs(u, v, *checked_pairs(indices_tuple, len(u), len(v), u.device))
        assert labels is not None
        ids = as_ids("labels", labels, u)
        if ref_emb is None:
            return self._of_labels(u, u, ids, ids, True)
        # As in the library: labels that are the very same tensor leave out each row's own reference.
        if ref_labels is None or (ref_labels is labels and labels.device == u.device):
            return self._of_labels(u, v, ids, as_ids("ref_labels", labels, v), True)
        as_ids("ref_labels", ref_labels, v)
        both = torch.cat((labels.to(u.device), ref_labels.to(u.device)))
        ids, ref_ids = as_ids("labels", both, both).split((len(u), len(v)))
        return self._of_labels(u, v, ids, ref_ids, False)

    def _of_labels(self, u: Tensor, v: Tensor, ids: Tensor, ref_ids: Tensor, same: bool) -> Tensor:
        """The loss of all pairs; `same`: row i of v is no positive of row i of u."""
        raise NotImplementedError

    def _of_pairs(self, u: Tensor, v: Tensor, a1: Tensor, p: Tensor, a2: Tensor, n: Tensor) -> Tensor:
        """The loss of the positive pairs (a1, p) and the negative pairs (a2, n)."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class NTXentLoss(_PairLoss):
    r"""One NT-Xent term for each positive pair, and their mean over the pairs.

    .. math:: L = \frac{1}{|P|} \sum_{(a, p) \in P} \log \Big(1 + \sum_{(a, n)} e^{(s_{an} - s_{ap})/\tau}\Big)

    `fastntxent.sup_con(form="pairs")` with another mean. Without a positive or without a negative pair it is 0.

    Args:
        temperature: a float or a 0-d tensor.
        distance: None or CosineSimilarity, or DotProductSimilarity, normalising or not.
        reducer: None or MeanReducer.
        collect_stats, embedding_regularizer, embedding_reg_weight: for the library's signature; not supported.

    Its call takes embeddings (M, D), labels (M,) of any dtype, and optionally `ref_emb` (K, D) with `ref_labels` (K,),
    where positives and negatives are then looked for; or `indices_tuple`, indices of pairs (a1, p, a2, n) or of
    triplets (a, p, n).

    Labels: O((M + K) D) memory, and the positive pairs in tiles. P pairs: O(P) beside it.

    Example:
        >>> import torch
        >>> NTXentLoss(temperature=1.0)(torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2))
        tensor(1.1654)
    """

    _reducer = "MeanReducer"

    def __init__(self, temperature: float = 0.07, **kwargs: object):
        super().__init__(temperature, **kwargs)  # type: ignore[arg-type]

    def _of_labels(self, u: Tensor, v: Tensor, ids: Tensor, ref_ids: Tensor, same: bool) -> Tensor:
        inv_tau = inverse_temperature(self.temperature, u)
        if v is u:
            nu = ops.neg_lse(u, ids, inv_tau, "auto")
        else:
            nu = ops.cross_neg_lse(u, v, ids, ref_ids, inv_tau, "auto")[0]
        losses = ops.positive_sum(u, v, ids, ref_ids, inv_tau, nu, same, "auto")
        matches = counts_of_groups(ref_ids, ids)
        n_positives, n_negatives = (matches - int(same)).sum(), (len(v) - matches).sum()
        return _unless_few(losses.sum() / n_positives.clamp_min(1), n_positives, n_negatives)

    def _of_pairs(self, u: Tensor, v: Tensor, a1: Tensor, p: Tensor, a2: Tensor, n: Tensor) -> Tensor:
        if _few(len(a1), len(a2)):
            return u.sum() * 0
        inv_tau = inverse_temperature(self.temperature, u).to(u.device)
        nu = lse_by_anchor(inv_tau * pair_dots(u, v, a2, n), a2, len(u))
        return row_losses(nu[a1], inv_tau * pair_dots(u, v, a1, p)).mean()


class SupConLoss(_PairLoss):
    r"""SupCon's L_out, and its mean over the anchors whose loss is positive.

    .. math:: L_a = \log \sum_{j \in P(a) \cup N(a)} e^{s_{aj}/\tau} - \frac{1}{|P(a)|} \sum_{p \in P(a)} s_{ap}/\tau

    Those are the anchors with a positive and anything beside it; which they are is taken from the pairs, not from what
    rounding left of a loss. Without a positive or without a negative pair in the batch it is 0.

    Args:
        temperature: a float or a 0-d tensor.
        distance: None or CosineSimilarity, or DotProductSimilarity, normalising or not.
        reducer: None or AvgNonZeroReducer.
        collect_stats, embedding_regularizer, embedding_reg_weight: for the library's signature; not supported.

    Its call is that of `NTXentLoss`; a pair that is given several times counts once.

    Labels: O((M + K) D) memory. P pairs: O(P) beside it.

    Example:
        >>> import torch
        >>> SupConLoss(temperature=1.0)(torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2))
        tensor(1.1654)
    """

    _reducer = "AvgNonZeroReducer"

    def __init__(self, temperature: float = 0.1, **kwargs: object):
        super().__init__(temperature, **kwargs)  # type: ignore[arg-type]

    def _of_labels(self, u: Tensor, v: Tensor, ids: Tensor, ref_ids: Tensor, same: bool) -> Tensor:
        matches = counts_of_groups(ref_ids, ids)
        counts, n_negatives = matches - int(same), (len(v) - matches).sum()
        if v is u:
            loss = sup_con(u, ids, self.temperature, normalize=False)
            return _unless_few(loss, counts.sum(), n_negatives)
        inv_tau = inverse_temperature(self.temperature, u)
        sums = group_sums(torch.cat((torch.zeros_like(u), v)), torch.cat((ids, ref_ids)))[0][: len(u)]
        sums = sums - v if same else sums
        here, there = torch.arange(len(u), device=u.device), torch.arange(len(v), device=u.device)
        nu = ops.cross_neg_lse(u, v, here if same else here + len(v), there, inv_tau, "auto")[0]
        losses = nu - inv_tau * row_dots(u, sums) / counts.clamp_min(1)
        loss = _mean_over(losses, (counts > 0) & (len(v) - same > 1))
        return _unless_few(loss, counts.sum(), n_negatives)

    def _of_pairs(self, u: Tensor, v: Tensor, a1: Tensor, p: Tensor, a2: Tensor, n: Tensor) -> Tensor:
        if _few(len(a1), len(a2)):
            return u.sum() * 0
        positives, negatives = torch.unique(a1 * len(v) + p), torch.unique(a2 * len(v) + n)
        if torch.isin(positives, negatives).any():
            raise ValueError("indices_tuple must not have the same pair as a positive and as a negative one")
        pairs = torch.cat((positives, negatives))
        anchors = pairs.div(len(v), rounding_mode="floor")
        logits = inverse_temperature(self.temperature, u).to(u.device) * pair_dots(u, v, anchors, pairs % len(v))
        nu = lse_by_anchor(logits, anchors, len(u))
        ones = torch.ones_like(logits)
        compared = sum_by_anchor(ones, anchors, len(u))
        ours = anchors[: len(positives)]
        counts = sum_by_anchor(ones[: len(positives)], ours, len(u))
        means = sum_by_anchor(logits[: len(positives)], ours, len(u)) / counts.clamp_min(1)
        return _mean_over(nu - means, (counts > 0) & (compared > 1))


class SelfSupervisedLoss(nn.Module):
    """A loss of this module on two views, whose labels are the samples: `nt_xent`, for both of them.

    Args:
        loss: `NTXentLoss` or `SupConLoss` of this module; with one positive for each row they are the same loss.
        symmetric: whether all rows are anchors and negatives; False compares embeddings with ref_emb alone: `info_nce`.

    Its call takes embeddings and ref_emb, (N, D).

    Example:
        >>> import torch
        >>> SelfSupervisedLoss(NTXentLoss(temperature=1.0))(torch.eye(4), torch.eye(4))
        tensor(1.1654)
    """

    def __init__(self, loss: NTXentLoss | SupConLoss, symmetric: bool = True):
        super().__init__()
        _check_loss(loss)
        self.loss = loss
        self.symmetric = symmetric

    def forward(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        function = nt_xent if self.symmetric else info_nce
        return function(embeddings, ref_emb, self.loss.temperature, normalize=self.loss.normalize)


class DistributedLossWrapper(nn.Module):
    """A loss of this module over the batch of all ranks of the default process group; without one, the loss as it is.

    Its value is that of one process with the whole batch, on every rank; the library's is R times it on R ranks. Its
    gradient, after DDP's averaging, is that of one process, as the library's with efficient=False.

    Args:
        loss: `NTXentLoss` or `SupConLoss` of this module.
        efficient: of no consequence: a rank compares its own rows with those of all, and the gradient is right. The
            library's with efficient=True lacks what its rows are as others' references.

    Its call takes this rank's embeddings (M, D), of any number, and their labels (M,), which mean the same on every
    rank. indices_tuple, ref_emb, ref_labels and enqueue_mask must be None in a group.

    Example:
        >>> import torch
        >>> loss = DistributedLossWrapper(SupConLoss(temperature=1.0))
        >>> loss(torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2))
        tensor(1.1654)
    """

    def __init__(self, loss: NTXentLoss | SupConLoss, efficient: bool = False):
        super().__init__()
        _check_loss(loss)
        self.loss = loss
        self.efficient = efficient

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: IndicesTuple | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        group = default_group()
        if group is None:
            return self.loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        others = {
            "indices_tuple": indices_tuple,
            "ref_emb": ref_emb,
            "ref_labels": ref_labels,
            "enqueue_mask": enqueue_mask,
        }
        for name, value in others.items():
            if value is not None:
                raise ValueError(f"{name} must be None in a process group: pairs are those of all ranks' labels")
        return _of_all_ranks(self.loss, embeddings, labels, group)


def _of_all_ranks(
    loss: NTXentLoss | SupConLoss, embeddings: Tensor, labels: Tensor | None, group: ProcessGroup
) -> Tensor:
    check_rows("embeddings", embeddings, may_be_empty=True)
    if labels is None:
        raise ValueError("labels must be given in a process group, got None")
    ids = as_ids("labels", labels, embeddings)
    shard = open_shard(group, type(loss).__name__, embeddings, "auto")
    assert shard is not None
    matches = group_counts(ids, shard)
    n_positives, n_negatives = batch_sum(matches - 1, shard), batch_sum(shard.n_rows - matches, shard)
    terms = partial(sup_con, embeddings, ids, loss.temperature, normalize=loss.normalize, group=group)
    if isinstance(loss, SupConLoss):
        mean = terms()
    else:
        mean = batch_sum((matches - 1) * terms(form="pairs", reduction="none"), shard) / n_positives.clamp_min(1)
    return _unless_few(mean, n_positives, n_negatives)


def _check_loss(loss: object) -> None:
    if not isinstance(loss, (NTXentLoss, SupConLoss)):
        raise TypeError(f"loss must be NTXentLoss or SupConLoss of {__name__}, got {type(loss).__name__}")


def _check_distance(distance: object) -> bool:
    """Whether it normalises."""
    if distance is None:
        return True
    name = type(distance).__name__
    if name not in _DISTANCES or (getattr(distance, "p", 2), getattr(distance, "power", 1)) != (2, 1):
        raise ValueError(f"distance must be None, {' or '.join(_DISTANCES)} with p=2 and power=1, got {name}")
    return bool(getattr(distance, "normalize_embeddings", True))


def _few(n_positives: int, n_negatives: int) -> bool:
    """Where the library's loss is 0: no pair of a kind, or not more than one of both."""
    return not n_positives or not n_negatives or (n_positives == 1 and n_negatives == 1)


def _unless_few(loss: Tensor, n_positives: Tensor, n_negatives: Tensor) -> Tensor:
    """`_few` for numbers that only the device knows."""
    few = (n_positives == 0) | (n_negatives == 0) | ((n_positives == 1) & (n_negatives == 1))
    return loss.masked_fill(few, 0)


def _mean_over(losses: Tensor, counted: Tensor) -> Tensor:
    return losses.masked_fill(~counted, 0).sum() / counted.sum().clamp_min(1)
