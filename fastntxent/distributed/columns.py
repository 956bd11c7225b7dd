"""The rows of all ranks as columns, block by block."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import schedule, wire
from .agreement import Turn
from .wire import uncompiled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Block(NamedTuple):
    """Consecutive rows (n, D) of one rank or of all ranks, with their ids and any other per-row tensors."""

    span: slice  # position among the rows of all ranks
    rows: Tensor
    ids: Tensor
    numbers: tuple[Tensor, ...] = ()

    def cut(self, span: slice) -> Block:
        """Return the part of this block that lies at `span`."""
        here = slice(span.start - self.span.start, span.stop - self.span.start)
        return Block(span, self.rows[here], self.ids[here], tuple(x[here] for x in self.numbers))


@dataclass(frozen=True)
class Partition:
    """The layout of the rows of all ranks. It holds no tensor, so an autograd node may store it for the backward."""

    group: ProcessGroup
    rank: int
    sizes: list[int]
    ring: bool
    dtype: torch.dtype  # the dtype of the arithmetic
    turn: Turn
    by_rank: bool = False  # one block per rank, even with all-gather

    @property
    def spans(self) -> list[slice]:
        """The position of each rank's rows among the rows of all ranks."""
        return schedule.spans(self.sizes)

    @property
    def span(self) -> slice:
        """The position of this rank's rows."""
        return self.spans[self.rank]

    @property
    def n_rows(self) -> int:
        """The number of rows on all ranks together."""
        return sum(self.sizes)

    def exchange(self, numbers: Tensor) -> Tensor:
        """Send each rank the numbers computed here for that rank's rows (M,). Return the numbers that all ranks
        computed for this rank's rows (ranks, m)."""
        return wire.exchange_numbers(self.group, numbers, self.sizes)

    def columns_from(self, saved: Sequence[Tensor | None]) -> tuple[Columns, Tensor]:
        """Rebuild the columns from the tensors that `Columns.to_save` returned. Return them and this rank's ids."""
        sent, whole, ids, all_ids = saved
        assert sent is not None
        assert ids is not None
        columns = Columns(self, sent)
        columns._gathered = [(x, all_x) for x, all_x in ((sent, whole), (ids, all_ids)) if all_x is not None]
        return columns, ids


class Columns:
    """The rows of all ranks, block by block, with their ids and other per-row tensors.

    The inputs of a backward are saved with autograd's `save_for_backward`, so that changes in place are detected and
    saved-tensor hooks apply.
    """

    def __init__(self, partition: Partition, sent: Tensor):
        self.partition = partition
        self._sent = sent  # this rank's rows, in the dtype in which they are sent
        self._gathered: list[tuple[Tensor, Tensor]] = []

    def to_save(self, ids: Tensor) -> tuple[Tensor | None, ...]:
        """Return this rank's rows and their ids. Each is followed by the tensor gathered from all ranks, or by None if
        it has not been gathered."""
        return self._sent, self._gathered_of(self._sent), ids, self._gathered_of(ids)

    @property
    def own(self) -> Tensor:
        """This rank's rows as the other ranks see them, after rounding to the wire dtype."""
        return self._sent.to(self.partition.dtype)

    def blocks(self, ids: Tensor, *numbers: Tensor) -> Iterator[Block]:
        """Iterate over the rows of all ranks, as a single block or as one block per rank. Ranks without rows are
        skipped."""
        hops = len(self.partition.sizes) - 1
        blocks = self._round(hops, ids, *numbers) if self.partition.ring else self._gathered_blocks(ids, *numbers)
        return (block for block in blocks if len(block.rows))

    def pairs(self, ids: Tensor) -> Iterator[tuple[Block, Block]]:
        """Iterate over this rank's share of all pairs of rows; each pair belongs to one rank. An item is two blocks.
        Two different blocks stand for all pairs between them, and the same block twice for the pairs within it."""
        partition = self.partition
        if partition.ring:
            pairs = schedule.half_ring(partition.rank, partition.sizes)
            here, met = Block(partition.span, self.own, ids), self._round(len(pairs) - 1, ids)
        else:
            pairs = schedule.triangle(partition.rank, len(partition.sizes), partition.n_rows)
            here = self._all(ids)
            met = itertools.repeat(here, len(pairs))
        for block, (rows, cols) in zip(met, pairs, strict=True):
            if rows.start < rows.stop and cols.start < cols.stop:
                yield here.cut(rows), block.cut(cols)

    def _gathered_blocks(self, ids: Tensor, *numbers: Tensor) -> Iterator[Block]:
        block = self._all(ids, *numbers)
        if not self.partition.by_rank:
            yield block
            return
        # Cloned, because the rounding of a matrix product may depend on how its rows are aligned in memory.
        for span in self.partition.spans:
            own = block.cut(span)
            yield Block(span, own.rows.clone(), own.ids, tuple(x.clone() for x in own.numbers))

    def _all(self, ids: Tensor, *numbers: Tensor) -> Block:
        gathered = tuple(wire.all_gather(self.partition.group, x, self.partition.sizes) for x in numbers)
        return Block(slice(0, self.partition.n_rows), self.whole(), self._once(ids), gathered)

    def _round(self, hops: int, ids: Tensor, *numbers: Tensor) -> Iterator[Block]:
        partition = self.partition
        blocks = wire.ring(partition.group, (self._sent, ids, *numbers), partition.sizes, hops)
        for step, (rows, block_ids, *rest) in enumerate(blocks):
            yield Block(partition.spans[partition.rank - step], rows.to(partition.dtype), block_ids, tuple(rest))

    @uncompiled
    def whole(self) -> Tensor:
        """Return the rows of all ranks as one tensor."""
        if self.partition.ring:
            return wire.all_gather(self.partition.group, self._sent, self.partition.sizes).to(self.partition.dtype)
        return self._once(self._sent).to(self.partition.dtype)

    def _once(self, x: Tensor) -> Tensor:
        """Return x gathered from all ranks. The result is kept for the other terms of the loss and for the backward."""
        gathered = self._gathered_of(x)
        if gathered is None:
            gathered = wire.all_gather(self.partition.group, x, self.partition.sizes)
            self._gathered.append((x, gathered))
        return gathered

    def _gathered_of(self, x: Tensor) -> Tensor | None:
        return next((gathered for known, gathered in self._gathered if known is x), None)
