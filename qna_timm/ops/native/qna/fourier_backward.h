// Gradients by transforms. With r = 1 / D and g the output's gradient, of N and D
//
//     dN = r g,   dD = -r sum_c N dN
//
// and from these by the transpose of the sums, and by products of spectra for tables:
//
//     e value : sum_o above[o] dN[t - o]         e     : sum_o below[o] dD[t - o]
//     above   : sum_y dN[y] (e value)[y + o]     below : sum_y dD[y] e[y + o]

#pragma once

#include "backward.h"
#include "fourier_forward.h"

namespace qna {

inline double square(double x) { return x * x; }

// Spectra of tokens and of gradients of their windows -> the sum of products for the table's
// gradient, the gradient of tokens in place of that of windows, and the windows' sums in place of
// tokens, if wanted.
template <bool SUMS, class Factor>
void filter_back(const Desk &at, const Tile &tile, Factor factor, Complex *products) {
    const int64_t length = at.down.length;
    Complex *column = at.plane, *grads = at.grads;
    for (int64_t k = 0; k < at.grid.half; k++, products += length) {
        transform_column(at, tile.down.tokens, column, at.c);
        transform_column(at, tile.down.windows, grads, at.d);
        for (int64_t i = 0; i < length; i++) {
            const Complex token = at.c[i], grad = at.d[i];
            const auto own = factor(k * length + i);
            products[i] = products[i] + conjugate(grad) * token;
            if (SUMS) at.c[i] = token * own;
            at.d[i] = grad * conjugate(own);
        }
        if (SUMS) transform<true>(at.down, at.c, at.b, column);
        transform<true>(at.down, at.d, at.b, grads);
        column += at.grid.column;
        grads += at.grid.column;
    }
}

// A query's part in a tile of an image: planes of its pairs, and sums of its products of spectra.
struct Query {
    const float *attn, *inverse;
    float *slopes, *by_score;
    Complex *products;

