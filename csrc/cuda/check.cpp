// Tests the kernels on the emulated device (host/), with cases like those of csrc/cpu/check.cpp. Results are compared
// with the definition, which is computed in double precision in O(M^2 D) operations. Inputs, outputs and workspace are
// allocated at their exact sizes, so that AddressSanitizer finds out-of-bounds accesses. Outputs and workspace start as
// NaN, which exposes elements that were not written. sanitize.sh builds this file.
#include <chrono>
#include <memory>

#include "../cpu/check_run.h"
#include "host/launch.h"
#include "host/tensor_core.h"
#include "plan.h"

static bool expects_errors = false;  // whether rejected calls go unreported, because a test makes them on purpose

// The interface of the CPU kernels, implemented by the emulated device, so that check_run.h can test both.
extern "C" int fntx_run(const fntx_call* from) {
    fntx_cuda_call call = {};
    call.phases = from->phases, call.dtype = from->dtype, call.normalize = from->normalize, call.D = from->D;
    call.eps = float(from->eps), call.rows = from->rows, call.cols = from->cols;
    // On every second call the temperature is in device memory.
    static int calls = 0;
    const float inv_tau = float(from->inv_tau);
    call.inv_tau = calls % 2 ? inv_tau : NAN;
    call.inv_tau_ptr = calls++ % 2 ? nullptr : &inv_tau;
    call.pos = static_cast<float*>(from->pos), call.d_pos = static_cast<const float*>(from->d_pos);
    call.loss = static_cast<float*>(from->loss), call.loss_weight = float(from->loss_weight);
    call.d_inv_tau = static_cast<float*>(from->d_inv_tau);
    const auto rows_of = [](const fntx_side* side) { return side ? side->z[0].n + side->z[1].n : 0; };
    const int64_t bytes = fntx_cuda_workspace(0, call.dtype, rows_of(&call.rows), rows_of(call.cols), call.D, 0);
    if (bytes < 0) return FNTX_INVALID;
    const std::unique_ptr<void, decltype(&free)> workspace(malloc(bytes), &free);
    call.workspace = workspace.get();
    const int status = fntx_cuda_run(&call);
    if (status != FNTX_OK && !expects_errors) fprintf(stderr, "%s\n", fntx_cuda_error());
    return status;
}

extern "C" const char* fntx_instruction_set(void) { return "emulated"; }

