// Learned-query attention and its gradient on a CPU, neighbouring tokens of a row in one vector.
//
//     a_q[y, o] = exp(score_q[y+o] + bias_q[o]) / D_q[y],   D_q[y] = sum_o exp(...)
//     out[y]    = sum_o (sum_q weight_q[o] a_q[y, o]) value[y+o]
//
// A head at a time: its tokens are laid out as planes, a row of one channel after the other, where
// a shift by one token is a shift of an address. A row is cut into `stride` phases, so that
// neighbouring windows of a larger stride find their tokens side by side too.
//
// Letters: y window, t token, u = t + padding along a row, o offset in a window.
//
// Threads are those of the OpenMP runtime that PyTorch has loaded. This library is linked to none:
// two runtimes would compete for the processors.

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "planes.h"
#include "vectors.h"

namespace {

constexpr int64_t VERSION = 1;
// Range of scores and bias of a map up to which one maximum serves it all: e^-60 and its products
// are ordinary numbers. Beyond, every window is shifted by its own.
constexpr float SHARED_RANGE = 60.0f;
// Rows of windows, or of tokens, that a task computes, and channels: what a second-level cache holds.
constexpr int64_t BAND_ROWS = 16;
constexpr int64_t GROUP_CHANNELS = 64;
constexpr int MOST_CHANNELS = 64;  // of a head
constexpr float FAR = 3e38f;
// Sums of |gradient of scores| below so much of the sum of |mean| that they are the difference of:
// windows have one token of nearly all their weight there, and rounding is all that is left.
constexpr float LEAST_DIFFERENCE = 1e-3f;
enum Stat { TOTAL, MEAN, SHIFT, TOP, STATS };
enum Table { BELOW, ABOVE, BIAS, ONES, WEIGHT, TABLES };

int64_t parts(int64_t count, int64_t part) { return (count + part - 1) / part; }

struct Bands {
    int64_t count, rows;

    explicit Bands(int64_t of) : count(std::max<int64_t>(1, parts(of, BAND_ROWS))), rows(parts(of, count)) {}
};

// Sizes as the caller gives them, then what follows from them.
struct Problem {
    int64_t batch, height, width, queries, heads, dim, kernel_h, kernel_w, stride, padding;
    int64_t rows, cols, offsets, pairs, channels;
    int64_t lead, token_places, window_places, places, stat_places;
    Bands window_bands, token_bands;
    int64_t group_heads, groups;

    explicit Problem(const int64_t *n)
        : batch(n[0]), height(n[1]), width(n[2]), queries(n[3]), heads(n[4]), dim(n[5]),
          kernel_h(n[6]), kernel_w(n[7]), stride(n[8]), padding(n[9]),
          rows((height + 2 * padding - kernel_h) / stride + 1),
          cols((width + 2 * padding - kernel_w) / stride + 1), offsets(kernel_h * kernel_w),
          pairs(queries * heads), channels(heads * dim), lead((kernel_w - 1) / stride),
          token_places(rounded_up(parts(width + padding % stride, stride))),
          window_places(rounded_up(cols)),
          places(rounded_up(std::max(window_places + lead, padding / stride + token_places))),
          stat_places(rounded_up(std::max(window_places, padding / stride + token_places) + lead)),
          window_bands(rows), token_bands(height),
          group_heads(std::min(heads, std::max<int64_t>(1, GROUP_CHANNELS / dim))),
          groups(parts(heads, group_heads)) {}

    // Floats of a row of tokens, and of planes of so many rows of tokens, windows, and windows with
    // a margin.
    int64_t row() const { return stride * places; }
    int64_t plane(int64_t token_rows) const { return apart(token_rows * row()); }
    int64_t out_plane(int64_t window_rows) const { return apart(window_rows * window_places); }
    int64_t stat_plane(int64_t window_rows) const { return apart(window_rows * stat_places); }
    int64_t seen_rows(int64_t window_rows) const { return (window_rows - 1) * stride + kernel_h; }
    int64_t window_rows_of(int64_t token_rows) const { return (token_rows + kernel_h) / stride + 2; }
    int64_t stats_of_head() const { return queries * STATS * rows * stat_places; }

