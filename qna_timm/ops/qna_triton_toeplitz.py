"""Triton kernel of learned-query attention on tensor cores, for large windows at stride 1.

All channels of a head share its tables, so that a window's sum along a row of tokens is a product
with a banded Toeplitz matrix: for row ky of the window, query q and a tile of output columns c,

    sums[(y, d), c] += sum_t Z[(y, d), t] band[t, c],  Z = exp(score - peak) value, t a token
    band[t, c] = exp(bias) weight at offset (ky, t - c), 0 where t - c is outside the window

and the same with exp(score - peak) and exp(bias) for the softmax's denominator. A tile has one peak
for each query and head, the largest score that it sees. A tile where that leaves some window next
to nothing is computed as in `qna_triton_kernels.py`; so is one with numbers that are not finite,
which a product would spread over the tile.
"""

import triton
import triton.language as tl

from qna_timm.ops.qna_triton_kernels import attend

# The smallest sum of a window where the largest term of its tile is 1. Beside it, terms that
# float32 cannot hold, below 2^-126, count for nothing.
SMALLEST_SUM = tl.constexpr(2.0**-60)


@triton.jit
def load_scores(scores, ys, xs, size, strides):
    """Scores [tokens, rows] of a query and head, -inf off the map."""
    inside = ((ys >= 0) & (ys < size[0]))[None, :] & ((xs >= 0) & (xs < size[1]))[:, None]
    places = ys.to(tl.int64)[None, :] * strides[1] + (xs * strides[2])[:, None]
    return tl.load(scores + places, mask=inside, other=float("-inf"))


