"""Triton kernel of learned-query attention on tensor cores, for large windows at stride 1.

All channels of a head share its tables, so that a window's sum along a row of tokens is a product
with a banded Toeplitz matrix: for row ky of the window, query q and a tile of output columns c,

    sums[(y, d), c] += sum_t Z[(y, d), t] band[t, c],  Z = exp(score - peak) value, t a token
    band[t, c] = exp(bias) weight at offset (ky, t - c), 0 where t - c is outside the window

and the same with exp(score - peak) and exp(bias) for the softmax's denominator. A tile has one peak
for each query and head, the largest score that it sees. A tile where that leaves some window next
to nothing is computed as in `forward.py`; so is one with numbers that are not finite,
which a product would spread over the tile.
"""

import triton
import triton.language as tl

from qna_timm.ops.qna.triton.forward import attend

# The smallest sum of a window where the largest term of its tile is 1. Beside it, terms that
# float32 cannot hold, below 2^-126, count for nothing.
SMALLEST_SUM = tl.constexpr(2.0**-60)


@triton.jit
def load_levels(levels, ys, xs, size, strides, SIGN: tl.constexpr):
    """What is raised to exponentials, [tokens, rows] of a query and head; -inf off the map."""
    inside = ((ys >= 0) & (ys < size[0]))[None, :] & ((xs >= 0) & (xs < size[1]))[:, None]
    places = ys.to(tl.int64)[None, :] * strides[1] + (xs * strides[2])[:, None]
    found = tl.load(levels + places, mask=inside, other=0.0)
    return tl.where(inside, SIGN * found, float("-inf"))


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
def place_of_tile(tiles, HEAD_DIM: tl.constexpr, TILE_H, TILE_W, BD: tl.constexpr):
    """Image (64-bit), first row and column, head, and part of its channels of this program."""
    tile = tl.program_id(0)
    image = tl.full((), tile // tiles[1] // tiles[0], tl.int64)
    first_row, first_col = tile // tiles[1] % tiles[0] * TILE_H, tile % tiles[1] * TILE_W
    PARTS: tl.constexpr = (HEAD_DIM + BD - 1) // BD
    return image, first_row, first_col, tl.program_id(1) // PARTS, tl.program_id(1) % PARTS


@triton.jit
def window_sums(
    levels,
    more,
    scalars,
    vectors,
    numerators,
    denominators,
    tile,
    size,
    level_strides,
    vector_strides,
    SIGN: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    BD: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """For every query, over the windows of a tile and with e = exp((SIGN * level - peak) - more):

        peak, the largest SIGN * level - more of the tile and its halo,
        sums of e vector [TILE_H * BD, TILE_W] and of e scalar [TILE_H, TILE_W]

    `tile` is its first row and column, a head, and BD of that head's channels. Pointers of maps are
    those of the image and the head. Bands are [Q, h, KERNEL_H, TOKENS, columns].
    In low precision the second sum, of which there is an eighth as much, is still good to 16 bits:
    its numbers come as sums of two, the band as one column beside the other.
    """
    SUMS: tl.constexpr = 2 if LOW_PRECISION else 1
    first_row, first_col, head, dims = tile
    rows = first_row - PAD_H + tl.arange(0, TILE_H)
    tokens = first_col - PAD_W + tl.arange(0, CHUNK)
    # rows of the window, and chunks of tokens, of which some are on the map
    top = tl.maximum(PAD_H - first_row - (TILE_H - 1), 0)
    bottom = tl.minimum(size[0] + PAD_H - first_row, KERNEL_H)
    start = tl.maximum(PAD_W - first_col, 0) // CHUNK
    stop = tl.cdiv(tl.minimum(size[1] + PAD_W - first_col, TILE_W + KERNEL_W - 1), CHUNK)

    peaks = ()
    for q in tl.static_range(QUERIES):
        highest = tl.full((CHUNK, TILE_H), float("-inf"), tl.float32)
        for ky in range(0, TILE_H + KERNEL_H - 1, TILE_H):
            for chunk in range(start, stop):
                xs = tokens + chunk * CHUNK
                found = load_levels(levels + q * HEADS, rows + ky, xs, size, level_strides, SIGN)
                if more is not None:
                    found += load_levels(more + q * HEADS, rows + ky, xs, size, level_strides, -1)
                highest = tl.maximum(highest, found)
        peaks += (tl.max(tl.max(highest, axis=1), axis=0),)

    sums, totals = (), ()
    for _ in tl.static_range(QUERIES):
        sums += (tl.zeros((TILE_H * BD, TILE_W), tl.float32),)
        totals += (tl.zeros((SUMS * TILE_H, SUMS * TILE_W), tl.float32),)
    for ky in range(top, bottom):
        ys = rows + ky
        in_rows = (ys >= 0) & (ys < size[0])
        for chunk in range(start, stop):
            xs = tokens + chunk * CHUNK
            inside = ((xs >= 0) & (xs < size[1]))[:, None] & in_rows[None, :]
            mask = inside[:, :, None] & (dims < HEAD_DIM)[None, None, :]
            places = (xs * vector_strides[2])[:, None, None] + dims[None, None, :]
            places += ys.to(tl.int64)[None, :, None] * vector_strides[1]
            found_vectors = tl.load(vectors + places, mask=mask, other=0.0).to(tl.float32)
            token = chunk * CHUNK + tl.arange(0, CHUNK)
            new_sums, new_totals = (), ()
            for q in tl.static_range(QUERIES):
                found = load_levels(levels + q * HEADS, ys, xs, size, level_strides, SIGN)
                # the peak goes before the rest comes: numbers of 1e4 keep their difference exactly
                terms = found - peaks[q]
                if more is not None:
                    terms += load_levels(more + q * HEADS, ys, xs, size, level_strides, -1)
                terms = tl.exp(terms)
                entry = ((q * HEADS + head) * KERNEL_H + ky) * TOKENS + token
                band = load_band(numerators, entry, TILE_W)
                weighted = (terms[:, :, None] * found_vectors).reshape(CHUNK, TILE_H * BD)
                new_sums += (multiply(weighted, band, sums[q], LOW_PRECISION, INTERPRETED),)
                if scalars is not None:
                    places = ys.to(tl.int64)[None, :] * level_strides[1]
                    places += (xs * level_strides[2])[:, None]
                    terms *= tl.load(scalars + q * HEADS + places, mask=inside, other=0.0)
                band = load_band(denominators, entry, SUMS * TILE_W)
                if LOW_PRECISION:
                    terms = split(terms)
                new_totals += (multiply(terms, band, totals[q], LOW_PRECISION, INTERPRETED),)
            sums, totals = new_sums, new_totals

    whole_totals = ()
    for q in tl.static_range(QUERIES):
        total = totals[q].reshape(TILE_H, SUMS, SUMS, TILE_W)
        whole_totals += (tl.sum(tl.sum(total, axis=1), axis=1),)
    return peaks, sums, whole_totals


@triton.jit
def everywhere(good, on_map):
    """Whether something holds at all positions of a tile that are on the map."""
    return tl.min(tl.min(tl.where(on_map, good.to(tl.int32), 1), axis=1), axis=0) == 1


@triton.jit
def toeplitz_kernel(
    scores,
    value,
    bias,
    weight,
    out,
    shifts,
    logs,
    numerators,
    denominators,
    tops,
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
    """out, shifts and logs of a tile, for a head and BD of its channels; bands are relative to the
    largest biases, `tops` [Q, h]."""
    image, first_row, first_col, head, part = place_of_tile(tiles, HEAD_DIM, TILE_H, TILE_W, BD)
    rows, cols = first_row + tl.arange(0, TILE_H), first_col + tl.arange(0, TILE_W)
    dims = part * BD + tl.arange(0, BD)
    peaks, sums, totals = window_sums(
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
    result = tl.zeros((TILE_H, BD, TILE_W), tl.float32)
    good = on_map
    for q in tl.static_range(QUERIES):
        result += sums[q].reshape(TILE_H, BD, TILE_W) / totals[q][:, None, :]
        good &= totals[q] >= SMALLEST_SUM
    good &= tl.min((tl.abs(result) < float("inf")).to(tl.int32), axis=1) == 1
    if everywhere(good, on_map):
        places = (image * out_size[0] + rows[:, None]) * out_size[1] + cols[None, :]
        mask = on_map & (part + tl.zeros((TILE_H, TILE_W), tl.int32) == 0)
        for q in tl.static_range(QUERIES):
            log = tl.load(tops + q * HEADS + head) + tl.log(totals[q])
            own_places = (places * QUERIES + q) * HEADS + head
            tl.store(shifts + own_places, peaks[q] + tl.zeros_like(log), mask=mask)
            tl.store(logs + own_places, log, mask=mask)
        places = places[:, None, :] * (HEADS * HEAD_DIM) + head * HEAD_DIM + dims[None, :, None]
        tl.store(out + places, result, mask=on_map[:, None, :] & (dims < HEAD_DIM)[None, :, None])
    else:
        only = tl.arange(0, 1)
        channels, has_channel = head * HEAD_DIM + dims[None, :], (dims < HEAD_DIM)[None, :]
        block = (head + only, part + only == 0, channels, has_channel)
        for row in range(first_row, tl.minimum(first_row + TILE_H, out_size[0])):
            attend(
                scores,
                value,
                bias,
                weight,
                out,
                shifts,
                logs,
                (image, row + tl.zeros((TILE_W,), tl.int32), cols),
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
