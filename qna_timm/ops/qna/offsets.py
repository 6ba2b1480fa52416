"""Learned-query attention from stock PyTorch operators, exact for any scores, on any device.

Letters: B batch, H W map, Y X output map, Q queries, h heads, d head_dim, K = kh*kw offsets.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qna_timm.ops.qna.windows import window_max

# Most offsets of a window that compilers fuse into one loop. The loop beats every form by hand but
# the native one, which is as fast and takes a third of the time to compile.
FUSED_OFFSETS = 9


def qna_offsets(
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    kernel_size: tuple[int, int],
    stride: int,
    padding: int,
    few: int = FUSED_OFFSETS,
) -> Tensor:
    """Arguments as in `qna_attention`, scores float32 or float64; result likewise.

    Memory for backward: up to about 3*K*Q*h numbers for each output position.

    Up to `few` offsets are taken one by one, for compilers to fuse; more are taken a row of the
    window at a time, which makes the graph of a 7x7 window five times shorter to export.
    """
    kernel_h, kernel_w = kernel_size
    num_heads = scores.shape[4]
    out_h = (scores.shape[1] + 2 * padding - kernel_h) // stride + 1
    out_w = (scores.shape[2] + 2 * padding - kernel_w) // stride + 1
    p = padding
    scores = F.pad(scores, [0, 0, 0, 0, p, p, p, p], value=float("-inf"))
    value = F.pad(value.to(scores.dtype), [0, 0, p, p, p, p]).unflatten(3, (num_heads, -1))
    # The window's maximum goes before the bias comes: at scores of 1e4 a float32 sum with the
    # bias would keep only three decimals of it. softmax then removes the maximum of the sum.
    shift = window_max(scores.detach(), kernel_size, stride)
    if kernel_h * kernel_w > few:
        return _by_rows(scores, value, shift, rel_pos_bias, query_weight, kernel_size, stride)
    biased = []
    for ky in range(kernel_h):
        for kx in range(kernel_w):
            rows = scores[:, ky : ky + (out_h - 1) * stride + 1 : stride]
            shifted = rows[:, :, kx : kx + (out_w - 1) * stride + 1 : stride] - shift
            if rel_pos_bias is not None:
                shifted = shifted + rel_pos_bias[ky * kernel_w + kx]
            biased.append(shifted)
    weight = _weights(torch.stack(biased), query_weight)
    # the sum begins with a product: traces keep the batch of zeros
    first = value[:, : (out_h - 1) * stride + 1 : stride, : (out_w - 1) * stride + 1 : stride]
    out = weight[0] * first
    for ky in range(kernel_h):
        for kx in range(kernel_w):
            if ky + kx == 0:
                continue
            rows = value[:, ky : ky + (out_h - 1) * stride + 1 : stride]
            tokens = rows[:, :, kx : kx + (out_w - 1) * stride + 1 : stride]
            out = torch.addcmul(out, weight[ky * kernel_w + kx], tokens)
    return out.flatten(3)


def _weights(biased: Tensor, query_weight: Tensor | None) -> Tensor:
    """Softmax of biased scores [K, B, Y, X, Q, h], weighted, summed over Q: [K, B, Y, X, h, 1]."""
    attn = biased.softmax(dim=0)
    if query_weight is not None:
        attn = attn * query_weight[:, None, None, None]
    return attn.sum(dim=4).unsqueeze(5)


def _by_rows(
    scores: Tensor,
    value: Tensor,
    shift: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    kernel_size: tuple[int, int],
    stride: int,
) -> Tensor:
    """`qna_offsets` of framed maps and their windows' maxima [B, Y, X, Q, h]."""
    kernel_h, kernel_w = kernel_size
    rows = (shift.shape[1] - 1) * stride + 1  # from the first window's to the last one's
    seen = []
    for ky in range(kernel_h):
        row = scores[:, ky : ky + rows : stride].unfold(2, kernel_w, stride)
        seen.append(row.movedim(-1, 0))  # kw, B, Y, X, Q, h
    biased = torch.cat(seen) - shift
    if rel_pos_bias is not None:
        biased = biased + rel_pos_bias[:, None, None, None]
    weight = _weights(biased, query_weight).unflatten(0, (kernel_h, kernel_w))
    sums = []
    for ky in range(kernel_h):
        row = value[:, ky : ky + rows : stride].unfold(2, kernel_w, stride)
        sums.append((weight[ky] * row.movedim(-1, 0)).sum(dim=0))
    out = sums[0]
    for more in sums[1:]:
        out = out + more
    return out.flatten(3)
