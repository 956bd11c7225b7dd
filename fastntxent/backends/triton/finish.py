"""The last steps for each row: nu from the planes of sums (forward.py), and NT-Xent's losses from nu.

`_finish_kernel` adds a row's sums from all planes in a fixed order. If there is a loss, `_finish_kernel` calls
`end_rows` last, and so does `_owned_kernel`, which computes nu in one launch. Every program then also writes partial
results over its rows: the largest weight, the sum of the losses, and the sum of q sim_pos. The temperature's gradient
through the positives follows from this last sum.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .pack import Packed
from .sides import Sides, in_direct_range, load_inverse_temperature
from .tiles import SIZES, survey_weights

FINISHED = 128  # rows per program of `_finish_kernel`


@triton.jit
def end_rows(nu, pos_ptr, q_ptr, peaks_ptr, totals_ptr, dots_ptr, offs, n, k):
    """Write the sum of the NT-Xent losses log(1 + exp(nu - pos)) of a program's rows, and each q = sigmoid(nu - pos).

    Also write the results of `survey_weights`: the largest q and the sum of q sim_pos.
    """
    inside = offs < n
    sim_pos = tl.load(pos_ptr + offs, mask=inside, other=0.0)
    x = nu - k * sim_pos
    e = tl.exp(-tl.abs(x))
    # log(1 + e), with full relative accuracy for small e (Kahan's quotient).
    grown = 1.0 + e
    log1p = tl.where(grown == 1.0, e, tl.log(grown) * e / tl.where(grown == 1.0, 1.0, grown - 1.0))
    tl.store(totals_ptr + tl.program_id(0), tl.sum(tl.where(inside, tl.maximum(x, 0.0) + log1p, 0.0)))
    q = tl.where(x > 0, 1.0, e) / (1.0 + e)
    tl.store(q_ptr + offs, q, mask=inside)
    survey_weights(q, nu, q * sim_pos, peaks_ptr, dots_ptr, offs, n)


@triton.jit(do_not_specialize=SIZES)
def _finish_kernel(
    planes_ptr, nu_ptr, pos_ptr, q_ptr, peaks_ptr, totals_ptr, dots_ptr, bounds_ptr,
    n_planes, n, stride_plane, inv_tau, log_terms,
    LOSS: tl.constexpr, BOUNDED: tl.constexpr, ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write nu from the planes in the direct regime, and with LOSS the results of `end_rows`."""
    k = load_inverse_temperature(inv_tau, ON_DEVICE)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    if in_direct_range(bounds_ptr, k, log_terms, BOUNDED):
        sums = tl.zeros((BLOCK,), tl.float32)
        plane = planes_ptr + offs
        for _ in range(0, n_planes):
            sums += tl.load(plane, mask=inside, other=0.0)
            plane += stride_plane
        nu = tl.log(sums)
        tl.store(nu_ptr + offs, nu, mask=inside)
    else:
        nu = tl.load(nu_ptr + offs, mask=inside, other=0.0)
    if LOSS:
        end_rows(nu, pos_ptr, q_ptr, peaks_ptr, totals_ptr, dots_ptr, offs, n, k)


class RowEnds(NamedTuple):
    """Results of `end_rows`: q per row; per program the largest q, the sum of the losses and the sum of q sim_pos."""

    q: Tensor
    peaks: Tensor
    totals: Tensor
    dots: Tensor


def end_arguments(rows: Packed, nu: Tensor, ends: RowEnds | None) -> dict[str, Tensor]:
    """Return the arguments of a kernel that writes nu and, unless `ends` is None, the results of `end_rows`."""
    if ends is None:
        ends = RowEnds(q=rows.unread, peaks=rows.unread, totals=rows.unread, dots=rows.unread)
    return {
        "nu_ptr": nu, "pos_ptr": rows.sim_pos,
        "q_ptr": ends.q, "peaks_ptr": ends.peaks, "totals_ptr": ends.totals, "dots_ptr": ends.dots,
    }  # fmt: skip


def finish(sides: Sides, planes: Tensor, nu: Tensor, ends: RowEnds | None) -> int:
    """Write nu of the rows, and `ends` unless it is None. Return the number of programs."""
    rows, programs = sides.rows, triton.cdiv(sides.rows.n, FINISHED)
    sides.work.launch(
        _finish_kernel, (programs,), planes_ptr=planes, **end_arguments(rows, nu, ends),
        n_planes=planes.shape[0], n=rows.n, stride_plane=planes.stride(0), **sides.regime(),
        LOSS=ends is not None, BLOCK=FINISHED, num_warps=4,
    )  # fmt: skip
    return programs
