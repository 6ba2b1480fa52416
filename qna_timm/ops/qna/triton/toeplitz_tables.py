"""Triton kernel of the tables' gradients on tensor cores; read `toeplitz.py` first.

For row ky of the window, tokens t and output columns c of a tile,

    products[t, c] += sum_y exp(score[y + ky, t] - peak) f[y, c] <value, grad>,
    f = exp((peak - shift) + (top - log))

summed over all tiles, and the same with delta in place of <value, grad>. What belongs to offset kx
lies on the diagonal t - c = kx, and lacks the factor exp(bias - top). Tiles of infinite peaks
are left to `tables.py`.
"""

import triton
import triton.language as tl


@triton.jit
def correlate(a, b, total, LOW_PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """total + a b^T on tensor cores: of bfloat16 numbers, or good to float32's rounding."""
    if LOW_PRECISION:
        a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
        if INTERPRETED:  # which holds bfloat16 as bits, and would multiply these
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, tl.trans(b), total)
    else:
        return tl.dot(a, tl.trans(b), total, input_precision="tf32x3")


@triton.jit
def load_plane(x, ys, xs, height, width, strides, other):
    """Numbers [columns, rows] of a map of an image, a query and a head."""
    inside = ((xs >= 0) & (xs < width))[:, None] & ((ys >= 0) & (ys < height))[None, :]
    places = (xs * strides[2])[:, None] + ys.to(tl.int64)[None, :] * strides[1]
    return tl.load(x + places, mask=inside, other=other)


@triton.jit
def load_vectors(x, ys, xs, dims, height, width, strides, HEAD_DIM: tl.constexpr):
    """Channels [columns, rows, dims] of a map of an image and a head, in float32."""
    inside = ((xs >= 0) & (xs < width))[:, None] & ((ys >= 0) & (ys < height))[None, :]
    places = (xs * strides[2])[:, None] + ys.to(tl.int64)[None, :] * strides[1]
    mask = inside[:, :, None] & (dims < HEAD_DIM)[None, None, :]
    loaded = tl.load(x + places[:, :, None] + dims[None, None, :], mask=mask, other=0.0)
    return loaded.to(tl.float32)


@triton.jit
def exponentials(
    scores,
    shifts,
    logs,
    peaks,
    tops,
    tokens,
    positions,
    size,
    out_size,
    score_strides,
    stats_strides,
):
    """exp(score - peak) [tokens, rows] and exp((peak - shift) + (top - log)) [columns, rows] of an
    image, a query and a head, at rows and columns of tokens and positions; 0 off the map, and
    everywhere if the peak is infinite."""
    ys, xs = tokens
    rows, cols = positions
    peak, top = tl.load(peaks), tl.load(tops)
    found = load_plane(scores, ys, xs, size[0], size[1], score_strides, float("-inf"))
    shift = load_plane(shifts, rows, cols, out_size[0], out_size[1], stats_strides, 0.0)
    log = load_plane(logs, rows, cols, out_size[0], out_size[1], stats_strides, float("inf"))
    lowest = tl.where(peak < float("inf"), peak, float("-inf"))
    return tl.exp(found - peak), tl.exp((lowest - shift) + (top - log))


