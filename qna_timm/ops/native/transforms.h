// Discrete Fourier transforms of vectors: of as many sequences at once as a vector has numbers.
//
//     X[k] = sum_i x[i] exp(-2 pi sqrt(-1) i k / N),   N = 2^a 3^b 5^c, a multiple of 4

#pragma once

#include <cmath>

#include "tasks.h"

// A call would pass numbers through memory.
#define INLINED inline __attribute__((always_inline))

struct Complex {
    Vec re, im;
};

// A complex number that all sequences share.
struct Scalar {
    float re, im;
};

inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
inline Complex operator*(Complex a, Complex b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
inline Complex operator*(Complex a, float b) { return {a.re * b, a.im * b}; }
inline Complex operator*(Complex a, Scalar b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
inline Complex conjugate(Complex a) { return {a.re, -a.im}; }
inline Scalar conjugate(Scalar a) { return {a.re, -a.im}; }
// a + ib and a - ib, i the imaginary unit.
inline Complex plus_turned(Complex a, Complex b) { return {a.re - b.im, a.im + b.re}; }
inline Complex minus_turned(Complex a, Complex b) { return {a.re + b.im, a.im - b.re}; }

// Transforms of a few numbers, in place.
template <int R> struct Few;

template <> struct Few<3> {
    static INLINED void transform(Complex *x) {
        const Complex sum = x[1] + x[2], middle = x[0] - sum * 0.5f;
        const Complex rest = (x[1] - x[2]) * 0.866025404f;
        x[0] = x[0] + sum;
        x[1] = minus_turned(middle, rest);
        x[2] = plus_turned(middle, rest);
    }
};

template <> struct Few<4> {
    static INLINED void transform(Complex *x) {
        const Complex a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = x[1] - x[3];
        x[0] = a + c;
        x[1] = minus_turned(b, d);
        x[2] = a - c;
        x[3] = plus_turned(b, d);
    }
};

template <> struct Few<5> {
    static INLINED void transform(Complex *x) {
        const Complex a = x[1] + x[4], b = x[2] + x[3], c = x[1] - x[4], d = x[2] - x[3];
        const Complex e = x[0] + a * 0.309016994f - b * 0.809016994f;
        const Complex f = x[0] - a * 0.809016994f + b * 0.309016994f;
        const Complex g = c * 0.951056516f + d * 0.587785252f;
        const Complex h = c * 0.587785252f - d * 0.951056516f;
        x[0] = x[0] + a + b;
        x[1] = minus_turned(e, g);
        x[2] = minus_turned(f, h);
        x[3] = plus_turned(f, h);
        x[4] = plus_turned(e, g);
    }
};

template <> struct Few<8> {
    static INLINED void transform(Complex *x) {
        constexpr float HALF = 0.707106781f;
        Complex even[] = {x[0], x[2], x[4], x[6]}, odd[] = {x[1], x[3], x[5], x[7]};
        Few<4>::transform(even);
        Few<4>::transform(odd);
        const Complex a = Complex{odd[1].re + odd[1].im, odd[1].im - odd[1].re} * HALF;
        const Complex b = Complex{odd[3].re - odd[3].im, odd[3].im + odd[3].re} * HALF;
        x[0] = even[0] + odd[0];
        x[4] = even[0] - odd[0];
        x[1] = even[1] + a;
        x[5] = even[1] - a;
        x[2] = minus_turned(even[2], odd[2]);
        x[6] = plus_turned(even[2], odd[2]);
        x[3] = even[3] - b;
        x[7] = even[3] + b;
    }
};

// Factors of a length in the order of passes.
struct Passes {
    static constexpr int MOST = 24;

    int count = 0;
    int64_t of[MOST];

    explicit Passes(int64_t length) {
        int64_t rest = length;
        const auto take = [&](int64_t factor) {
            of[count++] = factor;
            rest /= factor;
        };
        for (int64_t factor : {5, 3}) {
            while (rest % factor == 0) take(factor);
        }
        while (rest % 8 == 0 && rest != 16) take(8);
        while (rest % 4 == 0) take(4);
    }

    // Time for each point, in no unit: measured with AVX2.
    int64_t cost() const {
        int64_t total = 0;
        for (int i = 0; i < count; i++) {
            total += of[i] == 3 ? 31 : of[i] == 4 ? 27 : 40;
        }
        return total;
    }
};

// Whether a length can be transformed.
inline bool has_transform(int64_t length) {
    if (length % 4) return false;
    for (int64_t factor : {2, 3, 5}) {
        while (length % factor == 0) length /= factor;
    }
    return length == 1;
}

// Factors of a length and what each pass multiplies by.
struct Plan {
    int64_t length;
    Passes passes;
    const float *roots[Passes::MOST];

    // `memory` of `floats(length)` numbers.
    Plan(int64_t length, float *memory) : length(length), passes(length) {
        int64_t n = length;
        for (int i = 0; i < passes.count; n /= passes.of[i++]) {
            roots[i] = memory;
            memory = make_roots(n, passes.of[i], memory);
        }
    }

    static int64_t floats(int64_t length) { return 2 * length; }

  private:
    static float *make_roots(int64_t n, int64_t factor, float *to) {
        for (int64_t p = 1; p < n / factor; p++) {
            for (int64_t k = 1; k < factor; k++) {
                const double angle = -2 * M_PI * double(p * k) / double(n);
                *to++ = float(std::cos(angle));
                *to++ = float(std::sin(angle));
            }
        }
        return to;
    }
};

// A pass over sequences of length n, `step` of which are interleaved: their elements n / R apart
// become those of R sequences of length n / R. The way back has parts of numbers in turned places.
template <int R, bool BACK>
void pass(int64_t n, int64_t step, const float *roots, const Complex *from, Complex *to) {
    const int64_t part = n / R;
    const auto placed = [](Complex x) { return BACK ? Complex{x.im, x.re} : x; };
    const auto begin = [&](int64_t at, Complex *x) {
        for (int j = 0; j < R; j++) x[j] = placed(from[at + step * part * j]);
        Few<R>::transform(x);
    };
    for (int64_t q = 0; q < step; q++) {
        Complex x[R];
        begin(q, x);
        for (int k = 0; k < R; k++) to[q + step * k] = placed(x[k]);
    }
    for (int64_t p = 1; p < part; p++, roots += 2 * (R - 1)) {
        for (int64_t q = 0; q < step; q++) {
            Complex x[R];
            begin(q + step * p, x);
            Complex *own = to + q + step * R * p;
            own[0] = placed(x[0]);
            for (int k = 1; k < R; k++) {
                const float re = roots[2 * k - 2], im = roots[2 * k - 1];
                own[step * k] = placed(x[k] * Scalar{re, im});
            }
        }
    }
}

template <bool BACK>
inline void any_pass(int64_t factor, int64_t n, int64_t step, const float *roots,
                     const Complex *from, Complex *to) {
    switch (factor) {
    case 3: return pass<3, BACK>(n, step, roots, from, to);
    case 4: return pass<4, BACK>(n, step, roots, from, to);
    case 5: return pass<5, BACK>(n, step, roots, from, to);
    default: return pass<8, BACK>(n, step, roots, from, to);
    }
}

// `from`, `spare` and `to` are of the plan's length, and not the same memory. The way back gives
// `length` times what it should.
template <bool BACK = false>
inline void transform(const Plan &plan, const Complex *from, Complex *spare, Complex *to) {
    int64_t n = plan.length, step = 1;
    for (int i = 0; i < plan.passes.count; i++) {
        Complex *next = (plan.passes.count - i) % 2 ? to : spare;
        any_pass<BACK>(plan.passes.of[i], n, step, plan.roots[i], from, next);
        from = next;
        n /= plan.passes.of[i];
        step *= plan.passes.of[i];
    }
}