@triton.jit
def load_band(bands, rows, COLUMNS: tl.constexpr):
    """Some rows of a band."""
    return tl.load(bands + rows.to(tl.int64)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def multiply(a, b, total, LOW_PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """total + a^T b on tensor cores: of bfloat16 numbers, or good to float32's rounding."""
    if LOW_PRECISION:
        a = a.to(tl.bfloat16)
        if INTERPRETED:  # which holds bfloat16 as bits, and would multiply these
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(tl.trans(a), b, total)
    else:
        return tl.dot(tl.trans(a), b, total, input_precision="tf32x3")


@triton.jit
def split(terms):
    """Numbers [tokens, rows] as sums of two bfloat16 numbers, [tokens, rows * 2]."""
    high = terms.to(tl.bfloat16).to(tl.float32)
    return tl.join(high, terms - high).reshape(terms.shape[0], 2 * terms.shape[1])


@triton.jit
def toeplitz_kernel(
    scores,
    value,
    bias,
    weight,
    numerators,
    denominators,
    tops,
    out,
    lse,
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
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    BD: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out and lse of a tile, for a head and BD of its channels.

    Bands of both sums are [Q, h, KERNEL_H, TOKENS, columns], relative to `tops` [Q, h], the
    largest biases. In low precision the denominator, which the gradients need too, is still good
    to 16 bits: its numbers come as sums of two, the band as one column beside the other.
    """
    SUMS: tl.constexpr = 2 if LOW_PRECISION else 1
    PARTS: tl.constexpr = (HEAD_DIM + BD - 1) // BD
    tile = tl.program_id(0)
    image = tl.full((), tile // tiles[1] // tiles[0], tl.int64)
    first_row = tile // tiles[1] % tiles[0] * TILE_H
    first_col = tile % tiles[1] * TILE_W
    rows, cols = first_row + tl.arange(0, TILE_H), first_col + tl.arange(0, TILE_W)
    tokens = first_col - PADDING + tl.arange(0, CHUNK)
    head, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    dims = part * BD + tl.arange(0, BD)
    own_scores = scores + image * score_strides[0] + head
    own_value = value + image * value_strides[0] + head * HEAD_DIM
    # rows of the window, and chunks of tokens, of which some are on the map
    top = tl.maximum(PADDING - first_row - (TILE_H - 1), 0)
    bottom = tl.minimum(size[0] + PADDING - first_row, KERNEL_H)
    start = tl.maximum(PADDING - first_col, 0) // CHUNK
    stop = tl.cdiv(tl.minimum(size[1] + PADDING - first_col, TILE_W + KERNEL_W - 1), CHUNK)

    peaks = ()
    for q in tl.static_range(QUERIES):
        highest = tl.full((CHUNK, TILE_H), float("-inf"), tl.float32)
        for ky in range(0, TILE_H + KERNEL_H - 1, TILE_H):
            for chunk in range(start, stop):
                ys, xs = rows - PADDING + ky, tokens + chunk * CHUNK
                found = load_scores(own_scores + q * HEADS, ys, xs, size, score_strides)
                highest = tl.maximum(highest, found)
        peaks += (tl.max(tl.max(highest, axis=1), axis=0),)

    sums, totals = (), ()
    for _ in tl.static_range(QUERIES):
        sums += (tl.zeros((TILE_H * BD, TILE_W), tl.float32),)
        totals += (tl.zeros((SUMS * TILE_H, SUMS * TILE_W), tl.float32),)
    for ky in range(top, bottom):
        ys = rows - PADDING + ky
        in_rows = (ys >= 0) & (ys < size[0])
        for chunk in range(start, stop):
            xs = tokens + chunk * CHUNK
            mask = ((xs >= 0) & (xs < size[1]))[:, None] & in_rows[None, :]
            mask = mask[:, :, None] & (dims < HEAD_DIM)[None, None, :]
            places = (xs * value_strides[2])[:, None, None] + dims[None, None, :]
            places += ys.to(tl.int64)[None, :, None] * value_strides[1]
            values = tl.load(own_value + places, mask=mask, other=0.0).to(tl.float32)
            token = chunk * CHUNK + tl.arange(0, CHUNK)
            new_sums, new_totals = (), ()
            for q in tl.static_range(QUERIES):
                found = load_scores(own_scores + q * HEADS, ys, xs, size, score_strides)
                terms = tl.exp(found - peaks[q])
                entry = ((q * HEADS + head) * KERNEL_H + ky) * TOKENS + token
                band = load_band(numerators, entry, TILE_W)
                weighted = (terms[:, :, None] * values).reshape(CHUNK, TILE_H * BD)
                new_sums += (multiply(weighted, band, sums[q], LOW_PRECISION, INTERPRETED),)
                band = load_band(denominators, entry, SUMS * TILE_W)
                if LOW_PRECISION:
                    terms = split(terms)
                new_totals += (multiply(terms, band, totals[q], LOW_PRECISION, INTERPRETED),)
            sums, totals = new_sums, new_totals

    on_map = (rows < out_size[0])[:, None] & (cols < out_size[1])[None, :]
    result = tl.zeros((TILE_H, BD, TILE_W), tl.float32)
    good = tl.full((TILE_H, TILE_W), 1, tl.int32)
    whole_totals = ()
    for q in tl.static_range(QUERIES):
        total = tl.sum(tl.sum(totals[q].reshape(TILE_H, SUMS, SUMS, TILE_W), axis=1), axis=1)
        result += sums[q].reshape(TILE_H, BD, TILE_W) / total[:, None, :]
        good &= (total >= SMALLEST_SUM).to(tl.int32)
        whole_totals += (total,)
    good &= tl.min((tl.abs(result) < float("inf")).to(tl.int32), axis=1)
    if tl.min(tl.min(tl.where(on_map, good, 1), axis=1), axis=0) == 1:
        places = (image * out_size[0] + rows[:, None]) * out_size[1] + cols[None, :]
        mask = on_map & (part + tl.zeros((TILE_H, TILE_W), tl.int32) == 0)
        for q in tl.static_range(QUERIES):
            log = peaks[q] + (tl.load(tops + q * HEADS + head) + tl.log(whole_totals[q]))
            tl.store(lse + (places * QUERIES + q) * HEADS + head, log, mask=mask)
        places = places[:, None, :] * (HEADS * HEAD_DIM) + head * HEAD_DIM + dims[None, :, None]
        tl.store(out + places, result, mask=on_map[:, None, :] & (dims < HEAD_DIM)[None, :, None])
    else:
        only = tl.arange(0, 1)
        for row in range(first_row, tl.minimum(first_row + TILE_H, out_size[0])):
            attend(
                scores,
                value,
                bias,
                weight,
                out,
                lse,
                image,
                row + tl.zeros((TILE_W,), tl.int32),
                cols,
                head + only,
                part + only == 0,
                head * HEAD_DIM + dims[None, :],
                (dims < HEAD_DIM)[None, :],
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