    int64_t forward_floats() const {
        const int64_t band = window_bands.rows;
        return (queries + dim) * plane(seen_rows(band)) + dim * out_plane(band);
    }
    int64_t backward_floats() const {
        const int64_t windows = (queries + dim) * plane(seen_rows(window_bands.rows)) + dim * out_plane(1);
        const int64_t band = token_bands.rows;
        const int64_t tokens = 2 * (queries + dim) * plane(band) +
                               dim * stat_plane(window_rows_of(band)) + 2 * pair_floats();
        return std::max(windows, tokens);
    }
    int64_t pair_floats() const { return queries * offsets * LANES; }
    int64_t partial_floats() const { return batch * token_bands.count * 2 * pairs * offsets; }
};

struct Inputs {
    const float *scores, *value, *bias, *weight;
    int64_t weight_rows;
};

// What all tasks read: factors of each pair and offset, and of each map its maximum and its form.
struct Shared {
    const float *tables;
    const float *shifts;   // [batch, pairs]
    int8_t *exact;         // [batch, pairs]
};

const float *table_of(const Problem &p, const Shared &shared, Table table, int64_t head, int64_t query) {
    return shared.tables + ((table * p.heads + head) * p.queries + query) * p.offsets;
}

void make_tables(const Problem &p, const Inputs &in, float *tables, float *ranges) {
    for (int64_t head = 0; head < p.heads; head++) {
        for (int64_t query = 0; query < p.queries; query++) {
            const int64_t pair = query * p.heads + head;
            const auto bias = [&](int64_t o) { return in.bias ? in.bias[o * p.pairs + pair] : 0.0f; };
            float low = bias(0), high = bias(0);
            for (int64_t o = 1; o < p.offsets; o++) {
                low = std::min(low, bias(o));
                high = std::max(high, bias(o));
            }
            ranges[pair] = high - low;
            float *first = tables + (head * p.queries + query) * p.offsets;
            const int64_t step = p.pairs * p.offsets;
            for (int64_t o = 0; o < p.offsets; o++) {
                const int64_t weight_row = in.weight_rows > 1 ? o : 0;
                const float weight = in.weight ? in.weight[weight_row * p.pairs + pair] : 1.0f;
                const float below = std::exp(bias(o) - high);
                first[BELOW * step + o] = below;
                first[ABOVE * step + o] = below * weight;
                first[BIAS * step + o] = bias(o);
                first[ONES * step + o] = 1.0f;
                first[WEIGHT * step + o] = weight;
            }
        }
    }
}

// The maximum of each map of scores, and whether the map spreads too far for it.
void find_shifts(const Problem &p, const float *scores, const float *ranges, float *low, float *high,
                 int8_t *exact) {
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
        exact[pair] = !(range <= SHARED_RANGE);  // so for NaN
    }
}

// A head of an image, and two queries of it at most.
struct Head {
    int64_t image, head, query;
};

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

// Planes of rows of tokens from `top` on: channel c of token (t, x) is `map` at (t * width + x) *
// token + c * step. `empty` where there is no token.
void lay(const Problem &p, const float *map, int64_t token, int64_t step, int64_t channels,
         int64_t top, int64_t count, float empty, float *planes) {
    const int64_t plane = p.plane(count);
    for (int64_t r = 0; r < count; r++) {
        const int64_t t = top + r;
        for (int64_t phase = 0; phase < p.stride; phase++) {
            const Phase at(p, phase);
            float *row = planes + r * p.row() + phase * p.places;
            const int64_t tokens = t < 0 || t >= p.height ? 0 : at.count;
            for (int64_t c = 0; c < channels; c++) {
                float *own = row + c * plane;
                std::fill(own, own + at.place, empty);
                std::fill(own + at.place + tokens, own + p.places, empty);
            }
            const float *from = map + (t * p.width + at.first) * token;
            if (tokens) to_planes(from, token * p.stride, step, tokens, channels, row + at.place, plane);
        }
    }
}

void lay_values(const Problem &p, const float *map, int64_t image, int64_t head, int64_t top,
                int64_t count, float *planes) {
    const float *first = map + image * p.height * p.width * p.channels + head * p.dim;
    lay(p, first, p.channels, 1, p.dim, top, count, 0.0f, planes);
}

// e^(score - shift) and 0 off the map, or where windows have shifts of their own the scores and
// -inf.
void lay_scores(const Problem &p, const Inputs &in, const Shared &shared, const Head &at,
                int queries, bool exact, int64_t top, int64_t count, float *planes) {
    const int64_t plane = p.plane(count), pair = at.query * p.heads + at.head;
    const float *first = in.scores + at.image * p.height * p.width * p.pairs + pair;
    lay(p, first, p.pairs, p.heads, queries, top, count, -INFINITY, planes);
    if (exact) return;
    for (int q = 0; q < queries; q++) {
        const float shift = shared.shifts[at.image * p.pairs + pair + q * p.heads];
        float *to = planes + q * plane;
        for (int64_t i = 0; i < count * p.row(); i += LANES) {
            store(to + i, exp_of_negative(load(to + i) - shift));
        }
    }
}

// Factors of the queries of a head.
template <bool EXACT, int NQ> struct Factors {
    const float *below[NQ], *above[NQ], *bias[NQ];

    Factors(const Problem &p, const Shared &shared, const Head &at) {
        for (int q = 0; q < NQ; q++) {
            below[q] = table_of(p, shared, EXACT ? ONES : BELOW, at.head, at.query + q);
            above[q] = table_of(p, shared, EXACT ? WEIGHT : ABOVE, at.head, at.query + q);
            bias[q] = table_of(p, shared, BIAS, at.head, at.query + q);
        }
    }
};

