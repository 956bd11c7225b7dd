"""Nearest neighbours by cosine similarity, a tile of the similarities at a time."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import ops
from .validation import check_features, check_integer, check_rows, check_same


class Classification(NamedTuple):
    """What `zero_shot_classify` returns: (N,) each."""

    classes: Tensor
    scores: Tensor


class Retrieval(NamedTuple):
    """What `retrieve` returns: (Q, k) each."""

    scores: Tensor
    indices: Tensor


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
    found = _find_nearest("image_features", image_features, "class_features", class_features, 1)
    return Classification(found.indices.squeeze(1), found.scores.squeeze(1))


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
    more), and 32 MiB at most, whatever Q and C.

    Example:
        >>> import torch, fastntxent
        >>> corpus = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> fastntxent.retrieve(torch.tensor([[2.0, 0.0]]), corpus, k=2)
        Retrieval(scores=tensor([[1., 1.]]), indices=tensor([[0, 2]]))
    """
    return _find_nearest("queries", queries, "corpus", corpus, k)


def _find_nearest(q_name: str, queries: Tensor, c_name: str, corpus: Tensor, k: int) -> Retrieval:
    check_rows(q_name, queries)
    check_rows(c_name, corpus)
    check_same(q_name, queries, c_name, corpus, "dtype", "device")
    check_features(q_name, queries, c_name, corpus)
    k = check_integer("k", k, 1)
    if k > corpus.shape[0]:
        raise ValueError(f"k must be in [1, {corpus.shape[0]}], the rows of {c_name}, got {k}")
    # Detached, where torch.jit.trace would leave a block of no_grad out.
    return Retrieval(*ops.nearest(queries.detach(), corpus.detach(), k))
