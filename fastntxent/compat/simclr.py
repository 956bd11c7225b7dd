"""`objective.add_contrastive_loss` of google-research/simclr, for PyTorch tensors."""

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

_L2_EPS = 1e-6  # TensorFlow's l2_normalize clamps squared lengths at 1e-12


class ContrastiveLoss(NamedTuple):
    """The result of `add_contrastive_loss`, which unpacks as loss, logits, labels.

    Attributes:
        loss: A 0-d tensor.
        logits: The logits of first against second views, (N, N), not formed. `logits.dense()` forms them;
            `logits.argmax()` returns the nearest second view without forming them all.
        labels: (N,) integers, the column of each row's positive; TensorFlow returns them one-hot, (N, 2N).

    Example:
        >>> import torch
        >>> add_contrastive_loss(torch.eye(4).repeat(2, 1)).labels
        tensor([0, 1, 2, 3])
    """

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
    """NT-Xent, summed over the 2N rows and divided by N: twice `fastntxent.nt_xent`.

    Args:
        hidden: (2N, D), all first views followed by all second views.
        hidden_norm: Normalise the rows as TensorFlow does, dividing by max(length, 1e-6).
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there.
        tpu_context: None, a context with `num_replicas`, or a process group. With several replicas the batch is spread
            over all ranks of the default process group, whose size must be the number of replicas. The loss then covers
            the whole batch and is the same on every rank (TensorFlow's covers the replica's rows).
        weights: One weight for all samples, or (N,), one per sample. With (N,) the sum of the weighted losses is
            divided by the number of weights that are not zero.
        strategy: The name of `tpu_context` in SimCLR's TensorFlow 2 file, where the context has `num_replicas_in_sync`.

    Returns:
        A `ContrastiveLoss`, whose fields are loss, logits and labels. With several replicas the rows of the logits
        belong to this rank, and the columns to all ranks.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, dtypes or devices do not match, the batch is empty, the number of rows is odd, or the number
            of replicas is not the size of the process group.
        RuntimeError: there are several replicas, and no process group.

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
    """Return the group that a TensorFlow context stands for. If the context is a group itself, return that group."""
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
