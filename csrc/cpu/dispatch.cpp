// The C interface: validates calls and chooses the instruction set.
#include <string.h>

#include <atomic>
#include <new>

#include "fastntxent.h"
#include "loss.h"
#ifdef FNTX_BFLOAT
#include "processor.h"
#endif

namespace fntx {

#define FNTX_DECLARE(set)                    \
    namespace set {                          \
    const Kernels<float>* float_kernels();   \
    const Kernels<double>* double_kernels(); \
    }
#ifdef FNTX_X86
FNTX_DECLARE(avx2)
FNTX_DECLARE(avx512)
#endif
#ifdef FNTX_BFLOAT
#define FNTX_DECLARE_BFLOAT(set)            \
    namespace set {                         \
    const Kernels<float>* bfloat_kernels(); \
    bool multiplies_right();                \
    }
FNTX_DECLARE_BFLOAT(avx512_bf16)
FNTX_DECLARE_BFLOAT(amx)
#endif
#ifdef __aarch64__
FNTX_DECLARE(neon)
#else
FNTX_DECLARE(portable)
#endif

namespace {

struct InstructionSet {
    const char* name;
    bool (*usable)();
    const Kernels<float>* (*float_kernels)();
    const Kernels<double>* (*double_kernels)();
    const Kernels<float>* (*bfloat_kernels)();  // for calls with bfloat16 rows
};

#ifdef FNTX_X86
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

#if defined(FNTX_X86) && defined(FNTX_BFLOAT)
// Each of these two sets is tested once, and is not used if its products on this machine differ from the products of
// plain C++.
bool amx_works() {
    static const bool works = has_avx512() && has_amx() && amx::multiplies_right();
    return works;
}

bool avx512_bf16_works() {
    static const bool works = has_avx512() && has_avx512_bf16() && avx512_bf16::multiplies_right();
    return works;
}
#endif

// From the fastest to the slowest. The last set needs only the compiler's baseline, which on aarch64 includes NEON.
const InstructionSet SETS[] = {
#ifdef FNTX_X86
#ifdef FNTX_BFLOAT
    {"amx", amx_works, avx512::float_kernels, avx512::double_kernels, amx::bfloat_kernels},
    {"avx512_bf16", avx512_bf16_works, avx512::float_kernels, avx512::double_kernels, avx512_bf16::bfloat_kernels},
#endif
    {"avx512", has_avx512, avx512::float_kernels, avx512::double_kernels, avx512::float_kernels},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2::float_kernels,
     avx2::double_kernels, avx2::float_kernels},
#endif
#ifdef __aarch64__
    {"neon", [] { return true; }, neon::float_kernels, neon::double_kernels, neon::float_kernels},
#else
    {"portable", [] { return true; }, portable::float_kernels, portable::double_kernels, portable::float_kernels},
#endif
};

const InstructionSet* fastest() {
    for (const InstructionSet& set : SETS)
        if (set.usable()) return &set;
    return nullptr;
}

std::atomic<const InstructionSet*> chosen{nullptr};

const InstructionSet& instruction_set() {
    if (!chosen.load()) chosen.store(fastest());
    return *chosen.load();
}

int64_t count_rows(const fntx_side& side) { return side.z[0].n + side.z[1].n; }

// The largest number of elements in a side, including the rows of padding, which are fewer than MARGIN. Even if the
// elements are doubles, the size of the side in bytes fits in 64 bits.
constexpr int64_t MOST_NUMBERS = INT64_MAX / 16, MARGIN = 1024;

bool too_large(const fntx_side& side, int64_t D) {
    for (const fntx_matrix& z : side.z)
        if (z.n < 0 || z.n > FNTX_MOST_ROWS) return z.n > 0;  // checked first, because count_rows might overflow
    const int64_t n = count_rows(side);
    return n > FNTX_MOST_ROWS || D > MOST_NUMBERS / (n + MARGIN);
}

// Return whether a side is valid. Call this only if too_large returned false for the side.
bool valid(const fntx_side& side, int64_t D) {
    for (const fntx_matrix& z : side.z)
        if (z.n < 0 || (z.n > 0 && !z.data)) return false;
    const int64_t n = count_rows(side);
    if (side.ids)
        for (int64_t row = 0; row < n; ++row)
            if (side.ids[row] < 0 || side.ids[row] > INT32_MAX) return false;
    return n > 0 && D > 0;
}

bool valid(const fntx_call& call) {
    const bool forward = call.phases & FNTX_FORWARD, backward = call.phases & FNTX_BACKWARD;
    const bool two_views = call.rows.z[0].n == call.rows.z[1].n && !call.cols;
    const bool paired = call.cols ? count_rows(call.rows) == count_rows(*call.cols) : two_views;
    if (call.phases < FNTX_FORWARD || call.phases > (FNTX_FORWARD | FNTX_BACKWARD)) return false;
    if (call.dtype < FNTX_FLOAT16 || call.dtype > FNTX_FLOAT64) return false;
    if (!valid(call.rows, call.D) || (call.cols && !valid(*call.cols, call.D))) return false;
    if (!(call.inv_tau > 0) || !(call.eps >= 0) || call.workspace < 0) return false;
    if ((call.pos || call.d_pos) && !two_views) return false;
    const bool has_loss = paired || call.function == FNTX_SIGMOID || call.against || call.classes;
    if (call.against && (!call.loss || !call.cols || call.cols_loss_weight != 0 || call.limited)) return false;
    if (call.against && call.function != FNTX_LOG_SUM_EXP) return false;
    if (call.classes && (!call.loss || call.cols || call.against || call.limited || call.pos || call.d_pos))
        return false;
    if (call.classes && (call.rows.ids || call.rows.limits || call.rows.neg_lse)) return false;
    if (call.classes && call.function != FNTX_LOG_SUM_EXP) return false;
    if (call.form < FNTX_OUT || call.form > FNTX_PAIRS || (call.form != FNTX_OUT && !call.classes)) return false;
    if (call.loss && !(has_loss && forward && call.loss_weight > 0 && call.cols_loss_weight >= 0)) return false;
    if (backward && !call.d_inv_tau) return false;
    const bool has_limits = call.rows.limits || (call.cols && call.cols->limits);
    if (call.limited && !paired) return false;
    if ((call.limited || has_limits) && call.function != FNTX_LOG_SUM_EXP) return false;
    if (call.function == FNTX_SIGMOID && !call.cols) return false;
    if (call.function == FNTX_SOFTPLUS || call.function == FNTX_SIGMOID)
        return !call.pos && !call.d_pos && (!backward || call.d_bias);
    if (call.function != FNTX_LOG_SUM_EXP) return false;
    return !backward || forward || (call.rows.neg_lse && (!call.cols || call.cols->neg_lse));
}

}  // namespace
}  // namespace fntx

