// Threads: OpenMP's, which PyTorch's thread pool is too, so that a call takes over its threads instead of fighting
// them. One parallel region spans a call; in it the calling thread leads, and hands out the work of one phase after the
// other. A parallel region for each phase took up to 60 us each on a virtual machine that was slow to wake a thread.
//
// In a child after fork OpenMP's pool is gone, and a parallel region would wait for it forever: there, and in builds
// with FNTX_STD_THREADS, threads are started for the call.
#pragma once

#include <stdint.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <thread>

namespace fntx {

constexpr auto POLL_EVERY = std::chrono::milliseconds(50);  // what fastntxent.h promises
constexpr int SPINS = 1000;  // turns of a wait before a thread offers its core to others at each turn

class Team {
  public:
    // poll is called by the leader every POLL_EVERY; anything but 0 stops the team.
    Team(int threads, int (*poll)(void)) : threads_(threads), poll_(poll) {}

    int threads() const { return threads_; }
    bool stopped() const { return stop_.load(std::memory_order_relaxed); }

    // Run body() with the team at hand; what it throws is thrown here.
    template <class Body> void lead(Body body) {
        if (threads_ <= 1) return body();
        std::exception_ptr error;
        auto leader = [&] {
            try {
                body();
            } catch (const std::exception&) {  // no more than this: the unwinding that ends a thread may not be stopped
                error = std::current_exception();
            }
            finished_.store(true);
        };
        start([](void* context) { (*static_cast<decltype(leader)*>(context))(); }, &leader);
        if (error) std::rethrow_exception(error);
    }

    // Within lead: body(index, thread) for every index below count, in order, each on whichever thread is free.
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
        // Whoever has not come yet is not waited for: a helper that counts itself in and finds the job closed leaves.
        open_.store(0);
        for (int spins = 0; inside_.load() != 0; ++spins) relax(spins);
    }

    // Wait until `turn` reaches `expected`; false if the team stopped.
    bool wait(const std::atomic<int32_t>& turn, int32_t expected, int thread) {
        for (int spins = 0; turn.load(std::memory_order_acquire) != expected; ++spins) {
            if (interrupted(thread)) return false;
            relax(spins);
        }
        return true;
    }

    // Whether the team stopped; the leader asks the poll now and then.
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
    // The parallel region: leader on the calling thread, help on the others.
    void start(void (*leader)(void*), void* context);

    // A job that has nothing left is not entered again: helpers that count themselves in and out until it is closed
    // keep those that still work, and the leader, from the lines that they share.
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
    std::atomic<int64_t> open_{0};  // the number of the job that is open, from 1; 0: none
    std::atomic<int> inside_{0};
    int64_t jobs_ = 0;
    void (*job_)(void*, int) = nullptr;
    void* context_ = nullptr;
};

}  // namespace fntx
