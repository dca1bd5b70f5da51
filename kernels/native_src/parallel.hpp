// Work over several threads, on the pool that PyTorch itself uses.

#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace tetra {

// GOMP_parallel of the OpenMP runtime that PyTorch has loaded (libgomp, libiomp5 and LLVM's libomp all export
// it), or null. Linking a runtime of our own could load a second one, whose threads would fight with the first's.
typedef void (*ForkJoin)(void (*)(void*), void*, unsigned, unsigned);
inline ForkJoin fork_join = nullptr;

// body(i) once for every i < n, on at most `threads` threads; whoever is free takes the next i.
template <class Body> void parallel_for(int64_t n, int64_t threads, const Body& body) {
    if (threads > n) threads = n;
    if (threads <= 1) {
        for (int64_t i = 0; i < n; i++) body(i);
        return;
    }
    struct Job {
        const Body& body;
        const int64_t n;
        std::atomic<int64_t> next{0};
        static void run(void* self) {
            Job& job = *static_cast<Job*>(self);
            for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.n;) job.body(i);
        }
    } job{body, n};
    if (fork_join) {
        fork_join(Job::run, &job, static_cast<unsigned>(threads), 0);
        return;
    }
    std::vector<std::thread> others;
    try {
        for (int64_t i = 1; i < threads; i++) others.emplace_back(Job::run, &job);
    } catch (const std::system_error&) {
        // No more threads to be had: those that run do all the work.
    }
    Job::run(&job);
    for (std::thread& other : others) other.join();
}

// Scratch memory of a thread, kept from call to call, aligned to a cache line. Contents are arbitrary.
class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(memory_); }

    template <class T> T* get(int64_t count) {
        const size_t wanted = (static_cast<size_t>(count) * sizeof(T) + 4095) / 4096 * 4096;
        if (wanted > size_) {
            std::free(memory_);
            size_ = 0;
            memory_ = std::aligned_alloc(4096, wanted);
            if (!memory_) throw std::bad_alloc();
            size_ = wanted;
        }
        return static_cast<T*>(memory_);
    }

  private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};

}  // namespace tetra