int fntx_run(const fntx_call* call) {
    using namespace fntx;
    if (!call) return FNTX_INVALID;
    if (too_large(call->rows, call->D) || (call->cols && too_large(*call->cols, call->D))) return FNTX_TOO_LARGE;
    if (!valid(*call)) return FNTX_INVALID;
    const InstructionSet& set = instruction_set();
    try {
        const auto float_kernels = call->dtype == FNTX_BFLOAT16 ? set.bfloat_kernels : set.float_kernels;
        const bool done = call->dtype == FNTX_FLOAT64 ? run<double>(*call, *set.double_kernels())
                                                      : run<float>(*call, *float_kernels());
        return done ? FNTX_OK : FNTX_INTERRUPTED;
    } catch (const std::bad_alloc&) {
        return FNTX_NO_MEMORY;
    }
}

const char* fntx_instruction_set(void) { return fntx::instruction_set().name; }

int fntx_use_instruction_set(const char* name) {
    for (const fntx::InstructionSet& set : fntx::SETS)
        if (!strcmp(set.name, name) && set.usable()) {
            fntx::chosen.store(&set);
            return FNTX_OK;
        }
    return FNTX_INVALID;
}

int fntx_exp2(int dtype, const void* x, void* y, int64_t n) {
    const fntx::InstructionSet& set = fntx::instruction_set();
    if (dtype == FNTX_FLOAT32)
        set.float_kernels()->exp2(static_cast<const float*>(x), 1, static_cast<float*>(y), n);
    else if (dtype == FNTX_FLOAT64)
        set.double_kernels()->exp2(static_cast<const double*>(x), 1, static_cast<double*>(y), n);
    else
        return FNTX_INVALID;
    return FNTX_OK;
}
