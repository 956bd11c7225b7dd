"""google-research/simclr's `objective.add_contrastive_loss`, on PyTorch tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra import row_losses, unit_rows
from ..distributed import Group, Sharding
from ..opening import open_batch
from ..scale import inverse_temperature
from ..validation import check_number, check_rows, check_tensor
from ..watching import watch
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
    batch = open_batch(
        group, "add_contrastive_loss", {"hidden": z_i, "hidden's second half": z_j}, views=2, normalize=False,
        hidden_norm=hidden_norm, temperature=temperature, weights=weights if by_sample is None else "one a sample",
    )  # fmt: skip
    inv_tau = batch.inverse_temperature(temperature)
    if by_sample is None:
        loss = 2 * weights * batch.nt_xent(z_i, z_j, inv_tau)
    else:
        by_sample = by_sample.to(z_i)
        losses = row_losses(*batch.nt_xent_rows(z_i, z_j, inv_tau)).view(2, -1).sum(dim=0)
        loss = batch.total(by_sample * losses) / batch.total(by_sample != 0).clamp_min(1)
    logits = Logits(z_i, batch.gather(z_j), inverse_temperature(temperature, z_i))
    return ContrastiveLoss(watch(loss, temperature), logits, batch.sample_ids())


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
