// Gradients, with a[o] the attention and g[y] the gradient of the output:
//
//     t[o] = <g[y], v[y+o]>,  p[o] = e[o] / sum_o (m + floor) e,  mean = sum_o m p t
//     z[o] = p[o] (m t[o] - (m + floor) mean)          of the score
//
//     query  : scale sum_o z (k[y+o] + rel_pos[o])     rel_pos : sum_y z query, by row and column
//     key    : sum_o z[t-o] query[t-o]                 mask    : sum_y p (t - mean)
//     value  : sum_o m p[t-o] g[t-o]
//
// Queries come first and leave z and m p of their windows, from which tokens gather.

#pragma once

#include "scores.h"

namespace span {

struct Gradients {
    float *qkv, *partials;
};

// Planes of a task: its own rows and `radius` more on both sides, where there are any.
struct Around {
    int64_t top, end, before;  // queries; rows before the first that are not on the map

    Around(const Problem &p, const Task &task)
        : top(std::max<int64_t>(0, task.top - p.radius)),
          end(std::min(p.height, task.top + task.rows + p.radius)),
          before(top - (task.top - p.radius)) {}

    // Where row y begins in a plane that begins a radius before the task's own rows.
    int64_t place(const Problem &p, int64_t y) const {
        return p.radius + (before + y - top) * p.pitch;
    }
};

// A thread's memory in parts.
struct BackwardRoom {
    Vec *scores, *slopes, *sides, *grad_mask;
    float *query, *grad, *grad_query, *grad_keys, *grad_values;
    float *sums;  // of z by row and column
    float *by_score, *by_value, *seen;
    int64_t plane, wide_plane, floats;

