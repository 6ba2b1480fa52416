"""Local self-attention tile by tile, with its gradient written out.

A tile of T = th*tw neighbouring queries sees S = (th+2p)*(tw+2p) keys. Scores are one matrix
product of each tile, [T, d+a] x [d+a, S]: beside the d channels, queries hold their products with
the relative vectors of every row and column of the tile's keys, keys the one-hot index of theirs,
so that relative scores come along; a query's rows and columns outside of its window hold a number
so negative that softmax makes nothing of them. So everything after is softmax and matrix products
of small dense matrices. Only a few tiles' scores exist at a time, in the processor's cache; for
backward they are computed anew.

Letters: B batch, H W map, C = h*d channels, h heads, d head_dim, k kernel_size, K = k*k offsets,
p = (k-1)/2 radius; R, Q tiles down and across, N = images * R * Q tiles at a time.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qna_timm.ops.span.grid import TileGrid
from qna_timm.ops.workspace import Workspace

# Scores at a time: what caches hold on a CPU, enough to fill a GPU.
CPU_SCORES = 2**20
GPU_SCORES = 2**26
# Added to a score, takes the offset out of the softmax; finite even when it is added twice.
OUT = -1e30


class _Head:
    """Attention of one head's tiles."""

    def __init__(
        self,
        grid: TileGrid,
        work: Workspace,
        rel_pos: Tensor,
        mask: Tensor | None,
        floor: Tensor | None,
        off_map: Tensor | None,
    ) -> None:
        self.grid, self.work = grid, work
        self.rel_pos = rel_pos  # d, 2*k
        self.off_map = off_map
        # what the columns of queries and keys beside their own depend on
        self.layout = (grid.tile, grid.kernel_size, rel_pos.shape[0])
        self.mask = self.floor = self.excluded = None
        if mask is None:
            return
        self.mask = grid.table(mask)
        self.floor = None if floor is None else grid.table(floor)
        if floor is not None and floor.device.type == "cpu" and bool((floor == floor[0]).all()):
            self.floor = floor[0]  # of all the window, over which attention sums to 1
        excluded = (mask if floor is None else mask + floor) == 0.0
        if mask.device.type != "cpu" or bool(excluded.any()):
            self.excluded = grid.table(excluded.to(mask.dtype) * OUT)

    def queries(self, query: Tensor, rows: slice) -> Tensor:
        """[N, T, d] -> [N, T, d+a], see above."""
        grid = self.grid
        num, _, dim = query.shape
        axes = sum(grid.halo)
        shape = (num, grid.num_queries, dim + axes)
        out = self.work.get("queries", shape, self.layout, lambda rows: rows.fill_(OUT))
        out[..., :dim] = query
        products = torch.matmul(query, self.rel_pos).view(num, *grid.tile, -1).chunk(2, dim=3)
        for place, product in zip(grid.axes(out), products, strict=True):
            place.copy_(product)
        if self.off_map is not None:
            off_map = self.off_map[rows].flatten(0, 1)[:, None]  # R*Q, 1, a
            out[..., dim:].unflatten(0, (-1, off_map.shape[0])).masked_fill_(off_map, OUT)
        return out

    def keys(self, key: Tensor, rows: slice) -> Tensor:
        """Framed map -> [N, S, d+a], see above."""
        grid, dim = self.grid, key.shape[3]
        num = key.shape[0] * (rows.stop - rows.start) * grid.tiles[1]

        def mark(rows: Tensor) -> None:
            index = torch.arange(grid.num_keys, device=rows.device)
            rows.zero_()
            rows[:, index, dim + index // grid.halo[1]] = 1.0
            rows[:, index, dim + grid.halo[0] + index % grid.halo[1]] = 1.0

        shape = (num, grid.num_keys, dim + sum(grid.halo))
        out = self.work.get("keys", shape, self.layout, mark)
        grid.put_keys(out[..., :dim], key, rows)
        return out

    def values(self, value: Tensor, rows: slice) -> Tensor:
        """Framed map -> [N, S, d]."""
        num = value.shape[0] * (rows.stop - rows.start) * self.grid.tiles[1]
        out = self.work.get("values", (num, self.grid.num_keys, value.shape[3]))
        return self.grid.put_keys(out, value, rows)

    def add_to_keys(self, framed: Tensor, weights: Tensor, x: Tensor, rows: slice) -> None:
        """Adds weights [N, T, S] times x [N, T, d] to the keys' places in a framed map."""
        shape = (x.shape[0], self.grid.num_keys, x.shape[2])
        out = self.work.get("grad_keys", shape)
        self.grid.add_keys(framed, torch.bmm(weights.transpose(1, 2), x, out=out), rows)

    def attend(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Softmax over a query's window, all its offsets that take part: [N, T, S]."""
        shape = (queries.shape[0], self.grid.num_queries, self.grid.num_keys)
        scores = torch.bmm(queries, keys.transpose(1, 2), out=self.work.get("scores", shape))
        if self.excluded is not None:
            scores.add_(self.excluded)
        return torch.softmax(scores, 2, out=self.work.get("attn", shape))

    def weigh(self, attn: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted attention m P [N, T, S] and the denominator, the sum of (m + floor) P."""
        weighed = torch.mul(attn, self.mask, out=self.work.get("weighed", attn.shape))
        total = weighed.sum(dim=2, keepdim=True)
        if self.floor is not None and self.floor.dim() == 0:
            total = total + self.floor
        elif self.floor is not None:
            floor = self.work.get("scores", attn.shape)
            total = total + torch.mul(attn, self.floor, out=floor).sum(dim=2, keepdim=True)
        # 0 only for queries that fill a tile up beyond the map: their whole window may be left out
        return weighed, total.clamp_min(torch.finfo(total.dtype).tiny)

    def grad_scores(
        self, attn: Tensor, weighed: Tensor, total: Tensor, slopes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the scores [N, T, S], in place of slopes, and of the mask [K].

            ds = P (m (t - delta) - floor delta),   dm = sum P (t - delta),
            delta = sum m P t / total

        Args:
            attn: P [N, T, S]; spent.
            weighed: m P; spent.
            total: The denominator [N, T, 1].
            slopes: t, gradient of the output over the denominator times values [N, T, S].
        """
        delta = weighed.mul_(slopes).sum(dim=2, keepdim=True) / total
        slopes.sub_(delta).mul_(attn)
        grad_mask = self.grid.offsets(slopes.sum(dim=0)).sum(dim=(0, 1)).flatten()
        slopes.mul_(self.mask)
        if self.floor is not None and self.floor.dim() == 0:
            slopes.addcmul_(attn, delta * self.floor, value=-1.0)
        elif self.floor is not None:
            slopes.addcmul_(attn.mul_(self.floor), delta, value=-1.0)
        return slopes, grad_mask


class _Problem:
    """What forward and backward share: the grid, the heads, and how qkv divides."""

    def __init__(
        self,
        qkv: Tensor,
        rel_pos_h: Tensor,
        rel_pos_w: Tensor,
        mask: Tensor | None,
        floor: Tensor | None,
        num_heads: int,
        mask_padding: bool,
        scale: float,
    ) -> None:
        self.qkv, self.scale = qkv, scale
        self.batch, height, width, channels = qkv.shape
        self.channels = channels // 3
        self.grid = TileGrid(height, width, rel_pos_h.shape[1])
        self.dtype = rel_pos_h.dtype
        self.work = Workspace(rel_pos_h)
        self.most_scores = CPU_SCORES if qkv.device.type == "cpu" else GPU_SCORES
        off_map = self.grid.off_map(qkv.device) if mask_padding else None
        rel_pos = torch.cat([rel_pos_h, rel_pos_w], dim=1).chunk(num_heads)
        masks = [None] * num_heads if mask is None else mask.unbind(0)
        self.heads = [
            _Head(self.grid, self.work, rel_pos[j], masks[j], floor, off_map)
            for j in range(num_heads)
        ]

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """See `TileGrid.parts`."""
        return self.grid.parts(self.batch, self.most_scores)

    def split(self, x: Tensor, images: slice, head: int) -> tuple[Tensor, ...]:
        """A head's channels of maps [B, H, W, n*C]: n of [images, H, W, d]."""
        dim = self.channels // len(self.heads)
        maps = x[images].unflatten(3, (-1, self.channels)).unbind(3)
        return tuple(part[..., head * dim : (head + 1) * dim] for part in maps)

    def framed(self, images: slice, head: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a head in a frame of zeros."""
        _, key, value = self.split(self.qkv, images, head)
        return self.frame("framed_key", key), self.frame("framed_value", value)

    def frame(self, name: str, x: Tensor) -> Tensor:
        """A map [n, H, W, d] with zeros around it."""
        shape = (x.shape[0], *self.grid.framed, x.shape[3])
        framed = self.work.get(name, shape, self.grid)
        self.grid.inner(framed).copy_(x)
        return framed

    def queries(self, images: slice, head: int, rows: slice) -> Tensor:
        """A head's queries [N, T, d], scaled."""
        query = self.split(self.qkv, images, head)[0]
        return self.grid.queries(query, rows).to(self.dtype) * self.scale


def forward(qkv: Tensor, *rest: Any) -> Tensor:
    """Output [B, H, W, C]; arguments as in `span_offsets`, qkv in any dtype."""
    problem = _Problem(qkv, *rest)
    grid = problem.grid
    out = qkv.new_empty(*qkv.shape[:3], problem.channels)
    for j, head in enumerate(problem.heads):
        for images, rows in problem.parts():
            if rows.start == 0:
                key, value = problem.framed(images, j)
            queries = head.queries(problem.queries(images, j, rows), rows)
            attn = head.attend(queries, head.keys(key, rows))
            total = None
            if head.mask is not None:
                attn, total = head.weigh(attn)
            tiles = torch.bmm(attn, head.values(value, rows))
            if total is not None:
                tiles.div_(total)
            grid.put_queries(problem.split(out, images, j)[0], tiles, rows)
    problem.work.release()
    return out


def backward(grad: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv [B, H, W, 3*C], both tables [C, 2*k] and the mask [h, K]."""
    problem = _Problem(qkv, *rest)
    grid, work, num_heads = problem.grid, problem.work, len(problem.heads)
    grad_qkv = qkv.new_empty(qkv.shape)
    grad_rel = torch.zeros(
        problem.channels, 2 * grid.kernel_size, dtype=problem.dtype, device=qkv.device
    )
    grad_mask = grad_rel.new_zeros(num_heads, grid.kernel_size**2)
    for j, head in enumerate(problem.heads):
        rel_rows = grad_rel.chunk(num_heads)[j]
        for images, rows in problem.parts():
            if rows.start == 0:
                key, value = problem.framed(images, j)
                grad_key = work.get("grad_key", key.shape).zero_()
                grad_value = work.get("grad_value", value.shape).zero_()
                (grad_out,) = problem.split(grad, images, j)
                places = problem.split(grad_qkv, images, j)
            query = problem.queries(images, j, rows)
            keys = head.keys(key, rows)
            attn = head.attend(head.queries(query, rows), keys)
            weighed, total = (attn, None) if head.mask is None else head.weigh(attn)
            grads = grid.queries(grad_out, rows).to(problem.dtype)
            grads = grads if total is None else grads / total
            head.add_to_keys(grad_value, weighed, grads, rows)
            slopes = work.get("scores", attn.shape)
            torch.bmm(grads, head.values(value, rows).transpose(1, 2), out=slopes)
            if total is None:
                slopes = torch.ops.aten._softmax_backward_data.out(
                    slopes, attn, 2, attn.dtype, grad_input=work.get("slopes", attn.shape)
                )
            else:
                slopes, grad_weights = head.grad_scores(attn, weighed, total, slopes)
                grad_mask[j] += grad_weights
            head.add_to_keys(grad_key, slopes, query, rows)
            tiles = torch.bmm(slopes, keys)  # N, T, d+a
            by_axis = torch.cat(grid.axes(tiles), dim=3).flatten(0, 2)
            rel_rows += torch.mm(query.flatten(0, 1).t(), by_axis)
            by_axis = torch.mm(by_axis, head.rel_pos.t()).view_as(query)
            tiles = by_axis.add_(tiles[..., : query.shape[2]])
            grid.put_queries(places[0], tiles.mul_(problem.scale), rows)
            if rows.stop == grid.tiles[0]:
                places[1].copy_(grid.inner(grad_key))
                places[2].copy_(grid.inner(grad_value))
    work.release()
    return grad_qkv, grad_rel, grad_mask
