"""Which rank forms which similarities, of the rows of all ranks with themselves. Two rows have one: it is formed once,
on one rank, for both.

A pair of spans, counted over the rows of all ranks, is a rectangle of similarities; a span with itself is a triangle.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

SpanPairs = list[tuple[slice, slice]]


def spans(sizes: Sequence[int]) -> list[slice]:
    """Where each rank's rows are among those of all."""
    ends = itertools.accumulate(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def half_ring(rank: int, sizes: Sequence[int]) -> SpanPairs:
    """For blocks that go round: a rank's own, then that of the rank before it, and so on, half the way.

    Half-way round an even number two ranks hold each other's block. Each takes one half of the lower one's rows.
    """
    world, blocks = len(sizes), spans(sizes)
    pairs = [(blocks[rank], blocks[rank - step]) for step in range(world // 2 + 1)]
    if world % 2 == 0:
        rows, cols = pairs[-1]
        if rank < world // 2:
            pairs[-1] = slice(rows.start, (rows.start + rows.stop) // 2), cols
        else:
            pairs[-1] = rows, slice((cols.start + cols.stop) // 2, cols.stop)
    return pairs


def triangle(rank: int, world: int, n_rows: int) -> SpanPairs:
    """For rows that are all at hand: of 2R shares of the rows every rank takes the r-th from the top and the r-th from
    the bottom, each against itself and what is below it. That is as much work for every rank, however the rows came."""
    cuts = [n_rows * share // (2 * world) for share in range(2 * world + 1)]
    shares = [slice(cuts[rank], cuts[rank + 1]), slice(cuts[-2 - rank], cuts[-1 - rank])]
    if rank == world - 1:  # the two in the middle are one
        shares = [slice(cuts[rank], cuts[rank + 2])]
    return [pair for rows in shares for pair in ((rows, rows), (rows, slice(rows.stop, n_rows)))]