// What a window's exponentials are relative to.
template <int NQ> struct Norm {
    Vec total[NQ], shift[NQ], top[NQ];
};

// e^(score + bias) of an offset up to the window's common factor, beside `below`.
template <bool EXACT> inline Vec power(Vec e, float bias, Vec shift, Vec top) {
    // The window's maximum goes before the bias comes: at scores of 1e4 a float32 sum with the bias
    // would keep three decimals of it only.
    return EXACT ? exp_of_negative(e - shift + bias - top) : e;
}

// Planes of a band of rows of windows, the first of which begins at plane row 0.
template <int NQ> struct Seen {
    const float *e[NQ];
    int64_t row, places, stride;

    Seen(const Problem &p, const float *planes, int64_t plane)
        : row(p.row()), places(p.places), stride(p.stride) {
        for (int q = 0; q < NQ; q++) e[q] = planes + q * plane;
    }
    int64_t at(int64_t window_row, int64_t place, int64_t ky, int64_t kx) const {
        return (window_row * stride + ky) * row + kx % stride * places + kx / stride + place;
    }
};

// Calls `visit(o, address)` for every offset of windows.
template <int NQ, class Visit>
inline void each_offset(const Problem &p, const Seen<NQ> &seen, int64_t window_row, int64_t place, Visit visit) {
    int64_t o = 0;
    for (int64_t ky = 0; ky < p.kernel_h; ky++) {
        if (p.stride == 1) {
            const int64_t first = seen.at(window_row, place, ky, 0);
            for (int64_t kx = 0; kx < p.kernel_w; kx++) visit(o++, first + kx);
        } else {
            for (int64_t kx = 0; kx < p.kernel_w; kx++) visit(o++, seen.at(window_row, place, ky, kx));
        }
    }
}

template <bool EXACT, int NQ>
inline void find_tops(const Problem &p, const Seen<NQ> &seen, const Factors<EXACT, NQ> &factors,
                      int64_t window_row, int64_t place, Norm<NQ> &norm) {
    if (!EXACT) return;
    for (int q = 0; q < NQ; q++) norm.shift[q] = norm.top[q] = splat(-INFINITY);
    each_offset(p, seen, window_row, place, [&](int64_t, int64_t at) {
        for (int q = 0; q < NQ; q++) norm.shift[q] = larger(norm.shift[q], load(seen.e[q] + at));
    });
    each_offset(p, seen, window_row, place, [&](int64_t o, int64_t at) {
        for (int q = 0; q < NQ; q++) {
            const Vec logit = load(seen.e[q] + at) - norm.shift[q] + factors.bias[q][o];
            norm.top[q] = larger(norm.top[q], logit);
        }
    });
}

template <bool EXACT, int NQ>
inline Norm<NQ> find_norm(const Problem &p, const Seen<NQ> &seen, const Factors<EXACT, NQ> &factors,
                          int64_t window_row, int64_t place) {
    Norm<NQ> norm;
    find_tops<EXACT>(p, seen, factors, window_row, place, norm);
    for (int q = 0; q < NQ; q++) norm.total[q] = Vec{};
    each_offset(p, seen, window_row, place, [&](int64_t o, int64_t at) {
        for (int q = 0; q < NQ; q++) {
            const Vec e = load(seen.e[q] + at);
            norm.total[q] += power<EXACT>(e, factors.bias[q][o], norm.shift[q], norm.top[q]) * factors.below[q][o];
        }
    });
    for (int q = 0; q < NQ; q++) norm.total[q] = 1.0f / norm.total[q];
    return norm;
}

// Adds what `NQ` queries of a head find in a band of windows to planes of the output.
template <bool EXACT, int NQ, int DIM>
void attend(const Problem &p, const Shared &shared, const Head &at, int64_t window_rows,
            const float *scores, const float *values, int64_t plane, float *out) {
    const Factors<EXACT, NQ> factors(p, shared, at);
    const Seen<NQ> seen(p, scores, plane);
    const int dim = DIM ? DIM : int(p.dim);
    for (int64_t y = 0; y < window_rows; y++) {
        for (int64_t x = 0; x < p.window_places; x += LANES) {
            const Norm<NQ> norm = find_norm<EXACT>(p, seen, factors, y, x);
            Vec found[DIM ? DIM : MOST_CHANNELS];
            for (int c = 0; c < dim; c++) found[c] = Vec{};
            each_offset(p, seen, y, x, [&](int64_t o, int64_t token) {
                Vec weight = Vec{};
                for (int q = 0; q < NQ; q++) {
                    const Vec e = load(seen.e[q] + token);
                    weight += power<EXACT>(e, factors.bias[q][o], norm.shift[q], norm.top[q]) *
                              factors.above[q][o] * norm.total[q];
                }
                for (int c = 0; c < dim; c++) found[c] += weight * load(values + c * plane + token);
            });
            float *to = out + y * p.window_places + x;
            const int64_t step = p.out_plane(window_rows);
            for (int c = 0; c < dim; c++, to += step) store(to, load(to) + found[c]);
        }
    }
}

