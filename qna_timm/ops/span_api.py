"""The public local self-attention: argument checks, then the only dispatch.

Letters: B batch, H W map, C = h*d channels, h heads, d head_dim, k kernel_size, K = k*k offsets.
"""

import torch
from torch import Tensor

from qna_timm.ops.reference import span_attention_reference
from qna_timm.ops.span_attn import span_offsets
from qna_timm.ops.span_tiles import span_tiles

SPAN_FORMS = ("auto", "reference", "offsets", "tiles")


def _check_span(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    num_heads: int,
    mask: Tensor | None,
    floor: Tensor | None,
    impl: str,
) -> None:
    shape = list(query.shape)
    if query.dim() != 4 or list(key.shape) != shape or list(value.shape) != shape:
        raise ValueError(
            "query, key and value must be [B, H, W, C] of one shape, "
            f"got {shape}, {list(key.shape)} and {list(value.shape)}"
        )
    if num_heads < 1 or shape[3] % num_heads:
        raise ValueError(f"num_heads must divide the {shape[3]} channels, got {num_heads}")
    table = list(rel_pos_h.shape)
    if len(table) != 2 or table[0] != shape[3] or table[1] % 2 == 0:
        raise ValueError(f"rel_pos_h must be [{shape[3]}, k] with an odd k, got {table}")
    if list(rel_pos_w.shape) != table:
        raise ValueError(f"rel_pos_w must be {table} as rel_pos_h, got {list(rel_pos_w.shape)}")
    offsets = table[1] ** 2
    if mask is not None and list(mask.shape) != [num_heads, offsets]:
        raise ValueError(f"mask must be [{num_heads}, {offsets}], got {list(mask.shape)}")
    if floor is not None and (mask is None or list(floor.shape) != [offsets]):
        raise ValueError(f"floor must be [{offsets}] and come with a mask, got {list(floor.shape)}")
    if impl not in SPAN_FORMS:
        raise ValueError(f"impl must be one of {SPAN_FORMS}, got {impl!r}")


def span_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    num_heads: int,
    mask: Tensor | None = None,
    floor: Tensor | None = None,
    scale: float = 1.0,
    mask_padding: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Local self-attention with relative keys and a weighted window.

        score[o] = scale * q[y] . (k[y+o] + rel_pos_h[:, o_y] + rel_pos_w[:, o_x])
        e[o]     = exp(score[o] - max score)
        out[y]   = sum_o m[o] e[o] v[y+o] / sum_o (m[o] + floor[o]) e[o]

    for every head, o over the offsets of a k x k window centred at y in row-major order, index 0
    up and left. Offsets with m + floor = 0 are left out, of the maximum too. Keys and values off
    the map are zero and take part. Everything inside is float32 (float64 for a float64 query),
    also under autocast. (arXiv:1906.05909, section 3; arXiv:2004.08708, section 3.)

    Args:
        query: [B, H, W, C], heads one after the other.
        key: [B, H, W, C].
        value: [B, H, W, C].
        rel_pos_h: Relative vectors of rows [C, k], k odd.
        rel_pos_w: Relative vectors of columns [C, k].
        num_heads: h, a divisor of C.
        mask: m, weights of the offsets [h, K]; None is 1, with which this is a softmax.
        floor: What offsets add to the denominator alone [K], no gradient; None is 0.
        scale: Of the scores.
        mask_padding: Leave offsets off the map out.
        impl: 'auto', or one form with no fall-back: 'reference' (position by position), 'offsets'
            (any order of gradients, scripts; keeps B*h*H*W*K scores) or 'tiles' (gradients by
            hand; keeps q, k, v, the output and two numbers for each position and head). 'auto' is
            'tiles', except in scripts.

    Returns:
        [B, H, W, C] in value's dtype.

    Raises:
        ValueError: shapes that do not go together, or an unknown impl.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    rel_pos_h, rel_pos_w = rel_pos_h.to(dtype), rel_pos_w.to(dtype)
    if mask is not None:
        mask = mask.to(dtype)
    if floor is not None:
        floor = floor.detach().to(dtype)
    kernel_size = rel_pos_h.shape[1]
    if torch.jit.is_scripting():
        out = span_offsets(
            query.to(dtype) * scale,
            key.to(dtype),
            value.to(dtype),
            rel_pos_h,
            rel_pos_w,
            mask,
            floor,
            num_heads,
            kernel_size,
            mask_padding,
        )
        return out.to(value.dtype)
    else:  # in so many words: the script compiler skips an else branch, not code that follows
        _check_span(query, key, value, rel_pos_h, rel_pos_w, num_heads, mask, floor, impl)
        tables = (rel_pos_h, rel_pos_w, mask, floor, num_heads)
        if impl in ("auto", "tiles"):
            return span_tiles(query, key, value, *tables, mask_padding, scale)
        form = span_offsets if impl == "offsets" else span_attention_reference
        with torch.autocast(query.device.type, enabled=False):
            out = form(
                query.to(dtype) * scale,
                key.to(dtype),
                value.to(dtype),
                *tables,
                kernel_size,
                mask_padding,
            )
        return out.to(value.dtype)
