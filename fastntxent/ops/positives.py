"""Sums over all positive pairs, for losses that have a term for every positive of a row.

    positive_lse   (u, v, u_ids, v_ids, inv_tau)      -> log sum over {j : id_j = id_i} of exp(k u_i . v_j)
    positive_sum   (u, v, u_ids, v_ids, inv_tau, nu)  -> sum over {j : id_j = id_i} of log(1 + exp(nu_i - k u_i . v_j))

k is inv_tau. For a row without positives the log-sum-exp is -inf and the sum is 0. `same` means that v is u itself; a
row is then not its own positive.

Unless everything fits into one tile, both sides are sorted by id. Then all positives of a block of rows lie in one run
of columns, which is processed tile by tile. The backward goes through the tiles again and recomputes their logits:

    s_ij = u_i . v_j                D_ij = d loss / d (k s_ij)
    d_u_i = k sum_j D_ij v_j        d_v_j = k sum_i D_ij u_i        d_k = sum_ij D_ij s_ij

With n_c rows in group c, the work is sum_c n_c^2 D, plus extra columns: for each row, about as many as a block has
rows. Memory is the sorted rows and about two tiles. The order of every sum is fixed. After sorting, the host reads the
starts and ends of all runs from the device in one transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra import accumulation_dtype, autocast_off, row_dots
from .contract import checked
from .register import register, save, saved

# Rows in a block, and columns in a tile. Small blocks compute few extra pairs when groups have only two rows. On an
# accelerator, large tiles save launches.
_TILE_CPU = (128, 2048)
_TILE_ACCELERATOR = (1024, 8192)


def positive_lse(u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: float | Tensor, *, same: bool) -> Tensor:
    """Return each row's log-sum-exp over its positives (M,), differentiable in u, v and inv_tau."""
    return _positive_lse(u, v, u_ids, v_ids, inv_tau, same)


def positive_sum(
    u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: float | Tensor, nu: Tensor, *, same: bool
) -> Tensor:
    """Return each row's sum of log(1 + exp(nu - logit)) over its positives (M,).

    Differentiable in u, v, inv_tau and nu.
    """
    return _positive_sum(u, v, u_ids, v_ids, inv_tau, nu, same)


# --- tiles -----------------------------------------------------------------------------------------------------------


class PositiveTile(NamedTuple):
    """Logits of a block of rows against some columns, and the mask of the positives among them."""

    rows: slice
    cols: slice
    logits: Tensor
    mask: Tensor


