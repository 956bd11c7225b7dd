"""What a representation looks like, without the M x M matrix of similarities."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends.base import accumulation_dtype, norm_eps
from .functional import neg_lse
from .validation import check_positive, check_rows, check_views


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
    return (_unit(z_i) - _unit(z_j)).square().sum(dim=1).mean()


def uniformity(z: Tensor, t: float = 2.0, *, backend: str = "auto") -> Tensor:
    r"""How evenly the embeddings cover the unit sphere: 0 is a single point, lower is more uniform.

    .. math:: \log \frac{1}{M (M - 1)} \sum_{i \ne j} e^{-t \| u_i - u_j \|^2}

    Wang & Isola, 2020 (see `alignment`). With ||u - v||^2 = 2 - 2 u.v this is `neg_lse` at a temperature of 1/(2t),
    so its memory is O(M D).

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
    check_rows("z", z)
    check_positive("t", t)
    M = z.shape[0]
    if M < 2:
        raise ValueError(f"z must have at least two rows to compare, got {M}")
    row_lse = neg_lse(_unit(z), torch.arange(M, device=z.device), 1 / (2 * t), backend=backend)
    return torch.logsumexp(row_lse, dim=0) - 2 * t - math.log(M * (M - 1))


def _unit(z: Tensor) -> Tensor:
    return F.normalize(z.to(accumulation_dtype(z.dtype)), dim=1, eps=norm_eps(z.dtype))