    // For `rows` of tokens; at `start`, or with null only how many floats it takes.
    BackwardRoom(const Problem &p, int64_t rows, float *start)
        : plane(p.plane(rows)), wide_plane(p.seen_plane(rows)) {
        Parts from(start);
        scores = from.take_vectors(p.offsets);
        slopes = from.take_vectors(p.offsets);
        grad_mask = from.take_vectors(p.offsets);
        sides = from.take_vectors(2 * p.kernel);
        query = from.take(p.wide * wide_plane);
        grad = from.take(p.wide * wide_plane);
        grad_query = from.take(p.wide * plane);
        grad_keys = from.take(p.wide * plane);
        grad_values = from.take(p.wide * plane);
        sums = from.take(2 * p.kernel * plane);
        by_score = from.take(p.offsets * wide_plane);
        by_value = from.take(p.offsets * wide_plane);
        seen = from.take(seen_floats(p, std::min(p.height, rows + 2 * p.radius)));
        floats = from.floats;
    }
};

// 1 for as many lanes as are left, else 0.
inline Vec lanes(int64_t left) {
    Vec kept;
    for (int i = 0; i < LANES; i++) kept[i] = i < left ? 1.0f : 0.0f;
    return kept;
}

// Of the queries at place x of their planes whose windows begin at place `at`: e to scores, t to
// slopes, one over the sum of (m + floor) e to `inverse`. Returns the mean.
template <int CHUNK>
inline Vec find_slopes(const Problem &p, const Head &head, const BackwardRoom &room,
                       const Seen &seen, int64_t x, int64_t at, Vec *inverse) {
    const size_t count = head.offsets.size();
    const float *query = room.query + x, *grad = room.grad + x;
    Vec *scores = room.scores, *slopes = room.slopes;
    const Vec top =
        find_scores<CHUNK>(p, head, query, room.wide_plane, seen, at, room.sides, scores);
    std::fill(slopes, slopes + count, Vec{});
    add_products<CHUNK>(p, head, grad, room.wide_plane, seen.values + at, seen.plane, slopes);
    Vec total = Vec{}, mean = Vec{};
    for (size_t i = 0; i < count; i++) {
        scores[i] = exp_of_negative(scores[i] - top);
        total += scores[i] * head.offsets[i].part;
        mean += scores[i] * head.offsets[i].mask * slopes[i];
    }
    *inverse = 1.0f / total;
    mean *= *inverse;
    return mean;
}

// Rows of queries from `first` to `last`; where they are a task's own, with their gradients.
template <int CHUNK>
void measure(const Problem &p, const Head &head, const BackwardRoom &room, const Seen &seen,
             const Around &around, int64_t first, int64_t last, bool own) {
    const int64_t start = around.place(p, first), floats = (last - first) * p.pitch;
    const size_t count = head.offsets.size(), weighed = head.weighed;
    for (int64_t i = 0; i < floats; i += LANES) {
        const int64_t x = start + i, at = (first - around.top) * p.pitch + i;
        Vec inverse;
        const Vec mean = find_slopes<CHUNK>(p, head, room, seen, x, at, &inverse);
        const Vec kept = lanes(floats - i);
        if (own) std::fill(room.sides, room.sides + 2 * p.kernel, Vec{});
        for (size_t j = 0; j < count; j++) {
            const Offset &o = head.offsets[j];
            const Vec power = room.scores[j] * inverse, slope = room.slopes[j];
            const Vec z = power * (o.mask * slope - o.part * mean);
            store(room.by_score + j * room.wide_plane + x, z);
            if (j < weighed) store(room.by_value + j * room.wide_plane + x, power * o.mask);
            if (!own) continue;
            room.scores[j] = z;
            room.sides[o.row] += z;
            room.sides[p.kernel + o.col] += z;
            room.grad_mask[j] += kept * power * (slope - mean);
        }
        if (!own) continue;
        for (int64_t j = 0; j < 2 * p.kernel; j++) {
            store(room.sums + j * room.plane + i, kept * room.sides[j]);
        }
        for (int64_t c = 0; c < p.wide; c += CHUNK) {
            Vec sums[CHUNK] = {};
            for (int64_t j = 0; j < 2 * p.kernel; j++) {
                const float *vector = head.rel_pos + j * p.wide + c;
                for (int k = 0; k < CHUNK; k++) sums[k] += room.sides[j] * vector[k];
            }
            add_weighted<CHUNK>(
                head, count, seen.keys + c * seen.plane + at, seen.plane,
                [&](size_t j) { return room.scores[j]; }, [](const Offset &o) { return o.seen; },
                sums);
            float *to = room.grad_query + c * room.plane + i;
            for (int k = 0; k < CHUNK; k++) store(to + k * room.plane, sums[k]);
        }
    }
}

// No query, no weight: a plane that queries have left for tokens, around the map's rows.
inline void close(const Problem &p, const BackwardRoom &room, const Around &around, float *plane) {
    float *after = plane;
    for (int64_t y = around.top; y < around.end; y++) {
        float *row = plane + around.place(p, y);
        std::fill(after, row, 0.0f);
        after = row + p.width;
    }
    std::fill(after, plane + room.wide_plane, 0.0f);
}

// Sums over a task's tokens of weights that offsets have left in planes times other planes.
template <int CHUNK>
void gather(const Problem &p, const Head &head, size_t count, const BackwardRoom &room,
            const float *weights, const float *planes, int64_t floats, float *to) {
    for (int64_t x = 0; x < floats; x += LANES) {
        for (int64_t first = 0; first < p.wide; first += CHUNK) {
            Vec sums[CHUNK] = {};
            add_weighted<CHUNK>(
                head, count, planes + first * room.wide_plane + x, room.wide_plane,
                [&](size_t i) {
                    return load(weights + i * room.wide_plane + x + head.offsets[i].seeing);
                },
                [](const Offset &o) { return o.seeing; }, sums);
            for (int c = 0; c < CHUNK; c++) store(to + (first + c) * room.plane + x, sums[c]);
        }
    }
}

// Gradients of a head's tables from a task's own queries, whose first place is `start`.
template <int CHUNK>
void find_tables(const Problem &p, const Head &head, const BackwardRoom &room, int64_t start,
                 int64_t floats, float *partial) {
    for (int64_t j = 0; j < 2 * p.kernel; j++) {
        for (int64_t first = 0; first < p.wide; first += CHUNK) {
            const float *query = room.query + first * room.wide_plane + start;
            Vec sums[CHUNK] = {};
            for (int64_t x = 0; x < floats; x += LANES) {
                const Vec z = load(room.sums + j * room.plane + x);
                const float *of_query = query + x;
                for (int c = 0; c < CHUNK; c++) sums[c] += z * load(of_query + c * room.wide_plane);
            }
            for (int c = 0; c < CHUNK; c++) partial[j * p.wide + first + c] = sum(sums[c]);
        }
    }
    float *mask = partial + 2 * p.kernel * p.wide;
    std::fill(mask, mask + p.offsets, 0.0f);
    for (size_t i = 0; i < head.offsets.size(); i++) {
        mask[head.offsets[i].index] = sum(room.grad_mask[i]);
    }
}

// Rows of tokens and queries of a head; `own` is the thread's memory.
template <int CHUNK>
void backward_task(const Problem &p, const Inputs &in, const Head &head, const Task &task,
                   const float *grad, float *own, const Gradients &out) {
    const BackwardRoom room(p, task.rows, own);
    const Around around(p, task);
    const int64_t all = task.rows + 2 * p.radius, above = task.top - p.radius;
    const int64_t end = task.top + task.rows, floats = task.rows * p.pitch;
    const int64_t first = task.head * p.dim, place = task.image * p.image(p.token()) + first;
    const float *grads = grad + task.image * p.image(p.channels) + first;
    lay(p, in.qkv + place, p.token(), above, all, p.radius, room.wide_plane, room.query);
    lay(p, grads, p.channels, above, all, p.radius, room.wide_plane, room.grad);
    multiply(room.query, p.wide * room.wide_plane, in.scale);
    const Seen seen = lay_seen(p, in, task, around.top, around.end - around.top, room.seen);
    std::fill(room.grad_mask, room.grad_mask + head.offsets.size(), Vec{});
    measure<CHUNK>(p, head, room, seen, around, around.top, task.top, false);
    measure<CHUNK>(p, head, room, seen, around, task.top, end, true);
    measure<CHUNK>(p, head, room, seen, around, end, around.end, false);
    const size_t count = head.offsets.size(), weighed = head.weighed;
    for (size_t i = 0; i < count; i++) {
        close(p, room, around, room.by_score + i * room.wide_plane);
        if (i < weighed) close(p, room, around, room.by_value + i * room.wide_plane);
    }
    gather<CHUNK>(p, head, count, room, room.by_score, room.query, floats, room.grad_keys);
    gather<CHUNK>(p, head, weighed, room, room.by_value, room.grad, floats, room.grad_values);
    find_tables<CHUNK>(p, head, room, around.place(p, task.top), floats,
                       out.partials + task.index * p.partial());
    multiply(room.grad_query, p.wide * room.plane, in.scale);
    float *to = out.qkv + place;
    for (const float *planes : {room.grad_query, room.grad_keys, room.grad_values}) {
        take(p, planes, room.plane, p.token(), task.top, task.rows, to);
        to += p.channels;
    }
}

}  // namespace span
