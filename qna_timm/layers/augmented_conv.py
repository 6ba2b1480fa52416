"""Convolution beside global self-attention, their channels one after the other.

Letters: B batch, H W map, N = H*W positions, h heads, d head_dim of queries and keys.
"""

from typing import Final

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, use_fused_attn
from torch import Tensor, nn


def _offsets(table: Tensor, length: int) -> Tensor:
    """Relative vectors [length, length, d] of every pair (query, key) along one axis."""
    reach = table.shape[0] // 2
    at = torch.arange(length, device=table.device)
    return table[(at[None, :] - at[:, None]).clamp(-reach, reach) + reach]


@register_notrace_function
def append_relative(
    query: Tensor, key: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Longer queries and keys whose products hold the relative scores too.

        query'[y, x] . key'[i, j] = q[y, x] . (k[i, j] + rel_pos_h[i - y] + rel_pos_w[j - x])

    A query gets its products with the vectors of all H rows and all W columns, a key marks its own
    row and column among these, so that no N x N table of biases has to be made.

    Args:
        query: [B, h, N, d].
        key: [B, h, N, d].
        rel_pos_h: Vectors of row offsets [2 * reach + 1, d], offset 0 in the middle.
        rel_pos_w: Vectors of column offsets [2 * reach + 1, d].
        height: H.
        width: W.

    Returns:
        Query and key [B, h, N, d + H + W].
    """
    maps = query.unflatten(2, (height, width))
    rows = torch.einsum("bhyxd,yid->bhyxi", maps, _offsets(rel_pos_h, height)).flatten(2, 3)
    cols = torch.einsum("bhyxd,xjd->bhyxj", maps, _offsets(rel_pos_w, width)).flatten(2, 3)
    at = torch.arange(height * width, device=key.device)
    row = at[:, None] // width == torch.arange(height, device=key.device)
    col = at[:, None] % width == torch.arange(width, device=key.device)
    marks = torch.cat([row, col], dim=1).to(key.dtype)  # N, H + W
    marks = marks.expand(key.shape[0], key.shape[1], -1, -1)
    return torch.cat([query, rows, cols], dim=3), torch.cat([key, marks], dim=3)


def _widen(x: Tensor, width: int) -> Tensor:
    """Zeros behind the last dimension's values, up to a width."""
    # not F.pad: its compiled gradient has other strides than promised where sizes are symbolic
    batch, heads, positions, found = x.shape
    return torch.cat([x, x.new_zeros([batch, heads, positions, width - found])], dim=3)


@register_notrace_function
def global_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, fused: bool = True
) -> Tensor:
    """softmax(scale * query key^T) value, fused in one width, a multiple of 8.

    The fused kernels, which make no N x N scores, want that: at 32x32 with 10 channels of keys and
    one of values, forward and backward take 0.34 s in place of 0.94 s (8 images, 4 heads, a CPU's
    core) and 39 MiB in place of 404.

    Args:
        query: [B, h, N, d].
        key: [B, h, N, d].
        value: [B, h, N, values].
        scale: Of the scores.
        fused: By PyTorch's `scaled_dot_product_attention`; otherwise by matrix products, which have
            gradients of any order.

    Returns:
        [B, h, N, values].
    """
    if not fused:
        return (query * scale @ key.transpose(2, 3)).softmax(dim=3) @ value
    value_width = value.shape[3]
    width = (max(query.shape[3], value_width) + 7) // 8 * 8
    query, key, value = _widen(query, width), _widen(key, width), _widen(value, width)
    return F.scaled_dot_product_attention(query, key, value, scale=scale)[..., :value_width]


class AugmentedConv2d(nn.Module):
    r"""Attention-augmented convolution, stride 1.

        q, k, v = qkv(x)                                 a k x k convolution
        attn    = softmax(q . (k + rel_pos) / sqrt(d))   over all positions, per head
        out     = [conv(x), proj(attn v)]                side by side, value_dim channels last

    rel_pos, with `relative` alone, is a learned vector of the row offset plus one of the column
    offset; offsets beyond the tables take their outermost vectors. ("Attention Augmented
    Convolutional Networks", arXiv:1904.09925, section 3.)

    The released code of arXiv:2004.08708 reads the attention's output, positions by channels, as
    channels by positions, which mixes both where a head has more than one value channel. Here the
    channels are the heads' values as in the paper; with one channel each (the release's settings,
    value_dim = num_heads = 4) both are the same function.

    Args:
        in_chs: Input channels.
        out_chs: Output channels, those of the attention among them.
        kernel_size: Side of the convolutions, odd.
        num_heads: Heads h, a divisor of key_dim and value_dim.
        key_dim: Channels of queries, and of keys: h*d.
        value_dim: Output channels of the attention, less than out_chs.
        relative: Relative vectors on keys.
        rel_size: Map side that their tables cover, in pixels.

    Shape: [B, in_chs, H, W] -> [B, out_chs, H, W].

    Raises:
        ValueError: An argument does not fit, see above.
    """

    fused_attn: Final[bool]

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 3,
        num_heads: int = 4,
        key_dim: int = 40,
        value_dim: int = 4,
        relative: bool = False,
        rel_size: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if num_heads < 1 or min(key_dim, value_dim) < 1:
            raise ValueError(
                "num_heads, key_dim and value_dim must be at least 1, "
                f"got {num_heads}, {key_dim} and {value_dim}"
            )
        if key_dim % num_heads or value_dim % num_heads:
            raise ValueError(
                f"num_heads must divide key_dim={key_dim} and value_dim={value_dim}, "
                f"got {num_heads}"
            )
        if value_dim >= out_chs:
            raise ValueError(f"value_dim must be less than out_chs={out_chs}, got {value_dim}")
        if rel_size < 1:
            raise ValueError(f"rel_size must be at least 1 pixel, got {rel_size}")
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = value_dim
        head_dim = key_dim // num_heads
        self.scale = head_dim**-0.5
        self.fused_attn = use_fused_attn()
        pad = kernel_size // 2
        self.conv = nn.Conv2d(in_chs, out_chs - value_dim, kernel_size, padding=pad, **dd)
        self.qkv = nn.Conv2d(in_chs, 2 * key_dim + value_dim, kernel_size, padding=pad, **dd)
        self.proj = nn.Conv2d(value_dim, value_dim, 1, **dd)
        self.rel_pos_h: nn.Parameter | None = None
        self.rel_pos_w: nn.Parameter | None = None
        if relative:
            self.rel_pos_h = nn.Parameter(torch.empty(2 * rel_size - 1, head_dim, **dd))
            self.rel_pos_w = nn.Parameter(torch.empty(2 * rel_size - 1, head_dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Relative vectors N(0, 1); convolutions are PyTorch's."""
        if self.rel_pos_h is not None and self.rel_pos_w is not None:
            nn.init.normal_(self.rel_pos_h)
            nn.init.normal_(self.rel_pos_w)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, h*d, H, W] to [B, h, N, d]."""
        return x.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2], x.shape[3]
        query, key, value = self.qkv(x).split([self.key_dim, self.key_dim, self.value_dim], dim=1)
        query, key, value = self._heads(query), self._heads(key), self._heads(value)
        if self.rel_pos_h is not None and self.rel_pos_w is not None:
            query, key = append_relative(query, key, self.rel_pos_h, self.rel_pos_w, height, width)
        # B, h, N, value_dim/h
        attn = global_attention(query, key, value, self.scale, self.fused_attn)
        attn = attn.transpose(2, 3).flatten(1, 2).unflatten(2, (height, width))
        return torch.cat([self.conv(x), self.proj(attn)], dim=1)
