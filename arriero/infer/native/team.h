// The threads that a step runs on: one team for the life of an engine.
//
// A step is a row of phases, which every thread goes through. The items of a phase are cut into one run for each thread,
// so that a thread reads its weights as one stream; one that is through with its own run takes items of the others', one
// by one, and goes on to the next phase when all items of this one are done, whoever did them. So a thread whose core is
// taken by another process holds the others up by the one item that it has in hand, and by nothing at all in the phases
// that it comes too late for. Between phases threads spin for some microseconds and then offer their core to others;
// between steps they sleep.

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
thread_local int64_t number_of_thread = 0;  // the caller of `run` is 0

class Team {
  public:
    explicit Team(int64_t threads) : threads_(threads) {
        for (int64_t i = 1; i < threads; ++i) others_.emplace_back([this, i] { live(i); });
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
        if (phases > int64_t(done_.size())) {
            done_ = std::vector<Counter>(size_t(phases));
            taken_ = std::vector<Counter>(size_t(phases * threads_));
        }
        for (auto* counters : {&done_, &taken_})
            for (Counter& counter : *counters) counter.n.store(0, std::memory_order_relaxed);
        job_ = [](void* w) { (*static_cast<Work*>(w))(); };
        data_ = &work;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            running_.store(threads_ - 1, std::memory_order_relaxed);
            jobs_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        phase_of_thread = number_of_thread = 0;
        work();
        for (int64_t spins = 0; running_.load(std::memory_order_acquire); ++spins) wait(spins);
    }

    // One phase, called by all threads in the same order: work(item) for each of the items.
    template <class Work>
    void share(int64_t items, Work work) {
        const int64_t phase = phase_of_thread++;
        std::atomic<int64_t>& done = done_[size_t(phase)].n;
        for (int64_t other = 0; other < threads_; ++other) {
            const int64_t thread = (number_of_thread + other) % threads_;
            const int64_t first = items * thread / threads_, last = items * (thread + 1) / threads_;
            std::atomic<int64_t>& taken = taken_[size_t(phase * threads_ + thread)].n;
            for (int64_t item; (item = first + taken.fetch_add(1, std::memory_order_relaxed)) < last;) {
                work(item);
                done.fetch_add(1, std::memory_order_acq_rel);
            }
        }
        for (int64_t spins = 0; done.load(std::memory_order_acquire) < items; ++spins) wait(spins);
    }

    int64_t threads() const { return threads_; }

  private:
    struct alignas(64) Counter {
        std::atomic<int64_t> n{0};
    };

    static void wait(int64_t spins) { spins < 4000 ? relax() : std::this_thread::yield(); }

    void live(int64_t number) {
        number_of_thread = number;
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
    std::vector<Counter> done_, taken_;  // [phases] items; [phases, threads] items of a thread's run
};

}  // namespace
