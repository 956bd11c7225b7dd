// Packs rows: norms, positives, group ids, and the operands of the matrix units.
//
//     n_i = |z_i|,  u_i = z_i / max(n_i, eps) = r_i x_i,  sim_pos_i = u_i . u_p(i)
//
// Without `normalize`, u_i = z_i. Row p(i) is the positive of row i. x_i is z_i times the power of two that brings the
// largest magnitude in the row to [1, 2). For half-precision rows this scaling is exact, whatever the norm of the row,
// unless an x is subnormal: a float16 x below 2^-14 is rounded to a multiple of 2^-24. A float32 row becomes the sum of
// two float16 parts, which together have 22 bits of mantissa. A warp packs one row of each matrix of a side, so it
// holds both views of a sample. z is read twice (the second time from a cache), and x is written once.
#pragma once

#include "tiles.h"

namespace fntx {

FNTX_DEVICE float element(Half, const fntx_matrix& z, int64_t row, int64_t d) {
    return from_bits(Half(), static_cast<const uint16_t*>(z.data)[row * z.stride_row + d * z.stride_col]);
}
FNTX_DEVICE float element(Bfloat, const fntx_matrix& z, int64_t row, int64_t d) {
    return from_bits(Bfloat(), static_cast<const uint16_t*>(z.data)[row * z.stride_row + d * z.stride_col]);
}
FNTX_DEVICE float element(Split, const fntx_matrix& z, int64_t row, int64_t d) {
    return static_cast<const float*>(z.data)[row * z.stride_row + d * z.stride_col];
}

FNTX_DEVICE float warp_sum(float x) {
    FNTX_UNROLL for (int mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}
FNTX_DEVICE float warp_max(float x) {
    FNTX_UNROLL for (int mask = 16; mask; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}

// Store the block's largest x in of_blocks[block()].
FNTX_DEVICE void store_block_max(float x, float* of_blocks) {
    float* of_warps = reinterpret_cast<float*>(shared_memory());
    x = warp_max(x);
    sync_block();
    if (lane() == 0) of_warps[warp()] = x;
    sync_block();
    if (thread() == 0) {
        for (int i = 1; i < WARPS; ++i) x = fmaxf(x, of_warps[i]);
        of_blocks[block()] = x;
    }
}

// Store feature d of a row of x in Op::PARTS parts. Each part is x minus the parts before it, rounded.
template <class Op>
FNTX_DEVICE void store_parts(const Arguments& a, const PackedSide& side, int64_t row, int64_t d, float x) {
    FNTX_UNROLL for (int p = 0; p < Op::PARTS; ++p) {
        const uint16_t bits = to_bits(Op(), x);
        side.x[p][row * a.chunks * CHUNK + d] = bits;
        x -= from_bits(Op(), bits);
    }
}

template <class Op>
FNTX_DEVICE void pack_rows(const Arguments& a, const PackedSide& side, int64_t index, float& longest,
                           float& largest_r) {
    const bool there[2] = {index < side.z[0].n, index < side.z[1].n};
    float largest[2] = {0, 0}, down[2], up[2], square[2] = {0, 0}, product = 0, r[2];
    for (int64_t d = lane(); d < a.D; d += 32)
        FNTX_UNROLL for (int m = 0; m < 2; ++m) if (there[m]) largest[m] =
            fmaxf(largest[m], fabsf(element(Op(), side.z[m], index, d)));
    FNTX_UNROLL for (int m = 0; m < 2; ++m) {
        // For `largest` in [2^e, 2^(e + 1)), down is 2^-e and up is 2^e, both clamped to normal numbers. Elements are
        // multiplied by 2^-e before they are squared. The largest is then near 1, so the sum of squares stays in the
        // range of float32.
        int exponent = float_bits(warp_max(largest[m])) >> 23 & 0xff;
        exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
        down[m] = bits_float(uint32_t(254 - exponent) << 23);
        up[m] = bits_float(uint32_t(exponent) << 23);
    }
    for (int64_t d = lane(); d < a.chunks * CHUNK; d += 32) {
        float x[2];
        FNTX_UNROLL for (int m = 0; m < 2; ++m) x[m] =
            there[m] && d < a.D ? element(Op(), side.z[m], index, d) * down[m] : 0;
        FNTX_UNROLL for (int m = 0; m < 2; ++m) {
            square[m] += x[m] * x[m];
            if (there[m]) store_parts<Op>(a, side, index + m * side.z[0].n, d, x[m]);
        }
        product += x[0] * x[1];
    }
    FNTX_UNROLL for (int m = 0; m < 2; ++m) {
        const float root = sqrtf(warp_sum(square[m])), norm = root * up[m];
        r[m] = up[m];
        if (a.normalize) r[m] = norm > a.eps ? 1 / root : up[m] / a.eps;  // 2^e / max(n, eps)
        if (!there[m]) continue;
        longest = fmaxf(longest, norm);
        largest_r = fmaxf(largest_r, r[m]);
        if (lane()) continue;
        const int64_t row = index + m * side.z[0].n;
        side.norm[row] = norm;
        side.r[row] = r[m];
        side.ids[row] = side.given_ids ? side.given_ids[row] : index;
    }
    const float sim_pos = warp_sum(product) * r[0] * r[1];
    FNTX_UNROLL for (int m = 0; m < 2; ++m) if (a.paired && there[m] && lane() == 0)
        side.sim_pos[index + m * side.z[0].n] = sim_pos;
}

template <class Op> FNTX_DEVICE void pack(const Arguments& a, const PackedSide& side) {
    const int64_t first = block() * WARPS + warp(), stride = blocks() * WARPS;
    const int64_t samples = side.z[0].n > side.z[1].n ? side.z[0].n : side.z[1].n;
    float longest = 0, largest_r = 0;
    for (int64_t index = first; index < samples; index += stride) pack_rows<Op>(a, side, index, longest, largest_r);
    for (int64_t row = side.n + first; row < side.padded; row += stride) {
        for (int64_t d = lane(); d < a.chunks * CHUNK; d += 32) store_parts<Op>(a, side, row, d, 0);
        if (lane() == 0) side.r[row] = 0, side.ids[row] = 0;
    }
    store_block_max(longest, side.longest);
    store_block_max(largest_r, side.largest_r);
}

}  // namespace fntx
