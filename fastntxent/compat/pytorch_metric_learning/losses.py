"""pytorch-metric-learning's `losses.NTXentLoss`, `SupConLoss` and `SelfSupervisedLoss`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...algebra import row_dots, row_losses, unit_rows
from ...losses import info_nce, nt_xent, sup_con
from ...modules.base import TypedModule
from ...ops.groups import counts_of_groups, sums_of_groups
from ...scale import inverse_temperature
from ...validation import check_features, check_rows, check_same, check_temperature
from ...watching import watch
from ..pairs import IndicesTuple, checked_pairs, lse_by_anchor, pairs_of_ids, sum_by_anchor
from ..shared import as_ids

__all__ = ["NTXentLoss", "PairLoss", "SelfSupervisedLoss", "SupConLoss"]

# Distances are recognised by class name. An attribute of the object says whether it normalises.
_DISTANCES = ("CosineSimilarity", "DotProductSimilarity")


class Terms(NamedTuple):
    """The losses before their reduction, in the form that the library's reducers expect."""

    losses: Tensor
    indices: Tensor | tuple[Tensor, Tensor]
    kind: str  # "element" for one loss per anchor, "pos_pair" for one per positive pair
    counted: Tensor | None = None  # mask of the losses in the default mean; None for all


class PairLoss(TypedModule):
    """Base class of both losses: the shared arguments, and the choice of the pairs that a call compares."""

    _reducer: str  # the library's default reducer, replaced by a mean that is computed here

    def __init__(
        self,
        temperature: float | Tensor,
        *,
        distance: object = None,
        reducer: Callable[..., Any] | None = None,
        collect_stats: bool | None = None,
        embedding_regularizer: object = None,
        embedding_reg_weight: float = 1,
    ):
        super().__init__()
        self.temperature = check_temperature(temperature)
        self.normalize = _check_distance(distance)
        name = type(self).__name__
        if embedding_regularizer is not None:
            raise ValueError(f"embedding_regularizer of {name} must be None: add its loss to this one")
        if collect_stats:
            raise ValueError(f"collect_stats of {name} must be None or False: the loss stores no distances")
        self.reducer = _checked_reducer(name, reducer, self._reducer)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: IndicesTuple | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, a 0-d tensor, or the result of a reducer.

        Args:
            embeddings: (M, D).
            labels: (M,), of any dtype. May be None if indices_tuple is given.
            indices_tuple: The pairs to compare, as indices (a1, p, a2, n) of positive and negative pairs or (a, p, n)
                of triplets. None compares all pairs, by their labels.
            ref_emb: (K, D), references in which positives and negatives are looked up, or None for the embeddings.
            ref_labels: (K,). If None, or the very tensor `labels`, reference i belongs to row i: it has the row's
                label, and is not a positive of the row.
        """
        if labels is None and indices_tuple is None:
            raise ValueError("labels and indices_tuple must not both be None")
        if ref_emb is None:
            ref_labels = None
        # As in the library: without ref_labels, or with the very tensor `labels`, reference i belongs to row i.
        own = ref_labels is None or (ref_labels is labels and ref_labels.device == embeddings.device)
        if indices_tuple is None and own and ref_emb is not None and ref_emb.shape[0] != embeddings.shape[0]:
            raise ValueError(
                "ref_labels must be given if ref_emb and embeddings do not have the same number of rows, "
                f"got {ref_emb.shape[0]} and {embeddings.shape[0]}"
            )
        loss = self.loss_against(embeddings, labels, indices_tuple, ref_emb, None if own else ref_labels, own)
        # A reducer may return something other than a tensor. ref_labels are not watched, because a memory changes its
        # labels before the backward; the loss has copies of them.
        return watch(loss, self.temperature, labels) if isinstance(loss, Tensor) else loss

    def loss_against(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: IndicesTuple | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
        own: bool,
    ) -> Tensor:
        """Return the loss. `own`: reference i belongs to row i and is not its positive; there may be further
        references."""
        check_rows("embeddings", embeddings, may_be_empty=True)
        u = v = unit_rows(embeddings, self.normalize)
        if ref_emb is not None:
            check_rows("ref_emb", ref_emb, may_be_empty=True)
            v = unit_rows(ref_emb, self.normalize)
            check_same("embeddings", u, "ref_emb", v, "device", "dtype")
            check_features("embeddings", u, "ref_emb", v)
        ids, ref_ids = _ids(labels, embeddings, ref_labels, v)
        if indices_tuple is not None:
            terms = self._of_pairs(u, v, *checked_pairs(indices_tuple, u.shape[0], v.shape[0], u.device))
        elif not u.shape[0] or not v.shape[0]:
            terms = None
        elif self.reducer is None:
            return self._mean_of_labels(u, v, ids, ref_ids, own)
        else:
            terms = self._of_labels(u, v, ids, ref_ids, own)
        if self.reducer is None:
            return (u * 0).sum() if terms is None else _mean_of_terms(terms)
        info = (0, None, "already_reduced") if terms is None else terms[:3]
        loss_info = dict(zip(("losses", "indices", "reduction_type"), info, strict=True))
        return self.reducer({"loss": loss_info}, embeddings, None if labels is None else labels.to(embeddings.device))

    def _mean_of_labels(self, u: Tensor, v: Tensor, ids: Tensor, ref_ids: Tensor, own: bool) -> Tensor:
        """Return the default mean over all pairs, without waiting for the device."""
        raise NotImplementedError

    def _of_labels(self, u: Tensor, v: Tensor, ids: Tensor, ref_ids: Tensor, own: bool) -> Terms | None:
        """Return the terms of all pairs, or None if there are too few pairs."""
        raise NotImplementedError

    def _of_pairs(self, u: Tensor, v: Tensor, a1: Tensor, p: Tensor, a2: Tensor, n: Tensor) -> Terms | None:
        """Return the terms of the positive pairs (a1, p), given the negative pairs (a2, n), or None if there are too
        few."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class NTXentLoss(PairLoss):
    r"""The mean over the positive pairs of one NT-Xent term for each pair.

    .. math:: L = \frac{1}{|P|} \sum_{(a, p) \in P} \log \Big(1 + \sum_{(a, n)} e^{(s_{an} - s_{ap})/\tau}\Big)

    It is `fastntxent.sup_con(form="pairs")` with a mean over pairs instead of rows. The loss is 0 if there is no
    positive pair, no negative pair, or exactly one of each.

    Args:
        temperature: A float or a 0-d tensor.
        distance: None or CosineSimilarity for cosines, or DotProductSimilarity, which may normalise or not.
        reducer: None, MeanReducer, or another of the library's reducers, which gets one loss for each positive pair.
            PerAnchorReducer gets their mean for each anchor.
        collect_stats: Not supported; None or False.
        embedding_regularizer: Not supported; None.
        embedding_reg_weight: No effect.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an option is not supported, a number is out of range, or, when called, shapes, dtypes or devices do
            not match.

    With labels, memory is O((M + K) D), because positive pairs are processed in tiles. A reducer other than None,
    MeanReducer and PerAnchorReducer adds O(P) for P positive pairs. With indices_tuple, P listed pairs add O(P).

    Example:
        >>> import torch
        >>> NTXentLoss(temperature=1.0)(torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2))
        tensor(1.1654)
    """

    _reducer = "MeanReducer"

    def __init__(self, temperature: float | Tensor = 0.07, **kwargs: object):
        super().__init__(temperature, **kwargs)  # type: ignore[arg-type]

    def _nu(self, u: Tensor, v: Tensor, ids: Tensor, ref_ids: Tensor, inv_tau: float | Tensor) -> Tensor:
        if v is u:
            return ops.neg_lse(u, ids, inv_tau, "auto")
        return ops.cross_neg_lse(u, v, ids, ref_ids, inv_tau, "auto")[0]

    def _mean_of_labels(self, u: Tensor, v: Tensor, ids: Tensor, ref_ids: Tensor, own: bool) -> Tensor:
        n_positives, n_negatives = _numbers_of_pairs(ids, ref_ids, own)
        total = self._sums(u, v, ids, ref_ids, own).sum()
        return unless_few(total / n_positives.clamp_min(1), n_positives, n_negatives)

    def _sums(self, u: Tensor, v: Tensor, ids: Tensor, ref_ids: Tensor, own: bool) -> Tensor:
        """Return the sum of each anchor's terms."""
        inv_tau = inverse_temperature(self.temperature, u)
        nu = self._nu(u, v, ids, ref_ids, inv_tau)
        return ops.positive_sum(u, v, ids, ref_ids, inv_tau, nu, same=own)

    def _of_labels(self, u: Tensor, v: Tensor, ids: Tensor, ref_ids: Tensor, own: bool) -> Terms | None:
        if _few(*map(int, _numbers_of_pairs(ids, ref_ids, own))):
            return None
        if _is_per_anchor(self.reducer):
            counts = counts_of_groups(ref_ids, ids) - int(own)
            return _of_anchors(self._sums(u, v, ids, ref_ids, own) / counts.clamp_min(1), counts, True)
        inv_tau = inverse_temperature(self.temperature, u)
        nu = self._nu(u, v, ids, ref_ids, inv_tau)
        a, p = pairs_of_ids(ids, ref_ids, own)
        return Terms(row_losses(nu[a], inv_tau * ops.pair_dots(u, v, a, p)), (a, p), "pos_pair")

    def _of_pairs(self, u: Tensor, v: Tensor, a1: Tensor, p: Tensor, a2: Tensor, n: Tensor) -> Terms | None:
        if _few(len(a1), len(a2)):
            return None
        inv_tau = inverse_temperature(self.temperature, u)
        nu = lse_by_anchor(inv_tau * ops.pair_dots(u, v, a2, n), a2, u.shape[0])
        per_anchor = _is_per_anchor(self.reducer)
        if per_anchor:  # PerAnchorReducer counts a repeated pair once
            pairs = torch.unique(a1 * v.shape[0] + p)
            a1, p = pairs.div(v.shape[0], rounding_mode="floor"), pairs % v.shape[0]
        losses = row_losses(nu[a1], inv_tau * ops.pair_dots(u, v, a1, p))
        if not per_anchor:
            return Terms(losses, (a1, p), "pos_pair")
        counts = sum_by_anchor(torch.ones_like(losses), a1, u.shape[0])
        return _of_anchors(sum_by_anchor(losses, a1, u.shape[0]) / counts.clamp_min(1), counts, True)


