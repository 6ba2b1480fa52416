// How work and memory are divided: rows of maps in bands, tasks among threads, the caller's memory.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "vectors.h"

inline int64_t parts(int64_t count, int64_t part) { return (count + part - 1) / part; }

struct Bands {
    int64_t count, rows;

    Bands(int64_t all, int64_t most)
        : count(std::max<int64_t>(1, parts(all, most))), rows(parts(all, count)) {}
};

// No more threads than have something to do: each takes memory.
inline int needed(int threads, int64_t tasks) {
    return int(std::min<int64_t>(threads, std::max<int64_t>(1, tasks)));
}

// Calls `run(task, thread)` for all tasks, on threads that take neighbouring ones.
template <class Run> void each_of(int64_t tasks, int threads, Run run) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t i = 0; i < tasks; i++) run(i, omp_get_thread_num());
}

// Parts of the memory at `start`, whole vectors each; with null only how many floats they take.
struct Parts {
    float *start;
    int64_t floats = 0;

    explicit Parts(float *start) : start(start) {}

    float *take(int64_t count) {
        float *taken = start ? start + floats : nullptr;
        floats += rounded_up(count);
        return taken;
    }
    // A vector for each number.
    Vec *take_vectors(int64_t count) { return reinterpret_cast<Vec *>(take(count * LANES)); }
};
