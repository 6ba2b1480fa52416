// Gradients, from tokens to the windows that see them:
//
//     slope  = <grad[y], value[t]>,  z_q = a_q (weight_q slope - mean_q),  t = y + o
//     score  : sum_o z_q          bias   : sum_t z_q
//     value  : sum_o sum_q weight_q a_q grad[y]
//     weight : sum_t a_q slope
//
// with mean_q[y] = sum_o weight_q a_q slope, which windows are measured for first.

#pragma once

#include "windows.h"

namespace qna {

constexpr float FAR = 3e38f;

struct Gradients {
    float *scores, *value, *bias, *weight;
};

// What windows are known by: maps of `Stat` numbers, [batch, heads, queries, STATS, rows].
struct Stats {
    float *maps;

    float *map(const Problem &p, const Head &at, int q) const {
        const int64_t head = at.image * p.heads + at.head;
        return maps + (head * p.queries + at.query + q) * STATS * p.stat_map();
    }
};

// The same number whichever is `own`.
inline Vec product(const Vec *own, const Vec *other, int dim) {
    Vec even = Vec{}, odd = Vec{};
    for (int c = 0; c + 1 < dim; c += 2) {
        even += own[c] * other[c];
        odd += own[c + 1] * other[c + 1];
    }
    if (dim % 2) even += own[dim - 1] * other[dim - 1];
    return even + odd;
}

inline void load_all(const float *planes, int64_t plane, int dim, Vec *to) {
    for (int c = 0; c < dim; c++) to[c] = load(planes + c * plane);
}

// Margins of a row of windows hold numbers that make every addend 0.
inline void close_row(const Problem &p, bool exact, float *row) {
    const float outside[STATS] = {0, 0, FAR, 0};
    for (int stat = 0; stat < (exact ? STATS : SHIFT); stat++, row += p.stat_map()) {
        std::fill(row, row + p.lead, outside[stat]);
        std::fill(row + p.lead + p.cols, row + p.stat_places, outside[stat]);
    }
}

// Measures row y of those seen, to rows of maps; `grad` has planes of it.
template <bool EXACT, int NQ, int DIM>
void measure(const Problem &p, const Shared &shared, const Head &at, const Seen<NQ> &seen,
             int64_t y, const float *grad, float *const *rows) {
    const Factors<EXACT, NQ> factors(p, shared, at);
    const int dim = DIM ? DIM : int(p.dim);
    const int64_t map = p.stat_map();
    for (int64_t x = 0; x < p.window_places; x += LANES) {
        Norm<NQ> norm;
        find_tops<EXACT>(p, seen, factors, y, x, norm);
        Vec own[DIM ? DIM : MOST_CHANNELS], total[NQ] = {}, mean[NQ] = {};
        load_all(grad + x, p.out_plane(1), dim, own);
        each_part(p, p.kernel_h, [&](const Rows &of) {
            Vec part[NQ] = {}, part_mean[NQ] = {};
            each_offset(p, y, x, of, [&](int64_t o, int64_t token) {
                Vec value[DIM ? DIM : MOST_CHANNELS];
                load_all(seen.values + token, seen.plane, dim, value);
                const Vec slope = product(own, value, dim);
                for (int q = 0; q < NQ; q++) {
                    const Vec e = load(seen.e[q] + token);
                    const Vec attn =
                        power<EXACT>(e, factors.bias[q][o], norm.shift[q], norm.top[q]);
                    part[q] += attn * factors.below[q][o];
                    part_mean[q] += attn * factors.above[q][o] * slope;
                }
            });
            for (int q = 0; q < NQ; q++) total[q] += part[q], mean[q] += part_mean[q];
        });
        for (int q = 0; q < NQ; q++) {
            float *to = rows[q] + p.lead + x;
            const Vec inverse = 1.0f / total[q];
            store(to + INVERSE * map, inverse);
            store(to + MEAN * map, mean[q] * inverse);
            if (!EXACT) continue;
            store(to + SHIFT * map, norm.shift[q]);
            store(to + TOP * map, norm.top[q]);
        }
    }
    for (int q = 0; q < NQ; q++) close_row(p, EXACT, rows[q]);
}

// Planes of row y of the output's gradient, from place `lead` on, 0 elsewhere up to `places`.
inline void lay_grad(const Problem &p, const float *grad, const Task &task, int64_t y, int64_t lead,
                     int64_t places, int64_t plane, float *to) {
    const int64_t row = (task.image * p.rows + y) * p.cols;
    for (int64_t c = 0; c < p.dim; c++) {
        std::fill(to + c * plane, to + c * plane + lead, 0.0f);
        std::fill(to + c * plane + lead + p.cols, to + c * plane + places, 0.0f);
    }
    to_planes(grad + row * p.channels + task.head * p.dim, p.channels, 1, p.cols, p.dim, to + lead,
              plane);
}

inline float sum_of_magnitudes(const float *row, int64_t count) {
    Vec total = Vec{};
    for (int64_t i = 0; i < count; i += LANES) total += magnitude(load(row + i));
    return sum(total);
}

// Measures rows of windows; `means` has the sum of |mean| of each pair. `own` is the thread's
// memory.
inline void measure_task(const Problem &p, const Inputs &in, const Shared &shared, const Task &task,
                         const float *grad, const Stats &stats, float *own, float *means) {
    const int64_t seen_rows = p.seen_rows(task.rows), plane = p.plane(seen_rows);
    const int64_t top = task.top * p.stride - p.padding;
    float *scores = own, *values = scores + p.queries * plane, *row = values + p.dim * plane;
    lay_values(p, in.value, task, top, seen_rows, values);
    each_query(p, task, [&](const Head &at) {
        const bool is_shifted = is_exact(p, shared, at);
        lay_scores(p, in, shared, at, is_shifted, top, seen_rows, scores);
        for (int q = 0; q < at.queries; q++) means[at.pair(p, q)] = 0.0f;
        for (int64_t y = 0; y < task.rows; y++) {
            float *rows[2];
            for (int q = 0; q < at.queries; q++) {
                rows[q] = stats.map(p, at, q) + (task.top + y) * p.stat_places;
            }
            lay_grad(p, grad, task, task.top + y, 0, p.window_places, p.out_plane(1), row);
            compiled_for(p, is_shifted, at.queries, [&](auto exact, auto queries, auto dim) {
                const Seen<queries()> seen(p, scores, values, seen_rows);
                measure<exact(), queries(), dim()>(p, shared, at, seen, y, row, rows);
            });
            for (int q = 0; q < at.queries; q++) {
                const float *mean = rows[q] + MEAN * p.stat_map();
                means[at.pair(p, q)] += sum_of_magnitudes(mean, p.stat_places);
            }
        }
    });
}

// A thread's memory for rows of tokens, and for those of windows that see them.
struct TokenPlanes {
    int64_t plane, window_top, window_rows, window_plane;
    float *scores, *values, *grad_scores, *grad_values, *grad;
    float *bias, *weight;  // a vector for each offset and query

