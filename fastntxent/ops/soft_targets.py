"""Expectations of a student's similarities under a teacher's softmax, in tiles of plain PyTorch on any device.

    p_ij = exp(k t_i . t_j - lse_i), over the columns;  q_ij = exp(k t_i . t_j - lse_j), over the rows
    rows_i = sum over {j : id_j != id_i} of p_ij u_i . v_j      cols_j = sum over {i : id_i != id_j} of q_ij u_i . v_j

soft_dots       (u, v, t_u, t_v, u_ids, v_ids, inv_tau, rows_lse, cols_lse) -> rows (M,), cols (K,)
soft_dots_sum   the same                                                   -> the total of both, d_u, d_v

t, k (inv_tau) and lse belong to the teacher. A teacher may also be a function that returns similarities. Such a teacher
has no t, and no operator schema can take a function. So plain autograd functions handle it; they run eagerly under
torch.compile. The results are linear in the student's similarities. For upstream gradients a_i of the rows and c_j of
the columns,

    G_ij = a_i p_ij + c_j q_ij      d/du_i = sum_j G_ij v_j      d/dv_j = sum_i G_ij u_i

For `soft_dots_sum` a and c are 1, and the value follows from the gradient as sum_i u_i . d/du_i (or as the same sum for
v), so no tile of the student's similarities is needed. The teacher gets no gradient.

A product costs 2 M K D flops for the student and, with E features, 2 M K E for the teacher. The forward of `soft_dots`
takes one product of each. If both sides need a gradient, its backward takes two products of the student and one of the
teacher, and `soft_dots_sum` takes no more than that for value and gradient together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..algebra import accumulation_dtype, autocast_off, in_double, row_dots
from ..backends.tiling import Blocks, CalledTiles, Tiles, TileValues, fold
from ..sides import CalledTeacher, Side, Teacher
from .contract import checked
from .register import (
    function_of,
    may_be_differentiated,
    register,
    save,
    save_gradients,
    saved,
    scaled,
    uncompiled,
)


def soft_dots(rows: Side, cols: Side, teacher: Teacher | CalledTeacher) -> tuple[Tensor, Tensor]:
    """Return the sums of the rows (M,) and of the columns (K,), differentiable in the student's rows and columns."""
    if isinstance(teacher, CalledTeacher):
        return _called_soft_dots(rows.u, cols.u, rows.ids, cols.ids, *teacher)
    return _soft_dots(rows.u, cols.u, teacher.rows, teacher.cols, rows.ids, cols.ids, *teacher[2:])


def soft_dots_sum(rows: Side, cols: Side, teacher: Teacher | CalledTeacher) -> Tensor:
    """Return the total of the sums of `soft_dots` (0-d). If its gradient is needed, the same call computes it."""
    needs = may_be_differentiated(rows.u), may_be_differentiated(cols.u)
    if not any(needs):
        of_rows, of_cols = soft_dots(rows, cols, teacher)
        return of_rows.sum() + of_cols.sum()
    if isinstance(teacher, CalledTeacher):
        return _called_soft_dots_sum(rows.u, cols.u, rows.ids, cols.ids, *teacher, *needs)[0]
    return _soft_dots_sum(rows.u, cols.u, teacher.rows, teacher.cols, rows.ids, cols.ids, *teacher[2:], *needs)


