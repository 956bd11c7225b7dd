"""The gradient of sum_i w_i nu_i for one side of packed rows, as far as it is O(M^2 D).

    G_ij = w_i P_ij + w_j P_ji      gathered_i = sum_j G_ij u_j      radial_i = sum_j G_ij s_ij

`Packed.unpack` makes the gradients in z and k of these. One owner per row block, G formed once a tile, nothing added
atomically. radial is summed in float32 before G becomes an operand: what is rounded to half precision is G alone.

Where they fit, a program of `_fused_kernel` holds the sums of all its rows' features: it forms a tile of G, rounds it,
and multiplies it with the columns, reading x of all columns once. Where they do not (config.py), `_form_kernel` writes
G of a panel of rows, and `_gather_kernel` multiplies it, a block of features at a time. The panel is as high as the
workspace allows; it costs one write of G and about one read.

Two regimes, as in forward.py: launched both where only the device knows which one it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .forward import Forward
from .pack import PADDED_ROWS, SPAN, Packed
from .tiles import (
    add_product,
    in_direct_range,
    in_two_parts,
    inverse_temperature,
    load_rows,
    masked,
    rounded,
    scaled_weights,
    similarities,
    store_rows,
    weigh,
)

WORKSPACE = 256 * 2**20  # bytes of a panel of G

# The largest weight in a tile, of operands of that type: float16 has no numbers below 6e-8, nor above 65504.
_G_SCALE = {torch.float16: 4096.0, torch.bfloat16: 1.0, torch.float32: 1.0}


@triton.jit
def _fused_kernel(
    rows_x, rows_lo, rows_r, rows_ids, rows_low, rows_high, n_rows,
    cols_x, cols_lo, cols_r, cols_ids, cols_low, cols_high, n_cols,
    rows_w, rows_nu, cols_w, cols_nu, largest_ptr, gathered_ptr, radial_ptr,
    inv_tau, bound, log_terms, DP,
    SHIFTED: tl.constexpr, G_SCALE: tl.constexpr, BOUNDED: tl.constexpr, ON_DEVICE: tl.constexpr,
    SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    k = inverse_temperature(inv_tau, ON_DEVICE)
    if in_direct_range(k, bound, log_terms, BOUNDED) == SHIFTED:
        return
    largest, largest_r = tl.load(largest_ptr), tl.load(largest_ptr + 1)
    row = tl.program_id(0) * BLOCK_M
    offs_m = row + tl.arange(0, BLOCK_M)
    r_m = tl.load(rows_r + offs_m)
    w_m, nu_m = scaled_weights(rows_w, rows_nu, offs_m, n_rows, largest, G_SCALE, SHIFTED)
    x_m = load_rows(rows_x, row, 0, DP, BLOCK_M, BLOCK_D)
    lo_m = load_rows(rows_lo, row, 0, DP, BLOCK_M, BLOCK_D) if SPLIT else x_m
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    radial = tl.zeros((BLOCK_M,), tl.float32)
    for col in range(0, n_cols, BLOCK_N):
        offs_n = col + tl.arange(0, BLOCK_N)
        x_n = load_rows(cols_x, col, 0, DP, BLOCK_N, BLOCK_D)
        lo_n = load_rows(cols_lo, col, 0, DP, BLOCK_N, BLOCK_D) if SPLIT else x_n
        r_n = tl.load(cols_r + offs_n)
        w_n, nu_n = scaled_weights(cols_w, cols_nu, offs_n, n_cols, largest, G_SCALE, SHIFTED)
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        s = add_product(s, x_m, lo_m, tl.trans(x_n), tl.trans(lo_n), SPLIT, TF32, UPCAST)
        g = weigh(s, r_m, r_n, k, w_m, nu_m, w_n, nu_n, SHIFTED)
        g = masked(
            g, 0.0, rows_ids, rows_low, rows_high, n_rows, cols_ids, cols_low, cols_high, n_cols, row, col,
            BLOCK_M, BLOCK_N, SPAN,
        )  # fmt: skip
        g *= (r_n / largest_r)[None, :]
        radial += tl.sum(s * g, 1)
        g_high, g_low = in_two_parts(g, x_n.dtype, SPLIT, UPCAST)
        acc = add_product(acc, g_high, g_low, x_n, lo_n, SPLIT, TF32, UPCAST)
    tl.store(radial_ptr + offs_m, radial * r_m)
    store_rows(gathered_ptr, acc, row, 0, DP, BLOCK_M, BLOCK_D)


@triton.jit
def _form_kernel(
    rows_x, rows_lo, rows_r, rows_ids, rows_low, rows_high, n_rows,
    cols_x, cols_lo, cols_r, cols_ids, cols_low, cols_high, n_cols,
    rows_w, rows_nu, cols_w, cols_nu, largest_ptr, g_ptr, s_g, parts_ptr, s_part, first_row,
    inv_tau, bound, log_terms, DP,
    SHIFTED: tl.constexpr, G_SCALE: tl.constexpr, BOUNDED: tl.constexpr, ON_DEVICE: tl.constexpr,
    SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A tile of a panel's G, each column times its r over the largest, and its part of sum_j G_ij s_ij / r_i."""
    k = inverse_temperature(inv_tau, ON_DEVICE)
    if in_direct_range(k, bound, log_terms, BOUNDED) == SHIFTED:
        return
    largest, largest_r = tl.load(largest_ptr), tl.load(largest_ptr + 1)
    height, col = tl.program_id(1) * BLOCK_M, tl.program_id(0) * BLOCK_N
    row = first_row + height
    offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    s = similarities(rows_x, rows_lo, cols_x, cols_lo, row, col, DP, BLOCK_M, BLOCK_N, BLOCK_D, SPLIT, TF32, UPCAST)
    r_m, r_n = tl.load(rows_r + offs_m), tl.load(cols_r + offs_n)
    w_m, nu_m = scaled_weights(rows_w, rows_nu, offs_m, n_rows, largest, G_SCALE, SHIFTED)
    w_n, nu_n = scaled_weights(cols_w, cols_nu, offs_n, n_cols, largest, G_SCALE, SHIFTED)
    g = weigh(s, r_m, r_n, k, w_m, nu_m, w_n, nu_n, SHIFTED)
    g = masked(
        g, 0.0, rows_ids, rows_low, rows_high, n_rows, cols_ids, cols_low, cols_high, n_cols, row, col,
        BLOCK_M, BLOCK_N, SPAN,
    )  # fmt: skip
    g *= (r_n / largest_r)[None, :]
    offs_h = height + tl.arange(0, BLOCK_M)
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * s_part + offs_h, tl.sum(s * g, 1))
    tl.store(g_ptr + offs_h.to(tl.int64)[:, None] * s_g + offs_n[None, :], rounded(g, g_ptr.dtype.element_ty, UPCAST))


