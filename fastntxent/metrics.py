"""What a representation looks like, without the M x M matrix of similarities."""

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
    r"""Mean squared distance between the two views of a sample on the unit sphere; 0 is perfect, 2 is chance.

    .. math:: \frac{1}{N} \sum_{n=1}^{N} \| u_n^{(i)} - u_n^{(j)} \|^2

    Wang & Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere", 2020, with their exponent 2.

    Args:
        z_i, z_j: (N, D) embeddings of the two views, of any floating dtype; they are normalised here.

    Returns:
        A 0-d tensor in [0, 4], float64 for float64 embeddings, else float32; differentiable.

    Raises:
        TypeError, ValueError: as `nt_xent` does of its views.

    Example:
        >>> import torch, fastntxent
        >>> fastntxent.alignment(torch.eye(2), -torch.eye(2))
        tensor(4.)
    """
    check_views(z_i, z_j)
    return (unit_rows(z_i) - unit_rows(z_j)).square().sum(dim=1).mean()


def uniformity(z: Tensor, t: float = 2.0, *, backend: BackendName = "auto") -> Tensor:
    r"""How evenly the embeddings cover the unit sphere: 0 is a single point, lower is more uniform.

    .. math:: \log \frac{1}{M (M - 1)} \sum_{i \ne j} e^{-t \| u_i - u_j \|^2}

    Wang & Isola, 2020 (see `alignment`). With ||u - v||^2 = 2 - 2 u.v this is `neg_lse` at a temperature of 1/(2t),
    so its memory is O(M D). Rows of zero length have no direction and count as orthogonal to all: look at the norms
    too.

    Args:
        z: (M, D) embeddings, M >= 2, of any floating dtype; they are normalised here.
        t: the kernel's sharpness, positive.
        backend: "auto", or a name from `backends()`.

    Returns:
        A 0-d tensor, float64 for float64 embeddings, else float32; differentiable.

    Raises:
        TypeError: z is not a floating-point tensor.
        ValueError: z is not a matrix of at least two rows, t is not positive and finite, or the backend is unknown.

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
    r"""The place of each row's positive among all other rows by cosine similarity; 1 is first.

    .. math:: r_i = 1 + |\{ j \ne i, p(i) : s_{ij} \ge s_{i,p(i)} \}|

    A tie counts against the positive, and so does a NaN: collapsed embeddings, all alike, come last, not first.

    Args:
        z_i, z_j: (N, D) embeddings of the two views, of any floating dtype; they are normalised here.

    Returns:
        (2N,) int64 in [1, 2N - 1], in the order [z_i; z_j]. 1 / r averages to the mean reciprocal rank, r <= k to the
        top-k accuracy. Not differentiable.

    Raises:
        TypeError, ValueError: as `nt_xent` does of its views.

    A block of rows at a time: O(N D) memory, and 4 million similarities (16 MiB of float32) or 2N where that is more.

    Example:
        >>> import torch, fastntxent
        >>> fastntxent.positive_ranks(torch.eye(3), torch.eye(3).roll(1, dims=0))
        tensor([5, 5, 5, 5, 5, 5])
    """
    check_views(z_i, z_j)
    return ops.positive_ranks(torch.cat((unit_rows(z_i.detach()), unit_rows(z_j.detach()))))


def contrastive_accuracy(z_i: Tensor, z_j: Tensor) -> Tensor:
    """The share of rows that are nearer to their other view than to any other row, by cosine similarity.

    What the loss trains, as a number between 0 and 1; see `positive_ranks`, whose arguments, errors and memory it has.

    Returns:
        A 0-d float32 tensor, not differentiable.

    Example:
        >>> import torch, fastntxent
        >>> fastntxent.contrastive_accuracy(torch.eye(3), torch.eye(3))
        tensor(1.)
    """
    return (positive_ranks(z_i, z_j) == 1).float().mean()


def effective_rank(z: Tensor) -> Tensor:
    r"""How many dimensions the embeddings use: 1 is collapse onto a line, min(M, D) is all of them, equally.

    .. math:: \exp\Big(-\sum_k p_k \log p_k\Big), \qquad p_k = \sigma_k / \sum_l \sigma_l

    with the singular values of z as it is, neither centred nor normalised. Roy & Vetterli, "The Effective Rank: A
    Measure of Effective Dimensionality", 2007; RankMe (Garrido et al., 2023) is the same number.

    Args:
        z: (M, D) embeddings, of any floating dtype.

    Returns:
        A 0-d tensor, float64 for float64 embeddings, else float32; 0 where all embeddings are zero, NaN where one is
        not finite. Differentiable where the singular values differ.

    Raises:
        TypeError, ValueError: z is not a floating-point matrix with at least one row.

    O(M D min(M, D)) time, O(M D) memory.

    Example:
        >>> import torch, fastntxent
        >>> fastntxent.effective_rank(torch.eye(4))
        tensor(4.)
    """
    check_rows("z", z)
    with ops.autocast_off(z):
        z = unit_rows(z, normalize=False)
        finite = z.isfinite().all()
        sigma = torch.linalg.svdvals(torch.where(finite, z, 0))  # which raises an error on a CPU where there is a NaN
    total = sigma.sum()
    p = sigma / total.clamp_min(torch.finfo(sigma.dtype).tiny)
    return torch.where(finite, torch.where(total > 0, torch.special.entr(p).sum().exp(), 0), torch.nan)