def called_neg_lse(
    row_ids: Tensor,
    col_ids: Tensor,
    similarities: Callable[[Tensor, Tensor], Tensor],
    inv_tau: float | Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return nu of the rows (M,), nu of the columns (K,) and the positive logits (M,) of a teacher function.

    A row's positive is the column with the row's id; at most one column may have that id. Without a positive the logit
    is 0. The results have no gradient.
    """
    return _called_neg_lse(row_ids, col_ids, similarities, inv_tau, dtype)


# --- tiles -----------------------------------------------------------------------------------------------------------


class SoftTargets:
    """The teacher's tiles, paired with the student's."""

    def __init__(self, rows: Side, cols: Side, teacher: Teacher | CalledTeacher):
        self._u, self._v, self._teacher = rows.u.contiguous(), cols.u.contiguous(), teacher
        if isinstance(teacher, CalledTeacher):
            self._tiles: Tiles = CalledTiles(rows.ids, cols.ids, teacher.similarities, teacher.inv_tau, self._u.dtype)
        else:
            sides = [Blocks(Side(teacher.rows, rows.ids)), Blocks(Side(teacher.cols, cols.ids))]
            self._tiles = Tiles(sides, teacher.inv_tau)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return the sums of the rows and of the columns."""
        of_rows, of_cols = self._u.new_zeros(len(self._u)), self._v.new_zeros(len(self._v))
        buffer = torch.empty_like(self._tiles.buffer)
        for tile, p, q in self._probabilities():
            sims = self._tiles.tile_of(buffer, tile.rows, tile.cols)
            torch.mm(self._u[tile.rows], self._v[tile.cols].T, out=sims)
            of_rows[tile.rows] += p.mul_(sims).sum(dim=1)
            of_cols[tile.cols] += q.mul_(sims).sum(dim=0)
        return of_rows, of_cols

    def gradients(
        self, weights: tuple[Tensor, Tensor] | None, needs_u: bool, needs_v: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients with respect to the rows and the columns, None where not needed.

        weights: the upstream gradients of the rows' and the columns' sums, or None if all are 1.
        """
        d_u, d_v = torch.zeros_like(self._u) if needs_u else None, torch.zeros_like(self._v) if needs_v else None
        for tile, p, q in self._probabilities():
            if weights is not None:
                of_rows, of_cols = weights
                p.mul_(of_rows[tile.rows, None])
                q.mul_(of_cols[tile.cols])
            g = p.add_(q)
            if d_u is not None:
                d_u[tile.rows].addmm_(g, self._v[tile.cols])
            if d_v is not None:
                d_v[tile.cols].addmm_(g.T, self._u[tile.rows])
        return d_u, d_v

    def _probabilities(self) -> Iterator[tuple[TileValues, Tensor, Tensor]]:
        """Yield every tile with p and q of its pairs, which are 0 for pairs with the same id."""
        tiles, teacher = self._tiles, self._teacher
        for tile, mixed in tiles.logits():
            p = tiles.tile_of(tiles.scratch, tile.rows, tile.cols)
            # Only rounding can put a logit above its log-sum-exp, but with huge logits that is enough to overflow exp.
            torch.sub(tile.values, teacher.rows_lse[tile.rows, None], out=p).clamp_max_(0).exp_()
            q = tile.values.sub_(teacher.cols_lse[tile.cols]).clamp_max_(0).exp_()
            if mixed:
                agree = tiles.agree(tile)
                p.masked_fill_(agree, 0)
                q.masked_fill_(agree, 0)
            yield tile, p, q


def soft_targets(call: str, *given: Any) -> tuple[SoftTargets, tuple[Any, ...]]:
    """Check a call's tensors. Return the tiles and the upstream gradients.

    The upstream gradients are the tensors that come before u. A forward has none.
    """
    *weights, u, v, t_u, t_v, u_ids, v_ids, inv_tau, rows_lse, cols_lse = checked(call, *given)
    teacher = Teacher(t_u, t_v, inv_tau, rows_lse, cols_lse)
    return SoftTargets(Side(u, u_ids), Side(v, v_ids), teacher), tuple(weights)


def called_targets(u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, *of_teacher: Any) -> SoftTargets:
    """Return the tiles of a teacher function."""
    return SoftTargets(Side(u, u_ids), Side(v, v_ids), CalledTeacher(*of_teacher))


# --- the sums of rows and columns ------------------------------------------------------------------------------------


def _forward(u: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    with autocast_off(u):
        tiles, _ = soft_targets("soft_dots", u, *rest)
        return tiles.sums()


def _fake(u: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape[0]), v.new_empty(v.shape[0])


def _setup(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    save(ctx, *inputs)


def _autograd(ctx: Any, d_rows: Tensor, d_cols: Tensor) -> tuple[Tensor | None, ...]:
    needs_u, needs_v = ctx.needs_input_grad[:2]
    d_u, d_v = _soft_dots_backward(d_rows, d_cols, *saved(ctx), needs_u, needs_v)
    return d_u if needs_u else None, d_v if needs_v else None, *[None] * 7


def _backward(d_rows: Tensor, d_cols: Tensor, u: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *of_teacher, needs_u, needs_v = rest
    with autocast_off(u):
        tiles, (d_rows, d_cols) = soft_targets("soft_dots_backward", d_rows, d_cols, u, v, *of_teacher)
        d_u, d_v = tiles.gradients((d_rows, d_cols), needs_u, needs_v)
    return u.new_empty(0) if d_u is None else d_u, v.new_empty(0) if d_v is None else d_v


def _backward_fake(d_rows: Tensor, d_cols: Tensor, u: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    needs_u, needs_v = rest[-2:]
    return u.new_empty(u.shape if needs_u else 0), v.new_empty(v.shape if needs_v else 0)


_TENSORS = (
    "Tensor u, Tensor v, Tensor t_u, Tensor t_v, Tensor u_ids, Tensor v_ids, Tensor inv_tau, Tensor rows_lse,"
    " Tensor cols_lse"
)
_soft_dots_backward = register(
    f"soft_dots_backward(Tensor d_rows, Tensor d_cols, {_TENSORS}, bool needs_u, bool needs_v) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_soft_dots = register(f"soft_dots({_TENSORS}) -> (Tensor, Tensor)", _forward, _fake, _setup, _autograd)

# --- their sum, with its gradient ------------------------------------------------------------------------------------


def _sum_forward(u: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *of_teacher, needs_u, needs_v = rest
    with autocast_off(u):
        tiles, _ = soft_targets("soft_dots_sum", u, v, *of_teacher)
        return _sum_with_gradients(tiles, u, v, needs_u, needs_v)


def _sum_with_gradients(
    tiles: SoftTargets, u: Tensor, v: Tensor, needs_u: bool, needs_v: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_u, d_v = tiles.gradients(None, needs_u, needs_v)
    side, gradient = (u, d_u) if d_u is not None else (v, d_v)
    assert gradient is not None, "one side needs a gradient"
    total = in_double(row_dots(side, gradient)).sum().to(accumulation_dtype(u.dtype))
    return total, _or_zeros(d_u, u), _or_zeros(d_v, v)


def _or_zeros(gradient: Tensor | None, x: Tensor) -> Tensor:
    """Return the gradient, or a zero expanded to the shape of x if there is none."""
    return x.new_zeros(()).expand(x.shape) if gradient is None else gradient


def _sum_fake(u: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs_u, needs_v = rest[-2:]
    return (
        u.new_empty(()),
        u.new_empty(u.shape) if needs_u else _or_zeros(None, u),
        v.new_empty(v.shape) if needs_v else _or_zeros(None, v),
    )


def _sum_setup(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    save_gradients(ctx, output[1:], *inputs[:2])


def _sum_autograd(ctx: Any, d_sum: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs_u, needs_v = ctx.needs_input_grad[:2]
    if d_sum is None:  # no upstream gradient
        return (None,) * len(ctx.needs_input_grad)
    if torch.is_grad_enabled():  # the registered operator is needed only if this may itself be differentiated
        d_u, d_v = _soft_dots_sum_backward(d_sum, *saved(ctx))
    else:
        d_u, d_v, u, v = ctx.saved_tensors
        d_u, d_v = scaled(d_sum, d_u, u), scaled(d_sum, d_v, v)
    return d_u if needs_u else None, d_v if needs_v else None, *[None] * (len(ctx.needs_input_grad) - 2)


def _scale(*given: Tensor) -> tuple[Tensor, Tensor]:
    d_sum, d_u, d_v, u, v = checked("soft_dots_sum_backward", *given)
    return scaled(d_sum, d_u, u), scaled(d_sum, d_v, v)


def _scale_fake(d_sum: Tensor, d_u: Tensor, d_v: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), v.new_empty(v.shape)


_soft_dots_sum_backward = register(
    "soft_dots_sum_backward(Tensor d_sum, Tensor d_u, Tensor d_v, Tensor u, Tensor v) -> (Tensor, Tensor)",
    _scale,
    _scale_fake,
)
_soft_dots_sum = register(
    f"soft_dots_sum({_TENSORS}, bool needs_u, bool needs_v) -> (Tensor, Tensor, Tensor)",
    _sum_forward,
    _sum_fake,
    _sum_setup,
    _sum_autograd,
    value_alone=True,
)

# --- teachers that are functions -------------------------------------------------------------------------------------


def _called_log_sums(
    row_ids: Tensor,
    col_ids: Tensor,
    similarities: Callable[[Tensor, Tensor], Tensor],
    inv_tau: float | Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    tiles = CalledTiles(row_ids, col_ids, similarities, inv_tau, dtype)
    pos, *peaks = (
        torch.full((len(ids),), value, dtype=dtype, device=ids.device)
        for ids, value in ((row_ids, 0.0), (row_ids, -math.inf), (col_ids, -math.inf))
    )
    sums = [torch.zeros_like(peak) for peak in peaks]
    with autocast_off(pos):
        for tile, mixed in tiles.logits():
            scratch = tiles.tile_of(tiles.scratch, tile.rows, tile.cols)
            if mixed:
                agree = tiles.agree(tile)
                pos[tile.rows] += torch.where(agree, tile.values, 0).sum(dim=1)
                tile.values.masked_fill_(agree, -math.inf)
            fold(peaks[0][tile.rows], sums[0][tile.rows], tile.values, scratch, dim=1)
            fold(peaks[1][tile.cols], sums[1][tile.cols], tile.values, scratch, dim=0)
    nu_rows, nu_cols = (total.log_().add_(peak) for total, peak in zip(sums, peaks, strict=True))
    return nu_rows, nu_cols, pos


def _called_forward(u: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    with autocast_off(u):
        return called_targets(u, v, *rest).sums()


def _called_autograd(ctx: Any, d_rows: Tensor, d_cols: Tensor) -> tuple[Tensor | None, ...]:
    needs_u, needs_v = ctx.needs_input_grad[:2]
    d_u, d_v = _called_soft_dots_backward(d_rows, d_cols, *saved(ctx), needs_u, needs_v)
    return d_u if needs_u else None, d_v if needs_v else None, *[None] * 6


def _called_backward(d_rows: Tensor, d_cols: Tensor, u: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *given, needs_u, needs_v = rest
    with autocast_off(u):
        d_u, d_v = called_targets(u, v, *given).gradients((d_rows, d_cols), needs_u, needs_v)
    return _or_zeros(d_u, u), _or_zeros(d_v, v)


def _called_sum_forward(u: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, needs_u, needs_v = rest
    with autocast_off(u):
        return _sum_with_gradients(called_targets(u, v, *given), u, v, needs_u, needs_v)


_called_neg_lse = uncompiled(function_of("called_neg_lse", _called_log_sums))
_called_soft_dots_backward = function_of("called_soft_dots_backward", _called_backward)
_called_soft_dots = uncompiled(function_of("called_soft_dots", _called_forward, _setup, _called_autograd))
_called_soft_dots_sum = uncompiled(function_of("called_soft_dots_sum", _called_sum_forward, _sum_setup, _sum_autograd))
