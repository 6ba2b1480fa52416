"""Residual blocks of QnA-ViT, on channels-last maps [B, H, W, C]."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.layers import AvgPool2dSame, DropPath, LayerNorm, LayerScale, Mlp
from torch import Tensor, nn

from qna_timm.layers.qna_attn import LearnedQueryAttention
from qna_timm.layers.window_attn import WindowAttention


@dataclass(frozen=True)
class BlockArgs:
    """What all blocks of a model have in common."""

    num_queries: int = 2
    normalize_stop_grad: bool = False
    query_weight: str = "normal"
    pos_embed: str = "relative"
    window_pos_embed: str = "relative"
    qkv_bias: bool = False
    mlp_ratio: float = 4.0
    proj_drop: float = 0.0
    init_values: float | None = None
    down_shortcut: str = "conv"
    act_layer: Callable[..., nn.Module] = nn.GELU
    norm_layer: Callable[..., nn.Module] = LayerNorm
    dd: dict[str, Any] | None = None


class Shortcut(nn.Module):
    """Residual path of a strided block: [B, H, W, dim] -> [B, ceil(H/2), ceil(W/2), dim_out].

    Even rows and columns, or their "same"-padded average, then a projection without bias.

    Args:
        dim: Input channels.
        dim_out: Output channels.
        kernel_size: Side of what is averaged, in tokens.
        kind: 'conv' or 'avgpool', the average.
        dd: Device and dtype of the parameters.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, dim: int, dim_out: int, kernel_size: int, kind: str, dd: dict) -> None:
        super().__init__()
        if kind not in ("conv", "avgpool"):
            raise ValueError(f"down_shortcut must be 'conv' or 'avgpool', got {kind!r}")
        self.pool = AvgPool2dSame(kernel_size, 2) if kind == "avgpool" else None
        self.proj = nn.Linear(dim, dim_out, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = self.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:
            x = x[:, ::2, ::2]
        return self.proj(x)


class Block(nn.Module):
    """Pre-norm residual block: x <- shortcut(x) + attn(norm1(x)), x <- x + mlp(norm2(x))."""

    def __init__(
        self,
        dim: int,
        dim_out: int,
        attn: nn.Module,
        args: BlockArgs,
        drop_path: float,
        attn_drop_path: float,
        shortcut: nn.Module | None = None,
    ) -> None:
        super().__init__()
        dd = args.dd or {}
        self.shortcut = shortcut if shortcut is not None else nn.Identity()
        self.norm1 = args.norm_layer(dim, **dd)
        self.attn = attn
        self.ls1 = self._layer_scale(dim_out, args)
        self.drop_path1 = DropPath(attn_drop_path) if attn_drop_path > 0.0 else nn.Identity()
        self.norm2 = args.norm_layer(dim_out, **dd)
        self.mlp = Mlp(
            dim_out,
            int(dim_out * args.mlp_ratio),
            act_layer=args.act_layer,
            drop=args.proj_drop,
            **dd,
        )
        self.ls2 = self._layer_scale(dim_out, args)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    @staticmethod
    def _layer_scale(dim: int, args: BlockArgs) -> nn.Module:
        if args.init_values is None:
            return nn.Identity()
        return LayerScale(dim, args.init_values, **(args.dd or {}))

    def forward(self, x: Tensor) -> Tensor:
        x = self.shortcut(x) + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def qna_block(
    dim: int,
    num_heads: int,
    kernel_size: int,
    normalize_query: bool,
    args: BlockArgs,
    drop_path: float,
    dim_out: int | None = None,
) -> Block:
    """A learned-query block; with dim_out it halves the map and widens it to dim_out.

    A strided block drops only its MLP branch, as the release does.
    """
    strided = dim_out is not None
    width = dim_out or dim
    dd = args.dd or {}
    attn = LearnedQueryAttention(
        dim,
        num_heads,
        attn_dim=width,
        kernel_size=kernel_size,
        stride=2 if strided else 1,
        num_queries=args.num_queries,
        pos_embed=args.pos_embed,
        query_weight=args.query_weight,
        normalize_query=normalize_query,
        normalize_stop_grad=args.normalize_stop_grad,
        qkv_bias=args.qkv_bias,
        proj_drop=args.proj_drop,
        **dd,
    )
    shortcut = Shortcut(dim, width, kernel_size, args.down_shortcut, dd) if strided else None
    return Block(dim, width, attn, args, drop_path, 0.0 if strided else drop_path, shortcut)


def window_block(
    dim: int, num_heads: int, window_size: tuple[int, int], args: BlockArgs, drop_path: float
) -> Block:
    """A block of self-attention in tiled windows. Drop path acts per image at every size."""
    attn = WindowAttention(
        dim,
        num_heads,
        window_size,
        rel_pos_bias=args.window_pos_embed == "relative",
        qkv_bias=args.qkv_bias,
        proj_drop=args.proj_drop,
        **(args.dd or {}),
    )
    return Block(dim, dim, attn, args, drop_path, drop_path)
