"""What the kernels of the local self-attention are made of, and the weights of its offsets.

Letters: H W map, C = h*d channels, h heads, d head_dim, k kernel_size, K = k*k offsets; T positions
of a tile, N of a block of columns; blocks D >= d of channels and S >= k of steps, offsets along one
axis. `b_*` are blocks, `p_*` pointers.
"""

import triton
import triton.language as tl


@triton.jit
def span_weights_kernel(
    p_mask,
    p_floor,
    p_weights,
    p_range,
    KERNEL: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one head: log w and r [2, K], and [4] first and end of rows, of columns of any weight."""
    head, num_offsets = tl.program_id(0), KERNEL * KERNEL
    offsets = tl.arange(0, BLOCK)
    inside = offsets < num_offsets
    b_mask = tl.load(p_mask + head * num_offsets + offsets, mask=inside, other=0.0)
    b_total = b_mask
    if HAS_FLOOR:
        b_total += tl.load(p_floor + offsets, mask=inside, other=0.0)
    used = b_total != 0.0
    b_log = tl.where(used, tl.log(tl.where(used, b_total, 1.0)), -float("inf"))
    b_ratio = tl.where(used, b_mask / tl.where(used, b_total, 1.0), 0.0)
    p_head = p_weights + head * 2 * num_offsets
    tl.store(p_head + offsets, b_log, mask=inside)
    tl.store(p_head + num_offsets + offsets, b_ratio, mask=inside)
    rows, cols = offsets // KERNEL, offsets % KERNEL
    tl.store(p_range + head * 4, tl.min(tl.where(used, rows, KERNEL), 0))
    tl.store(p_range + head * 4 + 1, tl.max(tl.where(used, rows + 1, 0), 0))
    tl.store(p_range + head * 4 + 2, tl.min(tl.where(used, cols, KERNEL), 0))
    tl.store(p_range + head * 4 + 3, tl.max(tl.where(used, cols + 1, 0), 0))


# Triton's interpreter multiplies the bits of bfloat16 blocks: there, products are float32's.
INTERPRETED = not isinstance(span_weights_kernel, triton.JITFunction)
WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def matmul(a, b, PRECISION: tl.constexpr):
    """Matrix product with float32 sums."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def split_matmul(b_map, b_table, PRECISION: tl.constexpr):
    """Products of a map in any type with a float32 table, in halves as a sum of two: to 2^-17."""
    b_high = b_table.to(b_map.dtype)
    b_products = matmul(b_map, b_high, PRECISION)
    if b_map.dtype != tl.float32:
        b_low = (b_table - b_high.to(tl.float32)).to(b_map.dtype)
        b_products += matmul(b_map, b_low, PRECISION)
    return b_products


@triton.jit
def find_tile(index, height, width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Image, first row and first column of a tile."""
    across = tl.cdiv(width, TILE_W)
    tiles = tl.cdiv(height, TILE_H) * across
    image, index = index // tiles, index % tiles
    return image.to(tl.int64), index // across * TILE_H, index % across * TILE_W


@triton.jit
def offset_ranges(p_range, head, KERNEL: tl.constexpr, HAS_MASK: tl.constexpr):
    """First and end of the rows, then of the columns, of offsets that take part."""
    row_from, row_to, col_from, col_to = 0, KERNEL, 0, KERNEL
    if HAS_MASK:
        row_from, row_to = tl.load(p_range + head * 4), tl.load(p_range + head * 4 + 1)
        col_from, col_to = tl.load(p_range + head * 4 + 2), tl.load(p_range + head * 4 + 3)
    return row_from, row_to, col_from, col_to


@triton.jit
def load_channels(p, places, inside, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Channels [n, D] at places of a map, zero where a place is not inside."""
    channels = tl.arange(0, D)
    there = inside[:, None] & (channels < HEAD_DIM)[None, :]
    return tl.load(p + places[:, None] + channels[None, :], mask=there, other=0.0)


@triton.jit
def store_channels(p, places, inside, block, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """The reverse of `load_channels`, in the pointer's type."""
    channels = tl.arange(0, D)
    there = inside[:, None] & (channels < HEAD_DIM)[None, :]
    block = block.to(p.dtype.element_ty)
    tl.store(p + places[:, None] + channels[None, :], block, mask=there)


@triton.jit
def load_table(
    p_rel, head, KERNEL: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, S: tl.constexpr
):
    """Relative vectors [D, S] of a head."""
    channels, steps = tl.arange(0, D), tl.arange(0, S)
    there = (channels < HEAD_DIM)[:, None] & (steps < KERNEL)[None, :]
    places = (head * HEAD_DIM + channels)[:, None] * KERNEL + steps[None, :]
    return tl.load(p_rel + places, mask=there, other=0.0)


@triton.jit
def store_table(
    p, block, head, KERNEL: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, S: tl.constexpr
):
    """Gradient [D, S] of a head's relative vectors into [C, 2*k]."""
    channels, steps = tl.arange(0, D), tl.arange(0, S)
    there = (channels < HEAD_DIM)[:, None] & (steps < KERNEL)[None, :]
    places = (head * HEAD_DIM + channels)[:, None] * (2 * KERNEL) + steps[None, :]
    tl.store(p + places, block, mask=there)


@triton.jit
def clamp_step(steps, KERNEL: tl.constexpr):
    """Steps inside the window, of which a table has values."""
    return tl.minimum(tl.maximum(steps, 0), KERNEL - 1)


@triton.jit
def pair_scores(
    b_products,
    oy,
    ox,
    seen,
    p_weights,
    scale,
    KERNEL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
):
    """score + log w of pairs of query and key, -inf of pairs not seen, and r."""
    b_scores = b_products * scale
    b_ratio = tl.full(b_products.shape, 1.0, tl.float32)
    if HAS_MASK:
        offsets = oy * KERNEL + ox
        b_scores += tl.load(p_weights + offsets, mask=seen, other=-float("inf"))
        if HAS_FLOOR:
            b_ratio = tl.load(p_weights + KERNEL * KERNEL + offsets, mask=seen, other=0.0)
    else:
        b_scores = tl.where(seen, b_scores, -float("inf"))
    return b_scores, b_ratio


@triton.jit
def score_slopes(b_attn, b_ratio, b_slopes, b_delta, KERNEL: tl.constexpr):
    """Gradients ds of scores; without its rounding error where nothing competes for attention."""
    return tl.zeros_like(b_attn) if KERNEL == 1 else b_attn * (b_ratio * b_slopes - b_delta)


@triton.jit
def seen_keys(
    first,
    last,
    size,
    offset_from,
    offset_to,
    KERNEL: tl.constexpr,
    MASK_PADDING: tl.constexpr,
):
    """First and end of the keys along an axis that queries first..last see."""
    begin, end = first + offset_from - KERNEL // 2, last + offset_to - KERNEL // 2
    if MASK_PADDING:
        begin, end = tl.maximum(begin, 0), tl.minimum(end, size)
    return begin, end
