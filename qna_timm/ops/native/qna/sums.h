// What forward and backward by transforms share: memory, transforms of tables, and D of all windows.

#pragma once

#include "../planes.h"
#include "fourier.h"
#include "windows.h"

namespace qna {

// What decides between transforms and direct sums: time for a unit of `Grid::cost` over that for an
// offset of a window and a channel of it; what a window takes besides, in offsets; and how many
// times as long windows apart take, and heads that fill more registers than there are. Measured with
// AVX-512 and AVX2, which agree.
struct Cost {
    double transform, window, strided, wide;
};
constexpr Cost FORWARD_COST = {0.42, 20, 2.5, 2}, BACKWARD_COST = {0.2, 0, 1.5, 2};
constexpr int64_t WIDE_HEAD = 16;

// Channels of a head, or of as many whole heads as a vector holds.
struct Group {
    int64_t head, heads, channel, channels;
};

// A vector's channels of a group; `own` tells which of its heads each belongs to.
struct Lanes {
    int64_t channel, count, heads;
    IntVec own;
};

// A number of each pair for each token, or window: pairs are `plane` numbers apart.
struct Planes {
    float *numbers;
    int64_t plane, pairs;

    float *at(int64_t image, int64_t pair) const { return numbers + (image * pairs + pair) * plane; }
};

// What errors of a pair's sums in an image follow from; squares of norms but for the first three. They
// are of a tile: errors do not go beyond it.
struct Magnitudes {
    float least_sum, sum_error;  // D, and how far it may be off there, as a part of it
    float top;                   // the largest |N / D|
    float attn;                  // of e, of the largest tile
    float weighted;              // of e value: of the largest tile and channel, in backward all
    float grads;                 // of dN, all
    // Sums over tiles and channels of products of two, and of gradients of scores: what comes from N,
    // from D, and both.
    double weighted_grads, attn_grads, attn_below, by_value, by_total, total;
};

struct Fourier {
    const Problem &p;
    Grid grid;
    int64_t packs, wide;  // vectors of pairs, and as many pairs
    int64_t group_heads, groups, vectors, chunks;
    int threads;
    Planes attn, inverse, slopes, by_score;
    Complex *below;   // of tables, [packs, spectrum]
    Scalar *above;    // and of those for N, [pairs, spectrum]
    float *below_norm, *above_norm, *tops, *grad_values;
    Magnitudes *magnitudes;                  // [batch, pairs]
    float *above_products, *below_products;  // [chunks, spectrum, re and im, wide]
    float *own, *down_roots, *across_roots;
    int64_t own_floats, floats;

    // In the caller's memory, or with null only how many floats it takes.
    Fourier(const Problem &p, bool backward, int most_threads, float *start)
        : p(p), grid(p), packs(parts(p.pairs, LANES)), wide(packs * LANES),
          group_heads(std::min(p.heads, std::max<int64_t>(1, LANES / p.dim))),
          groups(parts(p.heads, group_heads)), vectors(parts(group_heads * p.dim, LANES)),
          chunks(parts(p.batch, IMAGES_AT_ONCE)) {
        threads = needed(most_threads, p.batch * std::max(packs, groups));
        Parts from(start);
        const auto planes = [&](int64_t count, bool is_used) {
            const int64_t plane = apart(count);
            return Planes{from.take(is_used ? p.batch * wide * plane : 0), plane, wide};
        };
        attn = planes(p.height * p.width, true);
        inverse = planes(p.rows * p.cols, true);
        slopes = planes(p.rows * p.cols, backward);
        by_score = planes(p.height * p.width, backward);
        below = take_complex(from, packs * grid.spectrum);
        above = reinterpret_cast<Scalar *>(from.take(2 * p.pairs * grid.spectrum));
        below_norm = from.take(p.pairs);
        above_norm = from.take(p.pairs);
        tops = from.take(p.batch * p.heads);
        grad_values = from.take(p.batch * p.heads);
        const int64_t floats_each = sizeof(Magnitudes) / sizeof(float);
        magnitudes = reinterpret_cast<Magnitudes *>(from.take(p.batch * p.pairs * floats_each));
        const int64_t products = backward ? chunks * grid.spectrum * 2 * wide : 0;
        above_products = from.take(products);
        below_products = from.take(products);
        down_roots = from.take(Plan::floats(grid.down.length));
        across_roots = from.take(Plan::floats(grid.across.length));
        Parts of_thread(nullptr);
        Sheets(p, grid, backward, of_thread);
        own_floats = of_thread.floats;
        own = from.take(threads * own_floats);
        floats = from.floats;
    }

