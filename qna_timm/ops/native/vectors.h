// Vectors of as many float32 numbers as a register of the instruction set compiled for holds.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));

constexpr int64_t rounded_up(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

inline Vec load(const float *from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);  // at any address
    return v;
}

inline void store(float *to, Vec v) { std::memcpy(to, &v, sizeof v); }

// Some, or all, numbers of a vector.
inline Vec load_some(const float *from, int64_t count) {
    if (count >= LANES) return load(from);
    Vec v = Vec{};
    std::memcpy(&v, from, 4 * count);
    return v;
}

inline void store_some(float *to, Vec v, int64_t count) {
    if (count >= LANES) return store(to, v);
    std::memcpy(to, &v, 4 * count);
}

inline Vec splat(float x) { return x + Vec{}; }

// A NaN in `b` is passed over: maxima are shifts only, and it comes back with its exponential.
inline Vec larger(Vec a, Vec b) { return b > a ? b : a; }

// The larger one, but what is no number stays.
inline Vec larger_or_none(Vec a, Vec b) { return (a >= b) | (a != a) ? a : b; }

inline Vec magnitude(Vec v) { return v < 0.0f ? -v : v; }

// `v` as it is in a register: neither read again from memory for every use, nor its last operation
// merged with the next into one of a single rounding.
inline Vec held(Vec v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#else
    volatile Vec kept = v;
    v = kept;
#endif
    return v;
}

inline float sum(Vec v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

// e^x for x <= 0, within 2 roundings; 0 below the smallest normal number, NaN for NaN.
inline Vec exp_of_negative(Vec x) {
    const Vec least = splat(-87.33654f);
    const IntVec under = x < least;
    const Vec y = under ? least : x;
    const IntVec n = __builtin_convertvector(y * 1.44269504f - 0.5f, IntVec);
    const Vec k = __builtin_convertvector(n, Vec);
    // ln 2 in two parts, so that k of the first is exact
    const Vec f = (y - k * 0.693359375f) - k * -2.12194440e-4f;
    Vec p = splat(1.0f / 5040);
    p = p * f + 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    const IntVec bits = (n + 127) << 23;
    Vec power;
    std::memcpy(&power, &bits, sizeof power);
    return under ? Vec{} : p * power;
}
