"""Robust InfoNCE."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import check_name as check_backend
from ..backends.base import accumulation_dtype
from ..common import inverse_temperature, log_add, nt_xent_rows, reduce
from ..distributed import Group, open_shard
from ..validation import check_in_range, check_reduction, check_temperature, check_views


def rince(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    q: float = 0.5,
    lam: float = 0.01,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str = "auto",
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
    float32 holds for q / tau < 88; a float temperature beyond it is a ValueError.

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
    largest = math.log(torch.finfo(accumulation_dtype(z_i.dtype)).max)
    if not isinstance(temperature, Tensor):
        temperature = check_temperature(temperature)
        if q / temperature >= largest:
            raise ValueError(f"q / temperature must be below {largest:.0f}, where exp ends, got {q} / {temperature}")
    shard = open_shard(
        group, "rince", z_i, backend, views=2, temperature=temperature, q=q, lam=lam, reduction=reduction,
        normalize=normalize,
    )  # fmt: skip
    inv_tau = inverse_temperature(temperature, z_i, shard=shard)
    nu, pos = nt_xent_rows(z_i, z_j, inv_tau, normalize, backend, shard)
    everything = math.log(lam) + log_add(nu, pos)
    # The difference of two powers over q, each less 1: exact for the smallest q too.
    return reduce((torch.expm1(q * everything) - torch.expm1(q * pos)) / q, reduction, shard=shard)