template <bool EXACT, int NQ>
void attend_of(const Problem &p, const Shared &shared, const Head &at, int64_t window_rows,
               const float *scores, const float *values, int64_t plane, float *out) {
    const auto run = p.dim == 8    ? attend<EXACT, NQ, 8>
                     : p.dim == 16 ? attend<EXACT, NQ, 16>
                                   : attend<EXACT, NQ, 0>;
    run(p, shared, at, window_rows, scores, values, plane, out);
}

bool is_exact(const Problem &p, const Shared &shared, const Head &at, int queries) {
    const int8_t *exact = shared.exact + at.image * p.pairs + at.query * p.heads + at.head;
    return exact[0] || exact[(queries - 1) * p.heads];
}

void forward_head(const Problem &p, const Inputs &in, const Shared &shared, int64_t image,
                  int64_t head, int64_t top, int64_t window_rows, float *scratch, float *out) {
    const int64_t count = p.seen_rows(window_rows), plane = p.plane(count);
    const int64_t first = top * p.stride - p.padding;
    float *scores = scratch, *values = scores + p.queries * plane, *found = values + p.dim * plane;
    lay_values(p, in.value, image, head, first, count, values);
    const int64_t out_plane = p.out_plane(window_rows);
    std::fill(found, found + p.dim * out_plane, 0.0f);
    for (Head at{image, head, 0}; at.query < p.queries; at.query += 2) {
        const int queries = at.query + 1 < p.queries ? 2 : 1;
        const bool exact = is_exact(p, shared, at, queries);
        lay_scores(p, in, shared, at, queries, exact, first, count, scores);
        const auto run = queries == 2 ? (exact ? attend_of<true, 2> : attend_of<false, 2>)
                                      : (exact ? attend_of<true, 1> : attend_of<false, 1>);
        run(p, shared, at, window_rows, scores, values, plane, found);
    }
    for (int64_t y = 0; y < window_rows; y++) {
        float *to = out + ((image * p.rows + top + y) * p.cols) * p.channels + head * p.dim;
        from_planes(found + y * p.window_places, out_plane, p.cols, p.dim, to, p.channels, 1);
    }
}

float *stats_of(const Problem &p, float *stats, const Head &at, int64_t query) {
    const int64_t head = at.image * p.heads + at.head;
    return stats + head * p.stats_of_head() + (at.query + query) * STATS * p.rows * p.stat_places;
}

// <grad, value> of a window and a token; the same number whichever is `own`.
inline Vec product(const Vec *own, const Vec *other, int dim) {
    Vec even = Vec{}, odd = Vec{};
    for (int c = 0; c + 1 < dim; c += 2) {
        even += own[c] * other[c];
        odd += own[c + 1] * other[c + 1];
    }
    if (dim % 2) even += own[dim - 1] * other[dim - 1];
    return even + odd;
}

// What a row of windows needs known before gradients: 1 / D, its shifts, and the mean over its
// softmax of weight * <grad, value>. Beside the map, numbers that make an addend of 0.
template <bool EXACT, int NQ, int DIM>
void measure(const Problem &p, const Shared &shared, const Head &at, int64_t top, int64_t y,
             const float *scores, const float *values, int64_t plane, const float *grad, float *stats,
             float *means) {
    const Factors<EXACT, NQ> factors(p, shared, at);
    const Seen<NQ> seen(p, scores, plane);
    const int dim = DIM ? DIM : int(p.dim);
    const int64_t map = p.rows * p.stat_places;
    float *rows[NQ];
    for (int q = 0; q < NQ; q++) rows[q] = stats_of(p, stats, at, q) + (top + y) * p.stat_places;
    for (int64_t x = 0; x < p.window_places; x += LANES) {
        Norm<NQ> norm;
        find_tops<EXACT>(p, seen, factors, y, x, norm);
        Vec own[DIM ? DIM : MOST_CHANNELS], mean[NQ];
        for (int c = 0; c < dim; c++) own[c] = load(grad + c * p.out_plane(1) + x);
        for (int q = 0; q < NQ; q++) norm.total[q] = mean[q] = Vec{};
        each_offset(p, seen, y, x, [&](int64_t o, int64_t token) {
            Vec value[DIM ? DIM : MOST_CHANNELS];
            for (int c = 0; c < dim; c++) value[c] = load(values + c * plane + token);
            const Vec slope = product(own, value, dim);
            for (int q = 0; q < NQ; q++) {
                const Vec e = load(seen.e[q] + token);
                const Vec part = power<EXACT>(e, factors.bias[q][o], norm.shift[q], norm.top[q]);
                norm.total[q] += part * factors.below[q][o];
                mean[q] += part * factors.above[q][o] * slope;
            }
        });
        for (int q = 0; q < NQ; q++) {
            float *to = rows[q] + p.lead + x;
            const Vec inverse = 1.0f / norm.total[q];
            store(to + TOTAL * map, inverse);
            store(to + MEAN * map, mean[q] * inverse);
            if (EXACT) store(to + SHIFT * map, norm.shift[q]), store(to + TOP * map, norm.top[q]);
        }
    }
    const float outside[STATS] = {0, 0, FAR, 0};
    for (int q = 0; q < NQ; q++) {
        for (int stat = 0; stat < (EXACT ? STATS : SHIFT); stat++) {
            float *row = rows[q] + stat * map;
            std::fill(row, row + p.lead, outside[stat]);
            std::fill(row + p.lead + p.cols, row + p.stat_places, outside[stat]);
        }
        Vec total = Vec{};
        const float *row = rows[q] + MEAN * map;
        for (int64_t x = 0; x < p.stat_places; x += LANES) total += magnitude(load(row + x));
        means[q * p.heads] += sum(total);
    }
}

