"""The public local self-attention: argument checks, then the only dispatch.

Letters: B batch, H W map, C = h*d channels, h heads, d head_dim, k kernel_size, K = k*k offsets.
"""

import torch
from torch import Tensor

from qna_timm.ops.dispatch import Choice, against_triton, choose
from qna_timm.ops.reference import span_attention_reference
from qna_timm.ops.span_attn import span_offsets
from qna_timm.ops.span_op import span_tiles, span_triton

SPAN_FORMS = ("auto", "reference", "offsets", "tiles", "triton")


def _check_span(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    num_heads: int,
    mask: Tensor | None,
    floor: Tensor | None,
    impl: str,
) -> None:
    table = list(rel_pos_h.shape)
    if len(table) != 2 or table[1] % 2 == 0 or list(rel_pos_w.shape) != table:
        raise ValueError(
            "rel_pos_h and rel_pos_w must be [C, k] of one shape with an odd k, "
            f"got {table} and {list(rel_pos_w.shape)}"
        )
    channels, offsets = table[0], table[1] ** 2
    if qkv.dim() != 4 or qkv.shape[3] != 3 * channels:
        raise ValueError(f"qkv must be [B, H, W, {3 * channels}], got {list(qkv.shape)}")
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"num_heads must divide the {channels} channels, got {num_heads}")
    if mask is not None and list(mask.shape) != [num_heads, offsets]:
        raise ValueError(f"mask must be [{num_heads}, {offsets}], got {list(mask.shape)}")
    if floor is not None and (mask is None or list(floor.shape) != [offsets]):
        raise ValueError(f"floor must be [{offsets}] and come with a mask, got {list(floor.shape)}")
    if impl not in SPAN_FORMS:
        raise ValueError(f"impl must be one of {SPAN_FORMS}, got {impl!r}")


def _choose_span(impl: str, qkv: Tensor, kernel_size: int, num_heads: int) -> Choice:
    """The ladder: kernels where they are known to serve, else tiles."""

    def unsupported() -> str | None:
        from qna_timm.ops import span_triton as kernels  # an optional package

        return kernels.unsupported(qkv, kernel_size, num_heads)

    def against(asked_for: bool) -> str | None:
        return against_triton("span_attention", qkv, asked_for, unsupported)

    return choose(impl, (("triton", against),), "tiles")


def span_attention(
    qkv: Tensor,
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
    the map are zero and take part. Everything inside is float32 (float64 for a float64 qkv), also
    under autocast. (arXiv:1906.05909, section 3; arXiv:2004.08708, section 3.)

    Args:
        qkv: [B, H, W, 3*C], queries, keys and values one after the other, heads inside each.
        rel_pos_h: Relative vectors of rows [C, k], k odd.
        rel_pos_w: Relative vectors of columns [C, k].
        num_heads: h, a divisor of C.
        mask: m, weights of the offsets [h, K]; None is 1, with which this is a softmax.
        floor: What offsets add to the denominator alone [K], no gradient; None is 0.
        scale: Of the scores.
        mask_padding: Leave offsets off the map out.
        impl: 'auto', or one form with no fall-back: 'reference' (position by position), 'offsets'
            (any order of gradients, forward-mode ones, scripts; keeps B*h*H*W*K scores), 'tiles'
            (gradients by hand, not forward-mode; keeps qkv) or 'triton' (the same in fused kernels,
            for GPUs; keeps the output too; m + floor must not be negative). 'auto' is 'triton' on
            GPUs where that was measured, else 'tiles', except in scripts.

    Returns:
        [B, H, W, C] in qkv's dtype.

    Raises:
        ValueError: shapes that do not go together, an unknown impl, or 'triton' where the kernels
            cannot compute this.
    """
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    rel_pos_h, rel_pos_w = rel_pos_h.to(dtype), rel_pos_w.to(dtype)
    if mask is not None:
        mask = mask.to(dtype)
    if floor is not None:
        floor = floor.detach().to(dtype)
    if torch.jit.is_scripting():
        out = span_offsets(
            qkv.to(dtype), rel_pos_h, rel_pos_w, mask, floor, num_heads, mask_padding, scale
        )
        return out.to(qkv.dtype)
    else:  # in so many words: the script compiler skips an else branch, not code that follows
        _check_span(qkv, rel_pos_h, rel_pos_w, num_heads, mask, floor, impl)
        rest = (rel_pos_h, rel_pos_w, mask, floor, num_heads, mask_padding, scale)
        impl = _choose_span(impl, qkv, rel_pos_h.shape[1], num_heads).impl
        if impl in ("tiles", "triton"):
            return (span_tiles if impl == "tiles" else span_triton)(qkv, *rest)
        form = span_offsets if impl == "offsets" else span_attention_reference
        with torch.autocast(qkv.device.type, enabled=False):
            return form(qkv.to(dtype), *rest).to(qkv.dtype)