namespace {

struct Emulated {
    int multiprocessors;
    int64_t shared;
    emulator::TensorCore core;
};
constexpr int64_t H100 = 232448, GEFORCE = 101376;
constexpr emulator::TensorCore AMPERE = {8, 1}, HOPPER = {16, 2};
const Emulated DEVICES[] = {
    {1, H100, HOPPER}, {5, H100, HOPPER}, {3, H100, AMPERE}, {2, GEFORCE, AMPERE}, {7, GEFORCE, AMPERE}};

void emulate(const Emulated& device) {
    fntx_emulate(device.multiprocessors, device.shared, draw(), device.core.block, device.core.extra_bits);
}

// Return a bound on the relative rounding error of an element of G, which has 8, 11 or 22 significant bits. The error
// of a sum of many elements is smaller.
double rounding_of(int dtype) { return dtype == FNTX_BFLOAT16 ? 4e-3 : dtype == FNTX_FLOAT16 ? 5e-4 : 5e-7; }

void verify(const Case& c, const Emulated& device) {
    const Problem<float> p(c);
    for (Mode mode : {FORWARD, BACKWARD, BOTH, LOSS}) {
        if (mode == LOSS && !p.two_views) continue;
        CheckedCall<float> run(p, mode, 1, 0), second(p, mode, 1, 0);
        emulate(device);
        const std::string bits = run.bits();
        expect(!bits.empty(), run.name() + ": status");
        run.compare(rounding_of(c.dtype));
        emulate(device);
        expect(second.bits() == bits, run.name() + ": different bits in another order");
    }
}

const Emulated& any_device() { return DEVICES[draw() % std::size(DEVICES)]; }

const int64_t SIZES[] = {1, 2, 15, 17, 31, 33, 63, 64, 65, 97, 129};
constexpr int SMALL_SIZES = 5;        // number of small sizes, which come first
constexpr int64_t COSTLY = 100000;    // multiplications in the definition; of the cases with more, one in eight is run
constexpr int SERVED = FNTX_FLOAT64;  // the dtypes before this one are supported

template <class Shape> void shapes(Shape shape) {
    for (int64_t n : SIZES)
        for (int64_t D : {1, 7, 64, 65, 130, 300}) {
            if (n * n * D > COSTLY && draw() % 8) continue;
            Case c = shape(n, D);
            draw_options(c, SERVED);
            verify(c, any_device());
        }
}

Case two_views(int64_t n, int64_t D) { return {{n, n}, {0, 0}, D}; }

Case one_matrix(int64_t n, int64_t D) { return {{n, 0}, {0, 0}, D}; }

Case rectangle(int64_t n, int64_t D) {
    const int64_t other = SIZES[draw() % std::size(SIZES)];
    return {{n, draw() % 2 ? n : 0}, {other, draw() % 2 ? SIZES[draw() % SMALL_SIZES] : 0}, D};
}

// Rows shorter than eps, subnormal float16 numbers, and lengths whose squares leave the range of float.
void magnitudes() {
    for (int dtype = 0; dtype < SERVED; ++dtype)
        for (int normalize : {0, 1}) {
            verify({{24, 24}, {0, 0}, 17, dtype, 0, 0, normalize, 0.07, 0.8}, any_device());
            verify({{7, 25}, {49, 0}, 48, dtype, 2, 2, normalize, 0.07, 6e-5, 1e-5}, any_device());
            for (double scale : {1e-24, 1e24})
                if (dtype != FNTX_FLOAT16 && normalize)
                    verify({{24, 24}, {0, 0}, 17, dtype, 1, 0, 1, 0.07, 1e-30, scale}, any_device());
        }
}

// A NaN in one row reaches the loss, and nu of every row that has that row among its negatives.
void not_a_number() {
    for (double tau : {0.5, 0.005})
        for (int normalize : {0, 1})
            for (const Emulated& device : DEVICES) {
                Problem<float> p({{50, 50}, {0, 0}, 17, FNTX_FLOAT32, 0, 0, normalize, tau});
                p.sides[0].z[0].set(3, 5, NAN);
                emulate(device);
                CheckedCall<float> run(p, LOSS, 1, 0);
                expect(!run.bits().empty() && isnan(run.scalars[0]), run.name() + ": NaN is lost in the loss");
                for (int i = 0; i < 100; ++i)
                    expect(i % 50 == 3 || isnan(run.nu[0][i]), run.name() + ": NaN did not reach nu");
            }
}

// Sizes below 1, and sizes beyond the kernels' indices, are rejected before anything is allocated. (0 columns are
// valid: the call is then symmetric.)
void sizes() {
    const int64_t most = fntx::MOST, largest = INT64_MAX;
    for (int64_t n : {int64_t(0), int64_t(-1), most + 1, largest}) {
        expect(fntx_cuda_workspace(0, FNTX_FLOAT16, n, 0, 8, 0) == -1, "rows: not rejected");
        expect(fntx_cuda_workspace(0, FNTX_FLOAT16, 8, 0, n, 0) == -1, "features: not rejected");
        expect(n == 0 || fntx_cuda_workspace(0, FNTX_FLOAT16, 8, n, 8, 0) == -1, "columns: not rejected");
    }
    expect(fntx_cuda_workspace(0, FNTX_FLOAT16, int64_t(1) << 30, 0, int64_t(1) << 20, 0) == -1, "tasks: not rejected");
    expect(fntx_cuda_workspace(0, FNTX_FLOAT16, most, most, 8, 0) > 2 * most, "most rows: rejected");
}

// A call with contradictory or missing arguments is rejected, and its valid twin is not.
void invalid_calls() {
    typedef fntx_call& Call;
    const Problem<float> two({{3, 3}, {0, 0}, 5}), one({{3, 0}, {0, 0}, 5}), rectangle({{3, 3}, {4, 0}, 5});
    fntx_side* cols;
    emulate(DEVICES[0]);
    expects_errors = true;
    const auto status = [&](int expected, const Problem<float>& p, Mode mode, const char* what, auto change) {
        CheckedCall<float> run(p, mode, 1, 0);
        cols = &run.cols;
        change(run.call);
        expect(fntx_run(&run.call) == expected, std::string(what) + ": wrong status");
    };
    for (Mode mode : {FORWARD, BACKWARD, BOTH, LOSS}) status(FNTX_OK, two, mode, "a valid call", [](Call) {});
    status(FNTX_OK, rectangle, BOTH, "a valid rectangle", [](Call) {});
    const auto refused = [&](const Problem<float>& p, Mode mode, const char* what, auto change) {
        status(FNTX_INVALID, p, mode, what, change);
    };
    float number = 0;
    for (int dtype : {-1, int(FNTX_FLOAT64), 4}) refused(two, LOSS, "dtype", [=](Call c) { c.dtype = dtype; });
    for (int phases : {-1, 0, 4}) refused(two, LOSS, "phases", [=](Call c) { c.phases = phases; });
    refused(two, LOSS, "no data", [](Call c) { c.rows.z[1].data = nullptr; });
    refused(two, LOSS, "n < 0", [](Call c) { c.rows.z[1].n = -1; });
    refused(two, LOSS, "no rows in the first matrix", [](Call c) { c.rows.z[0].n = 0; });
    refused(rectangle, BOTH, "no columns", [&](Call) { cols->z[0].n = 0; });
    refused(two, LOSS, "no d_inv_tau", [](Call c) { c.d_inv_tau = nullptr; });
    refused(two, LOSS, "a loss without a forward", [](Call c) { c.phases = FNTX_BACKWARD; });
    refused(two, LOSS, "a loss with weights", [&](Call c) { c.rows.d_neg_lse = &number; });
    refused(two, BACKWARD, "no neg_lse", [](Call c) { c.rows.neg_lse = nullptr; });
    refused(two, BACKWARD, "no weights", [](Call c) { c.rows.d_neg_lse = nullptr; });
    refused(rectangle, BACKWARD, "no weights of the columns", [&](Call) { cols->d_neg_lse = nullptr; });
    for (const Problem<float>* p : {&one, &rectangle}) {
        refused(*p, FORWARD, "positives without two views", [&](Call c) { c.pos = &number; });
        refused(*p, FORWARD, "a loss without two views", [&](Call c) { c.loss = &number; });
        refused(*p, BACKWARD, "weights of positives without two views", [&](Call c) { c.d_pos = &number; });
    }
    expects_errors = false;
}

// Every plan fits its machine, covers all rows and all features, and has no more shares of the columns than tiles.
void plans() {
    const int64_t many[] = {1, 2, 63, 64, 65, 127, 128, 129, 512, 1000, 4096, 65536, 100001, 4000000};
    const auto check = [](const fntx::Machine& machine, int dtype, int64_t n, int64_t other, int64_t D, int blocks) {
        const fntx::Plan plan = fntx::make_plan(machine, dtype, n, other, D, blocks, nullptr);
        const fntx::Arguments& a = plan.a;
        const int tile = dtype == FNTX_FLOAT32 ? fntx::COLS<fntx::Split> : fntx::COLS<fntx::Half>;
        expect(plan.grid > 0 && plan.grid <= (blocks > 0 ? blocks : 2 * machine.multiprocessors), "plan: grid");
        expect(int64_t(plan.shared) <= machine.shared && plan.bytes > 0, "plan: memory");
        expect(a.group >= 1 && a.group <= fntx::GROUP && a.stages == a.group + 2, "plan: stages");
        expect(a.chunks * fntx::CHUNK >= D && (a.chunks - 1) * fntx::CHUNK < D, "plan: chunks");
        for (int s = 0; s < a.n_sides; ++s) {
            const int64_t tiles = fntx::ceil_div(a.sides[s].n, tile);
            expect(a.col_shares >= 1 && a.col_shares <= tiles, "plan: more shares than tiles");
            expect(a.sides[s].padded >= a.sides[s].n, "plan: rows");
        }
    };
    for (int sms : {1, 20, 108, 132, 148})
        for (int64_t shared : {H100, GEFORCE, int64_t(166912)})
            for (int dtype = 0; dtype < SERVED; ++dtype)
                for (int64_t n : many)
                    for (int64_t other : {int64_t(0), int64_t(1), int64_t(70), 2 * n})
                        for (int64_t D : {1, 64, 65, 128, 200, 512, 1024, 5000})
                            for (int blocks : {-1, 0, 1, 3})
                                check({sms, shared, [](int, int, size_t) { return 2; }, 0}, dtype, n, other, D, blocks);
}

}  // namespace

int main() {
    const struct {
        const char* name;
        void (*run)();
    } groups[] = {
        {"plans", plans},
        {"sizes", sizes},
        {"invalid calls", invalid_calls},
        {"two views", [] { shapes(two_views); }},
        {"one matrix", [] { shapes(one_matrix); }},
        {"rectangles", [] { shapes(rectangle); }},
        {"magnitudes", magnitudes},
        {"not a number", not_a_number},
    };
    for (const auto& group : groups) {
        const auto start = std::chrono::steady_clock::now();
        const long before = checks;
        group.run();
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        printf("%-24s %6ld checks %6.2f s\n", group.name, checks - before, seconds.count());
        fflush(stdout);
    }
    printf("%ld checks passed\n", checks);
}
