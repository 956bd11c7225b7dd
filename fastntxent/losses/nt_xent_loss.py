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
    """What `nt_xent_terms` returns; each a 0-d tensor."""

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
    r"""NT-Xent, the loss of SimCLR: for each of the 2N rows, pick its other view among all other rows.

    .. math::
        L = \frac{1}{2N} \sum_{i=1}^{2N} \Big[ \log \sum_{k \ne i} e^{s_{ik}/\tau} - s_{i,p(i)}/\tau \Big],
        \qquad s_{ik} = \frac{z_i \cdot z_k}{\|z_i\| \|z_k\|}

    Equation 1 of Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020: the
    positive stays in the denominator. With N = 1 there are no negatives and the loss is 0.

    Args:
        z_i, z_j: (N, D) embeddings of the two views; row n of both belongs to sample n. float16, bfloat16, float32
            or float64, on one device, with any strides. `split_views` makes them from one tensor.
        temperature: tau > 0, a float or a 0-d floating tensor, which may require a gradient. A tensor on an
            accelerator is never read by the host, so its sign is the caller's care there. A tensor (2N,) is one
            temperature for each row, in the order [z_i; z_j], and twice the work.
        ids: (N,) integers, a label or group of each sample: samples of the same group are no negatives of each other
            (false negatives removed). None: every other sample is a negative.
        label_smoothing: in [0, 1): so much of the target is spread evenly over the positive and the negatives, as
            `torch.nn.functional.cross_entropy` does.
        margin, relative_margin, ceiling: false negatives removed by their similarity: a negative that is more similar
            to row i than its limit leaves row i's sum. The limit is s_i,pos - margin, or (1 - relative_margin) s_i,pos
            with relative_margin in [0, 1], or the ceiling; the smaller one where there are two. None: no limit. What is
            as similar as the limit, up to rounding, stays, and so does a NaN. No gradient goes through the choice.
        reduction: "mean" is the paper's 1/(2N), "sum", or "none".
        normalize: divide each row by max(||z||, 1e-12) (6.1e-5 for float16), as `torch.nn.functional.normalize`
            does, for float32 and bfloat16 rows of any finite length and for float64 up to 1e154, where their squares
            overflow. False takes the rows as they are, and their products must not overflow.
        backend: "auto", or a name from `backends()`.
        group: the ranks over which the batch is spread: "world" (the default process group, looked up at each call), a
            process group, a DeviceMesh of one dimension, or a `Sharding` of one, with options. Each rank passes its own
            samples, of any number, also none; ids are the same labels on every rank. Negatives are those of all ranks,
            "mean" and "sum" are the whole batch's on every rank, and "none" gives this rank's rows. After
            DistributedDataParallel's averaging the parameters' gradient is that of one process with the whole batch.
            None: this rank's samples are the batch.

    Returns:
        A 0-d tensor, or (2N,) for "none", in the order [z_i; z_j]; float64 for float64 embeddings, else float32.
        Gradients come in the embeddings' own dtype.

    Raises:
        TypeError: an argument's type or dtype is not one of the above.
        ValueError: shapes, dtypes or devices of the views differ, a batch is empty, the temperature is not positive
            and finite, or the reduction or backend is unknown.
        RuntimeError: the backend asked for is not available here (the message says why), or a second derivative is
            taken: only backend="reference" has one, and no `group`. Or a rank of the group does not answer.

    The same input gives the same bits each time, on one device and number of threads. Extra memory is O(N D); the
    reference backend's is O(N^2).

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
    r"""NT-Xent taken apart into what pulls views together and what keeps the embeddings from collapsing.

    .. math::
        \tau L = L_a + L_d, \qquad
        L_a = -\frac{1}{N} \sum_{i=1}^{2N} s_{i,p(i)}, \qquad
        L_d = \frac{\tau}{N} \sum_{i=1}^{2N} \log \sum_{k \ne i} e^{s_{ik}/\tau}

    The convention is 1/N over the 2N rows, so `loss` is twice the mean of `nt_xent`. Alignment and distribution as
    in Wang & Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere", 2020.

    All three are differentiable in the embeddings and the temperature, so that a term can be weighed or dropped.
    To train on their plain sum, take `loss`: once training has converged the two terms' gradients nearly cancel,
    and only `loss` forms their difference before it is rounded.

    Args, errors, determinism and memory are those of `nt_xent`.

    Returns:
        A named tuple (alignment, distribution, loss) of 0-d tensors, float64 for float64 embeddings, else float32.

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
