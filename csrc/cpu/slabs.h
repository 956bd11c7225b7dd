// Only one tile at a time may add to the sums of a block of rows. With few rows and many columns, as of queries against a
// long queue, there are fewer such blocks than threads. So the columns are split into slabs, each with a copy of the
// rows' sums, and the copies are added up in a fixed order. Few columns against many rows: the same, transposed.
#pragma once

#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "memory.h"

namespace fntx {

inline int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }

inline int64_t round_up(int64_t x, int64_t to) { return divide_up(x, to) * to; }

// Slabs of a matrix of P x Q blocks: `rows` x `cols` blocks each. The last one may reach beyond the matrix.
struct Slabs {
    int64_t count = 1, rows, cols;
    bool of_rows = false;  // the rows are split, because the columns are few

    Slabs(int64_t P, int64_t Q, int threads) : rows(P), cols(Q), of_rows(P > Q) {
        const int64_t few = std::min(P, Q), many = std::max(P, Q), busy = 2 * int64_t(threads);
        if (threads <= 1 || few >= busy) return;
        // No more than make the copies as long as the side that is split.
        const int64_t wanted = std::min(divide_up(busy, few), many / few), blocks = divide_up(many, wanted);
        count = divide_up(many, blocks);
        (of_rows ? rows : cols) = blocks;
    }
};

// The copies of slabs 1, 2, ...; slab 0 adds to the side itself.
template <class T> class SlabSums {
  public:
    SlabSums(const PackedSide<T>& few, int64_t slabs, int64_t ld) : ld_(ld), sides_(size_t(slabs - 1), few) {
        if (slabs == 1) return;
        const int64_t padded = round_up(few.n, ALIGNED_ROWS), n = padded * (slabs - 1);
        sums_ = Buffer<double>(2 * n);
        peaks_ = Buffer<T>(n);
        if (few.gathered) gathered_ = Buffer<T>(n * ld);
        for (size_t slab = 0; slab < sides_.size(); ++slab) {
            const int64_t first = int64_t(slab) * padded;
            sides_[slab].sums = sums_ + first;
            sides_[slab].slopes = sums_ + n + first;
            sides_[slab].peaks = peaks_ + first;
            if (few.gathered) sides_[slab].gathered = gathered_ + first * ld;
        }
    }

    // The side that a slab adds to.
    PackedSide<T>& operator[](int64_t slab) { return sides_[size_t(slab - 1)]; }

    // Set the sums of rows [first, last) to zero.
    void clear(int64_t first, int64_t last) {
        for (PackedSide<T>& side : sides_) {
            std::fill(side.sums + first, side.sums + last, 0.0);
            std::fill(side.slopes + first, side.slopes + last, 0.0);
            std::fill(side.peaks + first, side.peaks + last, T(-INFINITY));
            if (side.gathered) std::fill(side.gathered + first * ld_, side.gathered + last * ld_, T(0));
        }
    }

    // Add the slabs' sums of a row to the side's. Tiles that are not shifted leave every peak at -inf.
    void join_sums(PackedSide<T>& few, int64_t row) const {
        for (const PackedSide<T>& side : sides_) {
            const T peak = std::max(few.peaks[row], side.peaks[row]);
            few.sums[row] = scaled(few, row, peak) + scaled(side, row, peak);
            few.slopes[row] += side.slopes[row];
            few.peaks[row] = peak;
        }
    }

    // Add what the slabs have gathered for a row to what the side has.
    void join_gathered(PackedSide<T>& few, int64_t row, const Kernels<T>& kernels) const {
        for (const PackedSide<T>& side : sides_)
            kernels.add_scaled(few.gathered + row * ld_, T(1), side.gathered + row * ld_, ld_);
    }

    // Free what was gathered.
    void release_gathered() { gathered_ = {}; }

  private:
    // A row's sum with another peak.
    static double scaled(const PackedSide<T>& side, int64_t row, T peak) {
        if (side.peaks[row] == peak) return side.sums[row];
        return side.sums[row] * exp(double(side.peaks[row]) - double(peak));
    }

    int64_t ld_ = 0;
    std::vector<PackedSide<T>> sides_;
    Buffer<double> sums_;
    Buffer<T> peaks_, gathered_;
};

}  // namespace fntx
