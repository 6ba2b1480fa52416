// Window sums of maps by Fourier transforms, a channel of a head, or a pair of query and head, in
// each number of a vector:
//
//     sum_o table[o] x[y + o]  =  the way back of  X F,   F = conj(transform of the table)
//
// A transform spreads its rounding over all of a map. How far sums are off follows from the norms of
// what was transformed; heads for which that is too much are computed directly.

#pragma once

#include <cfloat>

#include "heads.h"
#include "sides.h"

namespace qna {

// Errors of whole maps over what a random walk of roundings would leave, the largest error of a map
// over that, and roundings of a D of mean size that all D share; see fourier.py.
constexpr float DEVIATIONS = 8, PEAK = 4, COMMON_ROUNDINGS = 8;
// What may be wrong of an output, as a part of a head's largest number, and of gradients, of their
// norm.
constexpr float OUT_TOLERANCE = 420 * FLT_EPSILON, GRAD_TOLERANCE = 4200 * FLT_EPSILON;
// Roundings that a sum of both terms of a gradient has gone through.
constexpr float ROUNDINGS = 8;
// Least D, where e is at most 1, and least square of a norm that is no sum of vanished numbers.
constexpr float SMALLEST_SUM = 1e-25f, SMALLEST_SQUARE = 1e-30f;
// Images whose gradients of tables are summed before they leave the cache.
constexpr int64_t IMAGES_AT_ONCE = 4;

// Rows of a map, numbered by where they are in it: a part of its tokens, or windows.
struct Area {
    int64_t first, rows, cols, pitch;

    int64_t row(int64_t r) const { return first + r * pitch; }
    int64_t count() const { return rows * cols; }
};

// A part of a map: windows, and tokens that they see.
struct Tile {
    Part down, across;
    Area tokens, windows;

    Tile(const Problem &p, const Part &down, const Part &across)
        : down(down), across(across),
          tokens{down.token * p.width + across.token, down.tokens.count, across.tokens.count,
                 p.width},
          windows{down.window * p.cols + across.window, down.windows.count, across.windows.count,
                  p.cols} {}
};

// Points of all transforms of a problem: `half` columns, as rows are real, `column` numbers apart.
struct Grid {
    Side down, across;
    int64_t half, column, spectrum, tiles;

    explicit Grid(const Problem &p)
        : down(p.height, p.rows, p.kernel_h, p.stride, p.padding),
          across(p.width, p.cols, p.kernel_w, p.stride, p.padding), half(across.length / 2 + 1),
          // odd, lest columns fall on the same few lines of a cache
          column(down.length | 1), spectrum(half * down.length),
          tiles(down.count() * across.count()) {}

    // Calls `run(tile)` for all parts of a map.
    template <class Run> void each_tile(const Problem &p, Run run) const {
        for (int64_t i = 0; i < tiles; i++) {
            run(Tile(p, down.part(i / across.count()), across.part(i % across.count())));
        }
    }
    // Calls `run(area)` for all tokens in parts of rows that a tile's memory holds.
    template <class Run> void each_row(const Problem &p, Run run) const {
        const int64_t most = across.most_tokens();
        for (int64_t y = 0; y < p.height; y++) {
            for (int64_t x = 0; x < p.width; x += most) {
                run(Area{y * p.width + x, 1, std::min(most, p.width - x), p.width});
            }
        }
    }
    int64_t most_tokens() const { return down.most_tokens() * across.most_tokens(); }
    int64_t most_windows() const { return down.at_once * across.at_once; }
    // Time of one map's sums, in `Passes::cost`.
    double cost() const {
        const double rows = double(down.most_tokens() + down.at_once) / 2;
        const double of_rows = rows * double(across.length * Passes(across.length).cost());
        const double of_columns = 2.0 * double(spectrum * Passes(down.length).cost());
        return double(tiles) * (of_rows + of_columns);
    }
    bool sees_all() const { return down.sees_all() && across.sees_all(); }
    int64_t points() const { return down.length * across.length; }
    // Error of a sum over the norms of its map and table: a random walk of log2(points) roundings,
    // spread evenly over the points.
    float noise() const {
        const float count = float(points());
        return DEVIATIONS * FLT_EPSILON * std::sqrt(std::log2(count) / count);
    }
};

inline Complex *take_complex(Parts &from, int64_t count) {
    return reinterpret_cast<Complex *>(from.take_vectors(2 * count));
}

// A thread's memory for transforms.
struct Sheets {
    Complex *a, *b, *c, *d;            // sequences
    Complex *plane, *grads = nullptr;  // maps, as they are transformed
    Complex *products = nullptr;       // a spectrum for each query
    Vec *tokens, *windows;             // a vector for each of a tile
    Vec *more_tokens = nullptr, *more_windows = nullptr, *row = nullptr;

