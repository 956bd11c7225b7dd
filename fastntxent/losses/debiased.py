"""Losses that correct the negatives for the positives that hide among them, and weigh the hard ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import check_name as check_backend
from ..backends.base import row_losses
from ..common import inverse_temperature, n_samples, nt_xent_rows, number, reduce, watched
from ..distributed import Group, open_shard
from ..options import BackendName, Reduction
from ..validation import check_in_range, check_reduction, check_views


def debiased(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    tau_plus: float,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""Debiased contrastive loss: an estimate of what the negatives would sum to without the false ones among them.

    .. math::
        L_i = \log\big(1 + G_i e^{-s_{i,p(i)}/\tau}\big), \qquad
        G_i = \max\Big( \frac{e^{\nu_i} - \tau^+ n\, e^{s_{i,p(i)}/\tau}}{1 - \tau^+},\; n\, e^{-1/\tau} \Big)

    with n = 2N - 2 negatives. Chuang et al., "Debiased Contrastive Learning", 2020. The mean is over the 2N rows;
    tau_plus = 0 is `nt_xent`, but for the lower bound, which cosine similarities never reach.

    Args:
        tau_plus: the prior probability that a negative belongs to the row's own class, in [0, 1).

    The other arguments, errors, determinism and memory are those of `dcl`. The bound presumes cosine similarities,
    also with normalize=False.

    Returns:
        A 0-d tensor, or (2N,) for "none", in the order [z_i; z_j]; float64 for float64 embeddings, else float32.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4)
        >>> fastntxent.debiased(z, z, temperature=1.0, tau_plus=0.1)  # log(1 + (6 - 0.6 e) / 0.9 e)
        tensor(1.0246)
    """
    return hard_negative(
        z_i,
        z_j,
        temperature,
        tau_plus=tau_plus,
        beta=0.0,
        reduction=reduction,
        normalize=normalize,
        backend=backend,
        group=group,
    )


@watched
def hard_negative(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    tau_plus: float,
    beta: float,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""HCL: the debiased loss with each negative weighted by how close it lies.

    .. math::
        L_i = \log\big(1 + G_i e^{-s_{i,p(i)}/\tau}\big), \qquad
        G_i = \max\Big( \frac{E_i - \tau^+ n\, e^{s_{i,p(i)}/\tau}}{1 - \tau^+},\; n\, e^{-1/\tau} \Big), \qquad
        E_i = \frac{\sum_j e^{(1 + \beta) s_{ij}/\tau}}{\frac{1}{n} \sum_j e^{\beta s_{ij}/\tau}}

    the sums over the n = 2N - 2 negatives: `neg_lse` at two inverse temperatures. Robinson et al., "Contrastive
    Learning with Hard Negative Samples", 2021. Gradients go through the weights too. The mean is over the 2N rows;
    beta = 0 is `debiased`.

    Args:
        tau_plus: as in `debiased`.
        beta: concentration on hard negatives, 0 or more.

    The other arguments, errors, determinism and memory are those of `dcl`; with beta > 0 it takes twice the time.

    Returns:
        A 0-d tensor, or (2N,) for "none", in the order [z_i; z_j]; float64 for float64 embeddings, else float32.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4)  # negatives all alike: their weights are 1
        >>> fastntxent.hard_negative(z, z, temperature=1.0, tau_plus=0.1, beta=1.0)
        tensor(1.0246)
    """
    check_views(z_i, z_j, may_be_empty=group is not None)
    check_reduction(reduction)
    check_backend(backend)
    tau_plus = check_in_range("tau_plus", tau_plus, 0, 1, with_low=True, with_high=False)
    beta = check_in_range("beta", beta, 0, math.inf, with_low=True, with_high=False)
    shard = open_shard(
        group, "hard_negative", z_i, backend, views=2, temperature=temperature, tau_plus=tau_plus, beta=beta,
        reduction=reduction, normalize=normalize,
    )  # fmt: skip
    inv_tau = inverse_temperature(temperature, z_i, shard=shard)
    n_negatives = 2 * n_samples(z_i, shard) - 2
    nu, pos = nt_xent_rows(z_i, z_j, inv_tau * (1 + beta), normalize, backend, shard)
    log_n = number(n_negatives, z_i).log()  # -inf without negatives, as nu is
    if beta:
        pos = pos / (1 + beta)
        weights = nt_xent_rows(z_i, z_j, inv_tau * beta, normalize, backend, shard)[0]
        nu = nu - weights.masked_fill(weights == -torch.inf, 0) + log_n
    if tau_plus:
        # log(e^nu - tau_plus n e^pi) - log(1 - tau_plus), where that has a logarithm.
        ratio = math.log(tau_plus) + log_n + pos - nu
        some = ratio < 0
        left = torch.log(-torch.expm1(ratio.masked_fill(~some, -1.0)))
        nu = torch.where(some, nu + left - math.log1p(-tau_plus), -torch.inf)
    nu = torch.maximum(nu, log_n - inv_tau)
    return reduce(row_losses(nu, pos), reduction, shard=shard)
