"""Losses with a sigmoid for each pair: SigLIP of two towers, NT-Logistic of two views."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algebra import row_dots, row_losses
from ..batch import Batch
from ..distributed import Group
from ..opening import open_batch
from ..options import BackendName, Reduction
from ..sides import Side
from ..watching import watched


@watched
def siglip(
    image_features: Tensor,
    text_features: Tensor,
    temperature: float | Tensor | None = None,
    *,
    logit_scale: float | Tensor | None = None,
    bias: float | Tensor = -10.0,
    ids: Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""SigLIP's loss: every pair of an image and a text is told apart on its own, as belonging together or not.

    .. math::
        L = \frac{1}{N} \sum_{i=1}^{N} \sum_{j=1}^{N} \log\big(1 + e^{-y_{ij} (s_{ij}/\tau + b)}\big), \qquad
        y_{ij} = \begin{cases} 1 & \text{where } id_i = id_j \\ -1 & \text{else} \end{cases}

    Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023. No sum over a row comes into the gradient: value
    and gradients come from one pass over the similarities.

    Args:
        image_features, text_features: (N, D); row n of both belongs together.
        temperature: as in `nt_xent`; 0.1 where neither it nor a logit_scale is given, from where the paper learns it.
        logit_scale: 1 / temperature, in its place: a positive float or a 0-d tensor.
        bias: b, a finite float or a 0-d tensor, which may be learnt. The paper begins at -10, where the many negatives
            of a fresh batch cost little.
        ids: (N,) integers: images and texts of the same id belong together, also those of other rows. None: row n of
            both alone.
        reduction: "mean" (1/N of the sum over all pairs), "sum", or "none": of each image the sum over all texts.
        normalize, backend, group: as in `nt_xent`.

    Returns:
        A 0-d tensor, or (N,) for "none"; float64 for float64 features, else float32. Differentiable in the features,
        the temperature and the bias.

    Raises:
        TypeError, ValueError, RuntimeError: as `nt_xent`.

    Deterministic, O(N D) memory.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(2)
        >>> fastntxent.siglip(z, z, temperature=1.0, bias=0.0)  # log(1 + 1/e) + log(2)
        tensor(1.0064)
    """
    if logit_scale is not None and temperature is not None:
        raise ValueError("temperature and logit_scale must not both be given: one is the inverse of the other")
    batch = open_batch(
        group, "siglip", {"image_features": image_features, "text_features": text_features}, ids=ids,
        reduction=reduction, normalize=normalize, backend=backend, temperature=temperature, logit_scale=logit_scale,
        bias=bias,
    )  # fmt: skip
    if logit_scale is None:
        inv_tau = batch.inverse_temperature(0.1 if temperature is None else temperature)
    else:
        inv_tau = batch.logit_scale(logit_scale)
    return siglip_of_batch(batch, image_features, text_features, inv_tau, batch.bias(bias), ids)


def siglip_of_batch(
    batch: Batch,
    image_features: Tensor,
    text_features: Tensor,
    inv_tau: float | Tensor,
    bias: Tensor,
    ids: Tensor | None,
) -> Tensor:
    """SigLIP's loss in an open batch, whose inverse temperature and bias are checked already."""
    if ids is None:
        loss = batch.sigmoid_at_once(image_features, text_features, inv_tau, bias, two_views=False)
        if loss is not None:
            return loss
    groups = batch.sample_ids() if ids is None else ids
    rows, cols = (Side(batch.unit_rows(z), groups) for z in (image_features, text_features))
    return batch.reduce(batch.softplus_sums(rows, cols, inv_tau, bias, positives=True))


@watched
def nt_logistic(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    bias: float | Tensor = 0.0,
    ids: Tensor | None = None,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""NT-Logistic: the logistic loss of every pair among the 2N rows of two views, one positive for each row.

    .. math::
        \ell_i = \log\big(1 + e^{-s_{ip(i)}/\tau - b}\big)
            + \sum_{j : id_j \ne id_i} \log\big(1 + e^{s_{ij}/\tau + b}\big)

    Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020, table 2, with all
    negatives and a bias, which is 0 there.

    Args:
        z_i, z_j: as in `nt_xent`.
        temperature: as in `nt_xent`.
        bias: a finite float or a 0-d tensor, which may be learnt.
        ids: as in `nt_xent`: (N,) integers, samples of the same id are no negatives of each other.
        reduction: "mean" (1/2N), "sum" or "none".
        normalize, backend, group: as in `nt_xent`.

    Returns:
        A 0-d tensor, or (2N,) for "none", in the order [z_i; z_j]; float64 for float64 embeddings, else float32.

    Raises:
        TypeError, ValueError, RuntimeError: as `nt_xent`.

    Deterministic, O(N D) memory.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(2)
        >>> fastntxent.nt_logistic(z, z, temperature=1.0)  # log(1 + 1/e) + 2 log(2)
        tensor(1.6996)
    """
    batch = open_batch(
        group, "nt_logistic", {"z_i": z_i, "z_j": z_j}, ids=ids, views=2, reduction=reduction, normalize=normalize,
        backend=backend, temperature=temperature, bias=bias,
    )  # fmt: skip
    inv_tau, b = batch.inverse_temperature(temperature), batch.bias(bias)
    if ids is None:
        loss = batch.sigmoid_at_once(z_i, z_j, inv_tau, b, two_views=True)
        if loss is not None:
            return loss
    groups = (batch.sample_ids() if ids is None else ids).repeat(2)
    u_i, u_j = batch.unit_rows(z_i), batch.unit_rows(z_j)
    negatives = batch.softplus_sums(Side(torch.cat((u_i, u_j)), groups), None, inv_tau, b, positives=False)
    x = inv_tau * row_dots(u_i, u_j) + b
    return batch.reduce(negatives + row_losses(torch.zeros_like(x), x).repeat(2))
