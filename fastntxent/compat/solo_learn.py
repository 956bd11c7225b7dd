"""solo-learn's `solo.losses.simclr.simclr_loss_func`, unsupervised and supervised."""

from __future__ import annotations

from torch import Tensor

from ..backends.base import row_losses
from ..common import inverse_temperature, neg_lse_of_rows, positive_lse, reduce, unit_rows, watched
from ..distributed import open_shard
from ..validation import check_rows
from .shared import as_ids, default_group

__all__ = ["simclr_loss_func"]


@watched
def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    r"""SimCLR's loss of rows in any order, whose positives are the rows with the same index.

    .. math:: L_i = -\log \frac{\sum_{p \in P(i)} e^{s_{ip}/\tau}}
        {\sum_{p \in P(i)} e^{s_{ip}/\tau} + \sum_{n \notin P(i), n \ne i} e^{s_{in}/\tau}}

    The sample's number makes it SimCLR, its class the supervised form: `sup_con(form="in")` less log |P(i)|.

    As solo-learn's, in a process group it is that of the batch of all ranks, on every rank, positives included. Indexes
    mean the same on every rank then.

    Args:
        z: (M, D) embeddings of all views, normalised here.
        indexes: (M,), of any dtype: the sample of each row, or its target.
        temperature: as in `nt_xent`.

    Returns:
        A 0-d tensor, the mean over the rows with a positive, and 0 where there are none (solo-learn's is infinite, and
        its gradient NaN, as soon as one row has no positive).

    Example:
        >>> import torch
        >>> simclr_loss_func(torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2), temperature=1.0)
        tensor(1.1654)
    """
    group = default_group()
    check_rows("z", z, may_be_empty=group is not None)
    ids = as_ids("indexes", indexes, z)
    shard = open_shard(group, "simclr_loss_func", z, "auto", temperature=temperature)
    inv_tau = inverse_temperature(temperature, z, shard=shard)
    u = unit_rows(z)
    nu = neg_lse_of_rows(u, ids, inv_tau, "auto", shard)
    lse = positive_lse(u, ids, inv_tau, "auto", shard)
    alone = lse.isneginf()
    losses = row_losses(nu, lse.masked_fill(alone, 0)).masked_fill(alone, 0)
    return reduce(losses, "mean", counted=~alone, shard=shard)
