#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../device.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#define ENTERED(state) __sanitizer_finish_switch_fiber(state, nullptr, nullptr)
#define LEAVING(state, bottom, size) __sanitizer_start_switch_fiber(state, bottom, size)
#else
#define ENTERED(state) (void)(state)
#define LEAVING(state, bottom, size) (void)(state), (void)(bottom), (void)(size)
#endif

namespace emulator {
namespace {

using fntx::Bfloat;
using fntx::from_bits;
using fntx::Half;

constexpr size_t STACK = 256 << 10;

struct Copy {
    void* to;
    const void* from;
    int group;
};

struct Warp;

struct Lane {
    jmp_buf here;
    void* stack = nullptr;
    void* fake_stack = nullptr;
    Warp* warp = nullptr;
    int thread = 0;
    bool started = false, runnable = true, finished = false;
    std::vector<Copy> copies;
    int groups = 0;
};

struct Block;

struct Warp {
    Block* block;
    Lane lanes[32];
    void* brought[32];  // arguments of the lanes that have met
    Act act = nullptr;
    int met = 0, runnable = 32;
};

struct Block {
    int index;
    std::unique_ptr<char, decltype(&free)> shared{nullptr, &free};
    std::vector<Warp> warps;
    int met = 0;
};

std::vector<Block> grid;
const std::function<void()>* the_body;
int threads_of_block, met_in_grid, unfinished;
Lane* current;
jmp_buf scheduler;
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_size;
std::string reason;
std::mt19937 order(1);
TensorCore tensor_core;

void* stack_of(size_t index) {
    static std::vector<void*> stacks;  // kept for later launches
    while (stacks.size() <= index) {
        void* memory = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) abort();
        stacks.push_back(memory);
    }
    return stacks[index];
}

void leave() {
    LEAVING(current->finished ? nullptr : &current->fake_stack, scheduler_stack, scheduler_stack_size);
    if (!_setjmp(current->here)) _longjmp(scheduler, 1);
    ENTERED(current->fake_stack);
}

void release(Lane& lane) {
    if (lane.runnable || lane.finished) return;
    lane.runnable = true;
    ++lane.warp->runnable;
}

void block_here() {
    current->runnable = false;
    --current->warp->runnable;
    leave();
}

void fail(const char* why) {
    if (reason.empty()) reason = why;
    block_here();  // does not return: the scheduler gives up
}

void perform(Lane& lane, int last_group) {
    size_t kept = 0;
    for (const Copy& copy : lane.copies) {
        if (copy.group <= last_group)
            memcpy(copy.to, copy.from, 16);
        else
            lane.copies[kept++] = copy;
    }
    lane.copies.resize(kept);
}

void lane_main() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
    (*the_body)();
    if (!current->copies.empty() && reason.empty()) reason = "a thread ended with copies in flight";
    current->finished = true;
    current->runnable = false;
    --current->warp->runnable;
    --unfinished;
    leave();
}

void resume(Lane& lane) {
    current = &lane;
    if (_setjmp(scheduler)) {
        ENTERED(scheduler_fake_stack);
        return;
    }
    LEAVING(&scheduler_fake_stack, lane.stack, STACK);
    if (lane.started) _longjmp(lane.here, 1);
    lane.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = lane.stack;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, lane_main, 0);
    setcontext(&context);
}

float half(uint32_t word, int which) { return from_bits(Half(), uint16_t(word >> 16 * which)); }
float bfloat(uint32_t word, int which) { return from_bits(Bfloat(), uint16_t(word >> 16 * which)); }

// mma.m16n8k16: lane 4 g + t holds elements of rows g and g + 8 of a, elements of column g of b, and columns 2 t and
// 2 t + 1 of rows g and g + 8 of c.
template <float (*UNPACK)(uint32_t, int), bool BFLOAT> void multiply(void** of_lanes) {
    Product** all = reinterpret_cast<Product**>(of_lanes);
    float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) c[g + i / 2 * 8][2 * t + i % 2] = all[lane]->c[i];
        for (int i = 0; i < 4; ++i)
            for (int e = 0; e < 2; ++e) a[g + i % 2 * 8][2 * t + e + i / 2 * 8] = UNPACK(all[lane]->a[i], e);
        for (int i = 0; i < 2; ++i)
            for (int e = 0; e < 2; ++e) b[2 * t + e + 8 * i][g] = UNPACK(all[lane]->b[i], e);
    }
    multiply_add(tensor_core, least_exponent(BFLOAT), c, a, b);
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) all[lane]->c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

