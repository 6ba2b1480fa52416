// Learned-query attention and its gradient on a CPU, called from qna/native.py by its C interface.
//
//     a_q[y, o] = exp(score_q[y+o] + bias_q[o]) / D_q[y],   D_q[y] = sum_o exp(...)
//     out[y]    = sum_o (sum_q weight_q[o] a_q[y, o]) value[y+o]
//
// A head at a time: its tokens are laid out as planes, in which a shift by one token is a shift of
// an address, and neighbouring tokens of a row are computed side by side in one vector. Of wide
// windows both sums come from Fourier transforms, where these are exact enough for a head.
//
// Threads are those of the OpenMP runtime that PyTorch has loaded. This library is linked to none:
// two runtimes would compete for the processors.

#include "qna/backward.h"
#include "qna/forward.h"
#include "qna/fourier_backward.h"
#include "qna/fourier_forward.h"

namespace qna {

// To be raised with every change, here and in qna/native.py: an installation in place may hold an
// older library.
constexpr int64_t VERSION = 7;
// Sum of |gradient of scores| below so much of the sum of |mean| that it is the difference of:
// windows have one token of nearly all their weight there, and rounding is all that is left.
constexpr float LEAST_DIFFERENCE = 1e-3f;
// Of a window for which transforms are worth a thought.
constexpr int64_t FEWEST_OFFSETS = 16;

// The caller's memory in parts: what all tasks share, then what a thread has of its own.
struct Memory {
    float *tables, *ranges, *low, *high, *stats, *partials, *means, *differences, *own;
    int8_t *exact, *direct, *again;
    float *fourier;
    bool by_transforms;
    int threads;
    int64_t own_floats, floats;

    // At `start`, or with null only how many floats it takes.
    Memory(const Problem &p, bool backward, int most_threads, float *start) {
        const int64_t tasks = p.tasks(p.window_bands);
        threads = needed(most_threads, std::max(tasks, backward ? p.tasks(p.token_bands) : 0));
        Parts from(start);
        tables = from.take(TABLES * p.pairs * p.offsets);
        ranges = from.take(p.pairs);
        low = from.take(p.batch * p.pairs);
        high = from.take(p.batch * p.pairs);
        exact = reinterpret_cast<int8_t *>(from.take(p.batch * p.pairs));
        direct = reinterpret_cast<int8_t *>(from.take(p.batch * p.heads));
        again = reinterpret_cast<int8_t *>(from.take(p.batch * p.heads));
        by_transforms = p.transforms == ALWAYS;
        if (p.transforms == WHERE_FASTER && p.offsets >= FEWEST_OFFSETS) {
            by_transforms = Fourier(p, backward, most_threads, nullptr).is_faster(backward);
        }
        // what transforms leave is computed in their memory, after them
        Parts transforms = from;
        fourier = transforms.take(0);
        const int64_t window_bands = backward ? p.batch * p.window_bands.count : 0;
        const int64_t token_bands = backward ? p.batch * p.token_bands.count : 0;
        stats = from.take(backward ? p.batch * p.pairs * STATS * p.stat_map() : 0);
        partials = from.take(token_bands * 2 * p.pairs * p.offsets);
        means = from.take(window_bands * p.pairs);
        differences = from.take(token_bands * p.pairs);
        own_floats = rounded_up(backward ? p.backward_floats() : p.forward_floats());
        own = from.take(threads * own_floats);
        floats = from.floats;
        if (by_transforms) {
            transforms.take(Fourier(p, backward, most_threads, nullptr).floats);
            floats = std::max(floats, transforms.floats);
        }
    }

