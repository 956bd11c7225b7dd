"""Which rank computes which similarities among the rows of all ranks, in the forward. A similarity is symmetric, so
only one rank computes it, once, for both of its rows.

Spans index the rows of all ranks. Two different spans stand for a rectangle of similarities; a span paired with itself
stands for a triangle.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

SpanPairs = list[tuple[slice, slice]]


def spans(sizes: Sequence[int]) -> list[slice]:
    """Return the position of each rank's rows among the rows of all ranks."""
    ends = itertools.accumulate(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def half_ring(rank: int, sizes: Sequence[int]) -> SpanPairs:
    """Return the pairs for blocks that go around a ring: this rank's block with itself, with the block of the rank
    before it, and so on, halfway around.

    If the world size is even, two ranks hold each other's block at the last step, and divide the similarities between
    these two blocks. The lower rank pairs the first half of its own rows with the higher rank's block. The higher rank
    pairs its own block with the second half of the lower rank's rows.
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
    """Return this rank's pairs for the case that every rank has gathered all rows.

    The rows are cut into two shares per rank. Rank r takes the r-th share from the top and the r-th from the bottom,
    and pairs each share with itself and with all rows below it. So every rank gets the same amount of work, however
    many rows it holds.
    """
    cuts = [n_rows * share // (2 * world) for share in range(2 * world + 1)]
    shares = [slice(cuts[rank], cuts[rank + 1]), slice(cuts[-2 - rank], cuts[-1 - rank])]
    if rank == world - 1:  # this rank's two shares are adjacent: join them
        shares = [slice(cuts[rank], cuts[rank + 2])]
    return [pair for rows in shares for pair in ((rows, rows), (rows, slice(rows.stop, n_rows)))]
