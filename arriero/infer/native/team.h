// The threads that a step runs on: one team for the life of an engine.
//
// A step is a row of phases, which every thread goes through. The items of a phase are dealt out one by one as threads
// come free, and a thread goes on to the next phase when all items of this one are done, whoever did them. So a thread
// whose core is taken by another process holds the others up by the one item that it has in hand, and by nothing at all
// in the phases that it comes too late for. Between phases threads spin for some microseconds and then offer their core
// to others; between steps they sleep.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

thread_local int64_t phase_of_thread = 0;  // of those of the job

class Team {
  public:
    explicit Team(int64_t threads) : threads_(threads) {
        for (int64_t i = 1; i < threads; ++i) others_.emplace_back([this] { live(); });
    }

    ~Team() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            over_ = true;
        }
        wake_.notify_all();
        for (auto& other : others_) other.join();
    }

    // work() on every thread, which shares out at most `phases` phases; returns when all threads are done.
    template <class Work>
    void run(int64_t phases, Work work) {
        if (phases > int64_t(phases_.size())) phases_ = std::vector<Phase>(size_t(phases));
        for (Phase& phase : phases_) {
            phase.next.store(0, std::memory_order_relaxed);
            phase.done.store(0, std::memory_order_relaxed);
        }
        job_ = [](void* w) { (*static_cast<Work*>(w))(); };
        data_ = &work;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            running_.store(threads_ - 1, std::memory_order_relaxed);
            jobs_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        phase_of_thread = 0;
        work();
        for (int64_t spins = 0; running_.load(std::memory_order_acquire); ++spins) wait(spins);
    }

    // One phase, called by all threads in the same order: work(item) for each of the items.
    template <class Work>
    void share(int64_t items, Work work) {
        Phase& phase = phases_[size_t(phase_of_thread++)];
        for (int64_t item; (item = phase.next.fetch_add(1, std::memory_order_relaxed)) < items;) {
            work(item);
            phase.done.fetch_add(1, std::memory_order_acq_rel);
        }
        for (int64_t spins = 0; phase.done.load(std::memory_order_acquire) < items; ++spins) wait(spins);
    }

    int64_t threads() const { return threads_; }

  private:
    struct alignas(64) Phase {
        std::atomic<int64_t> next{0}, done{0};
    };

    static void wait(int64_t spins) { spins < 4000 ? relax() : std::this_thread::yield(); }

    void live() {
        for (int64_t seen = 0;;) {
            for (int64_t spins = 0; spins < 2000 && jobs_.load(std::memory_order_acquire) == seen; ++spins) relax();
            if (jobs_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return over_ || jobs_.load(std::memory_order_relaxed) != seen; });
                if (over_) return;
            }
            seen = jobs_.load(std::memory_order_acquire);
            phase_of_thread = 0;
            job_(data_);
            running_.fetch_sub(1, std::memory_order_release);
        }
    }

    const int64_t threads_;
    std::vector<std::thread> others_;
    std::mutex mutex_;
    std::condition_variable wake_;
    bool over_ = false;
    void (*job_)(void*) = nullptr;
    void* data_ = nullptr;
    alignas(64) std::atomic<int64_t> jobs_{0};
    alignas(64) std::atomic<int64_t> running_{0};
    std::vector<Phase> phases_;
};

}  // namespace
