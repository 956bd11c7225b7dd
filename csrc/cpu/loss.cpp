// A call's phases: rows in, forward over the tiles, formulas per row, backward over the tiles, gradients out.
//
// With u = 2 M^2 D flops: the forward forms half of the products (u/2); the backward forms them again (u/2), except
// where it finds their exponentials in the workspace, and gathers the gradient (u). 2u in all, 1.5u while the
// workspace lasts. Memory: three (M, D) matrices - u, u transposed, the gathered gradient -, the workspace, and a tile
// for each thread.
//
// No sum's order depends on which thread took what: a result has the same bits each time. The size of the tiles follows
// from the number of threads, so another number may round differently.
#include "loss.h"

#include <math.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "memory.h"
#include "schedule.h"
#include "team.h"

namespace fntx {
namespace {

// exp(k s) itself while k max|s| + ln M stays below this: two thirds of the type's range of exponents, which leaves
// products with exp(-nu) and with the weights a third to move in.
template <class T> constexpr double DIRECT_LIMIT = sizeof(T) == 4 ? 60.0 : 480.0;

// Factors w exp(-nu) are formed while they stay in this distance of 0 and of the type's end.
template <class T> constexpr double SMALLEST_FACTOR = sizeof(T) == 4 ? 1e-35 : 1e-300;

// The largest weight in a shifted tile: the middle of the type's range above 1, so that sums of them stay in it.
template <class T> constexpr double LARGEST_WEIGHT = sizeof(T) == 4 ? 0x1p64 : 0x1p512;

constexpr int64_t LARGEST_EDGE = 192;   // a tile and the rows it touches stay in a core's second cache at D = 128
constexpr int64_t TILES_PER_SIDE = 4;   // at least, for each thread, down to the smallest edge
constexpr double PARALLEL_FROM = 4e6;   // multiplications of a full product; fewer are done as soon by one thread

constexpr double INF = std::numeric_limits<double>::infinity();

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The larger one; NaN once there is one.
double larger(double a, double b) { return b <= a || a != a ? a : b; }

int64_t count_rows(const fntx_side& side) { return side.z[0].n + side.z[1].n; }

// Where the ids of some rows lie.
struct Span {
    int64_t low = std::numeric_limits<int64_t>::max(), high = -1;