    Query(const Fourier &f, const Desk &at, int64_t image, const Group &group, int64_t query)
        : attn(f.attn.at(image, f.pair(group, query))),
          inverse(f.inverse.at(image, f.pair(group, query))),
          slopes(f.slopes.at(image, f.pair(group, query))),
          by_score(f.by_score.at(image, f.pair(group, query))),
          products(at.products + query * f.grid.spectrum) {}
};

// Transforms rows of dN = r g; returns the sum of its squares.
template <int HEADS>
Vec transform_grads(const Fourier &f, const Desk &at, const Tile &tile, const float *inverse,
                    const Lanes &lanes) {
    const Area &area = tile.windows;
    Vec square = Vec{};
    const auto grads = [&](int64_t y, auto put) {
        const float *r = inverse + area.row(y);
        const Vec *grad = at.windows + y * area.cols;
        for (int64_t x = 0; x < area.cols; x++) {
            const Vec own = grad[x] * spread<HEADS>(r + x, f.inverse.plane, lanes);
            square += own * own;
            put(x, own);
        }
    };
    transform_rows(at, tile.down.windows, tile.across.windows, at.grads, grads);
    return square;
}

// From planes of N and of gradients of e value: sum_c N dN of windows, gradients of e and of values.
template <int HEADS>
void gather_rows(const Fourier &f, const Desk &at, const Tile &tile, const Query &of,
                 const Lanes &lanes) {
    const Area &windows = tile.windows, &tokens = tile.tokens;
    const auto add_slopes = [&](int64_t y, auto sums) {
        const float *inverse = of.inverse + windows.row(y);
        const Vec *grad = at.windows + y * windows.cols;
        for (int64_t x = 0; x < windows.cols; x++) {
            at.row[x] = sums(x) * grad[x] * spread<HEADS>(inverse + x, f.inverse.plane, lanes);
        }
        collect(f.p, at.row, windows.cols, lanes, of.slopes + windows.row(y), f.slopes.plane);
    };
    transform_rows_back(at, tile.down.windows, tile.across.windows, at.plane, add_slopes);
    const auto add_grads = [&](int64_t r, auto by_weighted) {
        const float *e = of.attn + tokens.row(r);
        const Vec *value = at.tokens + r * tokens.cols;
        Vec *by_value = at.more_tokens + r * tokens.cols;
        for (int64_t x = 0; x < tokens.cols; x++) {
            const Vec own = by_weighted(x);
            at.row[x] = own * value[x];
            by_value[x] += own * spread<HEADS>(e + x, f.attn.plane, lanes);
        }
        collect(f.p, at.row, tokens.cols, lanes, of.by_score + tokens.row(r), f.by_score.plane);
    };
    transform_rows_back(at, tile.down.tokens, tile.across.tokens, at.grads, add_grads);
}

// Adds to gradients of a tile what comes from N of one query.
template <int HEADS>
void gather_query(const Fourier &f, const Desk &at, const Tile &tile, const Query &of,
                  const Lanes &lanes, int64_t pair, Magnitudes *magnitudes) {
    const auto [weighted, attn] = transform_weighted<HEADS>(f, at, tile, of.attn, lanes);
    const Vec grads = transform_grads<HEADS>(f, at, tile, of.inverse, lanes);
    filter_back<true>(at, tile, Above<HEADS>(f, pair, lanes), of.products);
    gather_rows<HEADS>(f, at, tile, of, lanes);
    for (int64_t n = 0; n < lanes.count; n++) {
        Magnitudes &own = magnitudes[lanes.own[n]];
        own.weighted += weighted[n];
        own.grads += grads[n];
        own.weighted_grads += double(weighted[n]) * grads[n];
        own.attn_grads += double(attn[n]) * grads[n];
    }
}

// Squares of a vector's channels of all tokens of an image, for each head.
inline void add_squares(const Problem &p, const float *map, const Lanes &lanes, float *heads) {
    Vec square = Vec{};
    each_place(p, {0, p.height, p.width, p.width}, lanes, [&](int64_t place, int64_t) {
        const Vec own = load_some(map + place, lanes.count);
        square += own * own;
    });
    for (int64_t n = 0; n < lanes.count; n++) heads[lanes.own[n]] += square[n];
}

// Gradients of an image's values, and what scores get from N, for a group of heads.
template <int HEADS>
void gather_image(const Fourier &f, const Desk &at, const Inputs &in, const float *grad,
                  int64_t image, const Group &group, float *out) {
    const Problem &p = f.p;
    const float *value = in.value + image * p.height * p.width * p.channels;
    float *squares = f.grad_values + image * p.heads + group.head;
    grad += image * p.rows * p.cols * p.channels;
    out += image * p.height * p.width * p.channels;
    const auto gather = [&](const Tile &tile, const Lanes &lanes) {
        get_lanes(p, value, tile.tokens, lanes, at.tokens);
        get_lanes(p, grad, tile.windows, lanes, at.windows);
        get_lanes(p, out, tile.tokens, lanes, at.more_tokens);
        for (int64_t query = 0; query < p.queries; query++) {
            const int64_t pair = f.pair(group, query);
            gather_query<HEADS>(f, at, tile, Query(f, at, image, group, query), lanes, pair,
                                f.magnitudes + image * p.pairs + pair);
        }
        each_place(p, tile.tokens, lanes, [&](int64_t place, int64_t i) {
            store_some(out + place, at.more_tokens[i], lanes.count);
        });
    };
    std::fill(squares, squares + group.heads, 0.0f);
    for (int64_t vector = 0; vector < f.vectors; vector++) {
        const Lanes lanes = f.lanes(group, vector);
        each_place(p, {0, p.height, p.width, p.width}, lanes, [&](int64_t place, int64_t) {
            store_some(out + place, Vec{}, lanes.count);
        });
        f.grid.each_tile(p, [&](const Tile &tile) { gather(tile, lanes); });
        add_squares(p, out, lanes, squares);
    }
}

// Sums of a query's products over channels of each head, [spectrum, re and im, wide].
inline void put_products(const Fourier &f, const Complex *products, const Lanes &lanes, float *to) {
    for (int64_t i = 0; i < f.grid.spectrum; i++) {
        for (const Vec part : {products[i].re, products[i].im}) {
            std::fill(to, to + lanes.heads, 0.0f);
            // of one head all channels are in the sum, those of its other vectors too
            const int64_t count = lanes.heads > 1 ? lanes.count : LANES;
            for (int64_t n = 0; n < count; n++) to[lanes.own[n]] += part[n];
            to += f.wide;
        }
    }
}

template <int HEADS>
void gather_group(const Fourier &f, const Desk &at, const Inputs &in, const float *grad,
                  int64_t chunk, const Group &group, float *out) {
    const Problem &p = f.p;
    const int64_t first = chunk * IMAGES_AT_ONCE, last = std::min(p.batch, first + IMAGES_AT_ONCE);
    std::fill(at.products, at.products + p.queries * f.grid.spectrum, Complex{});
    for (int64_t image = first; image < last; image++) {
        for (int64_t query = 0; query < p.queries; query++) {
            for (int64_t n = f.pair(group, query); n < f.pair(group, query) + group.heads; n++) {
                std::fill_n(f.slopes.at(image, n), f.slopes.plane, 0.0f);
                std::fill_n(f.by_score.at(image, n), f.by_score.plane, 0.0f);
            }
        }
        gather_image<HEADS>(f, at, in, grad, image, group, out);
    }
    for (int64_t query = 0; query < p.queries; query++) {
        float *to = f.above_products + chunk * f.grid.spectrum * 2 * f.wide;
        put_products(f, at.products + query * f.grid.spectrum, f.lanes(group, 0),
                     to + f.pair(group, query));
    }
}

// Begins an image's gradients of scores with what comes from D, for a pack's pairs.
inline void gather_below(const Fourier &f, const Desk &at, int64_t image, int64_t pack,
                         Magnitudes *magnitudes, float *out) {
    const Problem &p = f.p;
    const int64_t count = std::min<int64_t>(LANES, p.pairs - pack * LANES);
    const Complex *below = f.below + pack * f.grid.spectrum;
    for (int64_t t = 0; t < p.height * p.width; t++) store_some(out + t * p.pairs, Vec{}, count);
    f.grid.each_tile(p, [&](const Tile &tile) {
        const Part &down = tile.down, &across = tile.across;
        get_pack(f.attn, image, pack, tile.tokens, at.tokens);
        get_pack(f.slopes, image, pack, tile.windows, at.windows);
        get_pack(f.inverse, image, pack, tile.windows, at.more_windows);
        for (int64_t y = 0; y < tile.windows.count(); y++) at.windows[y] *= -at.more_windows[y];
        Vec attn = Vec{}, grads = Vec{};
        transform_rows(at, down.tokens, across.tokens, at.plane,
                       rows_of(at.tokens, tile.tokens, attn));
        transform_rows(at, down.windows, across.windows, at.grads,
                       rows_of(at.windows, tile.windows, grads));
        for (int64_t n = 0; n < count; n++) magnitudes[n].attn_below += double(attn[n]) * grads[n];
        filter_back<false>(at, tile, [=](int64_t n) { return below[n]; }, at.products);
        transform_rows_back(at, down.tokens, across.tokens, at.grads, [&](int64_t r, auto sums) {
            const Vec *e = at.tokens + r * tile.tokens.cols;
            float *to = out + tile.tokens.row(r) * p.pairs;
            for (int64_t x = 0; x < tile.tokens.cols; x++, to += p.pairs) {
                store_some(to, load_some(to, count) + e[x] * sums(x), count);
            }
        });
    });
}

// Gradients of an image's scores, for a pack's pairs.
inline void gather_scores(const Fourier &f, const Desk &at, int64_t image, int64_t pack,
                          float *out) {
    const Problem &p = f.p;
    const int64_t first = pack * LANES, count = std::min<int64_t>(LANES, p.pairs - first);
    Magnitudes *magnitudes = f.magnitudes + image * p.pairs + first;
    out += image * p.height * p.width * p.pairs + first;
    gather_below(f, at, image, pack, magnitudes, out);
    Vec by_value = Vec{}, by_total = Vec{}, total = Vec{};
    f.grid.each_row(p, [&](const Area &row) {
        get_pack(f.attn, image, pack, row, at.tokens);
        get_pack(f.by_score, image, pack, row, at.more_tokens);
        float *to = out + row.first * p.pairs;
        for (int64_t x = 0; x < row.cols; x++, to += p.pairs) {
            const Vec above = at.tokens[x] * at.more_tokens[x], below = load_some(to, count);
            const Vec both = above + below;
            store_some(to, both, count);
            by_value += above * above;
            by_total += below * below;
            total += both * both;
        }
    });
    for (int64_t n = 0; n < count; n++) {
        magnitudes[n].by_value = by_value[n];
        magnitudes[n].by_total = by_total[n];
        magnitudes[n].total = total[n];
    }
}

inline void gather_pack(const Fourier &f, const Desk &at, int64_t chunk, int64_t pack,
                        float *out) {
    const int64_t first = chunk * IMAGES_AT_ONCE;
    const int64_t last = std::min(f.p.batch, first + IMAGES_AT_ONCE);
    std::fill(at.products, at.products + f.grid.spectrum, Complex{});
    for (int64_t image = first; image < last; image++) gather_scores(f, at, image, pack, out);
    float *to = f.below_products + chunk * f.grid.spectrum * 2 * f.wide + pack * LANES;
    for (int64_t i = 0; i < f.grid.spectrum; i++, to += 2 * f.wide) {
        store(to, at.products[i].re);
        store(to + f.wide, at.products[i].im);
    }
}

// Products of spectra of all chunks -> gradients of a pack's tables, [offsets, pairs].
inline void put_tables(const Fourier &f, const Desk &at, const float *products, int64_t pack,
                       float *to) {
    const Problem &p = f.p;
    const int64_t first = pack * LANES, length = f.grid.down.length;
    const Places rows = {0, p.kernel_h, 1}, cols = {0, p.kernel_w, 1};
    const float scale = 0.25f / float(f.grid.points());
    for (int64_t k = 0; k < f.grid.half; k++) {
        for (int64_t i = 0; i < length; i++) {
            Complex total = {};
            for (int64_t chunk = 0; chunk < f.chunks; chunk++) {
                const int64_t point = chunk * f.grid.spectrum + k * length + i;
                const float *own = products + point * 2 * f.wide + first;
                total = total + Complex{load(own), load(own + f.wide)};
            }
            at.c[i] = total * scale;
        }
        transform<true>(at.down, at.c, at.b, at.plane + k * f.grid.column);
    }
    transform_rows_back(at, rows, cols, at.plane, [&](int64_t y, auto sums) {
        float *own = to + y * p.kernel_w * p.pairs + first;
        for (int64_t x = 0; x < p.kernel_w; x++, own += p.pairs) {
            store_some(own, sums(x), p.pairs - first);
        }
    });
}

// Squares of norms of one head's gradients, of both terms of them, and of what may be wrong.
struct Squares {
    double first = 0, second = 0, total = 0, error = 0;

