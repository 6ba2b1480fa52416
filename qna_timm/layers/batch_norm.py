"""Batch normalisation that also trains where a channel has a single value."""

import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn


@register_notrace_module  # the number of values decides
class SmallBatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` that takes its running statistics where batch statistics say nothing.

    While training, the variance of one value per channel (one image, a map of 1x1) is 0: PyTorch
    raises. Here such a batch is normalised as in evaluation and leaves the running statistics as
    they are; all others are treated as ever. With ``--sync-bn`` several processes share theirs, of
    several values: PyTorch's SyncBatchNorm, which takes this one's place, never meets a single one.

    Shape: [B, C, H, W] -> the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        values = x.shape[0] * x.shape[2] * x.shape[3]
        if self.running_mean is None or self.running_var is None:
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        training = self.training
        if values == 1:  # an if, so that compilers keep no symbolic flag
            training = False
        momentum = 0.0 if self.momentum is None else self.momentum
        if training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training,
            momentum,
            self.eps,
        )
