// The whole of a call in one cooperative launch.
//
//     pack      a warp packs a row of each view      reads z, writes x (M DP 2 or 4 bytes) and vectors of M
//     sums      a block of rows, a share of columns  2 M^2 DP flops; every block of rows reads x of all columns once
//     finish    a thread adds a row's shares         nu, loss, weight
//     gradient  a block of rows, <= 128 features     4 M^2 DP flops for DP <= 128 (above, the first product again for
//                                                    each 128 features); reads as sums; writes d_z
//     total     one block                            the loss and d_inv_tau from M terms each
//
// with a barrier of the grid between: u = 2 M^2 DP flops, 3u in all at DP <= 128. Blocks take tasks in turn, so that any
// number of them does for any M. Every sum has one owner and one order: nothing is added atomically, and the bits are the
// same each time (on one device: the number of shares follows its size).
//
// A block: 8 warps. Shared memory: 4 steps of 64 columns by 64 features (32 KiB; two parts 64), its rows (128 or 32 by
// DP, or 4 steps of them where that does not fit), 2.5 KiB of vectors: 66 KiB for DP = 128 in half precision, two blocks
// on a multiprocessor of 164 KiB. Registers of a lane: 64 for the gradient of 16 rows by 128 features, 32 for 16 x 64
// products, operands: under 255, and no more than one such block is wanted where all are busy.
#pragma once

#include "gradient.h"

template <class Op, class Form> FNTX_DEVICE void run(const Arguments& a) {
    for (int s = 0; s < a.n_sides; ++s) pack<Op>(a, a.sides[s]);
    sync_grid();
    if (a.forward) {
        for (int s = 0; s < a.n_sides; ++s) sum_exponentials<Op, Form>(a, a.sides[s], a.sides[a.n_sides - 1 - s]);
        sync_grid();
    }
    for (int s = 0; s < a.n_sides; ++s) finish(a, a.sides[s]);
    if (!a.backward && !a.loss) return;
    sync_grid();
    int terms = 0;
    if (a.backward) {
        // Either side's sum is the temperature's gradient: the last that was formed.
        for (int s = a.n_sides - 1; s >= 0; --s) {
            const Side& side = a.sides[s];
            const bool wanted = side.d_z[0] || side.d_z[1];
            if (!wanted && (s || terms)) continue;
            if (terms) sync_grid();
            form_gradient<Op, Form>(a, side, a.sides[a.n_sides - 1 - s]);
            terms = side.n;
        }
        sync_grid();
    }
    if (block()) return;
    if (a.loss) {
        const float loss = sum_terms(a.row_losses, a.sides[0].n);
        if (thread() == 0) *a.loss = loss * a.loss_weight;
    }
    if (a.backward) {
        const float d_inv_tau = sum_terms(a.row_shares, terms);
        if (thread() == 0) *a.d_inv_tau = d_inv_tau;
    }
}