    TokenPlanes(const Problem &p, const Task &task, float *own) : plane(p.plane(task.rows)) {
        const int64_t before = std::max<int64_t>(0, task.top + p.padding - p.kernel_h + 1);
        const int64_t last = task.top + task.rows - 1 + p.padding;
        window_top = parts(before, p.stride);
        window_rows = std::max<int64_t>(0, std::min(p.rows, last / p.stride + 1) - window_top);
        window_plane = p.stat_plane(window_rows);
        scores = own;
        values = scores + p.queries * plane;
        grad_scores = values + p.dim * plane;
        grad_values = grad_scores + p.queries * plane;
        bias = grad_values + p.dim * plane;
        weight = bias + p.offset_floats();
        grad = weight + p.offset_floats();
    }
};

// What a vector of tokens gets from windows; `NQ` queries, all channels.
template <int NQ, int DIM> struct Gathered {
    static constexpr int MOST = DIM ? DIM : MOST_CHANNELS;
    Vec e[NQ], value[MOST], by_score[NQ] = {}, by_value[MOST];

    Gathered(const TokenPlanes &in, int64_t token, int dim) {
        for (int q = 0; q < NQ; q++) e[q] = load(in.scores + q * in.plane + token);
        load_all(in.values + token, in.plane, dim, value);
        for (int c = 0; c < dim; c++) by_value[c] = Vec{};
    }

    void put(const TokenPlanes &in, int64_t token, int dim) const {
        for (int q = 0; q < NQ; q++) store(in.grad_scores + q * in.plane + token, by_score[q]);
        for (int c = 0; c < dim; c++) {
            float *to = in.grad_values + c * in.plane + token;
            store(to, load(to) + by_value[c]);
        }
    }
};

// Adds what tokens get from the windows at one offset. `windows` are their measures, `grad` their
// planes.
template <bool EXACT, int NQ, int DIM>
inline void gather_offset(const Problem &p, const Factors<EXACT, NQ> &factors,
                          const float *const *weight, int64_t o, const float *const *windows,
                          const float *grads, const TokenPlanes &in, Gathered<NQ, DIM> &tokens) {
    const int dim = DIM ? DIM : int(p.dim);
    const int64_t map = p.stat_map();
    Vec grad[Gathered<NQ, DIM>::MOST], share = Vec{};
    load_all(grads, in.window_plane, dim, grad);
    const Vec slope = product(tokens.value, grad, dim);
    for (int q = 0; q < NQ; q++) {
        Vec shift = Vec{}, top = Vec{};
        if (EXACT) shift = load(windows[q] + SHIFT * map), top = load(windows[q] + TOP * map);
        const Vec attn = power<EXACT>(tokens.e[q], factors.bias[q][o], shift, top) *
                         load(windows[q] + INVERSE * map);
        // of a window's only token exactly 0, as both were rounded alike
        const Vec own = held(slope * weight[q][o]);
        const Vec z = attn * (own - load(windows[q] + MEAN * map));
        tokens.by_score[q] += z * factors.below[q][o];
        share += attn * factors.above[q][o];
        float *bias = in.bias + (o * NQ + q) * LANES, *by_weight = in.weight + (bias - in.bias);
        store(bias, load(bias) + z);
        store(by_weight, load(by_weight) + attn * slope);
    }
    for (int c = 0; c < dim; c++) tokens.by_value[c] += share * grad[c];
}

// Gradients of rows of tokens.
template <bool EXACT, int NQ, int DIM>
void gather(const Problem &p, const Shared &shared, const Head &at, const Stats &stats,
            const Task &task, const TokenPlanes &in) {
    const Factors<EXACT, NQ> factors(p, shared, at);
    const int dim = DIM ? DIM : int(p.dim);
    const float *maps[NQ], *weight[NQ], *windows[NQ];
    for (int q = 0; q < NQ; q++) {
        maps[q] = stats.map(p, at, q);
        weight[q] = table_of(p, shared, WEIGHT, at, q);
    }
    const auto of_tokens = [&](int64_t r, int64_t phase, int64_t x) {
        const int64_t token = r * p.row() + phase * p.places + x;
        Gathered<NQ, DIM> tokens(in, token, dim);
        for (int64_t ky = 0; ky < p.kernel_h; ky++) {
            const int64_t down = task.top + r + p.padding - ky, y = down / p.stride;
            if (down < 0 || down % p.stride || y >= p.rows) continue;
            for (int64_t kx = phase; kx < p.kernel_w; kx += p.stride) {
                const int64_t place = p.lead + x - kx / p.stride;
                for (int q = 0; q < NQ; q++) windows[q] = maps[q] + y * p.stat_places + place;
                gather_offset(p, factors, weight, ky * p.kernel_w + kx, windows,
                              in.grad + (y - in.window_top) * p.stat_places + place, in, tokens);
            }
        }
        tokens.put(in, token, dim);
    };
    const int64_t base = p.padding / p.stride;
    for (int64_t r = 0; r < task.rows; r++) {
        for (int64_t phase = 0; phase < p.stride; phase++) {
            for (int64_t x = 0; x < p.token_places; x += LANES) of_tokens(r, phase, base + x);
        }
    }
}

// Sums of a task over its vectors, [2, offsets, pairs]: of bias, then of weight.
inline void put_sums(const Problem &p, const Shared &shared, const Head &at, bool exact,
                     const TokenPlanes &tokens, float *partial) {
    for (int q = 0; q < at.queries; q++) {
        const float *below = table_of(p, shared, exact ? ONES : BELOW, at, q);
        for (int64_t o = 0; o < p.offsets; o++) {
            const int64_t vector = (o * at.queries + q) * LANES, to = o * p.pairs + at.pair(p, q);
            partial[to] = below[o] * sum(load(tokens.bias + vector));
            partial[p.offsets * p.pairs + to] = below[o] * sum(load(tokens.weight + vector));
        }
    }
}

// Sum of |gradient| over tokens of a row of phases; places without a token are left out.
inline float difference(const Problem &p, const float *planes, int64_t rows) {
    float total = 0;
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t phase = 0; phase < p.stride; phase++) {
            const float *row = planes + r * p.row() + phase * p.places + p.padding / p.stride;
            total += sum_of_magnitudes(row, p.token_places);
        }
    }
    return total;
}

