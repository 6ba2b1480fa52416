// out[y] = sum_o m[o] e[o] v[y+o] / sum_o (m[o] + floor[o]) e[o]

#pragma once

#include "scores.h"

namespace span {

// A thread's memory in parts.
struct ForwardRoom {
    Vec *scores, *sides;
    float *query, *found, *seen;
    int64_t plane, floats;

    // For `rows` of queries; at `start`, or with null only how many floats it takes.
    ForwardRoom(const Problem &p, int64_t rows, float *start) : plane(p.plane(rows)) {
        Parts from(start);
        scores = from.take_vectors(p.offsets);
        sides = from.take_vectors(2 * p.kernel);
        query = from.take(p.wide * plane);
        found = from.take(p.wide * plane);
        seen = from.take(seen_floats(p, rows));
        floats = from.floats;
    }
};

// Rows of queries of a head; `own` is the thread's memory.
template <int CHUNK>
void forward_task(const Problem &p, const Inputs &in, const Head &head, const Task &task,
                  float *own, float *out) {
    const ForwardRoom room(p, task.rows, own);
    const int64_t plane = room.plane;
    Vec *scores = room.scores;
    const Seen seen = lay_seen(p, in, task, task.top, task.rows, room.seen);
    const float *image = in.qkv + task.image * p.image(p.token());
    lay(p, image + task.head * p.dim, p.token(), task.top, task.rows, 0, plane, room.query);
    multiply(room.query, p.wide * plane, in.scale);
    const size_t count = head.offsets.size(), weighed = head.weighed;
    for (int64_t x = 0; x < task.rows * p.pitch; x += LANES) {
        const Vec top =
            find_scores<CHUNK>(p, head, room.query + x, plane, seen, x, room.sides, scores);
        Vec total = Vec{};
        for (size_t i = 0; i < count; i++) {
            const Vec power = exp_of_negative(scores[i] - top);
            total += power * head.offsets[i].part;
            scores[i] = power * head.offsets[i].mask;
        }
        const Vec inverse = 1.0f / total;
        for (int64_t first = 0; first < p.wide; first += CHUNK) {
            Vec sums[CHUNK] = {};
            add_weighted<CHUNK>(
                head, weighed, seen.values + first * seen.plane + x, seen.plane,
                [&](size_t i) { return scores[i]; }, [](const Offset &o) { return o.seen; }, sums);
            float *to = room.found + first * plane + x;
            for (int c = 0; c < CHUNK; c++) store(to + c * plane, sums[c] * inverse);
        }
    }
    out += task.image * p.image(p.channels) + task.head * p.dim;
    take(p, room.found, plane, p.channels, task.top, task.rows, out);
}

}  // namespace span
