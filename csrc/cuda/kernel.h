// The whole of a call in one cooperative launch.
//
//     pack      a warp packs a row of each view      reads z, writes x (M DP 2 or 4 bytes) and vectors of M
//     sums      a block of rows, a share of columns  2 M^2 DP flops; every block of rows reads x of all columns once
//     finish    a thread adds a row's shares         nu, loss, weight
//     gradient  a block of rows, a group of features 4 M^2 DP flops for one group (the first product again for each
//                                                    further one of up to 192 features); reads as sums; writes d_z
//     total     the block that comes last            the loss and d_inv_tau from M terms each
//
// with a barrier of the grid between the first four: u = 2 M^2 DP flops, at DP <= 192 3u in all. Blocks take tasks in
// turn, so that any number of them does for any M. Every sum has one owner and one order, and the bits are the same
// each time (on one device: the number of shares follows its size).
//
// DP is D in whole chunks of 64. A block: 8 warps, all that a multiprocessor's registers hold. Shared memory, for DP =
// 128: 4 steps of 64 features of the columns, 64 KiB; 32 rows, 8 KiB in half precision and twice that in two parts; 5
// KiB of vectors. benchmarks/binary.py reports registers and instructions, and that nothing is spilled.
#pragma once

#include "gradient.h"

namespace fntx {

// Whether this block is the last to come here. It sees what all have written.
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
        // Either side's sum is the temperature's gradient: the last that was formed.
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