// Gradients of rows of tokens, and of tables as far as these tokens go; `differences` has the sum
// of |gradient of scores| of each pair. `own` is the thread's memory.
inline void gather_task(const Problem &p, const Inputs &in, const Shared &shared, const Task &task,
                        const float *grad, const Stats &stats, float *own, const Gradients &out,
                        float *partial, float *differences) {
    const TokenPlanes tokens(p, task, own);
    lay_values(p, in.value, task, task.top, task.rows, tokens.values);
    for (int64_t y = 0; y < tokens.window_rows; y++) {
        lay_grad(p, grad, task, tokens.window_top + y, p.lead, p.stat_places, tokens.window_plane,
                 tokens.grad + y * p.stat_places);
    }
    std::fill(tokens.grad_values, tokens.grad_values + p.dim * tokens.plane, 0.0f);
    each_query(p, task, [&](const Head &at) {
        const bool is_shifted = is_exact(p, shared, at);
        lay_scores(p, in, shared, at, is_shifted, task.top, task.rows, tokens.scores);
        std::fill(tokens.bias, tokens.bias + 2 * p.offset_floats(), 0.0f);
        compiled_for(p, is_shifted, at.queries, [&](auto exact, auto queries, auto dim) {
            gather<exact(), queries(), dim()>(p, shared, at, stats, task, tokens);
        });
        const Channels of{p.pairs, p.heads, at.queries};
        take(p, tokens.grad_scores, of, task.top, task.rows, out.scores + score_place(p, at));
        put_sums(p, shared, at, is_shifted, tokens, partial);
        for (int q = 0; q < at.queries; q++) {
            const float *planes = tokens.grad_scores + q * tokens.plane;
            differences[at.pair(p, q)] = difference(p, planes, task.rows);
        }
    });
    const Channels of{p.channels, 1, p.dim};
    take(p, tokens.grad_values, of, task.top, task.rows, out.value + value_place(p, task));
}

}  // namespace qna
