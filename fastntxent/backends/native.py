"""What the C++ and the CUDA kernels share: each computes everything in one call, of one interface (csrc)."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from .base import KernelBackend, accumulation_dtype, loss_weight, weighted_sum

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
FORWARD, BACKWARD = 1, 2


class Side(NamedTuple):
    """One side of the similarity matrix, as csrc/cpu/fastntxent.h has it."""

    first: Tensor
    second: Tensor | None = None
    ids: Tensor | None = None
    neg_lse: Tensor | None = None
    d_neg_lse: Tensor | None = None
    d_first: Tensor | None = None
    d_second: Tensor | None = None

    def n_rows(self) -> int:
        """Rows of both matrices."""
        return self.first.shape[0] + (0 if self.second is None else self.second.shape[0])

    def pack(self) -> tuple[object, ...]:
        """As the modules take it."""
        vectors = (self.ids, self.neg_lse, self.d_neg_lse, self.d_first, self.d_second)
        return (_matrix(self.first), _matrix(self.second), *map(address, vectors))


def address(x: Tensor | None) -> int:
    """Of a tensor's first element; 0 for none."""
    return 0 if x is None else x.data_ptr()


def _matrix(z: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if z is None else (z.data_ptr(), z.shape[0], *z.stride())


class NativeBackend(KernelBackend):
    """Every method of a backend as a call."""

    @abstractmethod
    def run(
        self,
        phases: int,
        inv_tau: Tensor,
        normalize: bool,
        rows: Side,
        *,
        cols: Side | None = None,
        pos: Tensor | None = None,
        d_pos: Tensor | None = None,
        loss: Tensor | None = None,
        weight: float = 1.0,
        d_inv_tau: Tensor | None = None,
    ) -> None:
        """Make the call."""

    @abstractmethod
    def groups(self, *ids: Tensor) -> list[Tensor]:
        """Ids of one or two sides as the kernels take them: contiguous int64."""

    def neg_lse(self, u: Tensor, ids: Tensor, inv_tau: Tensor) -> Tensor:
        neg_lse = _new(u, u.shape[0])
        self.run(FORWARD, inv_tau, False, Side(u, ids=self.groups(ids)[0], neg_lse=neg_lse))
        return neg_lse

    def neg_lse_backward(
        self, d_neg_lse: Tensor, u: Tensor, ids: Tensor, inv_tau: Tensor, neg_lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        d_u, d_inv_tau = _gradient(u), _new(neg_lse)
        rows = Side(u, None, self.groups(ids)[0], neg_lse.contiguous(), d_neg_lse.contiguous(), d_u)
        self.run(BACKWARD, inv_tau, False, rows, d_inv_tau=d_inv_tau)
        return d_u, d_inv_tau

    def neg_lse_sum(self, u: Tensor, ids: Tensor, inv_tau: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d_u, neg_lse, d_inv_tau = _gradient(u), _new(u, u.shape[0]), _new(u)
        rows = Side(u, None, self.groups(ids)[0], neg_lse, weights.contiguous(), d_u)
        self.run(FORWARD | BACKWARD, inv_tau, False, rows, d_inv_tau=d_inv_tau)
        return weighted_sum(neg_lse, weights), d_u, d_inv_tau

    def cross_neg_lse(
        self, u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: Tensor
    ) -> tuple[Tensor, Tensor]:
        u_ids, v_ids = self.groups(u_ids, v_ids)
        nu_u, nu_v = _new(u, u.shape[0]), _new(v, v.shape[0])
        self.run(FORWARD, inv_tau, False, Side(u, ids=u_ids, neg_lse=nu_u), cols=Side(v, ids=v_ids, neg_lse=nu_v))
        return nu_u, nu_v

    def cross_neg_lse_backward(
        self,
        d_rows: Tensor,
        d_cols: Tensor,
        u: Tensor,
        v: Tensor,
        u_ids: Tensor,
        v_ids: Tensor,
        inv_tau: Tensor,
        rows_neg_lse: Tensor,
        cols_neg_lse: Tensor,
        needs_u: bool,
        needs_v: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        u_ids, v_ids = self.groups(u_ids, v_ids)
        d_u, d_v = _gradient(u) if needs_u else None, _gradient(v) if needs_v else None
        d_inv_tau = _new(rows_neg_lse)
        rows = Side(u, None, u_ids, rows_neg_lse.contiguous(), d_rows.contiguous(), d_u)
        cols = Side(v, None, v_ids, cols_neg_lse.contiguous(), d_cols.contiguous(), d_v)
        self.run(BACKWARD, inv_tau, False, rows, cols=cols, d_inv_tau=d_inv_tau)
        return d_u, d_v, d_inv_tau

    def nt_xent_rows(self, z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
        neg_lse = _new(z_i, 2 * z_i.shape[0])
        pos = torch.empty_like(neg_lse)
        self.run(FORWARD, inv_tau, normalize, Side(z_i, z_j, neg_lse=neg_lse), pos=pos)
        return neg_lse, pos

    def nt_xent_rows_backward(
        self,
        d_neg_lse: Tensor,
        d_pos: Tensor,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: Tensor,
        neg_lse: Tensor,
        normalize: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        d_z_i, d_z_j, d_inv_tau = _gradient(z_i), _gradient(z_j), _new(neg_lse)
        rows = Side(z_i, z_j, None, neg_lse.contiguous(), d_neg_lse.contiguous(), d_z_i, d_z_j)
        self.run(BACKWARD, inv_tau, normalize, rows, d_pos=d_pos.contiguous(), d_inv_tau=d_inv_tau)
        return d_z_i, d_z_j, d_inv_tau

    def nt_xent_value(self, z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, mean: bool) -> Tensor:
        loss = _new(z_i)
        self.run(FORWARD, inv_tau, normalize, Side(z_i, z_j), loss=loss, weight=loss_weight(z_i, mean))
        return loss

    def nt_xent_scalar(
        self, z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, mean: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d_z_i, d_z_j, loss = _gradient(z_i), _gradient(z_j), _new(z_i)
        d_inv_tau = torch.empty_like(loss)
        rows = Side(z_i, z_j, d_first=d_z_i, d_second=d_z_j)
        weight = loss_weight(z_i, mean)
        self.run(FORWARD | BACKWARD, inv_tau, normalize, rows, loss=loss, weight=weight, d_inv_tau=d_inv_tau)
        return loss, d_z_i, d_z_j, d_inv_tau


def _gradient(of: Tensor) -> Tensor:
    return torch.empty_like(of, dtype=accumulation_dtype(of.dtype), memory_format=torch.contiguous_format)


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=accumulation_dtype(like.dtype), device=like.device)
