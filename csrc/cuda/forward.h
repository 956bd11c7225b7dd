// nu_i = log sum over {j : id_j != id_i} of exp(k s_ij), the losses, and every row's weight.
//
// A task owns a block of rows and a share of the columns; a lane has a running sum (and, out of the direct range, a
// running maximum) over its own columns, added up once at the end. `finish` adds the shares in a fixed order.
#pragma once

#include "pack.h"

namespace fntx {

// log-sum-exp as a peak and a sum: peak + log(sum). Nothing yet: a peak of -inf, or of 0 with no sum.
struct LogSum {
    float peak, sum;

    FNTX_DEVICE void add(const LogSum& other) {
        const float top = fmaxf(peak, other.peak);
        const float shift = top == NONE ? 0 : top;  // -inf - -inf is NaN
        sum = sum * exp2_fast((peak - shift) * LOG2_E) + other.sum * exp2_fast((other.peak - shift) * LOG2_E);
        peak = top;
    }
};

template <class Op, class Form> FNTX_DEVICE void sum_exponentials(const Arguments& a, const Side& rows, const Side& cols) {
    const float k = inverse_temperature(a);
    const bool direct = in_direct_range(a, k);
    const int tiles = (cols.n + COLS - 1) / COLS, row_blocks = (rows.n + ROWS<Form> - 1) / ROWS<Form>;
    for (int task = block(); task < row_blocks * a.splits; task += blocks()) {
        const int first_row = task / a.splits * ROWS<Form>, split = task % a.splits;
        const int first_tile = int(int64_t(tiles) * split / a.splits);
        const int end_tile = int(int64_t(tiles) * (split + 1) / a.splits);
        Tiles<Op, Form> walk(a, rows, cols, first_row, first_tile, end_tile - first_tile, 0);
        const LaneRows mine(rows, first_row + walk.warp_row());
        LogSum sums[2] = {{direct ? 0 : NONE, 0}, {direct ? 0 : NONE, 0}};
        const auto no_weights = [](ColumnVectors&, int, int) {};
        walk.walk(no_weights, [&](typename Tiles<Op, Form>::Products& s, const ColumnVectors& v, int first_col, int) {
            const auto each = [&](auto use) {
                FNTX_UNROLL for (int h = 0; h < 2; ++h)
                    FNTX_UNROLL for (int j = 0; j < Tiles<Op, Form>::COL_TILES; ++j)
                        FNTX_UNROLL for (int e = 0; e < 2; ++e)
                            use(s[j][2 * h + e], h, walk.warp_col() + 8 * j + lane() % 4 * 2 + e);
            };
            if (direct)
                each([&](float& x, int h, int col) { x *= v.r[col] * (mine.r[h] * k * LOG2_E); });
            else  // rounded the same from both sides: only what went into a sum may be compared with it
                each([&](float& x, int h, int col) { x *= mine.r[h] * v.r[col], x *= k; });
            const Mask mask(rows, mine, cols, v, first_col);
            if (!mask.whole)
                each([&](float& x, int h, int col) { x = mask.apart(h, col) ? x : NONE; });
            if (direct) {
                each([&](float& x, int h, int) { sums[h].sum += exp2_fast(x); });
            } else {
                LogSum here[2] = {{NONE, 0}, {NONE, 0}};
                each([&](float& x, int h, int) { here[h].peak = fmaxf(here[h].peak, x); });
                each([&](float& x, int h, int) {
                    here[h].sum += exp2_fast((x - (here[h].peak == NONE ? 0 : here[h].peak)) * LOG2_E);
                });
                sums[0].add(here[0]), sums[1].add(here[1]);
            }
        });
        sync_block();  // the tiles' shared memory is free
        LogSum* of_warps = reinterpret_cast<LogSum*>(shared_memory());
        FNTX_UNROLL for (int h = 0; h < 2; ++h) {
            FNTX_UNROLL for (int width = 1; width < 4; width *= 2)
                sums[h].add({shuffle_xor(sums[h].peak, width), shuffle_xor(sums[h].sum, width)});
            if (lane() % 4 == 0)
                of_warps[warp() % COL_WARPS<Form> * ROWS<Form> + walk.warp_row() + lane() / 4 + 8 * h] = sums[h];
        }
        sync_block();
        if (thread() >= ROWS<Form>) continue;
        LogSum total = of_warps[thread()];
        for (int part = 1; part < COL_WARPS<Form>; ++part) total.add(of_warps[part * ROWS<Form> + thread()]);
        rows.peaks[int64_t(split) * rows.padded + first_row + thread()] = total.peak;
        rows.sums[int64_t(split) * rows.padded + first_row + thread()] = total.sum;
    }
}

// nu of every row, its loss log(1 + exp(nu - pi)), and its weight: sigmoid(nu - pi) where the loss is asked for, else
// what came. A row without negatives has none, whatever came from behind its -inf.
FNTX_DEVICE void finish(const Arguments& a, const Side& side) {
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
            LogSum total = {side.peaks[row], side.sums[row]};
            for (int split = 1; split < a.splits; ++split) {
                const int64_t at = int64_t(split) * side.padded + row;
                total.add({side.peaks[at], side.sums[at]});
            }
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
    // Of the two sides of a rectangle the second adds to what the first found.
    if (thread() == 0 && &side != &a.sides[0]) largest = fmaxf(largest, a.largest_w[block()]);
    store_block_max(largest, a.largest_w);
}

// The sum of n terms, by block 0, in a fixed order.
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
