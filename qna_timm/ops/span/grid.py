"""How a map is cut into tiles of queries and the keys that they see, and back.

Letters: B batch, H W map, C = h*d channels, d head_dim, k kernel_size, K = k*k offsets,
p = (k-1)/2 radius; R, Q tiles down and across, N = images * R * Q tiles at a time; of a tile
T = th*tw queries, S = (th+2p)*(tw+2p) keys, a = (th+2p) + (tw+2p) rows and columns of keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries of a tile, down and across: larger tiles make faster products, smaller ones read fewer
# keys in vain where windows are small.
TILE = (4, 8)


@dataclass(frozen=True)
class TileGrid:
    """How a map is cut into tiles."""

    height: int
    width: int
    kernel_size: int

    @property
    def tile(self) -> tuple[int, int]:
        return min(TILE[0], self.height), min(TILE[1], self.width)

    @property
    def tiles(self) -> tuple[int, int]:
        """R, Q."""
        return -(-self.height // self.tile[0]), -(-self.width // self.tile[1])

    @property
    def num_queries(self) -> int:
        return self.tile[0] * self.tile[1]

    @property
    def halo(self) -> tuple[int, int]:
        """Keys that a tile sees, down and across."""
        return tuple(side + self.kernel_size - 1 for side in self.tile)

    @property
    def num_keys(self) -> int:
        return self.halo[0] * self.halo[1]

    def parts(self, batch: int, most_scores: int) -> Iterator[tuple[slice, slice]]:
        """Images and tile rows to compute at a time: many images, or rows of a single one."""
        rows, cols = self.tiles
        most = max(1, most_scores // (self.num_queries * self.num_keys * cols))  # tile rows
        images, step = max(1, most // rows), min(most, rows)
        for image in range(0, batch, images):
            for row in range(0, rows, step):
                yield slice(image, min(image + images, batch)), slice(row, min(row + step, rows))

    def queries(self, x: Tensor, rows: slice) -> Tensor:
        """[n, H, W, d] -> [N, T, d], continued to whole tiles by zeros."""
        down, across = self.tile
        x = x[:, rows.start * down : rows.stop * down]
        missing = self.tiles[1] * across - x.shape[2], (rows.stop - rows.start) * down - x.shape[1]
        if max(missing) > 0:
            x = F.pad(x, [0, 0, 0, missing[0], 0, missing[1]])
        x = x.unflatten(2, (-1, across)).unflatten(1, (-1, down))  # n, R, th, Q, tw, d
        # contiguous: an expanded gradient would stay a view, which every product copies anew
        return x.transpose(2, 3).reshape(-1, self.num_queries, x.shape[-1]).contiguous()

    def put_queries(self, out: Tensor, tiles: Tensor, rows: slice) -> None:
        """[N, T, d] -> their places in a map [n, H, W, d]."""
        down, across = self.tile
        tiles = tiles.view(out.shape[0], -1, self.tiles[1], down, across, out.shape[3])
        tiles = tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        place = out[:, rows.start * down : rows.stop * down]
        place.copy_(tiles[:, : place.shape[1], : place.shape[2]])

    @property
    def framed(self) -> tuple[int, int]:
        """Height and width of a map continued to whole tiles, in a frame p wide."""
        sides = (n * side for n, side in zip(self.tiles, self.tile, strict=True))
        return tuple(side + self.kernel_size - 1 for side in sides)

    def inner(self, framed: Tensor) -> Tensor:
        """The map [n, H, W, d] in a framed one."""
        radius = self.kernel_size // 2
        return framed[:, radius : radius + self.height, radius : radius + self.width]

    def put_keys(self, out: Tensor, x: Tensor, rows: slice) -> Tensor:
        """Framed map -> every tile's keys, into [N, S, d], which may be part of wider rows."""
        down, across = self.tile
        halo_h, halo_w = self.halo
        x = x[:, rows.start * down : (rows.stop - 1) * down + halo_h]
        x = x.unfold(1, halo_h, down).unfold(2, halo_w, across)  # n, R, Q, d, halo
        x = x.permute(0, 1, 2, 4, 5, 3)
        out.unflatten(1, self.halo).unflatten(0, x.shape[:3]).copy_(x)
        return out

    def add_keys(self, out: Tensor, tiles: Tensor, rows: slice) -> None:
        """Adds [N, S, d] to their places in a framed map."""
        (down, across), (halo_h, halo_w) = self.tile, self.halo
        num, cols = rows.stop - rows.start, self.tiles[1]
        tiles = tiles.view(out.shape[0], num, cols, halo_h, halo_w, out.shape[3])
        stride = out.stride()
        # halos overlap; pieces of them as large as a tile do not
        for top in range(0, halo_h, down):
            for left in range(0, halo_w, across):
                piece = tiles[:, :, :, top : top + down, left : left + across]
                place = out[:, rows.start * down + top :, left:].as_strided(
                    piece.shape, (stride[0], down * stride[1], across * stride[2], *stride[1:])
                )
                place.add_(piece)

    def offsets(self, x: Tensor) -> Tensor:
        """What tables [..., T, S] hold for every query's window, as a view [..., th, tw, k, k]."""
        (down, across), halo_w, keys = self.tile, self.halo[1], self.num_keys
        size = (*x.shape[:-2], down, across, self.kernel_size, self.kernel_size)
        stride = (*x.stride()[:-2], across * keys + halo_w, keys + 1, halo_w, 1)
        return x.as_strided(size, stride, x.storage_offset())

    def table(self, weights: Tensor) -> Tensor:
        """Weights of a window's offsets [K] for every pair of query and key: [T, S]."""
        table = weights.new_zeros(self.num_queries, self.num_keys)
        self.offsets(table).copy_(weights.view(self.kernel_size, self.kernel_size))
        return table

    def axes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of [N, T, d+a] a query's window, by row and by column: views [N, th, tw, k]."""
        (down, across), (halo_h, halo_w) = self.tile, self.halo
        wide = x.shape[2]
        size = (x.shape[0], down, across, self.kernel_size)
        start = x.storage_offset() + wide - halo_h - halo_w
        by_row = x.as_strided(size, (x.stride(0), across * wide + 1, wide, 1), start)
        by_col = x.as_strided(size, (x.stride(0), across * wide, wide + 1, 1), start + halo_h)
        return by_row, by_col

    def off_map(self, device: torch.device) -> Tensor:
        """Whether rows and columns of a tile's keys are off the map: bool [R, Q, a]."""
        sides = []
        for axis, size in enumerate((self.height, self.width)):
            first = torch.arange(self.tiles[axis], device=device) * self.tile[axis]
            place = torch.arange(self.halo[axis], device=device) - self.kernel_size // 2
            place = place + first[:, None]
            sides.append((place < 0) | (place >= size))
        rows, cols = sides
        shape = (*self.tiles, -1)
        return torch.cat([rows[:, None].expand(shape), cols[None].expand(shape)], dim=2)