template <bool EXACT, int NQ>
void measure_of(const Problem &p, const Shared &shared, const Head &at, int64_t top, int64_t y,
                const float *scores, const float *values, int64_t plane, const float *grad, float *stats,
                float *means) {
    const auto run = p.dim == 8    ? measure<EXACT, NQ, 8>
                     : p.dim == 16 ? measure<EXACT, NQ, 16>
                                   : measure<EXACT, NQ, 0>;
    run(p, shared, at, top, y, scores, values, plane, grad, stats, means);
}

// Channel planes of a row of windows, from place `lead` on; 0 elsewhere.
void lay_grad(const Problem &p, const float *grad, int64_t image, int64_t head, int64_t y,
              int64_t lead, int64_t places, int64_t plane, float *to) {
    const float *from = grad + (image * p.rows + y) * p.cols * p.channels + head * p.dim;
    for (int64_t c = 0; c < p.dim; c++) {
        std::fill(to + c * plane, to + c * plane + lead, 0.0f);
        std::fill(to + c * plane + lead + p.cols, to + c * plane + places, 0.0f);
    }
    to_planes(from, p.channels, 1, p.cols, p.dim, to + lead, plane);
}

void measure_head(const Problem &p, const Inputs &in, const Shared &shared, const float *grad,
                  int64_t image, int64_t head, int64_t top, int64_t window_rows, float *scratch,
                  float *stats, float *means) {
    const int64_t count = p.seen_rows(window_rows), plane = p.plane(count);
    const int64_t first = top * p.stride - p.padding;
    float *scores = scratch, *values = scores + p.queries * plane, *row = values + p.dim * plane;
    lay_values(p, in.value, image, head, first, count, values);
    for (Head at{image, head, 0}; at.query < p.queries; at.query += 2) {
        const int queries = at.query + 1 < p.queries ? 2 : 1;
        const bool exact = is_exact(p, shared, at, queries);
        lay_scores(p, in, shared, at, queries, exact, first, count, scores);
        const auto run = queries == 2 ? (exact ? measure_of<true, 2> : measure_of<false, 2>)
                                      : (exact ? measure_of<true, 1> : measure_of<false, 1>);
        float *own_means = means + at.query * p.heads + head;
        for (int q = 0; q < queries; q++) own_means[q * p.heads] = 0.0f;
        for (int64_t y = 0; y < window_rows; y++) {
            lay_grad(p, grad, image, head, top + y, 0, p.window_places, p.out_plane(1), row);
            run(p, shared, at, top, y, scores, values, plane, row, stats, own_means);
        }
    }
}

// Planes of a band of rows of tokens of a head, and where its gradients go.
struct Tokens {
    int64_t top, rows, plane;           // of tokens
    int64_t window_top, window_plane;   // of gradients of the output
    const float *scores, *values, *grad;
    float *grad_scores, *grad_values;
    float *grad_bias, *grad_weight;     // [offsets, NQ] vectors
};

