// Learned-query attention and its gradient on a CPU, called from qna_native.py by its C interface.
//
//     a_q[y, o] = exp(score_q[y+o] + bias_q[o]) / D_q[y],   D_q[y] = sum_o exp(...)
//     out[y]    = sum_o (sum_q weight_q[o] a_q[y, o]) value[y+o]
//
// A head at a time: its tokens are laid out as planes, in which a shift by one token is a shift of
// an address, and neighbouring tokens of a row are computed side by side in one vector.
//
// Threads are those of the OpenMP runtime that PyTorch has loaded. This library is linked to none:
// two runtimes would compete for the processors.

#include "qna/backward.h"
#include "qna/forward.h"

namespace qna {

// To be raised with every change, here and in qna_native.py: an installation in place may hold an
// older library.
constexpr int64_t VERSION = 4;
// Sum of |gradient of scores| below so much of the sum of |mean| that it is the difference of:
// windows have one token of nearly all their weight there, and rounding is all that is left.
constexpr float LEAST_DIFFERENCE = 1e-3f;

// The caller's memory in parts: what all tasks share, then what a thread has of its own.
struct Memory {
    float *tables, *ranges, *low, *high, *stats, *partials, *means, *differences, *own;
    int8_t *exact, *again;
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
        again = reinterpret_cast<int8_t *>(from.take(p.batch * p.heads));
        const int64_t window_bands = backward ? p.batch * p.window_bands.count : 0;
        const int64_t token_bands = backward ? p.batch * p.token_bands.count : 0;
        stats = from.take(backward ? p.batch * p.pairs * STATS * p.stat_map() : 0);
        partials = from.take(token_bands * 2 * p.pairs * p.offsets);
        means = from.take(window_bands * p.pairs);
        differences = from.take(token_bands * p.pairs);
        own_floats = rounded_up(backward ? p.backward_floats() : p.forward_floats());
        own = from.take(threads * own_floats);
        floats = from.floats;
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

// Which heads of which images must be computed again, with maxima of their own for all windows.
static bool look_again(const Problem &p, const Memory &memory, const Shared &shared) {
    bool any = false;
    std::fill(memory.again, memory.again + p.batch * p.heads, int8_t(0));
    for (int64_t image = 0; image < p.batch; image++) {
        for (int64_t pair = 0; pair < p.pairs; pair++) {
            const float left = over_bands(p, memory.differences, p.token_bands, image, pair);
            const float of = over_bands(p, memory.means, p.window_bands, image, pair);
            int8_t &exact = shared.exact[image * p.pairs + pair];
            if (exact || !(left < LEAST_DIFFERENCE * of)) continue;
            exact = memory.again[image * p.heads + pair % p.heads] = 1;
            any = true;
        }
    }
    return any;
}

static void add_partials(const Problem &p, const float *partials, const Gradients &out) {
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

}  // namespace qna

// Sizes: batch, height, width, queries, heads, channels of a head, kernel height and width, stride,
// padding. Maps are contiguous: scores [batch, height, width, queries, heads], value and gradients
// [batch, height, width, heads * channels], bias [offsets, queries, heads] or null, weight the same
// or of one row. `memory` has `qna_floats` numbers.
extern "C" {

int64_t qna_version() { return qna::VERSION; }

int64_t qna_floats(const int64_t *sizes, int backward, int threads) {
    return qna::Memory(qna::Problem(sizes), backward, threads, nullptr).floats;
}

void qna_forward(const int64_t *sizes, const float *scores, const float *value, const float *bias,
                 const float *weight, int64_t weight_rows, float *memory, int threads, float *out) {
    using namespace qna;
    const Problem p(sizes);
    const Inputs in{scores, value, bias, weight, weight_rows};
    const Memory own(p, false, threads, memory);
    const Shared shared = prepare(p, in, own);
    each_task(p, p.window_bands, p.rows, own.threads, nullptr, [&](const Task &task) {
        forward_task(p, in, shared, task, own.of_thread(task.thread), out);
    });
}

void qna_backward(const int64_t *sizes, const float *grad, const float *scores, const float *value,
                  const float *bias, const float *weight, int64_t weight_rows, float *memory,
                  int threads, float *grad_scores, float *grad_value, float *grad_bias,
                  float *grad_weight) {
    using namespace qna;
    const Problem p(sizes);
    const Inputs in{scores, value, bias, weight, weight_rows};
    const Memory own(p, true, threads, memory);
    const Shared shared = prepare(p, in, own);
    const Gradients out{grad_scores, grad_value, grad_bias, grad_weight};
    const Stats stats{own.stats};
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
    find(nullptr);
    if (look_again(p, own, shared)) find(own.again);
    add_partials(p, own.partials, out);
}

}  // extern "C"
