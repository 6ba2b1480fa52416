"""Window sums of learned-query attention by depthwise convolution, channels-last.

Letters: n images, H W map, Q queries, h heads, d head_dim, K offsets.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qna_timm.ops.fourier import Grid
from qna_timm.ops.qna_sums import WindowSums

# Offsets up to which PyTorch's gradient of a depthwise kernel is fast.
FEW_OFFSETS = 9


class DepthwiseSums(WindowSums):
    """Head maps [n, H, W, Q, h, 1] and channel maps [n, H, W, Q, h, d]."""

    order = (0, 1, 2, 3, 4, 5)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.grid: Grid | None = None
        if self.windows.num_offsets > FEW_OFFSETS:
            self.grid = Grid(self.size, self.windows)
            self.table_noise = self.grid.noise(self.tables.below.dtype)
        self.kernels: dict[tuple[int, int], Tensor] = {}

    def place(self, name: str, like: Tensor, channels: int, of_windows: bool = False) -> Tensor:
        size = self.out_size if of_windows else self.size
        shape = (like.shape[0], *size, self.num_queries, self.num_heads, channels)
        return self.work.get(name, shape)

    def ready(self, name: str, x: Tensor) -> Tensor:
        return x

    # Numbers for so few neighbours, and sums of so few, are slow; products with ones are not.
    def spread(self, name: str, x: Tensor, channels: int) -> Tensor:
        pairs = self.num_queries * self.num_heads
        ones = torch.eye(pairs, dtype=x.dtype, device=x.device).repeat_interleave(channels, dim=1)
        out = self.work.get(name, (*x.shape[:5], channels))
        torch.mm(x.view(-1, pairs), ones, out=out.view(-1, pairs * channels))
        return out

    def collect(self, x: Tensor) -> Tensor:
        return torch.mm(x.flatten(0, 4), x.new_ones(x.shape[5], 1)).view(*x.shape[:5], 1)

    def _kernel(self, table: Tensor, channels: int) -> Tensor:
        """[K, Q, h] -> [Q*h*channels, 1, kh, kw]."""
        key = (id(table), channels)
        if key not in self.kernels:
            kernel = table.permute(1, 2, 0).flatten(0, 1).repeat_interleave(channels, 0)
            self.kernels[key] = kernel.view(-1, 1, *self.windows.kernel_size)
        return self.kernels[key]

    def sums(self, x: Tensor, table: Tensor) -> Tensor:
        kernel = self._kernel(table, x.shape[5])
        stride, padding = self.windows.stride, self.windows.padding
        return _maps(F.conv2d(_planes(x), kernel, None, stride, padding, groups=len(kernel)), x)

    def sums_back(self, grad: Tensor, table: Tensor) -> Tensor:
        kernel = self._kernel(table, grad.shape[5])
        stride, padding = self.windows.stride, self.windows.padding
        sides = zip(self.size, self.windows.kernel_size, strict=True)
        if stride == 1:
            margins = [side - 1 - padding for side in self.windows.kernel_size]
            out = F.conv2d(_planes(grad), kernel.flip(2, 3), None, 1, margins, groups=len(kernel))
        else:
            # tokens beyond the last window
            extra = [(side + 2 * padding - window) % stride for side, window in sides]
            out = F.conv_transpose2d(
                _planes(grad), kernel, None, stride, padding, extra, groups=len(kernel)
            )
        return _maps(out, grad)

    def table_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        if self.grid is None:
            return self._kernel_grad(x, grad)
        transforms = []
        for name, maps, place in (("x", x, self.grid.tokens), ("grad", grad, self.grid.outputs)):
            shape = (maps.shape[0], self.num_queries, self.num_heads, maps.shape[5])
            key = (self.size, self.windows)
            frame = self.work.get(f"{name} {maps.shape[5]}", (*shape, *self.grid.points), key)
            place(frame).copy_(maps.permute(0, 3, 4, 5, 1, 2))
            transforms.append(torch.fft.rfft2(frame))
        return self.grid.table_grad(*transforms)

    def _kernel_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        stride, padding = [self.windows.stride] * 2, [self.windows.padding] * 2
        planes, dim = _planes(x), x.shape[5]
        kernel = x.new_empty(1).expand(planes.shape[1], 1, *self.windows.kernel_size)
        settings = (stride, padding, [1, 1], False, [0, 0], len(kernel), [False, True, False])
        found = torch.ops.aten.convolution_backward(_planes(grad), planes, kernel, None, *settings)
        found = found[1].view(self.num_queries, self.num_heads, dim, -1)
        return found.sum(dim=2).permute(2, 0, 1).contiguous()


def _planes(x: Tensor) -> Tensor:
    """[n, H, W, Q, h, d] -> [n, Q*h*d, H, W] in the same memory."""
    return x.flatten(3).permute(0, 3, 1, 2)


def _maps(planes: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_planes`."""
    return planes.permute(0, 2, 3, 1).contiguous().unflatten(3, like.shape[3:])