@triton.jit
def toeplitz_table_kernel(
    grad,
    scores,
    value,
    shifts,
    logs,
    delta,
    peaks,
    tops,
    part,
    size,
    out_size,
    tiles,
    num_tiles,
    grad_strides,
    score_strides,
    value_strides,
    stats_strides,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BD: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Both sums of a program's share of tiles, for a head, a row of the window and BLOCK tokens:
    part [2, programs, BLOCKS, KERNEL_H, KERNEL_W, Q, h]."""
    BLOCKS: tl.constexpr = (TILE_W + KERNEL_W - 1 + BLOCK - 1) // BLOCK
    head, block = tl.program_id(1), tl.program_id(2) % BLOCKS
    ky = tl.program_id(2) // BLOCKS
    tokens, columns = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, TILE_W)

    products, means = (), ()
    for _ in tl.static_range(QUERIES):
        products += (tl.zeros((BLOCK, TILE_W), tl.float32),)
        means += (tl.zeros((BLOCK, TILE_W), tl.float32),)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        image = tl.full((), tile // tiles[1] // tiles[0], tl.int64)
        first_row = tile // tiles[1] % tiles[0] * TILE_H
        first_col = tile % tiles[1] * TILE_W
        cols, xs = first_col + columns, first_col - PADDING + tokens
        own_scores = scores + image * score_strides[0] + head
        own_shifts = shifts + image * stats_strides[0] + head
        own_logs = logs + image * stats_strides[0] + head
        own_delta = delta + image * stats_strides[0] + head
        own_value = value + image * value_strides[0] + head * HEAD_DIM
        own_grad = grad + image * grad_strides[0] + head * HEAD_DIM
        rows = first_row + tl.arange(0, TILE_H)
        new_means = ()
        for q in tl.static_range(QUERIES):
            terms, factors = exponentials(
                own_scores + q * HEADS,
                own_shifts + q * HEADS,
                own_logs + q * HEADS,
                peaks + (tile * QUERIES + q) * HEADS + head,
                tops + q * HEADS + head,
                (rows - PADDING + ky, xs),
                (rows, cols),
                size,
                out_size,
                score_strides,
                stats_strides,
            )
            factors *= load_plane(
                own_delta + q * HEADS, rows, cols, out_size[0], out_size[1], stats_strides, 0.0
            )
            new_means += (correlate(terms, factors, means[q], LOW_PRECISION, INTERPRETED),)
        means = new_means
        for group in range(first_row, first_row + TILE_H, ROWS):
            some_rows = group + tl.arange(0, ROWS)
            ys = some_rows - PADDING + ky
            for first in range(0, HEAD_DIM, BD):
                dims = first + tl.arange(0, BD)
                values = load_vectors(
                    own_value, ys, xs, dims, size[0], size[1], value_strides, HEAD_DIM
                )
                grads = load_vectors(
                    own_grad,
                    some_rows,
                    cols,
                    dims,
                    out_size[0],
                    out_size[1],
                    grad_strides,
                    HEAD_DIM,
                )
                new_products = ()
                for q in tl.static_range(QUERIES):
                    some_terms, some_factors = exponentials(
                        own_scores + q * HEADS,
                        own_shifts + q * HEADS,
                        own_logs + q * HEADS,
                        peaks + (tile * QUERIES + q) * HEADS + head,
                        tops + q * HEADS + head,
                        (ys, xs),
                        (some_rows, cols),
                        size,
                        out_size,
                        score_strides,
                        stats_strides,
                    )
                    a = (some_terms[:, :, None] * values).reshape(BLOCK, ROWS * BD)
                    b = (some_factors[:, :, None] * grads).reshape(TILE_W, ROWS * BD)
                    new_products += (correlate(a, b, products[q], LOW_PRECISION, INTERPRETED),)
                products = new_products

    table: tl.constexpr = KERNEL_H * KERNEL_W * QUERIES * HEADS
    part += (tl.program_id(0) * BLOCKS + block).to(tl.int64) * table + head
    second = part + (tl.num_programs(0) * BLOCKS).to(tl.int64) * table
    for kx in range(KERNEL_W):
        on_diagonal = tokens[:, None] - columns[None, :] == kx
        for q in tl.static_range(QUERIES):
            place = ((ky * KERNEL_W + kx) * QUERIES + q) * HEADS
            found = tl.where(on_diagonal, products[q], 0.0)
            tl.store(part + place, tl.sum(tl.sum(found, axis=1), axis=0))
            found = tl.where(on_diagonal, means[q], 0.0)
            tl.store(second + place, tl.sum(tl.sum(found, axis=1), axis=0))
