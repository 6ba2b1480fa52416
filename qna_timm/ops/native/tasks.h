// How rows of maps are cut into bands, each a task for a thread.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

inline int64_t parts(int64_t count, int64_t part) { return (count + part - 1) / part; }

struct Bands {
    int64_t count, rows;

    Bands(int64_t all, int64_t most)
        : count(std::max<int64_t>(1, parts(all, most))), rows(parts(all, count)) {}
};
