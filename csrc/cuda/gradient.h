// The gradient of sum_i w_i nu_i for one side, with the positives and the normalisation's Jacobian.
//
//     G_ij = w_i P_ij + w_j P_ji      gathered_i = sum_j G_ij u_j      radial_i = sum_j G_ij s_ij
//     d/du_i = k (gathered_i + (p_i + p_p(i)) u_p(i))        u_i . d/du_i = k (radial_i + (p_i + p_p(i)) sim_pos_i)
//     d/dz_i = (d/du_i - u_i (u_i . d/du_i)) / n_i           where n_i > eps, else (d/du_i) / eps
//
// A task owns a block of rows and a group of features: it forms G tile by tile in registers, where the accumulators of
// the first product are the operand of the second, and rounds nothing but G. radial is summed in float32 before that.
// The positives, with weights p, are taken from z itself, in float32.
#pragma once

#include "forward.h"

namespace fntx {

// Weights enter the tiles with the largest at this: float16 has no numbers below 6e-8, nor above 65504.
constexpr float G_SCALE = 8192;

// What one call's weights are multiplied with on the way in, and gradients on the way out.
struct Scales {
    float w, inv_r, out;

    FNTX_DEVICE Scales(const Arguments& a, const Side& cols) {
        const float largest = fmaxf(largest_of(a.largest_w), 1e-33f), largest_r = largest_of(cols.largest_r);
        w = G_SCALE / largest;
        inv_r = 1 / largest_r;
        out = (a.loss ? a.loss_weight : 1) * (largest / G_SCALE) * largest_r;
    }
    // As a tile takes it: w exp(-nu) in the direct range, else w.
    FNTX_DEVICE float weight(const Side& side, int row, bool direct) const {
        return side.w[row] * w * (direct ? exp2_fast(-side.nu[row] * LOG2_E) : 1);
    }
};

FNTX_DEVICE float positive_weight(const Arguments& a, int row) {
    return a.loss ? -a.loss_weight * a.sides[0].w[row] : a.d_pos[row];
}

// Floats between rows of the sums in shared memory: no multiple of the banks.
constexpr int STAGED_STRIDE = CHUNK + 8;

// A row of z's gradient, one chunk of it, by one warp; and with the first features its part of d_inv_tau.
template <class Op> FNTX_DEVICE void store_gradient(const Arguments& a, const Side& side, int row, int chunk,
                                                    const float* features, float radial, float out, float k) {
    const int m = row >= side.z[0].n;
    const int64_t n_first = side.z[0].n, index = row - m * n_first;
    const bool positive = a.paired && (a.loss || a.d_pos);
    const int partner = int(m ? index : index + n_first);
    const float norm = side.norm[row], length = a.normalize ? fmaxf(norm, a.eps) : 1;
    radial *= side.r[row] * out;
    float share = a.n_sides == 1 ? radial / 2 : radial, both = 0, partner_length = 1;
    if (positive) {
        const float own = positive_weight(a, row), sim = side.sim_pos[row];
        both = own + positive_weight(a, partner);
        radial += both * sim;
        share += own * sim;
        if (a.normalize) partner_length = fmaxf(side.norm[partner], a.eps);
    }
    if (chunk == 0 && lane() == 0) a.row_shares[row] = share;
    if (!side.d_z[m]) return;
    if (!a.normalize || !(norm > a.eps)) radial = 0;
    FNTX_UNROLL for (int i = 0; i < CHUNK / 32; ++i) {
        const int64_t d = int64_t(chunk) * CHUNK + i * 32 + lane();
        if (d >= a.D) break;
        float d_u = features[i * 32 + lane()] * out;
        if (positive) d_u += both * (element(Op(), side.z[1 - m], index, d) / partner_length);
        if (a.normalize) d_u = (d_u - element(Op(), side.z[m], index, d) / length * radial) / length;
        side.d_z[m][index * a.D + d] = d_u * k;
    }
}

template <class Op, class Form> FNTX_DEVICE void form_gradient(const Arguments& a, const Side& rows, const Side& cols) {
    typedef Tiles<Op, Form> Walk;
    const float k = inverse_temperature(a);
    const bool direct = in_direct_range(a, k);
    const Scales scales(a, cols);
    const int tiles = (cols.n + COLS - 1) / COLS, row_blocks = (rows.n + ROWS<Form> - 1) / ROWS<Form>;
    const int groups = (a.chunks + a.group - 1) / a.group;
    for (int task = block(); task < row_blocks * groups; task += blocks()) {
        const int first_row = task / groups * ROWS<Form>, first_chunk = task % groups * a.group;
        const int group = a.chunks - first_chunk < a.group ? a.chunks - first_chunk : a.group;
        const int after = first_chunk + group;
        Walk walk(a, rows, cols, first_row, 0, tiles, after < a.chunks ? after : 0);
        const LaneRows mine(rows, first_row + walk.warp_row());
        float w[2], nu[2], radial[2] = {0, 0};
        FNTX_UNROLL for (int h = 0; h < 2; ++h) {
            w[h] = scales.weight(rows, mine.row[h], direct);
            nu[h] = rows.nu[mine.row[h]];
        }
        typename Walk::Gradient acc;
        FNTX_UNROLL for (int d = 0; d < Form::GROUP * CHUNK / 8; ++d)
            FNTX_UNROLL for (int e = 0; e < 4; ++e) acc[d][e] = 0;

        const auto weights = [&](ColumnVectors& v, int i, int col) {
            v.w[i] = scales.weight(cols, col, direct);
            v.nu[i] = cols.nu[col];
        };
        walk.walk(weights, [&](typename Walk::Products& s, const ColumnVectors& v, int first_col, int slot) {
            const Mask mask(rows, mine, cols, v, first_col);
            FNTX_UNROLL for (int j = 0; j < Walk::COL_TILES; ++j)
                FNTX_UNROLL for (int e = 0; e < 4; ++e) {
                    const int h = e / 2, col = walk.warp_col() + 8 * j + lane() % 4 * 2 + e % 2;
                    const float x = s[j][e];
                    float g;
                    if (direct) {
                        g = exp2_fast(x * (v.r[col] * (mine.r[h] * k * LOG2_E))) * (w[h] + v.w[col]);
                    } else {
                        const float logit = x * (mine.r[h] * v.r[col]) * k;
                        g = w[h] * exp2_fast((logit - nu[h]) * LOG2_E);
                        g += v.w[col] * exp2_fast((logit - v.nu[col]) * LOG2_E);
                    }
                    g *= v.r[col] * scales.inv_r;
                    if (!mask.whole && !mask.apart(h, col)) g = 0;
                    radial[h] += x * g;
                    s[j][e] = g;
                }
            walk.gather(acc, s, slot, group);
        });

        sync_block();  // the tiles' shared memory is free
        const Shared<Op, Form> shared(a);
        float* features = reinterpret_cast<float*>(shared.cols);
        float* of_rows = reinterpret_cast<float*>(shared.vectors);
        FNTX_UNROLL for (int h = 0; h < 2; ++h) {
            radial[h] += shuffle_xor(radial[h], 1);
            radial[h] += shuffle_xor(radial[h], 2);
        }
        FNTX_UNROLL for (int c = 0; c < Form::GROUP; ++c) {
            if (c >= group) break;
            // Warps that share rows add their columns' parts one after the other.
            for (int part = 0; part < COL_WARPS<Form>; ++part) {
                if (warp() % COL_WARPS<Form> == part)
                    FNTX_UNROLL for (int h = 0; h < 2; ++h) {
                        const int row = walk.warp_row() + lane() / 4 + 8 * h;
                        if (c == 0 && lane() % 4 == 0) of_rows[row] = radial[h] + (part ? of_rows[row] : 0);
                        FNTX_UNROLL for (int d = 0; d < CHUNK / 8; ++d)
                            FNTX_UNROLL for (int e = 0; e < 2; ++e) {
                                float& sum = features[row * STAGED_STRIDE + 8 * d + lane() % 4 * 2 + e];
                                sum = acc[c * CHUNK / 8 + d][2 * h + e] + (part ? sum : 0);
                            }
                    }
                sync_block();
            }
            for (int r = warp(); r < ROWS<Form> && first_row + r < rows.n; r += WARPS)
                store_gradient<Op>(a, rows, first_row + r, first_chunk + c, features + r * STAGED_STRIDE, of_rows[r],
                                   scales.out, k);
            sync_block();
        }
    }
}

}  // namespace fntx
