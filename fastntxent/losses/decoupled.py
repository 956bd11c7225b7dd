"""Decoupled contrastive losses: the positive leaves the denominator."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..backends import check_name as check_backend
from ..common import inverse_temperature, reduce
from ..validation import check_number, check_positive, check_reduction, check_views


def dcl(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str = "auto",
) -> Tensor:
    r"""DCL: NT-Xent without the positive in its own denominator.

    .. math:: L_i = -s_{i,p(i)}/\tau + \log \sum_{j \ne i, p(i)} e^{s_{ij}/\tau}

    Yeh et al., "Decoupled Contrastive Learning", 2022. The mean is over the 2N rows. Losses may be negative.

    Args, errors, determinism and memory are those of `nt_xent`, without `ids`, smoothing and temperatures per row. With
    N = 1 there are no negatives and the loss is 0.

    Returns:
        A 0-d tensor, or (2N,) for "none", in the order [z_i; z_j]; float64 for float64 embeddings, else float32.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4)
        >>> fastntxent.dcl(z, z, temperature=1.0)  # log 6 - 1
        tensor(0.7918)
    """
    nu, pos, _ = _terms(z_i, z_j, temperature, reduction, normalize, backend)
    return reduce(_decoupled(nu, pos), reduction)


def dclw(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    sigma: float = 0.5,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str = "auto",
) -> Tensor:
    r"""DCLW: DCL that pulls hardest on the pairs that are furthest apart, by a negative von Mises-Fisher weight.

    .. math::
        L_i = -w_i s_{i,p(i)}/\tau + \log \sum_{j \ne i, p(i)} e^{s_{ij}/\tau}, \qquad
        w_i = 2 - \frac{e^{s_{i,p(i)}/\sigma}}{\frac{1}{N} \sum_n e^{s_{n,p(n)}/\sigma}}

    Yeh et al., "Decoupled Contrastive Learning", 2022. No gradient goes through the weights.

    Args:
        sigma: the spread of the weights, positive.

    The other arguments, errors, determinism and memory are those of `dcl`.

    Returns:
        A 0-d tensor, or (2N,) for "none", in the order [z_i; z_j]; float64 for float64 embeddings, else float32.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4)
        >>> fastntxent.dclw(z, z, temperature=1.0)  # pairs alike: every weight is 1
        tensor(0.7918)
    """
    check_number("sigma", sigma)
    check_positive("sigma", sigma)
    nu, pos, inv_tau = _terms(z_i, z_j, temperature, reduction, normalize, backend)
    n_samples = z_i.shape[0]
    sims = pos.detach()[:n_samples] / inv_tau.detach()
    weights = 2 - n_samples * torch.softmax(sims / sigma, dim=0)
    return reduce(_decoupled(nu, weights.repeat(2) * pos), reduction)


def _terms(
    z_i: Tensor, z_j: Tensor, temperature: float | Tensor, reduction: str, normalize: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    check_views(z_i, z_j)
    check_reduction(reduction)
    check_backend(backend)
    inv_tau = inverse_temperature(temperature, z_i)
    return *ops.nt_xent_rows(z_i, z_j, inv_tau, normalize, backend), inv_tau


def _decoupled(nu: Tensor, pos: Tensor) -> Tensor:
    """nu - pi, and 0 for a row without negatives."""
    return torch.where(nu == -torch.inf, 0, nu - pos)
