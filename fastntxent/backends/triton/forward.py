"""neg_lse of packed rows: nu_i = log sum over {j : id_j != id_i} of exp(k s_ij).

Direct: a program owns a square of tiles. One exponential of a tile serves the sums of its rows and of its columns, so
of one side only tiles on and above the diagonal are formed (a diagonal one whole, for its rows). Sums go to planes that
no two programs share, and are added in a fixed order by `_finish_kernel`:

    one side of Q squares    rows of square a: plane b >= a from square (a, b) as rows, plane b < a from (b, a) as
                             columns, plane Q from (a, a) as columns
    two sides                rows: a plane for each square of columns; columns: a plane for each square of rows

Reads x once for each square, writes M sums for each row of squares. Shifted: a program owns a block of rows, with a
running maximum over all columns; the columns of a rectangle take a launch of their own.

Which of the two it is may be known to the device alone: both are launched then, and the one that is not wanted returns
at once.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .pack import SPAN, Packed
from .tiles import (
    DIRECT_LIMIT,
    INTERPRETED,
    LOG2_E,
    add_product,
    in_direct_range,
    inverse_temperature,
    load_rows,
    masked,
    similarities,
)


@triton.jit
def _square_of(index, SQUARES, ONE_SIDE: tl.constexpr):
    """Row and column of a program's square: of one side by columns of the upper triangle, else row by row."""
    if ONE_SIDE:
        col = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        col = tl.where(col * (col + 1) // 2 > index, col - 1, col)  # the root was rounded
        col = tl.where((col + 1) * (col + 2) // 2 <= index, col + 1, col)
        return index - col * (col + 1) // 2, col
    return index // SQUARES, index % SQUARES


@triton.jit
def _direct_kernel(
    rows_x, rows_lo, rows_r, rows_ids, rows_low, rows_high, n_rows,
    cols_x, cols_lo, cols_r, cols_ids, cols_low, cols_high, n_cols,
    row_planes, col_planes, s_row_plane, s_col_plane, squares, tiles, inv_tau, bound, log_terms, DP,
    ONE_SIDE: tl.constexpr, BOUNDED: tl.constexpr, ON_DEVICE: tl.constexpr,
    SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    k = inverse_temperature(inv_tau, ON_DEVICE)
    if not in_direct_range(k, bound, log_terms, BOUNDED):
        return
    a, b = _square_of(tl.program_id(0), squares, ONE_SIDE)
    on_diagonal = ONE_SIDE and a == b
    row_plane = row_planes + b.to(tl.int64) * s_row_plane
    col_plane = col_planes + tl.where(on_diagonal, squares, a).to(tl.int64) * s_col_plane
    row0, col0 = a * (tiles * BLOCK), b * (tiles * BLOCK)
    for i in range(0, tl.minimum(tiles, tl.cdiv(n_rows - row0, BLOCK))):
        row = row0 + i * BLOCK
        offs_m = row + tl.arange(0, BLOCK)
        r_m = tl.load(rows_r + offs_m) * (k * LOG2_E)
        if WHOLE_D:
            x_m = load_rows(rows_x, row, 0, DP, BLOCK, BLOCK_D)
            lo_m = load_rows(rows_lo, row, 0, DP, BLOCK, BLOCK_D) if SPLIT else x_m
        row_sums = tl.zeros((BLOCK,), tl.float32)
        for j in range(tl.where(on_diagonal, i, 0), tl.minimum(tiles, tl.cdiv(n_cols - col0, BLOCK))):
            col = col0 + j * BLOCK
            offs_n = col + tl.arange(0, BLOCK)
            if WHOLE_D:
                x_n = load_rows(cols_x, col, 0, DP, BLOCK, BLOCK_D)
                lo_n = load_rows(cols_lo, col, 0, DP, BLOCK, BLOCK_D) if SPLIT else x_n
                s = tl.zeros((BLOCK, BLOCK), tl.float32)
                s = add_product(s, x_m, lo_m, tl.trans(x_n), tl.trans(lo_n), SPLIT, TF32, UPCAST)
            else:
                s = similarities(
                    rows_x, rows_lo, cols_x, cols_lo, row, col, DP, BLOCK, BLOCK, BLOCK_D, SPLIT, TF32, UPCAST
                )
            exps = tl.exp2(s * tl.load(cols_r + offs_n)[None, :] * r_m[:, None])
            exps = masked(
                exps, 0.0, rows_ids, rows_low, rows_high, n_rows, cols_ids, cols_low, cols_high, n_cols, row, col,
                BLOCK, BLOCK, SPAN,
            )  # fmt: skip
            row_sums += tl.sum(exps, 1)
            col_sums = tl.where(on_diagonal and i == j, 0.0, tl.sum(exps, 0))
            before = tl.load(col_plane + offs_n, mask=(offs_n < n_cols) & (i > 0), other=0.0)
            tl.store(col_plane + offs_n, before + col_sums, mask=offs_n < n_cols)
        tl.store(row_plane + offs_m, row_sums, mask=offs_m < n_rows)
        tl.debug_barrier()  # the next row of tiles reads the columns' sums, not always with the threads that wrote them


@triton.jit
def _shifted_kernel(
    rows_x, rows_lo, rows_r, rows_ids, rows_low, rows_high, n_rows,
    cols_x, cols_lo, cols_r, cols_ids, cols_low, cols_high, n_cols,
    nu_ptr, inv_tau, bound, log_terms, DP,
    BOUNDED: tl.constexpr, ON_DEVICE: tl.constexpr, SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    k = inverse_temperature(inv_tau, ON_DEVICE)
    if in_direct_range(k, bound, log_terms, BOUNDED):
        return
    row = tl.program_id(0) * BLOCK
    offs_m = row + tl.arange(0, BLOCK)
    r_m = tl.load(rows_r + offs_m)
    peaks = tl.full((BLOCK,), -float("inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for col in range(0, n_cols, BLOCK):
        s = similarities(rows_x, rows_lo, cols_x, cols_lo, row, col, DP, BLOCK, BLOCK, BLOCK_D, SPLIT, TF32, UPCAST)
        # Rounded the same from both sides: only what went into a sum may be compared with it.
        r_n = tl.load(cols_r + col + tl.arange(0, BLOCK))
        logits = s * (r_m[:, None] * r_n[None, :]) * k
        logits = masked(
            logits, -float("inf"), rows_ids, rows_low, rows_high, n_rows, cols_ids, cols_low, cols_high, n_cols,
            row, col, BLOCK, BLOCK, SPAN,
        )  # fmt: skip
        new_peaks = tl.maximum(peaks, tl.max(logits, 1))
        shift = tl.where(new_peaks == -float("inf"), 0.0, new_peaks)  # -inf - -inf is NaN: no negative yet
        exps = tl.exp2((logits - shift[:, None]) * LOG2_E)
        sums = sums * tl.exp2((peaks - shift) * LOG2_E) + tl.sum(exps, 1)
        peaks = new_peaks
    tl.store(nu_ptr + offs_m, peaks + tl.log(sums), mask=offs_m < n_rows)


@triton.jit
def _finish_kernel(
    planes, s_plane, n_planes, nu_ptr, n, pos_ptr, loss_ptr, q_ptr, inv_tau, bound, log_terms,
    BOUNDED: tl.constexpr, ON_DEVICE: tl.constexpr, LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """nu from the planes, if it was direct; and the losses log(1 + exp(nu - pos)) with q = sigmoid(nu - pos)."""
    k = inverse_temperature(inv_tau, ON_DEVICE)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    if in_direct_range(k, bound, log_terms, BOUNDED):
        sums = tl.zeros((BLOCK,), tl.float32)
        plane = planes + offs
        for _ in range(0, n_planes):
            sums += tl.load(plane, mask=inside, other=0.0)
            plane += s_plane
        nu = tl.log(sums)
        tl.store(nu_ptr + offs, nu, mask=inside)
    else:
        nu = tl.load(nu_ptr + offs, mask=inside, other=0.0)
    if LOSS:
        x = nu - k * tl.load(pos_ptr + offs, mask=inside, other=0.0)
        e = tl.exp(-tl.abs(x))
        # log(1 + e) of a small e, to its own relative accuracy: Kahan's quotient.
        grown = 1.0 + e
        log1p = tl.where(grown == 1.0, e, tl.log(grown) * e / tl.where(grown == 1.0, 1.0, grown - 1.0))
        tl.store(loss_ptr + offs, tl.maximum(x, 0.0) + log1p, mask=inside)
        tl.store(q_ptr + offs, tl.where(x > 0, 1.0, e) / (1.0 + e), mask=inside)


class Forward:
    """nu of one packed side, or of two."""

    def __init__(self, sides: list[Packed], inv_tau: Tensor):
        self.sides = sides
        self.rows, self.cols = sides[0], sides[-1]
        self.one_side = len(sides) == 1
        self.on_device = inv_tau.device.type != "cpu"
        self.k = inv_tau if self.on_device else inv_tau.item()
        # Rows that are not normalised: the device knows how long they are.
        self.bounded = not self.rows.normalize
        self.bound = self.rows.longest() * self.cols.longest() if self.bounded else self.rows.norm
        self.log_terms = math.log(max(self.rows.n, self.cols.n))
        self.regime = (self.k, self.bound, self.log_terms)
        self.modes = {"SPLIT": self.rows.split, "TF32": self.rows.tf32, "UPCAST": INTERPRETED}
        self.flags = {"BOUNDED": self.bounded, "ON_DEVICE": self.on_device}

    def may_be(self, direct: bool) -> bool:
        """Whether this regime's kernels have to be launched: both, where only the device knows."""
        if self.bounded or self.on_device:
            return True
        margin = DIRECT_LIMIT.value - (self.k + self.log_terms)  # which the device may round to the other side
        return (margin > 0) == direct or abs(margin) < 1e-3

    def operands(self, side: Packed) -> tuple[Tensor | int, ...]:
        return side.x, side.lo, side.r, side.ids, side.low, side.high, side.n

    def run(self, losses: Tensor | None = None, q: Tensor | None = None) -> list[Tensor]:
        """nu of every side; with two views also every row's loss and its weight."""
        rows, cols = self.rows, self.cols
        nus = [side.x.new_empty(side.n, dtype=torch.float32) for side in self.sides]
        planes = self._sum() if self.may_be(direct=True) else [nu[None] for nu in nus]
        if self.may_be(direct=False):
            for side, other, nu in zip(self.sides, (cols, rows), nus, strict=False):
                self._shift(side, other, nu)
        for side, nu, sums in zip(self.sides, nus, planes, strict=True):
            block = 128
            _finish_kernel[(triton.cdiv(side.n, block),)](
                sums, sums.stride(0), sums.shape[0], nu, side.n,
                side.sim_pos, nu if losses is None else losses, nu if q is None else q, *self.regime,
                **self.flags, LOSS=losses is not None, BLOCK=block, num_warps=4,
            )  # fmt: skip
        return nus

    def _sum(self) -> list[Tensor]:
        tile = config.choose("direct", self.rows)
        tiles = config.tiles_of_square(self.rows.n, self.cols.n, tile.block_m)
        edge = tile.block_m * tiles
        row_squares, col_squares = (triton.cdiv(side.n, edge) for side in (self.rows, self.cols))
        new = self.rows.x.new_empty
        if self.one_side:
            planes = [new((row_squares + 1, self.rows.n), dtype=torch.float32)]
            programs = row_squares * (row_squares + 1) // 2
        else:
            planes = [new((squares, side.n), dtype=torch.float32)
                      for squares, side in zip((col_squares, row_squares), self.sides, strict=True)]  # fmt: skip
            programs = row_squares * col_squares
        _direct_kernel[(programs,)](
            *self.operands(self.rows), *self.operands(self.cols),
            planes[0], planes[-1], planes[0].stride(0), planes[-1].stride(0), col_squares, tiles,
            *self.regime, self.rows.DP, ONE_SIDE=self.one_side, **self.flags, **self.modes,
            BLOCK=tile.block_m, BLOCK_D=tile.block_d, WHOLE_D=tile.block_d == self.rows.DP, SPAN=SPAN,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return planes

    def _shift(self, side: Packed, other: Packed, nu: Tensor) -> None:
        tile = config.choose("shifted", side)
        _shifted_kernel[(triton.cdiv(side.n, tile.block_m),)](
            *self.operands(side), *self.operands(other), nu, *self.regime, side.DP,
            **self.flags, **self.modes, BLOCK=tile.block_m, BLOCK_D=tile.block_d, SPAN=SPAN,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