    float *of_thread(int thread) const { return own + thread * own_floats; }
};

static Shared prepare(const Problem &p, const Inputs &in, const Memory &memory) {
    make_all_tables(p, in, memory.tables, memory.ranges);
    each_of(p.batch, memory.threads, [&](int64_t image, int) {
        const int64_t first = image * p.pairs;
        find_shifts(p, in.scores + first * p.height * p.width, memory.ranges, memory.low + first,
                    memory.high + first, memory.exact + first);
    });
    return {memory.tables, memory.high, memory.exact};
}

static float over_bands(const Problem &p, const float *sums, const Bands &bands, int64_t image,
                        int64_t pair) {
    float total = 0;
    for (int64_t band = 0; band < bands.count; band++) {
        total += sums[(image * bands.count + band) * p.pairs + pair];
    }
    return total;
}

// Which heads of images, of those that were computed directly, must be so again, with maxima of
// their own for all windows.
static bool look_again(const Problem &p, const Memory &memory, const Shared &shared) {
    bool any = false;
    std::fill(memory.again, memory.again + p.batch * p.heads, int8_t(0));
    for (int64_t i = 0; i < p.batch * p.pairs; i++) {
        const int64_t image = i / p.pairs, pair = i % p.pairs;
        const int64_t head = image * p.heads + pair % p.heads;
        if (shared.exact[i] || !memory.direct[head]) continue;
        const float left = over_bands(p, memory.differences, p.token_bands, image, pair);
        const float of = over_bands(p, memory.means, p.window_bands, image, pair);
        if (!(left < LEAST_DIFFERENCE * of)) continue;
        shared.exact[i] = memory.again[head] = 1;
        any = true;
    }
    return any;
}

// Gradients of tables of the heads that were computed directly.
static void add_partials(const Problem &p, const Memory &memory, const Gradients &out) {
    const int64_t table = p.offsets * p.pairs;
    const auto each = [&](auto run) {
        for (int64_t n = 0; n < table; n++) {
            if (memory.direct[n % p.heads]) run(n);
        }
    };
    each([&](int64_t n) { out.bias[n] = out.weight[n] = 0.0f; });
    const float *partials = memory.partials;
    for (int64_t i = 0; i < p.batch * p.token_bands.count; i++, partials += 2 * table) {
        each([&](int64_t n) {
            out.bias[n] += partials[n];
            out.weight[n] += partials[table + n];
        });
    }
}

// Marks the heads of images that transforms do not serve; returns how many there are.
template <class Run> static int64_t mark_direct(const Problem &p, const Memory &memory, Run run) {
    int8_t *end = memory.direct + p.batch * p.heads;
    std::fill(memory.direct, end, int8_t(1));
    if (memory.by_transforms && p.batch) run();
    return std::count(memory.direct, end, int8_t(1));
}

}  // namespace qna

// Sizes: batch, height, width, queries, heads, channels of a head, kernel height and width, stride,
// padding, and one of `Transforms`. Maps are contiguous: scores [batch, height, width, queries,
// heads], value and gradients [batch, height, width, heads * channels], bias [offsets, queries,
// heads] or null, weight the same or of one row. `memory` has `qna_floats` numbers. What computes
// returns how many heads of images it computed directly.
extern "C" {

int64_t qna_version() { return qna::VERSION; }

// Of a vector, by which tests know what a library was compiled for.
int64_t qna_lanes() { return LANES; }

int64_t qna_floats(const int64_t *sizes, int backward, int threads) {
    return qna::Memory(qna::Problem(sizes), backward, threads, nullptr).floats;
}

int64_t qna_forward(const int64_t *sizes, const float *scores, const float *value,
                    const float *bias, const float *weight, int64_t weight_rows, float *memory,
                    int threads, float *out) {
    using namespace qna;
    const Problem p(sizes);
    const Inputs in{scores, value, bias, weight, weight_rows};
    const Memory own(p, false, threads, memory);
    const Shared shared = prepare(p, in, own);
    const int64_t left = mark_direct(p, own, [&] {
        forward_by_transforms(Fourier(p, false, threads, own.fourier), in, shared, out, own.direct);
    });
    if (!left) return 0;
    each_task(p, p.window_bands, p.rows, own.threads, own.direct, [&](const Task &task) {
        forward_task(p, in, shared, task, own.of_thread(task.thread), out);
    });
    return left;
}

int64_t qna_backward(const int64_t *sizes, const float *grad, const float *scores,
                     const float *value, const float *bias, const float *weight,
                     int64_t weight_rows, float *memory, int threads, float *grad_scores,
                     float *grad_value, float *grad_bias, float *grad_weight) {
    using namespace qna;
    const Problem p(sizes);
    const Inputs in{scores, value, bias, weight, weight_rows};
    const Memory own(p, true, threads, memory);
    const Shared shared = prepare(p, in, own);
    const Gradients out{grad_scores, grad_value, grad_bias, grad_weight};
    const Stats stats{own.stats};
    std::fill(grad_bias, grad_bias + p.offsets * p.pairs, 0.0f);
    std::fill(grad_weight, grad_weight + p.offsets * p.pairs, 0.0f);
    const int64_t left = mark_direct(p, own, [&] {
        const Fourier fourier(p, true, threads, own.fourier);
        backward_by_transforms(fourier, in, shared, grad, out, own.direct);
    });
    if (!left) return 0;
    const auto find = [&](const int8_t *wanted) {
        each_task(p, p.window_bands, p.rows, own.threads, wanted, [&](const Task &task) {
            measure_task(p, in, shared, task, grad, stats, own.of_thread(task.thread),
                         own.means + task.band * p.pairs);
        });
        each_task(p, p.token_bands, p.height, own.threads, wanted, [&](const Task &task) {
            gather_task(p, in, shared, task, grad, stats, own.of_thread(task.thread), out,
                        own.partials + task.band * 2 * p.pairs * p.offsets,
                        own.differences + task.band * p.pairs);
        });
    };
    find(own.direct);
    if (look_again(p, own, shared)) find(own.again);
    add_partials(p, own, out);
    return left;
}

}  // extern "C"
