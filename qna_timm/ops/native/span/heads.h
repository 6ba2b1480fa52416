// What queries of a head see: offsets of a window with their weights, relative vectors, and rows of
// tokens as planes.

#pragma once

#include <vector>

#include "problem.h"

namespace span {

// Added to a score takes the offset out of the softmax, unless there is no other: a number, since
// queries between rows, which see nothing, must not leave a NaN.
constexpr float OUT = -1e30f;

struct Inputs {
    const float *qkv, *rel_pos_h, *rel_pos_w, *mask, *floor;
    float scale;
};

// Of a window: from the query's place the token's in planes that begin a radius before, and from
// the token's place the query's.
struct Offset {
    int64_t index, row, col, seen, seeing;
    float mask, part;  // weight in the output, and in the denominator
};

struct Head {
    // Offsets that take part; the first `weighed` in the output too.
    std::vector<Offset> offsets;
    int64_t weighed;
    const float *rel_pos;  // of rows, then of columns: [2 * kernel, wide]
};

inline Head make_head(const Problem &p, const Inputs &in, int64_t head, float *rel_pos) {
    Head made{{}, 0, rel_pos};
    for (const bool weighed : {true, false}) {
        for (int64_t o = 0; o < p.offsets; o++) {
            const float mask = in.mask ? in.mask[head * p.offsets + o] : 1.0f;
            const float part = in.floor ? mask + in.floor[o] : mask;
            if (part == 0.0f || (mask != 0.0f) != weighed) continue;
            const int64_t row = o / p.kernel, col = o % p.kernel, last = p.kernel - 1;
            made.offsets.push_back({o, row, col, row * p.pitch + col,
                                    (last - row) * p.pitch + last - col, mask, part});
        }
        if (weighed) made.weighed = int64_t(made.offsets.size());
    }
    for (int64_t i = 0; i < 2 * p.kernel; i++) {
        const float *table = i < p.kernel ? in.rel_pos_h : in.rel_pos_w;
        for (int64_t c = 0; c < p.wide; c++) {
            const int64_t place = (head * p.dim + c) * p.kernel + i % p.kernel;
            rel_pos[i * p.wide + c] = c < p.dim ? table[place] : 0.0f;
        }
    }
    return made;
}

inline std::vector<Head> make_heads(const Problem &p, const Inputs &in, float *rel_pos) {
    std::vector<Head> heads;
    for (int64_t head = 0; head < p.heads; head++, rel_pos += 2 * p.kernel * p.wide) {
        heads.push_back(make_head(p, in, head, rel_pos));
    }
    return heads;
}

// Planes of a head's channels with rows of tokens from `top` on, the first at place `start`; 0
// where there is no token. `map` is at the head's channels of an image.
inline void lay(const Problem &p, const float *map, int64_t token, int64_t top, int64_t rows,
                int64_t start, int64_t plane, float *planes) {
    std::fill(planes, planes + p.wide * plane, 0.0f);
    for (int64_t y = std::max<int64_t>(top, 0); y < std::min(top + rows, p.height); y++) {
        to_planes(map + y * p.width * token, token, 1, p.width, p.dim,
                  planes + start + (y - top) * p.pitch, plane);
    }
}

// The way back of rows of tokens on the map.
inline void take(const Problem &p, const float *planes, int64_t plane, int64_t token, int64_t top,
                 int64_t rows, float *map) {
    for (int64_t r = 0; r < rows; r++) {
        from_planes(planes + r * p.pitch, plane, p.width, p.dim, map + (top + r) * p.width * token,
                    token, 1);
    }
}

inline void multiply(float *planes, int64_t floats, float factor) {
    for (int64_t i = 0; i < floats; i++) planes[i] *= factor;
}

// Planes that rows of queries see; the first query's window begins at place 0.
struct Seen {
    const float *keys, *values, *outside;  // what is added to scores, or null
    int64_t plane;
};

inline int64_t seen_floats(const Problem &p, int64_t rows) {
    return (2 * p.wide + p.mask_padding) * p.seen_plane(rows);
}

// Of `rows` of queries from `top` on, in `seen_floats` of memory.
inline Seen lay_seen(const Problem &p, const Inputs &in, const Task &task, int64_t top,
                     int64_t rows, float *memory) {
    const int64_t plane = p.seen_plane(rows), all = rows + 2 * p.radius, first = top - p.radius;
    const float *qkv = in.qkv + task.image * p.image(p.token()) + task.head * p.dim;
    float *keys = memory, *values = keys + p.wide * plane, *outside = values + p.wide * plane;
    lay(p, qkv + p.channels, p.token(), first, all, p.radius, plane, keys);
    lay(p, qkv + 2 * p.channels, p.token(), first, all, p.radius, plane, values);
    if (!p.mask_padding) return {keys, values, nullptr, plane};
    std::fill(outside, outside + plane, OUT);
    for (int64_t y = std::max<int64_t>(first, 0); y < std::min(first + all, p.height); y++) {
        float *row = outside + p.radius + (y - first) * p.pitch;
        std::fill(row, row + p.width, 0.0f);
    }
    return {keys, values, outside, plane};
}

}  // namespace span
