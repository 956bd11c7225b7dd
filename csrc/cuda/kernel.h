// A whole call in one cooperative launch, for M rows of D features. DP is D rounded up to whole chunks of 64.
//
//     phase     one task                             work
//
//     pack      a warp packs a row of each view      reads z, writes x (2 or 4 M DP bytes) and vectors of length M
//     sums      a block of rows, a share of columns  2 M^2 DP flops; every block of rows reads x of all columns once
//     finish    a thread adds a row's partial sums   nu, loss, weight
//     gradient  a block of rows, a group of features 4 M^2 DP flops if all features are one group; every further group
//                                                    computes the similarities again, 2 M^2 DP flops; each group reads
//                                                    x as in sums, reads z and writes d_z
//     total     the last block to arrive             the loss and d_inv_tau, from M terms each
//
// Grid barriers separate the first four phases. A group has at most 192 features, and plan.h may choose fewer. With one
// group, a forward and backward take 6 M^2 DP flops: three products of all rows with all rows. (For float32 rows, the
// matrix units do three times as many.) Blocks take tasks in turn, so a grid of any size works for any M. Every sum has
// one owner, which adds its terms in a fixed order, so results have the same bits every time on a given device.
// (Another device may divide the columns into a different number of shares.)
//
// A block has 8 warps, the most that a multiprocessor's registers hold at 255 per thread. For DP = 128 in one group,
// a block uses this much shared memory for half-precision rows: 64 KiB for 4 steps of columns (each has 64 features of
// a tile), 8 KiB for its 32 rows, and 5 KiB for the vectors of two tiles. For float32 rows, which are stored in two
// parts, these are 64, 16 and 2.5 KiB. benchmarks/binary.py reports registers and instructions, and checks for spills.
#pragma once

#include "gradient.h"

namespace fntx {

// Return whether this block is the last to arrive here. The last block sees the writes of all others.
FNTX_DEVICE bool last_to_arrive(int* arrived) {
    int* before = reinterpret_cast<int*>(shared_memory());
    sync_block();
    if (thread() == 0) *before = count_arrival(arrived);
    sync_block();
    return *before == blocks() - 1;
}

template <class Op> FNTX_DEVICE void run(const Arguments& a) {
    if (block() == 0 && thread() == 0) *a.arrived = 0;
    for (int s = 0; s < a.n_sides; ++s) pack<Op>(a, a.sides[s]);
    sync_grid();
    if (a.forward) {
        for (int s = 0; s < a.n_sides; ++s) sum_exponentials<Op>(a, a.sides[s], a.sides[a.n_sides - 1 - s]);
        sync_grid();
    }
    for (int s = 0; s < a.n_sides; ++s) finish(a, a.sides[s]);
    int terms = 0;
    if (a.backward) {
        sync_grid();
        // Both sides give the same d_inv_tau, so it is summed over one side only, the one that is formed last. If no
        // d_z is wanted, side 0 is formed for d_inv_tau alone.
        for (int s = a.n_sides - 1; s >= 0; --s) {
            const PackedSide& side = a.sides[s];
            const bool wanted = side.d_z[0] || side.d_z[1];
            if (!wanted && (s || terms)) continue;
            if (terms) sync_grid();
            form_gradient<Op>(a, side, a.sides[a.n_sides - 1 - s]);
            terms = side.n;
        }
    }
    if (!last_to_arrive(a.arrived)) return;
    if (a.loss) {
        const float loss = sum_terms(a.row_losses, a.sides[0].n);
        if (thread() == 0) *a.loss = loss * a.loss_weight;
    }
    if (a.backward) {
        const float d_inv_tau = sum_terms(a.row_d_inv_tau, terms);
        if (thread() == 0) *a.d_inv_tau = d_inv_tau;
    }
}

}  // namespace fntx
