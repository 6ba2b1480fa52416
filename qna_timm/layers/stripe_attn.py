"""Self-attention inside stripes of a map, with CSWin's local position term.

Paper: "CSWin Transformer", CVPR 2022, https://arxiv.org/abs/2107.00652, sections 3.2 and 3.3.
Letters: B batch, H W map, C channels, S stripes of all images, N tokens of a stripe, h heads,
d head_dim.
"""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, use_fused_attn
from torch import Tensor, nn


def _stripe_on(stripe_size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """(height, width) of a stripe on a map: 0 stands for the whole side, as does too much."""
    rows, cols = stripe_size
    rows = height if rows == 0 else min(rows, height)
    cols = width if cols == 0 else min(cols, width)
    return rows, cols


def _num_stripes(stripe: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Stripes down and across a map, the last ones perhaps partly beside it."""
    return (height + stripe[0] - 1) // stripe[0], (width + stripe[1] - 1) // stripe[1]


def _to_stripes(x: Tensor, stripe: tuple[int, int]) -> Tensor:
    """[B, H, W, C] -> [S, *stripe, C], S image-major; zeros beside the map."""
    # Sizes are products of counts, and no reshape infers one: with symbolic sizes (compiling for
    # any size) proving divisibility takes minutes.
    batch, height, width, dim = x.shape
    down, across = _num_stripes(stripe, height, width)
    pad_h = down * stripe[0] - height
    pad_w = across * stripe[1] - width
    if pad_h > 0 or pad_w > 0:
        x = F.pad(x, [0, 0, 0, pad_w, 0, pad_h])
    x = x.view(batch, down, stripe[0], across, stripe[1], dim).transpose(2, 3)
    return x.reshape(batch * down * across, stripe[0], stripe[1], dim)


def _from_stripes(x: Tensor, height: int, width: int) -> Tensor:
    """[S, *stripe, C] -> [B, height, width, C], what lies beside the map cut off."""
    total, rows, cols, dim = x.shape
    down, across = _num_stripes((rows, cols), height, width)
    batch = total // (down * across)
    x = x.view(batch, down, across, rows, cols, dim).transpose(2, 3)
    return x.reshape(batch, down * rows, across * cols, dim)[:, :height, :width]


def _stripe_mask(
    stripe: tuple[int, int], batch: int, height: int, width: int, device: torch.device
) -> Tensor:
    """Which keys of each stripe lie on the map: bool [S, 1, 1, N]."""
    down, across = _num_stripes(stripe, height, width)
    rows = torch.arange(down * stripe[0], device=device).view(1, down, 1, stripe[0], 1)
    cols = torch.arange(across * stripe[1], device=device).view(1, 1, across, 1, stripe[1])
    valid = ((rows < height) & (cols < width)).expand(batch, -1, -1, -1, -1)
    return valid.reshape(batch * down * across, 1, 1, stripe[0] * stripe[1])


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

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(q k^T / sqrt(d)) v of every stripe, [S, rows, cols, C] each."""
        total, rows, cols, dim = q.shape
        heads = (total, rows * cols, self.num_heads, dim // self.num_heads)
        # S, N, h, d -> S, h, N, d
        q = q.reshape(heads).transpose(1, 2)
        k = k.reshape(heads).transpose(1, 2)
        v = v.reshape(heads).transpose(1, 2)
        dropout = self.attn_drop if self.training else 0.0
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        else:
            attn = (q * heads[3] ** -0.5) @ k.transpose(-2, -1)
            if mask is not None:
                attn = attn.masked_fill(~mask, float("-inf"))
            out = F.dropout(attn.softmax(dim=-1), dropout, self.training) @ v
        return out.transpose(1, 2).reshape(total, rows, cols, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, height, width, _ = q.shape
        stripe = _stripe_on(self.stripe_size, height, width)
        mask: Tensor | None = None
        if height % stripe[0] > 0 or width % stripe[1] > 0:
            mask = _stripe_mask(stripe, batch, height, width, q.device)
        q, k, v = _to_stripes(q, stripe), _to_stripes(k, stripe), _to_stripes(v, stripe)
        lepe = self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return _from_stripes(self._attend(q, k, v, mask) + lepe, height, width)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, stripe_size={self.stripe_size}"
