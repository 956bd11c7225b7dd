"""The `triton` backend, which calls the kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ...algebra import loss_weight, norm_eps, weighted_sum
from ...sides import Side
from ..base import PairSums, SumWeights, Upstream
from ..softplus import sigmoid_weight
from ..towers import ComposedTowers
from . import config
from .backward import gradient
from .forward import log_sum_exps, losses
from .launch import Work, repeated, warming
from .pack import Packed, pack_rows
from .sides import Limits, Sides, make_sides, unbounded_sides
from .softplus import Pairs, end_pairs, form_pairs
from .tiles import INTERPRETED
from .unpack import unpack_gradients
from .weights import scale, survey

if not INTERPRETED and not torch.cuda.is_available():
    raise RuntimeError(
        "no CUDA device is available; with TRITON_INTERPRET=1 the kernels run on CPU tensors, but slowly"
    )


class TritonBackend(ComposedTowers):
    """The backend that calls the Triton kernels."""

    device_types = ("cuda", "cpu") if INTERPRETED else ("cuda",)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)

    def forms(self, device: torch.device, dtype: torch.dtype) -> Sequence[str]:
        return config.forms(device, dtype)

    def setting(self, dtype: torch.dtype) -> Hashable:
        """Return the settings that launches depend on but that are not among the arguments."""
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
        if of_rows.wanted or not of_cols.wanted:  # d_inv_tau follows from either side's gradient
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
        return _loss_and_gradients(_two_views(work, z_i, z_j, inv_tau, normalize), mean)

    @repeated
    def limited_neg_lse(
        self, work: Work, rows: Side, cols: Side | None, inv_tau: float | Tensor
    ) -> tuple[Tensor, Tensor | None]:
        nus = log_sum_exps(_limited_sides(work, rows, cols, inv_tau))
        return nus[0], None if cols is None else nus[1]

    @repeated
    def limited_neg_lse_backward(
        self,
        work: Work,
        rows: Side,
        cols: Side | None,
        inv_tau: float | Tensor,
        of_rows: Upstream,
        of_cols: Upstream,
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        sides = _limited_sides(work, rows, cols, inv_tau)
        weights = scale(sides, survey(sides, of_rows, None if cols is None else of_cols))
        d_rows = d_cols = None
        if cols is not None and of_cols.wanted:
            d_cols, _, d_inv_tau, _ = gradient(sides.swapped(), weights.swapped())
        if of_rows.wanted or d_cols is None:
            d_rows, _, d_inv_tau, _ = gradient(sides, weights)
        return d_rows if of_rows.wanted else None, d_cols, d_inv_tau

    @repeated
    def limited_nt_xent_value(
        self,
        work: Work,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: float | Tensor,
        normalize: bool,
        limit_scale: float,
        limit_shift: float,
        mean: bool,
    ) -> Tensor:
        _, totals = losses(_two_views(work, z_i, z_j, inv_tau, normalize, (limit_scale, limit_shift)))
        return totals.sum() * loss_weight(z_i, mean)

    @repeated
    def limited_nt_xent_scalar(
        self,
        work: Work,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: float | Tensor,
        normalize: bool,
        limit_scale: float,
        limit_shift: float,
        mean: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _loss_and_gradients(_two_views(work, z_i, z_j, inv_tau, normalize, (limit_scale, limit_shift)), mean)

    def softplus(
        self,
        rows: Side,
        cols: Side | None,
        inv_tau: float | Tensor,
        bias: float | Tensor,
        positives: bool,
        weights: SumWeights | None = None,
    ) -> PairSums:
        return PairSums(*self._softplus(rows, cols, inv_tau, bias, positives, weights))

    @repeated
    def _softplus(
        self,
        work: Work,
        rows: Side,
        cols: Side | None,
        inv_tau: float | Tensor,
        bias: float | Tensor,
        positives: bool,
        weights: SumWeights | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        packed = _pack_side(work, rows)
        sides = unbounded_sides(work, packed, packed if cols is None else _pack_side(work, cols), inv_tau)
        pairs = Pairs(bias, positives)
        if weights is None:
            formed = form_pairs(sides, pairs, gradient=False)
            return end_pairs(sides, formed, sums=True, gradient=False).sums, None, None, None, None
        of_rows = weights.of_rows.contiguous()
        of_cols = of_rows if cols is None else weights.of_cols.contiguous()
        pairs = pairs._replace(of_rows=of_rows, of_cols=of_cols)
        formed = form_pairs(sides, pairs, gradient=True)
        ends = end_pairs(sides, formed, sums=True, gradient=True)
        d_rows, _, d_inv_tau, _ = unpack_gradients(sides, None, formed.gathered)
        d_cols = None
        if cols is not None and weights.wants_cols:
            of_cols_alone = form_pairs(sides.swapped(), pairs.swapped(), gradient=True)
            d_cols = unpack_gradients(sides.swapped(), None, of_cols_alone.gathered).d_first
        return ends.sums, d_rows if weights.wants_rows else None, d_cols, d_inv_tau, ends.d_bias

    @repeated
    def sigmoid_scalar(
        self,
        work: Work,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: float | Tensor,
        bias: float | Tensor,
        normalize: bool,
        two_views: bool,
        mean: bool,
        needs_i: bool,
        needs_j: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
        sides, pairs = _sigmoid_sides(work, z_i, z_j, inv_tau, normalize, two_views), Pairs(bias, True)
        loss_weight = sigmoid_weight(z_i, two_views, mean)
        weight = 2 * loss_weight if two_views else loss_weight  # with two views a pair counts in the sums of both rows
        owners = sides.each()
        if not two_views:  # the sums of either side cover all pairs
            owners = [side for side, needed in zip(owners, (needs_i, needs_j), strict=True) if needed] or owners[:1]
        gradients = []
        for side in owners:
            formed = form_pairs(side, pairs, gradient=True)
            gradients.append(unpack_gradients(side, None, formed.gathered, weight=weight))
        ends = end_pairs(side, formed, sums=False, gradient=True, weight=weight, loss_weight=loss_weight)
        d_i, d_j = gradients[0].d_first, gradients[0].d_second if two_views else gradients[-1].d_first
        numbers = gradients[-1].d_inv_tau, ends.d_bias
        return ends.loss, d_i if needs_i else None, d_j if needs_j else None, *numbers

    @repeated
    def sigmoid_value(
        self,
        work: Work,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: float | Tensor,
        bias: float | Tensor,
        normalize: bool,
        two_views: bool,
        mean: bool,
    ) -> Tensor:
        sides = _sigmoid_sides(work, z_i, z_j, inv_tau, normalize, two_views)
        formed = form_pairs(sides, Pairs(bias, True), gradient=False)
        weight = sigmoid_weight(z_i, two_views, mean)
        return end_pairs(sides, formed, sums=False, gradient=False, loss_weight=weight).loss


def _loss_and_gradients(sides: Sides, mean: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return NT-Xent of two views, and its gradients with respect to both views and k."""
    weights, totals = losses(sides)
    weight, q = loss_weight(sides.rows.first, mean), weights.of_rows.d_neg_lse
    found = gradient(sides, scale(sides, weights), d_pos=q, weight=weight, pos_factor=-weight, totals=totals)
    return found.loss, found.d_first, found.d_second, found.d_inv_tau


