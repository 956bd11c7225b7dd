// The rows of a batch, grouped by class.
#pragma once

#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "slabs.h"

namespace fntx {

class Classes {
  public:
    Classes() = default;

    Classes(const int64_t* of_rows, int64_t n) : rows_(size_t(n)), class_of_row_(size_t(n)) {
        std::iota(rows_.begin(), rows_.end(), 0);
        std::sort(rows_.begin(), rows_.end(), [of_rows](int64_t a, int64_t b) {
            return of_rows[a] != of_rows[b] ? of_rows[a] < of_rows[b] : a < b;
        });
        for (int64_t i = 0; i < n; ++i) {
            if (i == 0 || of_rows[rows_[i]] != of_rows[rows_[i - 1]]) first_.push_back(i);
            class_of_row_[rows_[i]] = int64_t(first_.size()) - 1;
        }
        first_.push_back(n);
        for (int64_t c = 0; c < size(); ++c) {
            if (count(c) > 1) with_positive_ += count(c);
            in_pairs_ = in_pairs_ && count(c) == 2;
        }
    }

    int64_t size() const { return int64_t(first_.size()) - 1; }
    int64_t count(int64_t c) const { return first_[c + 1] - first_[c]; }
    int64_t of_row(int64_t row) const { return class_of_row_[row]; }

    // Return the indices of all rows, sorted by class.
    const int64_t* order() const { return rows_.data(); }

    struct Rows {
        const int64_t *first, *last;
        const int64_t* begin() const { return first; }
        const int64_t* end() const { return last; }
    };

    // Return the indices of the rows of a class, in ascending order.
    Rows rows(int64_t c) const { return {rows_.data() + first_[c], rows_.data() + first_[c + 1]}; }

    // with_positive returns how many rows have a positive; in_pairs returns whether every class has exactly two rows.
    int64_t with_positive() const { return with_positive_; }
    bool in_pairs() const { return in_pairs_; }

    int64_t first_of_pair(int64_t row) const { return rows(of_row(row)).first[0]; }
    int64_t other_of_pair(int64_t row) const { return rows(of_row(row)).first[row == first_of_pair(row)]; }

  private:
    std::vector<int64_t> rows_, class_of_row_, first_;
    int64_t with_positive_ = 0;
    bool in_pairs_ = true;
};

// A side that holds each row's sums over the row's positives. It shares the rows and `gathered` with the side that it
// is made from, and has separate sums, weights and log-sum-exps.
template <class T> struct PositiveSide : PackedSide<T> {
    explicit PositiveSide(const PackedSide<T>& rows) : PackedSide<T>(rows) {
        const int64_t padded = round_up(rows.n, ALIGNED_ROWS);
        double_memory_ = Buffer<double>(2 * padded);
        row_memory_ = Buffer<T>(3 * padded);
        this->sums = double_memory_;
        this->slopes = double_memory_ + padded;
        this->peaks = row_memory_;
        this->weights = row_memory_ + padded;
        this->nu = row_memory_ + 2 * padded;
        std::fill(this->sums, this->sums + 2 * padded, 0.0);
        std::fill(this->peaks, this->peaks + padded, T(-INFINITY));
        std::fill(this->weights, this->weights + padded, T(0));
        std::fill(this->nu, this->nu + padded, T(INFINITY));
    }

  private:
    Buffer<double> double_memory_;
    Buffer<T> row_memory_;
};

}  // namespace fntx