    void add(const Span& other) {
        low = std::min(low, other.low);
        high = std::max(high, other.high);
    }
    bool meets(const Span& other) const { return low <= other.high && other.low <= high; }
};

// A side with its memory.
template <class T> struct Rows : Side<T> {
    Rows(const fntx_side& given, int64_t D, int64_t ld, bool gather) : given(given) {
        this->n = count_rows(given);
        const int64_t padded = round_up(this->n, ALIGNED_ROWS);
        chunks = padded / ALIGNED_ROWS;
        spans.resize(size_t(chunks));
        this->u = u_memory = Buffer<T>(padded * ld);
        this->panels = panel_memory = Buffer<T>(padded * D);
        if (gather) gathered_memory = Buffer<T>(padded * ld);
        this->gathered = gathered_memory;
        row_memory = Buffer<T>(4 * padded);
        this->norm = row_memory;
        this->peaks = row_memory + padded;
        this->weights = row_memory + 2 * padded;
        this->nu = row_memory + 3 * padded;
        this->ids = id_memory = Buffer<Id<T>>(padded);
        double_memory = Buffer<double>(3 * padded);
        this->sums = double_memory;
        neg_lse = double_memory + padded;
        w = double_memory + 2 * padded;
    }

    const fntx_side& given;
    int64_t chunks;           // of ALIGNED_ROWS rows
    std::vector<Span> spans;  // of each chunk's ids
    double *neg_lse, *w;      // nu and its weight

    Buffer<T> u_memory, panel_memory, gathered_memory, row_memory;
    Buffer<double> double_memory;
    Buffer<Id<T>> id_memory;
};

template <class T> class Run {
  public:
    Run(const fntx_call& call, const Kernels<T>& kernels)
        : call_(call),
          kernels_(kernels),
          symmetric_(call.cols == nullptr),
          normalize_(call.normalize != 0),
          eps_(T(call.eps)),
          ld_(row_length(call.D, kernels.lanes)),
          team_(threads(call), call.poll),
          rows_(call.rows, call.D, ld_, call.phases & FNTX_BACKWARD),
          cols_memory_(symmetric_ ? nullptr : new Rows<T>(*call.cols, call.D, ld_, wants_columns(call))),
          cols_(symmetric_ ? rows_ : *cols_memory_),
          edge_(edge(std::min(rows_.n, cols_.n), team_.threads())),
          triangle_(blocks(rows_)),
          rectangle_(blocks(rows_), blocks(cols_)),
          tasks_(symmetric_ ? triangle_.size() : rectangle_.size()),
          scratch_size_(round_up(edge_ * (edge_ + kernels.lanes + 1), 64)),
          scratch_(team_.threads() * scratch_size_) {}

    // False if it was interrupted.
    bool execute() {
        team_.lead([&] { phases(); });
        return !team_.stopped();
    }

  private:
    void phases() {
        load();
        if (call_.phases & FNTX_FORWARD) {
            if (call_.phases & FNTX_BACKWARD && !shifted_) {
                kept_ = std::min(tasks_, call_.workspace / int64_t(sizeof(T)) / (edge_ * edge_));
                workspace_ = Buffer<T>(kept_ * edge_ * edge_);
            }
            each_tile(kernels_.forward);
            for_sides([&](Rows<T>& side) { take_logarithms(side); });
            if (call_.loss) take_losses();
        }
        if (call_.phases & FNTX_BACKWARD) {
            weigh();
            each_tile(kernels_.backward);
            workspace_ = {}, scratch_ = {};  // before the outputs' pages are first touched
            for_sides([&](Rows<T>& side) { side.panel_memory = {}; });
            double d_inv_tau = 0;
            for_sides([&](Rows<T>& side) { d_inv_tau += finish(side); });
            *static_cast<T*>(call_.d_inv_tau) = T(d_inv_tau);
        }
    }

    static bool wants_columns(const fntx_call& call) {
        return call.phases & FNTX_BACKWARD && (call.cols->d_z[0] || call.cols->d_z[1]);
    }

    static int threads(const fntx_call& call) {
        const int64_t cols = call.cols ? count_rows(*call.cols) : count_rows(call.rows);
        const double products = double(count_rows(call.rows)) * double(cols) * double(call.D);
        return products < PARALLEL_FROM ? 1 : std::max(call.threads, 1);
    }

    // Rows a multiple of 1 KiB apart would compete for the same few lines of the first cache.
    static int64_t row_length(int64_t D, int64_t lanes) {
        const int64_t ld = round_up(D, lanes);
        return ld * int64_t(sizeof(T)) % 1024 ? ld : ld + lanes;
    }

    static int64_t edge(int64_t n, int threads) {
        const int64_t even = n / (TILES_PER_SIDE * threads) / ALIGNED_ROWS * ALIGNED_ROWS;
        return std::min(std::max(even, ALIGNED_ROWS), LARGEST_EDGE);
    }

    int64_t blocks(const Rows<T>& side) const { return (side.n + edge_ - 1) / edge_; }

    template <class Body> void for_sides(Body body) {
        body(rows_);
        if (!symmetric_) body(cols_);
    }

    // body(row) for every row, and the sum of what it returns; a chunk of rows is one thread's.
    template <class Body> double sum_over_rows(Rows<T>& side, Body body) {
        std::vector<double> sums(size_t(side.chunks));
        team_.each(side.chunks, [&](int64_t chunk, int) {
            double sum = 0;
            const int64_t last = std::min(side.n, (chunk + 1) * ALIGNED_ROWS);
            for (int64_t row = chunk * ALIGNED_ROWS; row < last; ++row) sum += body(row);
            sums[size_t(chunk)] = sum;
        });
        double total = 0;
        for (double sum : sums) total += sum;
        return total;
    }

    void load() {
        double largest[2] = {0, 0};
        int which = 0;
        for_sides([&](Rows<T>& side) {
            std::vector<double> squares(size_t(side.chunks));
            team_.each(side.chunks, [&](int64_t chunk, int) { squares[size_t(chunk)] = load_chunk(side, chunk); });
            for (double square : squares) largest[which] = larger(largest[which], square);
            ++which;
        });
        const double bound = normalize_ ? 1 : sqrt(largest[0]) * sqrt(largest[symmetric_ ? 0 : 1]);
        const double terms = log(double(std::max(rows_.n, cols_.n)));
        shifted_ = !(call_.inv_tau * bound + terms < DIRECT_LIMIT<T>);
    }

    double load_chunk(Rows<T>& side, int64_t chunk) {
        const int64_t first = chunk * ALIGNED_ROWS, last = first + ALIGNED_ROWS, n_first = side.given.z[0].n;
        for (int64_t row = first; row < last; ++row) {
            int64_t id = -1;
            if (row < side.n) {
                id = side.given.ids ? side.given.ids[row] : row < n_first ? row : row - n_first;
                side.spans[size_t(chunk)].add({id, id});
            }
            side.ids[row] = Id<T>(id);
            side.sums[row] = 0;
            side.peaks[row] = T(-INF);
            side.weights[row] = 0;
            side.nu[row] = T(INF);
        }
        if (side.gathered) std::fill(side.gathered + first * ld_, side.gathered + last * ld_, T(0));
        return kernels_.load_rows(side, side.given.z, call_.dtype, call_.D, ld_, normalize_, eps_, first, last);
    }

    // --- tiles ---------------------------------------------------------------------------------------------------

    void each_tile(void (*kernel)(const Tile<T>&)) {
        const int64_t P = blocks(rows_), Q = symmetric_ ? 0 : blocks(cols_);
        std::unique_ptr<std::atomic<int32_t>[]> turns(new std::atomic<int32_t>[size_t(P + Q)]);
        for (int64_t block = 0; block < P + Q; ++block) turns[size_t(block)].store(0);
        team_.each(tasks_, [&](int64_t index, int thread) {
            const Task task = symmetric_ ? triangle_[index] : rectangle_[index];
            std::atomic<int32_t>& row_turn = turns[size_t(task.row_block)];
            std::atomic<int32_t>& col_turn = turns[size_t(symmetric_ ? task.col_block : P + task.col_block)];
            if (!team_.wait(row_turn, task.row_turn, thread) || !team_.wait(col_turn, task.col_turn, thread)) return;
            kernel(tile(task, index, thread));
            row_turn.store(task.row_turn + 1, std::memory_order_release);
            // Once only for a diagonal tile, whose block may have moved on by now.
            if (&col_turn != &row_turn) col_turn.store(task.col_turn + 1, std::memory_order_release);
        });
    }

    Tile<T> tile(const Task& task, int64_t index, int thread) {
        Tile<T> tile;
        tile.rows = &rows_;
        tile.cols = &cols_;
        tile.D = call_.D;
        tile.ld = ld_;
        tile.row0 = task.row_block * edge_;
        tile.n_rows = std::min(edge_, rows_.n - tile.row0);
        tile.col0 = task.col_block * edge_;
        tile.n_cols = std::min(edge_, cols_.n - tile.col0);
        tile.diagonal = symmetric_ && task.row_block == task.col_block;
        tile.masked = tile.n_cols % kernels_.panel || span(rows_, tile.row0).meets(span(cols_, tile.col0));
        tile.shifted = shifted_;
        tile.inv_tau = T(call_.inv_tau);
        tile.edge = edge_;
        tile.exps = index < kept_ ? workspace_ + index * edge_ * edge_ : nullptr;
        tile.buffer = scratch_ + thread * scratch_size_;
        tile.sums = tile.buffer + edge_ * edge_;
        return tile;
    }

    Span span(const Rows<T>& side, int64_t first) const {
        Span all;
        const int64_t last = std::min(side.chunks, (first + edge_) / ALIGNED_ROWS);
        for (int64_t chunk = first / ALIGNED_ROWS; chunk < last; ++chunk) all.add(side.spans[size_t(chunk)]);
        return all;
    }

    // --- rows ----------------------------------------------------------------------------------------------------

    void take_logarithms(Rows<T>& side) {
        T* const out = static_cast<T*>(side.given.neg_lse);
        sum_over_rows(side, [&](int64_t row) {
            side.neg_lse[row] = log(side.sums[row]) + (shifted_ ? double(side.peaks[row]) : 0);
            if (out) out[row] = T(side.neg_lse[row]);
            if (call_.pos) static_cast<T*>(call_.pos)[row] = T(call_.inv_tau * similarity_to_partner(row));
            return 0.0;
        });
    }

    // loss_i = log(1 + exp(nu - pi)), and the weights q_i = sigmoid(nu - pi) of its gradient.
    void take_losses() {
        const double loss = sum_over_rows(rows_, [&](int64_t row) {
            const double x = rows_.neg_lse[row] - call_.inv_tau * similarity_to_partner(row);
            const double e = exp(-fabs(x));
            rows_.w[row] = call_.loss_weight * (x > 0 ? 1 : e) / (1 + e);
            return (x > 0 ? x : 0) + log1p(e);
        });
        *static_cast<T*>(call_.loss) = T(call_.loss_weight * loss);
    }

    int64_t partner(int64_t row) const {
        const int64_t n = call_.rows.z[0].n;
        return row < n ? row + n : row - n;
    }

    double similarity_to_partner(int64_t row) const {
        return kernels_.dot(rows_.u + row * ld_, rows_.u + partner(row) * ld_, ld_);
    }

    // Weights of any magnitude (a loss scaler's 2^16, a mean's 1e-6) enter the tiles in units of `weight_unit_`. Without
    // a shift the largest is 1. Where w exp(-nu) would then leave the range of T for some row, because one weight is
    // 1e38 times another, the tiles are shifted: their w exp(k s - nu) is at most w, so the largest is LARGEST_WEIGHT.
    void weigh() {
        double largest = 0;
        for_sides([&](Rows<T>& side) {
            const T* const neg_lse = static_cast<const T*>(side.given.neg_lse);
            const T* const w = static_cast<const T*>(side.given.d_neg_lse);
            for (int64_t row = 0; row < side.n; ++row) {
                if (!(call_.phases & FNTX_FORWARD)) side.neg_lse[row] = double(neg_lse[row]);
                if (!call_.loss) side.w[row] = w ? double(w[row]) : 0;
                if (side.neg_lse[row] == -INF) side.w[row] = 0;  // no negative: no weight, whatever came
                largest = larger(largest, larger(fabs(side.w[row]), fabs(d_pos(row))));
            }
        });
        if (largest == 0) largest = 1;
        for_sides([&](Rows<T>& side) {
            for (int64_t row = 0; row < side.n && !shifted_; ++row) {
                if (side.w[row] == 0) continue;
                const double factor = fabs(side.w[row]) / largest * exp(-side.neg_lse[row]);
                shifted_ = !(factor > SMALLEST_FACTOR<T> && factor < 1 / SMALLEST_FACTOR<T>);
            }
        });
        weight_unit_ = shifted_ ? largest / LARGEST_WEIGHT<T> : largest;
        for_sides([&](Rows<T>& side) {
            sum_over_rows(side, [&](int64_t row) {
                const double nu = side.neg_lse[row] == -INF ? INF : side.neg_lse[row];
                const double w = side.w[row] / weight_unit_;
                side.weights[row] = T(shifted_ ? w : w * exp(-nu));
                side.nu[row] = T(nu);
                return 0.0;
            });
        });
    }

    double d_pos(int64_t row) const {
        if (call_.loss) return -rows_.w[row];
        return call_.d_pos ? double(static_cast<const T*>(call_.d_pos)[row]) : 0;
    }

    // From what was gathered to the gradient in z; returns the side's part of the gradient in k. Everything is in units of
    // `weight_unit_`, and of k, until it is written.
    double finish(Rows<T>& side) {
        if (!side.gathered) return 0;
        const bool has_positives = call_.loss || call_.d_pos;
        const double share = symmetric_ ? 0.5 : &side == &rows_ ? 1 : 0;
        const int64_t n_first = side.given.z[0].n;
        return sum_over_rows(side, [&](int64_t row) {
            const T* const u = side.u + row * ld_;
            T* const g = side.gathered + row * ld_;
            double d_inv_tau = share * weight_unit_ * kernels_.dot(u, g, ld_);
            if (has_positives) {
                const double both = d_pos(row) + d_pos(partner(row));
                kernels_.add_scaled(g, T(both / weight_unit_), rows_.u + partner(row) * ld_, ld_);
                d_inv_tau += d_pos(row) * similarity_to_partner(row);
            }
            T* const out = static_cast<T*>(side.given.d_z[row >= n_first]);
            if (!out) return d_inv_tau;
            if (normalize_ && side.norm[row] > eps_) kernels_.add_scaled(g, T(-kernels_.dot(u, g, ld_)), u, ld_);
            const double length = normalize_ ? std::max(side.norm[row], eps_) : T(1);
            const double scale = weight_unit_ * call_.inv_tau / length;
            T* const d_z = out + (row >= n_first ? row - n_first : row) * call_.D;
            for (int64_t d = 0; d < call_.D; ++d) d_z[d] = T(double(g[d]) * scale);
            return d_inv_tau;
        });
    }

    const fntx_call& call_;
    const Kernels<T>& kernels_;
    const bool symmetric_, normalize_;
    const T eps_;
    const int64_t ld_;
    Team team_;
    Rows<T> rows_;
    std::unique_ptr<Rows<T>> cols_memory_;
    Rows<T>& cols_;
    const int64_t edge_;
    const Triangle triangle_;
    const Rectangle rectangle_;
    const int64_t tasks_, scratch_size_;
    Buffer<T> scratch_, workspace_;
    int64_t kept_ = 0;     // tiles whose exponentials stay in the workspace
    bool shifted_ = false;
    double weight_unit_ = 1;
};

}  // namespace

template <class T> bool run(const fntx_call& call, const Kernels<T>& kernels) {
    return Run<T>(call, kernels).execute();
}

template bool run<float>(const fntx_call&, const Kernels<float>&);
template bool run<double>(const fntx_call&, const Kernels<double>&);

}  // namespace fntx
