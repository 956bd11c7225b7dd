// How a call is cut for a machine, and where things lie in its workspace: plain arithmetic.
#pragma once

#include <math.h>
#include <stddef.h>

#include "arguments.h"

namespace fntx {

// Most rows of a side, and features. Indices are ints, and a loop over rows goes up to a stride of the grid beyond them.
constexpr int64_t MOST = INT32_MAX - (1 << 20);

// Why there can be no call of this size (n_cols 0: symmetric), or null.
inline const char* fault_of_size(int64_t n_rows, int64_t n_cols, int64_t D) {
    if (n_rows < 1 || n_rows > MOST || n_cols < 0 || n_cols > MOST) return "the number of rows: at most 2^31 - 2^20";
    if (D < 1 || D > MOST) return "the number of features: at most 2^31 - 2^20";
    return nullptr;
}

// What a plan has to know of a device. blocks: how many of a kernel's run at once on a multiprocessor.
struct Machine {
    int multiprocessors;
    int64_t shared;  // bytes a block may have
    int (*blocks)(int device, int kernel, size_t shared);
    int device;
    bool warpgroups;  // sm_90
};

struct Plan {
    Arguments a = {};
    int kernel;  // a type of operands in a form: dtype + 3 * form
    size_t shared;
    int grid = 0;
    int64_t bytes = 0;  // of workspace
};

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

inline int64_t shared_bytes(int parts, int64_t rows, int64_t stages, int64_t row_slots, bool triangular) {
    const int64_t vectors = 2 * COLS * (sizeof(int64_t) + 3 * sizeof(float));
    const int64_t column_sums = triangular ? 2 * WARPS * COLS * sizeof(float) : 0;
    return stages * parts * COLS * CHUNK * 2 + row_slots * parts * rows * CHUNK * 2 + vectors + column_sums;
}

class Carver {
  public:
    Carver(char* base, int64_t& bytes) : base_(base), bytes_(bytes) {}
    template <class T> void take(T*& pointer, int64_t n) {
        pointer = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base_) + bytes_);  // of no base too
        bytes_ += ceil_div(n * int64_t(sizeof(T)), 256) * 256;
    }

  private:
    char* base_;
    int64_t& bytes_;
};

// Sizes and pointers into a workspace at `base`, which may be null to ask for bytes alone. grid 0: nothing fits.
inline Plan make_plan(const Machine& machine, int dtype, int64_t n_rows, int64_t n_cols, int64_t D, char* base) {
    Plan plan;
    Arguments& a = plan.a;
    const int parts = dtype == FNTX_FLOAT32 ? Split::PARTS : 1;
    const int64_t most = n_rows > n_cols ? n_rows : n_cols, sms = machine.multiprocessors;
    a.n_sides = n_cols ? 2 : 1;
    a.D = D;
    a.chunks = int(ceil_div(D, CHUNK));
    a.log_terms = logf(float(most));
    const int64_t n[2] = {n_rows, n_cols};

    // Tall blocks of rows where there are enough of them for most of the device, if a block has the shared memory.
    struct Shape {
        int form;
        int64_t rows;
        int largest_group;
    };
    const Shape tall = machine.warpgroups ? Shape{HOPPER, ROWS<Hopper>, Hopper::GROUP} : Shape{TALL, ROWS<Tall>, Tall::GROUP};
    const Shape flat = {FLAT, ROWS<Flat>, Flat::GROUP};
    // The rest of a plan in a shape: as large a group as leaves a task to every multiprocessor.
    const auto fit = [&](const Shape& shape) {
        for (a.group = int(a.chunks < shape.largest_group ? a.chunks : shape.largest_group); a.group; --a.group) {
            if (a.group > 1 && ceil_div(most, shape.rows) * ceil_div(a.chunks, a.group) < sms) continue;
            a.stages = a.group + 2;
            a.triangular = a.n_sides == 1 && shape.form != FLAT;
            for (int64_t row_slots : {a.chunks, a.stages}) {
                plan.shared = size_t(shared_bytes(parts, shape.rows, a.stages, row_slots, a.triangular));
                a.resident = row_slots == a.chunks;
                if (int64_t(plan.shared) <= machine.shared) return true;
            }
        }
        return false;
    };
    const bool many = 4 * ceil_div(most, tall.rows) >= 3 * sms;
    const Shape& shape = many && fit(tall) ? tall : flat;
    if (&shape == &flat && !fit(flat)) return plan;
    plan.kernel = dtype + 3 * shape.form;
    const int64_t capacity = sms * machine.blocks(machine.device, plan.kernel, plan.shared);

    const int64_t row_blocks = ceil_div(most, shape.rows);
    const int64_t fewest_tiles = ceil_div(n_cols && n_cols < n_rows ? n_cols : n_rows, COLS);
    const auto between = [](int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; };
    a.splits = int(between(capacity / row_blocks, 1, fewest_tiles < 16 ? fewest_tiles : 16));
    const int64_t groups = ceil_div(a.chunks, a.group), tasks = row_blocks * (a.splits > groups ? a.splits : groups);
    plan.grid = int(between(tasks > ceil_div(most, WARPS) ? tasks : ceil_div(most, WARPS), 0, capacity));

    Carver carver(base, plan.bytes);
    for (int s = 0; s < a.n_sides; ++s) {
        Side& side = a.sides[s];
        side.n = int(n[s]);
        side.padded = int(ceil_div(n[s], PADDED_ROWS) * PADDED_ROWS);
        for (int p = 0; p < parts; ++p) carver.take(side.x[p], int64_t(side.padded) * a.chunks * CHUNK);
        for (float** vector : {&side.r, &side.norm, &side.sim_pos, &side.nu, &side.w}) carver.take(*vector, side.padded);
        carver.take(side.peaks, int64_t(a.splits) * side.padded);
        carver.take(side.sums, int64_t(a.triangular && plan.grid > a.splits ? plan.grid : a.splits) * side.padded);
        for (float** of_blocks : {&side.longest, &side.largest_r}) carver.take(*of_blocks, plan.grid);
        carver.take(side.ids, side.padded);
        carver.take(side.low, side.padded / COLS);
        carver.take(side.high, side.padded / COLS);
    }
    carver.take(a.row_losses, n_rows);
    carver.take(a.row_shares, most);
    carver.take(a.largest_w, plan.grid);
    return plan;
}

