"""Self-attention inside stripes of a map, with CSWin's local position term.

Paper: "CSWin Transformer", CVPR 2022, https://arxiv.org/abs/2107.00652, sections 3.2 and 3.3.
Letters: B batch, H W map, C channels, S stripes of all images, N tokens of a stripe, h heads,
d head_dim.
"""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, use_fused_attn
from torch import Tensor, nn


def _stripes_along(side: int, stripe: int) -> tuple[int, int]:
    """(number of stripes, tokens of each) along a side of the map; stripe 0 is the whole side."""
    # Written so that a symbolic side (compiling for any size) stays out of all but one division:
    # proving divisibility otherwise takes minutes.
    if stripe == 0 or side <= stripe:
        return 1, side
    return (side + stripe - 1) // stripe, stripe


def _to_stripes(x: Tensor, down: tuple[int, int], across: tuple[int, int]) -> Tensor:
    """[B, H, W, C] -> [S, N, C], S image-major; zeros beside the map."""
    batch, height, width, dim = x.shape
    pad_h = down[0] * down[1] - height
    pad_w = across[0] * across[1] - width
    if pad_h > 0 or pad_w > 0:
        x = F.pad(x, [0, 0, 0, pad_w, 0, pad_h])
    x = x.view(batch, down[0], down[1], across[0], across[1], dim).transpose(2, 3)
    return x.reshape(batch * down[0] * across[0], down[1] * across[1], dim)


def _from_stripes(x: Tensor, batch: int, down: tuple[int, int], across: tuple[int, int]) -> Tensor:
    """[S, N, C] -> [B, H, W, C], padding included."""
    dim = x.shape[2]
    x = x.view(batch, down[0], across[0], down[1], across[1], dim).transpose(2, 3)
    return x.reshape(batch, down[0] * down[1], across[0] * across[1], dim)


def _stripe_mask(x: Tensor, down: tuple[int, int], across: tuple[int, int]) -> Tensor:
    """Which keys of each stripe of a map [B, H, W, C] lie on it: bool [S, 1, 1, N]."""
    batch, height, width, _ = x.shape
    rows = torch.arange(down[0] * down[1], device=x.device).view(down[0], 1, down[1], 1)
    cols = torch.arange(across[0] * across[1], device=x.device).view(1, across[0], 1, across[1])
    valid = ((rows < height) & (cols < width)).expand(batch, -1, -1, -1, -1)
    return valid.reshape(batch * down[0] * across[0], 1, 1, down[1] * across[1])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, num_heads: int, drop: float, fused: bool
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of every stripe, [S, N, C] each."""
    head_dim = q.shape[2] // num_heads
    # S, N, C -> S, h, N, d
    q = q.unflatten(2, (num_heads, head_dim)).transpose(1, 2)
    k = k.unflatten(2, (num_heads, head_dim)).transpose(1, 2)
    v = v.unflatten(2, (num_heads, head_dim)).transpose(1, 2)
    if fused:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
    else:
        attn = (q * head_dim**-0.5) @ k.transpose(-2, -1)
        if mask is not None:
            attn = attn.masked_fill(~mask, float("-inf"))
        out = F.dropout(attn.softmax(dim=-1), drop, drop > 0.0) @ v
    return out.transpose(1, 2).flatten(2)


def _value_maps(v: Tensor, stripe_size: tuple[int, int]) -> Tensor:
    """[B, H, W, C] -> the values of each stripe, [S, C, rows, cols], channels last in memory."""
    down = _stripes_along(v.shape[1], stripe_size[0])
    across = _stripes_along(v.shape[2], stripe_size[1])
    return _to_stripes(v, down, across).unflatten(1, (down[1], across[1])).permute(0, 3, 1, 2)


def _attend_in_stripes(
    q: Tensor,
    k: Tensor,
    value_maps: Tensor,
    lepe: Tensor,
    num_heads: int,
    stripe_size: tuple[int, int],
    drop: float,
    fused: bool,
) -> Tensor:
    """Maps q and k [B, H, W, C], values and their convolution as `_value_maps` -> [B, H, W, C]."""
    batch, height, width, _ = q.shape
    down = _stripes_along(height, stripe_size[0])
    across = _stripes_along(width, stripe_size[1])
    padded = down[0] * down[1] > height or across[0] * across[1] > width
    mask: Tensor | None = None
    if padded:
        mask = _stripe_mask(q, down, across)
    q = _to_stripes(q, down, across)
    k = _to_stripes(k, down, across)
    v = value_maps.flatten(2).transpose(1, 2)  # S, N, C
    out = _attend(q, k, v, mask, num_heads, drop, fused) + lepe.flatten(2).transpose(1, 2)
    out = _from_stripes(out, batch, down, across)
    return out[:, :height, :width] if padded else out


# Traces follow a function's branches for other sizes only as a script.
_value_maps_of_any_size = torch.jit.script_if_tracing(_value_maps)
_attend_at_any_size = torch.jit.script_if_tracing(_attend_in_stripes)


@register_notrace_module  # shapes decide whether there is a mask
class StripeAttention(nn.Module):
    """Attention among the tokens of each stripe, plus a depthwise convolution of the values.

        out_a = concat_j sum_b softmax_b(q_a . k_b / sqrt(d)) v_b + lepe(v)_a,   b in a's stripe

    Head j has channels [j d, (j + 1) d). The convolution takes zeros for what lies outside the
    stripe. A map that the stripes do not divide is continued at the bottom and right by padding
    that no query sees, so its last stripes are narrower.

    Args:
        dim: Channels of queries, keys, values and output.
        num_heads: Heads, a divisor of dim.
        stripe_size: (height, width) of a stripe, in tokens; 0 for all of the map's side, which is
            also what a stripe longer than that side covers.
        attn_drop: Dropout of attention weights.

    Shape: three times [B, H, W, dim] -> [B, H, W, dim], any H and W, any strides.

    Raises:
        ValueError: num_heads does not divide dim, or stripe_size is negative.
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        stripe_size: tuple[int, int],
        attn_drop: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim={dim}, got {num_heads}")
        if min(stripe_size) < 0:
            raise ValueError(f"stripe_size must not be negative, got {stripe_size}")
        self.num_heads = num_heads
        self.stripe_size = stripe_size
        self.attn_drop = attn_drop
        self.fused_attn = use_fused_attn()
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    @torch.jit.unused
    def _traced(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        drop = self.attn_drop if self.training else 0.0
        maps = _value_maps_of_any_size(v, self.stripe_size)
        sizes = (self.num_heads, self.stripe_size, drop, self.fused_attn)
        return _attend_at_any_size(q, k, maps, self.lepe(maps), *sizes)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (scripts skip such a branch by itself alone)
            if torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export():
                return self._traced(q, k, v)
        drop = self.attn_drop if self.training else 0.0
        maps = _value_maps(v, self.stripe_size)
        return _attend_in_stripes(
            q, k, maps, self.lepe(maps), self.num_heads, self.stripe_size, drop, self.fused_attn
        )

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, stripe_size={self.stripe_size}"
