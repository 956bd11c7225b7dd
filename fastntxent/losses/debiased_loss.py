"""Losses that correct the negatives for the positives that hide among them, and weigh the hard ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..algebra import row_losses
from ..distributed import Group
from ..opening import open_batch
from ..options import BackendName, Reduction
from ..scale import factor, scalar_like
from ..validation import check_parameter
from ..watching import watched


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
    tau_plus = check_parameter("tau_plus", tau_plus)
    beta = check_parameter("beta", beta)
    batch = open_batch(
        group, "hard_negative", {"z_i": z_i, "z_j": z_j}, views=2, reduction=reduction, normalize=normalize,
        backend=backend, temperature=temperature, tau_plus=tau_plus, beta=beta,
    )  # fmt: skip
    inv_tau = batch.inverse_temperature(temperature)
    nu, pos = batch.nt_xent_rows(z_i, z_j, factor(inv_tau * (1 + beta), z_i))
    log_n = scalar_like(2 * batch.n_samples - 2, z_i).log()  # -inf without negatives, as nu is
    if beta:
        pos = pos / (1 + beta)
        weights = batch.nt_xent_rows(z_i, z_j, factor(inv_tau * beta, z_i))[0]
        nu = nu - weights.masked_fill(weights == -torch.inf, 0) + log_n
    if tau_plus:
        nu = _without_false_negatives(nu, pos, tau_plus, log_n)
    nu = torch.maximum(nu, log_n - inv_tau)
    return batch.reduce(row_losses(nu, pos))


def _without_false_negatives(nu: Tensor, pos: Tensor, tau_plus: float, log_n: Tensor) -> Tensor:
    """log(e^nu - tau_plus n e^pi) - log(1 - tau_plus), and -inf where that has no logarithm."""
    ratio = math.log(tau_plus) + log_n + pos - nu
    some = ratio < 0
    left = torch.log(-torch.expm1(ratio.masked_fill(~some, -1.0)))
    return torch.where(some, nu + left - math.log1p(-tau_plus), -torch.inf)
