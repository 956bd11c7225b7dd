"""Decoupled contrastive losses: the positive is not in the denominator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..algebra import in_double
from ..batch import Batch
from ..distributed import Group
from ..opening import open_batch
from ..options import BackendName, Reduction
from ..validation import check_positive_number
from ..watching import watched


@watched
def dcl(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""DCL: NT-Xent without the positive in its own denominator.

    .. math:: L_i = -s_{i,p(i)}/\tau + \log \sum_{j \ne i, p(i)} e^{s_{ij}/\tau}

    Yeh et al., "Decoupled Contrastive Learning", 2022. The rows are [z_i; z_j], and p(i) is the other view of row i's
    sample. A loss may be negative. With N = 1 there are no negatives and the loss is 0.

    On the same device with the same number of threads, the same input gives the same bits. Extra memory is O(N D);
    the reference backend takes O(N^2).

    Args:
        z_i: (N, D) embeddings of the first view, float16, bfloat16, float32 or float64, with any strides. Row n belongs
            to sample n.
        z_j: (N, D) embeddings of the second view, with the shape, dtype and device of `z_i`. Row n belongs to sample n.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there.
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
        >>> z = torch.eye(4)
        >>> fastntxent.dcl(z, z, temperature=1.0)  # log 6 - 1
        tensor(0.7918)
    """
    batch = open_batch(
        group, "dcl", {"z_i": z_i, "z_j": z_j}, views=2, reduction=reduction, normalize=normalize, backend=backend,
        temperature=temperature,
    )  # fmt: skip
    nu, pos = batch.nt_xent_rows(z_i, z_j, batch.inverse_temperature(temperature))
    return batch.reduce(_decoupled(nu, pos))


@watched
def dclw(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    sigma: float = 0.5,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""DCLW: DCL with a von Mises-Fisher weight that pulls hardest on the pairs that are furthest apart.

    .. math::
        L_i = -w_i s_{i,p(i)}/\tau + \log \sum_{j \ne i, p(i)} e^{s_{ij}/\tau}, \quad
        w_i = 2 - \frac{e^{s_{i,p(i)}/\sigma}}{\frac{1}{N} \sum_n e^{s_{n,p(n)}/\sigma}}

    Yeh et al., "Decoupled Contrastive Learning", 2022. The rows are [z_i; z_j], and p(i) is the other view of row i's
    sample. No gradient flows through the weights. A loss may be negative. With N = 1 there are no negatives and the
    loss is 0.

    On the same device with the same number of threads, the same input gives the same bits. Extra memory is O(N D);
    the reference backend takes O(N^2).

    Args:
        z_i: (N, D) embeddings of the first view, float16, bfloat16, float32 or float64, with any strides. Row n belongs
            to sample n.
        z_j: (N, D) embeddings of the second view, with the shape, dtype and device of `z_i`. Row n belongs to sample n.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there.
        sigma: The bandwidth of the weights, a positive float. The larger it is, the closer the weights are to 1.
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
        >>> z = torch.eye(4)
        >>> fastntxent.dclw(z, z, temperature=1.0)  # all pairs alike: every weight is 1
        tensor(0.7918)
    """
    sigma = check_positive_number("sigma", sigma)
    batch = open_batch(
        group, "dclw", {"z_i": z_i, "z_j": z_j}, views=2, reduction=reduction, normalize=normalize, backend=backend,
        temperature=temperature, sigma=sigma,
    )  # fmt: skip
    inv_tau = batch.inverse_temperature(temperature)
    nu, pos = batch.nt_xent_rows(z_i, z_j, inv_tau)
    weights = mises_fisher_weights(batch, pos[: z_i.shape[0]] / inv_tau, sigma)
    return batch.reduce(_decoupled(nu, weights.repeat(2) * pos))


def mises_fisher_weights(batch: Batch, sims: Tensor, sigma: float) -> Tensor:
    """Return 2 - exp(s_n / sigma) / mean_m exp(s_m / sigma), (N,), without a gradient. Small sigmas need float64."""
    wide = in_double(sims.detach())
    least = 4 * torch.finfo(wide.dtype).tiny  # a smaller sigma gives the same weights
    wide = wide / math.copysign(max(abs(sigma), least), sigma)
    return (2 - batch.n_samples * torch.exp(wide - batch.log_sum_exp(wide))).to(sims.dtype)


def _decoupled(nu: Tensor, pos: Tensor) -> Tensor:
    """Return nu - pi, or 0 for a row without negatives."""
    return torch.where(nu == -torch.inf, 0, nu - pos)