// Gradients of tokens from all windows that see them.
//
//     slope = <grad[y], value[t]>,  z_q = a_q (weight_q slope - mean_q)
template <bool EXACT, int NQ, int DIM>
void gather(const Problem &p, const Shared &shared, const Head &at, const float *stats,
            const Tokens &in, float *differences) {
    const Factors<EXACT, NQ> factors(p, shared, at);
    const int dim = DIM ? DIM : int(p.dim);
    const int64_t map = p.rows * p.stat_places, base = p.padding / p.stride;
    const float *windows[NQ], *weight[NQ];
    Vec sums[NQ];
    for (int q = 0; q < NQ; q++) {
        windows[q] = stats_of(p, const_cast<float *>(stats), at, q);
        weight[q] = table_of(p, shared, WEIGHT, at.head, at.query + q);
        sums[q] = Vec{};
    }
    for (int64_t r = 0; r < in.rows; r++) {
        for (int64_t phase = 0; phase < p.stride; phase++) {
            for (int64_t x = base; x < base + p.token_places; x += LANES) {
                const int64_t token = r * p.row() + phase * p.places + x;
                Vec value[DIM ? DIM : MOST_CHANNELS], by_value[DIM ? DIM : MOST_CHANNELS];
                for (int c = 0; c < dim; c++) {
                    value[c] = load(in.values + c * in.plane + token);
                    by_value[c] = Vec{};
                }
                Vec e[NQ], by_score[NQ];
                for (int q = 0; q < NQ; q++) {
                    e[q] = load(in.scores + q * in.plane + token);
                    by_score[q] = Vec{};
                }
                for (int64_t ky = 0; ky < p.kernel_h; ky++) {
                    const int64_t down = in.top + r + p.padding - ky;
                    if (down < 0 || down % p.stride || down / p.stride >= p.rows) continue;
                    const int64_t y = down / p.stride;
                    for (int64_t kx = phase; kx < p.kernel_w; kx += p.stride) {
                        const int64_t o = ky * p.kernel_w + kx;
                        const int64_t place = x - kx / p.stride + p.lead;
                        const float *from = in.grad + (y - in.window_top) * p.stat_places + place;
                        Vec grad[DIM ? DIM : MOST_CHANNELS];
                        for (int c = 0; c < dim; c++) grad[c] = load(from + c * in.window_plane);
                        const Vec slope = product(value, grad, dim);
                        Vec share = Vec{};
                        for (int q = 0; q < NQ; q++) {
                            const float *window = windows[q] + y * p.stat_places + place;
                            Vec shift = Vec{}, top = Vec{};
                            if (EXACT) shift = load(window + SHIFT * map), top = load(window + TOP * map);
                            const Vec attn = power<EXACT>(e[q], factors.bias[q][o], shift, top) *
                                             load(window + TOTAL * map);
                            // of a window's only token exactly 0, as both were rounded alike
                            const Vec own = rounded(slope * weight[q][o]);
                            const Vec z = attn * (own - load(window + MEAN * map));
                            by_score[q] += z * factors.below[q][o];
                            share += attn * factors.above[q][o];
                            float *bias = in.grad_bias + (o * NQ + q) * LANES;
                            float *by_weight = in.grad_weight + (o * NQ + q) * LANES;
                            store(bias, load(bias) + z);
                            store(by_weight, load(by_weight) + attn * slope);
                        }
                        for (int c = 0; c < dim; c++) by_value[c] += share * grad[c];
                    }
                }
                for (int q = 0; q < NQ; q++) {
                    sums[q] += magnitude(by_score[q]);
                    store(in.grad_scores + q * in.plane + token, by_score[q]);
                }
                for (int c = 0; c < dim; c++) {
                    float *to = in.grad_values + c * in.plane + token;
                    store(to, load(to) + by_value[c]);
                }
            }
        }
    }
    for (int q = 0; q < NQ; q++) differences[q * p.heads] = sum(sums[q]);
}

template <bool EXACT, int NQ>
void gather_of(const Problem &p, const Shared &shared, const Head &at, const float *stats,
               const Tokens &in, float *differences) {
    const auto run = p.dim == 8    ? gather<EXACT, NQ, 8>
                     : p.dim == 16 ? gather<EXACT, NQ, 16>
                                   : gather<EXACT, NQ, 0>;
    run(p, shared, at, stats, in, differences);
}

struct Gradients {
    float *scores, *value, *bias, *weight;
};

// Planes of rows of tokens to every `step`-th number of a map [tokens, ...].
void write_rows(const Problem &p, const float *planes, int64_t plane, int64_t count, int64_t rows,
                int64_t image, int64_t top, int64_t first, int64_t step, int64_t token, float *map) {
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t phase = 0; phase < p.stride; phase++) {
            const Phase at(p, phase);
            const float *from = planes + r * p.row() + phase * p.places + at.place;
            const int64_t start = ((image * p.height + top + r) * p.width + at.first) * token + first;
            if (at.count) from_planes(from, plane, at.count, count, map + start, token * p.stride, step);
        }
    }
}

// Sums of a band over its vectors, [2, offsets, pairs]: of bias, then of weight.
void write_partial(const Problem &p, const Shared &shared, const Head &at, int queries,
                   const Tokens &tokens, bool exact, float *partial) {
    for (int q = 0; q < queries; q++) {
        const int64_t pair = (at.query + q) * p.heads + at.head;
        const float *below = table_of(p, shared, exact ? ONES : BELOW, at.head, at.query + q);
        for (int64_t o = 0; o < p.offsets; o++) {
            const int64_t place = (o * queries + q) * LANES;
            partial[o * p.pairs + pair] = below[o] * sum(load(tokens.grad_bias + place));
            partial[(p.offsets + o) * p.pairs + pair] = below[o] * sum(load(tokens.grad_weight + place));
        }
    }
}

