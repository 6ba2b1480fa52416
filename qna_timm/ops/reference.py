"""Operators written for reading: one window, or one branch, at a time, as in the papers.

Letters: B batch, H W map, N positions, Q queries, h heads, d head_dim, C = h*d channels, K = kh*kw
offsets; D channels of a fused map, G gram_dim, M branches, e = h*d.
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
            biased = scores[:, ys, xs]  # B, window rows, window columns, Q, h
            if rel_pos_bias is not None:
                biased = biased + rel_pos_bias.unflatten(0, kernel_size)[inside]
            attn = biased.flatten(1, 2).softmax(dim=1).view_as(biased)
            if query_weight is not None:
                table = query_weight.expand(kernel_h * kernel_w, -1, -1)
                attn = attn * table.unflatten(0, kernel_size)[inside]
            row.append(einsum(attn, value[:, ys, xs], "b y x q h, b y x h d -> b h d"))
        rows.append(torch.stack(row, dim=1))
    return rearrange(torch.stack(rows, dim=1), "b y x h d -> b y x (h d)")


def gram_triangle_reference(x: Tensor, height: int) -> Tensor:
    """Upper triangle of every Gram matrix as a vector of length 1, in the dtype of x.

    Arguments as in `gram_triangle`, whose index this does without.
    """
    num_positions, gram_dim = x.shape[-2:]
    out = []
    for features in x.flatten(0, 1) / height:  # N, G
        gram = features.T @ features / num_positions
        rows = [gram[i, i:] for i in range(gram_dim)]
        triangle = torch.cat(rows)
        out.append(triangle / triangle.norm().clamp(min=1e-12))
    return torch.stack(out).unflatten(0, x.shape[:2])


def class_attention_reference(
    query: Tensor,
    x: Tensor,
    token: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    num_heads: int,
) -> Tensor:
    """Attention of each branch's query to its own token and all positions, keys and values in full.

    Arguments as in `class_attention`.
    """
    num_branches = query.shape[0]
    weights = (key_weight, value_weight, norm_weight, norm_bias)
    out = []
    for m, (key, value, scale, bias) in enumerate(
        zip(*(w.chunk(num_branches) for w in weights), strict=True)
    ):
        u = torch.cat([token[m][:, None], x], dim=1) * scale + bias  # B, 1+N, D
        keys, values = (
            rearrange(u @ w.T, "b n (h d) -> b h n d", h=num_heads) for w in (key, value)
        )
        q = rearrange(query[m], "b (h d) -> b h d", h=num_heads)
        scores = einsum(q, keys, "b h d, b h n d -> b h n") * q.shape[-1] ** -0.5
        mixed = einsum(scores.softmax(dim=-1), values, "b h n, b h n d -> b h d")
        out.append(rearrange(mixed, "b h d -> b (h d)"))
    return torch.stack(out)


def span_attention_reference(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    mask: Tensor | None,
    floor: Tensor | None,
    num_heads: int,
    mask_padding: bool,
    scale: float,
) -> Tensor:
    r"""Local self-attention with relative keys, position by position, in the dtype of qkv.

    For position y and head j, with o running over the window's offsets,

        attn[o] = softmax_o(scale * query[y, j] . (key[y+o, j] + rel_pos[o, j]))
        out[y, j] = sum_o m[o] attn[o] value[y+o, j] / sum_o (m[o] + floor[o]) attn[o]

    Keys and values off the map are zero. Offsets of no weight, m + floor = 0, take no part, nor
    do those off the map if mask_padding. (arXiv:1906.05909, arXiv:2004.08708.) Arguments as in
    `span_attention`.
    """
    height, width, kernel_size = *qkv.shape[1:3], rel_pos_h.shape[1]
    radius = kernel_size // 2
    query, key, value = qkv.chunk(3, dim=3)
    key, value = (torch.nn.functional.pad(x, [0, 0] + 4 * [radius]) for x in (key, value))
    rel_pos = torch.cat(  # K, C
        [rel_pos_h[:, dy] + rel_pos_w.T for dy in range(kernel_size)]
    )
    weight = torch.ones_like(rel_pos[:, :num_heads]).T if mask is None else mask  # h, K
    below = weight if floor is None else weight + floor
    out = torch.empty_like(query)
    for y in range(height):
        for x in range(width):
            window = (slice(None), slice(y, y + kernel_size), slice(x, x + kernel_size))
            keys = key[window].flatten(1, 2) + rel_pos
            q, k, v = (
                rearrange(t, "b o (h d) -> b h o d", h=num_heads)
                for t in (query[:, y, x, None], keys, value[window].flatten(1, 2))
            )
            scores = einsum(q[:, :, 0], k, "b h d, b h o d -> b h o") * scale
            takes_part = below != 0
            if mask_padding:
                rows = torch.arange(y - radius, y + radius + 1, device=query.device)
                cols = torch.arange(x - radius, x + radius + 1, device=query.device)
                inside = (rows >= 0) & (rows < height), (cols >= 0) & (cols < width)
                takes_part = takes_part & (inside[0][:, None] & inside[1]).flatten()
            attn = scores.masked_fill(~takes_part, float("-inf")).softmax(dim=2)
            mixed = einsum(attn * weight, v, "b h o, b h o d -> b h d")
            total = (attn * below).sum(dim=2, keepdim=True)
            out[:, y, x] = rearrange(mixed / total, "b h d -> b (h d)")
    return out
