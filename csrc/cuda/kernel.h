// The whole of a call in one cooperative launch.
//
//     pack      a warp packs a row of each view      reads z, writes x (M DP 2 or 4 bytes) and vectors of M
//     sums      a block of rows, a share of columns  2 M^2 DP flops; every block of rows reads x of all columns once.
//                                                    Of many rows only the upper triangle, half of that, and as many
//                                                    floats of sums as there are blocks for each row
//     finish    a thread adds a row's shares         nu, loss, weight
//     gradient  a block of rows, a group of features 4 M^2 DP flops for one group (the first product again for each
//                                                    further one of up to 192 features); reads as sums; writes d_z
//     total     one block                            the loss and d_inv_tau from M terms each
//
// with a barrier of the grid between: u = 2 M^2 DP flops, at DP <= 128 (192 on Hopper) 3u in all, 2.5u of many rows. Blocks
// take tasks in turn, so that any number of them does for any M. Every sum has one owner and one order, and the bits are
// the same each time (on one device: the number of shares follows its size).
//
// DP is D in whole chunks of 64. A block: 8 warps, all that a multiprocessor's registers hold. Shared memory, for DP = 128
// in half precision: 4 steps of 64 columns by 64 features, 32 KiB; its 32 rows 8 KiB, or 128 rows 32 KiB; 2.5 KiB of
// vectors, 4 KiB of a triangle's sums. Two parts twice that. Registers of a lane: 64 to 96 for the gradient of 16 rows by
// 128 to 192 features, 32 for 16 x 64 products, operands: up to 255, none spilled (benchmarks/binary.py).
#pragma once

#include "gradient.h"

namespace fntx {

// Whether a form's instructions are those of the chip that is compiled for.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <class Form> constexpr bool RUNS_HERE = !Form::WARPGROUPS;
#else
template <class Form> constexpr bool RUNS_HERE = true;
#endif

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

}  // namespace fntx
