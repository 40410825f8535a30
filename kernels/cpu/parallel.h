// A range divided among threads.
#pragma once

#ifdef __linux__
#include <dlfcn.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

namespace courier {

// A part of a range, and which of the threads takes it.
using Range = std::function<void(int64_t, int64_t, int)>;

// Parts of a range, taken one after the other by whichever thread is free.
struct Job {
    const Range* run;
    std::vector<std::pair<int64_t, int64_t>> parts;
    std::atomic<size_t> next{0};
    std::atomic<int> threads{0};
    void work() {
        const int thread = threads.fetch_add(1);
        for (size_t i; (i = next.fetch_add(1)) < parts.size();) (*run)(parts[i].first, parts[i].second, thread);
    }
};

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The OpenMP runtime that torch has loaded, if it is one. Its threads spin for a while after each product; threads of our
// own would compete with them for the cores. Looked up by name: nothing is linked, and nothing is missing without it.
inline GompParallel openmp() {
#ifdef __linux__
    static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
#else
    return nullptr;
#endif
}

inline void run_parts(Job& job, int threads) {
    threads = std::min(threads, int(job.parts.size()));
    if (threads < 2) return job.work();
    if (const auto in_openmp = openmp())
        return in_openmp([](void* x) { static_cast<Job*>(x)->work(); }, &job, unsigned(threads), 0);
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(&Job::work, &job);
    job.work();
    for (auto& other : others) other.join();
}

// Numbers to read or write (about 10 us) for which another thread is woken; that can take as long.
constexpr int64_t kWorthAThread = 1 << 15;

// [0, n) in contiguous parts, one a thread; `row`: numbers of one. `cuts`: only these places may divide it.
inline void parallel(int64_t n, int64_t row, int threads, const Range& run, const int64_t* cuts = nullptr,
                     int64_t n_cuts = 0) {
    threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, n * row / kWorthAThread)));
    Job job;
    job.run = &run;
    for (int64_t t = 1, begin = 0; t <= threads; ++t) {
        int64_t end = n * t / threads;
        if (cuts && t < threads) {
            const int64_t* cut = std::lower_bound(cuts, cuts + n_cuts, end);
            end = cut == cuts + n_cuts ? n : *cut;
        }
        if (begin < end) job.parts.emplace_back(begin, end);
        begin = end;
    }
    run_parts(job, threads);
}

// [0, n) in parts of one, for what takes long: a thread whose core is shared takes fewer of them.
inline void parallel_each(int64_t n, int threads, const Range& run) {
    Job job;
    job.run = &run;
    for (int64_t i = 0; i < n; ++i) job.parts.emplace_back(i, i + 1);
    run_parts(job, threads);
}

}  // namespace courier
