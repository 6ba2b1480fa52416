// How a map and its windows lie on a grid of points that is transformed at once.

#pragma once

#include <limits>

#include "../transforms.h"
#include "problem.h"

namespace qna {

// Points first, first + step ... of a side.
struct Places {
    int64_t first, count, step;

    int64_t point(int64_t n) const { return first + n * step; }
};

// Windows of a side, the tokens that they see, and where both are; of each the first in the map.
struct Part {
    int64_t window, token;
    Places windows, tokens;
};

// A side of a map: in parts of `at_once` windows, each on `length` points. A window begins at its
// point; what it sees beyond the last point it finds at the first ones, where no token is.
struct Side {
    int64_t tokens, windows, kernel, stride, padding, at_once, length;

    Side(int64_t tokens, int64_t windows, int64_t kernel, int64_t stride, int64_t padding)
        : tokens(tokens), windows(windows), kernel(kernel), stride(stride), padding(padding) {
        int64_t least = std::numeric_limits<int64_t>::max();
        const auto consider = [&](int64_t points, int64_t together) {
            const int64_t cost = parts(windows, together) * points * Passes(points).cost();
            if (cost >= least) return;
            least = cost;
            length = points;
            at_once = together;
        };
        const int64_t whole = points_of(part_of(0, windows)), most = std::max(MOST, 4 * kernel);
        for (int64_t points = kernel; points <= 2 * most; points++) {
            if (!has_transform(points)) continue;
            const int64_t together = (points - kernel) / stride + 1;
            if (points >= whole) consider(points, windows);
            else if (points <= most) consider(points, std::min(windows, together));
        }
    }

    int64_t count() const { return parts(windows, at_once); }
    bool sees_all() const {
        return stride <= kernel && (windows - 1) * stride - padding + kernel >= tokens;
    }
    int64_t most_tokens() const { return std::min(tokens, (at_once - 1) * stride + kernel); }
    Part part(int64_t i) const {
        return part_of(i * at_once, std::min(at_once, windows - i * at_once));
    }

  private:
    // Points up to which caches hold the transform of a square.
    static constexpr int64_t MOST = 128;

    Part part_of(int64_t window, int64_t count) const {
        const int64_t start = window * stride - padding, end = start + (count - 1) * stride + kernel;
        const int64_t first = std::max<int64_t>(0, start), last = std::min(tokens, end);
        return {window, first, {0, count, stride}, {first - start, last - first, 1}};
    }

    int64_t points_of(const Part &part) const {
        const int64_t seen = (part.windows.count - 1) * stride + kernel;
        return std::max({part.tokens.first + part.tokens.count, seen - part.tokens.first, kernel});
    }
};

}  // namespace qna
