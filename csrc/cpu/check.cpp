// Tests the C interface (fastntxent.h) with many shapes, dtypes, strides and numbers of threads, and compares the
// results with the definition, computed pair by pair. sanitize.sh builds this file with and without sanitizers. Inputs
// and outputs are allocated at their exact sizes, so that a sanitizer finds out-of-bounds accesses, and outputs start
// as NaN, which exposes elements that were not written. The first failure names its case and ends the run.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "check_run.h"
#include "kernels.h"
#include "memory.h"

#ifdef FNTX_EXACT_MEMORY
// Replaces memory.cpp: nothing is rounded up or held, so that the sanitizers guard the kernels' own memory as well.
namespace fntx {
void* acquire_memory(size_t bytes, size_t& capacity) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes)) throw std::bad_alloc();
    return memset(memory, 0xff, capacity = bytes);
}
void release_memory(void* memory, size_t) { free(memory); }
void lend_memory(void* memory, size_t) { free(memory); }
}  // namespace fntx
#endif

namespace {

#ifdef __aarch64__
const char* const BASELINE = "neon";
#else
const char* const BASELINE = "portable";
#endif
constexpr int64_t SMALLEST_EDGE = fntx::ALIGNED_ROWS;  // edge of the smallest tile

#ifdef FNTX_EMULATE
const char* const SETS[] = {"avx512_bf16", "amx"};  // other builds check the other sets
#else
const char* const SETS[] = {BASELINE, "avx2", "avx512", "avx512_bf16", "amx"};
#endif

// Expect the sets that this build must have. Without any usable set, a group would pass without a single check.
void expect_sets() {
#ifdef FNTX_EMULATE
    for (const char* set : SETS) expect(fntx_use_instruction_set(set) == FNTX_OK, "an emulated set cannot be used");
#else
    expect(fntx_use_instruction_set(BASELINE) == FNTX_OK, "the baseline instruction set is missing");
#endif
}

void on_each_set(const std::function<void()>& body) {
    for (const char* set : SETS)
        if (fntx_use_instruction_set(set) == FNTX_OK) body();
}

// Return the unit roundoff of bfloat16 if G is rounded to bfloat16 (for gradients of bfloat16 rows, on the sets that do
// not widen such rows), otherwise 0.
double rounding(int dtype) {
    const std::string set = fntx_instruction_set();
    return dtype == FNTX_BFLOAT16 && (set == "amx" || set == "avx512_bf16") ? ldexp(1, -8) : 0;
}

template <class T> void verify_as(const Case& c, const std::vector<int>& threads, const std::vector<int>& tiles) {
    const Problem<T> p(c);
    if (p.ambiguous) return;
    on_each_set([&] {
        for (int team : threads)
            for (Mode mode : {FORWARD, BACKWARD, BOTH, LOSS})
                for (int kept : tiles) {
                    if (mode == LOSS && !p.paired) continue;
                    if (p.c.classes && mode != LOSS && mode != FORWARD) continue;  // classes need a loss
                    if (mode < BOTH && kept != tiles[0]) continue;                 // only BOTH and LOSS use a workspace
                    const int64_t workspace = kept * int64_t(SMALLEST_EDGE * SMALLEST_EDGE * sizeof(T));
                    CheckedCall<T> run(p, mode, team, workspace), second(p, mode, team, workspace);
                    const std::string bits = run.bits();
                    expect(!bits.empty(), run.name() + ": status");
                    run.compare(rounding(p.c.dtype));
                    expect(second.bits() == bits, run.name() + ": different bits the second time");
                }
    });
}

// --quick is for emulated machines. It leaves out float64 cases whose definition takes more than QUICK multiplications,
// because long double may be emulated in software there. It runs one in four of the other cases whose definition takes
// more than COSTLY multiplications. It also leaves out the group "blocks" and, in the group "not finite", most losses
// with classes.
bool quick = false;
constexpr int64_t QUICK = 30000, COSTLY = 400000;

bool taken(const Case& c) {
    static int large = 0;
    const int64_t rows = c.rows[0] + c.rows[1], cols = c.cols[0] + c.cols[1];
    const int64_t multiplications = rows * (cols ? cols : rows) * c.D;
    if (!quick) return true;
    return c.dtype == FNTX_FLOAT64 ? multiplications <= QUICK : multiplications <= COSTLY || large++ % 4 == 0;
}

// Check a case on every instruction set, in every mode, and, for each number in `tiles`, with a workspace for that
// number of the smallest tiles. The emulated instructions are for bfloat16 rows only and are slow. With them, the dtype
// is always bfloat16, and only the last number of threads is checked.
void verify(Case c, std::vector<int> threads, const std::vector<int>& tiles) {
#ifdef FNTX_EMULATE
    c.dtype = FNTX_BFLOAT16, threads = {threads.back()};
#endif
    if (!taken(c)) return;
    c.dtype == FNTX_FLOAT64 ? verify_as<double>(c, threads, tiles) : verify_as<float>(c, threads, tiles);
}

// --- groups ----------------------------------------------------------------------------------------------------------

const int64_t SIZES[] = {1, 2, 3, 7, 23, 24, 25, 47, 48, 49, 95, 97, 150};
constexpr int SMALL_SIZES = 7;   // number of small sizes, which come first
constexpr int ALL_TILES = 1000;  // more than any case has

// Check every size with every D, but only about one in six of the combinations with n n D > COSTLY. The other options
// are random.
template <class Shape> void shapes(Shape shape) {
    for (int64_t n : SIZES)
        for (int64_t D : {1, 2, 3, 15, 16, 17, 48, 127, 128, 129, 300}) {
            if (n * n * D > COSTLY && draw() % 6) continue;
            Case c = shape(n, D);
            draw_options(c, std::size(DTYPES));
            verify(c, {1 + int(draw() % 3)}, {draw() % 2 ? 1 : ALL_TILES});
        }
}

Case two_views(int64_t n, int64_t D) { return {{n, n}, {0, 0}, D}; }

Case one_matrix(int64_t n, int64_t D) { return {{n, 0}, {0, 0}, D}; }

Case rectangle(int64_t n, int64_t D) {
    const int64_t other = SIZES[draw() % std::size(SIZES)];
    return {{n, draw() % 2 ? n : 0}, {other, draw() % 2 ? SIZES[draw() % SMALL_SIZES] : 0}, D};
}

// Give a case with columns a loss: in both directions, or, if the weight is 0, for the rows alone. Except for SigLIP,
// the case must have as many rows as columns.
Case in_pairs(Case c, double cols_loss_weight = 0.3) {
    c.cols_loss_weight = cols_loss_weight;
    return c;
}

Case pairs(int64_t n, int64_t D) {
    const int64_t first = draw() % 2 ? n : n / 2;
    return in_pairs({{n, 0}, {first, n - first}, D}, draw() % 2 ? 0.3 : 0);
}

// NT-Logistic or SigLIP. The sums are checked, and also the loss if the case has one.
Case softplus(Case c, int function = FNTX_SOFTPLUS) {
    c.function = function;
    c.bias = 12 * noise();
    return c;
}

// A loss that compares nu with given numbers. With numbers of up to 100, some rows have their full weight and others
// almost none.
Case against(int64_t n, int64_t D) {
    Case c = rectangle(n, D);
    c.against = draw() % 2 ? 3 : 100;
    return c;
}

// SupCon's loss in one of its forms. With ids by index, the two views of a sample form a class; with unique ids, no row
// has a positive.
Case classes(Case c, int form = FNTX_OUT) {
    c.classes = true, c.form = form;
    c.mean = draw() % 2;
    return c;
}

Case classes_of_some(int64_t n, int64_t D) {
    return classes(draw() % 2 ? two_views(n, D) : one_matrix(n, D), draw() % std::size(FORMS));
}

// Rows that leave out similarities above a limit.
Case limited(Case c) {
    const bool has_positives = c.cols_loss_weight >= 0 || (c.rows[0] == c.rows[1] && c.cols[0] + c.cols[1] == 0);
    c.limits = has_positives && draw() % 2 ? LIMITS_OF_POSITIVES : LIMITS_OF_ROWS;
    c.limit_scale = draw() % 2 ? 1 : 0.7, c.limit_shift = 0.2 * noise();
    return c;
}

Case limited_of_some(int64_t n, int64_t D) {
    Case (*const shapes[])(int64_t, int64_t) = {two_views, one_matrix, rectangle, pairs};
    return limited(shapes[draw() % std::size(shapes)](n, D));
}

Case softplus_of_some(int64_t n, int64_t D) {
    Case (*const shapes[])(int64_t, int64_t) = {two_views, one_matrix, rectangle, pairs};
    return softplus(shapes[draw() % std::size(shapes)](n, D));
}

Case sigmoid(int64_t n, int64_t D) {
    Case c = draw() % 2 ? rectangle(n, D) : pairs(n, D);
    if (c.cols_loss_weight < 0) c.cols_loss_weight = draw() % 2 ? 0.3 : 0;
    return softplus(c, FNTX_SIGMOID);
}

// Shapes large enough for several threads (4e6 multiplications), with odd and even numbers of blocks.
void threads_and_workspaces() {
    int dtype = FNTX_FLOAT64;
    for (double tau : {0.07, 0.001})
        for (Case c :
             {Case{{150, 150}, {0, 0}, 45}, Case{{143, 143}, {0, 0}, 49}, Case{{193, 0}, {97, 40}, 160},
              Case{{49, 48}, {150, 95}, 170}, in_pairs({{193, 0}, {97, 96}, 160}), classes({{150, 150}, {0, 0}, 45}),
              classes({{150, 150}, {0, 0}, 45}, FNTX_RATIO), classes({{150, 150}, {0, 0}, 45}, FNTX_PAIRS),
              limited({{150, 150}, {0, 0}, 45}), limited(in_pairs({{193, 0}, {97, 96}, 160})),
              softplus({{150, 150}, {0, 0}, 45}), softplus(in_pairs({{193, 0}, {97, 96}, 160})),
              softplus(in_pairs({{193, 0}, {97, 40}, 160}), FNTX_SIGMOID)}) {
            c.dtype = dtype++ % int(std::size(DTYPES)), c.tau = tau, c.ids = draw() % 3;  // without "all the same"
            verify(c, {1, 2, 3}, {0, 1, ALL_TILES});
        }
}

// Few rows or few columns. Every slab of the longer side but the first has its own copy of the shorter side's sums.
// Some slabs extend beyond the longer side, and some have no negatives for a row.
void slabs() {
    int dtype = 0, loss = 0;
    for (double tau : {0.07, 0.001})
        for (Case c : {Case{{3, 0}, {230, 20}, 5600}, Case{{250, 0}, {3, 0}, 5600}, Case{{49, 0}, {290, 0}, 290},
                       Case{{200, 93}, {40, 9}, 290}, Case{{40, 0}, {400, 31}, 250}})
            for (int variant = 0; variant < 2; ++variant) {
                c.dtype = dtype++ % int(std::size(DTYPES)), c.tau = tau, c.ids = draw() % 3;
                c.wanted = draw() % 3 ? ALL_WANTED : 1 + int(draw() % 15);
                Case compared = c, signs = softplus(c, FNTX_SIGMOID);
                compared.against = 3, signs.cols_loss_weight = 0.3;
                const Case cases[] = {c, limited(c), softplus(c), compared, signs};
                verify(cases[loss++ % std::size(cases)], {2, 5}, {0, ALL_TILES});
            }
}

// Tiles of 96 and of 192 rows.
void larger_tiles() {
    for (double tau : {0.07, 0.001}) {
        verify({{200, 200}, {0, 0}, 27, FNTX_FLOAT64, 1, 0, 1, tau}, {1, 2}, {0, 4, ALL_TILES});
        verify({{395, 395}, {0, 0}, 7, FNTX_FLOAT32, 1, 2, 1, tau}, {1, 2}, {16});
        verify({{300, 91}, {0, 389}, 27, FNTX_BFLOAT16, 2, 1, 1, tau}, {1, 2}, {4});
        verify(in_pairs({{395, 0}, {395, 0}, 27, FNTX_FLOAT32, 1, 0, 1, tau}), {1, 2}, {16});
        verify(softplus({{200, 200}, {0, 0}, 27, FNTX_FLOAT64, 1, 0, 1, tau}), {1, 2}, {0});
        for (int form = FNTX_IN; form <= FNTX_PAIRS; ++form)
            verify(classes({{200, 200}, {0, 0}, 27, form == FNTX_IN ? FNTX_FLOAT64 : FNTX_FLOAT32, 1, 2, 1, tau}, form),
                   {1, 2}, {4});
        const Case columns = in_pairs({{395, 0}, {395, 0}, 27, FNTX_FLOAT32, 1, 0, 1, tau});
        for (int function : {FNTX_SOFTPLUS, FNTX_SIGMOID}) verify(softplus(columns, function), {1, 2}, {0});
    }
}

// Rows shorter than eps, subnormal float16 numbers, and lengths whose squares leave the range of float.
void magnitudes() {
    for (int dtype = 0; dtype <= FNTX_FLOAT64; ++dtype)
        for (int normalize : {0, 1}) {
            verify({{24, 24}, {0, 0}, 17, dtype, 0, 0, normalize, 0.07, 0.8}, {1}, {ALL_TILES});
            verify({{7, 25}, {49, 0}, 48, dtype, 2, 2, normalize, 0.07, 6e-5, 1e-5}, {1}, {0});
            verify(in_pairs({{24, 0}, {24, 0}, 17, dtype, 0, 0, normalize, 0.07, 0.8}), {1}, {ALL_TILES});
            for (double scale : {1e-24, 1e24})
                if (dtype != FNTX_FLOAT16 && normalize)
                    verify({{24, 24}, {0, 0}, 17, dtype, 1, 0, 1, 0.07, 1e-30, scale}, {1}, {0});
        }
}

// Return a plain NaN, two marked NaNs, both infinities, and the given numbers. As a float and as a double, a marked NaN
// has non-zero low bits, which the exponential shifts into the exponent.
std::vector<double> unusual(std::initializer_list<double> numbers) {
    const uint64_t bits = 0x7ff8000000000000 | uint64_t(0xa5) << 29 | 0x5a5;
    double marked;
    memcpy(&marked, &bits, sizeof marked);
    std::vector<double> all = {NAN, marked, -marked, INFINITY, -INFINITY};
    all.insert(all.end(), numbers);
    return all;
}

// Change one number of row 3 and check the loss and nu. A NaN must reach the loss, and nu of every row that has row 3
// among its negatives. If rows are normalised, an infinity becomes a NaN and must do the same, and a huge finite number
// must leave the loss finite. If rows are not normalised, an infinity only has to make the loss non-finite, and a
// finite number may have any effect. nu of rows with index 3 modulo 50 (the changed row and its positive) is not
// checked. With classes, nu is not checked at all, because the call does not return it. With float16 rows, only the
// status is checked.
template <class T> void unusual_rows(const Case& c) {
    const double huge = sizeof(T) == 4 ? 3e38 : 1e150;
    Problem<T> p(c);
    for (double x : unusual({huge, -huge})) {
        p.sides[0].z[0].set(3, 5, x);
        on_each_set([&] {
            for (int64_t workspace : {0, 1 << 20})
                for (Mode mode : {FORWARD, BACKWARD, BOTH, LOSS}) {
                    if (c.classes && mode != FORWARD && mode != LOSS) continue;
                    CheckedCall<T> run(p, mode, 1, workspace);
                    expect(!run.bits().empty(), run.name() + ": status");
                    if (mode != LOSS || (isfinite(x) && !c.normalize) || c.dtype == FNTX_FLOAT16) continue;
                    const bool lost = isfinite(x) != isfinite(run.scalars[0]);
                    expect(!lost, run.name() + ": loss for input " + std::to_string(x));
                    for (size_t i = 0; i < run.nu[p.last].size() && (isnan(x) || (isinf(x) && c.normalize)); ++i)
                        expect(i % 50 == 3 || isnan(run.nu[p.last][i]), run.name() + ": NaN did not reach nu");
                }
        });
    }
}

// A backward accepts any upstream gradient and any neg_lse. An upstream gradient that is not finite, or a NaN in
// neg_lse, reaches d_inv_tau.
template <class T> void unusual_upstream(const Case& c) {
    const Problem<T> p(c);
    for (double x : unusual({1e30, -1e30}))
        on_each_set([&] {
            CheckedCall<T> weights(p, BACKWARD, 1, 0), neg_lse(p, BACKWARD, 1, 0);
            weights.w[0][3] = T(x), neg_lse.nu[0][3] = T(x);
            expect(!weights.bits().empty() && !neg_lse.bits().empty(), weights.name() + ": status");
            expect(isfinite(x) || !isfinite(weights.scalars[1]),
                   weights.name() + ": a non-finite weight did not reach d_inv_tau");
            expect(!isnan(x) || isnan(neg_lse.scalars[1]),
                   neg_lse.name() + ": a NaN of neg_lse did not reach d_inv_tau");
        });
}

void not_finite() {
    for (int dtype = 0; dtype <= FNTX_FLOAT64; ++dtype)
        for (int normalize : {0, 1})
            for (double tau : {0.07, 0.001}) {
                const Case c = {{50, 50}, {0, 0}, 17, dtype, 0, 0, normalize, tau};
                dtype == FNTX_FLOAT64 ? unusual_upstream<double>(c) : unusual_upstream<float>(c);
                const Case columns = in_pairs({{50, 0}, {50, 0}, 17, dtype, 0, 0, normalize, tau}, 0);
                for (const Case& each : {c, columns, softplus(c), softplus(columns), softplus(columns, FNTX_SIGMOID)})
                    dtype == FNTX_FLOAT64 ? unusual_rows<double>(each) : unusual_rows<float>(each);
                const Case labels = {{50, 50}, {0, 0}, 17, dtype, 0, 2, normalize, tau};
                for (int form = FNTX_OUT; form <= FNTX_PAIRS; ++form) {
                    if (quick && form != FNTX_PAIRS) continue;
                    const Case each = classes(labels, form);
                    dtype == FNTX_FLOAT64 ? unusual_rows<double>(each) : unusual_rows<float>(each);
                }
            }
}

// The error is within 1.4 units in the last place. Without fused multiply-adds (portable, or -O1), 1.30 was measured.
template <class T> void exp2_within(int dtype, double reach) {
    for (int64_t n = 0; n < 1000; n = n < 70 ? n + 1 : 3 * n) {
        std::vector<T> x, y(n);
        for (int64_t i = 0; i < n; ++i) x.push_back(T(reach * noise()));
        expect(fntx_exp2(dtype, x.data(), y.data(), n) == FNTX_OK, "exp2: status");
        for (int64_t i = 0; i < n; ++i) {
            typedef typename RealOf<T>::Type Real;
            const Real exact = exp2(Real(x[i])), unit = ldexp(Real(std::numeric_limits<T>::epsilon()), ilogb(exact));
            if (fabs(y[i] - exact) <= Real(1.4) * unit) continue;
            expect(false, "exp2(" + std::to_string(x[i]) + ") on " + fntx_instruction_set());
        }
    }
}

// Outside its range, exp2 may return anything, but NaN stays NaN.
template <class T> void exp2_of_any(int dtype) {
    const double huge = std::numeric_limits<T>::max();
    for (double x : unusual({1e3, 1e4, -1e4, 1e9, huge, -huge})) {
        const std::vector<T> in(37, T(x));
        std::vector<T> out(37);
        expect(fntx_exp2(dtype, in.data(), out.data(), 37) == FNTX_OK, "exp2: status");
        for (T y : out) expect(!isnan(x) || isnan(y), "exp2: NaN is lost");
    }
}

void exponentials() {
    on_each_set([] {
        for (double reach : {0.6, 10.0, 125.9}) exp2_within<float>(FNTX_FLOAT32, reach);
        for (double reach : {0.6, 10.0, 1021.9}) exp2_within<double>(FNTX_FLOAT64, reach);
        exp2_of_any<float>(FNTX_FLOAT32), exp2_of_any<double>(FNTX_FLOAT64);
        expect(fntx_exp2(FNTX_FLOAT16, nullptr, nullptr, 0) == FNTX_INVALID, "exp2 of float16: not rejected");
    });
}

// A large block that was lent to the system goes to the next request of its size, and to no other buffer.
void memory_lent() {
#if defined(__linux__) && !defined(FNTX_EXACT_MEMORY)
    constexpr int64_t size = int64_t(40) << 20;
    const auto fill = [](char* block) { memset(block, 1, size); };
    fntx::Buffer<char> first(size), second(size);
    char* const lent = first;
    fill(first), fill(second);
    first.lend();
    expect(!first, "lend: the buffer keeps its block");
    fntx::Buffer<char> again(size), other(size);
    expect(again == lent && other != lent && other != second, "lend: the block is not reused exactly once");
    fill(again), fill(other);
    expect(second[0] == 1 && second[size - 1] == 1, "lend: the block belonged to another buffer");
    again.lend(), other.lend();  // frees the first block
    fill(fntx::Buffer<char>(size));
    fntx::Buffer<char> larger(3 * size), small(100);
    small.lend();
#endif
}

void instruction_sets() {
    on_each_set([] { printf("  %s\n", fntx_instruction_set()); });
    fntx_use_instruction_set(BASELINE);
    expect(fntx_use_instruction_set("another") == FNTX_INVALID, "an unknown instruction set: not rejected");
    expect(!strcmp(fntx_instruction_set(), BASELINE), "a rejected instruction set took effect");
}

void invalid_calls() {
    typedef fntx_call& Call;
    const Problem<float> two({{3, 3}, {0, 0}, 5}), one({{1, 0}, {0, 0}, 5}), rectangle({{3, 3}, {4, 0}, 5});
    fntx_side* cols;
    const auto status = [&](int expected, const Problem<float>& p, Mode mode, const char* what, auto change) {
        CheckedCall<float> run(p, mode, 1, 0);
        cols = &run.cols;
        change(run.call);
        const int got = fntx_run(&run.call);
        expect(got == expected, std::string(what) + ": status " + std::to_string(got));
    };
    const auto refused = [&](const char* what, auto change) { status(FNTX_INVALID, two, LOSS, what, change); };
    status(FNTX_OK, two, LOSS, "a valid call", [](Call) {});
    status(FNTX_OK, rectangle, BOTH, "a valid rectangle", [](Call) {});
    expect(fntx_run(nullptr) == FNTX_INVALID, "no call: not rejected");
    refused("no data", [](Call c) { c.rows.z[1].data = nullptr; });
    refused("n = 0", [](Call c) { c.rows.z[0].n = c.rows.z[1].n = 0; });
    refused("n < 0", [](Call c) { c.rows.z[0].n = -1; });
    refused("D = 0", [](Call c) { c.D = 0; });
    for (double k : {0.0, -1.0, double(NAN)}) refused("inv_tau", [=](Call c) { c.inv_tau = k; });
    for (double eps : {-1.0, double(NAN)}) refused("eps", [=](Call c) { c.eps = eps; });
    for (int dtype : {-1, 4}) refused("dtype", [=](Call c) { c.dtype = dtype; });
    for (int phases : {-1, 0, 2, 4, 5, 7}) refused("phases", [=](Call c) { c.phases = phases; });
    refused("loss_weight", [](Call c) { c.loss_weight = 0; });
    for (double w : {-1.0, double(NAN)}) refused("cols_loss_weight", [=](Call c) { c.cols_loss_weight = w; });
    refused("workspace", [](Call c) { c.workspace = -1; });
    refused("no d_inv_tau", [](Call c) { c.d_inv_tau = nullptr; });
    const auto too_large = [&](int64_t n, int64_t D) {
        status(FNTX_TOO_LARGE, two, LOSS, "too large", [=](Call c) { c.rows.z[0].n = c.rows.z[1].n = n, c.D = D; });
        status(FNTX_TOO_LARGE, rectangle, BOTH, "too many columns", [&](Call c) { cols->z[1].n = n, c.D = D; });
    };
    too_large(INT64_MAX, 5), too_large(int64_t(1) << 31, 5), too_large(3, INT64_MAX / 16);
    status(FNTX_TOO_LARGE, two, LOSS, "two views", [](Call c) { c.rows.z[0].n = c.rows.z[1].n = int64_t(1) << 30; });
    refused("n < 0 beside too many", [](Call c) { c.rows.z[0].n = INT64_MIN, c.rows.z[1].n = INT64_MAX; });
    for (int64_t id : {int64_t(-1), int64_t(1) << 31}) {
        const std::vector<int64_t> ids(6, id);
        refused("ids", [&](Call c) { c.rows.ids = ids.data(); });
    }
    status(FNTX_INVALID, two, BACKWARD, "no neg_lse", [](Call c) { c.rows.neg_lse = nullptr; });
    status(FNTX_INVALID, rectangle, BACKWARD, "no neg_lse of cols", [&](Call) { cols->neg_lse = nullptr; });
    status(FNTX_INVALID, rectangle, BOTH, "no columns", [&](Call) { cols->z[0].n = 0; });
    status(FNTX_INVALID, rectangle, BOTH, "pos with columns", [](Call c) { c.pos = c.d_inv_tau; });
    const auto with_loss = [](Call c) { c.loss = c.d_inv_tau, c.loss_weight = 1; };
    status(FNTX_INVALID, rectangle, BOTH, "a loss with unequal numbers of rows and columns", with_loss);
    refused("function", [](Call c) { c.function = 3; });
    refused("limits of softplus", [](Call c) { c.function = FNTX_SOFTPLUS, c.limited = 1, c.pos = nullptr; });
    status(FNTX_INVALID, rectangle, BOTH, "limits without positives", [](Call c) { c.limited = 1; });
    refused("against without columns", [](Call c) { c.against = c.d_inv_tau; });
    const std::vector<int64_t> of_rows(6);
    refused("classes and neg_lse", [&](Call c) { c.classes = of_rows.data(), c.pos = nullptr; });
    refused("a form without classes", [](Call c) { c.form = FNTX_IN; });
    refused("form", [&](Call c) { c.classes = of_rows.data(), c.form = 4, c.rows.neg_lse = nullptr, c.pos = nullptr; });
    refused("classes and ids",
            [&](Call c) { c.classes = c.rows.ids = of_rows.data(), c.rows.neg_lse = nullptr, c.pos = nullptr; });
    refused("sigmoid without columns",
            [](Call c) { c.function = FNTX_SIGMOID, c.d_bias = c.d_inv_tau, c.pos = nullptr; });
    const Problem<float> sums(softplus({{3, 3}, {0, 0}, 5})), beside(softplus(in_pairs({{3, 0}, {3, 0}, 5})));
    status(FNTX_OK, sums, LOSS, "valid softplus", [](Call) {});
    status(FNTX_OK, beside, LOSS, "valid softplus of pairs", [](Call) {});
    status(FNTX_INVALID, sums, LOSS, "no d_bias", [](Call c) { c.d_bias = nullptr; });
    status(FNTX_INVALID, sums, BOTH, "pos of softplus", [](Call c) { c.pos = c.d_inv_tau; });
    // No machine has so much memory, so the call has to fail before it reads anything.
    for (int64_t D : {int64_t(1) << 50, int64_t(1) << 58, INT64_MAX / 16, INT64_MAX}) {
        CheckedCall<float> run(one, FORWARD, 1, 0);
        run.call.D = D;
        const int got = fntx_run(&run.call);
        expect(got == FNTX_NO_MEMORY || got == FNTX_TOO_LARGE, "D " + std::to_string(D) + ": not rejected");
    }
}

// With blocks of several tiles, several threads give the same results as one thread, up to rounding, and the same bits
// every time. At this size, the definition would take too long.
void blocks() {
    if (quick) return;
    const int64_t n = 3150, D = 16, labels = 90;
    std::vector<float> z(2 * n * D);
    for (float& x : z) x = float(noise());
    std::vector<int64_t> classes;
    for (int64_t i = 0; i < 2 * n; ++i) classes.push_back(int64_t(draw() % labels));
    for (double tau : {0.2, 0.001})
        for (int form = -1; form <= FNTX_PAIRS; ++form) {  // -1: NT-Xent
            std::vector<float> gradients[4];
            float losses[4], d_inv_tau[4];
            const int threads[] = {1, 2, 3, 2};
            for (int run = 0; run < 4; ++run) {
                gradients[run].assign(z.size(), NAN);
                fntx_call call = {};
                call.phases = BOTH, call.dtype = FNTX_FLOAT32, call.normalize = 1, call.threads = threads[run];
                call.D = D, call.inv_tau = 1 / tau, call.eps = 1e-12, call.workspace = 20 << 20;
                call.loss = &losses[run], call.loss_weight = 1.0 / double(2 * n), call.d_inv_tau = &d_inv_tau[run];
                if (form >= 0) call.classes = classes.data(), call.form = form;
                for (int view : {0, 1}) {
                    call.rows.z[view] = {z.data() + view * n * D, n, D, 1};
                    call.rows.d_z[view] = gradients[run].data() + view * n * D;
                }
                expect(fntx_run(&call) == FNTX_OK, "blocks: status");
            }
            double largest = 0, error = 0;
            for (size_t i = 0; i < z.size(); ++i) {
                largest = std::max(largest, fabs(double(gradients[0][i])));
                for (int run : {1, 2}) error = std::max(error, fabs(double(gradients[run][i]) - gradients[0][i]));
            }
            const double tolerance = 1e-6 * (1 + 1 / tau);
            const std::string name = "blocks, tau " + std::to_string(tau) + ", form " + std::to_string(form);
            expect(largest > 0 && error <= tolerance * largest, name + ": gradient of several threads");
            expect(fabs(losses[1] / losses[0] - 1) <= tolerance, name + ": loss of two threads");
            expect(gradients[1] == gradients[3] && losses[1] == losses[3], name + ": different bits the second time");
        }
}

std::thread::id polled_by;

int stop() {
    polled_by = std::this_thread::get_id();
    return 1;
}

// Calls that would take seconds, stopped by the first poll.
void interruption() {
    const std::vector<float> row(128, 0.1f);
    std::vector<int64_t> classes;
    for (int64_t i = 0; i < 2 * 8192; ++i) classes.push_back(i % 7);
    for (int threads : {1, 2, 3})
        for (bool in_classes : {false, true}) {
            float loss, d_inv_tau;
            fntx_call call = {};
            call.phases = BOTH, call.dtype = FNTX_FLOAT32, call.threads = threads, call.D = 128, call.inv_tau = 2;
            call.loss = &loss, call.loss_weight = 1, call.d_inv_tau = &d_inv_tau, call.poll = stop;
            if (in_classes) call.classes = classes.data(), call.form = FNTX_PAIRS;
            for (fntx_matrix& z : call.rows.z) z = {row.data(), 8192, 0, 1};
            polled_by = {};
            fntx_use_instruction_set(BASELINE);
            expect(fntx_run(&call) == FNTX_INTERRUPTED, "poll: the call was not interrupted");
            expect(polled_by == std::this_thread::get_id(), "poll: called from another thread");
        }
}

// Concurrent callers get the same bits as a single caller.
void concurrency() {
    std::vector<Problem<float>> problems;
    for (int64_t n : {150, 97, 24})
        for (double tau : {0.07, 0.001}) {
            problems.emplace_back(Case{{n, n}, {0, 0}, 60, FNTX_FLOAT32, 0, 0, 1, tau});
            problems.emplace_back(Case{{n, 0}, {n, 25}, 129, FNTX_BFLOAT16, 2, 2, 1, tau});
        }
    on_each_set([&] {
        std::vector<std::string> alone;
        for (const Problem<float>& p : problems) alone.push_back(CheckedCall<float>(p, BOTH, 2, 1 << 16).bits());
        std::vector<std::thread> callers;
        std::vector<size_t> same(4);
        for (size_t caller = 0; caller < same.size(); ++caller)
            callers.emplace_back([&, caller] {
                for (size_t i = 0; i < 2 * problems.size(); ++i) {
                    const size_t which = (i + 3 * caller) % problems.size();
                    same[caller] += CheckedCall<float>(problems[which], BOTH, 2, 1 << 16).bits() == alone[which];
                }
            });
        for (std::thread& caller : callers) caller.join();
        for (size_t count : same) expect(count == 2 * problems.size(), "concurrent calls: different bits");
    });
}

}  // namespace

