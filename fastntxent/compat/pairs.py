"""Lists of pairs, in the format of pytorch-metric-learning's miners.

checked_pairs  (indices_tuple)      -> anchors and positives, anchors and negatives
pairs_of_ids   (ids, ref_ids)       -> rows and columns with the same id
lse_by_anchor  (logits, anchors)    -> log-sum-exp over each anchor's pairs
sum_by_anchor  (values, anchors)    -> sum of each anchor's values
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.groups import add_at
from ..validation import ID_DTYPES

IndicesTuple = tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]


def checked_pairs(indices_tuple: IndicesTuple, n_rows: int, n_cols: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return (anchors, positives, anchors, negatives) from pairs or triplets of row and column indices, after checking
    them."""
    if not isinstance(indices_tuple, (tuple, list, Tensor)):
        raise TypeError(f"indices_tuple must be a tuple of 3 or 4 tensors, got {type(indices_tuple).__name__}")
    if len(indices_tuple) not in (3, 4):
        raise ValueError(f"indices_tuple must have 3 or 4 tensors, got {len(indices_tuple)}")
    for index in indices_tuple:
        if not isinstance(index, Tensor) or index.dtype not in ID_DTYPES or index.ndim != 1:
            raise TypeError("indices_tuple must hold tensors of one dimension and an integer dtype")
    indices = [index.to(device, torch.int64) for index in indices_tuple]
    a1, p, a2, n = indices if len(indices) == 4 else (*indices[:2], indices[0], indices[2])
    if len(a1) != len(p) or len(a2) != len(n):
        raise ValueError(
            f"indices_tuple must hold pairs of equal lengths, got {[len(index) for index in indices_tuple]}"
        )
    for index, limit in ((a1, n_rows), (p, n_cols), (a2, n_rows), (n, n_cols)):
        # Under a compiler no value can be read; the gather itself rejects an index out of range.
        if not torch.compiler.is_compiling() and len(index) and not (index.min() >= 0 and index.max() < limit):
            raise ValueError(f"indices_tuple must have indices in [0, {limit}), got {index.tolist()[:8]}")
    return a1, p, a2, n


def pairs_of_ids(ids: Tensor, ref_ids: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    """Return the rows and columns with the same id, in row order. `own`: column i is row i itself, so the pair (i, i)
    is left out.

    Takes O(P) memory for P pairs, and waits for the device.
    """
    in_order, columns = torch.sort(ref_ids, stable=True)
    first = torch.searchsorted(in_order, ids.contiguous())
    counts = torch.searchsorted(in_order, ids.contiguous(), right=True) - first
    a = torch.arange(len(ids), device=ids.device).repeat_interleave(counts)
    begin = first - (counts.cumsum(0) - counts)  # start of a row's run in `columns`, less the start of its run in `a`
    p = columns[begin[a] + torch.arange(len(a), device=ids.device)]
    if own:
        kept = a != p
        a, p = a[kept], p[kept]
    return a, p


def lse_by_anchor(logits: Tensor, anchors: Tensor, n_anchors: int) -> Tensor:
    """Return the log-sum-exp of each anchor's logits (n_anchors,). An anchor without logits gets -inf and no
    gradient."""
    largest = logits.new_full((n_anchors,), -torch.inf)
    largest = largest.scatter_reduce(0, anchors, logits.detach(), "amax")
    empty = largest == -torch.inf
    sums = sum_by_anchor(torch.exp(logits - largest[anchors]), anchors, n_anchors)
    return torch.where(empty, -torch.inf, largest + sums.masked_fill(empty, 1).log())


def sum_by_anchor(values: Tensor, anchors: Tensor, n_anchors: int) -> Tensor:
    """Return the sum of each anchor's values (n_anchors,)."""
    return add_at(values.new_zeros(n_anchors), anchors, values)
