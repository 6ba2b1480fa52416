"""Triton kernels of learned-query attention on CUDA cores: exact for any scores and any window.

A program owns a tile of positions and the channels of several heads, [P, BH, BD], so that a
thread loads the channels of a head at once and keeps that head's softmax to itself. Nothing is
scattered: the gradient of a token is collected from the windows that see it.

Letters: P positions of a tile, BH heads and BD channels of a head in a block, powers of two that
may reach beyond what there is. Maps are addressed by the strides of image, row and column; behind
these, channels (or queries and heads) are contiguous. Tables are [K, Q, h]; a weight of [1, Q, h]
has `weight_step` 0. No bias is 0, no weight is 1.
"""

import triton
import triton.language as tl

# Below any score: float32's smallest number, as differences of -inf would not be numbers.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def tile_positions(tile, tiles, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Image (64-bit), and rows and columns [P] of a tile."""
    position = tl.arange(0, TILE_H * TILE_W)
    rows = tile // tiles[1] % tiles[0] * TILE_H + position // TILE_W
    cols = tile % tiles[1] * TILE_W + position % TILE_W
    return tl.full((), tile // tiles[1] // tiles[0], tl.int64), rows, cols


@triton.jit
def head_block(
    block, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr
):
    """Heads [BH], which of them there are, their channels [BH, BD], and which of these.

    Heads that are not there read those of the last one, so that loads need no mask for them.
    """
    heads = block * BH + tl.arange(0, BH)
    has_head = heads < HEADS
    if HEADS % BH != 0:
        heads = tl.minimum(heads, HEADS - 1)
    dims = tl.arange(0, BD)
    has_channel = has_head[:, None] & (dims < HEAD_DIM)[None, :]
    return heads, has_head, heads[:, None] * HEAD_DIM + dims[None, :], has_channel


@triton.jit
def load_heads(x, places, inside, heads, other):
    """Numbers [P, BH] at `places` [P] of a map of heads; `other` where not `inside`."""
    # Heads are contiguous, but a thread that loads one at a time has it where its channels are.
    pointers = tl.max_contiguous(x + places[:, None] + heads[None, :], (1, 1))
    return tl.load(pointers, mask=inside[:, None], other=other)


@triton.jit
def store_heads(x, places, inside, heads, has_head, numbers):
    """Writes numbers [P, BH] where `load_heads` would read them."""
    pointers = tl.max_contiguous(x + places[:, None] + heads[None, :], (1, 1))
    tl.store(pointers, numbers, mask=inside[:, None] & has_head[None, :])


@triton.jit
def load_channels(x, places, inside, channels, has_channel):
    """Channels [P, BH, BD] at `places` [P], in float32; 0 where not `inside` or not there."""
    mask = inside[:, None, None] & has_channel[None, :, :]
    loaded = tl.load(x + places[:, None, None] + channels[None, :, :], mask=mask, other=0.0)
    return loaded.to(tl.float32)


@triton.jit
def load_table(table, row, query, heads, default: tl.constexpr):
    """A table's entries [1, BH] of an offset and a query, `row` being where the offset begins."""
    if table is None:
        return tl.full((1, heads.shape[0]), default, tl.float32)
    else:
        return tl.load(table + row + query + heads)[None, :]


@triton.jit
def attend(
    scores,
    value,
    bias,
    weight,
    out,
    shifts,
    logs,
    place,
    block,
    size,
    out_size,
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
    """out, shifts and logs at positions [P] of an image, for a block of heads.

    A first walk over the window finds its maximum, a second one takes all sums.
    """
    image, rows, cols = place
    heads, has_head, channels, has_channel = block
    P: tl.constexpr = rows.shape[0]
    BH: tl.constexpr = channels.shape[0]
    BD: tl.constexpr = channels.shape[1]
    on_map = (rows < out_size[0]) & (cols < out_size[1])
    scores += image * score_strides[0]
    value += image * value_strides[0]
    top, left = rows * STRIDE - PADDING, cols * STRIDE - PADDING

    # Per query: the window's largest score, and its largest score + bias relative to that. The
    # score's maximum is taken off before the bias is added: at scores of 1e4 a float32 sum keeps
    # three decimals of the bias. So a token that has all the weight has one of exactly 1.
    peaks, tops = (), ()
    for _ in tl.static_range(QUERIES):
        peaks += (tl.full((P, BH), LOWEST, tl.float32),)
        tops += (tl.full((P, BH), float("-inf"), tl.float32),)
    for ky in range(KERNEL_H):
        for kx in range(KERNEL_W):
            y, x = top + ky, left + kx
            inside = on_map & (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
            places = y.to(tl.int64) * score_strides[1] + x * score_strides[2]
            row = (ky * KERNEL_W + kx) * QUERIES * HEADS
            new_peaks, new_tops = (), ()
            for q in tl.static_range(QUERIES):
                score = load_heads(scores + q * HEADS, places, inside, heads, float("-inf"))
                peak = tl.maximum(peaks[q], score)
                raised = (score - peak) + load_table(bias, row, q * HEADS, heads, 0.0)
                new_peaks += (peak,)
                new_tops += (tl.maximum(tops[q] - (peak - peaks[q]), raised),)
            peaks, tops = new_peaks, new_tops

    totals, sums = (), ()
    for _ in tl.static_range(QUERIES):
        totals += (tl.zeros((P, BH), tl.float32),)
        sums += (tl.zeros((P, BH, BD), tl.float32),)
    for ky in range(KERNEL_H):
        for kx in range(KERNEL_W):
            y, x = top + ky, left + kx
            inside = on_map & (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
            places = y.to(tl.int64) * value_strides[1] + x * value_strides[2]
            values = load_channels(value, places, inside, channels, has_channel)
            places = y.to(tl.int64) * score_strides[1] + x * score_strides[2]
            offset = ky * KERNEL_W + kx
            row = offset * QUERIES * HEADS
            new_totals, new_sums = (), ()
            for q in tl.static_range(QUERIES):
                score = load_heads(scores + q * HEADS, places, inside, heads, float("-inf"))
                added = load_table(bias, row, q * HEADS, heads, 0.0)
                attn = tl.exp((score - peaks[q]) + (added - tops[q]))
                new_totals += (totals[q] + attn,)
                attn *= load_table(weight, offset * weight_step, q * HEADS, heads, 1.0)
                new_sums += (sums[q] + attn[:, :, None] * values,)
            totals, sums = new_totals, new_sums

    places = (image * out_size[0] + rows) * out_size[1] + cols
    result = tl.zeros((P, BH, BD), tl.float32)
    for q in tl.static_range(QUERIES):
        result += sums[q] / totals[q][:, :, None]
        row = (places * QUERIES + q) * HEADS
        store_heads(shifts, row, on_map, heads, has_head, peaks[q])
        store_heads(logs, row, on_map, heads, has_head, tops[q] + tl.log(totals[q]))
    tl.store(
        out + places[:, None, None] * (HEADS * HEAD_DIM) + channels[None, :, :],
        result,
        mask=on_map[:, None, None] & has_channel[None, :, :],
    )


@triton.jit
def forward_kernel(
    scores,
    value,
    bias,
    weight,
    out,
    shifts,
    logs,
    size,
    out_size,
    tiles,
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
    """out = sum_q sum_o softmax_o(score + bias) weight value, and of the softmax's denominator
    exp(shift + log) both parts: shift is the window's largest score."""
    place = tile_positions(tl.program_id(0), tiles, TILE_H, TILE_W)
    block = head_block(tl.program_id(1), HEADS, HEAD_DIM, BH, BD)
    attend(
        scores,
        value,
        bias,
        weight,
        out,
        shifts,
        logs,
        place,
        block,
        size,
        out_size,
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
