#include "memory.h"

#include <stdlib.h>

#include <atomic>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fntx {
namespace {

constexpr size_t HELD_BYTES = size_t(32) << 20;  // a call of N = 1024, D = 128 takes 12 MiB
constexpr int HELD_BLOCKS = 32;                // a call takes 8, or 14 with columns of its own
constexpr size_t LINE = 64, HUGE_PAGE = size_t(1) << 21;  // of x86-64 and most of arm64

struct HeldMemory {
    void* memory;
    size_t capacity;
};

HeldMemory held[HELD_BLOCKS];  // from the oldest on
int held_blocks = 0;
size_t held_bytes = 0;

// Guards what is held. Whoever does not get it at once goes to the system: nobody waits, neither for another thread nor
// in a child that was forked while a thread of its parent was in here.
std::atomic_flag busy = ATOMIC_FLAG_INIT;

struct Guard {
    const bool mine = !busy.test_and_set(std::memory_order_acquire);
    ~Guard() {
        if (mine) busy.clear(std::memory_order_release);
    }
};

HeldMemory remove(int index) {
    const HeldMemory block = held[index];
    for (int i = index + 1; i < held_blocks; ++i) held[i - 1] = held[i];
    --held_blocks;
    held_bytes -= block.capacity;
    return block;
}

}  // namespace

void* acquire_memory(size_t bytes, size_t& capacity) {
    bytes = (bytes + LINE) / LINE * LINE;
    {
        const Guard guard;
        int best = -1;  // the smallest that is large enough and not more than twice too large
        for (int i = 0; guard.mine && i < held_blocks; ++i)
            if (held[i].capacity >= bytes && held[i].capacity / 2 <= bytes &&
                (best < 0 || held[i].capacity < held[best].capacity))
                best = i;
        if (best >= 0) {
            const HeldMemory block = remove(best);
            capacity = block.capacity;
            return block.memory;
        }
    }
    capacity = bytes;
    void* memory = nullptr;
    const bool large = bytes >= 2 * HUGE_PAGE;
    if (posix_memalign(&memory, large ? HUGE_PAGE : LINE, bytes)) throw std::bad_alloc();
#if defined(__linux__)
    if (large) madvise(memory, bytes, MADV_HUGEPAGE);  // a wish, which the system may refuse
#endif
    return memory;
}

void release_memory(void* memory, size_t capacity) {
    const Guard guard;
    if (!guard.mine || capacity > HELD_BYTES) return free(memory);
    while (held_blocks == HELD_BLOCKS || held_bytes + capacity > HELD_BYTES) free(remove(0).memory);
    held[held_blocks++] = {memory, capacity};
    held_bytes += capacity;
}

}  // namespace fntx
