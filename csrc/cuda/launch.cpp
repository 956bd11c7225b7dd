// The C interface on a device: queries of the device, and the launch.
#include <cuda_runtime_api.h>
#include <stdio.h>

#include <map>
#include <mutex>
#include <tuple>

#include "kernels.h"
#include "plan.h"

using namespace fntx;

namespace {

thread_local char message[256];

int fail(const char* what, const char* why) {
    snprintf(message, sizeof message, "%s: %s", what, why);
    return FNTX_INVALID;
}

// Return whether a CUDA function failed. If it did, store its error message.
bool failed(cudaError_t status, const char* function) {
    if (status == cudaSuccess) return false;
    cudaGetLastError();  // clear the error for the next caller
    fail(function, cudaGetErrorString(status));
    return true;
}

const void* address_of(int dtype) {
    const auto of_type = dtype == FNTX_FLOAT16 ? half_kernel : dtype == FNTX_BFLOAT16 ? bfloat_kernel : split_kernel;
    return reinterpret_cast<const void*>(of_type());
}

// Makes a device current for the lifetime of this object.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        if ((ok = !failed(cudaGetDevice(&before_), "cudaGetDevice")) && before_ != device) {
            ok = !failed(cudaSetDevice(device), "cudaSetDevice");
            changed_ = ok;
        }
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    bool ok;

  private:
    int before_ = 0;
    bool changed_ = false;
};

std::mutex mutex;

// Return how many blocks of a kernel run at once on a multiprocessor of the current device; 0 on failure. Cached.
int blocks_at_once(int device, int dtype, size_t shared) {
    static std::map<std::tuple<int, int, size_t>, int> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto [at, isnew] = known.try_emplace({device, dtype, shared}, 0);
    if (!isnew) return at->second;
    const void* address = address_of(dtype);
    int most;  // the device's limit for a block; with it, every plan can be launched
    if (failed(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "cudaDeviceGetAttribute") ||
        failed(cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
               "cudaFuncSetAttribute") ||
        failed(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at->second, address, THREADS, shared),
               "cudaOccupancyMaxActiveBlocksPerMultiprocessor")) {
        known.erase(at);
        return 0;
    }
    return at->second;
}

bool describe(int device, Machine& machine) {
    static std::map<int, Machine> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(device);
    if (found != known.end()) {
        machine = found->second;
        return true;
    }
    int sms, shared, cooperative, major;
    if (failed(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute") ||
        failed(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
               "cudaDeviceGetAttribute") ||
        failed(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device), "cudaDeviceGetAttribute") ||
        failed(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute"))
        return false;
    if (!cooperative) return fail("the device", "it does not support cooperative launches"), false;
    for (int dtype : {FNTX_FLOAT16, FNTX_BFLOAT16, FNTX_FLOAT32}) {
        cudaFuncAttributes image;  // the code that the driver chose or compiled from PTX
        if (failed(cudaFuncGetAttributes(&image, address_of(dtype)), "cudaFuncGetAttributes")) return false;
        if (image.binaryVersion / 10 != major)
            return fail("the device", "the kernels were built for other compute capabilities"), false;
    }
    known[device] = machine = {sms, shared, blocks_at_once, device};
    return true;
}

}  // namespace

extern "C" {

const char* fntx_cuda_error(void) { return message; }

int fntx_cuda_devices(void) {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorNoDevice) {
        cudaGetLastError();
        return 0;
    }
    return failed(status, "cudaGetDeviceCount") ? -1 : count;
}

int64_t fntx_cuda_workspace(int device, int dtype, int64_t n_rows, int64_t n_cols, int64_t D, int blocks) {
    Machine machine;
    if (const char* fault = fault_of_size(n_rows, n_cols, D)) return fail("fntx_cuda_workspace", fault), -1;
    message[0] = 0;
    const OnDevice here(device);
    if (!here.ok || !describe(device, machine)) return -1;
    const Plan plan = make_plan(machine, dtype, n_rows, n_cols, D, blocks, nullptr);
    if (plan.grid > 0) return plan.bytes;
    if (!message[0]) fail("fntx_cuda_workspace", NO_ROOM);
    return -1;
}

int fntx_cuda_run(const fntx_cuda_call* call) {
    if (const char* fault = fault_of(*call)) return fail("fntx_cuda_run", fault);
    Machine machine;
    message[0] = 0;
    const OnDevice here(call->device);
    if (!here.ok || !describe(call->device, machine)) return FNTX_INVALID;
    Plan plan = plan_call(machine, *call);
    if (plan.grid < 1) return message[0] ? FNTX_INVALID : fail("fntx_cuda_run", NO_ROOM);
    void* arguments[] = {&plan.a};
    const auto stream = static_cast<cudaStream_t>(call->stream);
    cudaError_t status = cudaErrorCooperativeLaunchTooLarge;
    // Other processes may hold part of the device (MPS). A grid of any size can do the work, so retry with half as many
    // blocks.
    for (int grid = plan.grid; grid && status == cudaErrorCooperativeLaunchTooLarge; grid /= 2) {
        status = cudaLaunchCooperativeKernel(address_of(call->dtype), grid, THREADS, arguments, plan.shared, stream);
        if (status == cudaErrorCooperativeLaunchTooLarge) cudaGetLastError();  // or PyTorch would report the error
    }
    return failed(status, "cudaLaunchCooperativeKernel") ? FNTX_INVALID : FNTX_OK;
}
}
