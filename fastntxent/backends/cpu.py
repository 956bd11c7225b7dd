"""The C++ kernels of csrc/cpu: normalisation, tiles of the upper triangle, loss and every gradient in one call.

The schedule is that of `blocked`, on register tiles: u/2 flops forward and 3u/2 backward, of which a bounded workspace
of exponentials saves u/2 for the tiles that fit (u = 2 M^2 D). Memory beside it is three (M, D) matrices. Threads are
PyTorch's: `torch.set_num_threads` holds here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import fastntxent._cpu as _cpu  # type: ignore[import-not-found]  # by its full name: the package is still loading

from .base import KernelBackend, accumulation_dtype, loss_weight, norm_eps, weighted_sum

_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_FORWARD, _BACKWARD = 1, 2

# Bytes of exponentials kept from the forward to the backward of one call. Those of N = 4096 fit, and nothing is held
# between calls.
WORKSPACE = 144 * 2**20


class _Side(NamedTuple):
    """One side of the similarity matrix, as csrc/cpu/fastntxent.h has it."""

    first: Tensor
    second: Tensor | None = None
    ids: Tensor | None = None
    neg_lse: Tensor | None = None
    d_neg_lse: Tensor | None = None
    d_first: Tensor | None = None
    d_second: Tensor | None = None

    def pack(self) -> tuple[object, ...]:
        vectors = (self.ids, self.neg_lse, self.d_neg_lse, self.d_first, self.d_second)
        return (_matrix(self.first), _matrix(self.second), *map(_address, vectors))


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _matrix(z: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if z is None else (z.data_ptr(), z.shape[0], *z.stride())


def _run(
    phases: int,
    inv_tau: Tensor,
    normalize: bool,
    rows: _Side,
    *,
    cols: _Side | None = None,
    pos: Tensor | None = None,
    d_pos: Tensor | None = None,
    loss: Tensor | None = None,
    weight: float = 1.0,
    d_inv_tau: Tensor | None = None,
) -> None:
    z = rows.first
    _cpu.run(
        phases,
        _DTYPES[z.dtype],
        normalize,
        torch.get_num_threads(),
        z.shape[1],
        inv_tau.item(),
        norm_eps(z.dtype),
        rows.pack(),
        None if cols is None else cols.pack(),
        _address(pos),
        _address(d_pos),
        _address(loss),
        weight,
        _address(d_inv_tau),
        WORKSPACE,
    )


def _dense(*ids: Tensor) -> Sequence[Tensor]:
    """The same groups as contiguous int64 in [0, 2^31)."""
    if any(low < 0 or high >= 2**31 for low, high in (each.aminmax() for each in ids)):
        codes = torch.unique(torch.cat([each.to(torch.int64) for each in ids]), return_inverse=True)[1]
        ids = codes.split([len(each) for each in ids])
    return [each.to(torch.int64).contiguous() for each in ids]


class CpuBackend(KernelBackend):
    """csrc/cpu on CPU tensors."""

    def neg_lse(self, u: Tensor, ids: Tensor, inv_tau: Tensor) -> Tensor:
        neg_lse = u.new_empty(u.shape[0], dtype=accumulation_dtype(u.dtype))
        _run(_FORWARD, inv_tau, False, _Side(u, ids=_dense(ids)[0], neg_lse=neg_lse))
        return neg_lse

    def neg_lse_backward(
        self, d_neg_lse: Tensor, u: Tensor, ids: Tensor, inv_tau: Tensor, neg_lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        d_u, d_inv_tau = _gradient_of(u), neg_lse.new_empty(())
        rows = _Side(u, None, _dense(ids)[0], neg_lse.contiguous(), d_neg_lse.contiguous(), d_u)
        _run(_BACKWARD, inv_tau, False, rows, d_inv_tau=d_inv_tau)
        return d_u, d_inv_tau

    def neg_lse_sum(self, u: Tensor, ids: Tensor, inv_tau: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d_u, neg_lse = _gradient_of(u), torch.empty(u.shape[0], dtype=accumulation_dtype(u.dtype))
        d_inv_tau = neg_lse.new_empty(())
        rows = _Side(u, None, _dense(ids)[0], neg_lse, weights.contiguous(), d_u)
        _run(_FORWARD | _BACKWARD, inv_tau, False, rows, d_inv_tau=d_inv_tau)
        return weighted_sum(neg_lse, weights), d_u, d_inv_tau

    def cross_neg_lse(
        self, u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: Tensor
    ) -> tuple[Tensor, Tensor]:
        u_ids, v_ids = _dense(u_ids, v_ids)
        nu_u, nu_v = (torch.empty(x.shape[0], dtype=accumulation_dtype(x.dtype)) for x in (u, v))
        _run(_FORWARD, inv_tau, False, _Side(u, ids=u_ids, neg_lse=nu_u), cols=_Side(v, ids=v_ids, neg_lse=nu_v))
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
        u_ids, v_ids = _dense(u_ids, v_ids)
        d_u, d_v = _gradient_of(u) if needs_u else None, _gradient_of(v) if needs_v else None
        d_inv_tau = rows_neg_lse.new_empty(())
        rows = _Side(u, None, u_ids, rows_neg_lse.contiguous(), d_rows.contiguous(), d_u)
        cols = _Side(v, None, v_ids, cols_neg_lse.contiguous(), d_cols.contiguous(), d_v)
        _run(_BACKWARD, inv_tau, False, rows, cols=cols, d_inv_tau=d_inv_tau)
        return d_u, d_v, d_inv_tau

    def nt_xent_rows(self, z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
        neg_lse = torch.empty(2 * z_i.shape[0], dtype=accumulation_dtype(z_i.dtype))
        pos = torch.empty_like(neg_lse)
        _run(_FORWARD, inv_tau, normalize, _Side(z_i, z_j, neg_lse=neg_lse), pos=pos)
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
        d_z_i, d_z_j, d_inv_tau = _gradient_of(z_i), _gradient_of(z_j), neg_lse.new_empty(())
        rows = _Side(z_i, z_j, None, neg_lse.contiguous(), d_neg_lse.contiguous(), d_z_i, d_z_j)
        _run(_BACKWARD, inv_tau, normalize, rows, d_pos=d_pos.contiguous(), d_inv_tau=d_inv_tau)
        return d_z_i, d_z_j, d_inv_tau

    def nt_xent_value(self, z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, mean: bool) -> Tensor:
        loss = torch.empty((), dtype=accumulation_dtype(z_i.dtype))
        _run(_FORWARD, inv_tau, normalize, _Side(z_i, z_j), loss=loss, weight=loss_weight(z_i, mean))
        return loss

    def nt_xent_scalar(
        self, z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, mean: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d_z_i, d_z_j = _gradient_of(z_i), _gradient_of(z_j)
        loss, d_inv_tau = d_z_i.new_empty(()), d_z_i.new_empty(())
        rows = _Side(z_i, z_j, d_first=d_z_i, d_second=d_z_j)
        weight = loss_weight(z_i, mean)
        _run(_FORWARD | _BACKWARD, inv_tau, normalize, rows, loss=loss, weight=weight, d_inv_tau=d_inv_tau)
        return loss, d_z_i, d_z_j, d_inv_tau


def _gradient_of(z: Tensor) -> Tensor:
    return torch.empty(z.shape, dtype=accumulation_dtype(z.dtype))


BACKEND = CpuBackend()
