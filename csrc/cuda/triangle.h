// The tiles on and above the diagonal of a symmetric matrix, in line, and how a number of walkers share them: plain
// arithmetic.
#pragma once

#include "device.h"

namespace fntx {

// Block of rows b has the tiles from its own diagonal on, [PER_BLOCK b, tiles), and they follow those of b - 1. Walker c
// takes the places [begin(c), begin(c + 1)) of all: as many as any other, give or take one.
struct Triangle {
    static constexpr int64_t PER_BLOCK = ROWS<Tall> / COLS;
    int64_t tiles, row_blocks, walkers;

    FNTX_DEVICE Triangle(int64_t n, int walkers)
        : tiles((n + COLS - 1) / COLS), row_blocks((tiles + PER_BLOCK - 1) / PER_BLOCK), walkers(walkers) {}

    // The place of a block's first tile; of the block after the last: how many there are.
    FNTX_DEVICE int64_t start(int64_t row_block) const {
        return row_block * tiles - PER_BLOCK * row_block * (row_block - 1) / 2;
    }
    FNTX_DEVICE int64_t begin(int64_t walker) const { return start(row_blocks) * walker / walkers; }

    // The block of rows that a place is in.
    FNTX_DEVICE int64_t row_block_of(int64_t place) const {
        int64_t low = 0, high = row_blocks;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (start(middle) <= place ? low : high) = middle;
        }
        return low;
    }

    // Walkers [0, this) have tiles of these rows, or of others that have these as columns.
    FNTX_DEVICE int64_t walkers_of(int64_t row_block) const {
        return (start(row_block + 1) * walkers + start(row_blocks) - 1) / start(row_blocks);
    }
};

}  // namespace fntx
