#include "memory.h"

#include <stdlib.h>

#include <atomic>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fntx {
namespace {

constexpr size_t HELD_BYTES = size_t(32) << 20;           // a call of N = 1024, D = 128 allocates 12 MiB
constexpr int HELD_BLOCKS = 32;                           // a call allocates 8 to 20 blocks
constexpr size_t LINE = 64, HUGE_PAGE = size_t(1) << 21;  // HUGE_PAGE: on x86-64, and usually on arm64

struct HeldMemory {
    void* memory;
    size_t capacity;
};

HeldMemory held[HELD_BLOCKS];  // oldest first
int held_blocks = 0;
size_t held_bytes = 0;
HeldMemory spare = {nullptr, 0};  // one block larger than HELD_BYTES, whose pages the system may reclaim

// Guards the held blocks and the spare. A thread that finds the guard taken allocates from the system instead, or frees
// to it. So no thread ever waits, even in a child process that was forked while another thread of the parent held the
// guard.
std::atomic_flag busy = ATOMIC_FLAG_INIT;

struct Guard {
    const bool mine = !busy.test_and_set(std::memory_order_acquire);
    ~Guard() {
        if (mine) busy.clear(std::memory_order_release);
    }
};

// Return whether a block has at least `bytes` bytes, and at most about twice `bytes`.
bool serves(const HeldMemory& block, size_t bytes) {
    return block.memory && block.capacity >= bytes && block.capacity / 2 <= bytes;
}

void free_spare() {
    HeldMemory block = {nullptr, 0};
    {
        const Guard guard;
        if (guard.mine) std::swap(block, spare);
    }
    free(block.memory);
}

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
        int best = -1;  // index of the smallest block that serves
        for (int i = 0; guard.mine && i < held_blocks; ++i)
            if (serves(held[i], bytes) && (best < 0 || held[i].capacity < held[best].capacity)) best = i;
        HeldMemory block = {nullptr, 0};
        if (best >= 0)
            block = remove(best);
        else if (guard.mine && (bytes > HELD_BYTES || serves(spare, bytes)))
            std::swap(block, spare);
        if (serves(block, bytes)) {
            capacity = block.capacity;
            return block.memory;
        }
        free(block.memory);  // a large request frees a spare block of the wrong size, to make room
    }
    capacity = bytes;
    void* memory = nullptr;
    const bool large = bytes >= 2 * HUGE_PAGE;
    const size_t alignment = large ? HUGE_PAGE : LINE;
    if (posix_memalign(&memory, alignment, bytes)) {
        free_spare();
        if (posix_memalign(&memory, alignment, bytes)) throw std::bad_alloc();
    }
#if defined(__linux__)
    if (large) madvise(memory, bytes, MADV_HUGEPAGE);  // only a hint to the system
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

// With MADV_FREE, the system may drop the block's pages when it runs short of memory, except pages that have been
// written to again.
void lend_memory(void* memory, size_t capacity) {
    if (capacity <= HELD_BYTES) return release_memory(memory, capacity);
#if defined(__linux__) && defined(MADV_FREE)
    const size_t whole_pages = capacity / HUGE_PAGE * HUGE_PAGE;  // the rest may share a page with other memory
    HeldMemory block = {memory, capacity};
    if (madvise(memory, whole_pages, MADV_FREE) == 0) {
        const Guard guard;
        if (guard.mine) std::swap(block, spare);
    }
    free(block.memory);
#else
    free(memory);
#endif
}

}  // namespace fntx
