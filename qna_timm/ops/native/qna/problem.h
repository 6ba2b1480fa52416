// The sizes of a problem, what follows from them, and how it is cut into tasks.
//
// Letters: y window, t token, u = t + padding along a row, o offset in a window.

#pragma once

#include "../planes.h"
#include "../tasks.h"
#include "../vectors.h"

namespace qna {

// Rows of windows, or of tokens, that a task computes, and channels: what a second-level cache
// holds.
constexpr int64_t BAND_ROWS = 16;
constexpr int64_t GROUP_CHANNELS = 64;
// Of a head.
constexpr int MOST_CHANNELS = 64;

// Whether windows' sums come from Fourier transforms, as far as these are exact enough.
enum Transforms { NEVER, WHERE_FASTER, ALWAYS };

// What is known of a window before gradients.
enum Stat { INVERSE, MEAN, SHIFT, TOP, STATS };

// Tokens of a row are laid out in `stride` phases of `places` each: u is at place u / stride of
// phase u % stride, so that neighbouring windows find their tokens side by side.
struct Problem {
    int64_t batch, height, width, queries, heads, dim, kernel_h, kernel_w, stride, padding;
    int64_t transforms;  // of `Transforms`
    int64_t rows, cols, offsets, pairs, channels;
    // Places before the first window of a row of windows with margins; of tokens, from place
    // padding / stride on; of windows; and of rows of tokens and of windows with margins.
    int64_t lead, token_places, window_places, places, stat_places;
    Bands window_bands, token_bands;
    int64_t group_heads, groups;

    explicit Problem(const int64_t *n)
        : batch(n[0]), height(n[1]), width(n[2]), queries(n[3]), heads(n[4]), dim(n[5]),
          kernel_h(n[6]), kernel_w(n[7]), stride(n[8]), padding(n[9]),
          transforms(n[10]),
          rows((height + 2 * padding - kernel_h) / stride + 1),
          cols((width + 2 * padding - kernel_w) / stride + 1), offsets(kernel_h * kernel_w),
          pairs(queries * heads), channels(heads * dim), lead((kernel_w - 1) / stride),
          token_places(rounded_up(parts(width + padding % stride, stride))),
          window_places(rounded_up(cols)),
          places(rounded_up(std::max(window_places + lead, last_token_place()))),
          stat_places(rounded_up(std::max(window_places, last_token_place()) + lead)),
          window_bands(rows, BAND_ROWS), token_bands(height, BAND_ROWS),
          group_heads(std::min(heads, std::max<int64_t>(1, GROUP_CHANNELS / dim))),
          groups(parts(heads, group_heads)) {}

    int64_t tasks(const Bands &bands) const { return batch * bands.count * groups; }

    int64_t last_token_place() const { return padding / stride + token_places; }

    // Floats of a row of tokens, and of planes of so many rows of tokens, windows, and windows
    // with margins.
    int64_t row() const { return stride * places; }
    int64_t plane(int64_t token_rows) const { return apart(token_rows * row()); }
    int64_t out_plane(int64_t window_rows) const { return apart(window_rows * window_places); }
    int64_t stat_plane(int64_t window_rows) const { return apart(window_rows * stat_places); }

    int64_t seen_rows(int64_t window_rows) const { return (window_rows - 1) * stride + kernel_h; }
    int64_t seeing_rows(int64_t token_rows) const { return (token_rows + kernel_h) / stride + 2; }
    // Of one number of all windows of a map.
    int64_t stat_map() const { return rows * stat_places; }
    // Of a vector for each offset and query.
    int64_t offset_floats() const { return queries * offsets * LANES; }

    int64_t forward_floats() const {
        const int64_t band = window_bands.rows;
        return (queries + dim) * plane(seen_rows(band)) + dim * out_plane(band);
    }

    int64_t backward_floats() const {
        const int64_t seen = plane(seen_rows(window_bands.rows)), own = plane(token_bands.rows);
        const int64_t seeing = stat_plane(seeing_rows(token_bands.rows));
        return std::max((queries + dim) * seen + dim * out_plane(1),
                        2 * (queries + dim) * own + dim * seeing + 2 * offset_floats());
    }
};

// Rows of a head of an image, from `top` on.
struct Task {
    int64_t image, head, top, rows;
    int64_t band;  // among all bands of all images
    int thread;
};

// Calls `run(task)` for all wanted heads of all bands. Who computes what changes no result.
template <class Run>
void each_task(const Problem &p, const Bands &bands, int64_t height, int threads,
               const int8_t *wanted, Run run) {
    each_of(p.tasks(bands), threads, [&](int64_t i, int thread) {
        const int64_t group = i % p.groups, band = i / p.groups % bands.count;
        const int64_t image = i / p.groups / bands.count, top = band * bands.rows;
        const int64_t end = std::min(p.heads, (group + 1) * p.group_heads);
        for (int64_t head = group * p.group_heads; head < end; head++) {
            if (wanted && !wanted[image * p.heads + head]) continue;
            run(Task{image, head, top, std::min(bands.rows, height - top),
                     image * bands.count + band, thread});
        }
    });
}

}  // namespace qna