void gather_head(const Problem &p, const Inputs &in, const Shared &shared, const float *grad,
                 const float *stats, int64_t image, int64_t head, int64_t top, int64_t rows,
                 float *scratch, const Gradients &out, float *partial, float *differences) {
    Tokens at;
    at.top = top, at.rows = rows, at.plane = p.plane(rows);
    const int64_t before = std::max<int64_t>(0, top + p.padding - p.kernel_h + 1);
    at.window_top = parts(before, p.stride);
    const int64_t end = std::min(p.rows, (top + rows - 1 + p.padding) / p.stride + 1);
    const int64_t window_rows = std::max<int64_t>(0, end - at.window_top);
    at.window_plane = p.stat_plane(window_rows);
    float *scores = scratch, *values = scores + p.queries * at.plane;
    float *grads = values + p.dim * at.plane;
    at.scores = scores, at.values = values, at.grad = grads;
    at.grad_scores = grads + p.dim * at.window_plane;
    at.grad_values = at.grad_scores + p.queries * at.plane;
    at.grad_bias = at.grad_values + p.dim * at.plane;
    at.grad_weight = at.grad_bias + p.pair_floats();
    lay_values(p, in.value, image, head, top, rows, values);
    for (int64_t y = 0; y < window_rows; y++) {
        lay_grad(p, grad, image, head, at.window_top + y, p.lead, p.stat_places, at.window_plane,
                 grads + y * p.stat_places);
    }
    std::fill(at.grad_values, at.grad_values + p.dim * at.plane, 0.0f);
    for (Head pair{image, head, 0}; pair.query < p.queries; pair.query += 2) {
        const int queries = pair.query + 1 < p.queries ? 2 : 1;
        const bool exact = is_exact(p, shared, pair, queries);
        lay_scores(p, in, shared, pair, queries, exact, top, rows, scores);
        std::fill(at.grad_bias, at.grad_bias + 2 * p.pair_floats(), 0.0f);
        const auto run = queries == 2 ? (exact ? gather_of<true, 2> : gather_of<false, 2>)
                                      : (exact ? gather_of<true, 1> : gather_of<false, 1>);
        run(p, shared, pair, stats, at, differences + pair.query * p.heads + head);
        write_rows(p, at.grad_scores, at.plane, queries, rows, image, top,
                   pair.query * p.heads + head, p.heads, p.pairs, out.scores);
        write_partial(p, shared, pair, queries, at, exact, partial);
    }
    write_rows(p, at.grad_values, at.plane, p.dim, rows, image, top, head * p.dim, 1, p.channels, out.value);
}

void add_partials(const Problem &p, const float *partials, const Gradients &out) {
    const int64_t table = p.offsets * p.pairs;
    std::fill(out.bias, out.bias + table, 0.0f);
    std::fill(out.weight, out.weight + table, 0.0f);
    for (int64_t i = 0; i < p.batch * p.token_bands.count; i++, partials += 2 * table) {
        for (int64_t n = 0; n < table; n++) {
            out.bias[n] += partials[n];
            out.weight[n] += partials[table + n];
        }
    }
}

// Calls `run(image, head, first row, rows, band of all, thread)` for all wanted heads of all bands,
// on threads that take neighbouring ones. Who computes what changes no result.
template <class Run>
void each_task(const Problem &p, const Bands &bands, int64_t height, int threads,
               const int8_t *wanted, Run run) {
    const int64_t tasks = p.batch * bands.count * p.groups;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t group = task % p.groups, band = task / p.groups % bands.count;
            const int64_t image = task / p.groups / bands.count, top = band * bands.rows;
            const int64_t rows = std::min(bands.rows, height - top);
            const int64_t end = std::min(p.heads, (group + 1) * p.group_heads);
            for (int64_t head = group * p.group_heads; head < end; head++) {
                if (wanted && !wanted[image * p.heads + head]) continue;
                run(image, head, top, rows, image * bands.count + band, omp_get_thread_num());
            }
        }
    }
}

// The caller's memory in parts: what all tasks share, then what a thread has of its own.
struct Memory {
    float *tables, *ranges, *low, *high, *stats, *partials, *means, *differences, *own;
    int8_t *exact, *again;
    int64_t own_floats, floats = 0;

