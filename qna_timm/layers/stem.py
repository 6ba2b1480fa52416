"""Stems of QnA-ViT: image [B, in_chans, H, W] to a channels-last map [B, ceil(H/4), ceil(W/4), C].

"Same" padding as in TensorFlow: the total is split over both sides, the odd one on the far side.
"""

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, create_pool2d, register_notrace_module
from torch import Tensor, nn


class PatchStem(nn.Module):
    """A 4x4 convolution with stride 4, no bias, no norm."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = Conv2dSame(in_chans, dim, 4, 4, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).permute(0, 2, 3, 1)


@register_notrace_module  # writes its buffers, which a symbolic trace would freeze
class BiasedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose running variance averages the biased batch variance, as Flax's does.

    PyTorch normalises by the biased variance too, but averages var * n / (n - 1). So does the
    SyncBatchNorm that ``--sync-bn`` puts in this one's place; with n the values of a channel in all
    processes the difference is lost in float32: 1e-7 of the variance for 1024 images of 224.
    """

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        momentum = self.momentum
        assert mean is not None and var is not None and momentum is not None
        if not self.training:
            return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        # backward keeps the buffers it was given: let it have copies
        new_mean, new_var = mean.clone(), var.clone()
        out = F.batch_norm(x, new_mean, new_var, self.weight, self.bias, True, momentum, self.eps)
        with torch.no_grad():
            mean.copy_(new_mean)
            # new_var is (1 - m) old + m v n/(n-1): take 1/n of the second term off
            var.copy_(new_var - (new_var - (1 - momentum) * var) * (x.shape[1] / max(x.numel(), 1)))
        return out


class ResNetStem(nn.Module):
    """7x7 convolution with stride 2, batch norm, GELU (tanh form), 3x3 max pool with stride 2."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = Conv2dSame(in_chans, dim, 7, 2, bias=False, **dd)
        self.bn = BiasedBatchNorm2d(dim, eps=1e-5, momentum=0.1, **dd)
        self.act = nn.GELU(approximate="tanh")
        self.pool = create_pool2d("max", 3, 2, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.bn(self.conv(x))))
        return x.permute(0, 2, 3, 1)
