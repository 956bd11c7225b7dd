// The C interface on the emulator: pointers are host pointers, and a call has finished when it returns.
#include "launch.h"

#include <stdio.h>

#include "../kernel.h"
#include "../plan.h"

using namespace fntx;

namespace {

char message[256];
Machine machine = {2, 232448, [](int, int, size_t) { return 1; }, 0};
bool refuses;

int fail(const char* function, const char* why) {
    snprintf(message, sizeof message, "%s: %s", function, why);
    return FNTX_INVALID;
}

}  // namespace

void fntx_emulate(int multiprocessors, int64_t shared, unsigned seed, int block, int extra_bits) {
    machine.multiprocessors = multiprocessors;
    machine.shared = shared;
    emulator::seed(seed);
    refuses = seed % 2 == 0;
    emulator::add_as({block, extra_bits});
}

void fntx_emulated_product(bool bfloat, int block, int extra_bits, const float* a, const float* b, float* c) {
    typedef const float (&A)[16][16];
    typedef const float (&B)[16][8];
    typedef float (&C)[16][8];
    emulator::multiply_add({block, extra_bits}, emulator::least_exponent(bfloat), reinterpret_cast<C>(*c),
                           reinterpret_cast<A>(*a), reinterpret_cast<B>(*b));
}

extern "C" {

const char* fntx_cuda_error(void) { return message; }

int fntx_cuda_devices(void) { return 1; }

int64_t fntx_cuda_workspace(int, int dtype, int64_t n_rows, int64_t n_cols, int64_t D, int blocks) {
    if (const char* fault = fault_of_size(n_rows, n_cols, D)) return fail("fntx_cuda_workspace", fault), -1;
    const Plan plan = make_plan(machine, dtype, n_rows, n_cols, D, blocks, nullptr);
    if (plan.grid > 0) return plan.bytes;
    fail("fntx_cuda_workspace", NO_ROOM);
    return -1;
}

int fntx_cuda_run(const fntx_cuda_call* call) {
    if (const char* fault = fault_of(*call)) return fail("fntx_cuda_run", fault);
    const Plan plan = plan_call(machine, *call);
    if (plan.grid < 1) return fail("fntx_cuda_run", NO_ROOM);
    memset(call->workspace, 0xff, plan.bytes);
    // Half the grid emulates the retry after cudaErrorCooperativeLaunchTooLarge.
    const int grid = refuses && plan.grid > 1 ? plan.grid / 2 : plan.grid;
    const bool met = emulator::launch(grid, THREADS, plan.shared, [&] {
        switch (call->dtype) {
            case FNTX_FLOAT16:
                return run<Half>(plan.a);
            case FNTX_BFLOAT16:
                return run<Bfloat>(plan.a);
            default:
                return run<Split>(plan.a);
        }
    });
    return met ? FNTX_OK : fail("fntx_cuda_run", emulator::failure());
}
}
