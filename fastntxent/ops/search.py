"""Nearest neighbours by cosine similarity, computed in tiles.

This is an operator so that a compiled graph does not depend on the number of tiles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra import accumulation_dtype, autocast_off, unit_rows
from .contract import checked
from .register import register

_TILE_BYTES = 2**25  # the most bytes for a tile of similarities and the merge of its results together
_QUERIES = 1024  # the most rows in a tile
# A tile has up to _COLUMNS columns, or _COLUMNS_PER_K times k if that is more. Tiles are wide so that merging the
# results of many tiles takes less time than the top-k within a tile.
_COLUMNS = 8192
_COLUMNS_PER_K = 256
_TIED = 2**18  # the most similarities searched again at a time, in rows whose k-th place is tied


def _forward(queries: Tensor, corpus: Tensor, k: int) -> tuple[Tensor, Tensor]:
    queries, corpus = checked("nearest", queries, corpus)
    if not 1 <= k <= len(corpus):
        raise ValueError(f"k must be between 1 and {len(corpus)}, the number of rows of corpus, got {k}")
    Q, dtype = len(queries), accumulation_dtype(queries.dtype)
    height, width = _tile_shape(len(corpus), k, dtype.itemsize)
    scores, indices = queries.new_empty(Q, k, dtype=dtype), queries.new_empty(Q, k, dtype=torch.int64)
    buffer = queries.new_empty(min(height, Q) * width, dtype=dtype)
    first = 0
    with autocast_off(queries):
        for rows in corpus.split(width):
            _merge_columns(scores, indices, queries, unit_rows(rows), first, height, buffer)
            first += len(rows)
    return scores, indices


def _fake(queries: Tensor, corpus: Tensor, k: int) -> tuple[Tensor, Tensor]:
    scores = queries.new_empty((queries.shape[0], k), dtype=accumulation_dtype(queries.dtype))
    return scores, scores.new_empty(scores.shape, dtype=torch.int64)


nearest = register("nearest(Tensor queries, Tensor corpus, SymInt k) -> (Tensor, Tensor)", _forward, _fake)


def _merge_columns(
    found: Tensor, found_indices: Tensor, queries: Tensor, v: Tensor, first: int, height: int, buffer: Tensor
) -> None:
    """Merge the top k of the unit rows v into the results so far, in place. Row 0 of v has index `first`."""
    k = found.shape[1]
    for rows, scores, indices in zip(*(x.split(height) for x in (queries, found, found_indices)), strict=True):
        u = unit_rows(rows)
        sims = torch.mm(u, v.T, out=buffer[: len(u) * len(v)].view(len(u), len(v)))
        # NaN becomes -inf, so that it is ranked last. (topk and argmax would rank it first.)
        best, columns = _largest(sims.nan_to_num_(nan=-torch.inf), min(k, len(v)))
        if first:
            # The sort is stable and earlier columns come first, so equal scores stay in the order of their indices.
            best, order = torch.cat((scores, best), dim=1).sort(dim=1, descending=True, stable=True)
            columns = torch.cat((indices, columns + first), dim=1).gather(1, order)
        scores.copy_(best[:, :k])
        indices.copy_(columns[:, :k])


def _tile_shape(n_columns: int, k: int, itemsize: int) -> tuple[int, int]:
    """Return the numbers of queries and columns in a tile. The first tile has at least k columns."""
    width = min(n_columns, max(_COLUMNS, _COLUMNS_PER_K * k))
    per_query = width + 16 * k  # a merge holds about a dozen numbers for each of the k results
    return max(1, min(_QUERIES, _TILE_BYTES // itemsize // per_query)), width


def _largest(sims: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return each row's k largest values and their columns, in descending order; ties go to the lower column."""
    if k == 1:
        columns = sims.argmax(dim=1, keepdim=True)  # the lowest column among ties
        return sims.gather(1, columns), columns
    width = sims.shape[1]
    best, columns = sims.topk(min(k + 1, width), dim=1)
    if k < width:  # topk picks arbitrarily among values that tie for the last place
        tied = best[:, k - 1] == best[:, k]
        best, columns = best[:, :k], columns[:, :k]
        for rows in tied.nonzero().squeeze(1).split(max(1, _TIED // width)):
            columns[rows] = _lowest_of_the_last(sims[rows], best[rows], columns[rows])
    # Order equal scores by column. Without ties the keys are already sorted, which makes the sort fast.
    level = F.pad(best[:, 1:] != best[:, :-1], (1, 0)).cumsum(dim=1) * width
    columns = (level + columns).sort(dim=1).values - level
    return sims.gather(1, columns), columns


def _lowest_of_the_last(sims: Tensor, best: Tensor, columns: Tensor) -> Tensor:
    """Return the columns of each row's k largest values; among values that tie with the k-th, the lowest columns."""
    last, k, width = best[:, -1:], best.shape[1], sims.shape[1]
    from_the_end = torch.arange(width, 0, -1, dtype=torch.int32, device=sims.device)
    lowest = torch.where(sims == last, from_the_end, 0).topk(k, dim=1).indices
    above = best > last
    place = torch.arange(k, device=sims.device) - above.sum(dim=1, keepdim=True)
    return torch.where(above, columns, lowest.gather(1, place.clamp_min(0)))
