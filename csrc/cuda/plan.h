// How a call is cut into tasks for a device, and how the call's workspace is laid out: plain arithmetic on the host.
#pragma once

#include <math.h>
#include <stddef.h>

#include "arguments.h"

namespace fntx {

// The largest number of rows in a side, and also the largest number of features. It is 2^20 below INT32_MAX, because
// indices are ints and a loop over rows may run one grid stride past the last row.
constexpr int64_t MOST = INT32_MAX - (1 << 20);

// Return an error message if a call of this size is not possible, otherwise null. n_cols 0: symmetric.
inline const char* fault_of_size(int64_t n_rows, int64_t n_cols, int64_t D) {
    if (n_rows < 1 || n_rows > MOST || n_cols < 0 || n_cols > MOST)
        return "the number of rows (or columns) must be at least 1 and less than 2^31 - 2^20";
    if (D < 1 || D > MOST) return "the number of features must be at least 1 and less than 2^31 - 2^20";
    const int64_t most = n_rows > n_cols ? n_rows : n_cols;  // task indices are ints too
    if ((most / ROWS + 1) * (D / CHUNK + 1) > MOST) return "rows times features must be less than about 2^42";
    return nullptr;
}

// The properties of a device that a plan depends on. blocks() returns how many blocks of a dtype's kernel run at once
// on one multiprocessor, or 0 on failure.
struct Machine {
    int multiprocessors;
    int64_t shared;  // bytes available to a block
    int (*blocks)(int device, int dtype, size_t shared);
    int device;
};

struct Plan {
    Arguments a = {};
    size_t shared;
    int grid = 0;
    int64_t bytes = 0;  // bytes of workspace
};

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

template <class Op> int64_t shared_bytes(int64_t stages, int64_t row_slots) {
    const int64_t steps = stages * STEP<Op> + row_slots * ROWS * CHUNK;
    return steps * Op::PARTS * sizeof(uint16_t) + 2 * sizeof(ColumnVectors<Op>);
}

constexpr int64_t PIECE = 256;  // bytes: arrays of the workspace begin at multiples of this, cudaMalloc's alignment

// Places arrays in the workspace one after another, and adds up their bytes.
class Carver {
  public:
    Carver(char* base, int64_t& bytes) : base_(base), bytes_(bytes) {}
    template <class T> void take(T*& pointer, int64_t n) {
        pointer = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base_) + bytes_);  // base_ may be null
        bytes_ += ceil_div(n * int64_t(sizeof(T)), PIECE) * PIECE;
    }

  private:
    char* base_;
    int64_t& bytes_;
};

// Return the number with the lowest cost among first, first + step, ..., last.
template <class Cost> int cheapest(int first, int last, int step, Cost cost) {
    int best = first;
    int64_t least = cost(first);
    for (int i = first + step; i != last + step; i += step)
        if (const int64_t here = cost(i); here < least) best = i, least = here;
    return best;
}

constexpr char NO_ROOM[] = "the device has too little shared memory for a block";  // for a plan whose grid is 0

