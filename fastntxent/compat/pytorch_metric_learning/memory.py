"""pytorch-metric-learning's `losses.CrossBatchMemory`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...modules.base import TypedModule
from ...validation import check_features, check_integer, check_rows
from ..pairs import IndicesTuple, checked_pairs, pairs_of_ids
from ..shared import as_ids
from .losses import NTXentLoss, SupConLoss, check_loss

__all__ = ["CrossBatchMemory"]


class CrossBatchMemory(TypedModule):
    """`NTXentLoss` or `SupConLoss` of a batch against a memory of the latest rows, which include the batch itself.

    Wang et al., "Cross-Batch Memory for Embedding Learning", 2020. The batch is added to the memory first, but a row's
    copy in the memory is not a positive of the row. No gradient reaches the memory.

    Args:
        loss: `NTXentLoss` or `SupConLoss` of this module.
        embedding_size: The number of features of a row.
        memory_size: The number of rows that the memory holds.
        miner: A miner of the library, called with the embeddings and labels of the batch and of the memory. The loss
            then compares the pairs or triplets that the miner returns. None compares all pairs.
        collect_stats: Not supported; None or False.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an option is not supported, a number is out of range, or, when called, shapes, dtypes or devices do
            not match.

    With neither a miner nor `indices_tuple`, a call takes O((M + memory_size) D) memory. With `indices_tuple` and no
    miner, all pairs are listed, as in the library. As in the library, the `state_dict` has only rows and labels, and a
    restored `CrossBatchMemory` starts empty.

    Example:
        >>> import torch
        >>> loss = CrossBatchMemory(NTXentLoss(temperature=1.0), embedding_size=4, memory_size=8)
        >>> loss(torch.eye(4), torch.arange(4)), loss(torch.eye(4), torch.arange(4))  # no positive, then two views
        (tensor(0.), tensor(1.1654))
    """

    embedding_memory: Tensor
    label_memory: Tensor

    def __init__(
        self,
        loss: NTXentLoss | SupConLoss,
        embedding_size: int,
        memory_size: int = 1024,
        miner: Callable[..., IndicesTuple] | None = None,
        **kwargs: bool | None,
    ):
        super().__init__()
        check_loss(loss)
        embedding_size = check_integer("embedding_size", embedding_size, 1)
        memory_size = check_integer("memory_size", memory_size, 1)
        if kwargs.pop("collect_stats", None):
            raise ValueError("collect_stats of CrossBatchMemory must be None or False: no distances are stored")
        if kwargs:
            raise TypeError(f"CrossBatchMemory got an unexpected keyword argument {next(iter(kwargs))!r}")
        self.loss = loss
        self.miner = miner
        self.embedding_size = embedding_size
        self.memory_size = memory_size
        self.reset_queue()

    def reset_queue(self) -> None:
        """Remove all rows."""
        self.register_buffer("embedding_memory", torch.zeros(self.memory_size, self.embedding_size))
        self.register_buffer("label_memory", torch.zeros(self.memory_size, dtype=torch.int64))
        self.has_been_filled = False
        self.queue_idx = 0

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: IndicesTuple | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, a 0-d tensor.

        Args:
            embeddings: (M, D). At most `memory_size` rows can go into the memory in a call.
            labels: (M,), of any dtype.
            indices_tuple: Further pairs or triplets to compare, beside the pairs of the miner, or beside all pairs if
                there is no miner. Their positives and negatives are positions in the memory.
            enqueue_mask: (M,) bool, the rows that go into the memory; only the other rows are then anchors. None puts
                all rows into the memory and uses all as anchors.
        """
        self._check(embeddings, labels, indices_tuple, enqueue_mask)
        labels = labels.to(embeddings.device)
        first = self.queue_idx
        if enqueue_mask is None:
            self.add_to_memory(embeddings, labels)
            own: Tensor | None = self.curr_batch_idx
        else:
            enqueue_mask = enqueue_mask.to(embeddings.device)
            self.add_to_memory(embeddings[enqueue_mask], labels[enqueue_mask])
            embeddings, labels, own = embeddings[~enqueue_mask], labels[~enqueue_mask], None
        held = self.memory_size if self.has_been_filled else self.queue_idx
        order = torch.arange(held, device=embeddings.device)
        mined = self.miner is not None or indices_tuple is not None
        if own is not None and not mined and held:  # put this batch first, so that reference i is row i
            order = (first + order) % held
        # These are copies: the memory changes before the backward, which needs the rows as they are now.
        refs, ref_labels = self.embedding_memory[order], self.label_memory[order]
        if mined:
            pairs = self._pairs_of_call(embeddings, labels, refs, ref_labels, own, indices_tuple)
            return self.loss(embeddings, labels, pairs, refs, ref_labels)
        return self.loss.loss_against(embeddings, labels, None, refs, ref_labels, own is not None)

    @torch.no_grad()
    def add_to_memory(self, embeddings: Tensor, labels: Tensor, batch_size: int | None = None) -> None:
        """Replace the oldest rows with these, and set `curr_batch_idx` to their positions.

        Args:
            embeddings: (M, D), the rows.
            labels: (M,), their labels.
            batch_size: Unused, as in the library.
        """
        self.embedding_memory = self.embedding_memory.to(embeddings)
        self.label_memory = self.label_memory.to(labels)
        last = self.queue_idx + len(embeddings)
        self.curr_batch_idx = torch.arange(self.queue_idx, last, device=labels.device) % self.memory_size
        self.embedding_memory[self.curr_batch_idx] = embeddings
        self.label_memory[self.curr_batch_idx] = labels
        self.has_been_filled = self.has_been_filled or last >= self.memory_size
        self.queue_idx = last % self.memory_size

    def _pairs_of_call(
        self,
        embeddings: Tensor,
        labels: Tensor,
        refs: Tensor,
        ref_labels: Tensor,
        own: Tensor | None,
        given: IndicesTuple | None,
    ) -> IndicesTuple:
        """Return the miner's pairs or all pairs, without pairs of a row with its copy, followed by the given pairs."""
        sizes = len(embeddings), len(refs), embeddings.device
        pairs: IndicesTuple
        if self.miner is not None:
            pairs = self.miner(embeddings, labels, refs, ref_labels)
        else:
            a1, p = pairs_of_ids(as_ids("labels", labels, embeddings), as_ids("labels", ref_labels, refs), False)
            a2, n = torch.where(labels[:, None] != ref_labels)
            pairs = (a1, p, a2, n)
        a1, p, a2, n = checked_pairs(pairs, *sizes)
        if own is not None:
            kept = own[a1] != p
            a1, p = a1[kept], p[kept]
            if len(pairs) == 3:
                a2, n = a2[kept], n[kept]
        if given is None:
            return a1, p, a2, n
        more = checked_pairs(given, *sizes)
        if len(pairs) == 3 and len(given) == 4:  # to triplets: each positive pair with each negative pair of its anchor
            positive, negative = torch.where(more[0][:, None] == more[2])
            more = more[0][positive], more[1][positive], more[2][negative], more[3][negative]
        return tuple(torch.cat(both) for both in zip((a1, p, a2, n), more, strict=True))  # type: ignore[return-value]

    def _check(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: IndicesTuple | None, enqueue_mask: Tensor | None
    ) -> None:
        check_rows("embeddings", embeddings, may_be_empty=True)
        check_features("embeddings", embeddings, "the memory's rows", self.embedding_memory)
        as_ids("labels", labels, embeddings)
        taken = len(embeddings)
        if enqueue_mask is not None:
            if indices_tuple is not None:
                raise ValueError("indices_tuple and enqueue_mask must not both be given")
            if enqueue_mask.dtype != torch.bool or enqueue_mask.shape != labels.shape:
                raise ValueError(
                    f"enqueue_mask must be bool of shape {tuple(labels.shape)}, got {enqueue_mask.dtype} of shape "
                    f"{tuple(enqueue_mask.shape)}"
                )
            taken = int(enqueue_mask.sum())
        if taken > self.memory_size:
            raise ValueError(f"at most {self.memory_size} rows (memory_size) can be added in one call, got {taken}")

    def extra_repr(self) -> str:
        return f"embedding_size={self.embedding_size}, memory_size={self.memory_size}"
