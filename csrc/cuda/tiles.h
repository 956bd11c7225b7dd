// Tiles of similarities: a block of rows walks over the columns, COLS at a time, in steps of CHUNK features.
//
// The columns of a step are copied to shared memory two steps ahead, and so are the rows. If all chunks of the block's
// rows fit there, the rows are copied only for the first tile and stay. Each warp multiplies 16 rows by its share of
// the columns. In lane 4 g + t, the accumulators of the matrix instruction (m16n8k16) hold rows g and g + 8, and
// columns 2 t and 2 t + 1 of every 8. The chunks of features that the second product needs are the last steps of a
// tile, so they are still in shared memory.
#pragma once

#include "../ranges.h"
#include "arguments.h"
#include "device.h"

namespace fntx {

constexpr float NONE = -INFINITY;

FNTX_DEVICE float exp_fast(float x) { return exp2_fast(x * LOG2_E<float>); }

FNTX_DEVICE int lane() { return thread() % 32; }
FNTX_DEVICE int warp() { return thread() / 32; }
FNTX_DEVICE int warp_row() { return warp() / COL_WARPS * 16; }

// One column of ColumnVectors. w and nu are set only in a backward.
struct Column {
    int64_t id;
    float r, w, nu;
};

// The layout of shared memory: steps of columns, steps of rows, vectors of two tiles.
template <class Op> struct Shared {
    uint16_t* cols;
    uint16_t* rows;
    ColumnVectors<Op>* vectors;

    FNTX_DEVICE explicit Shared(const Arguments& a) {
        cols = reinterpret_cast<uint16_t*>(shared_memory());
        rows = cols + a.stages * Op::PARTS * STEP<Op>;
        const int row_slots = a.resident ? a.chunks : a.stages;
        vectors = reinterpret_cast<ColumnVectors<Op>*>(rows + row_slots * Op::PARTS * ROWS * CHUNK);
    }
};

// A step's matrix has rows of 64 features, stored in eight pieces of 8 features (16 bytes). The pieces of a row are
// permuted, so that neither the copies nor load_matrices have bank conflicts. piece returns the position of piece
// number `features_by_8` of a row. Given the position of one of a row's first two pieces, next_piece returns the
// position of the piece 16 * times features further on.
FNTX_DEVICE int piece(int row, int features_by_8) { return row * CHUNK + ((features_by_8 ^ (row & 7)) * 8); }
FNTX_DEVICE int next_piece(int piece, int times) { return piece ^ (16 * times); }

// Return the inverse temperature, from device memory or from the arguments.
FNTX_DEVICE float inverse_temperature(const Arguments& a) { return a.inv_tau_ptr ? *a.inv_tau_ptr : a.inv_tau; }

// The maxima of two arrays that have one element per block. Every block computes the same maxima. All loads of a round
// are in flight at once, because loads take most of the time in small batches.
struct Largest {
    float first = 0, second = 0;

    FNTX_DEVICE Largest(const float* firsts, const float* seconds) {
        constexpr int ROUND = 8;
        for (int start = lane(); start < blocks(); start += 32 * ROUND) {
            float a[ROUND], b[ROUND];
            FNTX_UNROLL for (int i = 0; i < ROUND; ++i) {
                const bool there = start + 32 * i < blocks();
                a[i] = there ? firsts[start + 32 * i] : 0, b[i] = there ? seconds[start + 32 * i] : 0;
            }
            FNTX_UNROLL for (int i = 0; i < ROUND; ++i) first = fmaxf(first, a[i]), second = fmaxf(second, b[i]);
        }
        FNTX_UNROLL for (int mask = 16; mask; mask /= 2) {
            first = fmaxf(first, shuffle_xor(first, mask));
            second = fmaxf(second, shuffle_xor(second, mask));
        }
    }
};

// Return whether the call is in the direct range: exp of every logit, and a row's sum of them, stay in range without a
// shift.
FNTX_DEVICE bool in_direct_range(const Arguments& a, float k) {
    float bound = 1;
    if (!a.normalize) {
        const Largest norms(a.sides[0].longest, a.sides[a.n_sides - 1].longest);
        bound = norms.first * norms.second;
    }
    return k * bound + a.log_terms < DIRECT_LIMIT<float>;
}

// A lane's two rows of a block.
struct LaneRows {
    int row[2];
    float r[2];
    int64_t id[2];

