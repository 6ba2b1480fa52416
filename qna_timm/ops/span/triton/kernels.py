"""Kernels of the local self-attention with relative keys, for GPUs.

With w = m + floor, attention is a softmax of score + log w whose products with values are taken
r = m / w times, which is why no weight, however small, costs precision:

    P[o] = exp(score[o] + log w[o] - max) / total,   out = sum_o P[o] r[o] v[o],
    total = sum_o exp(score[o] + log w[o] - max)

A program takes one head and a tile of neighbouring positions. It goes through the rows of the
map that the tile sees, a block of columns at a time; a query's relative scores are a row's, read
from q . rel_pos_h, plus a column's, gathered from q . rel_pos_w once per block of columns. Rows
and columns of offsets without any weight are not visited.

    ds[o] = P[o] (r[o] t[o] - delta),  t[o] = g . v[o],  delta = g . out
    dv[o] = sum P[o] r[o] g,  dq = scale sum ds[o] (k[o] + rel_pos[o]),  dk[o] = scale sum ds[o] q
    dm[o] = sum P[o] (t[o] - delta) / w[o]

Letters: B batch, H W map, C = h*d channels, h heads, d head_dim, k kernel_size, K = k*k offsets,
p = (k-1)/2 radius, T positions of a tile, N positions of a block of columns; blocks D >= d of
channels and S >= k of steps, offsets along one axis. `b_*` are blocks, `p_*` pointers.
"""

import triton
import triton.language as tl

from qna_timm.ops.span.triton.blocks import (
    clamp_step,
    find_tile,
    load_channels,
    load_table,
    matmul,
    offset_ranges,
    pair_scores,
    score_slopes,
    seen_keys,
    split_matmul,
    store_channels,
    store_table,
)


