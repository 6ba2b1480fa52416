// out[y] = sum_o (sum_q weight_q[o] a_q[y, o]) value[y + o], a_q the softmax of a window.

#pragma once

#include "windows.h"

namespace qna {

template <bool EXACT, int NQ>
inline Norm<NQ> find_norm(const Problem &p, const Seen<NQ> &seen,
                          const Factors<EXACT, NQ> &factors, int64_t y, int64_t x) {
    Norm<NQ> norm;
    find_tops<EXACT>(p, seen, factors, y, x, norm);
    Vec total[NQ] = {};
    each_offset(p, y, x, [&](int64_t o, int64_t at) {
        for (int q = 0; q < NQ; q++) {
            const Vec e = load(seen.e[q] + at);
            const Vec part = power<EXACT>(e, factors.bias[q][o], norm.shift[q], norm.top[q]);
            total[q] += part * factors.below[q][o];
        }
    });
    for (int q = 0; q < NQ; q++) norm.inverse[q] = 1.0f / total[q];
    return norm;
}

// Adds what queries of a head find in rows of windows to planes of the output.
template <bool EXACT, int NQ, int DIM>
void attend(const Problem &p, const Shared &shared, const Head &at, const Seen<NQ> &seen,
            int64_t rows, float *out) {
    const Factors<EXACT, NQ> factors(p, shared, at);
    const int dim = DIM ? DIM : int(p.dim);
    for (int64_t y = 0; y < rows; y++) {
        for (int64_t x = 0; x < p.window_places; x += LANES) {
            const Norm<NQ> norm = find_norm<EXACT>(p, seen, factors, y, x);
            Vec found[DIM ? DIM : MOST_CHANNELS];
            for (int c = 0; c < dim; c++) found[c] = Vec{};
            each_offset(p, y, x, [&](int64_t o, int64_t token) {
                Vec weight = Vec{};
                for (int q = 0; q < NQ; q++) {
                    const Vec e = load(seen.e[q] + token);
                    const Vec part =
                        power<EXACT>(e, factors.bias[q][o], norm.shift[q], norm.top[q]);
                    weight += part * factors.above[q][o] * norm.inverse[q];
                }
                const float *value = seen.values + token;
                for (int c = 0; c < dim; c++) found[c] += weight * load(value + c * seen.plane);
            });
            float *to = out + y * p.window_places + x;
            const int64_t plane = p.out_plane(rows);
            for (int c = 0; c < dim; c++, to += plane) store(to, load(to) + found[c]);
        }
    }
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
