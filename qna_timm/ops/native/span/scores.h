// Scores of windows, neighbouring ones in a vector.

#pragma once

#include "heads.h"

namespace span {

template <int CHUNK> inline void load_chunk(const float *planes, int64_t plane, Vec *to) {
    for (int c = 0; c < CHUNK; c++) to[c] = load(planes + c * plane);
}

// Adds to `sums`, one for each offset, products of the vectors at `own` with those of the tokens.
template <int CHUNK>
inline void add_products(const Problem &p, const Head &head, const float *own, int64_t own_plane,
                         const float *seen, int64_t seen_plane, Vec *sums) {
    for (int64_t first = 0; first < p.wide; first += CHUNK) {
        Vec x[CHUNK];
        load_chunk<CHUNK>(own + first * own_plane, own_plane, x);
        const float *planes = seen + first * seen_plane;
        for (size_t i = 0; i < head.offsets.size(); i++) {
            const float *other = planes + head.offsets[i].seen;
            Vec total = sums[i];
            for (int c = 0; c < CHUNK; c++) total += x[c] * load(other + c * seen_plane);
            sums[i] = total;
        }
    }
}

// Adds for every channel the sum over the first `count` offsets of weights times the channel of
// tokens that are `shift(offset)` away.
template <int CHUNK, class Weight, class Shift>
inline void add_weighted(const Head &head, size_t count, const float *planes, int64_t plane,
                         Weight weight, Shift shift, Vec *sums) {
    for (size_t i = 0; i < count; i++) {
        const float *from = planes + shift(head.offsets[i]);
        const Vec w = weight(i);
        for (int c = 0; c < CHUNK; c++) sums[c] += w * load(from + c * plane);
    }
}

// Of the queries at place x with the relative vectors of a window's rows and columns.
template <int CHUNK>
inline void find_sides(const Problem &p, const Head &head, const float *query, int64_t plane,
                       Vec *sides) {
    for (int64_t j = 0; j < 2 * p.kernel; j++) sides[j] = Vec{};
    for (int64_t first = 0; first < p.wide; first += CHUNK) {
        Vec x[CHUNK];
        load_chunk<CHUNK>(query + first * plane, plane, x);
        for (int64_t j = 0; j < 2 * p.kernel; j++) {
            const float *vector = head.rel_pos + j * p.wide + first;
            Vec total = sides[j];
            for (int c = 0; c < CHUNK; c++) total += x[c] * vector[c];
            sides[j] = total;
        }
    }
}

// Scores of the offsets that take part, of the queries at place x, and their maxima; `query` is at
// the queries in their own planes. `sides` is spent.
template <int CHUNK>
inline Vec find_scores(const Problem &p, const Head &head, const float *query, int64_t plane,
                       const Seen &seen, int64_t x, Vec *sides, Vec *scores) {
    find_sides<CHUNK>(p, head, query, plane, sides);
    for (size_t i = 0; i < head.offsets.size(); i++) {
        const Offset &o = head.offsets[i];
        scores[i] = sides[o.row] + sides[p.kernel + o.col];
        if (seen.outside) scores[i] += load(seen.outside + x + o.seen);
    }
    add_products<CHUNK>(p, head, query, plane, seen.keys + x, seen.plane, scores);
    Vec top = splat(OUT);
    for (size_t i = 0; i < head.offsets.size(); i++) top = larger(top, scores[i]);
    return top;
}

}  // namespace span