class SupConLoss(PairLoss):
    r"""SupCon's L_out, averaged over the anchors whose loss is above 0.

    .. math:: L_a = \log \sum_{j \in P(a) \cup N(a)} e^{s_{aj}/\tau} - \frac{1}{|P(a)|} \sum_{p \in P(a)} s_{ap}/\tau

    An anchor's loss is above 0 if the anchor has a positive and at least one other pair. This is decided by counting
    pairs, not from the rounded losses. The loss is 0 if there is no positive pair, no negative pair, or exactly one of
    each. A repeated pair counts once.

    Args:
        temperature: A float or a 0-d tensor.
        distance: None or CosineSimilarity for cosines, or DotProductSimilarity, which may normalise or not.
        reducer: None, AvgNonZeroReducer, or another of the library's reducers, which gets one loss for each anchor, 0
            for an anchor without a positive.
        collect_stats: Not supported; None or False.
        embedding_regularizer: Not supported; None.
        embedding_reg_weight: No effect.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an option is not supported, a number is out of range, or, when called, shapes, dtypes or devices do
            not match.

    With labels, memory is O((M + K) D). With indices_tuple, P listed pairs add O(P).

    Example:
        >>> import torch
        >>> SupConLoss(temperature=1.0)(torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2))
        tensor(1.1654)
    """

    _reducer = "AvgNonZeroReducer"

    def __init__(self, temperature: float | Tensor = 0.1, **kwargs: object):
        super().__init__(temperature, **kwargs)  # type: ignore[arg-type]

    def _mean_of_labels(self, u: Tensor, v: Tensor, ids: Tensor, ref_ids: Tensor, own: bool) -> Tensor:
        if v is u:
            loss = sup_con(u, ids, self.temperature, normalize=False)
        else:
            loss = _mean_of_terms(self._terms(u, v, ids, ref_ids, own))
        return unless_few(loss, *_numbers_of_pairs(ids, ref_ids, own))

    def _of_labels(self, u: Tensor, v: Tensor, ids: Tensor, ref_ids: Tensor, own: bool) -> Terms | None:
        few = _few(*map(int, _numbers_of_pairs(ids, ref_ids, own)))
        return None if few else self._terms(u, v, ids, ref_ids, own)

    def _terms(self, u: Tensor, v: Tensor, ids: Tensor, ref_ids: Tensor, own: bool) -> Terms:
        inv_tau = inverse_temperature(self.temperature, u)
        positives, counts = sums_of_groups(v, ref_ids, ids), counts_of_groups(ref_ids, ids) - int(own)
        if own:
            positives = positives - v[: u.shape[0]]
        here, there = (torch.arange(rows.shape[0], device=u.device) for rows in (u, v))
        nu = ops.cross_neg_lse(u, v, here if own else here + v.shape[0], there, inv_tau, "auto")[0]
        losses = nu - inv_tau * row_dots(u, positives) / counts.clamp_min(1)
        return _of_anchors(losses, counts, (v.shape[0] - int(own)) > 1)

    def _of_pairs(self, u: Tensor, v: Tensor, a1: Tensor, p: Tensor, a2: Tensor, n: Tensor) -> Terms | None:
        if _few(len(a1), len(a2)):
            return None
        positives, negatives = torch.unique(a1 * v.shape[0] + p), torch.unique(a2 * v.shape[0] + n)
        if torch.isin(positives, negatives).any():
            raise ValueError("indices_tuple must not have the same pair as a positive and as a negative one")
        pairs = torch.cat((positives, negatives))
        anchors = pairs.div(v.shape[0], rounding_mode="floor")
        logits = inverse_temperature(self.temperature, u) * ops.pair_dots(u, v, anchors, pairs % v.shape[0])
        nu = lse_by_anchor(logits, anchors, u.shape[0])
        ones = torch.ones_like(logits)
        compared = sum_by_anchor(ones, anchors, u.shape[0])
        ours = anchors[: positives.shape[0]]
        counts = sum_by_anchor(ones[: positives.shape[0]], ours, u.shape[0])
        means = sum_by_anchor(logits[: positives.shape[0]], ours, u.shape[0]) / counts.clamp_min(1)
        return _of_anchors(nu - means, counts, compared > 1)


