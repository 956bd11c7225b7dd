// nu_i = log sum over {j : id_j != id_i} of exp(k s_ij), the losses, and the weight of every row.
//
// A task is a block of rows and a share of the columns. Each lane keeps a running sum over its own columns and, outside
// the direct range (tiles.h), a running maximum. The lanes' sums are added once, at the end. `finish` adds the shares
// in a fixed order.
#pragma once

#include "pack.h"

namespace fntx {

// A log-sum-exp as peak + log(sum). An empty sum has a peak of -inf or, in the direct
// range, where every peak is 0, a sum of 0.
struct LogSum {
    float peak, sum;

    FNTX_DEVICE void add(const LogSum& other) {
        const float top = fmaxf(peak, other.peak);
        const float shift = top == NONE ? 0 : top;  // -inf - -inf would be NaN
        sum = sum * exp_fast(peak - shift) + other.sum * exp_fast(other.peak - shift);
        peak = top;
    }
};

template <class Op>
FNTX_DEVICE void sum_exponentials(const Arguments& a, const PackedSide& rows, const PackedSide& cols) {
    typedef TileWalk<Op> Walk;
    typedef ColumnVectors<Op> Vectors;
    const float k = inverse_temperature(a);
    const bool direct = in_direct_range(a, k);
    const int tiles = (cols.n + COLS<Op> - 1) / COLS<Op>, row_blocks = (rows.n + ROWS - 1) / ROWS;
    for (int task = block(); task < row_blocks * a.col_shares; task += blocks()) {
        const int first_row = task / a.col_shares * ROWS, col_share = task % a.col_shares;
        const int first_tile = tiles * col_share / a.col_shares;
        const int n_tiles = tiles * (col_share + 1) / a.col_shares - first_tile;
        const LaneRows mine(rows, first_row);
        Walk walk(a, rows, cols, mine, first_row, first_tile, n_tiles, 0);
        LogSum sums[2] = {{direct ? 0 : NONE, 0}, {direct ? 0 : NONE, 0}};
        const float scale[2] = {mine.r[0] * k * LOG2_E<float>, mine.r[1] * k * LOG2_E<float>};
        const auto no_weight = [](Column&, int) {};
        const auto as_it_is = [](Column&) {};
        walk.each_tile(no_weight, as_it_is, [&](typename Walk::Products& s, const Mask& mask, const Vectors& v, int) {
            if (direct)
                walk.each(s, [&](float& x, int h, int col) { x *= v.r[col] * scale[h]; });
            else  // in the backward's order, so that both round the same way: it subtracts nu from the same logits
                walk.each(s, [&](float& x, int h, int col) { x *= mine.r[h] * v.r[col], x *= k; });
            if (!mask.whole) walk.each(s, [&](float& x, int h, int col) { x = mask.apart(h, col) ? x : NONE; });
            if (direct) {
                walk.each(s, [&](float& x, int h, int) { sums[h].sum += exp2_fast(x); });
            } else {
                LogSum here[2] = {{NONE, 0}, {NONE, 0}};
                walk.each(s, [&](float& x, int h, int) { here[h].peak = fmaxf(here[h].peak, x); });
                walk.each(s, [&](float& x, int h, int) {
                    here[h].sum += exp_fast(x - (here[h].peak == NONE ? 0 : here[h].peak));
                });
                sums[0].add(here[0]), sums[1].add(here[1]);
            }
        });
        sync_block();  // wait until shared memory is free
        LogSum* of_warps = reinterpret_cast<LogSum*>(shared_memory());
        FNTX_UNROLL for (int h = 0; h < 2; ++h) {
            FNTX_UNROLL for (int width = 1; width < 4; width *= 2) sums[h].add(
                {shuffle_xor(sums[h].peak, width), shuffle_xor(sums[h].sum, width)});
            if (lane() % 4 == 0) of_warps[warp() % COL_WARPS * ROWS + warp_row() + lane() / 4 + 8 * h] = sums[h];
        }
        sync_block();
        if (thread() >= ROWS) continue;
        LogSum total = of_warps[thread()];
        for (int part = 1; part < COL_WARPS; ++part) total.add(of_warps[part * ROWS + thread()]);
        const int64_t at = int64_t(col_share) * rows.padded + first_row + thread();
        rows.peaks[at] = total.peak;
        rows.sums[at] = total.sum;
    }
}

// Compute each row's nu, loss and weight. nu comes from the forward's sums, or is read in a call without a forward. The
// loss is log(1 + exp(nu - pi)), where pi is the logit of the row's positive. The weight is the upstream gradient if
// one is given, otherwise sigmoid(nu - pi) if a loss is wanted, otherwise 0. A row without negatives (nu = -inf) has
// weight 0, regardless of its upstream gradient.
FNTX_DEVICE void finish(const Arguments& a, const PackedSide& side) {
    const float k = inverse_temperature(a);
    float largest = 0;
    for (int row = block() * THREADS + thread(); row < side.padded; row += blocks() * THREADS) {
        if (row >= side.n) {
            side.nu[row] = INFINITY;
            side.w[row] = 0;
            continue;
        }
        float nu = a.forward ? 0 : side.neg_lse[row];
        if (a.forward) {
            LogSum shares[MOST_COL_SHARES], total = {NONE, 0};
            // All loads are in flight at once.
            FNTX_UNROLL for (int col_share = 0; col_share < MOST_COL_SHARES; ++col_share) {
                const int64_t at = int64_t(col_share) * side.padded + row;
                const bool there = col_share < a.col_shares;
                shares[col_share] = {there ? side.peaks[at] : NONE, there ? side.sums[at] : 0};
            }
            FNTX_UNROLL for (const LogSum& share : shares) total.peak = fmaxf(total.peak, share.peak);
            const float shift = total.peak == NONE ? 0 : total.peak;
            FNTX_UNROLL for (const LogSum& share : shares) total.sum += share.sum * exp_fast(share.peak - shift);
            nu = total.peak + logf(total.sum);
            if (side.neg_lse) side.neg_lse[row] = nu;
            if (a.pos) a.pos[row] = k * side.sim_pos[row];
        }
        float w = side.d_neg_lse ? side.d_neg_lse[row] : 0;
        if (a.loss) {
            const float x = nu - k * side.sim_pos[row], e = expf(-fabsf(x));
            a.row_losses[row] = fmaxf(x, 0) + log1pf(e);
            if (!side.d_neg_lse) w = (x > 0 ? 1 : e) / (1 + e);
        }
        const bool empty = nu == NONE;
        side.nu[row] = empty ? INFINITY : nu;
        side.w[row] = empty ? 0 : w;
        largest = fmaxf(largest, empty ? 0 : fabsf(w));
    }
    // For the second of two sides, include the maximum of the first side.
    if (thread() == 0 && &side != &a.sides[0]) largest = fmaxf(largest, a.largest_w[block()]);
    store_block_max(largest, a.largest_w);
}

// Return the sum of n terms, added by one block in a fixed order.
FNTX_DEVICE float sum_terms(const float* terms, int n) {
    float* of_warps = reinterpret_cast<float*>(shared_memory());
    float sum = 0;
    for (int i = thread(); i < n; i += THREADS) sum += terms[i];
    sum = warp_sum(sum);
    sync_block();
    if (lane() == 0) of_warps[warp()] = sum;
    sync_block();
    float total = 0;
    for (int i = 0; i < WARPS; ++i) total += of_warps[i];
    return total;
}

}  // namespace fntx