    // At `start`, or with null only how many floats it takes.
    Memory(const Problem &p, bool backward, int threads, float *start) {
        const auto take = [&](int64_t count) {
            float *taken = start ? start + floats : nullptr;
            floats += rounded_up(count);
            return taken;
        };
        tables = take(TABLES * p.pairs * p.offsets);
        ranges = take(p.pairs);
        low = take(p.batch * p.pairs);
        high = take(p.batch * p.pairs);
        exact = reinterpret_cast<int8_t *>(take(p.batch * p.pairs));
        again = reinterpret_cast<int8_t *>(take(p.batch * p.heads));
        const int64_t bands = backward ? p.batch * p.token_bands.count : 0;
        stats = take(backward ? p.batch * p.heads * p.stats_of_head() : 0);
        partials = take(bands * 2 * p.pairs * p.offsets);
        means = take(backward ? p.batch * p.window_bands.count * p.pairs : 0);
        differences = take(bands * p.pairs);
        own_floats = rounded_up(backward ? p.backward_floats() : p.forward_floats());
        own = take(threads * own_floats);
    }
};

Shared prepare(const Problem &p, const Inputs &in, const Memory &memory, int threads) {
    make_tables(p, in, memory.tables, memory.ranges);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t image = 0; image < p.batch; image++) {
        const int64_t first = image * p.pairs;
        find_shifts(p, in.scores + first * p.height * p.width, memory.ranges, memory.low + first,
                    memory.high + first, memory.exact + first);
    }
    return {memory.tables, memory.high, memory.exact};
}

// Which heads of which images must be computed again, with shifts of their own for all windows.
bool look_again(const Problem &p, const Memory &memory, const Shared &shared) {
    bool any = false;
    std::fill(memory.again, memory.again + p.batch * p.heads, int8_t(0));
    for (int64_t image = 0; image < p.batch; image++) {
        for (int64_t pair = 0; pair < p.pairs; pair++) {
            const auto total = [&](const float *sums, int64_t bands) {
                float found = 0;
                for (int64_t i = image * bands; i < (image + 1) * bands; i++) found += sums[i * p.pairs + pair];
                return found;
            };
            const float means = total(memory.means, p.window_bands.count);
            const float differences = total(memory.differences, p.token_bands.count);
            int8_t &exact = shared.exact[image * p.pairs + pair];
            if (exact || !(differences < LEAST_DIFFERENCE * means)) continue;
            exact = memory.again[image * p.heads + pair % p.heads] = 1;
            any = true;
        }
    }
    return any;
}

}  // namespace

// Sizes: batch, height, width, queries, heads, channels of a head, kernel height and width, stride,
// padding. Maps are contiguous: scores [batch, height, width, queries, heads], value and gradients
// [batch, height, width, heads * channels], bias [offsets, queries, heads] or null, weight the same
// or of one row. `memory` has `qna_floats` numbers.
extern "C" {

int64_t qna_version() { return VERSION; }

int64_t qna_most_channels() { return MOST_CHANNELS; }

int64_t qna_floats(const int64_t *sizes, int backward, int threads) {
    return Memory(Problem(sizes), backward, threads, nullptr).floats;
}

void qna_forward(const int64_t *sizes, const float *scores, const float *value, const float *bias,
                 const float *weight, int64_t weight_rows, float *memory, int threads, float *out) {
    const Problem p(sizes);
    const Inputs in{scores, value, bias, weight, weight_rows};
    const Memory parts(p, false, threads, memory);
    const Shared shared = prepare(p, in, parts, threads);
    each_task(p, p.window_bands, p.rows, threads, nullptr,
              [&](int64_t image, int64_t head, int64_t top, int64_t rows, int64_t, int thread) {
                  forward_head(p, in, shared, image, head, top, rows,
                               parts.own + thread * parts.own_floats, out);
              });
}

void qna_backward(const int64_t *sizes, const float *grad, const float *scores, const float *value,
                  const float *bias, const float *weight, int64_t weight_rows, float *memory,
                  int threads, float *grad_scores, float *grad_value, float *grad_bias,
                  float *grad_weight) {
    const Problem p(sizes);
    const Inputs in{scores, value, bias, weight, weight_rows};
    const Memory parts(p, true, threads, memory);
    const Shared shared = prepare(p, in, parts, threads);
    const Gradients out{grad_scores, grad_value, grad_bias, grad_weight};
    const auto find = [&](const int8_t *wanted) {
        each_task(p, p.window_bands, p.rows, threads, wanted,
                  [&](int64_t image, int64_t head, int64_t top, int64_t rows, int64_t band, int thread) {
                      measure_head(p, in, shared, grad, image, head, top, rows,
                                   parts.own + thread * parts.own_floats, parts.stats,
                                   parts.means + band * p.pairs);
                  });
        each_task(p, p.token_bands, p.height, threads, wanted,
                  [&](int64_t image, int64_t head, int64_t top, int64_t rows, int64_t band, int thread) {
                      gather_head(p, in, shared, grad, parts.stats, image, head, top, rows,
                                  parts.own + thread * parts.own_floats, out,
                                  parts.partials + band * 2 * p.pairs * p.offsets,
                                  parts.differences + band * p.pairs);
                  });
    };
    find(nullptr);
    if (look_again(p, parts, shared)) find(parts.again);
    add_partials(p, parts.partials, out);
}

}  // extern "C"
