"""Triton kernel of the gradients of both tables; read `backward.py` first.

grad_weight_o = sum attn_o <grad, value>             over all positions
grad_bias_o = weight_o grad_weight_o - sum attn_o delta
"""

import triton
import triton.language as tl

from qna_timm.ops.qna.triton.forward import (
    head_block,
    load_channels,
    load_heads,
    load_table,
    tile_positions,
)


@triton.jit
def table_kernel(
    grad,
    scores,
    value,
    bias,
    shifts,
    logs,
    delta,
    peaks,
    is_any_left,
    part,
    size,
    out_size,
    tiles,
    num_tiles,
    peak_tiles,
    grad_strides,
    score_strides,
    value_strides,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
    PEAK_TILE_H: tl.constexpr,
    PEAK_TILE_W: tl.constexpr,
):
    """Sums over a program's share of the tiles of positions, for BK offsets of a window's row:

        part[0] = sum attn <grad, value>,  part[1] = sum attn delta

    with part [2, programs, KERNEL_H, STEPS * BK, Q, h].

    The weight's gradient is the first, the bias's is weight * the first - the second. With `peaks`
    [peak tiles, Q, h] only where these are infinite, if `is_any_left` at all.
    """
    STEPS: tl.constexpr = (KERNEL_W + BK - 1) // BK
    ky = tl.program_id(2) // STEPS
    first = tl.program_id(2) % STEPS * BK
    heads, has_head, channels, has_channel = head_block(tl.program_id(1), HEADS, HEAD_DIM, BH, BD)

    products, means = (), ()
    for _ in tl.static_range(BK * QUERIES):
        products += (tl.zeros((TILE_H * TILE_W, BH), tl.float32),)
        means += (tl.zeros((TILE_H * TILE_W, BH), tl.float32),)
    if peaks is not None:
        num_tiles = tl.where(tl.load(is_any_left) != 0, num_tiles, 0)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        image, rows, cols = tile_positions(tile, tiles, TILE_H, TILE_W)
        on_map = (rows < out_size[0]) & (cols < out_size[1])
        left_over = tl.full((1, BH), 1.0, tl.float32)
        if peaks is not None:
            # a tile lies in one of the tiles of peaks
            peak_row = tile // tiles[1] % tiles[0] * TILE_H // PEAK_TILE_H
            peak_col = tile % tiles[1] * TILE_W // PEAK_TILE_W
            peak_tile = (image * peak_tiles[0] + peak_row) * peak_tiles[1] + peak_col
            peak = tl.load(peaks + peak_tile * QUERIES * HEADS + heads)
            left_over = tl.where(peak == float("inf"), 1.0, 0.0)[None, :]
        places = image * grad_strides[0] + rows.to(tl.int64) * grad_strides[1]
        places += cols * grad_strides[2]
        grads = load_channels(grad, places, on_map, channels, has_channel)
        own_shifts, own_logs, deltas = (), (), ()
        out_places = ((image * out_size[0] + rows) * out_size[1] + cols) * (QUERIES * HEADS)
        for q in tl.static_range(QUERIES):
            own_shifts += (load_heads(shifts + q * HEADS, out_places, on_map, heads, 0.0),)
            own_logs += (load_heads(logs + q * HEADS, out_places, on_map, heads, 0.0),)
            deltas += (load_heads(delta + q * HEADS, out_places, on_map, heads, 0.0),)
        y, left = rows * STRIDE - PADDING + ky, cols * STRIDE - PADDING + first
        end = tl.minimum(cols * STRIDE - PADDING + KERNEL_W, size[1])
        in_row = on_map & (y >= 0) & (y < size[0])
        new_products, new_means = (), ()
        for i in tl.static_range(BK):
            x = left + i
            inside = in_row & (x >= 0) & (x < end)
            places = image * value_strides[0] + y.to(tl.int64) * value_strides[1]
            places += x * value_strides[2]
            values = load_channels(value, places, inside, channels, has_channel)
            slopes = tl.sum(grads * values, axis=2)
            places = image * score_strides[0] + y.to(tl.int64) * score_strides[1]
            places += x * score_strides[2]
            # offsets beyond the window's row are not inside, whatever bias they read
            row = (ky * KERNEL_W + tl.minimum(first + i, KERNEL_W - 1)) * QUERIES * HEADS
            for q in tl.static_range(QUERIES):
                score = load_heads(scores + q * HEADS, places, inside, heads, float("-inf"))
                added = load_table(bias, row, q * HEADS, heads, 0.0)
                attn = tl.exp((score - own_shifts[q]) + (added - own_logs[q])) * left_over
                new_products += (products[i * QUERIES + q] + attn * slopes,)
                new_means += (means[i * QUERIES + q] + attn * deltas[q],)
        products, means = new_products, new_means

    table: tl.constexpr = KERNEL_H * STEPS * BK * QUERIES * HEADS
    part += tl.program_id(0).to(tl.int64) * table
    second = part + tl.num_programs(0).to(tl.int64) * table
    for i in tl.static_range(BK):
        for q in tl.static_range(QUERIES):
            places = ((tl.program_id(2) * BK + i) * QUERIES + q) * HEADS + heads
            tl.store(part + places, tl.sum(products[i * QUERIES + q], axis=0), mask=has_head)
            tl.store(second + places, tl.sum(means[i * QUERIES + q], axis=0), mask=has_head)
