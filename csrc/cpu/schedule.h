// The order in which tiles are taken. Tiles that touch the same block of rows or columns add to the same sums, so each
// block has turns: a tile waits for its two blocks' turns, and the order of every sum is the same whichever thread
// computes it. Tiles come in rounds in which no block occurs twice, so that threads seldom wait.
#pragma once

#include <stdint.h>

namespace fntx {

struct Task {
    int64_t row_block, col_block;
    int32_t row_turn, col_turn;
};

// All tiles on or above the diagonal of a symmetric matrix of P blocks: first the diagonal, then a tournament in which
// everybody meets everybody once (the circle method; with an odd P one block rests in each round).
class Triangle {
  public:
    explicit Triangle(int64_t P) : P_(P), players_(P + P % 2) {}

    int64_t size() const { return P_ * (P_ + 1) / 2; }

    Task operator[](int64_t index) const {
        if (index < P_) return {index, index, 0, 0};
        index -= P_;
        const int64_t games = P_ / 2, circle = players_ - 1;
        const int64_t round = index / games;
        const int64_t game = index % games + P_ % 2;  // game 0 is the fixed player's, who is missing if P is odd
        int64_t a = (round + game) % circle, b = game == 0 ? circle : (round - game + circle) % circle;
        if (a > b) {
            const int64_t c = a;
            a = b;
            b = c;
        }
        return {a, b, turn(a, round), turn(b, round)};
    }

  private:
    // Games before this round, and the diagonal tile; with an odd P block x rests in round x.
    int32_t turn(int64_t block, int64_t round) const { return int32_t(1 + round - (P_ % 2 && round > block)); }

    int64_t P_, players_;
};

// All tiles of a matrix of P x Q blocks, along its (cyclic) diagonals.
class Rectangle {
  public:
    Rectangle(int64_t P, int64_t Q) : few_(P < Q ? P : Q), many_(P < Q ? Q : P), swapped_(P > Q) {}

    int64_t size() const { return few_ * many_; }

    Task operator[](int64_t index) const {
        const int64_t round = index / few_, a = index % few_;
        const int64_t b = (a + round) % many_;
        // Block b of the longer side meets a = min(b, few - 1), ..., 0 and then few - 1, ..., b + 1.
        const int64_t first = b < few_ - 1 ? b : few_ - 1;
        const int32_t b_turn = int32_t(a <= first ? first - a : first + few_ - a);
        const int32_t a_turn = int32_t(round);
        return swapped_ ? Task{b, a, b_turn, a_turn} : Task{a, b, a_turn, b_turn};
    }

  private:
    int64_t few_, many_;
    bool swapped_;
};

}  // namespace fntx
