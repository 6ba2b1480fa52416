// The softmax of windows, neighbouring ones of a row in a vector.

#pragma once

#include <type_traits>

#include "heads.h"

namespace qna {

// Of a sum in float32 that are added one after the other.
constexpr int64_t MOST_ADDENDS = 256;

// Factors of the queries of a head.
template <bool EXACT, int NQ> struct Factors {
    const float *below[NQ], *above[NQ], *bias[NQ];

    Factors(const Problem &p, const Shared &shared, const Head &at) {
        for (int q = 0; q < NQ; q++) {
            below[q] = table_of(p, shared, EXACT ? ONES : BELOW, at, q);
            above[q] = table_of(p, shared, EXACT ? WEIGHT : ABOVE, at, q);
            bias[q] = table_of(p, shared, BIAS, at, q);
        }
    }
};

// What windows' exponentials are relative to.
template <int NQ> struct Norm {
    Vec inverse[NQ], shift[NQ], top[NQ];  // 1 / D; of scores; of scores and bias
};

// e^(score + bias) up to the window's common factor and to the factor of the offset.
template <bool EXACT> inline Vec power(Vec e, float bias, Vec shift, Vec top) {
    // The window's maximum goes before the bias comes: at scores of 1e4 a float32 sum with the bias
    // would keep three decimals of it only.
    return EXACT ? exp_of_negative(e - shift + bias - top) : e;
}

// Planes that rows of windows see; the first row begins at the first row of planes.
template <int NQ> struct Seen {
    const float *e[NQ], *values;
    int64_t plane;

    Seen(const Problem &p, const float *scores, const float *values, int64_t rows)
        : values(values), plane(p.plane(rows)) {
        for (int q = 0; q < NQ; q++) e[q] = scores + q * plane;
    }
};

// Rows of a window's offsets.
struct Rows {
    int64_t first, end;
};

// Calls `run(rows)` for parts of so many rows of offsets that are summed each for itself: added one
// by one to a sum of thousands, small numbers would leave their last digits, all in the same way.
template <class Run> inline void each_part(const Problem &p, int64_t rows, Run run) {
    const int64_t most = std::max<int64_t>(1, MOST_ADDENDS / p.kernel_w);
    for (int64_t first = 0; first < rows; first += most) {
        run(Rows{first, std::min(rows, first + most)});
    }
}

// Calls `visit(o, place in a plane)` for every offset, in some rows, of the windows at place x of
// row y.
template <class Visit>
inline void each_offset(const Problem &p, int64_t y, int64_t x, const Rows &of, Visit visit) {
    int64_t o = of.first * p.kernel_w;
    for (int64_t ky = of.first; ky < of.end; ky++) {
        const int64_t row = (y * p.stride + ky) * p.row() + x;
        if (p.stride == 1) {
            for (int64_t kx = 0; kx < p.kernel_w; kx++) visit(o++, row + kx);
        } else {
            for (int64_t kx = 0; kx < p.kernel_w; kx++) {
                visit(o++, row + kx % p.stride * p.places + kx / p.stride);
            }
        }
    }
}

template <bool EXACT, int NQ>
inline void find_tops(const Problem &p, const Seen<NQ> &seen, const Factors<EXACT, NQ> &factors,
                      int64_t y, int64_t x, Norm<NQ> &norm) {
    if (!EXACT) return;
    const Rows all = {0, p.kernel_h};
    for (int q = 0; q < NQ; q++) norm.shift[q] = norm.top[q] = splat(-INFINITY);
    each_offset(p, y, x, all, [&](int64_t, int64_t at) {
        for (int q = 0; q < NQ; q++) norm.shift[q] = larger(norm.shift[q], load(seen.e[q] + at));
    });
    each_offset(p, y, x, all, [&](int64_t o, int64_t at) {
        for (int q = 0; q < NQ; q++) {
            const Vec biased = load(seen.e[q] + at) - norm.shift[q] + factors.bias[q][o];
            norm.top[q] = larger(norm.top[q], biased);
        }
    });
}

template <int N> using Constant = std::integral_constant<int, N>;

// Calls `run(exact, queries, dim)` with constants to compile for; dim 0 is any.
template <class Run> void compiled_for(const Problem &p, bool exact, int queries, Run run) {
    const auto of_dim = [&](auto is_exact, auto count) {
        if (p.dim == 8) {
            run(is_exact, count, Constant<8>());
        } else if (p.dim == 16) {
            run(is_exact, count, Constant<16>());
        } else {
            run(is_exact, count, Constant<0>());
        }
    };
    const auto of_queries = [&](auto is_exact) {
        queries == 2 ? of_dim(is_exact, Constant<2>()) : of_dim(is_exact, Constant<1>());
    };
    exact ? of_queries(std::true_type()) : of_queries(std::false_type());
}

}  // namespace qna
