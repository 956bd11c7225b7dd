#include "team.h"

#include <vector>

#if defined(_OPENMP) && !defined(FNTX_STD_THREADS)
#include <omp.h>
#include <pthread.h>
#define FNTX_OPENMP 1
#else
#define FNTX_OPENMP 0
#endif

namespace fntx {

#if FNTX_OPENMP
namespace {
std::atomic<bool> forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
}  // namespace
#endif

void Team::start(void (*leader)(void*), void* context) {
#if FNTX_OPENMP
    (void)registered;
    if (!forked.load()) {
#pragma omp parallel num_threads(threads_)
        if (omp_get_thread_num() == 0)
            leader(context);
        else
            help(omp_get_thread_num());
        return;
    }
#endif
    std::vector<std::thread> helpers;
    helpers.reserve(size_t(threads_ - 1));  // if this runs out of memory, it throws before any thread has started
    try {
        for (int thread = 1; thread < threads_; ++thread) helpers.emplace_back([this, thread] { help(thread); });
    } catch (const std::exception&) {
        // No more threads are available. The threads that have started share the work.
    }
    leader(context);
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace fntx
