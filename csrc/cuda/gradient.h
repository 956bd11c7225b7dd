// The gradient of sum_i w_i nu_i for one side, with the positives and the Jacobian of the normalisation.
//
//     G_ij = w_i P_ij + w_j P_ji      gathered_i = sum_j G_ij u_j      radial_i = sum_j G_ij s_ij
//     d/du_i = k (gathered_i + (a_i + a_p(i)) u_p(i))        u_i . d/du_i = k (radial_i + (a_i + a_p(i)) sim_pos_i)
//     d/dz_i = (d/du_i - u_i (u_i . d/du_i)) / n_i           if n_i > eps, otherwise (d/du_i) / eps
//
// Here k is the inverse temperature, P_ij = exp(k s_ij - nu_i), row p(i) is the positive of row i, a_i is the
// derivative of the total loss with respect to the logit of row i's positive, and n_i = |z_i|. If the rows are not
// normalised, d/dz_i = d/du_i.
//
// A task is a block of rows and a group of features. A task forms G tile by tile in registers: the accumulators of the
// first product (the similarities) become G, the first operand of the second product (the gradient). Only G is rounded
// to the operand type, and radial is summed in float32 before that rounding. The positives u_p(i) are read from z
// itself, in float32.
#pragma once

#include "forward.h"

namespace fntx {

// The factors that scale weights and columns on input, and gradients on output.
struct Scales {
    float w, r, inv_r, out;

    FNTX_DEVICE Scales(const Arguments& a, const PackedSide& cols) {
        const Largest found(a.largest_w, cols.largest_r);
        const float largest = fmaxf(found.first, SMALLEST_UNIT);
        w = G_SCALE / largest;
        // r is a power of two, so that dividing by it does not change how logits are rounded.
        const uint32_t exponent = float_bits(found.second) >> 23;
        r = bits_float(exponent << 23), inv_r = bits_float((254 - exponent) << 23);
        out = (a.loss ? a.loss_weight : 1) * (largest / G_SCALE) * r;
    }
    // Return a row's weight in the form that tiles use: scaled and, in the direct range (tiles.h), multiplied by
    // exp(-nu).
    FNTX_DEVICE float weight(float of_row, float nu, bool direct) const {
        return of_row * w * (direct ? exp_fast(-nu) : 1);
    }
};

FNTX_DEVICE float positive_weight(const Arguments& a, int row) {
    return a.loss ? -a.loss_weight * a.sides[0].w[row] : a.d_pos[row];
}

// The row stride, in floats, of the sums in shared memory. It is not a multiple of the number of banks.
constexpr int STAGED_STRIDE = CHUNK + 8;

// The sums of a block of rows in shared memory, in one part for each warp that shares a row.
struct Staged {
    float features[COL_WARPS][ROWS * STAGED_STRIDE];
    float radial[COL_WARPS][ROWS];

