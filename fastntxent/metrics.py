"""Measures of a representation, without the M x M matrix of similarities."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .algebra import unit_rows
from .opening import open_batch
from .options import BackendName
from .scale import scalar_like
from .validation import check_positive_number, check_rows, check_views


def alignment(z_i: Tensor, z_j: Tensor) -> Tensor:
    r"""Mean squared distance between the two views of a sample on the unit sphere: 0 is perfect, 2 is chance.

    .. math:: \frac{1}{N} \sum_{n=1}^{N} \| u_n^{(i)} - u_n^{(j)} \|^2

    Wang & Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere", 2020, with their exponent 2. Rows are scaled to unit length first.

    Args:
        z_i: (N, D) embeddings of the first view, float16, bfloat16, float32 or float64, with any strides. Row n belongs
            to sample n.
        z_j: (N, D) embeddings of the second view, with the shape, dtype and device of `z_i`. Row n belongs to sample n.

    Returns:
        A 0-d tensor in [0, 4], float64 for float64 embeddings, else float32; differentiable.

    Raises:
        TypeError: a view is not a dense floating-point tensor.
        ValueError: a view is not a matrix with rows and features, or the shapes, dtypes or devices of the views do not
            match.

    Example:
        >>> import torch, fastntxent
        >>> fastntxent.alignment(torch.eye(2), -torch.eye(2))
        tensor(4.)
    """
    check_views(z_i, z_j)
    return (unit_rows(z_i) - unit_rows(z_j)).square().sum(dim=1).mean()


def uniformity(z: Tensor, t: float = 2.0, *, backend: BackendName = "auto") -> Tensor:
    r"""How evenly the embeddings cover the unit sphere: 0 is a single point, and lower is more uniform.

    .. math:: \log \frac{1}{M (M - 1)} \sum_{i \ne j} e^{-t \| u_i - u_j \|^2}

    Wang & Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere", 2020. Since ||u - v||^2 = 2 - 2 u.v, it is computed from `neg_lse` at a temperature of 1/(2t), in
    O(M D) memory (O(M^2) with the reference backend). Rows are scaled to unit length first. A row of length zero has no
    direction and counts as orthogonal to all others, so check the norms too.

    Args:
        z: (M, D) embeddings, M >= 2, float16, bfloat16, float32 or float64.
        t: The sharpness of the kernel, a positive float.
        backend: "auto", which chooses one for the device, or a name from `backends()`.

    Returns:
        A 0-d tensor, float64 for float64 embeddings, else float32; differentiable.

    Raises:
        TypeError: `z` is not a dense floating-point tensor, or `t` is not a number.
        ValueError: `z` is not a matrix of at least two rows, `t` is not positive and finite, or the backend is unknown.
        RuntimeError: the backend is not available here (the message says why), or a second derivative is requested,
            which only backend="reference" supports.

    Example:
        >>> import torch, fastntxent
        >>> fastntxent.uniformity(torch.eye(2))  # every distance is sqrt(2)
        tensor(-4.)
    """
    t = check_positive_number("t", t)
    batch = open_batch(None, "uniformity", {"z": z}, backend=backend)
    M = z.shape[0]
    if M < 2:
        raise ValueError(f"z must have at least two rows to compare, got {M}")
    row_lse = batch.neg_lse(batch.unit_rows(z), batch.row_ids(), batch.inverse_temperature(1 / (2 * t)))
    return torch.logsumexp(row_lse, dim=0) - 2 * t - scalar_like(M * (M - 1), z).log()


def positive_ranks(z_i: Tensor, z_j: Tensor) -> Tensor:
    r"""The rank of each row's positive among all other rows by cosine similarity; 1 is first.

    .. math:: r_i = 1 + |\{ j \ne i, p(i) : s_{ij} \ge s_{i,p(i)} \}|

    The rows are [z_i; z_j], and p(i) is the other view of row i's sample. A tie counts against the positive, so in a
    collapsed batch, where all embeddings are alike, every positive comes last. A NaN counts against the positive too.

    Rows are compared a block at a time. This takes O(N D) memory, plus 4 million similarities (16 MiB in float32), or
    2N similarities if that is more.

    Args:
        z_i: (N, D) embeddings of the first view, float16, bfloat16, float32 or float64, with any strides. Row n belongs
            to sample n.
        z_j: (N, D) embeddings of the second view, with the shape, dtype and device of `z_i`. Row n belongs to sample n.

    Returns:
        A tensor (2N,) of int64 in [1, 2N - 1], in the order [z_i; z_j]. The mean of 1 / r is the mean reciprocal rank,
        and the share of rows with r <= k is the top-k accuracy. Not differentiable.

    Raises:
        TypeError: a view is not a dense floating-point tensor.
        ValueError: a view is not a matrix with rows and features, or the shapes, dtypes or devices of the views do not
            match.

    Example:
        >>> import torch, fastntxent
        >>> fastntxent.positive_ranks(torch.eye(3), torch.eye(3).roll(1, dims=0))
        tensor([5, 5, 5, 5, 5, 5])
    """
    check_views(z_i, z_j)
    return ops.positive_ranks(torch.cat((unit_rows(z_i.detach()), unit_rows(z_j.detach()))))


def contrastive_accuracy(z_i: Tensor, z_j: Tensor) -> Tensor:
    """The share of rows that are closer to their other view than to any other row, by cosine similarity.

    It is the mean of `positive_ranks(z_i, z_j) == 1`. Training with a contrastive loss increases it. A tie counts
    against the positive, and so does a NaN.

    Rows are compared a block at a time. This takes O(N D) memory, plus 4 million similarities (16 MiB in float32), or
    2N similarities if that is more.

    Args:
        z_i: (N, D) embeddings of the first view, float16, bfloat16, float32 or float64, with any strides. Row n belongs
            to sample n.
        z_j: (N, D) embeddings of the second view, with the shape, dtype and device of `z_i`. Row n belongs to sample n.

    Returns:
        A 0-d float32 tensor in [0, 1], not differentiable.

    Raises:
        TypeError: a view is not a dense floating-point tensor.
        ValueError: a view is not a matrix with rows and features, or the shapes, dtypes or devices of the views do not
            match.

    Example:
        >>> import torch, fastntxent
        >>> fastntxent.contrastive_accuracy(torch.eye(3), torch.eye(3))
        tensor(1.)
    """
    return (positive_ranks(z_i, z_j) == 1).float().mean()


def effective_rank(z: Tensor) -> Tensor:
    r"""How many dimensions the embeddings use: 1 is a collapse onto a line, min(M, D) means that all are used equally.

    .. math:: \exp(-\sum_k p_k \log p_k), \quad p_k = \sigma_k / \sum_l \sigma_l

    sigma are the singular values of z, which is neither centred nor normalised. Roy & Vetterli, "The Effective Rank: A
    Measure of Effective Dimensionality", 2007; RankMe (Garrido et al., 2023) is the same number.

    It takes O(M D min(M, D)) time and O(M D) memory.

    Args:
        z: (M, D) embeddings, float16, bfloat16, float32 or float64.

    Returns:
        A 0-d tensor, float64 for float64 embeddings, else float32. It is 0 where all embeddings are zero, and NaN where
        an entry is not finite. Differentiable where no singular value is 0.

    Raises:
        TypeError: `z` is not a dense floating-point tensor.
        ValueError: `z` is not a matrix with rows and features.

    Example:
        >>> import torch, fastntxent
        >>> fastntxent.effective_rank(torch.eye(4))
        tensor(4.)
    """
    check_rows("z", z)
    with ops.autocast_off(z):
        z = unit_rows(z, normalize=False)
        finite = z.isfinite().all()
        sigma = torch.linalg.svdvals(torch.where(finite, z, 0))  # on a CPU svdvals raises for a NaN
    total = sigma.sum()
    p = sigma / total.clamp_min(torch.finfo(sigma.dtype).tiny)
    return torch.where(finite, torch.where(total > 0, torch.special.entr(p).sum().exp(), 0), torch.nan)
