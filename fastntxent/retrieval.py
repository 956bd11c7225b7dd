"""Nearest neighbours by cosine similarity, a tile of the similarities at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .common import unit_rows
from .ops import autocast_off
from .validation import check_features, check_rows, check_same

# Queries and columns of a tile of similarities: 32 MiB of float32.
_TILE = (1024, 8192)


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

    Deterministic. Memory beside the unit rows: a tile of 32 MiB and its mask, whatever N and C.

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

    A similarity that is NaN, of an embedding that holds one, counts as -inf. Deterministic. Memory beside the unit rows
    and the result: a tile of 32 MiB and its mask, whatever Q and C.

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
        u, v = unit_rows(queries), unit_rows(corpus)
        height, width = _TILE
        found = [_nearest(rows, v, k, width) for rows in u.split(height)]
    return Retrieval(*map(torch.cat, zip(*found, strict=True)))


def _nearest(u: Tensor, v: Tensor, k: int, width: int) -> tuple[Tensor, Tensor]:
    """The best k of all columns: those of each tile, and of them and the best so far again the best."""
    scores = u.new_empty(u.shape[0], 0)
    indices = torch.empty(u.shape[0], 0, dtype=torch.int64, device=u.device)
    for first in range(0, v.shape[0], width):
        sims = u @ v[first : first + width].T
        sims.masked_fill_(sims.isnan(), -torch.inf)  # comes last: NaN is neither more nor less than a number
        new = _first_of_the_largest(sims, min(k, sims.shape[1]))
        scores = torch.cat((scores, sims.gather(1, new)), dim=1)
        indices = torch.cat((indices, new + first), dim=1)
        # Stable, and the earlier tiles' lower indices stand first: of equal scores they stay first.
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        scores, indices = scores[:, :k], indices.gather(1, order[:, :k])
    return scores, indices


def _first_of_the_largest(sims: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row, in ascending order; of those that tie for the last places the lowest.
    (`topk` takes any of them.)"""
    if k == 1:
        return sims.argmax(dim=1, keepdim=True)  # the first of the largest
    last = sims.topk(k, dim=1).values[:, -1:]
    above, level = sims > last, sims == last
    places = k - above.sum(dim=1, keepdim=True)
    taken = above | (level & (level.cumsum(dim=1) <= places))
    return taken.nonzero()[:, 1].view(-1, k)
