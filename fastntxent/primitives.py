"""The primitive as a public function: log-sum-exp over the rows of other groups, of one set of rows or between two."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .opening import open_batch
from .options import BackendName
from .sides import Side
from .validation import check_features, check_ids, check_rows, check_same
from .watching import watched


class CrossNegLse(NamedTuple):
    """What `cross_neg_lse` returns: (M,) and (K,)."""

    rows: Tensor
    cols: Tensor


@watched
def neg_lse(u: Tensor, ids: Tensor, temperature: float | Tensor, *, backend: BackendName = "auto") -> Tensor:
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
    batch = open_batch(None, "neg_lse", {"u": u}, ids=ids, normalize=False, backend=backend)
    return batch.neg_lse(u, ids, batch.inverse_temperature(temperature))


@watched
def cross_neg_lse(
    u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, temperature: float | Tensor, *, backend: BackendName = "auto"
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
    batch = open_batch(None, "cross_neg_lse", {"u": u}, normalize=False, backend=backend)
    check_rows("v", v)
    check_same("u", u, "v", v, "dtype", "device")
    check_features("u", u, "v", v)
    check_ids("u_ids", u_ids, "u", u)
    check_ids("v_ids", v_ids, "v", v)
    return CrossNegLse(*batch.cross_neg_lse(Side(u, u_ids), Side(v, v_ids), batch.inverse_temperature(temperature)))