    bool fits() const {
        const double terms = std::sqrt(first) + std::sqrt(second);
        const double most = std::sqrt(error) + ROUNDINGS * FLT_EPSILON * terms;
        return std::isfinite(most) && most <= GRAD_TOLERANCE * std::sqrt(total);
    }
};

// Squares of errors of a pair's gradients in an image: of sums of gradients of N with a table of norm
// 1, of these with e, and of gradients of D. To the rounding of transforms comes that of D, spread
// evenly over windows too, and in gradients of D that of N.
struct Errors {
    double above, values, below;

    Errors(const Fourier &f, const Magnitudes &of, int64_t pair) {
        const double noise = square(f.grid.noise());
        const double by_sum = square(of.sum_error / PEAK) / double(f.grid.points());
        const double by_above = noise * square(f.above_norm[pair] / of.least_sum);
        above = (noise + by_sum) * of.weighted_grads;
        values = (noise + by_sum) * of.attn_grads;
        below = (noise + 4 * by_sum) * of.attn_below +
                by_above * of.weighted_grads * of.attn / double(f.grid.points());
    }
};

// Gradients of a pair's bias and weight from those of its tables, in place, whose errors have the
// squares `above` and `below`.
inline void finish_tables(const Fourier &f, const Inputs &in, const Shared &shared, int64_t pair,
                          double above, double below, const Gradients &out, Squares &bias,
                          Squares &weight) {
    const Problem &p = f.p;
    const Head at = {0, pair % p.heads, pair / p.heads, 1};
    const float *table = table_of(p, shared, BELOW, at, 0);
    const float *weights = table_of(p, shared, WEIGHT, at, 0);
    double one_row = 0, all_rows = 0;
    for (int64_t o = 0; o < p.offsets; o++) {
        float &by_bias = out.bias[o * p.pairs + pair], &by_weight = out.weight[o * p.pairs + pair];
        by_weight *= table[o];
        const float first = by_weight * weights[o], second = by_bias * table[o];
        by_bias = first + second;
        bias.first += square(first);
        bias.second += square(second);
        bias.total += square(by_bias);
        bias.error += above * square(table[o] * weights[o]) + below * square(table[o]);
        weight.error += above * square(table[o]);
        one_row += by_weight;
        all_rows += square(by_weight);
    }
    weight.total += in.weight_rows > 1 ? all_rows : square(one_row);
}

// Whether errors of all of a head's gradients are small beside them, which this finishes.
inline bool finish_head(const Fourier &f, const Inputs &in, const Shared &shared, int64_t head,
                        const Gradients &out) {
    const Problem &p = f.p;
    Squares scores, values, bias, weight;
    double all_weighted = 0, all_grads = 0;
    for (int64_t pair = head; pair < p.pairs; pair += p.heads) {
        double above = 0, below = 0;
        for (int64_t image = 0; image < p.batch; image++) {
            const Magnitudes &of = f.magnitudes[image * p.pairs + pair];
            const Errors errors(f, of, pair);
            above += errors.above;
            below += errors.below;
            values.error += errors.values * square(f.above_norm[pair]);
            scores.first += of.by_value;
            scores.second += of.by_total;
            scores.total += of.total;
            all_weighted += of.weighted;
            all_grads += of.grads;
        }
        scores.error += above * square(f.above_norm[pair]) + below * square(f.below_norm[pair]);
        finish_tables(f, in, shared, pair, above, below, out, bias, weight);
    }
    for (int64_t image = 0; image < p.batch; image++) {
        values.total += f.grad_values[image * p.heads + head];
    }
    return is_sound(float(all_weighted)) && is_sound(float(all_grads)) && scores.fits() &&
           values.fits() && (!in.bias || bias.fits()) && (!in.weight || weight.fits());
}

// Marks heads that are left to be computed directly, for all images, as [batch, heads].
inline void backward_by_transforms(const Fourier &f, const Inputs &in, const Shared &shared,
                                   const float *grad, const Gradients &out, int8_t *left) {
    const Problem &p = f.p;
    find_sums(f, in, shared, true);
    mark_lost(f, shared, left);
    for (int64_t i = 0; i < p.batch * p.heads; i++) left[i % p.heads] |= left[i];
    if (all_left(left, p.heads)) return std::fill(left, left + p.batch * p.heads, int8_t(1));
    each_desk(f, true, f.chunks * f.groups, [&](const Desk &at, int64_t i) {
        const Group group = f.group(i % f.groups);
        if (all_left(left + group.head, group.heads)) return;
        for_heads(group, [&](auto heads) {
            gather_group<heads()>(f, at, in, grad, i / f.groups, group, out.value);
        });
    });
    each_desk(f, true, f.chunks * f.packs, [&](const Desk &at, int64_t i) {
        gather_pack(f, at, i / f.packs, i % f.packs, out.scores);
    });
    each_desk(f, true, f.packs, [&](const Desk &at, int64_t pack) {
        put_tables(f, at, f.above_products, pack, out.weight);
        put_tables(f, at, f.below_products, pack, out.bias);
    });
    for (int64_t head = 0; head < p.heads; head++) {
        if (!left[head]) left[head] = !finish_head(f, in, shared, head, out);
    }
    for (int64_t i = p.heads; i < p.batch * p.heads; i++) left[i] = left[i % p.heads];
}

}  // namespace qna
