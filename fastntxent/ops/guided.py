"""Log-sum-exp over the negatives that a guide model accepts, in tiles of plain PyTorch on any device.

The guide excludes probable false negatives: columns whose similarity to a row, according to the guide, exceeds the
row's limit.

    nu_i = log sum over {j : id_j != id_i and not g_ij > limit_i} of exp(k s_ij)
    s_ij = u_i . v_j,  g_ij = g_u_i . g_v_j

guided_neg_lse    (u, v, g_u, g_v, u_ids, v_ids, inv_tau, limits) -> nu (M,), -inf if no column is left

k is inv_tau. The model in training is called the student. The student's logits and the guide's similarities are
computed tile by tile, and only one tile of the mask exists at a time. No gradient flows through the mask. For upstream
gradients w_i, and P_ij = exp(k s_ij - nu_i) if the pair counts, else 0,

    d/du_i = k w_i sum_j P_ij v_j      d/dv_j = k sum_i w_i P_ij u_i      d/dk = sum_ij w_i P_ij s_ij

A product costs 2 M K D flops for the student and 2 M K E for the guide, which has E features. The forward takes one
product of each. The backward takes three products of the student (two if only one side needs a gradient) and one of the
guide. A comparison with NaN is false, so the guide does not exclude a pair whose g_ij is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..algebra import autocast_off, row_dots
from ..backends.tiling import Blocks, Tiles, TileValues
from ..sides import Guide, Side
from .contract import checked
from .register import register, save, saved


def guided_neg_lse(rows: Side, cols: Side, inv_tau: float | Tensor, guide: Guide) -> Tensor:
    """Return nu of the rows (M,) against the columns, differentiable in the rows, the columns and inv_tau."""
    return _guided_neg_lse(*_flat(rows, cols, inv_tau, guide))


# --- tiles -----------------------------------------------------------------------------------------------------------


class GuidedTiles:
    """The student's tiles, paired with the guide's."""

    def __init__(self, rows: Side, cols: Side, inv_tau: float | Tensor, guide: Guide):
        self._inv_tau, self._limits = inv_tau, guide.limits
        self._student = Tiles([Blocks(rows), Blocks(cols)], inv_tau)
        self._guide = Tiles([Blocks(Side(guide.rows, rows.ids)), Blocks(Side(guide.cols, cols.ids))], 1.0)

    def _tiles(self) -> Iterator[tuple[TileValues, Tensor]]:
        """Yield each tile of the student's logits with a mask of the logits that do not count."""
        for (tile, mixed), (guide, _) in zip(self._student.logits(), self._guide.logits(), strict=True):
            left_out = guide.values > self._limits[tile.rows, None]
            if mixed:
                left_out |= self._student.agree(tile)
            yield tile, left_out

    def neg_lse(self) -> Tensor:
        """Return nu of the rows."""
        nu = self._limits.new_full((len(self._limits),), -torch.inf)
        for tile, left_out in self._tiles():
            part = tile.values.masked_fill_(left_out, -torch.inf).logsumexp(dim=1)
            nu[tile.rows] = torch.logaddexp(nu[tile.rows], part)
        return nu

    def gradients(
        self, d_nu: Tensor, nu: Tensor, needs_u: bool, needs_v: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Return the gradients with respect to the rows, the columns (None where not needed) and inv_tau."""
        u, v = self._student.rows.u, self._student.cols.u
        weights = d_nu.masked_fill(nu == -torch.inf, 0)  # a row with no column left ignores its upstream gradient
        d_v = torch.zeros_like(v) if needs_v else None
        d_u = torch.zeros_like(u) if needs_u or d_v is None else None  # d_inv_tau needs one of the two
        for tile, left_out in self._tiles():
            p = tile.values.sub_(nu[tile.rows, None]).exp_().masked_fill_(left_out, 0)
            p.mul_(weights[tile.rows, None])
            if d_u is not None:
                d_u[tile.rows].addmm_(p, v[tile.cols])
            if d_v is not None:
                d_v[tile.cols].addmm_(p.T, u[tile.rows])
        side, of_side = (u, d_u) if d_u is not None else (v, d_v)
        assert of_side is not None
        d_inv_tau = row_dots(side, of_side).sum()
        return (
            d_u.mul_(self._inv_tau) if needs_u and d_u is not None else None,
            None if d_v is None else d_v.mul_(self._inv_tau),
            d_inv_tau,
        )


def run_guided_neg_lse(rows: Side, cols: Side, inv_tau: float | Tensor, guide: Guide) -> Tensor:
    """Check the tensors and return nu of the rows."""
    with autocast_off(rows.u):
        return GuidedTiles(*_records(*checked("guided_neg_lse", *_flat(rows, cols, inv_tau, guide)))).neg_lse()


def run_guided_neg_lse_backward(
    d_nu: Tensor,
    rows: Side,
    cols: Side,
    inv_tau: float | Tensor,
    guide: Guide,
    nu: Tensor,
    needs_u: bool,
    needs_v: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Check the tensors. Return the gradients with respect to rows, columns (None where not needed) and inv_tau."""
    with autocast_off(rows.u):
        d_nu, *tensors, nu = checked("guided_neg_lse_backward", d_nu, *_flat(rows, cols, inv_tau, guide), nu)
        return GuidedTiles(*_records(*tensors)).gradients(d_nu, nu, needs_u, needs_v)


def _flat(rows: Side, cols: Side, inv_tau: float | Tensor, guide: Guide) -> tuple[Any, ...]:
    """Return the arguments in the order of the schema."""
    return rows.u, cols.u, guide.rows, guide.cols, rows.ids, cols.ids, inv_tau, guide.limits


def _records(
    u: Tensor, v: Tensor, g_u: Tensor, g_v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: Any, limits: Tensor
) -> tuple[Side, Side, Any, Guide]:
    return Side(u, u_ids), Side(v, v_ids), inv_tau, Guide(g_u, g_v, limits)


# --- the operators ---------------------------------------------------------------------------------------------------


def _forward(*tensors: Any) -> Tensor:
    return run_guided_neg_lse(*_records(*tensors))


def _fake(u: Tensor, *_: Any) -> Tensor:
    return u.new_empty(u.shape[0])


def _setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    save(ctx, *inputs, output)


def _autograd(ctx: Any, d_nu: Tensor) -> tuple[Tensor | None, ...]:
    needs_u, needs_v = ctx.needs_input_grad[:2]
    d_u, d_v, d_inv_tau = _guided_neg_lse_backward(d_nu, *saved(ctx), needs_u, needs_v)
    return d_u if needs_u else None, d_v if needs_v else None, *[None] * 4, d_inv_tau, None


def _backward(d_nu: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, nu, needs_u, needs_v = rest
    d_u, d_v, d_inv_tau = run_guided_neg_lse_backward(d_nu, *_records(*tensors), nu, needs_u, needs_v)
    u, v = tensors[:2]
    return u.new_empty(0) if d_u is None else d_u, v.new_empty(0) if d_v is None else d_v, d_inv_tau


def _backward_fake(d_nu: Tensor, u: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs_u, needs_v = rest[-2:]
    return u.new_empty(u.shape if needs_u else 0), v.new_empty(v.shape if needs_v else 0), d_nu.new_empty(())


_TENSORS = "Tensor u, Tensor v, Tensor g_u, Tensor g_v, Tensor u_ids, Tensor v_ids, Tensor inv_tau, Tensor limits"
_guided_neg_lse_backward = register(
    f"guided_neg_lse_backward(Tensor d_neg_lse, {_TENSORS}, Tensor neg_lse, bool needs_u, bool needs_v)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_guided_neg_lse = register(f"guided_neg_lse({_TENSORS}) -> Tensor", _forward, _fake, _setup, _autograd)
