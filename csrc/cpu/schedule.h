// How the similarity matrix is cut into tasks, and the order of the tasks. A task is a block of rows against a block of
// columns. A block is one or more tiles long. Tasks that share a block add to the same sums. So every block counts
// turns, and a task waits until it is its turn at both of its blocks. The terms of every sum are therefore added in the
// same order, no matter which threads compute them. Tasks come in rounds in which no block occurs twice, so threads
// seldom wait.
//
// The schedule depends only on the numbers of rows and columns, on whether the call is symmetric, and on the number of
// threads. `python -m benchmarks schedule` reads it through _cpu.schedule() and predicts the speed-up with more
// threads.
#pragma once

#include <math.h>
#include <stdint.h>

#include <algorithm>

#include "kernels.h"

namespace fntx {

constexpr int64_t LARGEST_EDGE = 192;    // at D = 128, a tile and its rows stay in a core's L2 cache
constexpr int64_t TILES_PER_SIDE = 4;    // minimum per thread, unless tiles have the smallest edge or a side is not cut
constexpr int64_t TILES_PER_BLOCK = 4;   // maximum: at D = 128, two such blocks stay in an L2 cache of 2 MiB
constexpr int64_t BLOCKS_PER_SIDE = 8;   // minimum per thread with several threads, unless a block is already one tile
constexpr int64_t CHUNKS_PER_TAKE = 8;   // maximum
constexpr int64_t TAKES_PER_THREAD = 4;  // minimum, unless a take is already one chunk
constexpr double PARALLEL_FROM = 4e6;    // multiplications of a full product; with fewer, one thread is as fast

inline int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }

inline int64_t round_up(int64_t x, int64_t to) { return divide_up(x, to) * to; }

// Return how many threads a call uses, at most `threads`.
inline int useful_threads(int64_t rows, int64_t cols, int64_t D, int threads) {
    return double(rows) * double(cols) * double(D) < PARALLEL_FROM ? 1 : std::max(threads, 1);
}

// Return how many chunks of ALIGNED_ROWS rows a thread takes at a time in a phase over rows. If threads took single
// chunks, they would wait for the counter that hands out chunks: it can change once per 0.1 us, and 64 threads would
// need a change once per 0.02 us.
inline int64_t chunks_per_take(int64_t chunks, int threads) {
    if (threads == 1) return 1;
    return std::min(std::max(chunks / (TAKES_PER_THREAD * threads), int64_t(1)), CHUNKS_PER_TAKE);
}

// How a matrix of P x Q blocks is cut into slabs of `rows` x `cols` blocks. The last slab may extend beyond the matrix.
//
// Only one task at a time may add to the sums of a block of rows. With few rows and many columns (queries against a
// long queue), there are too few blocks of rows to keep all threads busy. So the columns are split into slabs. Every
// slab but the first adds to its own copy of the rows' sums, and the copies are added in a fixed order at the end. With
// few columns and many rows, rows and columns swap roles.
struct Slabs {
    int64_t count = 1, rows, cols;
    bool of_rows = false;  // split the rows, because there are fewer columns

    Slabs(int64_t P, int64_t Q, int threads) : rows(P), cols(Q), of_rows(P > Q) {
        const int64_t few = std::min(P, Q), many = std::max(P, Q), busy = 2 * int64_t(threads);
        if (threads <= 1 || few >= busy) return;
        // The number of slabs is limited so that all copies together have no more rows than the split side.
        const int64_t wanted = std::min(divide_up(busy, few), many / few), blocks = divide_up(many, wanted);
        count = divide_up(many, blocks);
        (of_rows ? rows : cols) = blocks;
    }
};

struct Task {
    int64_t row_block, col_block;  // block indices within the task's slab
    int32_t row_turn, col_turn;
    int64_t slab = 0;
};

// The tasks on and above the diagonal of a symmetric matrix of P x P blocks: first the diagonal, then a round-robin
// tournament of the blocks (the circle method; with an odd P, one block sits out each round).
class Triangle {
  public:
    explicit Triangle(int64_t P) : P_(P), players_(P + P % 2) {}

    int64_t size() const { return P_ * (P_ + 1) / 2; }

