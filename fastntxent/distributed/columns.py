"""This rank's rows as columns of all ranks, block by block."""

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
    """Rows (n, D) of one rank or of all, with what belongs to each."""

    span: slice  # where they are among the rows of all ranks
    rows: Tensor
    ids: Tensor
    numbers: tuple[Tensor, ...] = ()

    def cut(self, span: slice) -> Block:
        """Return the rows of `span`, which lies in this block."""
        here = slice(span.start - self.span.start, span.stop - self.span.start)
        return Block(span, self.rows[here], self.ids[here], tuple(x[here] for x in self.numbers))


@dataclass(frozen=True)
class Partition:
    """How the rows of all ranks lie. It holds no tensor, so a backward may keep it."""

    group: ProcessGroup
    rank: int
    sizes: list[int]
    ring: bool
    dtype: torch.dtype  # of the arithmetic
    turn: Turn
    by_rank: bool = False  # blocks are those of one rank each, by all-gather too

    @property
    def spans(self) -> list[slice]:
        """Where each rank's rows are among those of all."""
        return schedule.spans(self.sizes)

    @property
    def span(self) -> slice:
        """Where this rank's are."""
        return self.spans[self.rank]

    @property
    def n_rows(self) -> int:
        """Rows of all ranks."""
        return sum(self.sizes)

    def exchange(self, numbers: Tensor) -> Tensor:
        """From a number of this rank for each row of all (M,) to those of all ranks for its own rows (ranks, m)."""
        return wire.exchange_numbers(self.group, numbers, self.sizes)

    def columns_from(self, saved: Sequence[Tensor | None]) -> tuple[Columns, Tensor]:
        """The columns, and the ids of this rank's rows, from what `Columns.to_save` gave to autograd."""
        sent, whole, ids, all_ids = saved
        assert sent is not None
        assert ids is not None
        columns = Columns(self, sent)
        columns._gathered = [(x, all_x) for x, all_x in ((sent, whole), (ids, all_ids)) if all_x is not None]
        return columns, ids


class Columns:
    """The rows of all ranks, block by block, with what else each block brings.

    What a backward needs of them goes through autograd's `save_for_backward`: so a change in place is noticed, and
    saved-tensor hooks reach it.
    """

    def __init__(self, partition: Partition, sent: Tensor):
        self.partition = partition
        self._sent = sent  # this rank's rows, in the dtype that travels
        self._gathered: list[tuple[Tensor, Tensor]] = []

    def to_save(self, ids: Tensor) -> tuple[Tensor | None, ...]:
        """This rank's rows and their ids, each followed by those of all ranks if they have been gathered."""
        return self._sent, self._gathered_of(self._sent), ids, self._gathered_of(ids)

    @property
    def own(self) -> Tensor:
        """This rank's rows as the other ranks see them."""
        return self._sent.to(self.partition.dtype)

    def blocks(self, ids: Tensor, *numbers: Tensor) -> Iterator[Block]:
        """The rows of all ranks in one block, or of one rank after another, which are left out if they have none."""
        hops = len(self.partition.sizes) - 1
        blocks = self._round(hops, ids, *numbers) if self.partition.ring else self._gathered_blocks(ids, *numbers)
        return (block for block in blocks if len(block.rows))

    def pairs(self, ids: Tensor) -> Iterator[tuple[Block, Block]]:
        """This rank's share of the pairs of rows, each of which is on one rank: all pairs between two blocks, or those
        within one that comes twice."""
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
        for span in self.partition.spans:  # copied: products of rows may be rounded by where they lie in memory
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
        """The rows of all ranks in one."""
        if self.partition.ring:
            return wire.all_gather(self.partition.group, self._sent, self.partition.sizes).to(self.partition.dtype)
        return self._once(self._sent).to(self.partition.dtype)

    def _once(self, x: Tensor) -> Tensor:
        """Gathered, and kept for another term of the loss, or the backward."""
        gathered = self._gathered_of(x)
        if gathered is None:
            gathered = wire.all_gather(self.partition.group, x, self.partition.sizes)
            self._gathered.append((x, gathered))
        return gathered

    def _gathered_of(self, x: Tensor) -> Tensor | None:
        return next((gathered for known, gathered in self._gathered if known is x), None)
