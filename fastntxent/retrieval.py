"""Nearest neighbours by cosine similarity, a tile of the similarities at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends.base import accumulation_dtype
from .common import unit_rows
from .ops import autocast_off
from .validation import check_features, check_rows, check_same

_TILE_BYTES = 2**25  # similarities held at once, in bytes
_QUERIES = 1024  # at most so many rows of a tile
_COLUMNS = 8192  # and so many columns, or where that is more so many times k: then most of the time goes to
_COLUMNS_PER_K = 256  # one search for the largest of a tile, and not to merging those of many
_TIED = 2**18  # similarities of rows with a tie that are looked through again at once


class Classification(NamedTuple):
    """What `zero_shot_classify` returns: (N,) each."""

    classes: Tensor
    scores: Tensor


class Retrieval(NamedTuple):
    """What `retrieve` returns: (Q, k) each."""

    scores: Tensor
    indices: Tensor


@torch.no_grad()
def zero_shot_classify(image_features: Tensor, class_features: Tensor) -> Classification:
    r"""The class whose features lie nearest to each image's, by cosine similarity.

    .. math:: c_n = \arg\max_c \frac{x_n \cdot w_c}{\|x_n\| \|w_c\|}

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, with the text
    features of each class's prompt, or the mean of several prompts'.

    Args:
        image_features: (N, D), of any floating dtype; they are normalised here.
        class_features: (C, D) of the same dtype and device.

    Returns:
        A named tuple (classes, scores): (N,) int64, the lowest of classes with the same score, and the similarities,
        float64 for float64 features, else float32. Not differentiable.

    Raises:
        TypeError, ValueError: an argument is not a floating-point matrix with rows, or they do not fit together.

    Deterministic. Memory beside the arguments and the result: a tile of 32 MiB, the unit rows of its 1,024 images and
    8,192 classes, and 16 MiB at most, whatever N and C.

    Example:
        >>> import torch, fastntxent
        >>> fastntxent.zero_shot_classify(torch.eye(3)[[2, 0]], torch.eye(3)).classes
        tensor([2, 0])
    """
    found = _search("image_features", image_features, "class_features", class_features, 1)
    return Classification(found.indices.squeeze(1), found.scores.squeeze(1))


@torch.no_grad()
def retrieve(queries: Tensor, corpus: Tensor, k: int) -> Retrieval:
    r"""The k rows of the corpus that are nearest to each query by cosine similarity, nearest first.

    Args:
        queries: (Q, D), of any floating dtype; they are normalised here.
        corpus: (C, D) of the same dtype and device.
        k: how many, 1 to C.

    Returns:
        A named tuple (scores, indices) of (Q, k); scores are float64 for float64 embeddings, else float32. Of equal
        scores the lower index comes first, and stays in. Not differentiable.

    Raises:
        TypeError, ValueError: as `zero_shot_classify`, and for a k out of range.

    A similarity that is NaN, because an embedding holds one, counts as -inf. Deterministic. Memory beside the arguments
    and the result: a tile of 32 MiB, the unit rows of its 1,024 queries and 8,192 columns (or 256 k, where that is
    more), and 32 MiB at most, whatever Q and C. Under `torch.compile` a tile takes 80 MiB in all.

    Example:
        >>> import torch, fastntxent
        >>> corpus = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> fastntxent.retrieve(torch.tensor([[2.0, 0.0]]), corpus, k=2)
        Retrieval(scores=tensor([[1., 1.]]), indices=tensor([[0, 2]]))
    """
    return _search("queries", queries, "corpus", corpus, k)


def _search(q_name: str, queries: Tensor, c_name: str, corpus: Tensor, k: int) -> Retrieval:
    check_rows(q_name, queries)
    check_rows(c_name, corpus)
    check_same(q_name, queries, c_name, corpus, "dtype", "device")
    check_features(q_name, queries, c_name, corpus)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if not 1 <= k <= corpus.shape[0]:
        raise ValueError(f"k must be in [1, {corpus.shape[0]}], the rows of {c_name}, got {k}")
    with autocast_off(queries):
        return _stream(queries, corpus, k)


def _stream(queries: Tensor, corpus: Tensor, k: int) -> Retrieval:
    """The search, a tile of similarities at a time."""
    Q, dtype = queries.shape[0], accumulation_dtype(queries.dtype)
    height, width = _tile_shape(corpus.shape[0], k, dtype.itemsize)
    found = Retrieval(queries.new_empty(Q, k, dtype=dtype), queries.new_empty(Q, k, dtype=torch.int64))
    buffer = queries.new_empty(min(height, Q) * width, dtype=dtype)
    first = 0
    for rows in corpus.split(width):
        _merge_columns(found, queries, unit_rows(rows), first, height, buffer)
        first += len(rows)
    return found


def _merge_columns(found: Retrieval, queries: Tensor, v: Tensor, first: int, height: int, buffer: Tensor) -> None:
    """Merge the best of the unit rows v, whose indices begin at `first`, into those found so far, in place."""
    k = found.scores.shape[1]
    for rows, scores, indices in zip(*(x.split(height) for x in (queries, *found)), strict=True):
        u = unit_rows(rows)
        sims = torch.mm(u, v.T, out=buffer[: len(u) * len(v)].view(len(u), len(v)))
        # NaN is neither more nor less than a number: it comes last.
        best, columns = _largest(sims.nan_to_num_(nan=-torch.inf), min(k, len(v)))
        if first:
            # The sort is stable, and the earlier columns come first: equal scores keep the order of their indices.
            best, order = torch.cat((scores, best), dim=1).sort(dim=1, descending=True, stable=True)
            columns = torch.cat((indices, columns + first), dim=1).gather(1, order)
        scores.copy_(best[:, :k])
        indices.copy_(columns[:, :k])


def _tile_shape(n_columns: int, k: int, itemsize: int) -> tuple[int, int]:
    """Return the queries and columns of a tile; the first tile has at least k columns."""
    width = min(n_columns, max(_COLUMNS, _COLUMNS_PER_K * k))
    per_query = width + 16 * k  # a merge holds a dozen numbers for each of the k
    return max(1, min(_QUERIES, _TILE_BYTES // itemsize // per_query)), width


def _largest(sims: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row and their columns: largest first, and of equal ones the lower column first."""
    if k == 1:
        columns = sims.argmax(dim=1, keepdim=True)  # the first of the largest
        return sims.gather(1, columns), columns
    width = sims.shape[1]
    best, columns = sims.topk(min(k + 1, width), dim=1)
    if k < width:  # topk takes any of those that tie for the last place
        tied = best[:, k - 1] == best[:, k]
        best, columns = best[:, :k], columns[:, :k]
        if torch.compiler.is_compiling():  # a graph has no sizes that depend on values: all rows
            columns = _lowest_of_the_last(sims, best, columns)
        else:
            for rows in tied.nonzero().squeeze(1).split(max(1, _TIED // width)):
                columns[rows] = _lowest_of_the_last(sims[rows], best[rows], columns[rows])
    # Order equal scores by column. Without ties the keys are sorted already, which makes the sort quick.
    level = F.pad(best[:, 1:] != best[:, :-1], (1, 0)).cumsum(dim=1) * width
    columns = (level + columns).sort(dim=1).values - level
    return sims.gather(1, columns), columns


def _lowest_of_the_last(sims: Tensor, best: Tensor, columns: Tensor) -> Tensor:
    """Return the columns of the k largest, the lowest possible ones for those that equal the k-th largest."""
    last, k, width = best[:, -1:], best.shape[1], sims.shape[1]
    from_the_end = torch.arange(width, 0, -1, dtype=torch.int32, device=sims.device)
    lowest = torch.where(sims == last, from_the_end, 0).topk(k, dim=1).indices
    above = best > last
    place = torch.arange(k, device=sims.device) - above.sum(dim=1, keepdim=True)
    return torch.where(above, columns, lowest.gather(1, place.clamp_min(0)))