@triton.jit(do_not_specialize=["height", "width"])
def span_fwd_kernel(
    p_qkv,
    p_rel_h,
    p_rel_w,
    p_weights,
    p_range,
    p_out,
    p_max,
    p_total,
    stride_b,
    stride_y,
    stride_x,
    height,
    width,
    num_heads,
    scale,
    HEAD_DIM: tl.constexpr,
    KERNEL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    MASK_PADDING: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output [B, H, W, C]; max and total of every query [B, h, H, W]."""
    head, channels = tl.program_id(0) % num_heads, num_heads * HEAD_DIM
    image, top, left = find_tile(tl.program_id(0) // num_heads, height, width, TILE_H, TILE_W)
    row_from, row_to, col_from, col_to = offset_ranges(p_range, head, KERNEL, HAS_MASK)
    p_weights += head * 2 * KERNEL * KERNEL
    p_query = p_qkv + image * stride_b + head * HEAD_DIM
    index, steps = tl.arange(0, TILE_H * TILE_W), tl.arange(0, BLOCK_S)
    y, x = top + index // TILE_W, left + index % TILE_W
    inside = (y < height) & (x < width)
    places = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    b_query = load_channels(p_query, places, inside, HEAD_DIM, BLOCK_D)
    b_table = load_table(p_rel_h, head, KERNEL, HEAD_DIM, BLOCK_D, BLOCK_S)
    b_by_row = split_matmul(b_query, b_table, PRECISION)  # T, S
    b_table = load_table(p_rel_w, head, KERNEL, HEAD_DIM, BLOCK_D, BLOCK_S)
    b_by_col = split_matmul(b_query, b_table, PRECISION)

    b_max = tl.full([TILE_H * TILE_W], -float("inf"), tl.float32)
    b_total = tl.zeros([TILE_H * TILE_W], tl.float32)
    b_out = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    last_row, last_col = tl.minimum(top + TILE_H, height) - 1, tl.minimum(left + TILE_W, width) - 1
    rows = seen_keys(top, last_row, height, row_from, row_to, KERNEL, MASK_PADDING)
    cols = seen_keys(left, last_col, width, col_from, col_to, KERNEL, MASK_PADDING)
    for col in range(cols[0], cols[1], BLOCK_N):
        key_x = col + tl.arange(0, BLOCK_N)
        key_x_on_map = (key_x >= 0) & (key_x < width)
        ox = key_x[None, :] - x[:, None] + KERNEL // 2
        col_seen = (ox >= 0) & (ox < KERNEL)
        if MASK_PADDING:
            col_seen &= key_x_on_map[None, :]
        b_col = tl.gather(b_by_col, clamp_step(ox, KERNEL), 1)  # T, N
        for row in range(rows[0], rows[1]):
            oy = row - y + KERNEL // 2
            key_y = tl.full([BLOCK_N], row, tl.int64)
            on_map = key_x_on_map & (key_y >= 0) & (key_y < height)
            key_places = key_y * stride_y + key_x.to(tl.int64) * stride_x
            b_key = load_channels(p_query + channels, key_places, on_map, HEAD_DIM, BLOCK_D)
            b_value = load_channels(p_query + 2 * channels, key_places, on_map, HEAD_DIM, BLOCK_D)
            b_row = tl.sum(tl.where(steps[None, :] == oy[:, None], b_by_row, 0.0), 1)
            b_products = matmul(b_query, tl.trans(b_key), PRECISION) + b_row[:, None] + b_col
            seen = col_seen & ((oy >= 0) & (oy < KERNEL))[:, None]
            b_scores, b_ratio = pair_scores(
                b_products, oy[:, None], ox, seen, p_weights, scale, KERNEL, HAS_MASK, HAS_FLOOR
            )
            b_new = tl.maximum(b_max, tl.max(b_scores, 1))
            b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)
            b_exp = tl.exp(b_scores - b_shift[:, None])
            b_fade = tl.exp(b_max - b_shift)
            b_max, b_total = b_new, b_total * b_fade + tl.sum(b_exp, 1)
            b_exp = (b_exp * b_ratio).to(b_value.dtype)
            b_out = b_out * b_fade[:, None] + matmul(b_exp, b_value, PRECISION)
    # a query that sees nothing: 0 / 1
    b_max, b_total = tl.where(b_total == 0.0, 0.0, b_max), tl.where(b_total == 0.0, 1.0, b_total)
    p_out += image * height * width * channels + head * HEAD_DIM
    places = y.to(tl.int64) * width + x
    b_out = b_out / b_total[:, None]
    store_channels(p_out, places * channels, inside, b_out, HEAD_DIM, BLOCK_D)
    places += (image * num_heads + head) * height * width
    tl.store(p_max + places, b_max, mask=inside)
    tl.store(p_total + places, b_total, mask=inside)


@triton.jit(do_not_specialize=["height", "width"])
def span_bwd_queries_kernel(
    p_grad,
    p_qkv,
    p_rel_h,
    p_rel_w,
    p_weights,
    p_range,
    p_out,
    p_max,
    p_total,
    p_delta,
    p_grad_qkv,
    p_grad_rel,
    p_grad_mask,
    grad_stride_b,
    grad_stride_y,
    grad_stride_x,
    stride_b,
    stride_y,
    stride_x,
    num_tiles,
    height,
    width,
    num_heads,
    scale,
    HEAD_DIM: tl.constexpr,
    KERNEL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    MASK_PADDING: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """delta [B, h, H, W], gradient of the queries, and this program's part [programs, ...] of the
    tables' [C, 2*k] and of dm * w [h, K], summed over its tiles.
    """
    head, channels = tl.program_id(0) % num_heads, num_heads * HEAD_DIM
    part, parts = tl.program_id(0) // num_heads, tl.num_programs(0) // num_heads
    row_from, row_to, col_from, col_to = offset_ranges(p_range, head, KERNEL, HAS_MASK)
    p_weights += head * 2 * KERNEL * KERNEL
    index, steps = tl.arange(0, TILE_H * TILE_W), tl.arange(0, BLOCK_S)
    b_grad_h = tl.zeros([BLOCK_D, BLOCK_S], tl.float32)
    b_grad_w = tl.zeros([BLOCK_D, BLOCK_S], tl.float32)
    b_grad_mask = tl.zeros([BLOCK_S, BLOCK_S], tl.float32)
    for tile in range(part, num_tiles, parts):
        image, top, left = find_tile(tile, height, width, TILE_H, TILE_W)
        y, x = top + index // TILE_W, left + index % TILE_W
        inside = (y < height) & (x < width)
        p_query = p_qkv + image * stride_b + head * HEAD_DIM
        places = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
        b_query = load_channels(p_query, places, inside, HEAD_DIM, BLOCK_D)
        p_out_grad = p_grad + image * grad_stride_b + head * HEAD_DIM
        places = y.to(tl.int64) * grad_stride_y + x.to(tl.int64) * grad_stride_x
        b_grad = load_channels(p_out_grad, places, inside, HEAD_DIM, BLOCK_D)
        places = image * height * width + y.to(tl.int64) * width + x
        b_out = load_channels(p_out + head * HEAD_DIM, places * channels, inside, HEAD_DIM, BLOCK_D)
        b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
        places += (image * (num_heads - 1) + head) * height * width  # B, h, H, W
        tl.store(p_delta + places, b_delta, mask=inside)
        b_max = tl.load(p_max + places, mask=inside, other=0.0)
        b_total = tl.load(p_total + places, mask=inside, other=1.0)
        b_rel_h = load_table(p_rel_h, head, KERNEL, HEAD_DIM, BLOCK_D, BLOCK_S)
        b_by_row = split_matmul(b_query, b_rel_h, PRECISION)  # T, S
        b_rel_w = load_table(p_rel_w, head, KERNEL, HEAD_DIM, BLOCK_D, BLOCK_S)
        b_by_col = split_matmul(b_query, b_rel_w, PRECISION)

        b_grad_query = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
        b_sum_rows = tl.zeros([TILE_H * TILE_W, BLOCK_S], tl.float32)
        b_sum_cols = tl.zeros([TILE_H * TILE_W, BLOCK_S], tl.float32)
        last_row = tl.minimum(top + TILE_H, height) - 1
        last_col = tl.minimum(left + TILE_W, width) - 1
        rows = seen_keys(top, last_row, height, row_from, row_to, KERNEL, MASK_PADDING)
        cols = seen_keys(left, last_col, width, col_from, col_to, KERNEL, MASK_PADDING)
        for col in range(cols[0], cols[1], BLOCK_N):
            key_x = col + tl.arange(0, BLOCK_N)
            key_x_on_map = (key_x >= 0) & (key_x < width)
            ox = key_x[None, :] - x[:, None] + KERNEL // 2
            col_seen = (ox >= 0) & (ox < KERNEL)
            if MASK_PADDING:
                col_seen &= key_x_on_map[None, :]
            b_col = tl.gather(b_by_col, clamp_step(ox, KERNEL), 1)  # T, N
            key_of_step = steps[None, :] + x[:, None] - KERNEL // 2 - col  # T, S: the reverse of ox
            in_block = (key_of_step >= 0) & (key_of_step < BLOCK_N)
            key_of_step = clamp_step(key_of_step, BLOCK_N)
            b_sums = tl.zeros([TILE_H * TILE_W, BLOCK_N], tl.float32)
            for row in range(rows[0], rows[1]):
                oy = row - y + KERNEL // 2
                key_y = tl.full([BLOCK_N], row, tl.int64)
                on_map = key_x_on_map & (key_y >= 0) & (key_y < height)
                key_places = key_y * stride_y + key_x.to(tl.int64) * stride_x
                b_key = load_channels(p_query + channels, key_places, on_map, HEAD_DIM, BLOCK_D)
                b_value = load_channels(
                    p_query + 2 * channels, key_places, on_map, HEAD_DIM, BLOCK_D
                )
                at_row = steps[None, :] == oy[:, None]
                b_row = tl.sum(tl.where(at_row, b_by_row, 0.0), 1)
                b_products = matmul(b_query, tl.trans(b_key), PRECISION) + b_row[:, None] + b_col
                seen = col_seen & ((oy >= 0) & (oy < KERNEL))[:, None]
                b_scores, b_ratio = pair_scores(
                    b_products, oy[:, None], ox, seen, p_weights, scale, KERNEL, HAS_MASK, HAS_FLOOR
                )
                b_attn = tl.exp(b_scores - b_max[:, None]) / b_total[:, None]
                b_slopes = matmul(b_grad, tl.trans(b_value), PRECISION)
                if HAS_MASK:
                    b_weights = b_attn * (b_slopes - b_delta[:, None])
                    b_weights = tl.gather(b_weights, key_of_step, 1)  # T, S
                    b_weights = tl.where(in_block, b_weights, 0.0)
                    # not in halves: weights can be as small as what they would round to
                    b_at_row = tl.trans(at_row.to(tl.float32))
                    b_grad_mask += matmul(b_at_row, b_weights, PRECISION)
                b_slopes = score_slopes(b_attn, b_ratio, b_slopes, b_delta[:, None], KERNEL)
                b_grad_query += matmul(b_slopes.to(b_key.dtype), b_key, PRECISION)
                b_sums += b_slopes
                b_sum_rows += tl.where(at_row, tl.sum(b_slopes, 1)[:, None], 0.0)
            b_sum_cols += tl.where(in_block, tl.gather(b_sums, key_of_step, 1), 0.0)
        b_sum = b_sum_rows.to(b_query.dtype)
        b_grad_query += matmul(b_sum, tl.trans(b_rel_h.to(b_query.dtype)), PRECISION)
        b_grad_h += matmul(tl.trans(b_query), b_sum, PRECISION)
        b_sum = b_sum_cols.to(b_query.dtype)
        b_grad_query += matmul(b_sum, tl.trans(b_rel_w.to(b_query.dtype)), PRECISION)
        b_grad_w += matmul(tl.trans(b_query), b_sum, PRECISION)
        places = (image * height * width + y.to(tl.int64) * width + x) * (3 * channels)
        b_grad_query *= scale
        p_query_grad = p_grad_qkv + head * HEAD_DIM
        store_channels(p_query_grad, places, inside, b_grad_query, HEAD_DIM, BLOCK_D)
    p_grad_rel += part.to(tl.int64) * channels * 2 * KERNEL
    store_table(p_grad_rel, b_grad_h * scale, head, KERNEL, HEAD_DIM, BLOCK_D, BLOCK_S)
    store_table(p_grad_rel + KERNEL, b_grad_w * scale, head, KERNEL, HEAD_DIM, BLOCK_D, BLOCK_S)
    if HAS_MASK:
        p_grad_mask += (part.to(tl.int64) * num_heads + head) * KERNEL * KERNEL
        there = (steps < KERNEL)[:, None] & (steps < KERNEL)[None, :]
        offsets = steps[:, None] * KERNEL + steps[None, :]
        tl.store(p_grad_mask + offsets, b_grad_mask, mask=there)


@triton.jit(do_not_specialize=["height", "width"])
def span_bwd_keys_kernel(
    p_grad,
    p_qkv,
    p_rel_h,
    p_rel_w,
    p_weights,
    p_range,
    p_max,
    p_total,
    p_delta,
    p_grad_qkv,
    grad_stride_b,
    grad_stride_y,
    grad_stride_x,
    stride_b,
    stride_y,
    stride_x,
    height,
    width,
    num_heads,
    scale,
    HEAD_DIM: tl.constexpr,
    KERNEL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the keys and values of a tile, collected from the queries that see them."""
    head, channels = tl.program_id(0) % num_heads, num_heads * HEAD_DIM
    image, top, left = find_tile(tl.program_id(0) // num_heads, height, width, TILE_H, TILE_W)
    row_from, row_to, col_from, col_to = offset_ranges(p_range, head, KERNEL, HAS_MASK)
    p_weights += head * 2 * KERNEL * KERNEL
    p_query = p_qkv + image * stride_b + head * HEAD_DIM
    p_out_grad = p_grad + image * grad_stride_b + head * HEAD_DIM
    index = tl.arange(0, TILE_H * TILE_W)
    y, x = top + index // TILE_W, left + index % TILE_W
    inside = (y < height) & (x < width)
    places = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    b_key = load_channels(p_query + channels, places, inside, HEAD_DIM, BLOCK_D)
    b_value = load_channels(p_query + 2 * channels, places, inside, HEAD_DIM, BLOCK_D)
    b_rel_h = load_table(p_rel_h, head, KERNEL, HEAD_DIM, BLOCK_D, BLOCK_S)
    b_rel_w = load_table(p_rel_w, head, KERNEL, HEAD_DIM, BLOCK_D, BLOCK_S)
    b_grad_key = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    b_grad_value = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    plane = (image * num_heads + head) * height * width
    last_row, last_col = tl.minimum(top + TILE_H, height) - 1, tl.minimum(left + TILE_W, width) - 1
    # queries that see a key are as far as keys that a query sees, the other way
    row_from, row_to = KERNEL - row_to, KERNEL - row_from
    col_from, col_to = KERNEL - col_to, KERNEL - col_from
    rows = seen_keys(top, last_row, height, row_from, row_to, KERNEL, True)
    cols = seen_keys(left, last_col, width, col_from, col_to, KERNEL, True)
    for col in range(cols[0], cols[1], BLOCK_N):
        query_x = col + tl.arange(0, BLOCK_N)
        on_map = query_x < width
        ox = x[:, None] - query_x[None, :] + KERNEL // 2  # T, N
        for row in range(rows[0], rows[1]):
            oy = (y - row + KERNEL // 2)[:, None]
            query_y = tl.full([BLOCK_N], row, tl.int64)
            query_places = query_y * stride_y + query_x.to(tl.int64) * stride_x
            b_query = load_channels(p_query, query_places, on_map, HEAD_DIM, BLOCK_D)
            query_places = query_y * grad_stride_y + query_x.to(tl.int64) * grad_stride_x
            b_grad = load_channels(p_out_grad, query_places, on_map, HEAD_DIM, BLOCK_D)
            query_places = plane + query_y * width + query_x
            b_max = tl.load(p_max + query_places, mask=on_map, other=0.0)[None, :]
            b_total = tl.load(p_total + query_places, mask=on_map, other=1.0)[None, :]
            b_delta = tl.load(p_delta + query_places, mask=on_map, other=0.0)[None, :]
            b_products = matmul(b_key, tl.trans(b_query), PRECISION)  # T, N
            all_oy = tl.broadcast_to(clamp_step(oy, KERNEL), b_products.shape)
            b_products += tl.gather(tl.trans(split_matmul(b_query, b_rel_h, PRECISION)), all_oy, 0)
            b_products += tl.gather(
                tl.trans(split_matmul(b_query, b_rel_w, PRECISION)), clamp_step(ox, KERNEL), 0
            )
            seen = (oy >= 0) & (oy < KERNEL) & (ox >= 0) & (ox < KERNEL)
            b_scores, b_ratio = pair_scores(
                b_products, oy, ox, seen, p_weights, scale, KERNEL, HAS_MASK, HAS_FLOOR
            )
            b_attn = tl.exp(b_scores - b_max) / b_total
            b_weighed = (b_attn * b_ratio).to(b_grad.dtype)
            b_grad_value += matmul(b_weighed, b_grad, PRECISION)
            b_slopes = matmul(b_value, tl.trans(b_grad), PRECISION)
            b_slopes = score_slopes(b_attn, b_ratio, b_slopes, b_delta, KERNEL)
            b_grad_key += matmul(b_slopes.to(b_query.dtype), b_query, PRECISION)
    places = (image * height * width + y.to(tl.int64) * width + x) * (3 * channels)
    p_key_grad = p_grad_qkv + channels + head * HEAD_DIM
    store_channels(p_key_grad, places, inside, b_grad_key * scale, HEAD_DIM, BLOCK_D)
    store_channels(p_key_grad + channels, places, inside, b_grad_value, HEAD_DIM, BLOCK_D)
