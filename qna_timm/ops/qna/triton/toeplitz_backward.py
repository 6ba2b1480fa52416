"""Triton kernels of gradients on tensor cores; read `toeplitz.py` first.

For the windows that see a token, the Toeplitz products run over output positions p, with tables
upside down and back to front, and -shift - log in place of scores:

    u = sum_p exp(bias) weight e_p grad_p,  v = sum_p exp(bias) e_p delta_p
    e_p = exp((-shift_p - peak) - log_p)
    grad_value = sum_q g u,  grad_score = g (<u, value> - v),  g = exp(score + peak)

A tile where g is out of the range that float32 holds beside the smallest of the other factors is
computed as in `backward.py`. Where a head's channels are in several parts, delta and
grad_score are partial sums [parts, ...].
"""

import triton
import triton.language as tl

from qna_timm.ops.qna.triton.backward import collect, take_delta
from qna_timm.ops.qna.triton.toeplitz import SMALLEST_SUM, everywhere, place_of_tile, window_sums

# The largest g: terms that float32 cannot hold, below 2^-126, are then below 2^-66 of attn's 1.
LARGEST_FACTOR = tl.constexpr(2.0**60)


@triton.jit
def load_tile(maps, rows, cols, dims, on_map, strides, HEAD_DIM: tl.constexpr):
    """Channels [rows, dims, columns] of an image and a head, in float32."""
    places = rows.to(tl.int64)[:, None, None] * strides[1] + (cols * strides[2])[None, None, :]
    mask = on_map[:, None, :] & (dims < HEAD_DIM)[None, :, None]
    return tl.load(maps + places + dims[None, :, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def toeplitz_delta_kernel(
    grad,
    scores,
    value,
    bias,
    weight,
    shifts,
    logs,
    delta,
    peaks,
    numerators,
    denominators,
    size,
    out_size,
    tiles,
    grad_strides,
    score_strides,
    value_strides,
    weight_step,
    part_step,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    BD: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """delta of a tile, of a head and BD of its channels, and its peaks [tiles, Q, h]; these are
    infinite where the products do not serve."""
    image, first_row, first_col, head, part = place_of_tile(tiles, HEAD_DIM, TILE_H, TILE_W, BD)
    rows, cols = first_row + tl.arange(0, TILE_H), first_col + tl.arange(0, TILE_W)
    dims = part * BD + tl.arange(0, BD)
    delta += part.to(tl.int64) * part_step
    own_peaks, sums, totals = window_sums(
        scores + image * score_strides[0] + head,
        None,
        None,
        value + image * value_strides[0] + head * HEAD_DIM,
        numerators,
        denominators,
        (first_row, first_col, head, dims),
        size,
        score_strides,
        value_strides,
        1,
        QUERIES,
        HEADS,
        HEAD_DIM,
        KERNEL_H,
        KERNEL_W,
        PADDING,
        PADDING,
        TILE_H,
        TILE_W,
        TOKENS,
        CHUNK,
        BD,
        LOW_PRECISION,
        INTERPRETED,
    )

    on_map = (rows < out_size[0])[:, None] & (cols < out_size[1])[None, :]
    own_grad = grad + image * grad_strides[0] + head * HEAD_DIM
    grads = load_tile(own_grad, rows, cols, dims, on_map, grad_strides, HEAD_DIM)
    good = on_map
    deltas = ()
    for q in tl.static_range(QUERIES):
        products = tl.sum(sums[q].reshape(TILE_H, BD, TILE_W) * grads, axis=1) / totals[q]
        good &= (totals[q] >= SMALLEST_SUM) & (tl.abs(products) < float("inf"))
        deltas += (products,)
    served = everywhere(good, on_map)
    for q in tl.static_range(QUERIES):
        peak = tl.where(served, own_peaks[q], float("inf"))
        tl.store(peaks + (tl.program_id(0) * QUERIES + q) * HEADS + head, peak, mask=part == 0)
    if served:
        places = (image * out_size[0] + rows[:, None]) * out_size[1] + cols[None, :]
        for q in tl.static_range(QUERIES):
            tl.store(delta + (places * QUERIES + q) * HEADS + head, deltas[q], mask=on_map)
    else:
        only = tl.arange(0, 1)
        channels, has_channel = head * HEAD_DIM + dims[None, :], (dims < HEAD_DIM)[None, :]
        block = (head + only, only == 0, channels, has_channel)
        for row in range(first_row, tl.minimum(first_row + TILE_H, out_size[0])):
            take_delta(
                grad,
                scores,
                value,
                bias,
                weight,
                shifts,
                logs,
                delta,
                (image, row + tl.zeros((TILE_W,), tl.int32), cols),
                block,
                size,
                out_size,
                grad_strides,
                score_strides,
                value_strides,
                weight_step,
                QUERIES,
                HEADS,
                HEAD_DIM,
                KERNEL_H,
                KERNEL_W,
                STRIDE,
                PADDING,
            )


@triton.jit
def toeplitz_token_kernel(
    grad,
    scores,
    value,
    bias,
    weight,
    shifts,
    logs,
    delta,
    grad_scores,
    grad_value,
    numerators,
    denominators,
    tops,
    size,
    out_size,
    tiles,
    grad_strides,
    score_strides,
    value_strides,
    stats_strides,
    weight_step,
    part_step,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    BD: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """grad_value and grad_score of a tile of tokens, of a head and BD of its channels."""
    image, first_row, first_col, head, part = place_of_tile(tiles, HEAD_DIM, TILE_H, TILE_W, BD)
    rows, cols = first_row + tl.arange(0, TILE_H), first_col + tl.arange(0, TILE_W)
    dims = part * BD + tl.arange(0, BD)
    grad_scores += part.to(tl.int64) * part_step
    peaks, sums, totals = window_sums(
        shifts + image * stats_strides[0] + head,
        logs + image * stats_strides[0] + head,
        delta + image * stats_strides[0] + head,
        grad + image * grad_strides[0] + head * HEAD_DIM,
        numerators,
        denominators,
        (first_row, first_col, head, dims),
        out_size,
        stats_strides,
        grad_strides,
        -1,
        QUERIES,
        HEADS,
        HEAD_DIM,
        KERNEL_H,
        KERNEL_W,
        KERNEL_H - 1 - PADDING,
        KERNEL_W - 1 - PADDING,
        TILE_H,
        TILE_W,
        TOKENS,
        CHUNK,
        BD,
        LOW_PRECISION,
        INTERPRETED,
    )

    on_map = (rows < size[0])[:, None] & (cols < size[1])[None, :]
    own_value = value + image * value_strides[0] + head * HEAD_DIM
    values = load_tile(own_value, rows, cols, dims, on_map, value_strides, HEAD_DIM)
    own_scores = scores + image * score_strides[0] + head
    places = rows.to(tl.int64)[:, None] * score_strides[1] + (cols * score_strides[2])[None, :]
    share = (part == 0).to(tl.float32)  # the part that delta's sum is taken off in
    total = tl.zeros((TILE_H, BD, TILE_W), tl.float32)
    good = on_map
    slopes = ()
    for q in tl.static_range(QUERIES):
        score = tl.load(own_scores + q * HEADS + places, mask=on_map, other=0.0)
        factor = tl.exp((score + peaks[q]) + tl.load(tops + q * HEADS + head))
        vectors = sums[q].reshape(TILE_H, BD, TILE_W)
        slope = factor * (tl.sum(vectors * values, axis=1) - share * totals[q])
        total += factor[:, None, :] * vectors
        good &= (factor <= LARGEST_FACTOR) & (tl.abs(slope) < float("inf"))
        slopes += (slope,)
    good &= tl.min((tl.abs(total) < float("inf")).to(tl.int32), axis=1) == 1
    if everywhere(good, on_map):
        tokens = (image * size[0] + rows[:, None]) * size[1] + cols[None, :]
        for q in tl.static_range(QUERIES):
            tl.store(grad_scores + (tokens * QUERIES + q) * HEADS + head, slopes[q], mask=on_map)
        tokens = tokens[:, None, :] * (HEADS * HEAD_DIM) + head * HEAD_DIM
        mask = on_map[:, None, :] & (dims < HEAD_DIM)[None, :, None]
        tl.store(grad_value + tokens + dims[None, :, None], total, mask=mask)
    else:
        only = tl.arange(0, 1)
        channels, has_channel = head * HEAD_DIM + dims[None, :], (dims < HEAD_DIM)[None, :]
        block = (head + only, only == 0, channels, has_channel)
        for row in range(first_row, tl.minimum(first_row + TILE_H, size[0])):
            collect(
                grad,
                scores,
                value,
                bias,
                weight,
                shifts,
                logs,
                delta,
                grad_scores,
                grad_value,
                (image, row + tl.zeros((TILE_W,), tl.int32), cols),
                block,
                size,
                out_size,
                grad_strides,
                score_strides,
                value_strides,
                weight_step,
                share,
                QUERIES,
                HEADS,
                HEAD_DIM,
                KERNEL_H,
                KERNEL_W,
                STRIDE,
                PADDING,
            )
