"""Robust InfoNCE."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import check_name as check_backend
from ..backends.base import row_losses
from ..common import inverse_temperature, log_add, nt_xent_rows, reduce, watched
from ..distributed import Group, open_shard
from ..options import BackendName, Reduction
from ..validation import check_in_range, check_reduction, check_views, extremes


@watched
def rince(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    q: float = 0.5,
    lam: float = 0.01,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""RINCE: a loss that bounds what one wrongly paired row can contribute.

    .. math::
        L_i = -\frac{e^{q s_{i,p(i)}/\tau}}{q} +
              \frac{1}{q} \Big( \lambda \sum_{j \ne i} e^{s_{ij}/\tau} \Big)^{q}

    Chuang et al., "Robust Contrastive Learning against Noisy Views", 2022. q = 1 is fully robust and symmetric; q -> 0
    tends to InfoNCE (plus log lam), whose positives count without bound. The mean is over the 2N rows.

    Args:
        q: in (0, 1].
        lam: the weight of the denominator, in (0, 1).

    The other arguments, errors, determinism and memory are those of `dcl`. Terms are of the size of exp(q / tau), which
    float32 holds for q / tau < 88; a temperature beyond it is a ValueError, where it is not on an accelerator.

    Returns:
        A 0-d tensor, or (2N,) for "none", in the order [z_i; z_j]; float64 for float64 embeddings, else float32.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4)
        >>> fastntxent.rince(z, z, temperature=1.0, q=1.0, lam=0.5)  # -e + (e + 6) / 2
        tensor(1.6409)
    """
    check_views(z_i, z_j, may_be_empty=group is not None)
    check_reduction(reduction)
    check_backend(backend)
    q = check_in_range("q", q, 0, 1, with_low=False, with_high=True)
    lam = check_in_range("lam", lam, 0, 1, with_low=False, with_high=False)
    shard = open_shard(
        group, "rince", z_i, backend, views=2, temperature=temperature, q=q, lam=lam, reduction=reduction,
        normalize=normalize,
    )  # fmt: skip
    inv_tau = inverse_temperature(temperature, z_i, shard=shard)
    largest = math.log(torch.finfo(inv_tau.dtype).max)
    tau = min(extremes(temperature) or (math.inf,)) if isinstance(temperature, Tensor) else temperature
    if q / tau >= largest:
        raise ValueError(f"q / temperature must be below {largest:.0f}, where exp ends, got {q} / {tau}")
    nu, pos = nt_xent_rows(z_i, z_j, inv_tau, normalize, backend, shard)
    return reduce(_difference_of_powers(nu, pos, q, lam), reduction, shard=shard)


def _difference_of_powers(nu: Tensor, pos: Tensor, q: float, lam: float) -> Tensor:
    """((lam (exp(nu) + exp(pi)))^q - exp(q pi)) / q.

    The larger power is factored out, and multiplied in by halves: it may overflow where the difference does not. What
    is left is exp(-|r|) - 1, with r the logarithm of the powers' ratio. That is expm1 near 0, so the smallest q loses
    nothing, and not elsewhere: autograd's derivative of expm1 is 1 + expm1, which cancels.
    """
    q = max(q, torch.finfo(pos.dtype).tiny ** 0.5)  # a smaller q changes no bit, but its products underflow
    ratio = q * (math.log(lam) + row_losses(nu, pos))
    first = ratio > 0
    below = torch.where(first, -ratio, ratio)
    gap = torch.where(below > -1, torch.expm1(below), torch.exp(below) - 1) / q
    half = torch.exp(torch.where(first, math.log(lam) + log_add(nu, pos), pos) * (q / 2))
    return torch.where(first, -gap, gap) * half * half
