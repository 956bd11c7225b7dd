"""RINCE, robust InfoNCE."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..algebra import accumulation_dtype, log_add, row_losses
from ..distributed import Group
from ..opening import open_batch
from ..options import BackendName, Reduction
from ..validation import check_parameter, extremes
from ..watching import watched


@watched
def rince(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    q: float = 0.5,
    lam: float = 0.01,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""RINCE: a loss that bounds what one wrongly paired row can contribute.

    .. math::
        L_i = -\frac{e^{q s_{i,p(i)}/\tau}}{q} + \frac{1}{q} ( \lambda \sum_{j \ne i} e^{s_{ij}/\tau} )^{q}

    Chuang et al., "Robust Contrastive Learning against Noisy Views", 2022. The rows are [z_i; z_j], and p(i) is the
    other view of row i's sample. q = 1 is fully robust and symmetric; as q tends to 0 the loss tends to InfoNCE plus
    log(lam), in which one positive can contribute without bound. The first power can reach exp(q / tau), which fits
    into float32 for q / tau < 88; the second can be (lam (2N - 1))^q times as large.

    On the same device with the same number of threads, the same input gives the same bits. Extra memory is O(N D);
    the reference backend takes O(N^2).

    Args:
        z_i: (N, D) embeddings of the first view, float16, bfloat16, float32 or float64, with any strides. Row n belongs
            to sample n.
        z_j: (N, D) embeddings of the second view, with the shape, dtype and device of `z_i`. Row n belongs to sample n.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there.
        q: The robustness, in (0, 1]. 1 is fully robust.
        lam: The weight of the denominator, in (0, 1).
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
            is unknown, differs between ranks or cannot be combined with another; or exp(q / temperature) overflows,
            which is not checked for a temperature on an accelerator.
        RuntimeError: the backend is not available here (the message says why), a rank of the group does not answer or
            is in a different call, or a second derivative is requested, which only backend="reference" without a group
            supports.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4)
        >>> fastntxent.rince(z, z, temperature=1.0, q=1.0, lam=0.5)  # -e + (e + 6) / 2
        tensor(1.6409)
    """
    q = check_parameter("q", q)
    lam = check_parameter("lam", lam)
    batch = open_batch(
        group, "rince", {"z_i": z_i, "z_j": z_j}, views=2, reduction=reduction, normalize=normalize, backend=backend,
        temperature=temperature, q=q, lam=lam,
    )  # fmt: skip
    inv_tau = batch.inverse_temperature(temperature)
    _check_powers(q, temperature, z_i.dtype)
    nu, pos = batch.nt_xent_rows(z_i, z_j, inv_tau)
    return batch.reduce(_difference_of_powers(nu, pos, q, lam))


def _check_powers(q: float, temperature: float | Tensor, dtype: torch.dtype) -> None:
    largest = math.log(torch.finfo(accumulation_dtype(dtype)).max)
    tau = min(extremes(temperature) or (math.inf,)) if isinstance(temperature, Tensor) else temperature
    if q / tau >= largest:
        raise ValueError(f"q / temperature must be below {largest:.1f}, where exp overflows, got {q} / {tau}")


def _difference_of_powers(nu: Tensor, pos: Tensor, q: float, lam: float) -> Tensor:
    """Return ((lam (exp(nu) + exp(pi)))^q - exp(q pi)) / q.

    The larger power is factored out. It may overflow where the difference does not, so its square root is multiplied in
    twice. The other factor is exp(-|r|) - 1, with r the logarithm of the ratio of the powers. Near r = 0 this factor is
    computed with expm1, so that the smallest q loses no accuracy. Elsewhere expm1 is not used, because autograd
    computes its derivative as 1 + expm1, which suffers from cancellation.
    """
    q = max(q, torch.finfo(pos.dtype).tiny ** 0.5)  # a smaller q gives the same bits, but its products underflow
    ratio = q * (math.log(lam) + row_losses(nu, pos))
    first = ratio > 0
    below = torch.where(first, -ratio, ratio)
    gap = torch.where(below > -1, torch.expm1(below), torch.exp(below) - 1) / q
    half = torch.exp(torch.where(first, math.log(lam) + log_add(nu, pos), pos) * (q / 2))
    return torch.where(first, -gap, gap) * half * half