    // Whether sums take less time than windows do directly.
    bool is_faster(bool backward) const {
        const double maps = double(LANES * (p.queries * groups * vectors + packs));
        // channels are read for two queries at a time
        const double channels = double(parts(p.queries, 2) * p.channels + 3 * p.pairs);
        const Cost &cost = backward ? BACKWARD_COST : FORWARD_COST;
        double each = (double(p.offsets) + cost.window) * channels;
        if (p.stride > 1) each *= cost.strided;
        if (p.dim > WIDE_HEAD) each *= cost.wide;
        const double direct = double(p.rows * p.window_places) * each;
        return maps * grid.cost() * cost.transform < direct;
    }

    Group group(int64_t i) const {
        const int64_t head = i * group_heads, heads = std::min(group_heads, p.heads - head);
        return {head, heads, head * p.dim, heads * p.dim};
    }

    Lanes lanes(const Group &group, int64_t vector) const {
        Lanes found = {group.channel + vector * LANES,
                       std::min<int64_t>(LANES, group.channels - vector * LANES), group.heads,
                       IntVec{}};
        for (int64_t i = 0; group.heads > 1 && i < found.count; i++) found.own[i] = int32_t(i / p.dim);
        return found;
    }

    int64_t pair(const Group &group, int64_t query) const { return query * p.heads + group.head; }
};

// Scalars of heads, `plane` apart, spread over their channels: of so many heads, or 0 for any.
template <int HEADS> inline Vec spread(const float *heads, int64_t plane, const Lanes &lanes) {
    Vec v = splat(heads[0]);
    const int64_t count = HEADS ? HEADS : lanes.heads;
    for (int64_t head = 1; head < count; head++) {
        v = lanes.own == int32_t(head) ? splat(heads[head * plane]) : v;
    }
    return v;
}

// Calls `run(heads)` with a constant for what `spread` is compiled for.
template <class Run> void for_heads(const Group &group, Run run) {
    if (group.heads == 1) return run(Constant<1>());
    if (group.heads == 2) return run(Constant<2>());
    run(Constant<0>());
}

// Adds sums over channels of each head of a row.
inline void collect(const Problem &p, const Vec *row, int64_t count, const Lanes &lanes,
                    float *heads, int64_t plane) {
    int64_t done = 0;
    if (LANES >= BLOCK && p.dim % BLOCK == 0) {
        for (; done + BLOCK <= count; done += BLOCK) {
            for (int64_t first = 0; first < lanes.count; first += BLOCK) {
                float *to = heads + lanes.own[first] * plane + done, turned[BLOCK * BLOCK];
                turn_block(reinterpret_cast<const float *>(row + done) + first, LANES, turned,
                           BLOCK);
                Block total;
                std::memcpy(&total, to, sizeof total);
                for (int i = 0; i < BLOCK; i++) {
                    Block one;
                    std::memcpy(&one, turned + i * BLOCK, sizeof one);
                    total += one;
                }
                std::memcpy(to, &total, sizeof total);
            }
        }
    }
    for (; done < count; done++) {
        for (int64_t i = 0; i < lanes.count; i++) {
            heads[lanes.own[i] * plane + done] += row[done][i];
        }
    }
}

inline float norm(const float *x, int64_t count) {
    double total = 0;
    for (int64_t i = 0; i < count; i++) total += double(x[i]) * x[i];
    return float(std::sqrt(total));
}

// The spectrum of a table of a pack's pairs, `write(i, x)`, so that sums have their size.
template <class Write>
void transform_table(const Fourier &f, const Desk &at, const Shared &shared, Table table,
                     int64_t pack, Write write) {
    const Problem &p = f.p;
    const int64_t first = pack * LANES, count = std::min<int64_t>(LANES, p.pairs - first);
    const float *from[LANES];
    for (int64_t i = 0; i < count; i++) {
        const int64_t head = (first + i) % p.heads, query = (first + i) / p.heads;
        from[i] = table_of(p, shared, table, {0, head, query, 1}, 0);
        (table == BELOW ? f.below_norm : f.above_norm)[first + i] = norm(from[i], p.offsets);
    }
    const Places rows = {0, p.kernel_h, 1}, cols = {0, p.kernel_w, 1};
    transform_rows(at, rows, cols, at.plane, [&](int64_t y, auto put) {
        for (int64_t x = 0; x < p.kernel_w; x++) {
            Vec v = Vec{};
            for (int64_t i = 0; i < count; i++) v[i] = from[i][y * p.kernel_w + x];
            put(x, v);
        }
    });
    // both a map's and a table's are twice as large
    const float scale = 0.25f / float(f.grid.points());
    for (int64_t k = 0; k < f.grid.half; k++) {
        transform_column(at, rows, at.plane + k * f.grid.column, at.c);
        for (int64_t i = 0; i < f.grid.down.length; i++) {
            write(k * f.grid.down.length + i, conjugate(at.c[i]) * scale);
        }
    }
}

inline void make_spectra(const Fourier &f, const Desk &at, const Shared &shared, int64_t pack) {
    const Problem &p = f.p;
    const int64_t first = pack * LANES, count = std::min<int64_t>(LANES, p.pairs - first);
    Complex *below = f.below + pack * f.grid.spectrum;
    transform_table(f, at, shared, BELOW, pack, [&](int64_t i, Complex x) { below[i] = x; });
    transform_table(f, at, shared, ABOVE, pack, [&](int64_t i, Complex x) {
        for (int64_t n = 0; n < count; n++) {
            f.above[(first + n) * f.grid.spectrum + i] = {x.re[n], x.im[n]};
        }
    });
}

// An area of a pack's planes as vectors, and the way back.
inline void get_pack(const Planes &from, int64_t image, int64_t pack, const Area &area, Vec *to) {
    for (int64_t r = 0; r < area.rows; r++, to += area.cols) {
        from_planes(from.at(image, pack * LANES) + area.row(r), from.plane, area.cols, LANES,
                    reinterpret_cast<float *>(to), LANES, 1);
    }
}

inline void put_pack(const Vec *from, const Area &area, const Planes &to, int64_t image,
                     int64_t pack) {
    for (int64_t r = 0; r < area.rows; r++, from += area.cols) {
        to_planes(reinterpret_cast<const float *>(from), LANES, 1, area.cols, LANES,
                  to.at(image, pack * LANES) + area.row(r), to.plane);
    }
}

// What `transform_rows` reads of an area in vectors; adds its squares.
inline auto rows_of(const Vec *numbers, const Area &area, Vec &square) {
    return [numbers, area, &square](int64_t r, auto put) {
        const Vec *row = numbers + r * area.cols;
        for (int64_t x = 0; x < area.cols; x++) {
            square += row[x] * row[x];
            put(x, row[x]);
        }
    };
}

// e = exp(score - maximum) of an area of an image, for a pack's pairs.
inline void lay_attn(const Problem &p, const Inputs &in, const Shared &shared, int64_t image,
                     int64_t pack, const Area &area, Vec *to) {
    const int64_t first = pack * LANES, count = p.pairs - first;
    const float *scores = in.scores + image * p.height * p.width * p.pairs + first;
    const Vec shift = load_some(shared.shifts + image * p.pairs + first, count);
    for (int64_t r = 0; r < area.rows; r++) {
        const float *row = scores + area.row(r) * p.pairs;
        for (int64_t x = 0; x < area.cols; x++, row += p.pairs) {
            *to++ = exp_of_negative(load_some(row, count) - shift);
        }
    }
}

// e and 1 / D of an image, for a pack's pairs.
inline void sum_attn(const Fourier &f, const Desk &at, const Inputs &in, const Shared &shared,
                     int64_t image, int64_t pack) {
    const Problem &p = f.p;
    const Complex *below = f.below + pack * f.grid.spectrum;
    Vec least = splat(INFINITY), mean = Vec{}, most = Vec{};
    for (int64_t n = 0; n < LANES && !f.grid.sees_all(); n++) {
        std::fill_n(f.attn.at(image, pack * LANES + n), f.attn.plane, 0.0f);
    }
    f.grid.each_tile(p, [&](const Tile &tile) {
        const Part &down = tile.down, &across = tile.across;
        lay_attn(p, in, shared, image, pack, tile.tokens, at.tokens);
        Vec square = Vec{};
        transform_rows(at, down.tokens, across.tokens, at.plane,
                       rows_of(at.tokens, tile.tokens, square));
        most = larger_or_none(most, square);
        filter(at, down.tokens, at.plane, [=](int64_t n) { return below[n]; });
        Vec total = Vec{};
        const auto put = [&](int64_t y, auto sums) {
            Vec *to = at.windows + y * tile.windows.cols;
            for (int64_t x = 0; x < tile.windows.cols; x++) {
                const Vec sum = sums(x);
                least = sum < least ? sum : least;
                total += sum * sum;
                to[x] = 1.0f / sum;
            }
        };
        transform_rows_back(at, down.windows, across.windows, at.plane, put);
        mean = larger(mean, total / float(tile.windows.count()));
        put_pack(at.tokens, tile.tokens, f.attn, image, pack);
        put_pack(at.windows, tile.windows, f.inverse, image, pack);
    });
    Magnitudes *magnitudes = f.magnitudes + image * p.pairs + pack * LANES;
    for (int64_t n = 0; n < std::min<int64_t>(LANES, p.pairs - pack * LANES); n++) {
        const float norm = std::sqrt(most[n]) * f.below_norm[pack * LANES + n];
        magnitudes[n] = Magnitudes{};
        magnitudes[n].attn = most[n];
        magnitudes[n].least_sum = least[n];
        const float common = COMMON_ROUNDINGS * FLT_EPSILON * std::sqrt(mean[n]);
        magnitudes[n].sum_error = (norm * f.grid.noise() * PEAK + common) / least[n];
    }
}

// Calls `run(desk, task)` for all tasks.
template <class Run> void each_desk(const Fourier &f, bool backward, int64_t tasks, Run run) {
    const Plan down(f.grid.down.length, f.down_roots), across(f.grid.across.length, f.across_roots);
    each_of(tasks, f.threads, [&](int64_t i, int thread) {
        Parts from(f.own + thread * f.own_floats);
        run(Desk(Sheets(f.p, f.grid, backward, from), f.grid, down, across), i);
    });
}

// Spectra of tables, e and D.
inline void find_sums(const Fourier &f, const Inputs &in, const Shared &shared, bool backward) {
    each_desk(f, backward, f.packs, [&](const Desk &at, int64_t pack) {
        make_spectra(f, at, shared, pack);
    });
    each_desk(f, backward, f.p.batch * f.packs, [&](const Desk &at, int64_t i) {
        sum_attn(f, at, in, shared, i / f.packs, i % f.packs);
    });
}

// Whether no window of an image has vanished beside the map's maximum.
inline bool in_range(const Fourier &f, const Shared &shared, int64_t image, int64_t pair) {
    const Magnitudes &of = f.magnitudes[image * f.p.pairs + pair];
    return !shared.exact[image * f.p.pairs + pair] && of.least_sum >= SMALLEST_SUM &&
           of.sum_error <= OUT_TOLERANCE;
}

// Marks heads [batch, heads] for which that is not so.
inline void mark_lost(const Fourier &f, const Shared &shared, int8_t *heads) {
    const Problem &p = f.p;
    std::fill(heads, heads + p.batch * p.heads, int8_t(0));
    for (int64_t i = 0; i < p.batch * p.pairs; i++) {
        const int64_t image = i / p.pairs, pair = i % p.pairs;
        if (!in_range(f, shared, image, pair)) heads[image * p.heads + pair % p.heads] = 1;
    }
}

inline bool all_left(const int8_t *heads, int64_t count) {
    return std::all_of(heads, heads + count, [](int8_t is_left) { return is_left != 0; });
}

// Whether a sum of squares is of numbers that have not vanished.
inline bool is_sound(float square) { return square >= SMALLEST_SQUARE && std::isfinite(square); }

}  // namespace qna
