"""The backend that calls the kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ...algebra import loss_weight, norm_eps, weighted_sum
from ...sides import Side
from ..base import Upstream
from ..towers import ComposedTowers
from . import config
from .backward import gradient
from .forward import log_sum_exps, losses
from .launch import Work, repeated, warming
from .pack import Packed, pack_rows
from .sides import Sides, make_sides
from .tiles import INTERPRETED
from .weights import scale, survey

if not INTERPRETED and not torch.cuda.is_available():
    raise RuntimeError("no CUDA device here; under TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly")


class TritonBackend(ComposedTowers):
    """The kernels of this package."""

    device_types = ("cuda", "cpu") if INTERPRETED else ("cuda",)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)

    def forms(self, device: torch.device, dtype: torch.dtype) -> Sequence[str]:
        return config.forms(device, dtype)

    def setting(self, dtype: torch.dtype) -> Hashable:
        """What launches follow from that no argument says."""
        return _takes_tf32(dtype), config.forced_now()

    def forced(self, form: str) -> contextlib.AbstractContextManager[None]:
        return config.forced(form)

    def warming(self) -> contextlib.AbstractContextManager[None]:
        return warming()

    @repeated
    def neg_lse(self, work: Work, rows: Side, inv_tau: float | Tensor) -> Tensor:
        (nu,) = log_sum_exps(_one_side(work, rows, inv_tau))
        return nu

    @repeated
    def neg_lse_backward(
        self, work: Work, rows: Side, inv_tau: float | Tensor, upstream: Upstream
    ) -> tuple[Tensor, Tensor]:
        sides = _one_side(work, rows, inv_tau)
        found = gradient(sides, scale(sides, survey(sides, upstream)))
        return found.d_first, found.d_inv_tau

    def neg_lse_sum(self, rows: Side, inv_tau: float | Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        neg_lse = self.neg_lse(rows, inv_tau)
        d_u, d_inv_tau = self.neg_lse_backward(rows, inv_tau, Upstream(weights, neg_lse))
        return weighted_sum(neg_lse, weights), d_u, d_inv_tau

    @repeated
    def cross_neg_lse(self, work: Work, rows: Side, cols: Side, inv_tau: float | Tensor) -> tuple[Tensor, Tensor]:
        nu_rows, nu_cols = log_sum_exps(_two_sides(work, rows, cols, inv_tau))
        return nu_rows, nu_cols

    @repeated
    def cross_neg_lse_backward(
        self, work: Work, rows: Side, cols: Side, inv_tau: float | Tensor, of_rows: Upstream, of_cols: Upstream
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        sides = _two_sides(work, rows, cols, inv_tau)
        weights = scale(sides, survey(sides, of_rows, of_cols))
        d_rows = d_cols = None
        if of_cols.wanted:
            d_cols, _, d_inv_tau, _ = gradient(sides.swapped(), weights.swapped())
        if of_rows.wanted or not of_cols.wanted:  # either side's sum is the temperature's gradient
            d_rows, _, d_inv_tau, _ = gradient(sides, weights)
        return d_rows if of_rows.wanted else None, d_cols, d_inv_tau

    @repeated
    def nt_xent_rows(
        self, work: Work, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool
    ) -> tuple[Tensor, Tensor]:
        sides = _two_views(work, z_i, z_j, inv_tau, normalize)
        (nu,) = log_sum_exps(sides)
        return nu, inv_tau * sides.rows.sim_pos[: sides.rows.n]

    @repeated
    def nt_xent_rows_backward(
        self,
        work: Work,
        d_neg_lse: Tensor,
        d_pos: Tensor,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: float | Tensor,
        neg_lse: Tensor,
        normalize: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sides, d_pos = _two_views(work, z_i, z_j, inv_tau, normalize), d_pos.contiguous()
        weights = survey(sides, Upstream(d_neg_lse, neg_lse), d_pos=d_pos)
        found = gradient(sides, scale(sides, weights), d_pos=d_pos)
        return found.d_first, found.d_second, found.d_inv_tau

    @repeated
    def nt_xent_value(
        self, work: Work, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool, mean: bool
    ) -> Tensor:
        _, totals = losses(_two_views(work, z_i, z_j, inv_tau, normalize))
        return totals.sum() * loss_weight(z_i, mean)

    @repeated
    def nt_xent_scalar(
        self, work: Work, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool, mean: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sides = _two_views(work, z_i, z_j, inv_tau, normalize)
        weights, totals = losses(sides)
        weight, q = loss_weight(z_i, mean), weights.of_rows.d_neg_lse
        found = gradient(sides, scale(sides, weights), d_pos=q, weight=weight, pos_factor=-weight, totals=totals)
        return found.loss, found.d_first, found.d_second, found.d_inv_tau


def _two_views(work: Work, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool) -> Sides:
    tf32, eps = _takes_tf32(z_i.dtype), norm_eps(z_i.dtype)
    rows = pack_rows(work, z_i, z_j, normalize=normalize, eps=eps, tf32=tf32)
    return make_sides(work, rows, rows, inv_tau)


def _one_side(work: Work, rows: Side, inv_tau: float | Tensor) -> Sides:
    packed = _pack_side(work, rows)
    return make_sides(work, packed, packed, inv_tau)


def _two_sides(work: Work, rows: Side, cols: Side, inv_tau: float | Tensor) -> Sides:
    return make_sides(work, _pack_side(work, rows), _pack_side(work, cols), inv_tau)


def _pack_side(work: Work, side: Side) -> Packed:
    dtype = side.u.dtype
    return pack_rows(work, side.u, ids=side.ids, normalize=False, eps=norm_eps(dtype), tf32=_takes_tf32(dtype))


def _takes_tf32(dtype: torch.dtype) -> bool:
    """Whether PyTorch's own products of such rows are in TF32. Triton has it on NVIDIA's chips."""
    if dtype != torch.float32 or torch.version.hip:
        return False
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    if precision == "none":  # an older PyTorch, or nothing said of this backend
        return torch.get_float32_matmul_precision() != "highest"
    return bool(precision == "tf32")


BACKEND = TritonBackend()
