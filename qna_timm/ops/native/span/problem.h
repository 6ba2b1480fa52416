// The sizes of a problem, where its numbers lie, and how it is cut into tasks.
//
// Rows of a map follow each other in planes with `radius` zeros between them: an offset of a window
// is one shift of an address wherever the window is, and vectors run on from row to row.
//
// Letters: y query, t token, o offset in a window.

#pragma once

#include "../planes.h"
#include "../tasks.h"
#include "../vectors.h"

namespace span {

// Rows of queries, or of tokens, that a task computes at most. Backward computes the queries around
// its tokens once more.
constexpr int64_t FORWARD_ROWS = 16, BACKWARD_ROWS = 32;

struct Problem {
    int64_t batch, height, width, heads, dim, kernel;
    bool mask_padding;
    int64_t radius, offsets, channels, pitch;
    // Channels that are computed together, and of a head with empty ones.
    int64_t chunk, wide;

    explicit Problem(const int64_t *n)
        : batch(n[0]), height(n[1]), width(n[2]), heads(n[3]), dim(n[4]), kernel(n[5]),
          mask_padding(n[6]), radius(kernel / 2), offsets(kernel * kernel), channels(heads * dim),
          pitch(width + radius), chunk(parts(dim, 8) % 2 ? 8 : 16), wide(parts(dim, 8) * 8) {}

    int64_t tasks(const Bands &bands) const { return batch * bands.count * heads; }

    // Floats of a token, of queries, keys and values.
    int64_t token() const { return 3 * channels; }
    int64_t image(int64_t floats) const { return height * width * floats; }

    // Floats of a plane of rows, and of those that rows of queries see: `radius` more on all sides.
    // A vector may begin anywhere in a row and end after it.
    int64_t plane(int64_t rows) const { return apart(rows * pitch + 2 * LANES); }
    int64_t seen_plane(int64_t rows) const {
        return apart(rows * pitch + 2 * LANES + (kernel - 1) * (pitch + 1));
    }
    // Gradients of a head's tables.
    int64_t partial() const { return 2 * kernel * wide + offsets; }
};

// Rows of a head of an image, from `top` on.
struct Task {
    int64_t index, image, head, top, rows;
    int thread;
};

// Calls `run(task)` for all bands of all heads and images. Who computes what changes no result.
template <class Run> void each_task(const Problem &p, const Bands &bands, int threads, Run run) {
    each_of(p.tasks(bands), threads, [&](int64_t i, int thread) {
        const int64_t top = i / p.heads % bands.count * bands.rows;
        run(Task{i, i / p.heads / bands.count, i % p.heads, top,
                 std::min(bands.rows, p.height - top), thread});
    });
}

}  // namespace span
