// The threads of a call. They are OpenMP threads, like PyTorch's own, so a call reuses PyTorch's threads instead of
// competing with them. One parallel region spans the call. In that region, the calling thread is the leader and hands
// out the work of one phase after another. A separate region for each phase would be slower: a region cost up to 60 us
// on a virtual machine that was slow to wake threads.
//
// In a child process after fork, OpenMP's pool is gone, and a parallel region would wait for it forever. There, and in
// builds with FNTX_STD_THREADS or without OpenMP, threads are started for each call.
#pragma once

#include <stdint.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <thread>

namespace fntx {

constexpr auto POLL_EVERY = std::chrono::milliseconds(50);  // as documented in fastntxent.h
constexpr int SPINS = 1000;                                 // iterations of a wait before it starts to yield the core

class Team {
  public:
    // The leader calls `poll`, if it is not NULL, at most once every POLL_EVERY, and a non-zero result stops the team.
    Team(int threads, int (*poll)(void)) : threads_(threads), poll_(poll) {}

    int threads() const { return threads_; }
    bool stopped() const { return stop_.load(std::memory_order_relaxed); }

    // Run body() on the calling thread while the other threads wait for work, and rethrow exceptions of body().
    template <class Body> void lead(Body body) {
        if (threads_ <= 1) return body();
        std::exception_ptr error;
        auto leader = [&] {
            try {
                body();
            } catch (const std::exception&) {  // not `...`: it would also catch the unwinding that ends a thread
                error = std::current_exception();
            }
            finished_.store(true);
        };
        start([](void* context) { (*static_cast<decltype(leader)*>(context))(); }, &leader);
        if (error) std::rethrow_exception(error);
    }

    // Within lead: call body(index, thread) for every index below `count`, unless the team stops. Threads take the
    // indices in order.
    template <class Body> void each(int64_t count, Body body) {
        std::atomic<int64_t> next{0};
        auto share = [&](int thread) {
            while (!interrupted(thread)) {
                const int64_t index = next.fetch_add(1, std::memory_order_relaxed);
                if (index >= count) break;
                body(index, thread);
            }
        };
        if (threads_ <= 1 || count <= 1) return share(0);
        job_ = [](void* context, int thread) { (*static_cast<decltype(share)*>(context))(thread); };
        context_ = &share;
        open_.store(++jobs_);
        share(0);
        // Wait only for helpers that are inside the job. A helper that arrives later counts itself in, finds the job
        // closed, and leaves.
        open_.store(0);
        for (int spins = 0; inside_.load() != 0; ++spins) relax(spins);
    }

    // Wait until `turn` reaches `expected`. Return false if the team stops first.
    bool wait(const std::atomic<int32_t>& turn, int32_t expected, int thread) {
        for (int spins = 0; turn.load(std::memory_order_acquire) != expected; ++spins) {
            if (interrupted(thread)) return false;
            relax(spins);
        }
        return true;
    }

    // Return whether the team has stopped. In the leader, first poll if POLL_EVERY has passed.
    bool interrupted(int thread) {
        if (thread == 0 && poll_) {
            const auto now = std::chrono::steady_clock::now();
            if (now - polled_ > POLL_EVERY) {
                polled_ = now;
                if (poll_()) stop_.store(true, std::memory_order_relaxed);
            }
        }
        return stopped();
    }

  private:
    // The parallel region: runs `leader` on the calling thread and `help` on the others.
    void start(void (*leader)(void*), void* context);

    // A helper enters each job at most once. If helpers kept counting themselves in and out until the job closed, they
    // would take the shared cache lines from the threads that still work, and from the leader.
    void help(int thread) {
        int64_t done = 0;
        for (int spins = 0; !finished_.load(); ++spins) {
            relax(spins);
            const int64_t job = open_.load();
            if (job == 0 || job == done) continue;
            inside_.fetch_add(1);
            if (open_.load() == job) job_(context_, thread), done = job, spins = 0;
            inside_.fetch_sub(1);
        }
    }

    static void relax(int spins) {
        if (spins > SPINS) std::this_thread::yield();
    }

    const int threads_;
    int (*const poll_)(void);
    std::chrono::steady_clock::time_point polled_ = std::chrono::steady_clock::now();
    std::atomic<bool> stop_{false}, finished_{false};
    std::atomic<int64_t> open_{0};  // number of the open job, from 1; 0: no job is open
    std::atomic<int> inside_{0};
    int64_t jobs_ = 0;
    void (*job_)(void*, int) = nullptr;
    void* context_ = nullptr;
};

}  // namespace fntx