// Why a call cannot be, or null.
inline const char* fault_of(const fntx_cuda_call& call) {
    if (call.dtype < FNTX_FLOAT16 || call.dtype > FNTX_FLOAT32) return "dtype";
    if (!(call.phases & (FNTX_FORWARD | FNTX_BACKWARD)) || call.phases > (FNTX_FORWARD | FNTX_BACKWARD)) return "phases";
    if (!call.workspace || reinterpret_cast<uintptr_t>(call.workspace) % 16) return "workspace";
    const bool two_views = !call.cols && call.rows.z[0].n == call.rows.z[1].n;
    if ((call.pos || call.d_pos || call.loss) && !two_views) return "positives without two views";
    for (const fntx_side* side : {&call.rows, call.cols}) {
        if (!side) continue;
        for (const fntx_matrix& z : side->z)
            if (z.n < 0 || z.n > MOST || (z.n && !z.data)) return "a matrix";
        if (side->z[0].n < 1) return "a side without rows";
        if (const char* fault = fault_of_size(side->z[0].n + side->z[1].n, 0, call.D)) return fault;
        if (!(call.phases & FNTX_FORWARD) && !side->neg_lse) return "no neg_lse";
        if (call.phases & FNTX_BACKWARD && !side->d_neg_lse && !call.loss) return "no d_neg_lse";
    }
    if (call.loss && !(call.phases & FNTX_FORWARD)) return "a loss without a forward";
    if (call.phases & FNTX_BACKWARD && !call.d_inv_tau) return "no d_inv_tau";
    return nullptr;
}

// The plan of a call that has no fault.
inline Plan plan_call(const Machine& machine, const fntx_cuda_call& call) {
    const auto rows_of = [](const fntx_side& side) { return side.z[0].n + side.z[1].n; };
    Plan plan = make_plan(machine, call.dtype, rows_of(call.rows), call.cols ? rows_of(*call.cols) : 0, call.D,
                          static_cast<char*>(call.workspace));
    Arguments& a = plan.a;
    for (int s = 0; s < a.n_sides; ++s) {
        const fntx_side& from = s ? *call.cols : call.rows;
        Side& side = a.sides[s];
        for (int m = 0; m < 2; ++m) side.z[m] = from.z[m], side.d_z[m] = static_cast<float*>(from.d_z[m]);
        side.given_ids = from.ids;
        side.neg_lse = static_cast<float*>(from.neg_lse);
        side.d_neg_lse = static_cast<const float*>(from.d_neg_lse);
    }
    a.forward = call.phases & FNTX_FORWARD;
    a.backward = call.phases & FNTX_BACKWARD;
    a.normalize = call.normalize;
    a.paired = !call.cols && call.rows.z[0].n == call.rows.z[1].n;
    a.inv_tau = call.inv_tau;
    a.inv_tau_ptr = call.inv_tau_ptr;
    a.eps = call.eps;
    a.pos = call.pos, a.d_pos = call.d_pos;
    a.loss = call.loss, a.loss_weight = call.loss_weight;
    a.d_inv_tau = call.d_inv_tau;
    return plan;
}

}  // namespace fntx
