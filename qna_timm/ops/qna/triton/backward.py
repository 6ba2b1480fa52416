"""Triton kernels of the gradients of scores and values; read `forward.py` first.

With attn_o = exp((score - shift) + (bias_o - log)), recomputed wherever it is needed from the
shift and the log that the forward kernel left, and delta = <grad, out of one query>:

    grad_value = sum_q sum_o attn_o weight_o grad        over the windows that see the token
    grad_score = sum_o attn_o (weight_o <grad, value> - delta)
"""

import triton
import triton.language as tl

from qna_timm.ops.qna.triton.forward import (
    head_block,
    load_channels,
    load_heads,
    load_table,
    store_heads,
    tile_positions,
)


@triton.jit
def take_delta(
    grad,
    scores,
    value,
    bias,
    weight,
    shifts,
    logs,
    delta,
    place,
    block,
    size,
    out_size,
    grad_strides,
    score_strides,
    value_strides,
    weight_step,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
):
    """delta = <grad, out of one query>, as the sum over its window of attn weight <grad, value>."""
    image, rows, cols = place
    heads, has_head, channels, has_channel = block
    P: tl.constexpr = rows.shape[0]
    BH: tl.constexpr = channels.shape[0]
    on_map = (rows < out_size[0]) & (cols < out_size[1])
    scores += image * score_strides[0]
    value += image * value_strides[0]
    top, left = rows * STRIDE - PADDING, cols * STRIDE - PADDING
    places = image * grad_strides[0] + rows.to(tl.int64) * grad_strides[1] + cols * grad_strides[2]
    grads = load_channels(grad, places, on_map, channels, has_channel)
    out_places = ((image * out_size[0] + rows) * out_size[1] + cols) * (QUERIES * HEADS)

    own_shifts, own_logs, totals, deltas = (), (), (), ()
    for q in tl.static_range(QUERIES):
        own_shifts += (load_heads(shifts + q * HEADS, out_places, on_map, heads, 0.0),)
        own_logs += (load_heads(logs + q * HEADS, out_places, on_map, heads, 0.0),)
        totals += (tl.zeros((P, BH), tl.float32),)
        deltas += (tl.zeros((P, BH), tl.float32),)
    for ky in range(KERNEL_H):
        for kx in range(KERNEL_W):
            y, x = top + ky, left + kx
            inside = on_map & (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
            places = y.to(tl.int64) * value_strides[1] + x * value_strides[2]
            values = load_channels(value, places, inside, channels, has_channel)
            slopes = tl.sum(grads * values, axis=2)
            places = y.to(tl.int64) * score_strides[1] + x * score_strides[2]
            offset = ky * KERNEL_W + kx
            row = offset * QUERIES * HEADS
            new_totals, new_deltas = (), ()
            for q in tl.static_range(QUERIES):
                score = load_heads(scores + q * HEADS, places, inside, heads, float("-inf"))
                added = load_table(bias, row, q * HEADS, heads, 0.0)
                attn = tl.exp((score - own_shifts[q]) + (added - own_logs[q]))
                new_totals += (totals[q] + attn,)
                attn *= load_table(weight, offset * weight_step, q * HEADS, heads, 1.0)
                new_deltas += (deltas[q] + attn * slopes,)
            totals, deltas = new_totals, new_deltas

    # At biases of 1e3 the log is good to four decimals, attn off by a factor. It must not be left
    # in delta: where one token has all the weight, <grad, value> - delta is next to nothing.
    for q in tl.static_range(QUERIES):
        mean = deltas[q] / totals[q]
        store_heads(delta + q * HEADS, out_places, on_map, heads, has_head, mean)


@triton.jit
def delta_kernel(
    grad,
    scores,
    value,
    bias,
    weight,
    shifts,
    logs,
    delta,
    size,
    out_size,
    tiles,
    grad_strides,
    score_strides,
    value_strides,
    weight_step,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
):
    """delta = <grad, out of one query>, as the sum over its window of attn weight <grad, value>."""
    place = tile_positions(tl.program_id(0), tiles, TILE_H, TILE_W)
    block = head_block(tl.program_id(1), HEADS, HEAD_DIM, BH, BD)
    take_delta(
        grad,
        scores,
        value,
        bias,
        weight,
        shifts,
        logs,
        delta,
        place,
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
def collect(
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
    place,
    block,
    size,
    out_size,
    grad_strides,
    score_strides,
    value_strides,
    weight_step,
    share,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
):
    """grad_value and grad_score of tokens, from all windows that see them."""
    image, rows, cols = place
    heads, has_head, channels, has_channel = block
    P: tl.constexpr = rows.shape[0]
    BH: tl.constexpr = channels.shape[0]
    BD: tl.constexpr = channels.shape[1]
    on_map = (rows < size[0]) & (cols < size[1])
    grad += image * grad_strides[0]
    places = (
        image * value_strides[0] + rows.to(tl.int64) * value_strides[1] + cols * value_strides[2]
    )
    values = load_channels(value, places, on_map, channels, has_channel)
    places = (
        image * score_strides[0] + rows.to(tl.int64) * score_strides[1] + cols * score_strides[2]
    )

    own_scores, slopes = (), ()
    for q in tl.static_range(QUERIES):
        own_scores += (load_heads(scores + q * HEADS, places, on_map, heads, 0.0),)
        slopes += (tl.zeros((P, BH), tl.float32),)
    total = tl.zeros((P, BH, BD), tl.float32)
    for ky in range(KERNEL_H):
        for kx in range(KERNEL_W):
            down, right = rows + PADDING - ky, cols + PADDING - kx
            y, x = down // STRIDE, right // STRIDE
            seen = on_map & (down >= 0) & (right >= 0) & (y < out_size[0]) & (x < out_size[1])
            if STRIDE > 1:
                seen &= (down % STRIDE == 0) & (right % STRIDE == 0)
            places = y.to(tl.int64) * grad_strides[1] + x * grad_strides[2]
            grads = load_channels(grad, places, seen, channels, has_channel)
            products = tl.sum(grads * values, axis=2)
            places = ((image * out_size[0] + y) * out_size[1] + x) * (QUERIES * HEADS)
            offset = ky * KERNEL_W + kx
            row = offset * QUERIES * HEADS
            weights = tl.zeros((P, BH), tl.float32)
            new_slopes = ()
            for q in tl.static_range(QUERIES):
                shift = load_heads(shifts + q * HEADS, places, seen, heads, 0.0)
                log = load_heads(logs + q * HEADS, places, seen, heads, float("inf"))
                mean = load_heads(delta + q * HEADS, places, seen, heads, 0.0)
                added = load_table(bias, row, q * HEADS, heads, 0.0)
                attn = tl.exp((own_scores[q] - shift) + (added - log))
                scale = load_table(weight, offset * weight_step, q * HEADS, heads, 1.0)
                weights += attn * scale
                new_slopes += (slopes[q] + attn * (scale * products - share * mean),)
            slopes = new_slopes
            total += weights[:, :, None] * grads

    places = (image * size[0] + rows) * size[1] + cols
    for q in tl.static_range(QUERIES):
        row = (places * QUERIES + q) * HEADS
        store_heads(grad_scores, row, on_map, heads, has_head, slopes[q])
    tl.store(
        grad_value + places[:, None, None] * (HEADS * HEAD_DIM) + channels[None, :, :],
        total,
        mask=on_map[:, None, None] & has_channel[None, :, :],
    )


@triton.jit
def token_kernel(
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
    size,
    out_size,
    tiles,
    grad_strides,
    score_strides,
    value_strides,
    weight_step,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
):
    """grad_value and grad_score of tokens, from all windows that see them."""
    place = tile_positions(tl.program_id(0), tiles, TILE_H, TILE_W)
    block = head_block(tl.program_id(1), HEADS, HEAD_DIM, BH, BD)
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
        place,
        block,
        size,
        out_size,
        grad_strides,
        score_strides,
        value_strides,
        weight_step,
        1.0,
        QUERIES,
        HEADS,
        HEAD_DIM,
        KERNEL_H,
        KERNEL_W,
        STRIDE,
        PADDING,
    )
