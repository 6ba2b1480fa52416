"""Local self-attention with relative keys and a soft window, for any device, in plain PyTorch.

"Stand-Alone Self-Attention in Vision Models" (arXiv:1906.05909), section 2.2, with the spans of
"Adaptive Attention Span in Computer Vision" (arXiv:2004.08708).

Letters: B batch, H W map, C = h*d channels, h heads, d head_dim, k kernel_size, K = k*k offsets in
row-major order, p = (k-1)/2 radius.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def check_span(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    mask: Tensor | None,
    floor: Tensor | None,
    num_heads: int,
) -> None:
    """Raises ValueError for arguments of `span_attention` whose shapes do not go together."""
    table = list(rel_pos_h.shape)
    if len(table) != 2 or table[1] % 2 == 0 or list(rel_pos_w.shape) != table:
        raise ValueError(
            "rel_pos_h and rel_pos_w must be [C, k] of one shape with an odd k, "
            f"got {table} and {list(rel_pos_w.shape)}"
        )
    channels, offsets = table[0], table[1] ** 2
    if qkv.dim() != 4 or qkv.shape[3] != 3 * channels:
        raise ValueError(f"qkv must be [B, H, W, {3 * channels}], got {list(qkv.shape)}")
    if 0 in qkv.shape[1:]:
        raise ValueError(f"qkv must have positions and channels, got {list(qkv.shape)}")
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"num_heads must divide the {channels} channels, got {num_heads}")
    if mask is not None and list(mask.shape) != [num_heads, offsets]:
        raise ValueError(f"mask must be [{num_heads}, {offsets}], got {list(mask.shape)}")
    if floor is not None and (mask is None or list(floor.shape) != [offsets]):
        raise ValueError(f"floor must be [{offsets}] and come with a mask, got {list(floor.shape)}")


def ring_index(kernel_size: int, device: torch.device | None = None) -> Tensor:
    """Ring of every offset of a window, its distance max(|dy|, |dx|) in pixels: int64 [K]."""
    steps = (torch.arange(kernel_size, device=device) - kernel_size // 2).abs()
    return torch.maximum(steps[:, None], steps[None, :]).flatten()


def ring_weights(span: Tensor, max_span: int, span_ramp: float, radius: int) -> Tensor:
    """Weight of every ring for every head: a plateau to a pixel beyond the span, then a ramp to 0.

        m_0 = 1,   m_r = clamp((1 - r + span * max_span) / span_ramp + 1, 0, 1)

    The gradient of the clamp is 1 on the closed interval: a span of exactly 0 can grow.

    Args:
        span: Fractions of max_span [h].
        max_span: Pixels.
        span_ramp: Pixels from weight 1 to weight 0.
        radius: Last ring.

    Returns:
        [h, radius + 1].
    """
    rings = torch.arange(1, radius + 1, device=span.device, dtype=span.dtype)
    raw = (1.0 - rings + span[:, None] * float(max_span)) / span_ramp + 1.0
    # where, not clamp: PyTorch versions differ in the gradient that clamp gives at its bounds
    raw = torch.where(raw < 0.0, torch.zeros_like(raw), raw)
    raw = torch.where(raw > 1.0, torch.ones_like(raw), raw)
    return torch.cat([torch.ones_like(span[:, None]), raw], dim=1)


def off_map(height: int, width: int, kernel_size: int, device: torch.device | None) -> Tensor:
    """Whether an offset of a position's window lies in the padding: bool [H, W, K]."""
    radius = kernel_size // 2
    on_map = torch.ones(1, 1, height, width, device=device)
    on_map = F.unfold(on_map, [kernel_size, kernel_size], padding=[radius, radius])
    return on_map[0].t().reshape(height, width, kernel_size * kernel_size) == 0.0


def span_offsets(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    mask: Tensor | None,
    floor: Tensor | None,
    num_heads: int,
    mask_padding: bool,
    scale: float,
) -> Tensor:
    """The function, a row of windows' offsets at a time; arguments as in `span_attention`.

    All in one dtype. Differentiable to any order and scriptable, in a graph whose size grows with
    the window's side, not with its area; keeps three times B*h*H*W*K numbers for backward.
    """
    height, width, kernel_size = qkv.shape[1], qkv.shape[2], rel_pos_h.shape[1]
    radius = kernel_size // 2
    query, key, value = qkv.unflatten(3, (3, num_heads, -1)).unbind(3)  # B, H, W, h, d
    query = query * scale
    pad = [0, 0, 0, 0, radius, radius, radius, radius]
    key, value = F.pad(key, pad), F.pad(value, pad)
    # B, H, W, h, k
    rows = torch.einsum("byxhd,hdk->byxhk", query, rel_pos_h.unflatten(0, (num_heads, -1)))
    cols = torch.einsum("byxhd,hdk->byxhk", query, rel_pos_w.unflatten(0, (num_heads, -1)))
    of_offsets = []
    for dy in range(kernel_size):
        seen = key[:, dy : dy + height].unfold(2, kernel_size, 1).movedim(-1, 4)  # B, H, W, h, k, d
        products = (query.unsqueeze(4) * seen).sum(dim=5)
        of_offsets.append(products + rows[..., dy, None] + cols)
    scores = torch.cat(of_offsets, dim=4)  # B, H, W, h, K
    if mask_padding:
        outside = off_map(height, width, kernel_size, qkv.device)
        scores = scores.masked_fill(outside[None, :, :, None], float("-inf"))
    if mask is None:
        attn = scores.softmax(dim=4)
    else:
        total = mask if floor is None else mask + floor
        scores = scores.masked_fill(total == 0.0, float("-inf"))
        exps = (scores - scores.detach().amax(dim=4, keepdim=True)).exp()
        attn = exps * mask / (exps * total).sum(dim=4, keepdim=True)
    attn = attn.unflatten(4, (kernel_size, kernel_size)).unsqueeze(6)
    sums = []
    for dy in range(kernel_size):
        seen = value[:, dy : dy + height].unfold(2, kernel_size, 1).movedim(-1, 4)
        sums.append((attn[:, :, :, :, dy] * seen).sum(dim=4))
    out = sums[0]
    for more in sums[1:]:
        out = out + more
    return out.flatten(3)
