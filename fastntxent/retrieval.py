"""Nearest neighbours by cosine similarity, one tile of similarities at a time."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import ops
from .validation import check_features, check_integer, check_rows, check_same


class Classification(NamedTuple):
    """The classes of images and their scores, as `zero_shot_classify` returns them.

    Attributes:
        classes: (N,) int64, the class of each image.
        scores: (N,) cosine similarities to that class, float64 for float64 features, else float32.

    Example:
        >>> import torch, fastntxent
        >>> fastntxent.zero_shot_classify(torch.eye(3)[[2, 0]], torch.eye(3)).scores
        tensor([1., 1.])
    """

    classes: Tensor
    scores: Tensor


class Retrieval(NamedTuple):
    """The nearest rows of a corpus, as `retrieve` returns them.

    Attributes:
        scores: (Q, k) cosine similarities, largest first, float64 for float64 embeddings, else float32.
        indices: (Q, k) int64, the rows of the corpus.

    Example:
        >>> import torch, fastntxent
        >>> fastntxent.retrieve(torch.eye(3)[[2, 0]], torch.eye(3), k=1).indices
        tensor([[2],
                [0]])
    """

    scores: Tensor
    indices: Tensor


def zero_shot_classify(image_features: Tensor, class_features: Tensor) -> Classification:
    r"""The class of each image: the one whose features are nearest to the image's by cosine similarity.

    .. math:: c_n = \arg\max_c \frac{x_n \cdot w_c}{\|x_n\| \|w_c\|}

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021. The features of a
    class are the text features of its prompt, or the mean over several prompts. Rows are scaled to unit length first.

    The result is deterministic. Besides the arguments and the result, memory holds one tile of similarities (32 MiB),
    the unit rows of the tile's images (at most 1,024) and classes (at most 8,192), and at most 16 MiB more, for any N
    and C.

    Args:
        image_features: (N, D) features of the images, float16, bfloat16, float32 or float64. Row n belongs to sample n.
        class_features: (C, D) features of the classes, with the dtype and device of `image_features`.

    Returns:
        A named tuple (classes, scores) of tensors (N,). Classes are int64; if several classes have the highest score,
        the lowest of them is returned. Scores are cosine similarities, float64 for float64 features, else float32; a
        NaN counts as -inf, so an image with a NaN gets class 0 and the score -inf. Not differentiable.

    Raises:
        TypeError: an argument is not a dense floating-point tensor.
        ValueError: an argument is not a matrix with rows and features, or the features, dtypes or devices do not match.

    Example:
        >>> import torch, fastntxent
        >>> fastntxent.zero_shot_classify(torch.eye(3)[[2, 0]], torch.eye(3)).classes
        tensor([2, 0])
    """
    found = _find_nearest("image_features", image_features, "class_features", class_features, 1)
    return Classification(found.indices.squeeze(1), found.scores.squeeze(1))


def retrieve(queries: Tensor, corpus: Tensor, k: int) -> Retrieval:
    r"""The k rows of the corpus that are nearest to each query by cosine similarity, nearest first.

    .. math:: \text{score}_{qc} = \frac{x_q \cdot w_c}{\|x_q\| \|w_c\|}

    Rows are scaled to unit length first. A similarity of NaN, as from an embedding with a NaN, counts as -inf.

    The result is deterministic. Besides the arguments and the result, memory holds one tile of similarities (32 MiB),
    the unit rows of the tile's queries (at most 1,024) and of its part of the corpus (at most 8,192 rows, or 256 times
    k if that is more), and at most 32 MiB more, for any Q and C.

    Args:
        queries: (Q, D) embeddings, float16, bfloat16, float32 or float64.
        corpus: (C, D) embeddings to search, with the dtype and device of `queries`.
        k: The number of rows to find, from 1 to C.

    Returns:
        A named tuple (scores, indices) of tensors (Q, k). Scores are float64 for float64 embeddings, else float32;
        indices are int64. Equal scores are in the order of their indices. If rows tie for the last places, those with
        the lowest indices are returned. Not differentiable.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or `k` is not an int.
        ValueError: an argument is not a matrix with rows and features, or the features, dtypes or devices do not match,
            or `k` is out of range.

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
    # Detached, because torch.jit.trace would ignore a no_grad block.
    return Retrieval(*ops.nearest(queries.detach(), corpus.detach(), k))