@triton.jit
def _gather_kernel(
    g_ptr, s_g, parts_ptr, s_part, n_parts, first_row, cols_x, cols_lo, n_cols, rows_r, gathered_ptr, radial_ptr, DP,
    SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A panel's G times the columns, for a block of rows and features. The blocks of one row run together, and share
    its G in the second-level cache."""
    height, d = tl.program_id(1) * BLOCK_M, tl.program_id(0) * BLOCK_D
    offs_h = height + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for col in range(0, n_cols, BLOCK_N):
        offs_n = col + tl.arange(0, BLOCK_N)
        g = tl.load(g_ptr + offs_h.to(tl.int64)[:, None] * s_g + offs_n[None, :])
        x_n = load_rows(cols_x, col, d, DP, BLOCK_N, BLOCK_D)
        lo_n = load_rows(cols_lo, col, d, DP, BLOCK_N, BLOCK_D) if SPLIT else x_n
        high, low = in_two_parts(g, x_n.dtype, SPLIT, UPCAST)
        acc = add_product(acc, high, low, x_n, lo_n, SPLIT, TF32, UPCAST)
    store_rows(gathered_ptr, acc, first_row + height, d, DP, BLOCK_M, BLOCK_D)
    if d == 0:
        radial = tl.zeros((BLOCK_M,), tl.float32)
        part = parts_ptr + offs_h
        for _ in range(0, n_parts):
            radial += tl.load(part)
            part += s_part
        tl.store(radial_ptr + first_row + offs_h, radial * tl.load(rows_r + first_row + offs_h))


class Backward:
    """The gradient of one packed side at a time, with the forward's regime."""

    def __init__(self, forward: Forward, weights: list[Tensor], nus: list[Tensor]):
        self.forward = forward
        self.weights, self.nus = [w.contiguous() for w in weights], [nu.contiguous() for nu in nus]
        # Weights of any magnitude (a loss scaler's 2^16, a mean's 1e-6) enter the tiles with the largest at 1. Those of
        # rows without negatives do not count, whatever they are.
        counted = [
            torch.where(nu == -torch.inf, 0, w).abs().amax() for w, nu in zip(self.weights, self.nus, strict=True)
        ]
        self.largest = torch.stack(counted).amax().clamp_min(torch.finfo(torch.float32).tiny)

    def run(
        self, which: int, *, d_pos: Tensor | None = None, weight: float = 1.0, pos_factor: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """d/dz of both matrices of side `which`, and the side's sum of G_ij s_ij: half of it is d/dk of one side, the
        whole of one of two. d_pos are the weights of the positives, `weight` a factor of w, `pos_factor` of d_pos."""
        rows, cols = self.forward.sides[which], self.forward.sides[-1 - which]
        operands = (*self.forward.operands(rows), *self.forward.operands(cols))
        largest = torch.stack((self.largest, cols.largest_scale()))
        weights = (self.weights[which], self.nus[which], self.weights[-1 - which], self.nus[-1 - which], largest)
        gathered = rows.x.new_empty(rows.x.shape, dtype=torch.float32)
        radial = torch.empty_like(rows.r)
        fused = config.fuses(config.family(rows.x.device), config.width(rows), rows.DP)
        launch = self._fused if fused else self._panels
        launch(rows, cols, (*operands, *weights), gathered, radial)
        factor = weight / _G_SCALE[rows.x.dtype]
        share = 0.5 if self.forward.one_side else 1.0
        return rows.unpack(
            gathered, radial, largest.prod(), factor, share, d_pos, pos_factor, self.forward.k, self.forward.on_device
        )

    def _regimes(self) -> list[bool]:
        return [shifted for shifted in (False, True) if self.forward.may_be(direct=not shifted)]

    def _fused(
        self, rows: Packed, cols: Packed, operands: tuple[Tensor | int, ...], gathered: Tensor, radial: Tensor
    ) -> None:
        tile = config.choose("fused", rows)
        for shifted in self._regimes():
            _fused_kernel[(triton.cdiv(rows.n, tile.block_m),)](
                *operands, gathered, radial, *self.forward.regime, rows.DP,
                SHIFTED=shifted, G_SCALE=_G_SCALE[rows.x.dtype], **self.forward.flags, **self.forward.modes,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=rows.DP, SPAN=SPAN,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip

    def _panels(
        self, rows: Packed, cols: Packed, operands: tuple[Tensor | int, ...], gathered: Tensor, radial: Tensor
    ) -> None:
        form, gather = config.choose("form", rows), config.choose("gather", rows)
        g_dtype = torch.float32 if rows.split else rows.x.dtype
        width = cols.x.shape[0]
        height = max(WORKSPACE // (width * g_dtype.itemsize) // PADDED_ROWS, 1) * PADDED_ROWS
        height = min(height, rows.x.shape[0])
        g = rows.x.new_empty((height, width), dtype=g_dtype)
        parts = rows.x.new_empty((width // form.block_n, height), dtype=torch.float32)
        for first_row in range(0, rows.n, height):
            n_here = min(height, rows.n - first_row)
            for shifted in self._regimes():
                _form_kernel[(width // form.block_n, triton.cdiv(n_here, form.block_m))](
                    *operands, g, width, parts, height, first_row, *self.forward.regime, rows.DP,
                    SHIFTED=shifted, G_SCALE=_G_SCALE[rows.x.dtype], **self.forward.flags, **self.forward.modes,
                    BLOCK_M=form.block_m, BLOCK_N=form.block_n, BLOCK_D=form.block_d, SPAN=SPAN,
                    num_warps=form.num_warps, num_stages=form.num_stages,
                )  # fmt: skip
            _gather_kernel[(rows.DP // gather.block_d, triton.cdiv(n_here, gather.block_m))](
                g, width, parts, height, parts.shape[0], first_row, cols.x, cols.lo, cols.n, rows.r,
                gathered, radial, rows.DP, **self.forward.modes,
                BLOCK_M=gather.block_m, BLOCK_N=gather.block_n, BLOCK_D=gather.block_d,
                num_warps=gather.num_warps, num_stages=gather.num_stages,
            )  # fmt: skip
