"""Window sums of learned-query attention by Fourier transforms, as cheap for any window.

Letters: n images, H W map, Q queries, h heads, d head_dim, K offsets; nh nw points of the grid.
"""

from typing import Any

import torch
from torch import Tensor

from qna_timm.ops.qna.grid import Grid
from qna_timm.ops.qna.sums import WindowSums, norm


class FourierSums(WindowSums):
    """Head maps [n, Q, h, 1, H, W] and channel maps [n, Q, h, d, H, W], in frames of zeros."""

    order = (0, 3, 4, 5, 1, 2)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.grid = Grid(self.size, self.windows)
        self.noise = self.table_noise = self.grid.noise(self.tables.below.dtype)
        self.transforms: dict[int, Tensor] = {}
        self.frames: dict[str, Tensor] = {}

    def place(self, name: str, like: Tensor, channels: int, of_windows: bool = False) -> Tensor:
        shape = (like.shape[0], self.num_queries, self.num_heads, channels, *self.grid.points)
        frame = self.work.get(name, shape, (self.size, self.windows, of_windows))
        self.frames[name] = frame
        return self.grid.outputs(frame) if of_windows else self.grid.tokens(frame)

    def shared(self, name: str, x: Tensor) -> Tensor:
        # once in the order that products need it in
        x = super().shared(name, x)
        return self.work.get(name, tuple(x.shape)).copy_(x)

    def norms(self, name: str, x: Tensor) -> Tensor:
        return norm(self.frames[name].flatten(4), (4,))  # around the map there are zeros

    def ready(self, name: str, x: Tensor) -> Tensor:
        return torch.fft.rfft2(self.frames[name])

    def _transform(self, table: Tensor) -> Tensor:
        """[K, Q, h] -> [Q, h, 1, nh, nw/2+1]."""
        if id(table) not in self.transforms:
            self.transforms[id(table)] = self.grid.table(table.permute(1, 2, 0).unsqueeze(2))
        return self.transforms[id(table)]

    def _map(self, transform: Tensor) -> Tensor:
        return torch.fft.irfft2(transform, s=self.grid.points)

    def sums(self, x: Tensor, table: Tensor) -> Tensor:
        return self.grid.outputs(self._map(x * self._transform(table)))

    def sums_back(self, grad: Tensor, table: Tensor) -> Tensor:
        return self.grid.tokens(self._map(grad * self._transform(table).conj()))

    def table_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        return self.grid.table_grad(x, grad)