// check [--quick] [GROUP ...]: run these groups, or all of them.
int main(int count, char** names) {
    const struct {
        const char* name;
        void (*run)();
    } groups[] = {
        {"instruction sets", instruction_sets},
        {"memory lent", memory_lent},
        {"exponentials", exponentials},
        {"invalid calls", invalid_calls},
        {"two views", [] { shapes(two_views); }},
        {"one matrix", [] { shapes(one_matrix); }},
        {"rectangles", [] { shapes(rectangle); }},
        {"pairs", [] { shapes(pairs); }},
        {"against", [] { shapes(against); }},
        {"limits", [] { shapes(limited_of_some); }},
        {"softplus", [] { shapes(softplus_of_some); }},
        {"slabs", slabs},
        {"classes", [] { shapes(classes_of_some); }},
        {"sigmoid", [] { shapes(sigmoid); }},
        {"threads and workspaces", threads_and_workspaces},
        {"larger tiles", larger_tiles},
        {"magnitudes", magnitudes},
        {"not finite", not_finite},
        {"blocks", blocks},
        {"interruption", interruption},
        {"concurrency", concurrency},
    };
    std::vector<std::string> chosen;
    for (int i = 1; i < count; ++i) {
        const std::string name = names[i];
        const auto has_it = [&](const auto& group) { return group.name == name; };
        if (name == "--quick")
            quick = true;
        else if (std::any_of(std::begin(groups), std::end(groups), has_it))
            chosen.push_back(name);
        else
            return fprintf(stderr, "check: there is no group '%s'\n", names[i]), 2;
    }
    expect_sets();
    for (const auto& group : groups) {
        if (!chosen.empty() && !std::count(chosen.begin(), chosen.end(), group.name)) continue;
        const auto start = std::chrono::steady_clock::now();
        const long before = checks;
        draw.seed(1 + unsigned(&group - groups));  // so that a group has the same cases when it runs alone
        group.run();
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        printf("%-24s %6ld checks %6.2f s\n", group.name, checks - before, seconds.count());
        fflush(stdout);
    }
    printf("%ld checks passed\n", checks);
}
