"""The losses as functions: conventions, reductions and the O(M D) formulas over the operators."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .backends import check_name as check_backend
from .backends.base import accumulation_dtype, row_losses
from .validation import check_ids, check_reduction, check_rows, check_same, check_temperature, check_views


class NTXentTerms(NamedTuple):
    """What `nt_xent_terms` returns; each a 0-d tensor."""

    alignment: Tensor
    distribution: Tensor
    loss: Tensor


class CrossNegLse(NamedTuple):
    """What `cross_neg_lse` returns: (M,) and (K,)."""

    rows: Tensor
    cols: Tensor


def nt_xent(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    reduction: str = "mean",
    normalize: bool = True,
    backend: str = "auto",
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
            accelerator is never read by the host, so its sign is the caller's care there.
        reduction: "mean" is the paper's 1/(2N), "sum", or "none".
        normalize: divide each row by max(||z||, 1e-12) (6.1e-5 for float16), as `torch.nn.functional.normalize`
            does. False takes the rows as they are, of any length.
        backend: "auto", or a name from `backends()`.

    Returns:
        A 0-d tensor, or (2N,) for "none", in the order [z_i; z_j]; float64 for float64 embeddings, else float32.
        Gradients come in the embeddings' own dtype.

    Raises:
        TypeError: an argument's type or dtype is not one of the above.
        ValueError: shapes, dtypes or devices of the views differ, a batch is empty, the temperature is not positive
            and finite, or the reduction or backend is unknown.
        RuntimeError: the backend asked for is not available here (the message says why), or a second derivative is
            taken: only backend="reference" has one.

    The same input gives the same bits each time, on one device and number of threads. Extra memory is O(N D); the
    reference backend's is O(N^2).

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(4)
        >>> fastntxent.nt_xent(z, z, temperature=1.0)  # log(e + 6) - 1
        tensor(1.1654)
    """
    check_views(z_i, z_j)
    check_reduction(reduction)
    check_backend(backend)
    inv_tau = _inverse(temperature, z_i)
    if reduction == "none":
        return row_losses(*ops.nt_xent_rows(z_i, z_j, inv_tau, normalize, backend))
    return ops.nt_xent_scalar(z_i, z_j, inv_tau, normalize, reduction == "mean", backend)


def nt_xent_terms(
    z_i: Tensor,
    z_j: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    normalize: bool = True,
    backend: str = "auto",
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
    check_views(z_i, z_j)
    check_backend(backend)
    inv_tau = _inverse(temperature, z_i)
    neg_lse, pos = ops.nt_xent_rows(z_i, z_j, inv_tau, normalize, backend)
    n_samples = z_i.shape[0]
    return NTXentTerms(
        alignment=-(pos / inv_tau).sum() / n_samples,
        distribution=torch.logaddexp(neg_lse, pos).sum() / (inv_tau * n_samples),
        loss=row_losses(neg_lse, pos).sum() / n_samples,
    )


def neg_lse(u: Tensor, ids: Tensor, temperature: float | Tensor, *, backend: str = "auto") -> Tensor:
    r"""Log-sum-exp of every row's similarities to the rows of other groups, the primitive of the whole family.

    .. math:: \nu_i = \log \sum_{j : id_j \ne id_i} e^{u_i \cdot u_j / \tau}

    With `ids` the sample index it gives NT-Xent's negatives; with unique ids it excludes only the row itself; with
    labels it removes false negatives.

    Args:
        u: (M, D) rows, float16, bfloat16, float32 or float64. They are taken as they are; a loss on cosine
            similarities passes unit rows.
        ids: (M,) integers on the device of u, in any order.
        temperature: as in `nt_xent`.
        backend: "auto", or a name from `backends()`.

    Returns:
        (M,), float64 for float64 rows, else float32; -inf, with a gradient of zero, for a row that has no row of
        another group. Differentiable in u and temperature.

    Errors, determinism and memory are those of `nt_xent`.

    Example:
        >>> import torch, fastntxent
        >>> fastntxent.neg_lse(torch.eye(3), torch.arange(3), temperature=1.0)  # log 2
        tensor([0.6931, 0.6931, 0.6931])
    """
    check_rows("u", u)
    check_ids("ids", ids, "u", u)
    check_backend(backend)
    return ops.neg_lse(u, ids, _inverse(temperature, u), backend)


def cross_neg_lse(
    u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, temperature: float | Tensor, *, backend: str = "auto"
) -> CrossNegLse:
    r"""`neg_lse` between two sets of rows, in both directions from one pass over their similarities.

    .. math::
        \nu^u_i = \log \sum_{j : id^v_j \ne id^u_i} e^{u_i \cdot v_j / \tau}, \qquad
        \nu^v_j = \log \sum_{i : id^u_i \ne id^v_j} e^{u_i \cdot v_j / \tau}

    What two towers (images and texts), queries against a queue of keys, and one rank's rows against all others' are
    made of. A side that needs no gradient, as a queue, costs none.

    Args:
        u: (M, D) rows, taken as they are; float16, bfloat16, float32 or float64.
        v: (K, D) rows of the same dtype and device.
        u_ids, v_ids: (M,) and (K,) integers on the rows' device: the groups of both sides.
        temperature: as in `nt_xent`.
        backend: "auto", or a name from `backends()`.

    Returns:
        A named tuple (rows, cols) of (M,) and (K,), float64 for float64 rows, else float32; -inf, with a gradient of
        zero, for a row to which the other side has no row of another group. Differentiable in u, v and temperature.

    Errors, determinism and memory are those of `nt_xent`.

    Example:
        >>> import torch, fastntxent
        >>> u, v = torch.eye(3), torch.ones(2, 3)
        >>> fastntxent.cross_neg_lse(u, v, torch.arange(3), torch.arange(2), temperature=1.0).rows  # 1, 1, log(2e)
        tensor([1.0000, 1.0000, 1.6931])
    """
    check_rows("u", u)
    check_rows("v", v)
    check_same("u", u, "v", v, "dtype", "device")
    if u.shape[1] != v.shape[1]:
        raise ValueError(f"u and v must have the same number of features, got {u.shape[1]} and {v.shape[1]}")
    check_ids("u_ids", u_ids, "u", u)
    check_ids("v_ids", v_ids, "v", v)
    check_backend(backend)
    return CrossNegLse(*ops.cross_neg_lse(u, v, u_ids, v_ids, _inverse(temperature, u), backend))


def _inverse(temperature: float | Tensor, rows: Tensor) -> Tensor:
    """1 / temperature as a 0-d tensor of the accumulation dtype."""
    check_temperature(temperature, rows)
    dtype = accumulation_dtype(rows.dtype)
    if not isinstance(temperature, Tensor):
        if torch.compiler.is_compiling():  # of a number as a factor it makes one graph, of a constant one each
            return torch.ones((), dtype=dtype, device="cpu") * (1.0 / temperature)
        return torch.scalar_tensor(1.0 / temperature, dtype=dtype, device="cpu")
    if temperature.requires_grad:  # its gradient is formed where the rows are
        temperature = temperature.to(rows.device)
    return temperature.to(dtype).reciprocal()
