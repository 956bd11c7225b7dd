"""pytorch-metric-learning's `utils.distributed.DistributedLossWrapper`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...algebra import scale_gradient
from ...distributed import ShardedBatch
from ...losses import sup_con
from ...modules.base import TypedModule
from ...opening import open_batch
from ...validation import check_rows
from ..pairs import IndicesTuple, checked_pairs
from ..shared import as_ids, default_group
from .losses import PairLoss, SupConLoss, check_loss, unless_few
from .memory import CrossBatchMemory

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DistributedLossWrapper"]


class DistributedLossWrapper(TypedModule):
    """A loss of this module over the batch of all ranks of the default process group.

    Without a process group, it is the loss of this process's batch. On every rank, the value equals the loss that one
    process computes on the whole batch. The library's value is R times as large on R ranks. After DDP averages the
    gradients, they equal the gradients of one process, as in the library with efficient=False.

    With labels alone and the default reducer, memory is the same as for a loss with `group=`. In all other cases every
    rank gathers the rows of all ranks and computes the whole loss, as in the library.

    Args:
        loss: `NTXentLoss` or `SupConLoss` of this module, or a `CrossBatchMemory` around one, from this module or from
            the library.
        efficient: Whether indices_tuple holds only this rank's pairs. It has no other effect: the gradient is always
            exact. In the library, True leaves out the gradient that a row gets as a reference of other ranks' rows, and
            makes the rest R times too large.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: when called, shapes, dtypes or devices do not match.

    Example:
        >>> import torch
        >>> loss = DistributedLossWrapper(SupConLoss(temperature=1.0))
        >>> loss(torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2))
        tensor(1.1654)
    """

    def __init__(self, loss: Any, efficient: bool = False):
        super().__init__()
        self.has_memory = isinstance(loss, CrossBatchMemory) or type(loss).__name__ == "CrossBatchMemory"
        check_loss(loss.loss if self.has_memory else loss)
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
        """Return the loss, a 0-d tensor, or the result of a reducer.

        `indices_tuple` numbers rows as the library's `DistributedMinerWrapper` does: this rank's rows first, then the
        other ranks' rows in rank order. References are numbered likewise.

        Args:
            embeddings: (M, D), this rank's rows. M may differ between ranks.
            labels: (M,), this rank's labels, which must mean the same on every rank.
            indices_tuple: Pairs or triplets to compare. With efficient=False, the pairs of all ranks' rows, the same on
                every rank (if they differ, each rank returns the loss of its pairs). With efficient=True, pairs whose
                anchors are this rank's rows; the loss is over the pairs of all ranks.
            ref_emb: (K, D), this rank's references, or None.
            ref_labels: (K,), the labels of this rank's references, or None.
            enqueue_mask: (M,) bool, for a `CrossBatchMemory`: this rank's rows that go into the memory.
        """
        group = default_group()
        if self.has_memory:
            if ref_emb is not None or ref_labels is not None:
                raise ValueError("ref_emb and ref_labels must be None with a CrossBatchMemory, which has its own")
            if group is None:
                return self.loss(embeddings, labels, indices_tuple, enqueue_mask)
            return self._memory_of_all_ranks(group, embeddings, labels, indices_tuple, enqueue_mask)
        if enqueue_mask is not None:
            raise ValueError("enqueue_mask must be None without a CrossBatchMemory")
        if group is None:
            return self.loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if indices_tuple is None and ref_emb is None and self.loss.reducer is None:
            return _labels_of_all_ranks(self.loss, embeddings, labels, group)
        return self._of_all_ranks(group, embeddings, labels, indices_tuple, ref_emb, ref_labels)

    def _memory_of_all_ranks(
        self,
        group: ProcessGroup,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: IndicesTuple | None,
        enqueue_mask: Tensor | None,
    ) -> Tensor:
        if indices_tuple is not None:
            raise ValueError(
                "indices_tuple must be None with a CrossBatchMemory in a process group: give the memory a miner"
            )
        if labels is None:
            raise ValueError("labels must be given with a CrossBatchMemory, got None")
        batch = _open_ranks(group, self.loss.loss, "embeddings", embeddings, labels, masked=enqueue_mask is not None)
        mask = None if enqueue_mask is None else batch.gather(enqueue_mask.to(embeddings.device))
        return self.loss(_rows_of_all_ranks(embeddings, batch), batch.gather(labels.to(embeddings.device)), None, mask)

    def _of_all_ranks(
        self,
        group: ProcessGroup,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: IndicesTuple | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> Tensor:
        if labels is None and indices_tuple is None:
            raise ValueError("labels and indices_tuple must not both be None")
        batch = refs = _open_ranks(
            group, self.loss, "embeddings", embeddings, labels, pairs=indices_tuple is not None,
            ref_emb=ref_emb is not None, efficient=self.efficient,
        )  # fmt: skip
        all_rows = _rows_of_all_ranks(embeddings, batch)
        all_labels = None if labels is None else batch.gather(labels.to(embeddings.device))
        all_refs = all_ref_labels = None
        if ref_emb is not None:
            own = ref_labels is labels  # the same tensor: reference i belongs to row i, as in one process
            refs = _open_ranks(group, self.loss, "ref_emb", ref_emb, None if own else ref_labels, own=own)
            all_refs = _rows_of_all_ranks(ref_emb, refs)
            all_ref_labels = all_labels
            if not own:
                all_ref_labels = None if ref_labels is None else refs.gather(ref_labels.to(embeddings.device))
        if indices_tuple is not None:
            indices_tuple = self._pairs_by_rank(indices_tuple, batch, refs, embeddings.device)
        return self.loss(all_rows, all_labels, indices_tuple, all_refs, all_ref_labels)

    def _pairs_by_rank(
        self, pairs: IndicesTuple, batch: ShardedBatch, refs: ShardedBatch, device: torch.device
    ) -> IndicesTuple:
        """Return the indices with rows numbered in rank order, instead of this rank's rows first."""
        n_anchors = batch.sizes[batch.rank] if self.efficient else batch.n_samples
        indices = checked_pairs(pairs, n_anchors, refs.n_samples, device)
        rows, cols = _own_first(batch, device), _own_first(refs, device)
        a1, p, a2, n = (order[index] for order, index in zip((rows, cols, rows, cols), indices, strict=True))
        if self.efficient:
            a1, p, a2, n = map(batch.gather_ragged, (a1, p, a2, n))
        return a1, p, a2, n


