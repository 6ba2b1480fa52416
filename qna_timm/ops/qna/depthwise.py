"""Window sums of learned-query attention by depthwise convolution, in the layout that is faster.

Letters: n images, H W map, Q queries, h heads, d head_dim, K offsets.
"""

import functools
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qna_timm.ops.qna.grid import Grid
from qna_timm.ops.qna.sums import WindowSums
from qna_timm.ops.qna.windows import Windows

# Offsets up to which PyTorch's gradient of a depthwise kernel is fast, and channels-last faster.
FEW_OFFSETS = 9
# The same without gradients of kernels, where the processor has convolutions for it.
FEW_OFFSETS_FORWARD = {"AVX512": 49}
# Pairs of query and head up to which one product with ones and zeros is a fast way to copy.
FEW_PAIRS = 16
# Offsets from which PyTorch's depthwise convolution is slow on a CPU unless it is channels-last.
MANY_OFFSETS = 169


class _Convolutions(WindowSums):
    """Sums of maps seen as planes [n, Q*h*d, H, W], in the same memory."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kernels: dict[tuple[int, int], Tensor] = {}

    @abstractmethod
    def planes(self, x: Tensor) -> Tensor:
        """A map as planes."""

    @abstractmethod
    def from_planes(self, planes: Tensor, channels: int) -> Tensor:
        """The inverse of `planes`."""

    def _kernel(self, table: Tensor, channels: int) -> Tensor:
        """[K, Q, h] -> [Q*h*channels, 1, kh, kw]."""
        key = (id(table), channels)  # tables live as long as the form
        if key not in self.kernels:
            kernel = table.flatten(1).t().unsqueeze(1).expand(-1, channels, -1)
            self.kernels[key] = kernel.reshape(-1, 1, *self.windows.kernel_size)
        return self.kernels[key]

    def ready(self, name: str, x: Tensor) -> Tensor:
        return x

    def sums(self, x: Tensor, table: Tensor) -> Tensor:
        channels = x.shape[self.channel]
        kernel, windows = self._kernel(table, channels), self.windows
        settings = (windows.stride, windows.padding, 1, len(kernel))
        return self.from_planes(F.conv2d(self.planes(x), kernel, None, *settings), channels)

    def sums_back(self, grad: Tensor, table: Tensor) -> Tensor:
        channels = grad.shape[self.channel]
        kernel, windows = self._kernel(table, channels), self.windows
        planes = self.planes(grad)
        if windows.stride == 1:
            margins = [side - 1 - windows.padding for side in windows.kernel_size]
            out = F.conv2d(planes, kernel.flip(2, 3), None, 1, margins, 1, len(kernel))
        else:
            beyond = _beyond(self.size, windows)
            settings = (windows.stride, windows.padding, beyond, len(kernel))
            out = F.conv_transpose2d(planes, kernel, None, *settings)
        return self.from_planes(out, channels)


def _beyond(size: tuple[int, int], windows: Windows) -> list[int]:
    """Tokens beyond the last window, down and across."""
    sides = zip(size, windows.kernel_size, strict=True)
    return [(side + 2 * windows.padding - kernel) % windows.stride for side, kernel in sides]


@functools.lru_cache(maxsize=64)
def _ones_like(pairs: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it serves later calls too
        eye = torch.eye(pairs, dtype=dtype, device=device)
        return eye.unsqueeze(2).expand(-1, -1, channels).reshape(pairs, -1)


def _ones(pairs: int, channels: int, like: Tensor) -> Tensor:
    """Which channels belong to which pair: [pairs, pairs*channels]."""
    return _ones_like(pairs, channels, like.dtype, like.device)


class ChannelsLastSums(_Convolutions):
    """For windows of few offsets. Maps [n, H, W, Q, h, d]."""

    order = (0, 1, 2, 3, 4, 5)

    def place(self, name: str, like: Tensor, channels: int, of_windows: bool = False) -> Tensor:
        size = self.out_size if of_windows else self.size
        return self.work.get(
            name, (like.shape[0], *size, self.num_queries, self.num_heads, channels)
        )

    def planes(self, x: Tensor) -> Tensor:
        return x.flatten(3).permute(0, 3, 1, 2)

    def from_planes(self, planes: Tensor, channels: int) -> Tensor:
        x = planes.permute(0, 2, 3, 1).contiguous()
        return x.view(*x.shape[:3], self.num_queries, self.num_heads, channels)

    # Broadcasts to few channels, and sums over few, are slow; matrix products with ones are not.
    def spread(self, name: str, x: Tensor, channels: int) -> Tensor:
        out = self.work.get(name, (*x.shape[:5], channels))
        pairs = self.num_queries * self.num_heads
        if pairs > FEW_PAIRS:
            return out.copy_(x.expand_as(out))
        torch.mm(x.view(-1, pairs), _ones(pairs, channels, x), out=out.view(-1, pairs * channels))
        return out

    def collect(self, x: Tensor) -> Tensor:
        pairs, channels = self.num_queries * self.num_heads, x.shape[5]
        if pairs > FEW_PAIRS:
            return torch.mm(x.view(-1, channels), _ones(1, channels, x).t()).view(*x.shape[:5], 1)
        flat = x.view(-1, pairs * channels)
        return torch.mm(flat, _ones(pairs, channels, x).t()).view(*x.shape[:5], 1)

    def table_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        windows, planes = self.windows, self.planes(x)
        kernel = x.new_empty(1).expand(planes.shape[1], 1, *windows.kernel_size)
        steps = ([windows.stride] * 2, [windows.padding] * 2, [1, 1], False, [0, 0], len(kernel))
        _, found, _ = torch.ops.aten.convolution_backward(
            self.planes(grad), planes, kernel, None, *steps, [False, True, False]
        )
        found = found.view(self.num_queries, self.num_heads, x.shape[5], -1)
        return found.sum(dim=2).permute(2, 0, 1).contiguous()


class PlanarSums(_Convolutions):
    """For other windows. Maps [n, Q, h, d, H, W]; gradients of tables by Fourier transforms."""

    order = (0, 3, 4, 5, 1, 2)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.grid = Grid(self.size, self.windows)
        self.table_noise = self.grid.noise(self.tables.below.dtype)

    def place(self, name: str, like: Tensor, channels: int, of_windows: bool = False) -> Tensor:
        size = self.out_size if of_windows else self.size
        return self.work.get(
            name, (like.shape[0], self.num_queries, self.num_heads, channels, *size)
        )

    def planes(self, x: Tensor) -> Tensor:
        planes = x.flatten(1, 3)
        if x.device.type == "cpu" and self.windows.num_offsets >= MANY_OFFSETS:
            planes = planes.contiguous(memory_format=torch.channels_last)
        return planes

    def from_planes(self, planes: Tensor, channels: int) -> Tensor:
        x = planes.contiguous()
        return x.view(len(x), self.num_queries, self.num_heads, channels, *x.shape[2:])

    def shared(self, name: str, x: Tensor) -> Tensor:
        # once in the order that products need it in
        x = super().shared(name, x)
        return self.work.get(name, tuple(x.shape)).copy_(x)

    def table_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        transforms = []
        for name, maps, place in (("x", x, self.grid.tokens), ("grad", grad, self.grid.outputs)):
            key = (self.size, self.windows)
            shape = (*maps.shape[:4], *self.grid.points)
            frame = self.work.get(f"{name} {maps.shape[3]}", shape, key)
            place(frame).copy_(maps)
            transforms.append(torch.fft.rfft2(frame))
        return self.grid.table_grad(*transforms)


def depthwise_sums(windows: Windows, pairs: int, on_cpu: bool, backward: bool) -> type[WindowSums]:
    """The class whose layout is the faster one, for as many pairs of query and head."""
    few = FEW_OFFSETS
    if on_cpu and not backward and pairs <= FEW_PAIRS:
        few = FEW_OFFSETS_FORWARD.get(torch.backends.cpu.get_cpu_capability(), few)
    return ChannelsLastSums if on_cpu and windows.num_offsets <= few else PlanarSums
