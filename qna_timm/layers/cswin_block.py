"""CSWin's residual block, on channels-last maps [B, H, W, C]."""

from collections.abc import Callable

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from qna_timm.layers.stripe_attn import StripeAttention


class CSWinBlock(nn.Module):
    """Pre-norm block: x <- x + proj(attn(norm1(x))), x <- x + mlp(norm2(x)).

    The first half of the channels attends in vertical stripes of width split_size, the second half
    in horizontal stripes of that height (arXiv:2107.00652, section 3.2); with full_window all
    channels attend in the whole map.

    Args:
        dim: Channels.
        num_heads: Heads of both halves together.
        split_size: Width of vertical and height of horizontal stripes, in tokens.
        mlp_ratio: Hidden width of the MLP over dim.
        qkv_bias: Bias on queries, keys and values.
        proj_drop: Dropout after the output projection and in the MLP.
        attn_drop: Dropout of attention weights.
        drop_path: Stochastic depth of both branches.
        full_window: Attend in the whole map.
        act_layer: Activation of the MLP.
        norm_layer: Normalisation over channels.

    Shape: [B, H, W, dim] -> [B, H, W, dim], any H and W.

    Raises:
        ValueError: dim or num_heads cannot be shared out, or split_size is below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        split_size: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        full_window: bool = False,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        stripes = ((0, 0),) if full_window else ((0, split_size), (split_size, 0))
        if split_size < 1:
            raise ValueError(f"split_size must be at least 1, got {split_size}")
        if num_heads < 1 or num_heads % len(stripes):
            raise ValueError(f"num_heads must be a multiple of {len(stripes)}, got {num_heads}")
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim={dim}, got {num_heads}")
        self.norm1 = norm_layer(dim, **dd)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        share = len(stripes)
        self.attn = nn.ModuleList(
            StripeAttention(dim // share, num_heads // share, stripe, attn_drop, **dd)
            for stripe in stripes
        )
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def _attend(self, x: Tensor) -> Tensor:
        # B, H, W, 3 * C -> three for each group of heads, B, H, W, C / groups
        groups = len(self.attn)
        parts = self.qkv(x).chunk(3 * groups, dim=-1)
        out = []
        for i, attn in enumerate(self.attn):
            out.append(attn(parts[i], parts[groups + i], parts[2 * groups + i]))
        return torch.cat(out, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.proj_drop(self.proj(self._attend(self.norm1(x)))))
        return x + self.drop_path2(self.mlp(self.norm2(x)))