def _open_ranks(
    group: ProcessGroup, loss: PairLoss, name: str, rows: Tensor, labels: Tensor | None, **agreed: Any
) -> ShardedBatch:
    check_rows(name, rows, may_be_empty=True)
    if labels is not None:
        as_ids("labels" if name == "embeddings" else "ref_labels", labels, rows)
    batch = open_batch(
        group, f"{name} of {type(loss).__name__}", {name: rows}, temperature=loss.temperature,
        labels=None if labels is None else labels.dtype, **agreed,
    )  # fmt: skip
    assert isinstance(batch, ShardedBatch)
    return batch


def _rows_of_all_ranks(x: Tensor, batch: ShardedBatch) -> Tensor:
    """Return the rows of all ranks in rank order. Only this rank's rows get a gradient. It is multiplied by the number
    of ranks, because every rank computes the whole loss and DDP averages the gradients."""
    parts = list(batch.gather(x).split(batch.sizes))
    parts[batch.rank] = scale_gradient(x, len(parts))
    return torch.cat(parts)


def _own_first(batch: ShardedBatch, device: torch.device) -> Tensor:
    """Return the positions, in rank order, of this rank's rows followed by the rows of the other ranks."""
    parts = list(torch.arange(batch.n_samples, device=device).split(batch.sizes))
    return torch.cat((parts.pop(batch.rank), *parts))


def _labels_of_all_ranks(loss: PairLoss, embeddings: Tensor, labels: Tensor | None, group: ProcessGroup) -> Tensor:
    check_rows("embeddings", embeddings, may_be_empty=True)
    if labels is None:
        raise ValueError("labels must be given in a process group, got None")
    ids = as_ids("labels", labels, embeddings)
    batch = open_batch(group, type(loss).__name__, {"embeddings": embeddings})
    matches = batch.group_counts(ids)
    n_positives, n_negatives = batch.total(matches - 1), batch.total(batch.n_samples - matches)
    terms = partial(sup_con, embeddings, ids, loss.temperature, normalize=loss.normalize, group=group)
    if isinstance(loss, SupConLoss):
        mean = terms()
    else:
        mean = batch.total((matches - 1) * terms(form="pairs", reduction="none")) / n_positives.clamp_min(1)
    return unless_few(mean, n_positives, n_negatives)
