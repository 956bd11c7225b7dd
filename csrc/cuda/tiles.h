// Tiles of similarities: a block of rows walks over columns, COLS at a time, CHUNK features a step.
//
// A step's columns (and its rows, where not all of a row stays) come into shared memory two steps ahead. Each warp
// multiplies 16 rows with its columns: the accumulators of m16n8k16 hold, for lane 4 g + t, rows g and g + 8 and columns
// 2 t and 2 t + 1 of every 8. The chunks that the second product takes are a tile's last, and still there.
#pragma once

#include "arguments.h"
#include "device.h"

namespace fntx {

constexpr float LOG2_E = 1.4426950408889634f;
// exp(k s) itself is formed while k max|s| + ln M stays below this, two thirds of float32's range of exponents;
// elsewhere logits are shifted by their largest, or by nu.
constexpr float DIRECT_LIMIT = 60;
constexpr float NONE = -INFINITY;

FNTX_DEVICE int lane() { return thread() % 32; }
FNTX_DEVICE int warp() { return thread() / 32; }

// Values of columns that a tile needs beside x; scaled weights only in a backward.
struct ColumnVectors {
    int64_t ids[COLS];
    float r[COLS], w[COLS], nu[COLS];
};

constexpr int STEP = COLS * CHUNK;  // elements of a step's columns, of one part

// Shared memory: steps of columns, rows, vectors of two tiles, sums of columns.
template <class Op, class Form> struct Shared {
    uint16_t* cols;
    uint16_t* rows;
    ColumnVectors* vectors;
    float (*column_sums)[WARPS][COLS];  // of two tiles, in a triangle

    FNTX_DEVICE explicit Shared(const Arguments& a) {
        cols = reinterpret_cast<uint16_t*>(shared_memory());
        rows = cols + a.stages * Op::PARTS * STEP;
        const int row_slots = a.resident ? a.chunks : a.stages;
        vectors = reinterpret_cast<ColumnVectors*>(rows + row_slots * Op::PARTS * ROWS<Form> * CHUNK);
        column_sums = reinterpret_cast<float(*)[WARPS][COLS]>(vectors + 2);
    }
};

// Where 8 features of a row lie in a step's matrix of 64 features: 16-byte pieces are permuted within a row of 128
// bytes, so that neither the copies nor load_matrices meet in a bank. It is the 128-byte swizzle of warpgroups' operands.
FNTX_DEVICE int piece(int row, int features_by_8) { return row * CHUNK + ((features_by_8 ^ (row & 7)) * 8); }

// The inverse temperature, from device memory or as it was passed.
FNTX_DEVICE float inverse_temperature(const Arguments& a) { return a.inv_tau_ptr ? *a.inv_tau_ptr : a.inv_tau; }

// The largest of what the blocks found, the same for every block.
FNTX_DEVICE float largest_of(const float* of_blocks) {
    float largest = 0;
    for (int i = lane(); i < blocks(); i += 32) largest = fmaxf(largest, of_blocks[i]);
    FNTX_UNROLL for (int mask = 16; mask; mask /= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
    return largest;
}

// Whether no logit leaves the range of exp.
FNTX_DEVICE bool in_direct_range(const Arguments& a, float k) {
    float bound = 1;
    if (!a.normalize) bound = largest_of(a.sides[0].longest) * largest_of(a.sides[a.n_sides - 1].longest);
    return k * bound + a.log_terms < DIRECT_LIMIT;
}

// One lane's two rows of a block.
struct LaneRows {
    int row[2];
    float r[2];

    FNTX_DEVICE LaneRows(const Side& rows, int first) {
        FNTX_UNROLL for (int h = 0; h < 2; ++h) {
            row[h] = first + lane() / 4 + 8 * h;
            r[h] = rows.r[row[h]];
        }
    }
};

template <class Op, class Form> class Tiles {
  public:
    static constexpr int COL_TILES = WARP_COLS<Form> / 8;
    typedef float Products[COL_TILES][4];
    typedef float Gradient[Form::GROUP * CHUNK / 8][4];

    FNTX_DEVICE Tiles(const Arguments& a, const Side& rows, const Side& cols, int first_row, int first_tile, int tiles,
                      int first_chunk)
        : a_(a), rows_(rows), cols_(cols), shared_(a), first_row_(first_row), first_tile_(first_tile),
          steps_(tiles * a.chunks), first_chunk_(first_chunk) {}

    FNTX_DEVICE int warp_row() const { return warp() / COL_WARPS<Form> * 16; }
    FNTX_DEVICE int warp_col() const { return warp() % COL_WARPS<Form> * WARP_COLS<Form>; }

    // For each tile: the lane's x_i . x_j, the tile's vectors, its first column, and where its last step lies.
    // `weights` fills in a thread's column of the vectors.
    template <class Weights, class Use> FNTX_DEVICE void walk(Weights weights, Use use) {
        sync_block();  // whoever used this memory is done
        load(0, 0);
        load(1, 1);
        vectors(0, weights);
        if constexpr (Form::WARPGROUPS)
            if (warpgroup() == 1) give_turn(0);
        Products s;
        for (int step = 0, slot = 0, chunk = 0, tile = 0; step < steps_; ++step, slot = wrap(slot + 1)) {
            if (chunk == 0) {
                FNTX_UNROLL for (int j = 0; j < COL_TILES; ++j)
                    FNTX_UNROLL for (int e = 0; e < 4; ++e) s[j][e] = 0;
            }
            wait_copies<1>();
            if constexpr (Form::WARPGROUPS) publish_copies();
            sync_block();
            load(step + 2, wrap(slot + 2));
            if constexpr (Form::WARPGROUPS)
                add_step_of_group(s, slot, chunk_of(chunk));
            else
                add_step(s, slot, chunk_of(chunk));
            if (++chunk < a_.chunks) continue;
            if (step + 1 < steps_) vectors(tile + 1, weights);
            use(s, shared_.vectors[tile % 2], (first_tile_ + tile) * COLS, slot);
            chunk = 0;
            ++tile;
        }
        wait_copies<0>();
        if constexpr (Form::WARPGROUPS)
            if (warpgroup() == 0) wait_turn(0);  // the last that was given
    }

    // acc (16 rows, features of the group) += g (16 rows, this warp's columns) x, for a tile whose last step is in `slot`.
    FNTX_DEVICE void gather(Gradient& acc, const Products& g, int slot, int group) const {
        if constexpr (Form::WARPGROUPS)
            gather_of_group(acc, g, slot, group);
        else
            gather_of_warp(acc, g, slot, group);
    }

  private:
    // The chunk that a tile takes at its `index`th step: those of the group are the last.
    FNTX_DEVICE int chunk_of(int index) const {
        const int chunk = first_chunk_ + index;
        return chunk < a_.chunks ? chunk : chunk - a_.chunks;
    }

    FNTX_DEVICE int wrap(int slot) const { return slot < a_.stages ? slot : slot - a_.stages; }
    FNTX_DEVICE int before(int slot, int steps) const { return slot < steps ? slot - steps + a_.stages : slot - steps; }

    FNTX_DEVICE uint16_t* cols(int slot) const { return shared_.cols + slot * Op::PARTS * STEP; }
    FNTX_DEVICE uint16_t* rows(int slot, int chunk) const {
        return shared_.rows + (a_.resident ? chunk : slot) * Op::PARTS * ROWS<Form> * CHUNK;
    }

    // Start the copies of a step, one group of every thread's.
    FNTX_DEVICE void load(int step, int slot) const {
        if (step < steps_) {
            const int tile = step / a_.chunks, chunk = chunk_of(step - tile * a_.chunks);
            copy<COLS>(cols(slot), cols_, (first_tile_ + tile) * COLS, chunk);
            if (!a_.resident || tile == 0) copy<ROWS<Form>>(rows(slot, chunk), rows_, first_row_, chunk);
        }
        commit_copies();
    }

    template <int HEIGHT> FNTX_DEVICE void copy(uint16_t* to, const Side& from, int first, int chunk) const {
        const int64_t width = int64_t(a_.chunks) * CHUNK;
        FNTX_UNROLL for (int p = 0; p < Op::PARTS; ++p)
            FNTX_UNROLL for (int i = 0; i < HEIGHT * CHUNK / 8 / THREADS; ++i) {
                const int index = i * THREADS + thread(), row = index / 8, eighth = index % 8;
                copy_async(to + p * HEIGHT * CHUNK + piece(row, eighth),
                           from.x[p] + (first + row) * width + chunk * CHUNK + eighth * 8);
            }
    }

    template <class Weights> FNTX_DEVICE void vectors(int tile, Weights weights) const {
        if (thread() >= COLS) return;
        ColumnVectors& v = shared_.vectors[tile % 2];
        const int col = (first_tile_ + tile) * COLS + thread();
        v.ids[thread()] = cols_.ids[col];
        v.r[thread()] = cols_.r[col];
        weights(v, thread(), col);
    }

    FNTX_DEVICE void add_step(Products& s, int slot, int chunk) const {
        const uint16_t *a = rows(slot, chunk), *b = cols(slot);
        FNTX_UNROLL for (int k = 0; k < CHUNK / 16; ++k) {
            uint32_t of_rows[Op::PARTS][4];
            const int row = piece(warp_row() + lane() % 16, 2 * k + lane() / 16);
            FNTX_UNROLL for (int p = 0; p < Op::PARTS; ++p) load_matrices(of_rows[p], a + p * ROWS<Form> * CHUNK + row);
            FNTX_UNROLL for (int j = 0; j < COL_TILES; j += 2) {
                const int col = piece(warp_col() + 8 * j + lane() / 16 * 8 + lane() % 8, 2 * k + lane() / 8 % 2);
                uint32_t of_cols[Op::PARTS][4];
                FNTX_UNROLL for (int p = 0; p < Op::PARTS; ++p) load_matrices(of_cols[p], b + p * STEP + col);
                multiply_parts(s[j], of_rows, of_cols, 0);
                multiply_parts(s[j + 1], of_rows, of_cols, 2);
            }
        }
    }

    FNTX_DEVICE void gather_of_warp(Gradient& acc, const Products& g, int slot, int group) const {
        FNTX_UNROLL for (int k = 0; k < WARP_COLS<Form> / 16; ++k) {
            uint32_t parts[Op::PARTS][4];
            operand(parts, g, k);
            FNTX_UNROLL for (int c = 0; c < Form::GROUP; ++c) {
                if (c >= group) break;
                const uint16_t* x = cols(before(slot, group - 1 - c));
                FNTX_UNROLL for (int d = 0; d < CHUNK / 16; ++d) {
                    const int at = piece(warp_col() + 16 * k + lane() % 16, 2 * d + lane() / 16);
                    uint32_t b[Op::PARTS][4];
                    FNTX_UNROLL for (int p = 0; p < Op::PARTS; ++p) load_matrices_transposed(b[p], x + p * STEP + at);
                    FNTX_UNROLL for (int h = 0; h < 2; ++h)
                        multiply_parts(acc[(c * CHUNK + 16 * d) / 8 + h], parts, b, 2 * h);
                }
            }
        }
    }

    // c += a b[first, first + 1]: of two parts the three products that matter, the largest last.
    static FNTX_DEVICE void multiply_parts(float (&c)[4], const uint32_t (&a)[Op::PARTS][4],
                                           const uint32_t (&b)[Op::PARTS][4], int first) {
        constexpr int LOW = Op::PARTS - 1;
        if constexpr (Op::PARTS == 2) {
            multiply<Op>(c, a[LOW], b[0][first], b[0][first + 1]);
            multiply<Op>(c, a[0], b[LOW][first], b[LOW][first + 1]);
        }
        multiply<Op>(c, a[0], b[0][first], b[0][first + 1]);
    }

    // The same by warpgroups, each for its 64 rows and all columns: operands where they lie. The two take turns, so that
    // the one's exponentials run beside the other's products.
    static FNTX_DEVICE int warpgroup() { return thread() / 128; }

    FNTX_DEVICE void add_step_of_group(Products& s, int slot, int chunk) const {
        const uint16_t *a = rows(slot, chunk) + warpgroup() * 64 * CHUNK, *b = cols(slot);
        constexpr int LOW = Op::PARTS - 1, ROW_PART = ROWS<Form> * CHUNK;
        wait_turn(warpgroup());
        begin_products(s);
        FNTX_UNROLL for (int k = 0; k < CHUNK; k += 16) {
            if constexpr (Op::PARTS == 2) {
                multiply_group<Op>(s, described(a + LOW * ROW_PART + k), described(b + k));
                multiply_group<Op>(s, described(a + k), described(b + LOW * STEP + k));
            }
            multiply_group<Op>(s, described(a + k), described(b + k));
        }
        give_turn(1 - warpgroup());
        end_products(s);
    }

    FNTX_DEVICE void gather_of_group(Gradient& acc, const Products& g, int slot, int group) const {
        uint32_t parts[COLS / 16][Op::PARTS][4];
        FNTX_UNROLL for (int k = 0; k < COLS / 16; ++k) operand(parts[k], g, k);
        wait_turn(warpgroup());
        FNTX_UNROLL for (int c = 0; c < Form::GROUP; ++c) {
            if (c >= group) break;
            const uint16_t* x = cols(before(slot, group - 1 - c));
            float(&sums)[CHUNK / 8][4] = *reinterpret_cast<float(*)[CHUNK / 8][4]>(acc + c * CHUNK / 8);
            begin_products(sums);
            FNTX_UNROLL for (int k = 0; k < COLS / 16; ++k) {
                constexpr int LOW = Op::PARTS - 1;
                const uint16_t* of_cols = x + 16 * k * CHUNK;
                if constexpr (Op::PARTS == 2) {
                    multiply_group<Op>(sums, parts[k][LOW], described(of_cols));
                    multiply_group<Op>(sums, parts[k][0], described(of_cols + LOW * STEP));
                }
                multiply_group<Op>(sums, parts[k][0], described(of_cols));
            }
            end_products(sums);
        }
        give_turn(1 - warpgroup());
    }

    // What the matrix units are told of an operand in shared memory: where it begins, 1024 bytes between groups of 8
    // rows, the swizzle of 128 bytes. Both orders of an operand (features first, rows first) read the same.
    static FNTX_DEVICE uint64_t described(const uint16_t* operand) {
        return (shared_address(operand) & 0x3ffff) >> 4 | uint64_t(1) << 16 | uint64_t(8 * CHUNK * 2 >> 4) << 32 |
               uint64_t(1) << 62;
    }

    // Columns [16 k, 16 k + 16) of g as each part of a first operand.
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

    const Arguments& a_;
    const Side &rows_, &cols_;
    const Shared<Op, Form> shared_;
    const int first_row_, first_tile_, steps_, first_chunk_;
};

// Which of a tile's columns are of another group than the lane's rows, and are there at all. Few tiles need to know, so
// that nothing is kept in registers for it.
struct Mask {
    const Side& side;
    const LaneRows& rows;
    const ColumnVectors& vectors;
    int first_col, n_cols;
    bool whole;  // all of them: the spans of ids do not meet

    FNTX_DEVICE Mask(const Side& side, const LaneRows& rows, const Side& cols, const ColumnVectors& vectors, int first_col)
        : side(side), rows(rows), vectors(vectors), first_col(first_col), n_cols(cols.n) {
        const int of_rows = rows.row[0] / COLS, of_cols = first_col / COLS;
        whole = first_col + COLS <= n_cols &&
                (side.high[of_rows] < cols.low[of_cols] || cols.high[of_cols] < side.low[of_rows]);
    }
    FNTX_DEVICE bool apart(int h, int col) const {
        return first_col + col < n_cols && vectors.ids[col] != side.ids[rows.row[h]];
    }
};

}  // namespace fntx
