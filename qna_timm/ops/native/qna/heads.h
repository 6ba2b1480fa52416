// What windows are computed from: factors of their offsets, maxima of maps, and rows of maps as
// planes.

#pragma once

#include <cmath>

#include "problem.h"

namespace qna {

// Range of scores and bias of a map up to which one maximum serves it all: a factor of e^-40 or
// e^40 leaves gradients and values of ordinary size ordinary numbers. Beyond, every window is
// shifted by its own.
constexpr float SHARED_RANGE = 40.0f;

// Factors of an offset: with one maximum for a map, and with one for each window.
enum Table { BELOW, ABOVE, BIAS, ONES, WEIGHT, TABLES };

struct Inputs {
    const float *scores, *value, *bias, *weight;
    int64_t weight_rows;
};

// What all tasks read.
struct Shared {
    const float *tables;  // [TABLES, heads, queries, offsets]
    const float *shifts;  // maxima of maps, [batch, queries, heads]
    int8_t *exact;        // whether windows have maxima of their own, likewise
};

// A head of an image, and two queries of it at most.
struct Head {
    int64_t image, head, query;
    int queries;

    int64_t pair(const Problem &p, int q = 0) const { return (query + q) * p.heads + head; }
};

// Calls `run(head)` for the queries of a head, two at a time.
template <class Run> void each_query(const Problem &p, const Task &task, Run run) {
    for (int64_t query = 0; query < p.queries; query += 2) {
        run(Head{task.image, task.head, query, query + 1 < p.queries ? 2 : 1});
    }
}

inline const float *table_of(const Problem &p, const Shared &shared, Table table, const Head &at,
                             int q) {
    const int64_t query = at.query + q;
    return shared.tables + ((table * p.heads + at.head) * p.queries + query) * p.offsets;
}

inline bool is_exact(const Problem &p, const Shared &shared, const Head &at) {
    const int8_t *exact = shared.exact + at.image * p.pairs;
    return exact[at.pair(p)] || exact[at.pair(p, at.queries - 1)];
}

// Tables of a pair of query and head, `step` apart, and the range of its bias.
inline float make_tables(const Problem &p, const Inputs &in, int64_t pair, int64_t step,
                         float *tables) {
    const auto bias = [&](int64_t o) { return in.bias ? in.bias[o * p.pairs + pair] : 0.0f; };
    float low = bias(0), high = bias(0);
    for (int64_t o = 1; o < p.offsets; o++) {
        low = std::min(low, bias(o));
        high = std::max(high, bias(o));
    }
    for (int64_t o = 0; o < p.offsets; o++) {
        const int64_t row = in.weight_rows > 1 ? o : 0;
        const float weight = in.weight ? in.weight[row * p.pairs + pair] : 1.0f;
        const float below = std::exp(bias(o) - high);
        tables[BELOW * step + o] = below;
        tables[ABOVE * step + o] = below * weight;
        tables[BIAS * step + o] = bias(o);
        tables[ONES * step + o] = 1.0f;
        tables[WEIGHT * step + o] = weight;
    }
    return high - low;
}

inline void make_all_tables(const Problem &p, const Inputs &in, float *tables, float *ranges) {
    for (int64_t pair = 0; pair < p.pairs; pair++) {
        const int64_t head = pair % p.heads, query = pair / p.heads;
        float *own = tables + (head * p.queries + query) * p.offsets;
        ranges[pair] = make_tables(p, in, pair, p.pairs * p.offsets, own);
    }
}

// The maximum of each map of an image's scores, and whether the map spreads too far for it.
inline void find_shifts(const Problem &p, const float *scores, const float *ranges, float *low,
                        float *high, int8_t *exact) {
    std::copy(scores, scores + p.pairs, low);
    std::copy(scores, scores + p.pairs, high);
    for (int64_t t = 1; t < p.height * p.width; t++) {
        const float *token = scores + t * p.pairs;
        for (int64_t pair = 0; pair < p.pairs; pair++) {
            low[pair] = token[pair] < low[pair] ? token[pair] : low[pair];
            high[pair] = token[pair] > high[pair] ? token[pair] : high[pair];
        }
    }
    for (int64_t pair = 0; pair < p.pairs; pair++) {
        const float range = high[pair] - low[pair] + ranges[pair];
        exact[pair] = !(range <= SHARED_RANGE);  // also where it is not a number
    }
}

// Tokens of a row that lie in one phase of it: `count` of them, `stride` apart from `first` on, at
// `place` and after.
struct Phase {
    int64_t first, place, count;

    Phase(const Problem &p, int64_t phase) {
        first = (phase + p.stride - p.padding % p.stride) % p.stride;
        place = (first + p.padding) / p.stride;
        count = first < p.width ? parts(p.width - first, p.stride) : 0;
    }
};

// Channels of a map's tokens: channel c of token t of an image is at t * token + c * step.
struct Channels {
    int64_t token, step, count;
};

// Planes of rows of an image's tokens from `top` on, `empty` where there is no token.
inline void lay(const Problem &p, const float *map, const Channels &of, int64_t top, int64_t rows,
                float empty, float *planes) {
    const int64_t plane = p.plane(rows);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t t = top + r;
        for (int64_t phase = 0; phase < p.stride; phase++) {
            const Phase at(p, phase);
            const int64_t tokens = t < 0 || t >= p.height ? 0 : at.count;
            float *row = planes + r * p.row() + phase * p.places;
            for (int64_t c = 0; c < of.count; c++) {
                float *own = row + c * plane;
                std::fill(own, own + at.place, empty);
                std::fill(own + at.place + tokens, own + p.places, empty);
            }
            if (!tokens) continue;
            to_planes(map + (t * p.width + at.first) * of.token, of.token * p.stride, of.step,
                      tokens, of.count, row + at.place, plane);
        }
    }
}

// The way back.
inline void take(const Problem &p, const float *planes, const Channels &of, int64_t top,
                 int64_t rows, float *map) {
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t phase = 0; phase < p.stride; phase++) {
            const Phase at(p, phase);
            if (!at.count) continue;
            from_planes(planes + r * p.row() + phase * p.places + at.place, p.plane(rows), at.count,
                        of.count, map + ((top + r) * p.width + at.first) * of.token,
                        of.token * p.stride, of.step);
        }
    }
}

// Where a head's values, or gradients of them, begin.
inline int64_t value_place(const Problem &p, const Task &task) {
    return task.image * p.height * p.width * p.channels + task.head * p.dim;
}

inline int64_t score_place(const Problem &p, const Head &at) {
    return at.image * p.height * p.width * p.pairs + at.pair(p);
}

inline void lay_values(const Problem &p, const float *value, const Task &task, int64_t top,
                       int64_t rows, float *planes) {
    lay(p, value + value_place(p, task), {p.channels, 1, p.dim}, top, rows, 0.0f, planes);
}

// e^(score - shift) and 0 off the map, or where windows have maxima of their own the scores and
// -inf.
inline void lay_scores(const Problem &p, const Inputs &in, const Shared &shared, const Head &at,
                       bool exact, int64_t top, int64_t rows, float *planes) {
    const Channels of{p.pairs, p.heads, at.queries};
    lay(p, in.scores + score_place(p, at), of, top, rows, -INFINITY, planes);
    if (exact) return;
    for (int q = 0; q < at.queries; q++) {
        const float shift = shared.shifts[at.image * p.pairs + at.pair(p, q)];
        float *to = planes + q * p.plane(rows);
        for (int64_t i = 0; i < rows * p.row(); i += LANES) {
            store(to + i, exp_of_negative(load(to + i) - shift));
        }
    }
}

}  // namespace qna
