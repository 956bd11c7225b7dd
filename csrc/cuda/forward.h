// nu_i = log sum over {j : id_j != id_i} of exp(k s_ij), the losses, and every row's weight.
//
// A task owns a block of rows and a share of the columns; a lane has a running sum (and, out of the direct range, a
// running maximum) over its own columns, added up once at the end. `finish` adds the shares in a fixed order.
//
// Many rows against themselves, in the direct range: only tiles on and above the diagonal, whose exponentials are for
// their rows and for their columns. Blocks share them evenly (triangle.h); each adds to a plane of its own, M floats.
#pragma once

#include "pack.h"
#include "triangle.h"

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

// This block's part of a triangle's sums.
FNTX_DEVICE float* plane_of(const Arguments& a) { return a.sides[0].sums + int64_t(block()) * a.sides[0].padded; }

// What a triangle's tiles add to the rows that are their columns.
template <class Op, class Form> class ColumnSums {
  public:
    FNTX_DEVICE explicit ColumnSums(const Arguments& a) : of_warps_(Shared<Op, Form>(a).column_sums), plane_(plane_of(a)) {}

    // Of the exponentials of a tile: every lane has 16 columns in 2 rows, and after three exchanges 2 columns in 16.
    FNTX_DEVICE void add(const typename Tiles<Op, Form>::Products& s, int first_col) {
        float x[COLS / 4];
        FNTX_UNROLL for (int i = 0; i < COLS / 4; ++i) x[i] = s[i / 2][i % 2] + s[i / 2][2 + i % 2];
        exchange<8>(x), exchange<4>(x), exchange<2>(x);
        FNTX_UNROLL for (int e = 0; e < 2; ++e) of_warps_[first_col / COLS % 2][warp()][2 * lane() + e] = x[e];
        waiting_ = first_col;
    }

    // What the warps have left of an earlier tile, after a barrier, goes to the plane.
    FNTX_DEVICE void flush() {
        if (waiting_ >= 0 && thread() < COLS) {
            float sum = 0;
            FNTX_UNROLL for (int i = 0; i < WARPS; ++i) sum += of_warps_[waiting_ / COLS % 2][i][thread()];
            add_to(plane_ + waiting_ + thread(), sum);
        }
        waiting_ = -1;
    }

  private:
    // Half of 2 N sums go to the lane that differs in bit 2 N, and that lane's part of the other half comes back.
    template <int N> static FNTX_DEVICE void exchange(float (&x)[COLS / 4]) {
        const bool upper = lane() & 2 * N;
        FNTX_UNROLL for (int i = 0; i < N; ++i) {
            const float kept = upper ? x[i + N] : x[i];
            x[i] = kept + shuffle_xor(upper ? x[i] : x[i + N], 2 * N);
        }
    }

    float (*of_warps_)[WARPS][COLS];
    float* plane_;
    int waiting_ = -1;
};

// A block of rows against some tiles of columns.
struct Strip {
    int first_row, first_tile, end_tile, split;
};

// The next strip of this block, which leaves `place` behind it.
template <class Form> FNTX_DEVICE Strip take_strip(const Arguments& a, const Side& rows, int tiles, bool triangular,
                                                   int64_t& place, int64_t end) {
    if (!triangular) {
        const int64_t row_block = place / a.splits, split = place % a.splits;
        place += blocks();
        return {int(row_block) * ROWS<Form>, int(tiles * split / a.splits), int(tiles * (split + 1) / a.splits), int(split)};
    }
    const Triangle triangle(rows.n, blocks());
    const int64_t row_block = triangle.row_block_of(place), next = triangle.start(row_block + 1);
    const int64_t skipped = row_block * triangle.PER_BLOCK - triangle.start(row_block), from = place;
    place = next < end ? next : end;
    return {int(row_block) * ROWS<Form>, int(from + skipped), int(place + skipped), 0};
}

template <class Op, class Form> FNTX_DEVICE void sum_exponentials(const Arguments& a, const Side& rows, const Side& cols) {
    const float k = inverse_temperature(a);
    const bool direct = in_direct_range(a, k), triangular = COL_WARPS<Form> == 1 && a.triangular && direct;
    const int tiles = (cols.n + COLS - 1) / COLS, row_blocks = (rows.n + ROWS<Form> - 1) / ROWS<Form>;
    int64_t place = block(), end = int64_t(row_blocks) * a.splits;
    if (triangular) {
        const Triangle triangle(rows.n, blocks());
        place = triangle.begin(block()), end = triangle.begin(block() + 1);
        const int first = int(triangle.row_block_of(place)) * ROWS<Form>;
        for (int row = first + thread(); row < rows.padded; row += THREADS) plane_of(a)[row] = 0;
    }
    while (place < end) {
        const Strip strip = take_strip<Form>(a, rows, tiles, triangular, place, end);
        Tiles<Op, Form> walk(a, rows, cols, strip.first_row, strip.first_tile, strip.end_tile - strip.first_tile, 0);
        ColumnSums<Op, Form> columns(a);
        const LaneRows mine(rows, strip.first_row + walk.warp_row());
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
                each([&](float& x, int h, int) { sums[h].sum += x = exp2_fast(x); });
            } else {
                LogSum here[2] = {{NONE, 0}, {NONE, 0}};
                each([&](float& x, int h, int) { here[h].peak = fmaxf(here[h].peak, x); });
                each([&](float& x, int h, int) {
                    here[h].sum += exp2_fast((x - (here[h].peak == NONE ? 0 : here[h].peak)) * LOG2_E);
                });
                sums[0].add(here[0]), sums[1].add(here[1]);
            }
            if constexpr (COL_WARPS<Form> == 1) {
                columns.flush();
                if (triangular && first_col >= strip.first_row + ROWS<Form>) columns.add(s, first_col);
            }
        });
        sync_block();  // the tiles' shared memory is free
        columns.flush();
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
        const int row = strip.first_row + thread();
        if (triangular) {
            add_to(plane_of(a) + row, total.sum);
        } else {
            rows.peaks[int64_t(strip.split) * rows.padded + row] = total.peak;
            rows.sums[int64_t(strip.split) * rows.padded + row] = total.sum;
        }
    }
}

// nu of every row, its loss log(1 + exp(nu - pi)), and its weight: sigmoid(nu - pi) where the loss is asked for, else
// what came. A row without negatives has none, whatever came from behind its -inf.
FNTX_DEVICE void finish(const Arguments& a, const Side& side) {
    const float k = inverse_temperature(a);
    const bool triangular = a.triangular && in_direct_range(a, k);
    const Triangle triangle(side.n, blocks());
    float largest = 0;
    for (int row = block() * THREADS + thread(); row < side.padded; row += blocks() * THREADS) {
        if (row >= side.n) {
            side.nu[row] = INFINITY;
            side.w[row] = 0;
            continue;
        }
        float nu = a.forward ? 0 : side.neg_lse[row];
        if (a.forward) {
            LogSum total = {triangular ? 0 : NONE, 0};
            const int planes = triangular ? int(triangle.walkers_of(row / ROWS<Tall>)) : a.splits;
            for (int plane = 0; plane < planes; ++plane) {
                const int64_t at = int64_t(plane) * side.padded + row;
                if (triangular)
                    total.sum += side.sums[at];
                else
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
