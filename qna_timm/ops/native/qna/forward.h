// out[y] = sum_o (sum_q weight_q[o] a_q[y, o]) value[y + o], a_q the softmax of a window.

#pragma once

#include "windows.h"

namespace qna {

// Rows of windows that are computed at once, as far as registers hold their sums: what several of
// them see is read once.
template <bool EXACT, int DIM> constexpr int rows_at_once() {
    return !EXACT && DIM == 8 && LANES == 16 ? 2 : 1;
}

// Calls `visit(first, end, o, place in a plane)` for every token, in some rows of them, that the
// windows at place x of ROWS rows from y on see: rows from `first` to `end` of them, constants, at
// offset o of the first row's windows and a row of offsets less in each after it.
template <int ROWS, class Visit>
inline void each_token(const Problem &p, int64_t y, int64_t x, const Rows &of, Visit visit) {
    if constexpr (ROWS == 1) {
        each_offset(p, y, x, of, [&](int64_t o, int64_t at) {
            visit(Constant<0>(), Constant<1>(), o, at);
        });
    } else {
        static_assert(ROWS == 2);
        const auto row = [&](auto first, auto end, int64_t ky) {
            const int64_t at = (y + ky) * p.row() + x, o = ky * p.kernel_w;
            for (int64_t kx = 0; kx < p.kernel_w; kx++) visit(first, end, o + kx, at + kx);
        };
        const int64_t end = std::min(of.end, p.kernel_h);
        if (of.first == 0) row(Constant<0>(), Constant<1>(), 0);
        for (int64_t ky = std::max<int64_t>(1, of.first); ky < end; ky++) {
            row(Constant<0>(), Constant<2>(), ky);
        }
        if (of.end > p.kernel_h) row(Constant<1>(), Constant<2>(), p.kernel_h);
    }
}

// Calls `run(rows)` for parts of the rows of tokens that ROWS rows of windows see.
template <int ROWS, class Run> inline void each_part_seen(const Problem &p, Run run) {
    each_part(p, p.kernel_h + ROWS - 1, run);
}

template <bool EXACT, int NQ, int ROWS>
inline void find_norms(const Problem &p, const Seen<NQ> &seen, const Factors<EXACT, NQ> &factors,
                       int64_t y, int64_t x, Norm<NQ> *norms) {
    for (int r = 0; r < ROWS; r++) find_tops<EXACT>(p, seen, factors, y + r, x, norms[r]);
    Vec total[ROWS][NQ] = {};
    each_part_seen<ROWS>(p, [&](const Rows &rows) {
        Vec part[ROWS][NQ] = {};
        each_token<ROWS>(p, y, x, rows, [&](auto first, auto end, int64_t o, int64_t at) {
            for (int q = 0; q < NQ; q++) {
                const Vec e = held(load(seen.e[q] + at));
                for (int r = first; r < end; r++) {
                    const int64_t own = o - r * p.kernel_w;
                    const Norm<NQ> &norm = norms[r];
                    const Vec attn =
                        power<EXACT>(e, factors.bias[q][own], norm.shift[q], norm.top[q]);
                    part[r][q] += attn * factors.below[q][own];
                }
            }
        });
        for (int r = 0; r < ROWS; r++) {
            for (int q = 0; q < NQ; q++) total[r][q] += part[r][q];
        }
    });
    for (int r = 0; r < ROWS; r++) {
        for (int q = 0; q < NQ; q++) norms[r].inverse[q] = 1.0f / total[r][q];
    }
}

// Adds to planes of the output what the windows of ROWS rows from y on find.
template <bool EXACT, int NQ, int DIM, int ROWS>
void attend_rows(const Problem &p, const Seen<NQ> &seen, const Factors<EXACT, NQ> &factors,
                 int64_t y, int64_t out_plane, float *out) {
    const int dim = DIM ? DIM : int(p.dim);
    for (int64_t x = 0; x < p.window_places; x += LANES) {
        Norm<NQ> norms[ROWS];
        find_norms<EXACT, NQ, ROWS>(p, seen, factors, y, x, norms);
        each_part_seen<ROWS>(p, [&](const Rows &rows) {
            Vec found[ROWS][DIM ? DIM : MOST_CHANNELS];
            for (int r = 0; r < ROWS; r++) std::fill(found[r], found[r] + dim, Vec{});
            each_token<ROWS>(p, y, x, rows, [&](auto first, auto end, int64_t o, int64_t token) {
                Vec weight[ROWS] = {};
                for (int q = 0; q < NQ; q++) {
                    const Vec e = held(load(seen.e[q] + token));
                    for (int r = first; r < end; r++) {
                        const int64_t own = o - r * p.kernel_w;
                        const Norm<NQ> &norm = norms[r];
                        const Vec attn =
                            power<EXACT>(e, factors.bias[q][own], norm.shift[q], norm.top[q]);
                        weight[r] += attn * factors.above[q][own] * norm.inverse[q];
                    }
                }
                const float *value = seen.values + token;
                for (int c = 0; c < dim; c++) {
                    const Vec v = held(load(value + c * seen.plane));
                    for (int r = first; r < end; r++) found[r][c] += weight[r] * v;
                }
            });
            for (int r = 0; r < ROWS; r++) {
                float *to = out + (y + r) * p.window_places + x;
                for (int c = 0; c < dim; c++, to += out_plane) store(to, load(to) + found[r][c]);
            }
        });
    }
}

// Adds what queries of a head find in rows of windows to planes of the output.
template <bool EXACT, int NQ, int DIM>
void attend(const Problem &p, const Shared &shared, const Head &at, const Seen<NQ> &seen,
            int64_t rows, float *out) {
    const Factors<EXACT, NQ> factors(p, shared, at);
    const int64_t plane = p.out_plane(rows);
    constexpr int ROWS = rows_at_once<EXACT, DIM>();
    int64_t y = 0;
    if (p.stride == 1) {
        for (; y + ROWS <= rows; y += ROWS) {
            attend_rows<EXACT, NQ, DIM, ROWS>(p, seen, factors, y, plane, out);
        }
    }
    for (; y < rows; y++) attend_rows<EXACT, NQ, DIM, 1>(p, seen, factors, y, plane, out);
}

// `own` is the thread's memory.
inline void forward_task(const Problem &p, const Inputs &in, const Shared &shared, const Task &task,
                         float *own, float *out) {
    const int64_t seen_rows = p.seen_rows(task.rows), plane = p.plane(seen_rows);
    const int64_t top = task.top * p.stride - p.padding, found_plane = p.out_plane(task.rows);
    float *scores = own, *values = scores + p.queries * plane, *found = values + p.dim * plane;
    lay_values(p, in.value, task, top, seen_rows, values);
    std::fill(found, found + p.dim * found_plane, 0.0f);
    each_query(p, task, [&](const Head &at) {
        const bool is_shifted = is_exact(p, shared, at);
        lay_scores(p, in, shared, at, is_shifted, top, seen_rows, scores);
        compiled_for(p, is_shifted, at.queries, [&](auto exact, auto queries, auto dim) {
            const Seen<queries()> seen(p, scores, values, seen_rows);
            attend<exact(), queries(), dim()>(p, shared, at, seen, task.rows, found);
        });
    });
    for (int64_t y = 0; y < task.rows; y++) {
        const int64_t row = (task.image * p.rows + task.top + y) * p.cols;
        from_planes(found + y * p.window_places, found_plane, p.cols, p.dim,
                    out + row * p.channels + task.head * p.dim, p.channels, 1);
    }
}

}  // namespace qna
