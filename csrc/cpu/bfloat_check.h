// Checks bfloat_products.h on one small tile: compares its similarities and its gathered gradients with plain C++. All
// numbers are small integers, so every sum is exact in any order.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "bfloat_products.h"

namespace fntx::FNTX_ISA {

class BfloatCheck {
  public:
    BfloatCheck() {
        side_.u = u_, side_.bfloats = bfloats_, side_.bfloat_panels = panels_, side_.factors = factors_;
        side_.gathered = gathered_;
        for (int64_t row = 0; row < EDGE; ++row) {
            for (int64_t d = 0; d < LD; ++d) u_[row * LD + d] = d < D && row < N ? float((row * 5 + d * 3) % 7 - 3) : 0;
            double square = 0;
            for (int64_t d = 0; d < D; ++d) square += double(u_[row * LD + d]) * double(u_[row * LD + d]);
            pack_bfloats(side_, row, LD, sqrt(square), 1, false);
        }
        transpose_words<int(EDGE)>(panels_, EDGE, bfloats_, WORD_LD, words_of(D));
        tile_.rows = tile_.cols = &side_;
        tile_.D = D, tile_.ld = LD, tile_.n_words = words_of(D), tile_.word_ld = WORD_LD;
        tile_.row0 = tile_.col0 = 0, tile_.n_rows = tile_.n_cols = N, tile_.edge = EDGE, tile_.diagonal = false;
        tile_.exps = nullptr, tile_.buffer = buffer_, tile_.bfloats = g_;
    }

    bool right() { return similarities_right() && gathered_right(); }

  private:
    static constexpr int64_t N = 45, EDGE = 48, D = 37;  // N and D are odd, so that everything is padded
    static constexpr int64_t LD = 48, WORD_LD = word_row_length(LD);
    static_assert(PANEL<float> == EDGE);

    float u(int64_t row, int64_t d) const { return u_[row * LD + d]; }

    bool similarities_right() {
        bool right = true;
        form_products<BfloatProducts>(tile_, [&](BfloatProducts::Acc& acc, int64_t row, int64_t col) {
            float found[REGISTER_ROWS * EDGE];
            BfloatProducts::Acc::write(acc, found, EDGE);
            for (int64_t r = 0; r < REGISTER_ROWS; ++r)
                for (int64_t j = 0; j < EDGE; ++j) {
                    float expected = 0;
                    for (int64_t d = 0; d < D; ++d) expected += u(row + r, d) * u(col + j, d);
                    right &= found[r * EDGE + j] == expected;
                }
        });
        return right;
    }

    // Rows and columns gather into the same array, which then holds (G + G^T) u.
    bool gathered_right() {
        for (int64_t i = 0; i < EDGE * EDGE; ++i) buffer_[i] = float(i * 11 % 13 - 6);
        std::fill(gathered_, gathered_ + EDGE * LD, 0.0f);
        BfloatProducts::gather(tile_);
        bool right = true;
        for (int64_t row = 0; row < N; ++row)
            for (int64_t d = 0; d < D; ++d) {
                float expected = 0;
                for (int64_t j = 0; j < N; ++j) expected += (g(row, j) + g(j, row)) * u(j, d);
                right &= gathered_[row * LD + d] == expected;
            }
        return right;
    }

    float g(int64_t row, int64_t col) const { return float((row * EDGE + col) * 11 % 13 - 6); }

    float u_[EDGE * LD], factors_[EDGE], buffer_[EDGE * EDGE], gathered_[EDGE * LD];
    uint32_t bfloats_[EDGE * WORD_LD], panels_[words_of(D) * EDGE], g_[EDGE * words_of(EDGE)];
    PackedSide<float> side_ = {};
    Tile<float> tile_ = {};
};

}  // namespace fntx::FNTX_ISA
