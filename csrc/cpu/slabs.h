// The sums of slabs (schedule.h). Every slab but the first adds to its own copy of the shorter side's sums. At the end,
// the copies are added to the side's own sums in a fixed order.
#pragma once

#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "schedule.h"

namespace fntx {

// The copies for slabs 1, 2, ...; slab 0 adds to the side itself.
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

    // Return the copy that a slab adds to.
    PackedSide<T>& operator[](int64_t slab) { return sides_[size_t(slab - 1)]; }

    // Reset a slab's copy: sums, slopes and `gathered` to 0, peaks to -inf.
    void clear(int64_t slab) {
        PackedSide<T>& side = (*this)[slab];
        const int64_t padded = round_up(side.n, ALIGNED_ROWS);
        std::fill(side.sums, side.sums + padded, 0.0);
        std::fill(side.slopes, side.slopes + padded, 0.0);
        std::fill(side.peaks, side.peaks + padded, T(-INFINITY));
        if (side.gathered) std::fill(side.gathered, side.gathered + padded * ld_, T(0));
    }

    // Add the copies of a row's sum and slope to the row's values in `few`. Without shifted tiles every peak is -inf,
    // so no sum is rescaled.
    void join_sums(PackedSide<T>& few, int64_t row) const {
        for (const PackedSide<T>& side : sides_) {
            const T peak = std::max(few.peaks[row], side.peaks[row]);
            few.sums[row] = scaled(few, row, peak) + scaled(side, row, peak);
            few.slopes[row] += side.slopes[row];
            few.peaks[row] = peak;
        }
    }

    // Add the copies of a row's `gathered` to `few.gathered`.
    void join_gathered(PackedSide<T>& few, int64_t row, const Kernels<T>& kernels) const {
        for (const PackedSide<T>& side : sides_)
            kernels.add_scaled(few.gathered + row * ld_, T(1), side.gathered + row * ld_, ld_);
    }

    // Free the copies of `gathered`.
    void release_gathered() { gathered_ = {}; }

  private:
    // Return a row's sum, rescaled to `peak`.
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
