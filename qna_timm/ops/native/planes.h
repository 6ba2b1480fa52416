// Between channels-last maps and planes, in which numbers of one channel lie side by side.

#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

// Tokens, or channels, of a block that is turned over in registers.
constexpr int BLOCK = 8;
typedef float Block __attribute__((vector_size(4 * BLOCK)));
typedef int32_t BlockIndex __attribute__((vector_size(4 * BLOCK)));

#if defined(__clang__)
#define MERGED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MERGED(a, b, ...) __builtin_shuffle(a, b, BlockIndex{__VA_ARGS__})
#endif

// Floats from one plane to the next: an odd number of cache lines, lest the same place of all
// planes falls on the same few lines of a cache.
constexpr int64_t LINE = 16;
inline int64_t apart(int64_t floats) { return ((floats + LINE - 1) / LINE | 1) * LINE; }

// Rows of `from` as columns of `to`.
inline void turn_block(const float *from, int64_t from_step, float *to, int64_t to_step) {
    Block r[BLOCK], pairs[BLOCK], fours[BLOCK];
    for (int i = 0; i < BLOCK; i++) std::memcpy(&r[i], from + i * from_step, sizeof r[i]);
    for (int i = 0; i < BLOCK; i += 2) {
        pairs[i] = MERGED(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        pairs[i + 1] = MERGED(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < BLOCK; i += 4) {
        for (int k = 0; k < 2; k++) {
            const Block a = pairs[i + k], b = pairs[i + k + 2];
            fours[i + 2 * k] = MERGED(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
            fours[i + 2 * k + 1] = MERGED(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    for (int k = 0; k < 4; k++) {
        const Block low = MERGED(fours[k], fours[k + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        const Block high = MERGED(fours[k], fours[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);
        std::memcpy(to + k * to_step, &low, sizeof low);
        std::memcpy(to + (k + 4) * to_step, &high, sizeof high);
    }
}

// Tokens to planes: to[c * plane + i] = from[i * token + c * step].
inline void to_planes(const float *from, int64_t token, int64_t step, int64_t tokens,
                      int64_t channels, float *to, int64_t plane) {
    int64_t done = 0;
    if (step == 1 && channels % BLOCK == 0) {
        for (; done + BLOCK <= tokens; done += BLOCK) {
            for (int64_t c = 0; c < channels; c += BLOCK) {
                turn_block(from + done * token + c, token, to + c * plane + done, plane);
            }
        }
    }
    for (int64_t i = done; i < tokens; i++) {
        for (int64_t c = 0; c < channels; c++) to[c * plane + i] = from[i * token + c * step];
    }
}

// The way back: to[i * token + c * step] = from[c * plane + i].
inline void from_planes(const float *from, int64_t plane, int64_t tokens, int64_t channels,
                        float *to, int64_t token, int64_t step) {
    int64_t done = 0;
    if (step == 1 && channels % BLOCK == 0) {
        for (; done + BLOCK <= tokens; done += BLOCK) {
            for (int64_t c = 0; c < channels; c += BLOCK) {
                turn_block(from + c * plane + done, plane, to + done * token + c, token);
            }
        }
    }
    for (int64_t i = done; i < tokens; i++) {
        for (int64_t c = 0; c < channels; c++) to[i * token + c * step] = from[c * plane + i];
    }
}
