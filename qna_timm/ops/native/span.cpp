// Local self-attention with relative keys and a weighted window, and its gradient, on a CPU, called
// from span/native.py by its C interface.
//
//     score[o] = scale q[y] . (k[y+o] + rel_pos[o]),   e[o] = exp(score[o] - max score)
//     out[y]   = sum_o m[o] e[o] v[y+o] / sum_o (m[o] + floor[o]) e[o]
//
// A head of an image at a time, or rows of it: its tokens are laid out as planes, in which a shift
// by one token is a shift of an address, and neighbouring queries are computed side by side in one
// vector.

#include "span/backward.h"
#include "span/forward.h"

namespace span {

// To be raised with every change, here and in span/native.py: an installation in place may hold an
// older library.
constexpr int64_t VERSION = 3;

// The caller's memory in parts: what all tasks share, then what a thread has of its own.
struct Memory {
    Bands bands;
    float *rel_pos, *partials, *own;
    int threads;
    int64_t own_floats, floats;

    // At `start`, or with null only how many floats it takes.
    Memory(const Problem &p, bool backward, int most_threads, float *start)
        : bands(p.height, backward ? BACKWARD_ROWS : FORWARD_ROWS),
          threads(needed(most_threads, p.tasks(bands))) {
        Parts from(start);
        rel_pos = from.take(p.heads * 2 * p.kernel * p.wide);
        partials = from.take(backward ? p.tasks(bands) * p.partial() : 0);
        own_floats = backward ? BackwardRoom(p, bands.rows, nullptr).floats
                              : ForwardRoom(p, bands.rows, nullptr).floats;
        own = from.take(threads * own_floats);
        floats = from.floats;
    }

    float *of_thread(int thread) const { return own + thread * own_floats; }
};

// Calls `run` with the channels that are computed together, to compile for.
template <class Run> void compiled_for(const Problem &p, Run run) {
    p.chunk == 8 ? run(std::integral_constant<int, 8>()) : run(std::integral_constant<int, 16>());
}

static void add_partials(const Problem &p, const Memory &memory, float *grad_rel_pos,
                         float *grad_mask) {
    std::fill(grad_rel_pos, grad_rel_pos + p.channels * 2 * p.kernel, 0.0f);
    std::fill(grad_mask, grad_mask + p.heads * p.offsets, 0.0f);
    for (int64_t i = 0; i < p.tasks(memory.bands); i++) {
        const int64_t head = i % p.heads;
        const float *partial = memory.partials + i * p.partial();
        for (int64_t c = 0; c < p.dim; c++) {
            float *row = grad_rel_pos + (head * p.dim + c) * 2 * p.kernel;
            for (int64_t j = 0; j < 2 * p.kernel; j++) row[j] += partial[j * p.wide + c];
        }
        partial += 2 * p.kernel * p.wide;
        for (int64_t o = 0; o < p.offsets; o++) grad_mask[head * p.offsets + o] += partial[o];
    }
}

}  // namespace span

// Sizes: batch, height, width, heads, channels of a head, kernel size, whether offsets off the map
// are left out. Maps are contiguous: qkv and its gradient [batch, height, width, 3 * channels],
// tables of rows and columns [channels, kernel], mask [heads, offsets] or null, floor [offsets] or
// null; the tables' gradients [channels, 2 * kernel] and [heads, offsets]. `memory` has
// `span_floats` numbers.
extern "C" {

int64_t span_version() { return span::VERSION; }

// Of a vector, by which tests know what a library was compiled for.
int64_t span_lanes() { return LANES; }

int64_t span_floats(const int64_t *sizes, int backward, int threads) {
    return span::Memory(span::Problem(sizes), backward, threads, nullptr).floats;
}

void span_forward(const int64_t *sizes, const float *qkv, const float *rel_pos_h,
                  const float *rel_pos_w, const float *mask, const float *floor, float scale,
                  float *memory, int threads, float *out) {
    using namespace span;
    const Problem p(sizes);
    const Inputs in{qkv, rel_pos_h, rel_pos_w, mask, floor, scale};
    const Memory own(p, false, threads, memory);
    const std::vector<Head> heads = make_heads(p, in, own.rel_pos);
    compiled_for(p, [&](auto chunk) {
        each_task(p, own.bands, own.threads, [&](const Task &task) {
            forward_task<chunk()>(p, in, heads[task.head], task,
                                  own.of_thread(task.thread), out);
        });
    });
}

void span_backward(const int64_t *sizes, const float *grad, const float *qkv,
                   const float *rel_pos_h, const float *rel_pos_w, const float *mask,
                   const float *floor, float scale, float *memory, int threads, float *grad_qkv,
                   float *grad_rel_pos, float *grad_mask) {
    using namespace span;
    const Problem p(sizes);
    const Inputs in{qkv, rel_pos_h, rel_pos_w, mask, floor, scale};
    const Memory own(p, true, threads, memory);
    const std::vector<Head> heads = make_heads(p, in, own.rel_pos);
    const Gradients gradients{grad_qkv, own.partials};
    compiled_for(p, [&](auto chunk) {
        each_task(p, own.bands, own.threads, [&](const Task &task) {
            backward_task<chunk()>(p, in, heads[task.head], task, grad,
                                   own.of_thread(task.thread), gradients);
        });
    });
    add_partials(p, own, grad_rel_pos, grad_mask);
}

}  // extern "C"
