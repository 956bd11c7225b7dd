// The phases of a call: load rows, forward over the tiles, formulas per row, backward over the tiles, write gradients.
//
// Flops are in units of u, one full product: 2 M^2 D, or 2 M N D for a rectangle. A side "gathers" its gradient: row i
// sums G_ij u_j over the columns j (docs/architecture.md defines the matrix G and the unit rows u_j).
//
// FNTX_SOFTPLUS and FNTX_SIGMOID take one pass over the tiles, because their gradients do not depend on the rows' sums.
// One pass is usually enough too if only the rows have losses and gradients (queries against a queue;
// may_gather_at_once decides). Each row then gathers with its exponentials in place of G. At the end, the gathered row
// is multiplied by the row's weight and divided by the row's sum. That takes 2u for a rectangle, where two passes take
// 3u.
//
// Otherwise there are two passes. (FNTX_IN, FNTX_RATIO and FNTX_PAIRS repeat both passes for the tiles that may contain
// positives.) In a symmetric call, the forward forms half of the products (u/2). The backward forms them again (u/2)
// and gathers the gradient (u). That takes 2u in all, or 1.5u if the workspace has room for all exponentials of the
// forward.
//
// Memory: up to three (M, D) matrices for each side (the rows, their transpose, the gathered gradient), the sums of the
// classes for FNTX_OUT, the workspace, and a tile for each thread. If one side is much longer than the other and there
// are several threads, slabs.h adds copies of the shorter side's sums and gathered gradient. Together, these copies
// have no more rows than the longer side.
//
// No sum depends on which thread ran which task, so a result has the same bits every time. The size of the tiles
// depends on the number of threads, so calls with different numbers of threads may round differently.
#include "loss.h"

#include <math.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "../ranges.h"
#include "classes.h"
#include "memory.h"
#include "schedule.h"
#include "slabs.h"
#include "team.h"

namespace fntx {
namespace {

constexpr int64_t SCRATCH_MULTIPLE = 64;  // elements: whole cache lines, so that no two threads share a line

constexpr double INF = std::numeric_limits<double>::infinity();

// Return the larger number, or NaN if either is NaN.
double larger(double a, double b) { return b <= a || a != a ? a : b; }

int64_t count_rows(const fntx_side& side) { return side.z[0].n + side.z[1].n; }

// The range from the smallest to the largest id of some rows.
struct Span {
    int64_t low = std::numeric_limits<int64_t>::max(), high = -1;

