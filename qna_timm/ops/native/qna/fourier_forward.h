// out = sum_q N_q / D_q,   N_q[y] = sum_o exp(bias[o]) weight[o] e[y + o] value[y + o],
//                          D_q[y] = sum_o exp(bias[o]) e[y + o],   e = exp(scores - maximum)

#pragma once

#include "sums.h"

namespace qna {

// Calls `run(place, i)` for a vector's channels of an area of an image: where they are in a map, and
// their number in the area.
template <class Run>
inline void each_place(const Problem &p, const Area &area, const Lanes &lanes, Run run) {
    for (int64_t r = 0, i = 0; r < area.rows; r++) {
        int64_t place = area.row(r) * p.channels + lanes.channel;
        for (int64_t x = 0; x < area.cols; x++, place += p.channels) run(place, i++);
    }
}

inline void get_lanes(const Problem &p, const float *map, const Area &area, const Lanes &lanes,
                      Vec *to) {
    each_place(p, area, lanes, [=](int64_t place, int64_t i) {
        to[i] = load_some(map + place, lanes.count);
    });
}

// Transforms rows of e value; returns sums of its squares and of those of e.
template <int HEADS>
std::pair<Vec, Vec> transform_weighted(const Fourier &f, const Desk &at, const Tile &tile,
                                       const float *attn, const Lanes &lanes) {
    Vec square = Vec{}, attn_square = Vec{};
    const Area &area = tile.tokens;
    const auto weighted = [&](int64_t r, auto put) {
        const float *e = attn + area.row(r);
        const Vec *value = at.tokens + r * area.cols;
        for (int64_t x = 0; x < area.cols; x++) {
            const Vec own = spread<HEADS>(e + x, f.attn.plane, lanes), both = value[x] * own;
            square += both * both;
            attn_square += own * own;
            put(x, both);
        }
    };
    transform_rows(at, tile.down.tokens, tile.across.tokens, at.plane, weighted);
    return {square, attn_square};
}

// What the spectrum of channels of a group's heads is multiplied by, from their first pair on.
template <int HEADS> struct Above {
    const Scalar *of;
    int64_t spectrum;
    const Lanes &lanes;

    Above(const Fourier &f, int64_t pair, const Lanes &lanes)
        : of(f.above + pair * f.grid.spectrum), spectrum(f.grid.spectrum), lanes(lanes) {}

    auto operator()(int64_t i) const {
        if constexpr (HEADS == 1) {
            return of[i];
        } else {
            return Complex{spread<HEADS>(&of[i].re, 2 * spectrum, lanes),
                           spread<HEADS>(&of[i].im, 2 * spectrum, lanes)};
        }
    }
};

// What came of transforms for each channel: squares of what went in, the largest magnitude of N / D.
struct Found {
    Vec square, top;

    // The largest of each head; what is no number stays.
    void put(const Lanes &lanes, Magnitudes *heads) const {
        for (int64_t n = 0; n < lanes.count; n++) {
            Magnitudes &of = heads[lanes.own[n]];
            if (!std::isnan(of.weighted) && !(of.weighted >= square[n])) of.weighted = square[n];
            of.top = std::max(of.top, top[n]);
        }
    }
};

// Adds what a query finds for channels of a tile's tokens to those of its windows.
template <int HEADS>
Found attend_lanes(const Fourier &f, const Desk &at, const Tile &tile, int64_t image, int64_t pair,
                   const Lanes &lanes) {
    const Area &area = tile.windows;
    const Vec square = transform_weighted<HEADS>(f, at, tile, f.attn.at(image, pair), lanes).first;
    filter(at, tile.down.tokens, at.plane, Above<HEADS>(f, pair, lanes));
    Vec top = Vec{};
    const auto add = [&](int64_t y, auto sums) {
        const float *inverse = f.inverse.at(image, pair) + area.row(y);
        Vec *to = at.windows + y * area.cols;
        for (int64_t x = 0; x < area.cols; x++) {
            const Vec own = sums(x) * spread<HEADS>(inverse + x, f.inverse.plane, lanes);
            top = larger(top, magnitude(own));
            to[x] += own;
        }
    };
    transform_rows_back(at, tile.down.windows, tile.across.windows, at.plane, add);
    return {square, top};
}

template <int HEADS>
void attend_group(const Fourier &f, const Desk &at, const Inputs &in, int64_t image,
                  const Group &group, float *out) {
    const Problem &p = f.p;
    const float *value = in.value + image * p.height * p.width * p.channels;
    float *tops = f.tops + image * p.heads + group.head;
    out += image * p.rows * p.cols * p.channels;
    std::fill(tops, tops + group.heads, 0.0f);
    const auto attend = [&](const Tile &tile, const Lanes &lanes) {
        get_lanes(p, value, tile.tokens, lanes, at.tokens);
        std::fill(at.windows, at.windows + tile.windows.count(), Vec{});
        for (int64_t query = 0; query < p.queries; query++) {
            const int64_t pair = f.pair(group, query);
            attend_lanes<HEADS>(f, at, tile, image, pair, lanes)
                .put(lanes, f.magnitudes + image * p.pairs + pair);
        }
        Vec top = Vec{};
        each_place(p, tile.windows, lanes, [&](int64_t place, int64_t i) {
            top = larger(top, magnitude(at.windows[i]));
            store_some(out + place, at.windows[i], lanes.count);
        });
        for (int64_t n = 0; n < lanes.count; n++) {
            tops[lanes.own[n]] = std::max(tops[lanes.own[n]], top[n]);
        }
    };
    for (int64_t vector = 0; vector < f.vectors; vector++) {
        const Lanes lanes = f.lanes(group, vector);
        f.grid.each_tile(p, [&](const Tile &tile) { attend(tile, lanes); });
    }
}

// Whether errors of N and D, of all queries, are small beside a head's output.
inline bool is_precise(const Fourier &f, int64_t image, int64_t head) {
    const float top = f.tops[image * f.p.heads + head];
    float error = 0;
    for (int64_t pair = head; pair < f.p.pairs; pair += f.p.heads) {
        const Magnitudes &of = f.magnitudes[image * f.p.pairs + pair];
        if (of.weighted == 0 && of.top == 0) continue;
        if (!is_sound(of.weighted)) return false;
        const float norm = std::sqrt(of.weighted) * f.above_norm[pair];
        error += norm * f.grid.noise() * PEAK / of.least_sum + of.sum_error * of.top;
    }
    return error <= OUT_TOLERANCE * top;
}

// Marks heads [batch, heads] that are left to be computed directly.
inline void forward_by_transforms(const Fourier &f, const Inputs &in, const Shared &shared,
                                  float *out, int8_t *left) {
    const Problem &p = f.p;
    find_sums(f, in, shared, false);
    mark_lost(f, shared, left);
    each_desk(f, false, p.batch * f.groups, [&](const Desk &at, int64_t i) {
        const int64_t image = i / f.groups;
        const Group group = f.group(i % f.groups);
        if (all_left(left + image * p.heads + group.head, group.heads)) return;
        for_heads(group, [&](auto heads) {
            attend_group<heads()>(f, at, in, image, group, out);
        });
    });
    for (int64_t i = 0; i < p.batch * p.heads; i++) {
        if (!left[i]) left[i] = !is_precise(f, i / p.heads, i % p.heads);
    }
}

}  // namespace qna
