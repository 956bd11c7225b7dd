"""Decoupled contrastive losses: the positive leaves the denominator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import check_name as check_backend
from ..common import inverse_temperature, n_samples, nt_xent_rows, reduce, watched
from ..distributed import Group, Shard, log_sum_exp, open_shard
from ..options import BackendName, Reduction
from ..validation import check_number, check_positive, check_reduction, check_views


@watched
def dcl(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
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
    nu, pos, _, shard = _terms("dcl", z_i, z_j, temperature, reduction, normalize, backend, group)
    return reduce(_decoupled(nu, pos), reduction, shard=shard)


@watched
def dclw(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    sigma: float = 0.5,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
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
    sigma = check_number("sigma", sigma)
    check_positive("sigma", sigma)
    nu, pos, inv_tau, shard = _terms("dclw", z_i, z_j, temperature, reduction, normalize, backend, group, sigma=sigma)
    sims = pos.detach()[: z_i.shape[0]] / (inv_tau.detach() * sigma)
    shares = torch.exp(sims - log_sum_exp(sims, shard)) if shard else torch.softmax(sims, dim=0)
    weights = 2 - n_samples(z_i, shard) * shares
    return reduce(_decoupled(nu, weights.repeat(2) * pos), reduction, shard=shard)


def _terms(
    function: str,
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor,
    reduction: str,
    normalize: bool,
    backend: str,
    group: Group | None,
    **agreed: object,
) -> tuple[Tensor, Tensor, Tensor, Shard | None]:
    check_views(z_i, z_j, may_be_empty=group is not None)
    check_reduction(reduction)
    check_backend(backend)
    shard = open_shard(
        group, function, z_i, backend, views=2, temperature=temperature, reduction=reduction, normalize=normalize,
        **agreed,
    )  # fmt: skip
    inv_tau = inverse_temperature(temperature, z_i, shard=shard)
    return *nt_xent_rows(z_i, z_j, inv_tau, normalize, backend, shard), inv_tau, shard


def _decoupled(nu: Tensor, pos: Tensor) -> Tensor:
    """nu - pi, and 0 for a row without negatives."""
    return torch.where(nu == -torch.inf, 0, nu - pos)