    FNTX_DEVICE float sum_feature(int row, int d) const {
        float sum = 0;
        FNTX_UNROLL for (int part = 0; part < COL_WARPS; ++part) sum += features[part][row * STAGED_STRIDE + d];
        return sum;
    }
    FNTX_DEVICE float sum_radial(int row) const {
        float sum = 0;
        FNTX_UNROLL for (int part = 0; part < COL_WARPS; ++part) sum += radial[part][row];
        return sum;
    }
};

// Store a chunk of the gradient with respect to a row of z. The threads that share the row divide the chunk's features
// among themselves. With the first chunk, one of these threads also stores the row's term of d_inv_tau.
template <class Op>
FNTX_DEVICE void store_gradient(const Arguments& a, const PackedSide& side, int first_row, int chunk,
                                const Staged& sums, float out, float k) {
    constexpr int SHARED_BY = THREADS / ROWS, FEATURES = CHUNK / SHARED_BY;
    const int in_block = thread() / SHARED_BY, row = first_row + in_block;
    if (row >= side.n) return;
    const int m = row >= side.z[0].n;
    const int64_t n_first = side.z[0].n, index = row - m * n_first;
    const bool positive = a.paired && (a.loss || a.d_pos);
    const int partner = int(m ? index : index + n_first);
    const float norm = side.norm[row], inv_length = a.normalize ? 1 / fmaxf(norm, a.eps) : 1;
    float radial = sums.sum_radial(in_block) * side.r[row] * out;
    float d_inv_tau = a.n_sides == 1 ? radial / 2 : radial, both = 0, of_partner = 0;
    if (positive) {
        const float own = positive_weight(a, row), sim = side.sim_pos[row];
        both = own + positive_weight(a, partner);
        radial += both * sim;
        d_inv_tau += own * sim;
        of_partner = a.normalize ? both / fmaxf(side.norm[partner], a.eps) : both;
    }
    if (chunk == 0 && thread() % SHARED_BY == 0) a.row_d_inv_tau[row] = d_inv_tau;
    if (!side.d_z[m]) return;
    if (!a.normalize || !(norm > a.eps)) radial = 0;
    float d_u[FEATURES];
    const int64_t first = int64_t(chunk) * CHUNK + thread() % SHARED_BY;
    FNTX_UNROLL for (int i = 0; i < FEATURES; ++i) {
        const int64_t d = first + i * SHARED_BY;
        if (d >= a.D) break;
        d_u[i] = sums.sum_feature(in_block, int(d - int64_t(chunk) * CHUNK)) * out;
        if (positive) d_u[i] += element(Op(), side.z[1 - m], index, d) * of_partner;
        if (a.normalize) d_u[i] = (d_u[i] - element(Op(), side.z[m], index, d) * inv_length * radial) * inv_length;
    }
    // Store last, so that no load above waits for a store.
    FNTX_UNROLL for (int i = 0; i < FEATURES; ++i) {
        const int64_t d = first + i * SHARED_BY;
        if (d < a.D) side.d_z[m][index * a.D + d] = d_u[i] * k;
    }
}

template <class Op>
FNTX_DEVICE void form_gradient(const Arguments& a, const PackedSide& rows, const PackedSide& cols) {
    typedef TileWalk<Op> Walk;
    typedef ColumnVectors<Op> Vectors;
    const float k = inverse_temperature(a);
    const bool direct = in_direct_range(a, k);
    const Scales scales(a, cols);
    const int tiles = (cols.n + COLS<Op> - 1) / COLS<Op>, row_blocks = (rows.n + ROWS - 1) / ROWS;
    const int groups = (a.chunks + a.group - 1) / a.group;
    for (int task = block(); task < row_blocks * groups; task += blocks()) {
        const int first_row = task / groups * ROWS, first_chunk = task % groups * a.group;
        const int group = a.chunks - first_chunk < a.group ? a.chunks - first_chunk : a.group;
        const int after = first_chunk + group;
        const LaneRows mine(rows, first_row);
        float w[2], nu[2], logit_scale[2], radial[2] = {0, 0};
        FNTX_UNROLL for (int h = 0; h < 2; ++h) {
            nu[h] = rows.nu[mine.row[h]];
            w[h] = scales.weight(rows.w[mine.row[h]], nu[h], direct);
            logit_scale[h] = mine.r[h] * k * LOG2_E<float> * scales.r;
        }
        Walk walk(a, rows, cols, mine, first_row, 0, tiles, after < a.chunks ? after : 0);
        typename Walk::GradientSums acc;
        FNTX_UNROLL for (int d = 0; d < GROUP * CHUNK / 8; ++d) FNTX_UNROLL for (int e = 0; e < 4; ++e) acc[d][e] = 0;

        const auto weight = [&](Column& column, int col) { column.w = cols.w[col], column.nu = cols.nu[col]; };
        const auto scale = [&](Column& column) {
            column.w = scales.weight(column.w, column.nu, direct);
            if (direct) column.r *= scales.inv_r, column.w *= column.r;
        };
        walk.each_tile(weight, scale, [&](typename Walk::Products& s, const Mask& mask, const Vectors& v, int slot) {
            // Both functions return r_j (w_i P_ij + w_j P_ji), scaled. In the direct range, v.r and v.w already hold
            // r_j and r_j w_j exp(-nu_j), scaled.
            const auto form = [&](float x, int h, int col) {
                return exp2_fast(x * v.r[col] * logit_scale[h]) * (w[h] * v.r[col] + v.w[col]);
            };
            const auto form_shifted = [&](float x, int h, int col) {
                const float logit = x * (mine.r[h] * v.r[col]) * k;
                const float of_row = w[h] * exp_fast(logit - nu[h]);
                return (of_row + v.w[col] * exp_fast(logit - v.nu[col])) * (v.r[col] * scales.inv_r);
            };
            const auto put = [&](float& x, int h, float g) { radial[h] += x * g, x = g; };
            if (!direct)
                walk.each(
                    s, [&](float& x, int h, int col) { put(x, h, mask.apart(h, col) ? form_shifted(x, h, col) : 0); });
            else if (mask.whole)
                walk.each(s, [&](float& x, int h, int col) { put(x, h, form(x, h, col)); });
            else
                walk.each(s, [&](float& x, int h, int col) { put(x, h, mask.apart(h, col) ? form(x, h, col) : 0); });
            walk.gather(acc, s, slot, group);
        });

        static_assert(sizeof(Staged) <= 3 * Op::PARTS * STEP<Op> * sizeof(uint16_t),
                      "a block has at least three steps in shared memory");
        Staged& staged = *reinterpret_cast<Staged*>(shared_memory());
        FNTX_UNROLL for (int h = 0; h < 2; ++h) {
            radial[h] += shuffle_xor(radial[h], 1);
            radial[h] += shuffle_xor(radial[h], 2);
        }
        const int part = warp() % COL_WARPS;
        FNTX_UNROLL for (int c = 0; c < GROUP; ++c) {
            if (c >= group) break;
            sync_block();  // wait until all threads have finished reading the tiles or the previous chunk
            FNTX_UNROLL for (int h = 0; h < 2; ++h) {
                const int row = warp_row() + lane() / 4 + 8 * h;
                if (lane() % 4 == 0) staged.radial[part][row] = radial[h];
                FNTX_UNROLL for (int d = 0; d < CHUNK / 8; ++d) FNTX_UNROLL for (int e = 0; e < 2; ++e)
                    staged.features[part][row * STAGED_STRIDE + 8 * d + lane() % 4 * 2 + e] =
                    acc[c * CHUNK / 8 + d][2 * h + e];
            }
            sync_block();
            store_gradient<Op>(a, rows, first_row, first_chunk + c, staged, scales.out, k);
        }
    }
}

}  // namespace fntx
