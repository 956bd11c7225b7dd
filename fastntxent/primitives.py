"""The primitive as public functions: log-sum-exp over the rows of other groups, in one set of rows or between two."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .opening import open_batch
from .options import BackendName
from .sides import Side
from .validation import check_features, check_ids, check_rows, check_same
from .watching import watched


class CrossNegLse(NamedTuple):
    """The log-sum-exps of both sides, as `cross_neg_lse` returns them.

    Attributes:
        rows: (M,), nu of each row of u against the rows of v; float64 for float64 rows, else float32.
        cols: (K,), nu of each row of v against the rows of u, in the same dtype.

    Example:
        >>> import torch, fastntxent
        >>> u, v = torch.eye(3), torch.ones(2, 3)
        >>> fastntxent.cross_neg_lse(u, v, torch.arange(3), torch.arange(2), temperature=1.0).cols  # log(2e)
        tensor([1.6931, 1.6931])
    """

    rows: Tensor
    cols: Tensor


@watched
def neg_lse(u: Tensor, ids: Tensor, temperature: float | Tensor, *, backend: BackendName = "auto") -> Tensor:
    r"""Log-sum-exp of each row's similarities to rows of other groups: the primitive behind all losses with a softmax.

    .. math:: \nu_i = \log \sum_{j : id_j \ne id_i} e^{u_i \cdot u_j / \tau}

    With sample indices as `ids`, the sum is over the negatives of NT-Xent. With unique ids, each row leaves out only
    itself. With labels, it leaves out its whole class, which removes false negatives.

    On the same device with the same number of threads, the same input gives the same bits. Extra memory is O(M D);
    the reference backend takes O(M^2).

    Args:
        u: (M, D) rows, float16, bfloat16, float32 or float64, taken as they are. For cosine similarities, pass unit
            rows.
        ids: (M,) integers on the device of `u`, the group of each row, in any order.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there.
        backend: "auto", which chooses one for the device, or a name from `backends()`.

    Returns:
        A tensor (M,), float64 for float64 rows, else float32. Every entry is -inf, with a gradient of zero, if all rows
        are of the same group. Differentiable with respect to `u` and `temperature`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, dtypes or devices do not match, the batch is empty, a number is out of range, or an option
            is unknown.
        RuntimeError: the backend is not available here (the message says why), or a second derivative is
            requested, which only backend="reference" supports.

    Example:
        >>> import torch, fastntxent
        >>> fastntxent.neg_lse(torch.eye(3), torch.arange(3), temperature=1.0)  # log 2
        tensor([0.6931, 0.6931, 0.6931])
    """
    batch = open_batch(None, "neg_lse", {"u": u}, ids=ids, normalize=False, backend=backend)
    return batch.neg_lse(u, ids, batch.inverse_temperature(temperature))


@watched
def cross_neg_lse(
    u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, temperature: float | Tensor, *, backend: BackendName = "auto"
) -> CrossNegLse:
    r"""`neg_lse` between two sets of rows, in both directions from one pass over their similarities.

    .. math::
        \nu^u_i = \log \sum_{j : id^v_j \ne id^u_i} e^{u_i \cdot v_j / \tau}, \quad
        \nu^v_j = \log \sum_{i : id^u_i \ne id^v_j} e^{u_i \cdot v_j / \tau}

    Losses use it between two towers (images and texts), between queries and a queue of keys, and between one rank's
    rows and all other rows. No gradient is computed for a side that does not need one, such as a queue.

    On the same device with the same number of threads, the same input gives the same bits. Extra memory is O((M +
    K) D); the reference backend takes O(M K).

    Args:
        u: (M, D) rows, float16, bfloat16, float32 or float64, taken as they are. For cosine similarities, pass unit
            rows.
        v: (K, D) rows with the dtype and device of `u`.
        u_ids: (M,) integers on the device of `u`, the group of each row of `u`.
        v_ids: (K,) integers on the device of `v`, the group of each row of `v`.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there.
        backend: "auto", which chooses one for the device, or a name from `backends()`.

    Returns:
        A named tuple (rows, cols) of tensors (M,) and (K,), float64 for float64 rows, else float32. An entry is -inf,
        with a gradient of zero, where all rows of the other side are of the same group as the row. Differentiable with
        respect to `u`, `v` and `temperature`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, dtypes or devices do not match, the batch is empty, a number is out of range, or an option
            is unknown.
        RuntimeError: the backend is not available here (the message says why), or a second derivative is
            requested, which only backend="reference" supports.

    Example:
        >>> import torch, fastntxent
        >>> u, v = torch.eye(3), torch.ones(2, 3)
        >>> fastntxent.cross_neg_lse(u, v, torch.arange(3), torch.arange(2), temperature=1.0).rows  # 1, 1, log(2e)
        tensor([1.0000, 1.0000, 1.6931])
    """
    batch = open_batch(None, "cross_neg_lse", {"u": u}, normalize=False, backend=backend)
    check_rows("v", v)
    check_same("u", u, "v", v, "dtype", "device")
    check_features("u", u, "v", v)
    check_ids("u_ids", u_ids, "u", u)
    check_ids("v_ids", v_ids, "v", v)
    return CrossNegLse(*batch.cross_neg_lse(Side(u, u_ids), Side(v, v_ids), batch.inverse_temperature(temperature)))