    Task operator[](int64_t index) const {
        if (index < P_) return {index, index, 0, 0};
        index -= P_;
        const int64_t games = P_ / 2, circle = players_ - 1;
        const int64_t round = index / games;
        const int64_t game = index % games + P_ % 2;  // game 0 belongs to the fixed player, who is missing if P is odd
        int64_t a = (round + game) % circle, b = game == 0 ? circle : (round - game + circle) % circle;
        if (a > b) {
            const int64_t c = a;
            a = b;
            b = c;
        }
        return {a, b, turn(a, round), turn(b, round)};
    }

  private:
    // Return the number of the block's earlier games, plus one for the diagonal. With an odd P, block x sits out round
    // x.
    int32_t turn(int64_t block, int64_t round) const { return int32_t(1 + round - (P_ % 2 && round > block)); }

    int64_t P_, players_;
};

// The tasks of a matrix of P x Q blocks, along its cyclic diagonals.
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

// The tasks of a call, in order.
class Schedule {
  public:
    const bool symmetric;  // the rows are also the columns
    const int threads;
    const int64_t rows, cols;
    const int64_t edge;         // rows and columns of a tile
    const int64_t block_tiles;  // tiles of a block in each direction
    const Slabs slabs;

    Schedule(int64_t rows, int64_t cols, bool symmetric, int threads)
        : symmetric(symmetric),
          threads(threads),
          rows(rows),
          cols(cols),
          edge(choose_edge()),
          block_tiles(choose_block_tiles()),
          slabs(blocks(rows), blocks(cols), symmetric ? 1 : threads),
          triangle_(blocks(rows)),
          rectangle_(slabs.rows, slabs.cols) {}

    int64_t size() const { return symmetric ? triangle_.size() : slabs.count * rectangle_.size(); }

    Task operator[](int64_t index) const {
        if (symmetric) return triangle_[index];
        Task task = rectangle_[index / slabs.count];
        task.slab = index % slabs.count;
        return task;
    }

    // Return the index of a task's first tile in the workspace. Tasks on the diagonal have fewer tiles, and come first.
    // A block that extends beyond the matrix also has room for its missing tiles.
    int64_t first_place(int64_t index) const {
        const int64_t n = block_tiles, half = symmetric ? std::min(index, blocks(rows)) : 0;
        return half * (n * (n + 1) / 2) + (index - half) * n * n;
    }

    int64_t places() const { return first_place(size()); }

    // first_row and first_col return the first row and the first column of tile (i, j) of a task. Either may lie beyond
    // the matrix.
    int64_t first_row(const Task& task, int64_t i) const {
        return ((task.row_block + (slabs.of_rows ? task.slab * slabs.rows : 0)) * block_tiles + i) * edge;
    }
    int64_t first_col(const Task& task, int64_t j) const {
        return ((task.col_block + (slabs.of_rows ? 0 : task.slab * slabs.cols)) * block_tiles + j) * edge;
    }

  private:
    // The edge is chosen so that a side has several tiles. Threads can then share the work, and a symmetric call
    // computes little more than one triangle. A rectangle's shorter side is left uncut if there is one thread, or if it
    // is no longer than about two tiles with that edge. In this case only LARGEST_EDGE limits the edge, and threads
    // share the slabs of the longer side.
    int64_t choose_edge() const {
        const int64_t whole = round_up(std::min(rows, cols), ALIGNED_ROWS);
        const int64_t even = int64_t(sqrt(double(rows) * double(cols))) / (TILES_PER_SIDE * threads);
        const bool uncut = !symmetric && (threads == 1 || whole <= 2 * even);
        const int64_t wanted = uncut ? whole : even / ALIGNED_ROWS * ALIGNED_ROWS;
        return std::min(std::max(wanted, ALIGNED_ROWS), LARGEST_EDGE);
    }

    int64_t choose_block_tiles() const {
        const int64_t shorter = divide_up(std::min(rows, cols), edge);
        const int64_t even = int64_t(sqrt(double(rows) * double(cols))) / edge / (BLOCKS_PER_SIDE * threads);
        const int64_t most = std::min(threads == 1 ? TILES_PER_BLOCK : std::max(even, int64_t(1)), TILES_PER_BLOCK);
        return divide_up(shorter, divide_up(shorter, most));  // blocks as equal as possible
    }

    int64_t blocks(int64_t n) const { return divide_up(n, edge * block_tiles); }

    const Triangle triangle_;
    const Rectangle rectangle_;
};

}  // namespace fntx