    FNTX_DEVICE LaneRows(const PackedSide& rows, int first) {
        FNTX_UNROLL for (int h = 0; h < 2; ++h) {
            row[h] = first + warp_row() + lane() / 4 + 8 * h;
            r[h] = rows.r[row[h]];
            id[h] = rows.ids[row[h]];
        }
    }
};

// Tells which columns of a tile exist and are in a different group from the lane's rows.
struct Mask {
    const LaneRows& rows;
    const int64_t* ids;
    int there;   // number of columns that exist
    bool whole;  // all pairs of this warp count

    FNTX_DEVICE bool apart(int h, int col) const { return col < there && ids[col] != rows.id[h]; }
};

// The tiles of a block of rows, one after another.
template <class Op> class TileWalk {
  public:
    static constexpr int FRAGMENTS = WARP_COLS<Op> / 8;  // 8 columns each, as the matrix units return them
    typedef float Products[FRAGMENTS][4];
    typedef float GradientSums[GROUP * CHUNK / 8][4];

    // Prepare to walk a block of rows over `tiles` tiles of columns, and start the first copies. The steps of every
    // tile begin at chunk `first_chunk`.
    FNTX_DEVICE TileWalk(const Arguments& a, const PackedSide& rows, const PackedSide& cols, const LaneRows& mine,
                         int first_row, int first_tile, int tiles, int first_chunk)
        : a_(a),
          rows_(rows),
          cols_(cols),
          mine_(mine),
          shared_(a),
          first_tile_(first_tile),
          tiles_(tiles),
          first_chunk_(first_chunk) {
        const int64_t mine_of_copies = thread() / 8 * width() + thread() % 8 * 8;
        row_source_ = rows.x[0] + first_row * width() + mine_of_copies;
        col_source_ = cols.x[0] + int64_t(first_tile) * COLS<Op> * width() + mine_of_copies;
        sync_block();  // wait until shared memory is free
        load();
        load();
        const int row = first_row + lane();
        low_ = high_ = rows.ids[row < rows.n ? row : rows.n - 1];
        FNTX_UNROLL for (int mask = 16; mask; mask /= 2) {
            const int64_t low = shuffle_xor(low_, mask), high = shuffle_xor(high_, mask);
            low_ = low < low_ ? low : low_, high_ = high > high_ ? high : high_;
        }
    }

    // Call use() for each tile, with the lane's products x_i . x_j, the lane's mask, the tile's vectors, and the slot
    // of the tile's last step. (A slot is a place for one step in shared memory.) `read` fetches a column's w and nu,
    // two tiles ahead. `scale` converts a column's values to the form that use() expects.
    template <class Read, class Scale, class Use> FNTX_DEVICE void each_tile(Read read, Scale scale, Use use) {
        Column next = {};
        fetch(next, 0, read);
        store(next, 0, scale);
        fetch(next, 1, read);
        for (int tile = 0, slot = 0; tile < tiles_; ++tile) {
            Products s;
            FNTX_UNROLL for (int j = 0; j < FRAGMENTS; ++j) FNTX_UNROLL for (int e = 0; e < 4; ++e) s[j][e] = 0;
            int last = slot;
            for (int index = 0; index < a_.chunks; ++index) {
                wait_copies<1>();
                sync_block();
                load();
                add_step(s, slot, chunk_of(index));
                last = slot;
                slot = after(slot);
            }
            store(next, tile + 1, scale);
            fetch(next, tile + 2, read);
            const ColumnVectors<Op>& v = shared_.vectors[tile % 2];
            use(s, Mask{mine_, v.ids, cols_.n - (first_tile_ + tile) * COLS<Op>, v.masked[warp_col() / 32] == 0}, v,
                last);
        }
        wait_copies<0>();
    }

    // Call use(element, which of the lane's two rows, column of the tile) for each of the lane's elements.
    template <class Use> static FNTX_DEVICE void each(Products& s, Use use) {
        FNTX_UNROLL for (int h = 0; h < 2; ++h) FNTX_UNROLL for (int j = 0; j < FRAGMENTS; ++j)
            FNTX_UNROLL for (int e = 0; e < 2; ++e) use(s[j][2 * h + e], h, warp_col() + 8 * j + lane() % 4 * 2 + e);
    }

    // acc (16 rows, features of the group) += g (16 rows, this warp's columns) x. `slot` holds the tile's last step.
    FNTX_DEVICE void gather(GradientSums& acc, const Products& g, int slot, int group) const {
        const int at = piece(warp_col() + lane() % 16, lane() / 16);
        FNTX_UNROLL for (int k = 0; k < WARP_COLS<Op> / 16; ++k) {
            uint32_t parts[Op::PARTS][4];
            operand(parts, g, k);
            FNTX_UNROLL for (int c = 0; c < GROUP; ++c) {
                if (c >= group) break;
                const uint16_t* x = cols(before(slot, group - 1 - c));
                FNTX_UNROLL for (int d = 0; d < CHUNK / 16; ++d) {
                    uint32_t b[Op::PARTS][4];
                    FNTX_UNROLL for (int p = 0; p < Op::PARTS; ++p)
                        load_matrices_transposed(b[p], x + next_piece(at, d) + p * STEP<Op> + 16 * k * CHUNK);
                    FNTX_UNROLL for (int h = 0; h < 2; ++h)
                        multiply_parts(acc[(c * CHUNK + 16 * d) / 8 + h], parts, b, 2 * h);
                }
            }
        }
    }

  private:
    static FNTX_DEVICE int warp_col() { return warp() % COL_WARPS * WARP_COLS<Op>; }

    // Return the chunk of features that a tile multiplies at step `index`. The group's chunks come last.
    FNTX_DEVICE int chunk_of(int index) const {
        const int chunk = first_chunk_ + index;
        return chunk < a_.chunks ? chunk : chunk - a_.chunks;
    }

    FNTX_DEVICE int after(int slot) const { return slot + 1 < a_.stages ? slot + 1 : 0; }
    FNTX_DEVICE int before(int slot, int steps) const { return slot < steps ? slot - steps + a_.stages : slot - steps; }

    FNTX_DEVICE uint16_t* cols(int slot) const { return shared_.cols + slot * Op::PARTS * STEP<Op>; }
    FNTX_DEVICE uint16_t* rows(int slot, int chunk) const {
        return shared_.rows + (a_.resident ? chunk : slot) * Op::PARTS * ROWS * CHUNK;
    }

    // Start the copies of the next step. Each thread commits its copies as one group.
    FNTX_DEVICE void load() {
        if (ahead_.tile < tiles_) {
            const int chunk = chunk_of(ahead_.index);
            copy<COLS<Op>>(cols(ahead_.slot), col_source_ + chunk * CHUNK, cols_);
            if (!a_.resident || ahead_.tile == 0)
                copy<ROWS>(rows(ahead_.slot, chunk), row_source_ + chunk * CHUNK, rows_);
        }
        commit_copies();
        ahead_.slot = after(ahead_.slot);
        if (++ahead_.index == a_.chunks) ahead_.index = 0, ++ahead_.tile, col_source_ += COLS<Op> * width();
    }

    FNTX_DEVICE int64_t width() const { return int64_t(a_.chunks) * CHUNK; }

    // `from` points to the thread's first 16 bytes in the first part of a side. The thread's other pieces follow,
    // THREADS / 8 rows apart.
    template <int HEIGHT> FNTX_DEVICE void copy(uint16_t* to, const uint16_t* from, const PackedSide& side) const {
        to += piece(thread() / 8, thread() % 8);
        FNTX_UNROLL for (int p = 0; p < Op::PARTS; ++p) {
            const uint16_t* next = p ? from + (side.x[p] - side.x[0]) : from;
            FNTX_UNROLL for (int row = 0; row < HEIGHT; row += THREADS / 8, next += THREADS / 8 * width())
                copy_async(to + (p * HEIGHT + row) * CHUNK, next);
        }
    }

    // Load a thread's column of a tile from memory (fetch), and write it to shared memory one tile later (store), so
    // that no thread waits for the load. (The columns of the first tile are stored without this delay.)
    template <class Read> FNTX_DEVICE void fetch(Column& column, int tile, Read read) const {
        if (thread() >= COLS<Op> || tile >= tiles_) return;
        const int col = (first_tile_ + tile) * COLS<Op> + thread();
        column.id = cols_.ids[col];
        column.r = cols_.r[col];
        read(column, col);
    }
    template <class Scale> FNTX_DEVICE void store(Column column, int tile, Scale scale) const {
        if (thread() >= COLS<Op> || tile >= tiles_) return;
        ColumnVectors<Op>& v = shared_.vectors[tile % 2];
        scale(column);
        v.ids[thread()] = column.id;
        v.r[thread()] = column.r, v.w[thread()] = column.w, v.nu[thread()] = column.nu;
        const bool there = (first_tile_ + tile) * COLS<Op> + thread() < cols_.n;
        const bool masked = any_of_warp(!there || (column.id >= low_ && column.id <= high_));
        if (lane() == 0) v.masked[warp()] = masked;
    }

    FNTX_DEVICE void add_step(Products& s, int slot, int chunk) const {
        const uint16_t *a = rows(slot, chunk), *b = cols(slot);
        const int row = piece(warp_row() + lane() % 16, lane() / 16);
        const int col = piece(warp_col() + lane() / 16 * 8 + lane() % 8, lane() / 8 % 2);
        FNTX_UNROLL for (int k = 0; k < CHUNK / 16; ++k) {
            uint32_t of_rows[Op::PARTS][4];
            FNTX_UNROLL for (int p = 0; p < Op::PARTS; ++p)
                load_matrices(of_rows[p], a + next_piece(row, k) + p * ROWS * CHUNK);
            FNTX_UNROLL for (int j = 0; j < FRAGMENTS; j += 2) {
                uint32_t of_cols[Op::PARTS][4];
                FNTX_UNROLL for (int p = 0; p < Op::PARTS; ++p)
                    load_matrices(of_cols[p], b + next_piece(col, k) + p * STEP<Op> + 8 * j * CHUNK);
                multiply_parts(s[j], of_rows, of_cols, 0);
                multiply_parts(s[j + 1], of_rows, of_cols, 2);
            }
        }
    }

    // c += a b, where the operand b is the registers b[first] and b[first + 1]. With two parts, three of the four
    // products of parts matter. They are summed in a separate accumulator, the largest last. The matrix units round
    // toward zero, so a long sum in them drifts; the final addition to c rounds to nearest.
    static FNTX_DEVICE void multiply_parts(float (&c)[4], const uint32_t (&a)[Op::PARTS][4],
                                           const uint32_t (&b)[Op::PARTS][4], int first) {
        if constexpr (Op::PARTS == 1) {
            multiply<Op>(c, a[0], b[0][first], b[0][first + 1]);
        } else {
            float sums[4] = {};
            multiply<Op>(sums, a[1], b[0][first], b[0][first + 1]);
            multiply<Op>(sums, a[0], b[1][first], b[1][first + 1]);
            multiply<Op>(sums, a[0], b[0][first], b[0][first + 1]);
            FNTX_UNROLL for (int e = 0; e < 4; ++e) c[e] += sums[e];
        }
    }

    // Convert columns [16 k, 16 k + 16) of g to the parts of a first operand.
    static FNTX_DEVICE void operand(uint32_t (&parts)[Op::PARTS][4], const Products& g, int k) {
        FNTX_UNROLL for (int i = 0; i < 4; ++i) {
            float first = g[2 * k + i / 2][i % 2 * 2], second = g[2 * k + i / 2][i % 2 * 2 + 1];
            FNTX_UNROLL for (int p = 0; p < Op::PARTS; ++p) {
                const uint16_t a = to_bits(Op(), first), b = to_bits(Op(), second);
                parts[p][i] = a | uint32_t(b) << 16;
                first -= from_bits(Op(), a);
                second -= from_bits(Op(), b);
            }
        }
    }

    struct Ahead {
        int tile = 0, index = 0, slot = 0;
    };

    const Arguments& a_;
    const PackedSide &rows_, &cols_;
    const LaneRows& mine_;
    const Shared<Op> shared_;
    const int first_tile_, tiles_, first_chunk_;
    const uint16_t *row_source_, *col_source_;  // sources of this thread's copies
    int64_t low_, high_;                        // range of the rows' ids
    Ahead ahead_;                               // the next step to load
};

}  // namespace fntx
