// The rows of a batch by their class.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <numeric>
#include <vector>

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

    struct Rows {
        const int64_t *first, *last;
        const int64_t* begin() const { return first; }
        const int64_t* end() const { return last; }
    };

    // The rows of a class, in ascending order.
    Rows rows(int64_t c) const { return {rows_.data() + first_[c], rows_.data() + first_[c + 1]}; }

    // Rows whose class has others, and whether every class has two rows.
    int64_t with_positive() const { return with_positive_; }
    bool in_pairs() const { return in_pairs_; }

    int64_t first_of_pair(int64_t row) const { return rows(of_row(row)).first[0]; }
    int64_t other_of_pair(int64_t row) const { return rows(of_row(row)).first[row == first_of_pair(row)]; }

  private:
    std::vector<int64_t> rows_, class_of_row_, first_;
    int64_t with_positive_ = 0;
    bool in_pairs_ = true;
};

}  // namespace fntx