def _two_views(
    work: Work,
    z_i: Tensor,
    z_j: Tensor,
    inv_tau: float | Tensor,
    normalize: bool,
    limit: tuple[float, float] | None = None,
) -> Sides:
    """Return two views as one side.

    limit: (scale, shift). A negative counts if its similarity is at most scale * s + shift, where s is the similarity
        to the positive.
    """
    tf32, eps = _takes_tf32(z_i.dtype), norm_eps(z_i.dtype)
    rows = pack_rows(work, z_i, z_j, normalize=normalize, eps=eps, tf32=tf32)
    limits = None if limit is None else Limits(rows.sim_pos, rows.sim_pos, *limit)
    return make_sides(work, rows, rows, inv_tau, limits)


def _limited_sides(work: Work, rows: Side, cols: Side | None, inv_tau: float | Tensor) -> Sides:
    of_cols = rows if cols is None else cols
    assert rows.limits is not None
    assert of_cols.limits is not None
    limits = Limits(rows.limits.contiguous(), of_cols.limits.contiguous())
    packed = _pack_side(work, rows)
    return make_sides(work, packed, packed if cols is None else _pack_side(work, cols), inv_tau, limits)


def _sigmoid_sides(
    work: Work, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool, two_views: bool
) -> Sides:
    """Return two views as one side, or two towers as two sides. The group of a row is the index of its pair."""
    tf32, eps = _takes_tf32(z_i.dtype), norm_eps(z_i.dtype)
    rows = pack_rows(work, z_i, z_j if two_views else None, normalize=normalize, eps=eps, tf32=tf32)
    cols = rows if two_views else pack_rows(work, z_j, normalize=normalize, eps=eps, tf32=tf32)
    return unbounded_sides(work, rows, cols, inv_tau)


def _one_side(work: Work, rows: Side, inv_tau: float | Tensor) -> Sides:
    packed = _pack_side(work, rows)
    return make_sides(work, packed, packed, inv_tau)


def _two_sides(work: Work, rows: Side, cols: Side, inv_tau: float | Tensor) -> Sides:
    return make_sides(work, _pack_side(work, rows), _pack_side(work, cols), inv_tau)


def _pack_side(work: Work, side: Side) -> Packed:
    dtype = side.u.dtype
    return pack_rows(work, side.u, ids=side.ids, normalize=False, eps=norm_eps(dtype), tf32=_takes_tf32(dtype))


def _takes_tf32(dtype: torch.dtype) -> bool:
    """Return whether PyTorch multiplies rows of this dtype in TF32, which Triton supports on NVIDIA chips only."""
    if dtype != torch.float32 or torch.version.hip:
        return False
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    if precision == "none":  # an older PyTorch, or no setting for this backend
        return torch.get_float32_matmul_precision() != "highest"
    return bool(precision == "tf32")


BACKEND = TritonBackend()