    void add(const Span& other) {
        low = std::min(low, other.low);
        high = std::max(high, other.high);
    }
    bool meets(const Span& other) const { return low <= other.high && other.low <= high; }
};

// A packed side that owns its memory.
template <class T> struct OwnedSide : PackedSide<T> {
    OwnedSide(const fntx_side& given, int64_t D, int64_t ld, bool are_columns, bool gather, bool bfloat)
        : given(given) {
        this->n = count_rows(given);
        this->order = nullptr;
        const int64_t padded = round_up(this->n, ALIGNED_ROWS);
        chunks = padded / ALIGNED_ROWS;
        spans.resize(size_t(chunks));
        this->u = u_memory = Buffer<T>(padded * ld);
        if (are_columns && !bfloat) panel_memory = Buffer<T>(padded * D);
        this->panels = panel_memory;
        if (bfloat) bfloat_memory = Buffer<uint32_t>(padded * word_row_length(ld)), factor_memory = Buffer<T>(padded);
        if (are_columns && bfloat) bfloat_panel_memory = Buffer<uint32_t>(padded * words_of(D));
        this->bfloats = bfloat_memory;
        this->bfloat_panels = bfloat_panel_memory;
        this->factors = factor_memory;
        if (gather) gathered_memory = Buffer<T>(padded * ld);
        this->gathered = gathered_memory;
        row_memory = Buffer<T>(6 * padded);
        this->norm = row_memory;
        this->peaks = row_memory + padded;
        this->weights = row_memory + 2 * padded;
        this->nu = row_memory + 3 * padded;
        this->limits = row_memory + 4 * padded;
        largest_similarity = row_memory + 5 * padded;
        this->ids = id_memory = Buffer<Id<T>>(padded);
        double_memory = Buffer<double>(5 * padded);
        this->sums = double_memory;
        this->slopes = double_memory + padded;
        neg_lse = double_memory + 2 * padded;
        w = double_memory + 3 * padded;
        d_pos = double_memory + 4 * padded;
    }

    const fntx_side& given;
    int64_t chunks;           // number of chunks, each of ALIGNED_ROWS rows
    std::vector<Span> spans;  // range of ids in each chunk
    double *neg_lse, *w;      // nu and its weight
    double* d_pos;            // weight of pi, or of the terms of the row's positives
    T* largest_similarity;    // each row's limit, if the call has limits

    // Free the packed copies of the rows, which only the tiles read.
    void release_packed() { panel_memory = {}, bfloat_memory = {}, bfloat_panel_memory = {}; }

    Buffer<T> u_memory, panel_memory, gathered_memory, row_memory, factor_memory;
    Buffer<uint32_t> bfloat_memory, bfloat_panel_memory;
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
          rows_(call.rows, call.D, ld_, symmetric_, gathers_rows(call), in_bfloat()),
          cols_memory_(symmetric_ ? nullptr : new_columns()),
          cols_(symmetric_ ? rows_ : *cols_memory_),
          classes_(call.classes ? Classes(call.classes, rows_.n) : Classes()),
          schedule_(rows_.n, cols_.n, symmetric_, team_.threads()),
          slabs_(schedule_.slabs),
          edge_(schedule_.edge),
          few_(slabs_.of_rows ? cols_ : rows_),
          slab_sums_(few_, slabs_.count, ld_),
          tile_words_(in_bfloat() ? edge_ * words_of(edge_) : 0),
          scratch_size_(round_up(edge_ * edge_ + tile_words_ + (softplus(call) ? 2 : 1) * edge_ * (kernels.lanes + 1),
                                 SCRATCH_MULTIPLE)),
          scratch_(team_.threads() * scratch_size_),
          radial_(in_bfloat() ? schedule_.size() : 0) {
        if (in_bfloat()) std::fill_n(radial_ + 0, schedule_.size(), 0.0);
        if (!over_positives()) return;
        rows_.order = classes_.order();
        positives_.reset(new PositiveSide<T>(rows_));
    }

    // Run the call. Return false if it was interrupted.
    bool execute() {
        team_.lead([&] { phases(); });
        return !team_.stopped();
    }

  private:
    void phases() {
        load();
        if (softplus(call_)) return softplus_phases();
        if (call_.phases & FNTX_FORWARD) {
            at_once_ = may_gather_at_once();
            if (call_.phases & FNTX_BACKWARD && !shifted_ && !at_once_) {
                kept_ = std::min(schedule_.places(), call_.workspace / int64_t(sizeof(T)) / (edge_ * edge_));
                workspace_ = Buffer<T>(kept_ * edge_ * edge_);
            }
            each_tile(at_once_ ? kernels_.forward_and_gather : kernels_.forward);
            join_sums();
            for_sides([&](OwnedSide<T>& side) { take_logarithms(side); });
            if (call_.loss && over_positives())
                take_losses_over_positives();
            else if (call_.loss)
                of_classes() ? take_class_losses() : take_losses();
        }
        if (call_.phases & FNTX_BACKWARD) {
            weigh();
            if (!at_once_) each_tile(kernels_.backward);
            if (over_positives())
                each_tile(of_each_pair() ? kernels_.pairs_backward : kernels_.backward, positives_.get());
            join_gathered();
            if (at_once_) weigh_gathered();
            // Release memory before the outputs are written, which is when the system allocates their pages. If the
            // workspace held every tile, lend it: the next call probably needs the same size.
            if (kept_ == schedule_.places()) workspace_.lend();
            workspace_ = {}, scratch_ = {};
            for_sides([&](OwnedSide<T>& side) { side.release_packed(); });
            finish_sides();
        }
    }

    // The weights do not depend on the sums, so one pass over the tiles computes both values and gradients.
    void softplus_phases() {
        double largest = 0, d_bias = 0;
        for_sides([&](OwnedSide<T>& side) {
            const T* const w = static_cast<const T*>(side.given.d_neg_lse);
            const double of_loss = &side == &rows_ ? call_.loss_weight : call_.cols_loss_weight;
            largest = larger(largest, largest_over_rows(side, [&](int64_t row) {
                side.w[row] = call_.loss ? of_loss : w ? double(w[row]) : 0;
                side.d_pos[row] = 0;
                return fabs(side.w[row]);
            }));
        });
        weight_unit_ = largest == 0 ? 1 : largest;
        for_sides([&](OwnedSide<T>& side) {
            each_row(side, [&](int64_t row) { side.weights[row] = T(side.w[row] / weight_unit_); });
        });
        each_tile(kernels_.softplus);
        join_sums();
        join_gathered();
        if (call_.loss) take_softplus_losses();
        for_sides([&](OwnedSide<T>& side) {
            T* const out = static_cast<T*>(side.given.neg_lse);
            d_bias += sum_over_rows(side, [&](int64_t row) {
                if (out) out[row] = T(side.sums[row]);
                return side.w[row] * side.slopes[row] + side.d_pos[row];
            });
        });
        if (!(call_.phases & FNTX_BACKWARD)) return;
        scratch_ = {};
        for_sides([&](OwnedSide<T>& side) { side.release_packed(); });
        *static_cast<T*>(call_.d_bias) = T(d_bias);
        finish_sides();
    }

    void take_softplus_losses() {
        double loss = 0;
        for_sides([&](OwnedSide<T>& side) {
            loss += sum_over_rows(side, [&](int64_t row) {
                if (side.w[row] == 0) return 0.0;
                if (call_.function == FNTX_SIGMOID) return side.w[row] * side.sums[row];
                const double x = call_.inv_tau * similarity_to_positive(side, row) + call_.bias;
                const double e = exp(-fabs(x));
                side.d_pos[row] = -side.w[row] * (x > 0 ? e : 1) / (1 + e);
                return side.w[row] * (side.sums[row] + (x > 0 ? 0 : -x) + log1p(e));
            });
        });
        *static_cast<T*>(call_.loss) = T(loss);
    }

    void finish_sides() {
        double d_inv_tau = 0;
        for (int64_t task = 0; in_bfloat() && task < schedule_.size(); ++task)
            d_inv_tau += weight_unit_ * radial_[task];
        for_sides([&](OwnedSide<T>& side) { d_inv_tau += finish(side); });
        *static_cast<T*>(call_.d_inv_tau) = T(d_inv_tau);
    }

    OwnedSide<T>* new_columns() const {
        return new OwnedSide<T>(*call_.cols, call_.D, ld_, true, gathers_columns(call_), in_bfloat());
    }

    // Return whether the tiles multiply bfloat16 numbers.
    bool in_bfloat() const { return kernels_.multiplies_bfloat; }

    // Return whether the loss contains pi, the logit of each row's only positive.
    bool takes_positives() const {
        return call_.loss && call_.function != FNTX_SIGMOID && !call_.against && !in_classes();
    }

    bool in_classes() const { return call_.classes && !classes_.in_pairs(); }

    // of_classes: the loss contains the mean logit of a row's positives, which is computed from the sum of all rows in
    // the class. over_positives: the loss contains a separate sum over each row's positives, formed in tiles.
    // of_each_pair: that sum has one loss term for each positive.
    bool of_classes() const { return in_classes() && call_.form == FNTX_OUT; }
    bool over_positives() const { return in_classes() && call_.form != FNTX_OUT; }
    bool of_each_pair() const { return call_.form == FNTX_PAIRS; }

    static bool softplus(const fntx_call& call) { return call.function != FNTX_LOG_SUM_EXP; }

    static bool gathers_columns(const fntx_call& call) {
        return call.phases & FNTX_BACKWARD && (call.cols->d_z[0] || call.cols->d_z[1]);
    }

    // Unless the tiles multiply bfloat16 numbers, the temperature's gradient is computed from one side's gathered
    // gradient. So the rows gather if the columns do not.
    static bool gathers_rows(const fntx_call& call) {
        const bool wanted = call.rows.d_z[0] || call.rows.d_z[1];
        return call.phases & FNTX_BACKWARD && (wanted || !call.cols || !gathers_columns(call));
    }

    static int threads(const fntx_call& call) {
        const int64_t rows = count_rows(call.rows), cols = call.cols ? count_rows(*call.cols) : rows;
        return useful_threads(rows, cols, call.D, call.threads);
    }

    static int64_t row_length(int64_t D, int64_t lanes) {
        const int64_t ld = round_up(D, lanes);
        return ld * int64_t(sizeof(T)) % COMPETING_BYTES ? ld : ld + lanes;
    }

    template <class Body> void for_sides(Body body) {
        body(rows_);
        if (!symmetric_) body(cols_);
    }

    // Call body(row) for every row, and return the sum or the maximum of the results. For a maximum, which starts from
    // 0, the results must not be negative. Threads take whole chunks of rows, and the results of the chunks are
    // combined in order.
    template <class Body> double sum_over_rows(const OwnedSide<T>& side, Body body) {
        return over_rows(side, body, [](double a, double b) { return a + b; });
    }
    template <class Body> double largest_over_rows(const OwnedSide<T>& side, Body body) {
        return over_rows(side, body, larger);
    }

    template <class Body, class Join> double over_rows(const OwnedSide<T>& side, Body body, Join join) {
        std::vector<double> parts(size_t(side.chunks));
        each_chunk(side, [&](int64_t chunk) {
            double part = 0;
            const int64_t last = std::min(side.n, (chunk + 1) * ALIGNED_ROWS);
            for (int64_t row = chunk * ALIGNED_ROWS; row < last; ++row) part = join(part, body(row));
            parts[size_t(chunk)] = part;
        });
        double total = 0;
        for (double part : parts) total = join(total, part);
        return total;
    }

    // Call body(row) for every row.
    template <class Body> void each_row(const OwnedSide<T>& side, Body body) {
        each_chunk(side, [&](int64_t chunk) {
            const int64_t last = std::min(side.n, (chunk + 1) * ALIGNED_ROWS);
            for (int64_t row = chunk * ALIGNED_ROWS; row < last; ++row) body(row);
        });
    }

    // Call body(chunk) for every chunk of rows.
    template <class Body> void each_chunk(const OwnedSide<T>& side, Body body) {
        const int64_t n = chunks_per_take(side.chunks, team_.threads());
        team_.each(divide_up(side.chunks, n), [&](int64_t take, int thread) {
            const int64_t last = std::min(side.chunks, (take + 1) * n);
            for (int64_t chunk = take * n; chunk < last && !team_.interrupted(thread); ++chunk) body(chunk);
        });
    }

    // Call body(row) for every row of the shorter side. The more slabs, the fewer rows a thread takes at a time.
    template <class Body> void each_row_of_slabs(Body body) {
        const int64_t rows = std::max(ALIGNED_ROWS / slabs_.count, int64_t(1));
        team_.each(divide_up(few_.n, rows), [&](int64_t chunk, int) {
            const int64_t last = std::min(few_.n, (chunk + 1) * rows);
            for (int64_t row = chunk * rows; row < last; ++row) body(row);
        });
    }

    void load() {
        double largest[2] = {0, 0};
        int which = 0;
        for_sides([&](OwnedSide<T>& side) {
            std::vector<double> squares(size_t(side.chunks));
            each_chunk(side, [&](int64_t chunk) { squares[size_t(chunk)] = load_chunk(side, chunk); });
            for (double square : squares) largest[which] = larger(largest[which], square);
            ++which;
        });
        team_.each(slabs_.count - 1, [&](int64_t copy, int) { slab_sums_.clear(copy + 1); });
        const double bound = normalize_ ? 1 : sqrt(largest[0]) * sqrt(largest[symmetric_ ? 0 : 1]);
        const double terms = log(double(std::max(rows_.n, cols_.n)));
        log_length_ = normalize_ ? 0 : log(sqrt(largest[symmetric_ ? 0 : 1]));
        largest_log_ = call_.inv_tau * bound + terms;
        shifted_ = !(largest_log_ < DIRECT_LIMIT<T>);
        limited_ = call_.limited || call_.rows.limits || (call_.cols && call_.cols->limits);
        // If all logits are near 0, different logits may have equal exponentials after rounding, and comparing
        // exponentials with limits would not tell them apart. Shifted tiles compare logits.
        shifted_ = shifted_ || (limited_ && call_.inv_tau * bound < 1);
        if (limited_) load_limits();
    }

    void load_limits() {
        for_sides([&](OwnedSide<T>& side) {
            const T* const given = static_cast<const T*>(side.given.limits);
            std::fill(side.largest_similarity + side.n, side.largest_similarity + side.chunks * ALIGNED_ROWS, T(INF));
            each_row(side, [&](int64_t row) {
                double limit = INF;
                if (given)
                    limit = double(given[row]);
                else if (call_.limited)
                    limit = call_.limit_scale * similarity_to_positive(side, row) + call_.limit_shift;
                side.largest_similarity[row] = T(limit);
            });
        });
        scale_limits();
    }

    // Convert the limits to exponentials, or to logits if the tiles are shifted. The conversion rounds as the tiles do,
    // so that a similarity equal to its limit still counts.
    void scale_limits() {
        for_sides([&](OwnedSide<T>& side) {
            const T k = T(call_.inv_tau);
            const int64_t n = side.chunks * ALIGNED_ROWS;
            if (shifted_) {
                for (int64_t row = 0; row < n; ++row) side.limits[row] = side.largest_similarity[row] * k;
                return;
            }
            const T scale = T(LOG2_E<double> * double(k)), most = std::numeric_limits<T>::max_exponent - 2;
            for (int64_t row = 0; row < n; ++row) {
                const T x = side.largest_similarity[row];
                side.limits[row] = x * scale > -most && x * scale < most ? x : T(0);
            }
            kernels_.exp2(side.limits, scale, side.limits, n);
            for (int64_t row = 0; row < n; ++row) {
                const T x = side.largest_similarity[row] * scale;
                if (!(x > -most)) side.limits[row] = x != x ? T(INF) : T(0);
                if (x >= most) side.limits[row] = T(INF);
            }
        });
    }

    double load_chunk(OwnedSide<T>& side, int64_t chunk) {
        const int64_t first = chunk * ALIGNED_ROWS, last = first + ALIGNED_ROWS, n_first = side.given.z[0].n;
        for (int64_t row = first; row < last; ++row) {
            int64_t id = -1;
            if (row < side.n) {
                id = side.given.ids ? side.given.ids[row] : row < n_first ? row : row - n_first;
                if (call_.classes) id = class_id(row);
                side.spans[size_t(chunk)].add({id, id});
            }
            side.ids[row] = Id<T>(id);
            side.sums[row] = side.slopes[row] = 0;
            side.peaks[row] = T(-INF);
            side.weights[row] = 0;
            side.w[row] = 0;
            side.nu[row] = T(INF);
        }
        if (side.gathered) std::fill(side.gathered + first * ld_, side.gathered + last * ld_, T(0));
        return kernels_.load_rows(side, side.given.z, call_.dtype, call_.D, ld_, normalize_, eps_, first, last);
    }

    // Return the id of a row in a loss with classes. Rows with equal ids are not each other's negatives.
    int64_t class_id(int64_t row) const {
        if (over_positives()) return class_of(row);
        return of_classes() ? row : classes_.first_of_pair(row);
    }

    int64_t class_of(int64_t row) const { return classes_.of_row(rows_.order ? rows_.order[row] : row); }

    double count_positives(int64_t row) const { return double(classes_.count(class_of(row)) - 1); }

    // --- tiles ---------------------------------------------------------------------------------------------------

    // Call the kernel on every tile. `agreeing` is NULL, or the side that holds each row's sums over the row's
    // positives. With `agreeing`, the kernel gets this side as rows and columns, and is called only on tiles in which
    // ids may agree.
    void each_tile(void (*kernel)(const Tile<T>&), PackedSide<T>* agreeing = nullptr) {
        const int64_t P = slabs_.count * slabs_.rows, Q = symmetric_ ? 0 : slabs_.count * slabs_.cols;
        std::unique_ptr<std::atomic<int32_t>[]> turns(new std::atomic<int32_t>[size_t(P + Q)]);
        for (int64_t block = 0; block < P + Q; ++block) turns[size_t(block)].store(0);
        const int64_t n = schedule_.block_tiles;
        team_.each(schedule_.size(), [&](int64_t index, int thread) {
            const Task task = schedule_[index];
            std::atomic<int32_t>* const of_rows = turns.get() + task.slab * slabs_.rows;
            std::atomic<int32_t>* const of_cols = symmetric_ ? of_rows : turns.get() + P + task.slab * slabs_.cols;
            std::atomic<int32_t>&row_turn = of_rows[task.row_block], &col_turn = of_cols[task.col_block];
            if (!team_.wait(row_turn, task.row_turn, thread) || !team_.wait(col_turn, task.col_turn, thread)) return;
            const bool on_diagonal = symmetric_ && task.row_block == task.col_block;
            int64_t place = schedule_.first_place(index);
            for (int64_t i = 0; i < n; ++i)
                for (int64_t step = on_diagonal ? i : 0; step < n; ++step, ++place) {
                    // Go back and forth, so that nearly every tile shares its columns or its rows with the previous
                    // tile.
                    const int64_t j = i % 2 ? n - 1 - step + (on_diagonal ? i : 0) : step;
                    if (team_.interrupted(thread)) return;
                    Tile<T> tile = this->tile(task, i, j, place, thread);
                    if (tile.n_rows <= 0 || tile.n_cols <= 0) continue;  // a block may extend beyond the matrix
                    if (agreeing && !ids_meet(tile)) continue;
                    if (agreeing) {
                        tile.rows = tile.cols = agreeing;
                        tile.agreeing = tile.masked = tile.shifted = true;
                        tile.exps = nullptr;
                    }
                    if (in_bfloat()) tile.radial = radial_ + index;
                    kernel(tile);
                }
            row_turn.store(task.row_turn + 1, std::memory_order_release);
            // In a task on the diagonal, the row block is also the column block. The block's turn is not stored a
            // second time, because the block's next task may have advanced it by now.
            if (&col_turn != &row_turn) col_turn.store(task.col_turn + 1, std::memory_order_release);
        });
    }

    void join_sums() {
        if (slabs_.count == 1) return;
        each_row_of_slabs([&](int64_t row) { slab_sums_.join_sums(few_, row); });
    }

    void join_gathered() {
        if (slabs_.count == 1 || !few_.gathered) return;
        each_row_of_slabs([&](int64_t row) { slab_sums_.join_gathered(few_, row, kernels_); });
        slab_sums_.release_gathered();
    }

    // Return tile (i, j) of a task.
    Tile<T> tile(const Task& task, int64_t i, int64_t j, int64_t place, int thread) {
        PackedSide<T>* const few = task.slab ? &slab_sums_[task.slab] : &few_;
        Tile<T> tile;
        tile.rows = slabs_.of_rows ? &rows_ : few;
        tile.cols = slabs_.of_rows || symmetric_ ? few : &cols_;
        tile.D = call_.D;
        tile.ld = ld_;
        tile.n_words = words_of(call_.D);
        tile.word_ld = word_row_length(ld_);
        tile.row0 = schedule_.first_row(task, i);
        tile.n_rows = std::min(edge_, rows_.n - tile.row0);
        tile.col0 = schedule_.first_col(task, j);
        tile.n_cols = std::min(edge_, cols_.n - tile.col0);
        tile.diagonal = symmetric_ && tile.row0 == tile.col0;
        tile.masked = tile.n_cols % kernels_.panel || ids_meet(tile);
        tile.shifted = shifted_;
        tile.limited = limited_;
        tile.agreeing = false;
        tile.positives = call_.function == FNTX_SIGMOID;
        tile.inv_tau = T(call_.inv_tau);
        tile.bias = T(call_.bias);
        tile.edge = edge_;
        tile.exps = place < kept_ ? workspace_ + place * edge_ * edge_ : nullptr;
        tile.buffer = scratch_ + thread * scratch_size_;
        tile.bfloats = reinterpret_cast<uint32_t*>(tile.buffer + edge_ * edge_);
        tile.sums = tile.buffer + edge_ * edge_ + tile_words_;
        return tile;
    }

    // Return whether a row and a column of the tile may have the same id.
    bool ids_meet(const Tile<T>& tile) const { return span(rows_, tile.row0).meets(span(cols_, tile.col0)); }

    Span span(const OwnedSide<T>& side, int64_t first) const {
        Span all;
        const int64_t last = std::min(side.chunks, (first + edge_) / ALIGNED_ROWS);
        for (int64_t chunk = first / ALIGNED_ROWS; chunk < last; ++chunk) all.add(side.spans[size_t(chunk)]);
        return all;
    }

    // --- rows ----------------------------------------------------------------------------------------------------

    void take_logarithms(OwnedSide<T>& side) {
        T* const out = static_cast<T*>(side.given.neg_lse);
        each_row(side, [&](int64_t row) {
            side.neg_lse[row] = log(side.sums[row]) + (shifted_ ? double(side.peaks[row]) : 0);
            if (out) out[row] = T(side.neg_lse[row]);
            if (call_.pos) static_cast<T*>(call_.pos)[row] = T(call_.inv_tau * similarity_to_positive(side, row));
        });
    }

    // Return log(1 + exp(x)), and set `slope` to its derivative.
    static double softplus(double x, double& slope) {
        const double e = exp(-fabs(x));
        slope = (x > 0 ? 1 : e) / (1 + e);
        return (x > 0 ? x : 0) + log1p(e);
    }

    // loss_i = log(1 + exp(nu_i - pi_i)). The weight of nu_i is the loss's weight times sigmoid(nu_i - pi_i).
    void take_losses() {
        double loss = 0;
        for_sides([&](OwnedSide<T>& side) {
            const double weight = &side == &rows_ ? rows_loss_weight() : call_.cols_loss_weight;
            const T* const against = static_cast<const T*>(call_.against);
            T* const d_against = static_cast<T*>(call_.d_against);
            if (weight == 0) return;  // the side's weights are already 0
            loss += weight * sum_over_rows(side, [&](int64_t row) {
                const double pi = against ? double(against[row]) : call_.inv_tau * similarity_to_positive(side, row);
                const double loss = softplus(side.neg_lse[row] - pi, side.w[row]);
                side.w[row] *= weight;
                if (d_against) d_against[row] = T(-side.w[row]);
                return loss;
            });
        });
        *static_cast<T*>(call_.loss) = T(loss);
    }

    double rows_loss_weight() const {
        const int64_t counted = call_.mean_of_classes ? std::max(classes_.with_positive(), int64_t(1)) : 1;
        return call_.loss_weight / double(counted);
    }

    // loss_i = nu - pi, where pi is the mean of the positives' logits. The logit of a row and one of its positives has
    // the same weight in the losses of both rows, because all rows of a class have the same number of positives.
    void take_class_losses() {
        class_sums_ = Buffer<T>(classes_.size() * ld_);
        team_.each(classes_.size(), [&](int64_t c, int) {
            T* const sum = class_sums_ + c * ld_;
            std::fill(sum, sum + ld_, T(0));
            for (int64_t row : classes_.rows(c)) kernels_.add_scaled(sum, T(1), rows_.u + row * ld_, ld_);
        });
        const double weight = rows_loss_weight();
        *static_cast<T*>(call_.loss) = T(sum_over_rows(rows_, [&](int64_t row) {
            const double n_positives = count_positives(row);
            rows_.w[row] = n_positives > 0 ? weight : 0;
            rows_.d_pos[row] = n_positives > 0 ? -weight / n_positives : 0;
            if (n_positives == 0) return 0.0;
            return weight * rows_.neg_lse[row] + rows_.d_pos[row] * call_.inv_tau * similarity_to_class(row);
        }));
    }

    // FNTX_RATIO: loss_i = log(1 + exp(nu - lse)), where lse is the log-sum-exp of the row's positives. FNTX_IN adds
    // the log of the number of positives. FNTX_PAIRS: loss_i is the mean of log(1 + exp(nu - pi)) over the positives.
    // d_pos is the weight of lse, or for FNTX_PAIRS the weight of each positive's term.
    void take_losses_over_positives() {
        PositiveSide<T>& positives = *positives_;
        const double weight = rows_loss_weight();
        if (of_each_pair()) each_row(rows_, [&](int64_t row) { positives.nu[row] = T(rows_.neg_lse[row]); });
        each_tile(of_each_pair() ? kernels_.pairs : kernels_.forward, &positives);
        *static_cast<T*>(call_.loss) = T(sum_over_rows(rows_, [&](int64_t row) {
            const double n_positives = count_positives(row);
            rows_.w[row] = rows_.d_pos[row] = 0;
            if (n_positives == 0) return 0.0;
            if (of_each_pair()) {
                rows_.d_pos[row] = weight / n_positives;
                rows_.w[row] = rows_.d_pos[row] * positives.slopes[row];
                return rows_.d_pos[row] * positives.sums[row];
            }
            const double lse = log(positives.sums[row]) + double(positives.peaks[row]);
            const double loss = softplus(rows_.neg_lse[row] - lse, rows_.w[row]);
            rows_.w[row] *= weight;
            rows_.d_pos[row] = -rows_.w[row];
            positives.nu[row] = T(lse);
            return weight * (loss + (call_.form == FNTX_IN ? log(n_positives) : 0));
        }));
    }

    // Return the sum of the row's similarities to the other rows of its class.
    double similarity_to_class(int64_t row) const {
        const T* const u = rows_.u + row * ld_;
        return double(kernels_.dot(u, class_sums_ + classes_.of_row(row) * ld_, ld_)) - kernels_.dot(u, u, ld_);
    }

    struct Place {
        const OwnedSide<T>& side;
        int64_t row;
    };

    // Return the positive of a row: the same row of the other view or of the other side, or the other row of its class.
    Place positive(const OwnedSide<T>& side, int64_t row) const {
        if (!symmetric_) return {&side == &rows_ ? cols_ : rows_, row};
        if (call_.classes) return {rows_, classes_.other_of_pair(row)};
        const int64_t n = call_.rows.z[0].n;
        return {rows_, row < n ? row + n : row - n};
    }

    double similarity_to_positive(const OwnedSide<T>& side, int64_t row) const {
        const Place other = positive(side, row);
        return kernels_.dot(side.u + row * ld_, other.side.u + other.row * ld_, ld_);
    }

    // Weights may have any magnitude (2^16 from a loss scaler, 1e-6 from a mean), so they are divided by `weight_unit_`
    // before they enter the tiles. Without a shift, the unit is the largest weight. If w exp(-nu) of some row would
    // then come near the limits of T's range (for example, if one weight is 1e38 times another), the tiles are shifted.
    // In shifted tiles, w exp(k s - nu) is at most w. The unit then makes the largest weight equal to LARGEST_WEIGHT.
    void weigh() {
        double largest = 0;
        const T* const d_pos = static_cast<const T*>(call_.d_pos);
        for_sides([&](OwnedSide<T>& side) {
            const T* const neg_lse = static_cast<const T*>(side.given.neg_lse);
            const T* const w = static_cast<const T*>(side.given.d_neg_lse);
            largest = larger(largest, largest_over_rows(side, [&](int64_t row) {
                if (!(call_.phases & FNTX_FORWARD)) side.neg_lse[row] = double(neg_lse[row]);
                if (!call_.loss) side.w[row] = w ? double(w[row]) : 0;
                if (side.neg_lse[row] == -INF) side.w[row] = 0;  // no negatives, so no weight
                if (!in_classes()) side.d_pos[row] = takes_positives() ? -side.w[row] : d_pos ? double(d_pos[row]) : 0;
                return larger(fabs(side.w[row]), fabs(side.d_pos[row]));
            }));
        });
        if (largest == 0) largest = 1;
        for_sides([&](OwnedSide<T>& side) {
            if (shifted_) return;
            shifted_ = 0 < largest_over_rows(side, [&](int64_t row) {
                if (side.w[row] == 0) return 0.0;
                const double factor = fabs(side.w[row]) / largest * exp(-side.neg_lse[row]);
                return factor > SMALLEST_FACTOR<T> && factor < 1 / SMALLEST_FACTOR<T> ? 0.0 : 1.0;
            });
        });
        if (limited_) scale_limits();  // the tiles may be shifted by now
        drop_gathered_if_small();
        // The quotient of small doubles may underflow to 0.
        weight_unit_ = shifted_ ? larger(largest / LARGEST_WEIGHT<T>, std::numeric_limits<double>::min()) : largest;
        for_sides([&](OwnedSide<T>& side) {
            each_row(side, [&](int64_t row) {
                const double nu = side.neg_lse[row] == -INF ? INF : side.neg_lse[row];
                const double w = side.w[row] / weight_unit_;
                side.weights[row] = T(shifted_ ? w : w * exp(-nu));
                side.nu[row] = T(nu);
                if (positives_) positives_->weights[row] = T(side.d_pos[row] / weight_unit_);
            });
        });
    }

    // --- rows alone ----------------------------------------------------------------------------------------------

    // Return whether the rows may gather with exponentials in place of G, to be weighted at the end. The sums are not
    // known yet; drop_gathered_if_small checks them later.
    bool may_gather_at_once() const {
        const bool rows_alone =
            call_.loss && !symmetric_ && rows_.gathered && !cols_.gathered && call_.cols_loss_weight == 0;
        if (!rows_alone || !kernels_.forward_and_gather) return false;
        return !shifted_ && !limited_ && largest_log_ + std::max(log_length_, 0.0) < DIRECT_LIMIT<T>;
    }

    // Discard the rows' `gathered` if the tiles are shifted by now. Also discard it if the sum of some row is so small
    // that the row's exponentials, times the columns, come near the smallest normal number of T. The backward then
    // gathers again, with weights.
    void drop_gathered_if_small() {
        if (!at_once_) return;
        const double small = largest_over_rows(rows_, [&](int64_t row) {
            return rows_.w[row] == 0 || rows_.neg_lse[row] + log_length_ > -double(DIRECT_LIMIT<T>) ? 0.0 : 1.0;
        });
        at_once_ = small == 0 && !shifted_;
        if (at_once_) return;
        each_row(rows_, [&](int64_t row) { std::fill_n(rows_.gathered + row * ld_, ld_, T(0)); });
        if (&rows_ == &few_) team_.each(slabs_.count - 1, [&](int64_t copy, int) { slab_sums_.clear(copy + 1); });
    }

    void weigh_gathered() {
        each_row(rows_, [&](int64_t row) {
            T* const g = rows_.gathered + row * ld_;
            for (int64_t d = 0; d < ld_; ++d) g[d] *= rows_.weights[row];
        });
    }

    // Turn a side's `gathered` (in units of `weight_unit_` times k) into the gradient with respect to z. Return the
    // side's part of the gradient with respect to k, without the part that bfloat16 tiles add to `radial_`.
    double finish(OwnedSide<T>& side) {
        if (!side.gathered) return 0;
        const bool has_positives = takes_positives() || call_.d_pos;
        // In a symmetric call every similarity appears in two rows, so each row contributes half. With two sides, only
        // one side contributes.
        const double share = symmetric_ ? 0.5 : &side == (rows_.gathered ? &rows_ : &cols_) ? 1 : 0;
        const int64_t n_first = side.given.z[0].n;
        return sum_over_rows(side, [&](int64_t row) {
            const T* const u = side.u + row * ld_;
            T* const g = side.gathered + row * ld_;
            double d_inv_tau = in_bfloat() ? 0 : weight_unit_ * kernels_.dot(u, g, ld_);
            if (has_positives) {
                const Place other = positive(side, row);
                const double both = side.d_pos[row] + other.side.d_pos[other.row];
                kernels_.add_scaled(g, T(both / weight_unit_), other.side.u + other.row * ld_, ld_);
                d_inv_tau += both * similarity_to_positive(side, row);
            }
            if (of_classes()) {
                const double both = 2 * side.d_pos[row];
                kernels_.add_scaled(g, T(both / weight_unit_), class_sums_ + classes_.of_row(row) * ld_, ld_);
                kernels_.add_scaled(g, T(-both / weight_unit_), u, ld_);
                d_inv_tau += both * similarity_to_class(row);
            }
            d_inv_tau *= share;
            const int64_t to = side.order ? side.order[row] : row;
            T* const out = static_cast<T*>(side.given.d_z[to >= n_first]);
            if (!out) return d_inv_tau;
            if (normalize_ && side.norm[row] > eps_) kernels_.add_scaled(g, T(-kernels_.dot(u, g, ld_)), u, ld_);
            const double length = normalize_ ? std::max(side.norm[row], eps_) : T(1);
            const double scale = weight_unit_ * call_.inv_tau / length;
            T* const d_z = out + (to >= n_first ? to - n_first : to) * call_.D;
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
    OwnedSide<T> rows_;
    std::unique_ptr<OwnedSide<T>> cols_memory_;
    OwnedSide<T>& cols_;
    const Classes classes_;
    std::unique_ptr<PositiveSide<T>> positives_;
    const Schedule schedule_;
    const Slabs& slabs_;
    const int64_t edge_;
    OwnedSide<T>& few_;  // the shorter side: every slab but the first has a copy of its sums
    SlabSums<T> slab_sums_;
    const int64_t tile_words_;  // scratch elements for a tile's G in bfloat16
    const int64_t scratch_size_;
    Buffer<T> scratch_, workspace_, class_sums_;
    Buffer<double> radial_;  // one sum for each task (Tile::radial); in_bfloat() only
    int64_t kept_ = 0;       // number of tiles whose exponentials stay in the workspace
    bool shifted_ = false, limited_ = false;
    bool at_once_ = false;    // the rows gather their gradients in the forward
    double largest_log_ = 0;  // upper bound of k s + ln M
    double log_length_ = 0;   // log of the length of the longest column
    double weight_unit_ = 1;
};

}  // namespace

template <class T> bool run(const fntx_call& call, const Kernels<T>& kernels) {
    return Run<T>(call, kernels).execute();
}

template bool run<float>(const fntx_call&, const Kernels<float>&);
template bool run<double>(const fntx_call&, const Kernels<double>&);

}  // namespace fntx
