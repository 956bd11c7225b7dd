"""Losses with a sigmoid for each pair: SigLIP for two towers, NT-Logistic for two views."""

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
    r"""SigLIP's loss: each pair of an image and a text is classified on its own, as matching or not.

    .. math::
        L = \frac{1}{N} \sum_{i=1}^{N} \sum_{j=1}^{N} \log(1 + e^{-y_{ij} (s_{ij}/\tau + b)}), \quad
        y_{ij} = 1 \text{ where } id_i = id_j, \text{ else } -1

    Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023. The gradient needs no sum over a row, so for
    "mean" and "sum" the value and the gradients come from one pass over the similarities. With `ids`, a group or
    "none", the backward takes a second pass. The paper learns tau and b, starting from tau = 0.1 and b = -10, so that
    the many negatives contribute little to the loss at first.

    On the same device with the same number of threads, the same input gives the same bits. Extra memory is O(N D);
    the reference backend takes O(N^2).

    Args:
        image_features: (N, D) features of the images, float16, bfloat16, float32 or float64. Row n belongs to sample n.
        text_features: (N, D) features of the texts, with the shape, dtype and device of `image_features`. Row n belongs
            to sample n.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. None: 0.1, unless `logit_scale` is given.
        logit_scale: 1 / tau in place of `temperature`: a positive float or a 0-d floating-point tensor, such as
            `log_scale.exp()` with a learnt parameter `log_scale`.
        bias: b, a finite float or a 0-d floating-point tensor, which may require a gradient.
        ids: (N,) integers. Images and texts with the same id belong together. None: image n and text n belong together,
            and no others.
        reduction: "mean" over the N images, "sum", or "none" for one loss per image, which is a sum over all texts.
        normalize: True divides each row by max(||z||, 1e-12) like `torch.nn.functional.normalize` (by max(||z||,
            6.1e-5) in float16). False takes the rows as they are, and their products must not overflow.
        backend: "auto", which chooses one for the device, or a name from `backends()`.
        group: The ranks that hold the batch: "world" (the default process group, looked up at each call), a process
            group, a one-dimensional DeviceMesh, or a `Sharding`, which adds options. Each rank passes its own samples,
            any number of them, even none. Negatives come from all ranks. "mean" and "sum" cover the whole batch and are
            equal on every rank. Once DistributedDataParallel has averaged the parameters' gradients, these equal the
            gradients of one process with the whole batch. "none" returns this rank's losses. None: this rank's samples
            are the whole batch.

    Returns:
        A 0-d tensor, or (N,) for "none"; float64 for float64 features, else float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, dtypes or devices do not match, the batch is empty, a number is out of range, or an option
            is unknown, differs between ranks or cannot be combined with another.
        RuntimeError: the backend is not available here (the message says why), a rank of the group does not answer or
            is in a different call, or a second derivative is requested, which only backend="reference" without a group
            supports.

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
    """Return SigLIP's loss in an open batch, for a checked inverse temperature and bias."""
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
    r"""NT-Logistic: the logistic loss of every pair among the 2N rows of two views, one positive per row.

    .. math::
        \ell_i = \log(1 + e^{-s_{ip(i)}/\tau - b}) + \sum_{j : id_j \ne id_i} \log(1 + e^{s_{ij}/\tau + b})

    See Table 2 of Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020. Here the
    sum is over all negatives, and logits have a bias, which the paper does not have. The rows are [z_i; z_j], and p(i)
    is the other view of row i's sample.

    On the same device with the same number of threads, the same input gives the same bits. Extra memory is O(N D);
    the reference backend takes O(N^2).

    Args:
        z_i: (N, D) embeddings of the first view, float16, bfloat16, float32 or float64, with any strides. Row n belongs
            to sample n.
        z_j: (N, D) embeddings of the second view, with the shape, dtype and device of `z_i`. Row n belongs to sample n.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there.
        bias: b, a finite float or a 0-d floating-point tensor, which may require a gradient.
        ids: (N,) integers, the group of each sample. Samples of the same group are not negatives of each other, which
            removes false negatives. An id must mean the same on every rank. None: every other sample is a negative.
        reduction: "mean" over the 2N rows, "sum", or "none" for one loss per row.
        normalize: True divides each row by max(||z||, 1e-12) like `torch.nn.functional.normalize` (by max(||z||,
            6.1e-5) in float16). False takes the rows as they are, and their products must not overflow.
        backend: "auto", which chooses one for the device, or a name from `backends()`.
        group: The ranks that hold the batch: "world" (the default process group, looked up at each call), a process
            group, a one-dimensional DeviceMesh, or a `Sharding`, which adds options. Each rank passes its own samples,
            any number of them, even none. Negatives come from all ranks. "mean" and "sum" cover the whole batch and are
            equal on every rank. Once DistributedDataParallel has averaged the parameters' gradients, these equal the
            gradients of one process with the whole batch. "none" returns this rank's losses. None: this rank's samples
            are the whole batch.

    Returns:
        A 0-d tensor, or (2N,) in the order [z_i; z_j] for "none"; float64 for float64 embeddings, else float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, dtypes or devices do not match, the batch is empty, a number is out of range, or an option
            is unknown, differs between ranks or cannot be combined with another.
        RuntimeError: the backend is not available here (the message says why), a rank of the group does not answer or
            is in a different call, or a second derivative is requested, which only backend="reference" without a group
            supports.

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
