"""The common base of the C++ and the CUDA backends, whose kernels compute a loss and its gradients in one call."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra import accumulation_dtype, loss_weight, weighted_sum
from ..sides import Side
from .base import Upstream
from .softplus import TiledSoftplus

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
FORWARD, BACKWARD = 1, 2
Matrix = tuple[int, int, int, int]  # address, number of rows, and two strides
SideAddresses = tuple[Matrix, Matrix, int, int, int, int, int]
_NO_MATRIX: Matrix = (0, 0, 0, 0)
_ACCUMULATED = {dtype: accumulation_dtype(dtype) for dtype in DTYPES}


class SideArguments(NamedTuple):
    """The arguments of a call for one side: `fntx_side` in csrc/cpu/fastntxent.h."""

    first: Tensor
    second: Tensor | None = None
    ids: Tensor | None = None
    neg_lse: Tensor | None = None
    d_neg_lse: Tensor | None = None
    d_first: Tensor | None = None
    d_second: Tensor | None = None

    def addresses(self) -> SideAddresses:
        """Return the addresses, sizes and strides in the order in which the extension modules take them."""
        first, second, ids, neg_lse, d_neg_lse, d_first, d_second = self
        return (
            _matrix(first),
            _NO_MATRIX if second is None else _matrix(second),
            address(ids),
            address(neg_lse),
            address(d_neg_lse),
            address(d_first),
            address(d_second),
        )


def address(x: Tensor | None) -> int:
    """Return the address of the first element, or 0 for None."""
    return 0 if x is None else x.data_ptr()


def count_rows(side: SideAddresses) -> int:
    """Return the total number of rows of both matrices."""
    return side[0][1] + side[1][1]


def _matrix(z: Tensor) -> Matrix:
    return (z.data_ptr(), z.size(0), *z.stride())  # type: ignore[return-value]  # two strides


class NativeBackend(TiledSoftplus):
    """A backend whose methods for neg_lse and NT-Xent all call one function, `run`."""

    @abstractmethod
    def run(
        self,
        phases: int,
        inv_tau: float | Tensor,
        normalize: bool,
        rows: SideArguments,
        *,
        cols: SideArguments | None = None,
        pos: Tensor | None = None,
        d_pos: Tensor | None = None,
        loss: Tensor | None = None,
        weight: float = 1.0,
        d_inv_tau: Tensor | None = None,
    ) -> None:
        """Call the kernels."""

    @abstractmethod
    def kernel_ids(self, *ids: Tensor) -> list[Tensor]:
        """Return the ids of one or two sides as the kernels take them: contiguous int64."""

    def neg_lse(self, rows: Side, inv_tau: float | Tensor) -> Tensor:
        neg_lse = new_sums(rows.u, rows.u.shape[0])
        self.run(FORWARD, inv_tau, False, SideArguments(rows.u, ids=self.kernel_ids(rows.ids)[0], neg_lse=neg_lse))
        return neg_lse

    def neg_lse_backward(self, rows: Side, inv_tau: float | Tensor, upstream: Upstream) -> tuple[Tensor, Tensor]:
        d_u, d_inv_tau = new_gradient(rows.u), new_sums(upstream.neg_lse)
        (ids,) = self.kernel_ids(rows.ids)
        self.run(BACKWARD, inv_tau, False, of_backward(rows.u, ids, upstream, d_u), d_inv_tau=d_inv_tau)
        return d_u, d_inv_tau

    def neg_lse_sum(self, rows: Side, inv_tau: float | Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u = rows.u
        d_u, neg_lse, d_inv_tau = new_gradient(u), new_sums(u, u.shape[0]), new_sums(u)
        given = SideArguments(u, None, self.kernel_ids(rows.ids)[0], neg_lse, weights.contiguous(), d_u)
        self.run(FORWARD | BACKWARD, inv_tau, False, given, d_inv_tau=d_inv_tau)
        # A dot product takes a quarter of `weighted_sum`'s time. It is right only if every row has a negative. If some
        # row has none, its nu is -inf, and the dot product is not finite.
        total = torch.dot(neg_lse, weights) if u.is_cpu else None
        if total is None or not math.isfinite(total):
            total = weighted_sum(neg_lse, weights)
        return total, d_u, d_inv_tau

    def cross_neg_lse(self, rows: Side, cols: Side, inv_tau: float | Tensor) -> tuple[Tensor, Tensor]:
        row_ids, col_ids = self.kernel_ids(rows.ids, cols.ids)
        nu_rows, nu_cols = new_sums(rows.u, rows.u.shape[0]), new_sums(cols.u, cols.u.shape[0])
        of_cols = SideArguments(cols.u, ids=col_ids, neg_lse=nu_cols)
        self.run(FORWARD, inv_tau, False, SideArguments(rows.u, ids=row_ids, neg_lse=nu_rows), cols=of_cols)
        return nu_rows, nu_cols

    def cross_neg_lse_backward(
        self, rows: Side, cols: Side, inv_tau: float | Tensor, of_rows: Upstream, of_cols: Upstream
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        row_ids, col_ids = self.kernel_ids(rows.ids, cols.ids)
        d_rows = new_gradient(rows.u) if of_rows.wanted else None
        d_cols = new_gradient(cols.u) if of_cols.wanted else None
        d_inv_tau = new_sums(of_rows.neg_lse)
        given = of_backward(rows.u, row_ids, of_rows, d_rows)
        given_cols = of_backward(cols.u, col_ids, of_cols, d_cols)
        self.run(BACKWARD, inv_tau, False, given, cols=given_cols, d_inv_tau=d_inv_tau)
        return d_rows, d_cols, d_inv_tau

    def nt_xent_rows(self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
        neg_lse = new_sums(z_i, 2 * z_i.shape[0])
        pos = torch.empty_like(neg_lse)
        self.run(FORWARD, inv_tau, normalize, SideArguments(z_i, z_j, neg_lse=neg_lse), pos=pos)
        return neg_lse, pos

    def nt_xent_rows_backward(
        self,
        d_neg_lse: Tensor,
        d_pos: Tensor,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: float | Tensor,
        neg_lse: Tensor,
        normalize: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        d_z_i, d_z_j, d_inv_tau = new_gradient(z_i), new_gradient(z_j), new_sums(neg_lse)
        rows = SideArguments(z_i, z_j, None, neg_lse.contiguous(), d_neg_lse.contiguous(), d_z_i, d_z_j)
        self.run(BACKWARD, inv_tau, normalize, rows, d_pos=d_pos.contiguous(), d_inv_tau=d_inv_tau)
        return d_z_i, d_z_j, d_inv_tau

    def nt_xent_value(self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool, mean: bool) -> Tensor:
        loss = new_sums(z_i)
        self.run(FORWARD, inv_tau, normalize, SideArguments(z_i, z_j), loss=loss, weight=loss_weight(z_i, mean))
        return loss

    def nt_xent_scalar(
        self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool, mean: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d_z_i, d_z_j, loss = new_gradient(z_i), new_gradient(z_j), new_sums(z_i)
        d_inv_tau = torch.empty_like(loss)
        rows = SideArguments(z_i, z_j, d_first=d_z_i, d_second=d_z_j)
        weight = loss_weight(z_i, mean)
        self.run(FORWARD | BACKWARD, inv_tau, normalize, rows, loss=loss, weight=weight, d_inv_tau=d_inv_tau)
        return loss, d_z_i, d_z_j, d_inv_tau


def of_backward(u: Tensor, ids: Tensor, upstream: Upstream, d_u: Tensor | None) -> SideArguments:
    """Return the arguments for one side of a backward."""
    return SideArguments(u, None, ids, upstream.neg_lse.contiguous(), upstream.d_neg_lse.contiguous(), d_u)


def new_gradient(of: Tensor) -> Tensor:
    """Return memory for the gradient of these rows."""
    return torch.empty_like(of, dtype=_ACCUMULATED[of.dtype], memory_format=torch.contiguous_format)


def new_sums(like: Tensor, *shape: int) -> Tensor:
    """Return memory of this shape for sums, in the accumulation dtype of `like`."""
    return like.new_empty(shape, dtype=_ACCUMULATED[like.dtype])
