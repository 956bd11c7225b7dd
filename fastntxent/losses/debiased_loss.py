"""Two losses that correct for false negatives; one of them also gives hard negatives more weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..algebra import row_losses
from ..distributed import Group
from ..opening import open_batch
from ..options import BackendName, Reduction
from ..scale import factor, scalar_like
from ..validation import check_parameter
from ..watching import watched


def debiased(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    tau_plus: float,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""The debiased contrastive loss: the sum over negatives, corrected for the false ones among them.

    .. math::
        L_i = \log(1 + G_i e^{-s_{i,p(i)}/\tau}), \quad
        G_i = \max( \frac{e^{\nu_i} - \tau^+ n\, e^{s_{i,p(i)}/\tau}}{1 - \tau^+}, n\, e^{-1/\tau} )

    Chuang et al., "Debiased Contrastive Learning", 2020. The rows are [z_i; z_j], p(i) is the other view of row i's
    sample, and nu_i is the log-sum-exp over the n = 2N - 2 negatives. For cosine similarities, tau_plus = 0 gives
    `nt_xent`, because exp(nu_i) never falls below the lower bound n exp(-1/tau). The bound assumes cosine similarities,
    even with normalize=False. With N = 1 there are no negatives and the loss is 0.

    On the same device with the same number of threads, the same input gives the same bits. Extra memory is O(N D);
    the reference backend takes O(N^2).

    Args:
        z_i: (N, D) embeddings of the first view, float16, bfloat16, float32 or float64, with any strides. Row n belongs
            to sample n.
        z_j: (N, D) embeddings of the second view, with the shape, dtype and device of `z_i`. Row n belongs to sample n.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there.
        tau_plus: The prior probability, in [0, 1), that a negative belongs to the row's own class.
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
        >>> fastntxent.debiased(z, z, temperature=1.0, tau_plus=0.1)  # log(1 + (6 - 0.6 e) / (0.9 e))
        tensor(1.0246)
    """
    return hard_negative(
        z_i,
        z_j,
        temperature,
        tau_plus=tau_plus,
        beta=0.0,
        reduction=reduction,
        normalize=normalize,
        backend=backend,
        group=group,
    )


@watched
def hard_negative(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    tau_plus: float,
    beta: float,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""HCL: the debiased loss with each negative weighted by how close it is to the row.

    .. math::
        L_i = \log(1 + G_i e^{-s_{i,p(i)}/\tau}), \quad
        G_i = \max( \frac{E_i - \tau^+ n\, e^{s_{i,p(i)}/\tau}}{1 - \tau^+}, n\, e^{-1/\tau} ), \quad
        E_i = \frac{\sum_j e^{(1 + \beta) s_{ij}/\tau}}{\frac{1}{n} \sum_j e^{\beta s_{ij}/\tau}}

    Robinson et al., "Contrastive Learning with Hard Negative Samples", 2021. The rows are [z_i; z_j], p(i) is the other
    view of row i's sample, and the sums run over the n = 2N - 2 negatives. Gradients flow through the weights too.
    With beta = 0 the loss is `debiased`. The lower bound n exp(-1/tau) assumes cosine similarities, even with
    normalize=False. With N = 1 there are no negatives and the loss is 0.

    On the same device with the same number of threads, the same input gives the same bits. Extra memory is O(N D);
    the reference backend takes O(N^2). beta > 0 doubles the time.

    Args:
        z_i: (N, D) embeddings of the first view, float16, bfloat16, float32 or float64, with any strides. Row n belongs
            to sample n.
        z_j: (N, D) embeddings of the second view, with the shape, dtype and device of `z_i`. Row n belongs to sample n.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there.
        tau_plus: The prior probability, in [0, 1), that a negative belongs to the row's own class.
        beta: The concentration on hard negatives, 0 or more.
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
        >>> z = torch.eye(4)  # all negatives alike: their weights are 1
        >>> fastntxent.hard_negative(z, z, temperature=1.0, tau_plus=0.1, beta=1.0)
        tensor(1.0246)
    """
    tau_plus = check_parameter("tau_plus", tau_plus)
    beta = check_parameter("beta", beta)
    batch = open_batch(
        group, "hard_negative", {"z_i": z_i, "z_j": z_j}, views=2, reduction=reduction, normalize=normalize,
        backend=backend, temperature=temperature, tau_plus=tau_plus, beta=beta,
    )  # fmt: skip
    inv_tau = batch.inverse_temperature(temperature)
    nu, pos = batch.nt_xent_rows(z_i, z_j, factor(inv_tau * (1 + beta), z_i))
    log_n = scalar_like(2 * batch.n_samples - 2, z_i).log()  # -inf without negatives, like nu
    if beta:
        pos = pos / (1 + beta)
        weights = batch.nt_xent_rows(z_i, z_j, factor(inv_tau * beta, z_i))[0]
        nu = nu - weights.masked_fill(weights == -torch.inf, 0) + log_n
    if tau_plus:
        nu = _without_false_negatives(nu, pos, tau_plus, log_n)
    nu = torch.maximum(nu, log_n - inv_tau)
    return batch.reduce(row_losses(nu, pos))


def _without_false_negatives(nu: Tensor, pos: Tensor, tau_plus: float, log_n: Tensor) -> Tensor:
    """Return log(e^nu - tau_plus n e^pi) - log(1 - tau_plus), or -inf where the first logarithm does not exist."""
    ratio = math.log(tau_plus) + log_n + pos - nu
    some = ratio < 0
    left = torch.log(-torch.expm1(ratio.masked_fill(~some, -1.0)))
    return torch.where(some, nu + left - math.log1p(-tau_plus), -torch.inf)
