"""google-research/simclr's `objective.add_contrastive_loss`, on PyTorch tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import inverse_temperature, unit_rows
from ..losses import nt_xent
from ..validation import check_rows
from .shared import Logits, require_one_process

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
    temperature: float = 1.0,
    tpu_context: object = None,
    weights: float | Tensor = 1.0,
    strategy: object = None,
) -> ContrastiveLoss:
    """NT-Xent with 1/N over the 2N rows: twice `fastntxent.nt_xent`.

    Args:
        hidden: (2N, D), first all first views, then all second views.
        hidden_norm: whether rows are normalised, as TensorFlow does: divided by max(length, 1e-6).
        temperature: as in `nt_xent`.
        tpu_context, strategy: of TensorFlow's first and second version; None, or of one replica.
        weights: of the samples: a number, or (N,). The sum of weighted losses is divided by the number of weights that
            are not zero.

    Returns:
        A named tuple. loss: 0-d. logits: those of first against second views, (N, N), which are not formed:
        `logits.dense()` forms them, `logits.argmax()` gives the nearest second view of each without. labels: (N,), the
        column of each row's positive, where TensorFlow's are one-hot (N, 2N).

    Raises:
        TypeError, ValueError: as `nt_xent` does; ValueError for an odd number of rows.
        RuntimeError: for several replicas, for now.

    Example:
        >>> import torch
        >>> loss, logits, labels = add_contrastive_loss(torch.eye(4).repeat(2, 1))
        >>> loss, (logits.argmax() == labels).float().mean()  # 2 (log(e + 6) - 1)
        (tensor(2.3308), tensor(1.))
    """
    for context in (tpu_context, strategy):
        replicas = getattr(context, "num_replicas_in_sync", getattr(context, "num_replicas", 1))
        require_one_process("add_contrastive_loss", replicas)
    check_rows("hidden", hidden)
    if hidden.shape[0] % 2:
        raise ValueError(f"hidden must have an even number of rows, two views of each sample, got {hidden.shape[0]}")
    z = unit_rows(hidden, normalize=False)
    z_i, z_j = (F.normalize(z, dim=1, eps=_L2_EPS) if hidden_norm else z).chunk(2)
    if isinstance(weights, Tensor) and weights.ndim:
        losses = nt_xent(z_i, z_j, temperature, reduction="none", normalize=False).view(2, -1).sum(dim=0)
        if weights.shape != losses.shape:
            raise ValueError(
                f"weights must be a number or have shape {tuple(losses.shape)}, got {tuple(weights.shape)}"
            )
        loss = (weights.to(losses) * losses).sum() / weights.count_nonzero().clamp_min(1)
    else:
        loss = 2 * weights * nt_xent(z_i, z_j, temperature, normalize=False)
    logits = Logits(z_i, z_j, inverse_temperature(temperature, z_i))
    return ContrastiveLoss(loss, logits, torch.arange(len(z_i), device=z.device))