// Return the plan of a call for a grid of at most `blocks` blocks (0 or less: as many as run at once), with pointers
// into a workspace at `base`. If only the size of the workspace is wanted, `base` may be null. The plan's grid is 0 if
// no block can run on the device.
template <class Op>
Plan make_plan_of(const Machine& machine, int dtype, int64_t n_rows, int64_t n_cols, int64_t D, int blocks,
                  char* base) {
    Plan plan;
    Arguments& a = plan.a;
    const int64_t n[2] = {n_rows, n_cols}, most = n_rows > n_cols ? n_rows : n_cols;
    const int64_t fewest = n_cols && n_cols < n_rows ? n_cols : n_rows;
    a.n_sides = n_cols ? 2 : 1;
    a.D = D;
    a.chunks = int(ceil_div(D, CHUNK));
    a.log_terms = logf(float(most));

    // Find the largest group (chunks of features per gradient task) that fits in shared memory, and how many blocks run
    // at once with it. Every smaller group fits too.
    const auto fit = [&](int group) {
        a.group = group, a.stages = group + 2;
        a.resident = shared_bytes<Op>(a.stages, a.chunks) <= machine.shared;
        plan.shared = size_t(shared_bytes<Op>(a.stages, a.resident ? a.chunks : a.stages));
        return int64_t(plan.shared) <= machine.shared;
    };
    int largest = a.chunks < GROUP ? a.chunks : GROUP;
    while (largest && !fit(largest)) --largest;
    if (!largest) return plan;
    int64_t capacity = int64_t(machine.multiprocessors) * machine.blocks(machine.device, dtype, plan.shared);
    if (blocks > 0 && blocks < capacity) capacity = blocks;
    if (!capacity) return plan;

    // The cost is the number of rounds of tasks times the work of one task.
    const int64_t row_blocks = ceil_div(most, ROWS), tiles = ceil_div(fewest, COLS<Op>);
    fit(cheapest(largest, 1, -1, [&](int group) {
        return ceil_div(row_blocks * ceil_div(a.chunks, group), capacity) * (a.chunks + group);
    }));
    a.col_shares = cheapest(1, int(tiles < MOST_COL_SHARES ? tiles : MOST_COL_SHARES), 1, [&](int col_shares) {
        return ceil_div(row_blocks * col_shares, capacity) * ceil_div(tiles, col_shares);
    });
    int64_t wanted = 1;
    for (int64_t tasks : {row_blocks * a.col_shares, row_blocks * ceil_div(a.chunks, a.group), ceil_div(most, WARPS)})
        wanted = tasks > wanted ? tasks : wanted;
    plan.grid = int(wanted < capacity ? wanted : capacity);

    Carver carver(base, plan.bytes);
    for (int s = 0; s < a.n_sides; ++s) {
        PackedSide& side = a.sides[s];
        side.n = int(n[s]);
        side.padded = int(ceil_div(n[s], PADDED_ROWS) * PADDED_ROWS);
        for (int p = 0; p < Op::PARTS; ++p) carver.take(side.x[p], int64_t(side.padded) * a.chunks * CHUNK);
        for (float** vector : {&side.r, &side.norm, &side.sim_pos, &side.nu, &side.w})
            carver.take(*vector, side.padded);
        carver.take(side.peaks, int64_t(a.col_shares) * side.padded);
        carver.take(side.sums, int64_t(a.col_shares) * side.padded);
        for (float** of_blocks : {&side.longest, &side.largest_r}) carver.take(*of_blocks, plan.grid);
        carver.take(side.ids, side.padded);
    }
    carver.take(a.arrived, 1);
    carver.take(a.row_losses, n_rows);
    carver.take(a.row_d_inv_tau, most);
    carver.take(a.largest_w, plan.grid);
    return plan;
}

inline Plan make_plan(const Machine& machine, int dtype, int64_t n_rows, int64_t n_cols, int64_t D, int blocks,
                      char* base) {
    const auto of_type = dtype == FNTX_FLOAT32 ? make_plan_of<Split> : make_plan_of<Half>;
    return of_type(machine, dtype, n_rows, n_cols, D, blocks, base);
}

// Return an error message if a call is invalid, otherwise null.
inline const char* fault_of(const fntx_cuda_call& call) {
    if (call.dtype < FNTX_FLOAT16 || call.dtype > FNTX_FLOAT32) return "unsupported dtype";
    if (call.phases < FNTX_FORWARD || call.phases > (FNTX_FORWARD | FNTX_BACKWARD)) return "invalid phases";
    if (!call.workspace || reinterpret_cast<uintptr_t>(call.workspace) % 16)
        return "the workspace must be given and 16-byte aligned";
    const bool two_views = !call.cols && call.rows.z[0].n == call.rows.z[1].n;
    if ((call.pos || call.d_pos || call.loss) && !two_views) return "pos, d_pos and loss need two views";
    for (const fntx_side* side : {&call.rows, call.cols}) {
        if (!side) continue;
        for (const fntx_matrix& z : side->z)
            if (z.n < 0 || z.n > MOST || (z.n && !z.data)) return "a matrix has an invalid number of rows, or no data";
        if (side->z[0].n < 1) return "the first matrix of a side has no rows";
        if (const char* fault = fault_of_size(side->z[0].n + side->z[1].n, 0, call.D)) return fault;
        if (!(call.phases & FNTX_FORWARD) && !side->neg_lse) return "a backward without a forward needs neg_lse";
        if (call.phases & FNTX_BACKWARD && !side->d_neg_lse && !call.loss)
            return "a backward without a loss needs d_neg_lse";
        if (call.phases & FNTX_BACKWARD && side->d_neg_lse && call.loss)
            return "a backward with a loss takes no d_neg_lse";
    }
    if (call.loss && !(call.phases & FNTX_FORWARD)) return "a loss needs a forward";
    if (call.phases & FNTX_BACKWARD && !call.d_inv_tau) return "a backward needs d_inv_tau";
    return nullptr;
}

// Return the plan of a valid call.
inline Plan plan_call(const Machine& machine, const fntx_cuda_call& call) {
    const auto rows_of = [](const fntx_side& side) { return side.z[0].n + side.z[1].n; };
    Plan plan = make_plan(machine, call.dtype, rows_of(call.rows), call.cols ? rows_of(*call.cols) : 0, call.D,
                          call.blocks, static_cast<char*>(call.workspace));
    Arguments& a = plan.a;
    for (int s = 0; s < a.n_sides; ++s) {
        const fntx_side& from = s ? *call.cols : call.rows;
        PackedSide& side = a.sides[s];
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
