"""Fusion of feature maps of several sizes into one (arXiv:2310.16483).

Letters: B batch, H W the fused map, A channels of all maps together, D channels of the fused one.
"""

import torch
from timm.layers import DropPath, SEModule, register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from qna_timm.layers.batch_norm import SmallBatchNorm2d
from qna_timm.ops import average_pool_to

register_notrace_function(average_pool_to)  # a setting of PyTorch's decides inside


def tap_positions(depth: int, num_taps: int) -> list[int]:
    """Blocks of a stage, counted from 1, whose outputs are tapped besides the last.

    With k = floor(depth / (num_taps + 1)) these are k, 2k, ..., num_taps * k.

    Raises:
        ValueError: the stage has too few blocks for so many taps.
    """
    if num_taps < 0 or num_taps + 1 > depth:
        raise ValueError(f"num_taps must be 0 to {depth - 1} for {depth} blocks, got {num_taps}")
    step = depth // (num_taps + 1)
    return [step * tap for tap in range(1, num_taps + 1)]


class FuseBottleneck(nn.Module):
    """Residual bottleneck block from A to D channels.

    y = ReLU(drop_path(main(x)) + shortcut(x)), main being 1x1 to D // 4 channels, 3x3,
    squeeze-and-excitation and 1x1 to D, each convolution with batch norm, the first two with ReLU;
    the shortcut a 1x1 convolution with bias and batch norm.

    Args:
        in_features: A.
        out_features: D.
        drop_path: Stochastic depth of the main path.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        width = out_features // 4
        self.conv1 = nn.Conv2d(in_features, width, 1, bias=False, **dd)
        self.bn1 = SmallBatchNorm2d(width, **dd)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **dd)
        self.bn2 = SmallBatchNorm2d(width, **dd)
        self.se = SEModule(width, rd_ratio=1 / 4, **dd)
        self.conv3 = nn.Conv2d(width, out_features, 1, bias=False, **dd)
        self.bn3 = SmallBatchNorm2d(out_features, **dd)
        self.shortcut = nn.Conv2d(in_features, out_features, 1, **dd)
        self.shortcut_bn = SmallBatchNorm2d(out_features, **dd)
        # one each: quantizers take a module's calls for one operation
        self.act1, self.act2, self.act3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, A, H, W] to [B, D, H, W]."""
        main = self.act1(self.bn1(self.conv1(x)))
        main = self.se(self.act2(self.bn2(self.conv2(main))))
        main = self.drop_path(self.bn3(self.conv3(main)))
        return self.act3(main + self.shortcut_bn(self.shortcut(x)))


class MapFusion(nn.Module):
    """Brings maps to one size, concatenates their channels and runs a block over them.

    Args:
        reductions: Stride of each map against the image.
        reference: Index of the map whose size all get: larger maps are averaged down (adaptive
            average pooling), smaller ones interpolated bilinearly (half-pixel centres).
        block: From the sum of the maps' channels to the fused ones.
    """

    def __init__(self, reductions: list[int], reference: int, block: nn.Module) -> None:
        super().__init__()
        self.reference = reference
        self.pooled = [r < reductions[reference] for r in reductions]
        self.upsampled = [r > reductions[reference] for r in reductions]
        self.block = block

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps [B, channels, height, width] to [B, D, H, W]."""
        height, width = maps[self.reference].shape[-2:]
        resized = []
        for i, x in enumerate(maps):
            if self.pooled[i]:
                x = average_pool_to(x, (height, width))
            elif self.upsampled[i]:
                x = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
            resized.append(x)
        return self.block(torch.cat(resized, dim=1))
