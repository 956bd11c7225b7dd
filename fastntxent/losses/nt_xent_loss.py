"""NT-Xent, the loss of SimCLR, and its two terms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra import row_losses
from ..distributed import Group
from ..opening import open_batch
from ..options import BackendName, Reduction
from ..scale import is_per_row
from ..validation import check_parameter
from ..watching import watched
from .false_negatives import Limits
from .multiview_loss import multiview_losses, stack_views


class NTXentTerms(NamedTuple):
    """The two terms of NT-Xent and the loss, as `nt_xent_terms` returns them.

    Attributes:
        alignment: L_a, a 0-d tensor. It pulls the two views of a sample together.
        distribution: L_d, a 0-d tensor. It keeps all rows apart.
        loss: L = (L_a + L_d) / tau, a 0-d tensor: twice the mean of `nt_xent`.

    Example:
        >>> import torch, fastntxent
        >>> terms = fastntxent.nt_xent_terms(torch.eye(4), torch.eye(4), temperature=1.0)
        >>> terms.loss  # 2 (log(e + 6) - 1)
        tensor(2.3308)
    """

    alignment: Tensor
    distribution: Tensor
    loss: Tensor


@watched
def nt_xent(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    margin: float | None = None,
    relative_margin: float | None = None,
    ceiling: float | None = None,
    reduction: Reduction = "mean",
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> Tensor:
    r"""NT-Xent, the loss of SimCLR: each of the 2N rows picks its other view among all other rows.

    .. math::
        L = \frac{1}{2N} \sum_{i=1}^{2N} [ \log \sum_{k \ne i} e^{s_{ik}/\tau} - s_{i,p(i)}/\tau ], \quad
        s_{ik} = \frac{z_i \cdot z_k}{\|z_i\| \|z_k\|}

    Equation 1 of Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020. The rows
    are [z_i; z_j], and p(i) is the other view of row i's sample. The positive stays in the denominator. With N = 1
    there are no negatives and the loss is 0.

    The options `margin`, `relative_margin` and `ceiling` leave a negative out only if its similarity exceeds the limit
    by more than rounding. A negative whose similarity is NaN stays in. No gradient flows through the choice of
    negatives.

    With `normalize`, float16, bfloat16 and float32 rows may have any finite length, and float64 rows a length of up to
    1e154, beyond which their squares overflow. `split_views` makes `z_i` and `z_j` from one tensor. Gradients have the
    dtype of the embeddings.

    On the same device with the same number of threads, the same input gives the same bits. Extra memory is O(N D);
    the reference backend takes O(N^2).

    Args:
        z_i: (N, D) embeddings of the first view, float16, bfloat16, float32 or float64, with any strides. Row n belongs
            to sample n.
        z_j: (N, D) embeddings of the second view, with the shape, dtype and device of `z_i`. Row n belongs to sample n.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. A tensor (2N,) holds one temperature per
            row, in the order [z_i; z_j], and doubles the work.
        ids: (N,) integers, the group of each sample. Samples of the same group are not negatives of each other, which
            removes false negatives. An id must mean the same on every rank. None: every other sample is a negative.
        label_smoothing: The share of the target, in [0, 1), that is spread evenly over the positive and the negatives,
            as in `torch.nn.functional.cross_entropy`.
        margin: Leave a negative out of row i's sum where its similarity to row i is above s_pos - margin, with s_pos
            the similarity of row i to its positive. A finite float; None sets no limit. Cannot be combined with
            `relative_margin` or `label_smoothing`.
        relative_margin: Leave a negative out of row i's sum where its similarity to row i is above (1 -
            relative_margin) s_pos. A float in [0, 1]; None sets no limit. Cannot be combined with `margin` or
            `label_smoothing`.
        ceiling: Leave a negative out of row i's sum where its similarity to row i is above this finite float. If there
            is also a margin, the smaller limit applies. None sets no limit. Cannot be combined with `label_smoothing`.
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
        >>> fastntxent.nt_xent(z, z, temperature=1.0)  # log(e + 6) - 1
        tensor(1.1654)
    """
    label_smoothing = check_parameter("label_smoothing", label_smoothing)
    limits = Limits.checked(margin, relative_margin, ceiling, label_smoothing)
    batch = open_batch(
        group, "nt_xent", {"z_i": z_i, "z_j": z_j}, ids=ids, views=2, reduction=reduction, normalize=normalize,
        backend=backend, temperature=temperature, label_smoothing=label_smoothing, limits=limits,
    )  # fmt: skip
    inv_tau = batch.inverse_temperature(temperature, per_row=2 * z_i.shape[0])
    if ids is None and not label_smoothing and not is_per_row(inv_tau):
        if limits is None:
            return batch.nt_xent(z_i, z_j, inv_tau)
        by_positive = limits.by_positive(z_i, normalize)
        loss = None if by_positive is None else batch.limited_nt_xent_at_once(z_i, z_j, inv_tau, *by_positive)
        if loss is not None:
            return loss
    return batch.reduce(multiview_losses(batch, stack_views((z_i, z_j)), inv_tau, ids, label_smoothing, limits))


@watched
def nt_xent_terms(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    normalize: bool = True,
    backend: BackendName = "auto",
    group: Group | None = None,
) -> NTXentTerms:
    r"""NT-Xent as two terms: one pulls views together, the other keeps the embeddings from collapsing.

    .. math::
        \tau L = L_a + L_d, \quad
        L_a = -\frac{1}{N} \sum_{i=1}^{2N} s_{i,p(i)}, \quad
        L_d = \frac{\tau}{N} \sum_{i=1}^{2N} \log \sum_{k \ne i} e^{s_{ik}/\tau}

    Alignment and distribution follow Wang & Isola, "Understanding Contrastive Representation Learning through Alignment
    and Uniformity on the Hypersphere", 2020. The sums over the 2N rows are divided by N, so `loss` is twice the mean of
    `nt_xent`.

    Both terms and the loss are differentiable with respect to the embeddings and the temperature, so a term can be
    weighted or dropped. To train on the plain sum of both terms, use `loss`. Near convergence the gradients of the two
    terms nearly cancel, so their sum loses accuracy to rounding. The gradient of `loss` does not.

    On the same device with the same number of threads, the same input gives the same bits. Extra memory is O(N D);
    the reference backend takes O(N^2).

    Args:
        z_i: (N, D) embeddings of the first view, float16, bfloat16, float32 or float64, with any strides. Row n belongs
            to sample n.
        z_j: (N, D) embeddings of the second view, with the shape, dtype and device of `z_i`. Row n belongs to sample n.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there.
        normalize: True divides each row by max(||z||, 1e-12) like `torch.nn.functional.normalize` (by max(||z||,
            6.1e-5) in float16). False takes the rows as they are, and their products must not overflow.
        backend: "auto", which chooses one for the device, or a name from `backends()`.
        group: The ranks that hold the batch: "world" (the default process group, looked up at each call), a process
            group, a one-dimensional DeviceMesh, or a `Sharding`, which adds options. Each rank passes its own samples,
            any number of them, even none. Negatives come from all ranks. The terms cover the whole batch and are equal
            on every rank. Once DistributedDataParallel has averaged the parameters' gradients, these equal the
            gradients of one process with the whole batch. None: this rank's samples are the whole batch.

    Returns:
        A named tuple (alignment, distribution, loss) of 0-d tensors, float64 for float64 embeddings, else float32.

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
        >>> terms = fastntxent.nt_xent_terms(z, z, temperature=1.0)
        >>> terms.alignment, terms.distribution  # -2, and 2 log(e + 6)
        (tensor(-2.), tensor(4.3308))
    """
    batch = open_batch(
        group, "nt_xent_terms", {"z_i": z_i, "z_j": z_j}, views=2, normalize=normalize, backend=backend,
        temperature=temperature,
    )  # fmt: skip
    inv_tau = batch.inverse_temperature(temperature)
    nu, pos = batch.nt_xent_rows(z_i, z_j, inv_tau)
    return NTXentTerms(
        alignment=-batch.total(pos / inv_tau) / batch.n_samples,
        distribution=batch.total(torch.logaddexp(nu, pos) / inv_tau) / batch.n_samples,
        loss=batch.total(row_losses(nu, pos)) / batch.n_samples,
    )
