"""Sums over windows of maps by Fourier transforms on a grid that holds a map and its padding.

Letters: H W map, Y X output map, K = kh*kw offsets, N = nh*nw points of the grid.
"""

import math

import torch
from torch import Tensor

from qna_timm.ops.qna.windows import Windows

# Factors of safety on the error that a random walk of roundings leaves: DEVIATIONS for the norm of
# a map's error, PEAK for its largest entry over that norm. The worst seen were 0.6 of the norm and
# 25 of their product's 32, in the rows and columns of one large number.
DEVIATIONS = 8.0
PEAK = 4.0
# Roundings of a D of mean size (root of mean square) that all windows of a map share: where map and
# table are flat, their transforms are one large number each. Outputs of maps that fall off at one
# end had 4 with windows of 15, and 7 with windows of 127.
COMMON_ROUNDINGS = 8.0


def fast_length(least: int) -> int:
    """The smallest even number from `least` on that has no prime factor above 5."""
    length = least + least % 2
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 2


class Grid:
    """Correlation of maps with tables as a product of transforms.

    Maps lie at the grid's origin. What a window sees beyond one side of the map wraps around to
    the other side of the grid, where there are `padding` empty points.
    """

    def __init__(self, size: tuple[int, int], windows: Windows) -> None:
        self.size, self.windows = size, windows
        self.out_size = windows.out_size(*size)
        self.points = tuple(
            fast_length(max(side + windows.padding, kernel))
            for side, kernel in zip(size, windows.kernel_size, strict=True)
        )

    @property
    def half(self) -> tuple[int, int]:
        """Shape of the transform of a real map."""
        return self.points[0], self.points[1] // 2 + 1

    def noise(self, dtype: torch.dtype) -> float:
        """Error of a sum over the norms of its map and table.

        A transform's error is that of a random walk of log2(N) roundings, spread evenly over the
        N points: eps * sqrt(log2 N) of its norm / sqrt(N) at each.
        """
        count = self.points[0] * self.points[1]
        return DEVIATIONS * torch.finfo(dtype).eps * math.sqrt(math.log2(count) / count)

    def tokens(self, frame: Tensor) -> Tensor:
        """Where a map lies in a frame [..., nh, nw]."""
        return frame[..., : self.size[0], : self.size[1]]

    def outputs(self, frame: Tensor) -> Tensor:
        """Where windows lie in a frame, a stride apart."""
        step = self.windows.stride
        rows, cols = ((side - 1) * step + 1 for side in self.out_size)
        return frame[..., :rows:step, :cols:step]

    def table(self, x: Tensor) -> Tensor:
        """Tables [..., K] -> what transforms of maps are multiplied by, complex [..., half]."""
        shift = -self.windows.padding
        kernel_h, kernel_w = self.windows.kernel_size
        frame = x.new_zeros(*x.shape[:-1], *self.points)
        frame[..., :kernel_h, :kernel_w] = x.unflatten(-1, self.windows.kernel_size)
        frame = frame.roll((shift, shift), (-2, -1))
        return torch.fft.rfft2(frame).conj().resolve_conj()

    def table_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        """sum_n sum_d sum_y grad[y] x[y+o] [K, Q, h] from both transforms [n, Q, h, d, half]."""
        shift = self.windows.padding
        kernel_h, kernel_w = self.windows.kernel_size
        product = torch.linalg.vecdot(grad, x, dim=3).sum(dim=0)
        frame = torch.fft.irfft2(product, s=self.points).roll((shift, shift), (2, 3))
        return frame[..., :kernel_h, :kernel_w].flatten(2).permute(2, 0, 1).contiguous()
