"""The bottleneck block of stand-alone self-attention ResNets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from timm.layers import ConvNormAct, DropPath, create_act_layer, get_norm_act_layer
from torch import Tensor, nn

from qna_timm.layers.augmented_conv import AugmentedConv2d
from qna_timm.layers.span_attn import SpanAttention

SPATIAL_LAYERS = ("cnn", "local", "adaptive", "augmented")


@dataclass(frozen=True)
class BottleneckArgs:
    """What all blocks of a model have in common; see `qna_timm.models.sa_resnet.SAResNet`."""

    spatial: str = "local"
    kernel_size: int = 5
    num_heads: int = 4
    pool_attn: bool = False
    span_args: dict[str, Any] = field(default_factory=dict)
    augmented_args: dict[str, Any] = field(default_factory=dict)
    act_layer: str | Callable[..., nn.Module] = "relu"
    norm_layer: str | Callable[..., nn.Module] = "batchnorm2d"
    dd: dict[str, Any] = field(default_factory=dict)


def check_stages(layers: Sequence[int], channels: Sequence[int], strides: Sequence[int]) -> None:
    """Raises ValueError unless each stage has a positive number of blocks, width and stride."""
    if not len(layers) == len(channels) == len(strides) > 0:
        raise ValueError(
            "layers, channels and strides must have a value for each stage, "
            f"got {len(layers)}, {len(channels)} and {len(strides)}"
        )
    if min(*layers, *channels, *strides) < 1:
        raise ValueError(
            "layers, channels and strides must be at least 1, "
            f"got {tuple(layers)}, {tuple(channels)} and {tuple(strides)}"
        )


def spatial_layer(channels: int, args: BottleneckArgs) -> nn.Module:
    """The layer between a bottleneck's 1x1 convolutions, stride 1, [B, C, H, W] -> the same.

    Raises:
        ValueError: An argument does not fit; the layer's own words.
    """
    if args.spatial not in SPATIAL_LAYERS:
        raise ValueError(f"spatial must be one of {SPATIAL_LAYERS}, got {args.spatial!r}")
    kernel_size = args.kernel_size
    if args.spatial == "augmented":
        return AugmentedConv2d(
            channels, channels, kernel_size, args.num_heads, **args.augmented_args, **args.dd
        )
    if args.spatial != "cnn":
        return SpanAttention(
            channels,
            channels,
            args.num_heads,
            kernel_size,
            adaptive=args.spatial == "adaptive",
            **args.span_args,
            **args.dd,
        )
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    return nn.Conv2d(
        channels, channels, kernel_size, padding=kernel_size // 2, bias=False, **args.dd
    )


class SABottleneck(nn.Module):
    """Residual bottleneck around a convolution or an attention layer of stride 1.

        y   = act(norm(conv1(x)));  y = act(norm2(spatial(y)));  y = norm(conv3(y))
        out = act(shortcut(x) + pool(y))

    The whole branch runs at the input's resolution and is averaged over stride x stride cells at
    its end, as in the released code of arXiv:2004.08708; with `pool_attn` the average follows the
    spatial layer ("Stand-Alone Self-Attention in Vision Models", arXiv:1906.05909, section 3.1).
    The shortcut, a 1x1 convolution wherever the shape changes, takes the top left of each cell.
    Cells that the border cuts are averaged over what there is of them: of ceil(H / stride) rows, as
    the shortcut has.

    Args:
        in_chs: Input channels.
        mid_chs: Width of the spatial layer.
        out_chs: Output channels.
        stride: Of the block.
        args: What blocks have in common.
        drop_path: Rate of stochastic depth.

    Shape: [B, in_chs, H, W] -> [B, out_chs, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(
        self,
        in_chs: int,
        mid_chs: int,
        out_chs: int,
        stride: int,
        args: BottleneckArgs,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        layers = {"norm_layer": args.norm_layer, "act_layer": args.act_layer, **args.dd}
        norm_act = get_norm_act_layer(args.norm_layer, args.act_layer)
        self.conv1 = ConvNormAct(in_chs, mid_chs, 1, **layers)
        self.spatial = spatial_layer(mid_chs, args)
        pool = nn.Identity()
        if stride > 1:
            pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
        self.pool2 = pool if args.pool_attn else nn.Identity()
        self.norm2 = norm_act(mid_chs, **args.dd)
        self.conv3 = ConvNormAct(mid_chs, out_chs, 1, apply_act=False, **layers)
        self.pool3 = nn.Identity() if args.pool_attn else pool
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_chs != out_chs:
            # without padding, which timm adds from stride 3 on: a cell's first pixel
            self.shortcut = ConvNormAct(
                in_chs, out_chs, 1, stride, padding=0, apply_act=False, **layers
            )
        self.act3 = create_act_layer(args.act_layer, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        y = self.norm2(self.pool2(self.spatial(y)))
        y = self.pool3(self.conv3(y))
        return self.act3(self.shortcut(x) + self.drop_path(y))
