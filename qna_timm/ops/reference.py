"""Learned-query attention written for reading: one window at a time, softmax as in the paper.

Letters: B batch, H W map, Q queries, h heads, d head_dim, C = h*d channels, K = kh*kw offsets.
"""

import torch
from einops import einsum, rearrange
from torch import Tensor


def qna_attention_reference(
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    kernel_size: tuple[int, int],
    stride: int,
    padding: int,
) -> Tensor:
    r"""Learned-query attention, window by window, in the dtype of the scores.

    For the window of output position y, query q, head j, with o running over the window's
    offsets that fall on the map,

        attn[o] = softmax_o(scores[y+o, q, j] + rel_pos_bias[o, q, j]) * query_weight[o, q, j]
        out[y, j] = sum_q sum_o attn[o] * value[y+o, j]

    Padding takes no part in the softmax ("Learned Queries for Efficient Local Attention",
    sections 3 and 4). Arguments as in `qna_attention`.
    """
    height, width, num_heads = scores.shape[1], scores.shape[2], scores.shape[4]
    kernel_h, kernel_w = kernel_size
    value = rearrange(value.to(scores.dtype), "b y x (h d) -> b y x h d", h=num_heads)
    rows = []
    for top in range(-padding, height + padding - kernel_h + 1, stride):
        row = []
        for left in range(-padding, width + padding - kernel_w + 1, stride):
            ys = slice(max(top, 0), min(top + kernel_h, height))
            xs = slice(max(left, 0), min(left + kernel_w, width))
            inside = (slice(ys.start - top, ys.stop - top), slice(xs.start - left, xs.stop - left))
            logits = scores[:, ys, xs]  # B, window rows, window columns, Q, h
            if rel_pos_bias is not None:
                logits = logits + rel_pos_bias.unflatten(0, kernel_size)[inside]
            attn = logits.flatten(1, 2).softmax(dim=1).view_as(logits)
            if query_weight is not None:
                table = query_weight.expand(kernel_h * kernel_w, -1, -1)
                attn = attn * table.unflatten(0, kernel_size)[inside]
            row.append(einsum(attn, value[:, ys, xs], "b y x q h, b y x h d -> b h d"))
        rows.append(torch.stack(row, dim=1))
    return rearrange(torch.stack(rows, dim=1), "b y x h d -> b y x (h d)")
