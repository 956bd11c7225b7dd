"""Decoupled contrastive losses: the positive leaves the denominator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..algebra import in_double
from ..batch import Batch
from ..distributed import Group
from ..opening import open_batch
from ..options import BackendName, Reduction
from ..validation import check_positive_number
from ..watching import watched


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
    batch = open_batch(
        group, "dcl", {"z_i": z_i, "z_j": z_j}, views=2, reduction=reduction, normalize=normalize, backend=backend,
        temperature=temperature,
    )  # fmt: skip
    nu, pos = batch.nt_xent_rows(z_i, z_j, batch.inverse_temperature(temperature))
    return batch.reduce(_decoupled(nu, pos))


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
    sigma = check_positive_number("sigma", sigma)
    batch = open_batch(
        group, "dclw", {"z_i": z_i, "z_j": z_j}, views=2, reduction=reduction, normalize=normalize, backend=backend,
        temperature=temperature, sigma=sigma,
    )  # fmt: skip
    inv_tau = batch.inverse_temperature(temperature)
    nu, pos = batch.nt_xent_rows(z_i, z_j, inv_tau)
    weights = mises_fisher_weights(batch, pos[: z_i.shape[0]] / inv_tau, sigma)
    return batch.reduce(_decoupled(nu, weights.repeat(2) * pos))


def mises_fisher_weights(batch: Batch, sims: Tensor, sigma: float) -> Tensor:
    """2 - exp(s_n / sigma) / mean_m exp(s_m / sigma), (N,), without a gradient. In float64, for small sigmas."""
    wide = in_double(sims.detach())
    least = 4 * torch.finfo(wide.dtype).tiny  # a smaller sigma would weigh the same pair alone
    wide = wide / math.copysign(max(abs(sigma), least), sigma)
    return (2 - batch.n_samples * torch.exp(wide - batch.log_sum_exp(wide))).to(sims.dtype)


def _decoupled(nu: Tensor, pos: Tensor) -> Tensor:
    """nu - pi, and 0 for a row without negatives."""
    return torch.where(nu == -torch.inf, 0, nu - pos)