// ldmatrix.x4: register m of lane 4 g + t holds elements 2 t and 2 t + 1 of row g (transposed: column g) of matrix m.
// Lanes 8 m to 8 m + 7 point to the rows of matrix m.
void load(void** of_lanes, bool transposed) {
    Matrices** all = reinterpret_cast<Matrices**>(of_lanes);
    for (int m = 0; m < 4; ++m)
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            uint32_t word = 0;
            for (int e = 0; e < 2; ++e) {
                const int row = transposed ? 2 * t + e : g, col = transposed ? g : 2 * t + e;
                word |= uint32_t(all[8 * m + row]->row[col]) << 16 * e;
            }
            all[lane]->fragment[m] = word;
        }
}

}  // namespace

void multiply_half(void** of_lanes) { multiply<half, false>(of_lanes); }
void multiply_bfloat(void** of_lanes) { multiply<bfloat, true>(of_lanes); }
void load_matrices(void** of_lanes) { load(of_lanes, false); }
void load_matrices_transposed(void** of_lanes) { load(of_lanes, true); }

int thread() { return current->thread; }
int block() { return current->warp->block->index; }
int blocks() { return int(grid.size()); }
char* shared_memory() { return current->warp->block->shared.get(); }
const char* failure() { return reason.c_str(); }
void seed(unsigned value) { order.seed(value); }
void add_as(const TensorCore& core) { tensor_core = core; }

void meet(void* mine, Act act) {
    Warp& warp = *current->warp;
    if (warp.met && warp.act != act) return fail("lanes of a warp are at different collectives");
    warp.act = act;
    warp.brought[current->thread % 32] = mine;
    if (++warp.met < 32) return block_here();
    warp.met = 0;
    act(warp.brought);
    for (Lane& lane : warp.lanes) release(lane);
}

void sync_block() {
    Block& block = *current->warp->block;
    if (++block.met < threads_of_block) return block_here();
    block.met = 0;
    for (Warp& warp : block.warps)
        for (Lane& lane : warp.lanes) release(lane);
}

void sync_grid() {
    if (++met_in_grid < threads_of_block * blocks()) return block_here();
    met_in_grid = 0;
    for (Block& block : grid)
        for (Warp& warp : block.warps)
            for (Lane& lane : warp.lanes) release(lane);
}

void copy_async(void* to, const void* from) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
        return fail("an asynchronous copy is not aligned");
    if (order() % 2)
        memcpy(to, from, 16);
    else
        current->copies.push_back({to, from, current->groups});
}
void commit_copies() { ++current->groups; }
void wait_copies(int pending) { perform(*current, current->groups - 1 - pending); }

bool launch(int n_blocks, int n_threads, size_t shared_bytes, const std::function<void()>& body) {
    reason.clear();
    the_body = &body;
    threads_of_block = n_threads;
    met_in_grid = 0;
    unfinished = n_blocks * n_threads;
    grid = std::vector<Block>(n_blocks);
    size_t stacks = 0;
    for (int b = 0; b < n_blocks; ++b) {
        Block& block = grid[b];
        block.index = b;
        void* memory = nullptr;
        if (posix_memalign(&memory, 128, shared_bytes)) abort();
        block.shared.reset(static_cast<char*>(memset(memory, 0xff, shared_bytes)));
        block.warps = std::vector<Warp>(n_threads / 32);
        for (int t = 0; t < n_threads; ++t) {
            Warp& warp = block.warps[t / 32];
            warp.block = &block;
            Lane& lane = warp.lanes[t % 32];
            lane.warp = &warp;
            lane.thread = t;
            lane.stack = stack_of(stacks++);
        }
    }
    while (unfinished && reason.empty()) {
        std::vector<Warp*> ready;
        for (Block& block : grid)
            for (Warp& warp : block.warps)
                if (warp.runnable) ready.push_back(&warp);
        if (ready.empty()) {
            reason = "deadlock: threads wait for others that never arrive";
            break;
        }
        for (size_t i = ready.size(); i > 1; --i) std::swap(ready[i - 1], ready[order() % i]);
        for (Warp* warp : ready) {
            // Some warps run ahead of the others.
            for (int rounds = order() % 64; rounds >= 0 && warp->runnable; --rounds)
                for (Lane& lane : warp->lanes)
                    if (lane.runnable) resume(lane);
        }
    }
    grid.clear();
    return reason.empty();
}

}  // namespace emulator