    Sheets(const Problem &p, const Grid &grid, bool backward, Parts &from) {
        const int64_t length = std::max(grid.down.length, grid.across.length);
        for (Complex **sequence : {&a, &b, &c, &d}) *sequence = take_complex(from, length);
        plane = take_complex(from, grid.half * grid.column);
        tokens = from.take_vectors(grid.most_tokens());
        windows = from.take_vectors(grid.most_windows());
        if (!backward) return;
        grads = take_complex(from, grid.half * grid.column);
        products = take_complex(from, p.queries * grid.spectrum);
        more_tokens = from.take_vectors(grid.most_tokens());
        more_windows = from.take_vectors(grid.most_windows());
        row = from.take_vectors(grid.across.length);
    }
};

// What a thread transforms with.
struct Desk : Sheets {
    const Grid &grid;
    const Plan &down, &across;

    Desk(const Sheets &sheets, const Grid &grid, const Plan &down, const Plan &across)
        : Sheets(sheets), grid(grid), down(down), across(across) {}
};

// Rows of a map -> columns of their transforms, twice as large, with each row at its point. Two rows
// are transformed as one complex one. `read(r, put)` gives a row: it calls `put(x, vector)`.
template <class Read>
void transform_rows(const Desk &at, const Places &rows, const Places &cols, Complex *plane,
                    Read read) {
    const int64_t half = at.grid.half, length = at.across.length;
    std::fill(at.a, at.a + length, Complex{});
    for (int64_t r = 0; r < rows.count; r += 2) {
        const bool both = r + 1 < rows.count;
        read(r, [&](int64_t x, Vec v) { at.a[cols.point(x)].re = v; });
        if (both) read(r + 1, [&](int64_t x, Vec v) { at.a[cols.point(x)].im = v; });
        for (int64_t x = 0; !both && x < cols.count; x++) at.a[cols.point(x)].im = Vec{};
        transform(at.across, at.a, at.b, at.c);
        Complex *to = plane + rows.point(r);
        for (int64_t k = 0; k < half; k++, to += at.grid.column) {
            const Complex z = at.c[k], other = at.c[k ? length - k : 0];
            to[0] = {z.re + other.re, z.im - other.im};
            if (both) to[rows.step] = {z.im + other.im, other.re - z.re};
        }
    }
}

// The way back, `length` times as large: `write(row, sums)` with one for each column.
template <class Write>
void transform_rows_back(const Desk &at, const Places &rows, const Places &cols,
                         const Complex *plane, Write write) {
    const int64_t half = at.grid.half, length = at.across.length;
    for (int64_t r = 0; r < rows.count; r += 2) {
        const bool both = r + 1 < rows.count;
        const Complex *from = plane + rows.point(r);
        for (int64_t k = 0; k < half; k++, from += at.grid.column) {
            const Complex one = from[0], other = both ? from[rows.step] : Complex{};
            at.a[k] = plus_turned(one, other);
            if (k) at.a[length - k] = conjugate(minus_turned(one, other));
        }
        transform<true>(at.across, at.a, at.b, at.c);
        write(r, [&](int64_t x) { return at.c[cols.point(x)].re; });
        if (both) write(r + 1, [&](int64_t x) { return at.c[cols.point(x)].im; });
    }
}

// Transforms a column of a plane.
inline void transform_column(const Desk &at, const Places &rows, Complex *column, Complex *to) {
    const int64_t end = rows.point(rows.count - 1) + 1;
    std::fill(column, column + rows.first, Complex{});
    for (int64_t r = 0; rows.step > 1 && r + 1 < rows.count; r++) {
        std::fill(column + rows.point(r) + 1, column + rows.point(r + 1), Complex{});
    }
    std::fill(column + end, column + at.down.length, Complex{});
    transform(at.down, column, at.b, to);
}

// Tokens of a plane -> sums of their windows; `factor(i)` for each point of the spectrum.
template <class Factor>
void filter(const Desk &at, const Places &tokens, Complex *plane, Factor factor) {
    const int64_t length = at.down.length;
    for (int64_t k = 0; k < at.grid.half; k++, plane += at.grid.column) {
        transform_column(at, tokens, plane, at.c);
        for (int64_t i = 0; i < length; i++) at.c[i] = at.c[i] * factor(k * length + i);
        transform<true>(at.down, at.c, at.b, plane);
    }
}

}  // namespace qna