class SelfSupervisedLoss(TypedModule):
    """A loss of this module on two views, with the samples as labels. By default it is `nt_xent`, for either loss.

    Args:
        loss: `NTXentLoss` or `SupConLoss` of this module. With one positive per row they are the same loss.
        symmetric: Use all rows as anchors and as negatives. False compares embeddings with ref_emb only: `info_nce`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: when called, shapes, dtypes or devices do not match.

    Example:
        >>> import torch
        >>> SelfSupervisedLoss(NTXentLoss(temperature=1.0))(torch.eye(4), torch.eye(4))
        tensor(1.1654)
    """

    def __init__(self, loss: NTXentLoss | SupConLoss, symmetric: bool = True):
        super().__init__()
        check_loss(loss)
        self.loss = loss
        self.symmetric = symmetric

    def forward(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        """Return the loss, a 0-d tensor.

        Args:
            embeddings: (N, D), one view of each sample.
            ref_emb: (N, D), the other view.
        """
        if self.loss.reducer is None and embeddings.shape[0]:
            function = nt_xent if self.symmetric else info_nce
            return function(embeddings, ref_emb, self.loss.temperature, normalize=self.loss.normalize)
        samples = torch.arange(embeddings.shape[0], device=embeddings.device)
        if self.symmetric:
            return self.loss(torch.cat((embeddings, ref_emb)), samples.repeat(2))
        return self.loss(embeddings, samples, ref_emb=ref_emb, ref_labels=samples.clone())


def check_loss(loss: object) -> None:
    """Raise unless `loss` is one of this package's losses."""
    if not isinstance(loss, PairLoss):
        package = __name__.rpartition(".")[0]
        raise TypeError(f"loss must be NTXentLoss or SupConLoss of {package}, got {type(loss).__name__}")


def _check_distance(distance: object) -> bool:
    """Return whether the distance normalises, after checking it."""
    if distance is None:
        return True
    name = type(distance).__name__
    if name not in _DISTANCES or (getattr(distance, "p", 2), getattr(distance, "power", 1)) != (2, 1):
        raise ValueError(f"distance must be None, {' or '.join(_DISTANCES)} with p=2 and power=1, got {name}")
    return bool(getattr(distance, "normalize_embeddings", True))


def _checked_reducer(loss_name: str, reducer: object, default: str) -> Callable[..., Any] | None:
    """Return a copy of the reducer (the library copies it too), or None for the default."""
    name = type(reducer).__name__
    if reducer is None or name == default:
        return None
    if isinstance(reducer, type) or not callable(reducer):
        raise TypeError(f"reducer of {loss_name} must be None or a reducer of pytorch-metric-learning, got {reducer!r}")
    if name == "DivisorReducer":
        raise ValueError(f"reducer of {loss_name} must not be DivisorReducer: the loss has no divisor for it")
    return copy.deepcopy(reducer)


def _is_per_anchor(reducer: object) -> bool:
    """Return whether this is PerAnchorReducer with its default mean, for which the library forms an M x M matrix."""
    return type(reducer).__name__ == "PerAnchorReducer" and (
        getattr(reducer, "aggregation_func", None) is None
        or reducer.aggregation_func.__module__ == type(reducer).__module__  # type: ignore[attr-defined]
    )


def _ids(labels: Tensor | None, rows: Tensor, ref_labels: Tensor | None, refs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ids of rows and references. References without labels get the ids of the rows."""
    if labels is None:
        none = torch.empty(0, dtype=torch.int64, device=rows.device)
        return none, none
    ids = as_ids("labels", labels, rows)
    if ref_labels is None:
        return ids, ids
    as_ids("ref_labels", ref_labels, refs)
    both = torch.cat((labels.to(rows.device), ref_labels.to(rows.device)))  # compared in their common dtype
    ids, ref_ids = as_ids("labels", both, both).split((rows.shape[0], refs.shape[0]))
    return ids, ref_ids


def _numbers_of_pairs(ids: Tensor, ref_ids: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    """Return the number of positive and the number of negative pairs."""
    matches = counts_of_groups(ref_ids, ids)
    return (matches - int(own)).sum(), (ref_ids.shape[0] - matches).sum()


def _few(n_positives: int, n_negatives: int) -> bool:
    """Return whether the library's loss is 0: there is no positive pair, no negative pair, or just one of each."""
    return not n_positives or not n_negatives or (n_positives == 1 and n_negatives == 1)


def unless_few(loss: Tensor, n_positives: Tensor, n_negatives: Tensor) -> Tensor:
    """Return the loss, or 0 where `_few` holds. The numbers stay on the device."""
    few = (n_positives == 0) | (n_negatives == 0) | ((n_positives == 1) & (n_negatives == 1))
    return loss.masked_fill(few, 0)


def _of_anchors(losses: Tensor, n_positives: Tensor, compared: Tensor | bool) -> Terms:
    """Return a term for each anchor: 0 for an anchor without a positive or with nothing else to compare."""
    counted = (n_positives > 0) & compared
    return Terms(
        losses.masked_fill(~counted, 0), torch.arange(losses.shape[0], device=losses.device), "element", counted
    )


def _mean_of_terms(terms: Terms) -> Tensor:
    if terms.counted is None:
        return terms.losses.mean()
    return terms.losses.sum() / terms.counted.sum().clamp_min(1)
