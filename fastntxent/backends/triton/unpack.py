"""Gradients out: what `backward.py` gathered, taken through the positives and the normalisation.

With gathered_i = sum_j G_ij u_j, radial_i = sum_j G_ij s_ij and the positives' weights p:

    d/du_i = k (gathered_i + (p_i + p_p(i)) u_p(i))        u_i . d/du_i = k (radial_i + (p_i + p_p(i)) sim_pos_i)
    d/dz_i = (d/du_i - u_i (u_i . d/du_i)) / n_i           where n_i > eps, else (d/du_i) / eps
    d/dk   = share sum_i radial_i + sum_i p_i sim_pos_i    share 1/2 of one side, 1 of two

Reads z of a row and of its positive, a program owns SPAN rows. Sums over all rows were left in parts, by the programs
of the kernels before this one; the first program here adds them, and takes no launch of its own for it.
"""

import triton
import triton.language as tl

from .pack import load_stacked
from .tiles import SIZES, inverse_temperature, largest_of, largest_scale, sum_of


@triton.jit(do_not_specialize=SIZES)
def unpack_kernel(
    gathered_ptr, s_gathered, radial_ptr, s_radial, n_gathered, radial_parts, n_radial, peaks_ptr, n_peaks,
    totals_ptr, dots_ptr, n_dots, first_ptr, second_ptr, norm_ptr, pos_ptr, d_pos_ptr,
    d_first_ptr, d_second_ptr, d_inv_tau_ptr, loss_ptr,
    n_first, n, D, DP, eps, factor, pos_factor, share, loss_factor, inv_tau, bounds,
    s_first_m, s_first_d, s_second_m, s_second_d,
    NORMALIZE: tl.constexpr, PAIRED: tl.constexpr, LOSS: tl.constexpr, BOUNDED: tl.constexpr, ON_DEVICE: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """d/dz of SPAN rows; the first program's also d/dk and, of weights that came with it, the loss."""
    k = inverse_temperature(inv_tau, ON_DEVICE)
    row = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    inside = row < n
    partner = tl.where(row < n_first, row + n_first, row - n_first)
    scale = factor * largest_of(peaks_ptr, n_peaks) * largest_scale(bounds, BOUNDED)
    norm = tl.load(norm_ptr + row, mask=inside, other=1.0)
    length = tl.maximum(norm, eps)
    radial = tl.zeros((SPAN,), tl.float32)
    of_part = radial_ptr + row
    for _ in range(0, n_gathered):
        radial += tl.load(of_part, mask=inside, other=0.0)
        of_part += s_radial
    radial *= scale
    if PAIRED:
        both = tl.load(d_pos_ptr + row, mask=inside, other=0.0) * pos_factor
        both += tl.load(d_pos_ptr + partner, mask=inside, other=0.0) * pos_factor
        radial += both * tl.load(pos_ptr + row, mask=inside, other=0.0)
        partner_length = tl.maximum(tl.load(norm_ptr + partner, mask=inside, other=1.0), eps)
    if tl.program_id(0) == 0:
        d_inv_tau = sum_of(radial_parts, n_radial) * scale * share
        if PAIRED:
            d_inv_tau += sum_of(dots_ptr, n_dots) * pos_factor
        tl.store(d_inv_tau_ptr, d_inv_tau)
        if LOSS:
            tl.store(loss_ptr, sum_of(totals_ptr, n_dots) * loss_factor)
    wide = row.to(tl.int64)
    for start in range(0, DP, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        here = inside[:, None] & (d < D)[None, :]
        d_u = tl.zeros((SPAN, BLOCK_D), tl.float32)
        part = gathered_ptr + wide[:, None] * DP + d[None, :]
        for _ in range(0, n_gathered):
            d_u += tl.load(part, mask=here, other=0.0)
            part += s_gathered
        d_u *= scale
        if PAIRED:
            u = load_stacked(
                first_ptr, second_ptr, partner, d, n_first, n, D, s_first_m, s_first_d, s_second_m, s_second_d
            )
            if NORMALIZE:
                u = u / partner_length[:, None]
            d_u += both[:, None] * u
        if NORMALIZE:
            u = load_stacked(first_ptr, second_ptr, row, d, n_first, n, D, s_first_m, s_first_d, s_second_m, s_second_d)
            d_u -= u / length[:, None] * tl.where(norm > eps, radial, 0.0)[:, None]
            d_u = d_u / length[:, None]
        of_first = (row < n_first)[:, None]
        tl.store(d_first_ptr + wide[:, None] * D + d[None, :], d_u * k, mask=here & of_first)
        tl.store(d_second_ptr + (wide - n_first)[:, None] * D + d[None, :], d_u * k, mask=here & ~of_first)
