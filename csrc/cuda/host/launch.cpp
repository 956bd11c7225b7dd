// The C interface on the emulator: pointers are of host memory, and a call is over when it returns.
#include <stdio.h>

#include "../kernel.h"
#include "../plan.h"
#include "launch.h"

using namespace fntx;

namespace {

char message[256];
Machine machine = {2, 232448, [](int, int, size_t) { return 1; }, 0, true};

int fail(const char* why) {
    snprintf(message, sizeof message, "fntx_cuda_run: %s", why);
    return FNTX_INVALID;
}

template <class Op> void run_form(const Plan& plan) {
    const int form = plan.kernel / 3;
    form == TALL ? run<Op, Tall>(plan.a) : form == FLAT ? run<Op, Flat>(plan.a) : run<Op, Hopper>(plan.a);
}

}  // namespace

void fntx_emulate(int multiprocessors, int64_t shared, bool warpgroups, unsigned seed) {
    machine.warpgroups = warpgroups;
    machine.multiprocessors = multiprocessors;
    machine.shared = shared;
    emulator::seed(seed);
}

extern "C" {

const char* fntx_cuda_error(void) { return message; }

int fntx_cuda_devices(void) { return 1; }

int64_t fntx_cuda_workspace(int, int dtype, int64_t n_rows, int64_t n_cols, int64_t D) {
    if (const char* fault = fault_of_size(n_rows, n_cols, D)) return fail(fault), -1;
    const Plan plan = make_plan(machine, dtype, n_rows, n_cols, D, nullptr);
    if (plan.grid > 0) return plan.bytes;
    fail("the device has too little shared memory for a block");
    return -1;
}

int fntx_cuda_run(const fntx_cuda_call* call) {
    if (const char* fault = fault_of(*call)) return fail(fault);
    const Plan plan = plan_call(machine, *call);
    memset(call->workspace, 0xff, plan.bytes);
    const bool met = emulator::launch(plan.grid, THREADS, plan.shared, [&] {
        switch (call->dtype) {
        case FNTX_FLOAT16: return run_form<Half>(plan);
        case FNTX_BFLOAT16: return run_form<Bfloat>(plan);
        default: return run_form<Split>(plan);
        }
    });
    return met ? FNTX_OK : fail(emulator::failure());
}

}
