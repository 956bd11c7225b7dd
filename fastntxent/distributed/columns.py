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
from .wire import eager

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Block(NamedTuple):
    """Rows (n, D) of one rank or of all, with what belongs to each."""

    span: slice  # where they are among the rows of all ranks
    rows: Tensor
    ids: Tensor
    numbers: tuple[Tensor, ...] = ()

    def part(self, span: slice) -> Block:
        """Return the rows of `span`, which lies in this block."""
        here = slice(span.start - self.span.start, span.stop - self.span.start)
        return Block(span, self.rows[here], self.ids[here])


@dataclass(frozen=True)
class Layout:
    """How the rows of all ranks lie. It holds no tensor, so a backward may keep it."""

    group: ProcessGroup
    rank: int
    sizes: list[int]
    ring: bool
    dtype: torch.dtype  # of the arithmetic
    turn: Turn

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

    def restore(self, saved: Sequence[Tensor | None]) -> tuple[Columns, Tensor]:
        """The columns, and the ids of this rank's rows, from what `Columns.save` gave to autograd."""
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

    def __init__(self, layout: Layout, sent: Tensor):
        self.layout = layout
        self._sent = sent  # this rank's rows, in the dtype that travels
        self._gathered: list[tuple[Tensor, Tensor]] = []

    def save(self, ids: Tensor) -> tuple[Tensor | None, ...]:
        """This rank's rows and their ids, each followed by those of all ranks if they have been gathered."""
        return self._sent, self._known(self._sent), ids, self._known(ids)

    @property
    def own(self) -> Tensor:
        """This rank's rows as the other ranks see them."""
        return self._sent.to(self.layout.dtype)

    def blocks(self, ids: Tensor, *numbers: Tensor) -> Iterator[Block]:
        """The rows of all ranks in one block, or of one rank after another, which are left out if they have none."""
        hops = len(self.layout.sizes) - 1
        blocks = self._round(hops, ids, *numbers) if self.layout.ring else [self._all(ids, *numbers)]
        return (block for block in blocks if len(block.rows))

    def pairs(self, ids: Tensor) -> Iterator[tuple[Block, Block]]:
        """This rank's share of the pairs of rows, each of which is on one rank: all pairs between two blocks, or those
        within one that comes twice."""
        layout = self.layout
        if layout.ring:
            pairs = schedule.half_ring(layout.rank, layout.sizes)
            here, met = Block(layout.span, self.own, ids), self._round(len(pairs) - 1, ids)
        else:
            pairs = schedule.triangle(layout.rank, len(layout.sizes), layout.n_rows)
            here = self._all(ids)
            met = itertools.repeat(here, len(pairs))
        for block, (rows, cols) in zip(met, pairs, strict=True):
            if rows.start < rows.stop and cols.start < cols.stop:
                yield here.part(rows), block.part(cols)

    def _all(self, ids: Tensor, *numbers: Tensor) -> Block:
        gathered = tuple(wire.all_gather(self.layout.group, x, self.layout.sizes) for x in numbers)
        return Block(slice(0, self.layout.n_rows), self.whole(), self._once(ids), gathered)

    def _round(self, hops: int, ids: Tensor, *numbers: Tensor) -> Iterator[Block]:
        layout = self.layout
        blocks = wire.ring(layout.group, (self._sent, ids, *numbers), layout.sizes, hops)
        for step, (rows, block_ids, *rest) in enumerate(blocks):
            yield Block(layout.spans[layout.rank - step], rows.to(layout.dtype), block_ids, tuple(rest))

    @eager
    def whole(self) -> Tensor:
        """The rows of all ranks in one."""
        if self.layout.ring:
            return wire.all_gather(self.layout.group, self._sent, self.layout.sizes).to(self.layout.dtype)
        return self._once(self._sent).to(self.layout.dtype)

    def _once(self, x: Tensor) -> Tensor:
        """Gathered, and kept for another term of the loss, or the backward."""
        gathered = self._known(x)
        if gathered is None:
            gathered = wire.all_gather(self.layout.group, x, self.layout.sizes)
            self._gathered.append((x, gathered))
        return gathered

    def _known(self, x: Tensor) -> Tensor | None:
        return next((gathered for known, gathered in self._gathered if known is x), None)