class PositiveTiles:
    """Both sides sorted by id, and an iterator over the tiles that may contain positives.

    If everything fits into one tile, nothing is sorted, and the tile is kept for further iterations.

    own: the offset between rows and columns. Column own + i, if there is one, is row i itself, so it is not a positive
    of row i. None: no row is also a column.
    """

    def __init__(self, u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: float | Tensor, own: int | None):
        dtype = accumulation_dtype(u.dtype)
        self.inv_tau = inv_tau
        self.own = own
        self.height, self.width = _TILE_CPU if u.device.type == "cpu" else _TILE_ACCELERATOR
        M, K = u.shape[0], v.shape[0]
        self._sorted = self.height < M or self.width < K
        if not self._sorted:
            self.row_ids, self.col_ids, self.u, self.v = u_ids, v_ids, u.to(dtype), v.to(dtype)
            self._only: PositiveTile | None = None
            return
        self.row_ids, self._row_order = torch.sort(u_ids.to(torch.int64), stable=True)
        self.col_ids, self._col_order = torch.sort(v_ids.to(torch.int64), stable=True)
        self.u, self.v = u.to(dtype)[self._row_order], v.to(dtype)[self._col_order]
        first = torch.searchsorted(self.col_ids, self.row_ids)
        last = torch.searchsorted(self.col_ids, self.row_ids, right=True)
        self.starts = range(0, M, self.height)
        ends = torch.tensor(
            [min(start + self.height, M) - 1 for start in self.starts], dtype=torch.int64, device=u.device
        )
        self.runs = torch.stack((first[:: self.height], last[ends]), dim=1).tolist()

    def __iter__(self) -> Iterator[PositiveTile]:
        if not self._sorted:
            self._only = self._only or self._tile(slice(0, len(self.u)), slice(0, len(self.v)))
            yield self._only
            return
        for start, (first, last) in zip(self.starts, self.runs, strict=True):
            rows = slice(start, start + self.height)
            for left in range(first, last, self.width):
                yield self._tile(rows, slice(left, min(left + self.width, last)))

    def _tile(self, rows: slice, cols: slice) -> PositiveTile:
        mask = self.row_ids[rows, None] == self.col_ids[cols]
        if self.own is not None:
            self._leave_own_out(mask, rows, cols)
        return PositiveTile(rows, cols, (self.u[rows] * self.inv_tau) @ self.v[cols].T, mask)

    def _leave_own_out(self, mask: Tensor, rows: slice, cols: slice) -> None:
        assert self.own is not None
        if self._sorted:
            mask &= self._row_order[rows, None] + self.own != self._col_order[cols]
        elif -mask.shape[0] < self.own < mask.shape[1]:  # the only tile
            mask.diagonal(self.own).fill_(False)

    def lse(self) -> Tensor:
        """Return each row's log-sum-exp over its positives."""
        lse = self.u.new_full((len(self.u),), -torch.inf)
        for rows, _, logits, mask in self:
            lse[rows] = torch.logaddexp(lse[rows], logits.masked_fill_(~mask, -torch.inf).logsumexp(dim=1))
        return self.of_rows(lse)

    def sum(self, nu: Tensor) -> Tensor:
        """Return each row's sum of log(1 + exp(nu - logit)) over its positives."""
        nu = self.by_row(nu)[:, None]
        sums = self.u.new_zeros(len(self.u))
        for rows, _, logits, mask in self:
            sums[rows] -= F.logsigmoid(logits - nu[rows]).masked_fill_(~mask, 0).sum(dim=1)
        return self.of_rows(sums)

    def backward(
        self, d_logits: Callable[[PositiveTile], Tensor], *, needs_v: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the gradients with respect to u, v (None if not needed) and inv_tau.

        d_logits: returns the gradient with respect to a tile's logits.
        """
        d_u, d_v = torch.zeros_like(self.u), torch.zeros_like(self.v) if needs_v else None
        for tile in self:
            d = d_logits(tile)
            d_u[tile.rows].addmm_(d, self.v[tile.cols])
            if d_v is not None:
                d_v[tile.cols].addmm_(d.T, self.u[tile.rows])
        d_inv_tau = row_dots(self.u, d_u).sum()
        if d_v is not None:
            d_v = d_v * self.inv_tau
            d_v = _in_place_of(self._col_order, d_v) if self._sorted else d_v
        return self.of_rows(d_u * self.inv_tau), d_v, d_inv_tau

    def by_row(self, x: Tensor) -> Tensor:
        """Return per-row values, reordered like the rows of the tiles."""
        return x[self._row_order] if self._sorted else x

    def by_column(self, x: Tensor) -> Tensor:
        """Return per-column values, reordered like the columns of the tiles."""
        return x[self._col_order] if self._sorted else x

    def of_rows(self, values: Tensor) -> Tensor:
        """Undo `by_row`: return values in the original order of the rows."""
        return _in_place_of(self._row_order, values) if self._sorted else values


def _tiles(u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: float | Tensor, same: bool) -> PositiveTiles:
    return PositiveTiles(u, v, u_ids, v_ids, inv_tau, own=0 if same else None)


def _in_place_of(order: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(values).index_copy_(0, order, values)


def through_lse(tile: PositiveTile, d_lse: Tensor, lse: Tensor) -> Tensor:
    """Return the gradient with respect to a tile's logits, through the log-sum-exps of its rows (or of its columns)."""
    return tile.logits.sub(lse).exp_().masked_fill_(~tile.mask, 0).mul_(d_lse)


def through_sum(tile: PositiveTile, d_sum: Tensor, nu: Tensor) -> Tensor:
    """Return the gradient with respect to a tile's logits, through the sums of its rows."""
    return torch.sigmoid(nu - tile.logits).mul_(tile.mask).mul_(-d_sum)


def zero_without_positive(d_lse: Tensor, lse: Tensor) -> Tensor:
    """Return d_lse with 0 for the rows without positives, whose log-sum-exp is -inf."""
    return d_lse.masked_fill(lse == -torch.inf, 0)


# --- log-sum-exp -----------------------------------------------------------------------------------------------------


def _lse_forward(u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: float | Tensor, same: bool) -> Tensor:
    u, v, u_ids, v_ids, inv_tau = checked("positive_lse", u, v, u_ids, v_ids, inv_tau)
    with autocast_off(u):
        return _tiles(u, v, u_ids, v_ids, inv_tau, same).lse()


def _per_row_fake(u: Tensor, *_: Any) -> Tensor:
    return u.new_empty(u.shape[0], dtype=accumulation_dtype(u.dtype))


def _lse_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, ctx.same = inputs
    save(ctx, *tensors, output)


def _lse_autograd(ctx: Any, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    d_u, d_v, d_inv_tau = _positive_lse_backward(d_lse, *saved(ctx), ctx.same)
    return d_u, d_v, None, None, d_inv_tau, None


def _lse_backward(
    d_lse: Tensor, u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: float | Tensor, lse: Tensor, same: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (d_lse, u, v, u_ids, v_ids, inv_tau, lse)
    d_lse, u, v, u_ids, v_ids, inv_tau, lse = checked("positive_lse_backward", *tensors)
    with autocast_off(u):
        tiles = _tiles(u, v, u_ids, v_ids, inv_tau, same)
        d_lse, lse = tiles.by_row(zero_without_positive(d_lse, lse))[:, None], tiles.by_row(lse)[:, None]
        d_u, d_v, d_inv_tau = tiles.backward(lambda tile: through_lse(tile, d_lse[tile.rows], lse[tile.rows]))
        assert d_v is not None
        return d_u.to(u.dtype), d_v.to(v.dtype), d_inv_tau


def _lse_backward_fake(d_rows: Tensor, u: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return u.new_empty(u.shape), v.new_empty(v.shape), d_rows.new_empty(())


_positive_lse_backward = register(
    "positive_lse_backward(Tensor d_lse, Tensor u, Tensor v, Tensor u_ids, Tensor v_ids, Tensor inv_tau, Tensor lse,"
    " bool same) -> (Tensor, Tensor, Tensor)",
    _lse_backward,
    _lse_backward_fake,
)
_positive_lse = register(
    "positive_lse(Tensor u, Tensor v, Tensor u_ids, Tensor v_ids, Tensor inv_tau, bool same) -> Tensor",
    _lse_forward,
    _per_row_fake,
    _lse_setup,
    _lse_autograd,
)

# --- one term for each positive --------------------------------------------------------------------------------------


def _sum_forward(
    u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: float | Tensor, nu: Tensor, same: bool
) -> Tensor:
    u, v, u_ids, v_ids, inv_tau, nu = checked("positive_sum", u, v, u_ids, v_ids, inv_tau, nu)
    with autocast_off(u):
        return _tiles(u, v, u_ids, v_ids, inv_tau, same).sum(nu)


def _sum_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, ctx.same = inputs
    save(ctx, *tensors)


def _sum_autograd(ctx: Any, d_sum: Tensor) -> tuple[Tensor | None, ...]:
    d_u, d_v, d_inv_tau, d_nu = _positive_sum_backward(d_sum, *saved(ctx), ctx.same)
    return d_u, d_v, None, None, d_inv_tau, d_nu, None


def _sum_backward(
    d_sum: Tensor, u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: float | Tensor, nu: Tensor, same: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (d_sum, u, v, u_ids, v_ids, inv_tau, nu)
    d_sum, u, v, u_ids, v_ids, inv_tau, nu = checked("positive_sum_backward", *tensors)
    with autocast_off(u):
        tiles = _tiles(u, v, u_ids, v_ids, inv_tau, same)
        d_nu = torch.zeros_like(d_sum)
        nu, d_sum = tiles.by_row(nu)[:, None], tiles.by_row(d_sum)[:, None]

        def d_logits(tile: PositiveTile) -> Tensor:
            d = through_sum(tile, d_sum[tile.rows], nu[tile.rows])
            d_nu[tile.rows] -= d.sum(dim=1)
            return d

        d_u, d_v, d_inv_tau = tiles.backward(d_logits)
        assert d_v is not None
        return d_u.to(u.dtype), d_v.to(v.dtype), d_inv_tau, tiles.of_rows(d_nu)


def _sum_backward_fake(d_sum: Tensor, u: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_lse_backward_fake(d_sum, u, v), torch.empty_like(d_sum)


_positive_sum_backward = register(
    "positive_sum_backward(Tensor d_sum, Tensor u, Tensor v, Tensor u_ids, Tensor v_ids, Tensor inv_tau, Tensor nu,"
    " bool same) -> (Tensor, Tensor, Tensor, Tensor)",
    _sum_backward,
    _sum_backward_fake,
)
_positive_sum = register(
    "positive_sum(Tensor u, Tensor v, Tensor u_ids, Tensor v_ids, Tensor inv_tau, Tensor nu, bool same) -> Tensor",
    _sum_forward,
    _per_row_fake,
    _sum_setup,
    _sum_autograd,
)
