"""google-research/simclr's `objective.add_contrastive_loss`, on PyTorch tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.base import row_dots, row_losses
from ..common import batch_sum, inverse_temperature, n_samples, neg_lse_of_rows, sample_ids, unit_rows
from ..distributed import Group, Shard, Sharding, open_shard
from ..losses import nt_xent
from ..validation import check_number, check_rows, check_tensor
from .shared import Logits, default_group_of

__all__ = ["ContrastiveLoss", "add_contrastive_loss"]

_L2_EPS = 1e-6  # the square root of what TensorFlow's l2_normalize keeps squared lengths above


class ContrastiveLoss(NamedTuple):
    """What `add_contrastive_loss` returns; it unpacks as loss, logits, labels."""

    loss: Tensor
    logits: Logits
    labels: Tensor


def add_contrastive_loss(
    hidden: Tensor,
    hidden_norm: bool = True,
    temperature: float | Tensor = 1.0,
    tpu_context: object = None,
    weights: float | Tensor = 1.0,
    strategy: object = None,
) -> ContrastiveLoss:
    """NT-Xent with 1/N over the 2N rows: twice `fastntxent.nt_xent`.

    Args:
        hidden: (2N, D), first all first views, then all second views.
        hidden_norm: whether rows are normalised, as TensorFlow does: divided by max(length, 1e-6).
        temperature: as in `nt_xent`.
        tpu_context, strategy: of TensorFlow's first and second version; None, or of one replica. With several the batch
            is that of all ranks of the default process group, which has so many, or of the group that is given itself:
            the loss is the whole batch's on every rank (TensorFlow's is the replica's own).
        weights: of the samples: a number, or (N,). The sum of weighted losses is divided by the number of weights that
            are not zero.

    Returns:
        A named tuple. loss: 0-d. logits: those of first against second views, (N, N), which are not formed:
        `logits.dense()` forms them, `logits.argmax()` gives the nearest second view of each without. labels: (N,), the
        column of each row's positive, where TensorFlow's are one-hot (N, 2N). With several replicas rows are this
        one's, and columns those of all.

    Raises:
        TypeError, ValueError: as `nt_xent` does; ValueError for an odd number of rows, and for another number of
            replicas than the process group has.
        RuntimeError: several replicas without a process group.

    Example:
        >>> import torch
        >>> loss, logits, labels = add_contrastive_loss(torch.eye(4).repeat(2, 1))
        >>> loss, (logits.argmax() == labels).float().mean()  # 2 (log(e + 6) - 1)
        (tensor(2.3308), tensor(1.))
    """
    group = _group("tpu_context", tpu_context) or _group("strategy", strategy)
    check_rows("hidden", hidden, may_be_empty=group is not None)
    if hidden.shape[0] % 2:
        raise ValueError(f"hidden must have an even number of rows, two views of each sample, got {hidden.shape[0]}")
    z = unit_rows(hidden, normalize=False)
    z_i, z_j = (F.normalize(z, dim=1, eps=_L2_EPS) if hidden_norm else z).chunk(2)
    if not isinstance(weights, Tensor):
        weights = check_number("weights", weights, "a number or a tensor")
    else:
        check_tensor("weights", weights)
        if weights.is_complex() or weights.device not in (hidden.device, torch.device("cpu")):
            got = f"{weights.dtype} on {weights.device}"
            raise ValueError(f"weights must be real, and on the CPU or on the device of hidden, got {got}")
    by_sample = weights if isinstance(weights, Tensor) and weights.ndim else None
    if by_sample is not None and by_sample.shape != z_i.shape[:1]:
        raise ValueError(f"weights must be a number or have shape ({len(z_i)},), got {tuple(by_sample.shape)}")
    shard = open_shard(
        group, "add_contrastive_loss", z_i, "auto", views=2, hidden_norm=hidden_norm, temperature=temperature,
        weights=weights if by_sample is None else "one a sample",
    )  # fmt: skip
    if shard is None and by_sample is None:
        loss, columns = 2 * weights * nt_xent(z_i, z_j, temperature, normalize=False), z_j
    else:
        losses, columns = _by_sample(z_i, z_j, temperature, shard)
        if by_sample is None:
            loss = weights * batch_sum(losses, shard) / n_samples(z_i, shard)
        else:
            by_sample = by_sample.to(losses)
            loss = batch_sum(by_sample * losses, shard) / batch_sum(by_sample != 0, shard).clamp_min(1)
    logits = Logits(z_i, columns, inverse_temperature(temperature, z_i))
    return ContrastiveLoss(loss, logits, sample_ids(z_i, shard))


def _by_sample(z_i: Tensor, z_j: Tensor, temperature: float | Tensor, shard: Shard | None) -> tuple[Tensor, Tensor]:
    """The losses of both views of each sample (N,), and the second views of all samples."""
    if shard is None:
        return nt_xent(z_i, z_j, temperature, reduction="none", normalize=False).view(2, -1).sum(dim=0), z_j
    u = torch.cat((z_i, z_j))
    inv_tau = inverse_temperature(temperature, u, shard=shard)
    nu = neg_lse_of_rows(u, sample_ids(z_i, shard).repeat(2), inv_tau, "auto", shard)
    losses = row_losses(nu.view(2, -1), inv_tau * row_dots(z_i, z_j)).sum(dim=0)
    of_ranks = shard.columns(u).whole().split(shard.rows)
    return losses, torch.cat([rows[len(rows) // 2 :] for rows in of_ranks])


def _group(name: str, context: object) -> Group | None:
    """The ranks that a context of TensorFlow's would be about, or that it is itself."""
    for attribute in ("num_replicas_in_sync", "num_replicas"):
        if hasattr(context, attribute):
            return default_group_of(f"{name}.{attribute}", getattr(context, attribute))
    if context is None or isinstance(context, Sharding):
        return context
    try:
        return Sharding(context)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be None, a process group, or have num_replicas_in_sync or num_replicas, "
            f"got {type(context).__name__}"
        ) from error
