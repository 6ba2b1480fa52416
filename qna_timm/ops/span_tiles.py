"""Local self-attention tile by tile, with its gradient written out.

A tile of T = th*tw neighbouring queries sees S = (th+2p)*(tw+2p) keys. Their products are one
matrix product [T, d] x [d, S], of which each query's window is a strided view, the band. Only a few
tiles' scores exist at a time, in the processor's cache; for backward they are computed anew from
the queries, keys and two numbers per query.

Letters: B batch, H W map, C = h*d channels, h heads, d head_dim, k kernel_size, K = k*k offsets,
p = (k-1)/2 radius; R, Q tiles down and across, N = images * R * Q tiles at a time.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qna_timm.ops.span_attn import off_map, span_offsets

# Queries of a tile, down and across: of matrices this small larger ones are faster, of windows
# this small smaller ones waste less.
TILE = (4, 8)
# Scores at a time: what caches hold on a CPU, enough to fill a GPU.
CPU_SCORES = 2**20
GPU_SCORES = 2**26


@dataclass(frozen=True)
class _Grid:
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
        return x.transpose(2, 3).reshape(-1, self.num_queries, x.shape[-1])

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

    def keys(self, x: Tensor, rows: slice) -> Tensor:
        """Framed map -> [N, S, d]."""
        down, across = self.tile
        halo_h, halo_w = self.halo
        x = x[:, rows.start * down : (rows.stop - 1) * down + halo_h]
        x = x.unfold(1, halo_h, down).unfold(2, halo_w, across)  # n, R, Q, d, halo
        return x.permute(0, 1, 2, 4, 5, 3).reshape(-1, self.num_keys, x.shape[3])

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

    def band(self, scores: Tensor) -> Tensor:
        """Every query's window of [N, T, S], as a view [N, th, tw, k, k]."""
        (down, across), halo_w, keys = self.tile, self.halo[1], self.num_keys
        size = (scores.shape[0], down, across, self.kernel_size, self.kernel_size)
        stride = (self.num_queries * keys, across * keys + halo_w, keys + 1, halo_w, 1)
        return scores.as_strided(size, stride)


class _Workspace:
    """Buffers that are used again: fresh ones cost more than what is computed in them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.buffers: dict[str, Tensor] = {}

    def get(self, name: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A buffer of this shape, zeros at first, then what was left in it."""
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape[1:] != shape[1:] or len(buffer) < shape[0]:
            buffer = self.buffers[name] = torch.zeros(shape, dtype=self.dtype, device=like.device)
        return buffer[: shape[0]]

    def frame(self, name: str, grid: _Grid, x: Tensor) -> Tensor:
        """A map [n, H, W, d] with zeros around it."""
        framed = self.get(name, x, (x.shape[0], *grid.framed, x.shape[3]))
        grid.inner(framed).copy_(x)
        return framed


class _Head:
    """Scores of one head's tiles."""

    def __init__(
        self,
        grid: _Grid,
        work: _Workspace,
        rel_pos: Tensor,
        mask: Tensor | None,
        floor: Tensor | None,
        outside: Tensor | None,
    ) -> None:
        self.grid, self.work = grid, work
        self.rel_pos = rel_pos  # d, 2*k
        self.mask, self.floor, self.outside = mask, floor, outside
        # one pass less where looking costs no wait: with rel_axes='split' heads see one axis
        self.only_cols = self.only_rows = False
        if rel_pos.device.type == "cpu":
            self.only_cols, self.only_rows = (not table.any() for table in rel_pos.chunk(2, dim=1))
        self.total: Tensor | None = mask
        self.excluded: Tensor | None = None
        if mask is not None:
            self.total = mask if floor is None else mask + floor
            excluded = self.total == 0.0
            if mask.device.type != "cpu" or bool(excluded.any()):
                self.excluded = excluded.view(grid.kernel_size, -1)

    def _products(self, x: Tensor, keys: Tensor, name: str) -> Tensor:
        """[N, T, d] with [N, S, d], as windows [N, th, tw, k, k]."""
        shape = (x.shape[0], self.grid.num_queries, self.grid.num_keys)
        out = self.work.get("products", x, shape)
        return self.grid.band(torch.bmm(x, keys.transpose(1, 2), out=out))

    def exps(self, query: Tensor, key: Tensor, rows: slice, top: Tensor | None) -> Tensor:
        """exp(score - top), 0 where an offset takes no part: [N, th, tw, k, k].

        Args:
            query: [N, T, d].
            key: [N, S, d].
            rows: Tile rows that these are, all of them or of one image.
            top: Largest scores [N, th, tw, 1, 1], or None to find and return them in `self.top`.
        """
        grid = self.grid
        shape = (query.shape[0], *grid.tile)
        by_row, by_col = torch.matmul(query, self.rel_pos).view(*shape, -1).chunk(2, dim=3)
        band = self._products(query, key, "scores")
        scores = self.work.get("exps", query, tuple(band.shape))
        if self.only_cols:
            torch.add(band, by_col[..., None, :], out=scores)
        else:
            torch.add(band, by_row[..., None], out=scores)
            if not self.only_rows:
                scores.add_(by_col[..., None, :])
        if self.excluded is not None:
            scores.masked_fill_(self.excluded, float("-inf"))
        if self.outside is not None:
            outside = self.outside[rows].flatten(0, 1)  # R*Q, th, tw, k, k
            scores.unflatten(0, (-1, outside.shape[0])).masked_fill_(outside, float("-inf"))
        self.top = scores.amax(dim=(3, 4), keepdim=True) if top is None else top
        return scores.sub_(self.top).exp_()

    def _sum(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """Weighted sums over windows: [N, th, tw, k, k] and [K] -> [N, T, 1]."""
        flat = x.view(x.shape[0], self.grid.num_queries, -1)
        if weight is None:
            return flat.sum(dim=2, keepdim=True)
        return torch.matmul(flat, weight[:, None])

    def denominator(self, exps: Tensor) -> Tensor:
        """Sums of (m + floor) e: [N, th, tw, k, k] -> [N, T, 1]."""
        return self._sum(exps, self.total)

    def spread(self, x: Tensor, weigh: bool) -> Tensor:
        """[N, th, tw, k, k], times m if asked to, in the bands of matrices [N, T, S] of zeros."""
        shape = (x.shape[0], self.grid.num_queries, self.grid.num_keys)
        out = self.work.get("spread", x, shape)  # what is outside the bands is never written
        if weigh and self.mask is not None:
            torch.mul(x, self.mask.view(x.shape[3:]), out=self.grid.band(out))
        else:
            self.grid.band(out).copy_(x)
        return out

    def grad_scores(
        self, exps: Tensor, grad: Tensor, value: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of the scores and of the mask [K].

            t = grad . value,   delta = sum m e t / total,   dm = sum e (t - delta),
            ds = m e (t - delta) - floor e delta

        delta is summed from the very products that it is taken from, not as grad . out: where one
        offset has all the weight, the difference is exactly 0.

        Args:
            exps: [N, th, tw, k, k]; spent.
            grad: Gradient of the output over the denominator [N, T, d].
            value: [N, S, d].
            total: The denominator [N, T, 1].
        """
        slopes = self.work.get("slopes", exps, tuple(exps.shape))
        torch.mul(self._products(grad, value, "slopes"), exps, out=slopes)
        delta = (self._sum(slopes, self.mask) / total).view(*exps.shape[:3], 1, 1)
        slopes.addcmul_(exps, delta, value=-1.0)
        if self.mask is None:
            return slopes, None
        flat = slopes.view(-1, self.mask.shape[0])
        grad_mask = torch.mv(flat.t(), flat.new_ones(flat.shape[0]))
        slopes.mul_(self.mask.view(exps.shape[3:]))
        if self.floor is not None:
            exps.mul_(self.floor.view(exps.shape[3:]))
            slopes.addcmul_(exps, delta, value=-1.0)
        return slopes, grad_mask


def _outside(grid: _Grid, device: torch.device) -> Tensor:
    """Whether an offset of a query is off the map: bool [R, Q, th, tw, k, k]."""
    outside = off_map(grid.height, grid.width, grid.kernel_size, device)
    # the queries that continue a map to whole tiles see what they like
    tiles = grid.queries(outside[None], slice(0, grid.tiles[0]))
    return tiles.view(*grid.tiles, *grid.tile, grid.kernel_size, grid.kernel_size)


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
    ) -> None:
        self.batch, height, width, channels = qkv.shape
        self.channels = channels // 3
        self.grid = _Grid(height, width, rel_pos_h.shape[1])
        self.dtype = rel_pos_h.dtype
        self.work = _Workspace(self.dtype)
        self.most_scores = CPU_SCORES if qkv.device.type == "cpu" else GPU_SCORES
        outside = _outside(self.grid, qkv.device) if mask_padding else None
        rel_pos = torch.cat([rel_pos_h, rel_pos_w], dim=1).chunk(num_heads)
        masks = [None] * num_heads if mask is None else mask.unbind(0)
        self.heads = [
            _Head(self.grid, self.work, rel_pos[j], masks[j], floor, outside)
            for j in range(num_heads)
        ]

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """See `_Grid.parts`."""
        return self.grid.parts(self.batch, self.most_scores)

    def split(self, x: Tensor, images: slice, head: int) -> tuple[Tensor, ...]:
        """A head's channels of maps [B, H, W, n*C]: n of [images, H, W, d]."""
        dim = self.channels // len(self.heads)
        maps = x[images].unflatten(3, (-1, self.channels)).unbind(3)
        return tuple(part[..., head * dim : (head + 1) * dim] for part in maps)

    def queries(self, x: Tensor, rows: slice) -> Tensor:
        """See `_Grid.queries`; in the dtype to compute in."""
        return self.grid.queries(x, rows).to(self.dtype)


def _forward(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    mask: Tensor | None,
    floor: Tensor | None,
    num_heads: int,
    mask_padding: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and of every query the largest score and the denominator [2, h, B, R, Q, T]."""
    problem = _Problem(qkv, rel_pos_h, rel_pos_w, mask, floor, num_heads, mask_padding)
    grid, work = problem.grid, problem.work
    out, stats = _empty(qkv, rel_pos_h, num_heads)
    for j, head in enumerate(problem.heads):
        for images, rows in problem.parts():
            if rows.start == 0:
                query, key, value = problem.split(qkv, images, j)
                key, value = work.frame("key", grid, key), work.frame("value", grid, value)
            q_tiles = problem.queries(query, rows) * scale
            exps = head.exps(q_tiles, grid.keys(key, rows), rows, None)
            total = head.denominator(exps)
            tiles = torch.bmm(head.spread(exps, True), grid.keys(value, rows)).div_(total)
            grid.put_queries(problem.split(out, images, j)[0], tiles, rows)
            place = stats[:, j, images, rows]
            place[0].copy_(head.top.view(place[0].shape))
            place[1].copy_(total.view(place[1].shape))
    return out, stats


def _backward(
    grad: Tensor,
    qkv: Tensor,
    stats: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    mask: Tensor | None,
    floor: Tensor | None,
    num_heads: int,
    mask_padding: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv [B, H, W, 3*C], both tables [C, 2*k] and the mask [h, K]."""
    problem = _Problem(qkv, rel_pos_h, rel_pos_w, mask, floor, num_heads, mask_padding)
    grid, work = problem.grid, problem.work
    grad_qkv = torch.empty_like(qkv)
    grad_rel = rel_pos_h.new_zeros(problem.channels, 2 * grid.kernel_size)
    grad_mask = rel_pos_h.new_zeros(num_heads, grid.kernel_size**2)
    for j, head in enumerate(problem.heads):
        rel_rows = grad_rel.chunk(num_heads)[j]
        for images, rows in problem.parts():
            if rows.start == 0:
                query, key, value = problem.split(qkv, images, j)
                key, value = work.frame("key", grid, key), work.frame("value", grid, value)
                grad_key = work.get("grad_key", key, tuple(key.shape)).zero_()
                grad_value = work.get("grad_value", value, tuple(value.shape)).zero_()
                (grad_out,) = problem.split(grad, images, j)
            q_tiles, k_tiles = problem.queries(query, rows) * scale, grid.keys(key, rows)
            top, total = stats[:, j, images, rows].flatten(1, 3)[..., None].unbind(0)  # N, T, 1
            g_tiles = problem.queries(grad_out, rows) / total
            exps = head.exps(q_tiles, k_tiles, rows, top.view(-1, *grid.tile, 1, 1))
            spread = head.spread(exps, True)
            grid.add_keys(grad_value, torch.bmm(spread.transpose(1, 2), g_tiles), rows)
            slopes, grad_weights = head.grad_scores(exps, g_tiles, grid.keys(value, rows), total)
            if grad_weights is not None:
                grad_mask[j] += grad_weights
            spread = head.spread(slopes, False)
            grid.add_keys(grad_key, torch.bmm(spread.transpose(1, 2), q_tiles), rows)
            by_axis = torch.cat([slopes.sum(dim=4), slopes.sum(dim=3)], dim=3).flatten(0, 2)
            rel_rows += torch.mm(q_tiles.flatten(0, 1).t(), by_axis)
            tiles = torch.bmm(spread, k_tiles)
            tiles.flatten(0, 1).addmm_(by_axis, head.rel_pos.t())
            places = problem.split(grad_qkv, images, j)
            grid.put_queries(places[0], tiles.mul_(scale), rows)
            if rows.stop == grid.tiles[0]:
                places[1].copy_(grid.inner(grad_key))
                places[2].copy_(grid.inner(grad_value))
    return grad_qkv, grad_rel, grad_mask


def _empty(qkv: Tensor, rel_pos_h: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """What `_forward` returns, not yet filled."""
    batch, height, width, channels = qkv.shape
    grid = _Grid(height, width, rel_pos_h.shape[1])
    shape = (2, num_heads, batch, *grid.tiles, grid.num_queries)
    return qkv.new_empty(batch, height, width, channels // 3), rel_pos_h.new_empty(shape)


_TABLES = "Tensor rel_pos_h, Tensor rel_pos_w, Tensor? mask, Tensor? floor"
_SETTINGS = "int num_heads, bool mask_padding, float scale"
_library = torch.library.Library("qna_timm", "FRAGMENT")
_library.define(f"span_tiles(Tensor qkv, {_TABLES}, {_SETTINGS}) -> (Tensor, Tensor)")
_library.define(
    "span_tiles_backward(Tensor grad, Tensor qkv, Tensor stats, "
    f"{_TABLES}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)"
)


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast stops at functions, not at what they call."""

    @functools.wraps(function)
    def call(first: Tensor, *args: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args)

    return call


for _name, _function in (("span_tiles", _forward), ("span_tiles_backward", _backward)):
    _library.impl(_name, _without_autocast(_function), "CompositeExplicitAutograd")


@torch.library.register_fake("qna_timm::span_tiles", lib=_library)
def _(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    mask: Tensor | None,
    floor: Tensor | None,
    num_heads: int,
    mask_padding: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return _empty(qkv, rel_pos_h, num_heads)


@torch.library.register_fake("qna_timm::span_tiles_backward", lib=_library)
def _(
    grad: Tensor,
    qkv: Tensor,
    stats: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    mask: Tensor | None,
    floor: Tensor | None,
    num_heads: int,
    mask_padding: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    channels, kernel_size = rel_pos_h.shape
    return (
        torch.empty_like(qkv),
        rel_pos_h.new_empty(channels, 2 * kernel_size),
        rel_pos_h.new_empty(num_heads, kernel_size**2),
    )


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.settings = inputs[5:]
    ctx.save_for_backward(*inputs[:5], output[1])


def _gradients(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, stats = ctx.saved_tensors
    if torch.is_grad_enabled():  # somebody wants gradients of the gradient
        return *_grad_of_offsets(grad, inputs, *ctx.settings), None, None, None, None
    grad_qkv, grad_rel, grad_mask = torch.ops.qna_timm.span_tiles_backward(
        grad, inputs[0], stats, *inputs[1:], *ctx.settings
    )
    by_row, by_col = grad_rel.chunk(2, dim=1)
    grad_mask = None if inputs[3] is None else grad_mask
    return grad_qkv, by_row, by_col, grad_mask, None, None, None, None


# for graphs that hold the operator itself, exported ones
torch.library.register_autograd(
    "qna_timm::span_tiles", _gradients, setup_context=_setup_context, lib=_library
)


class _SpanTiles(torch.autograd.Function):
    """Both operators as one function with a gradient, which `torch.func` takes too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        qkv: Tensor,
        rel_pos_h: Tensor,
        rel_pos_w: Tensor,
        mask: Tensor | None,
        floor: Tensor | None,
        num_heads: int,
        mask_padding: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.qna_timm.span_tiles(
            qkv, rel_pos_h, rel_pos_w, mask, floor, num_heads, mask_padding, scale
        )

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_gradients)


def _grad_of_offsets(
    grad: Tensor, inputs: list[Tensor | None], num_heads: int, mask_padding: bool, scale: float
) -> list[Tensor | None]:
    """Gradients of qkv, both tables and the mask that have gradients themselves."""
    wanted = [x for x in inputs[:4] if x is not None and x.requires_grad]
    qkv, *tables = inputs
    with torch.autocast(qkv.device.type, enabled=False):
        out = span_offsets(qkv.to(tables[0].dtype), *tables, num_heads, mask_padding, scale)
    out = out.to(qkv.dtype)
    grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return [next(grads) if x is not None and x.requires_grad else None for x in inputs[:4]]


def span_tiles(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    mask: Tensor | None,
    floor: Tensor | None,
    num_heads: int,
    mask_padding: bool,
    scale: float,
) -> Tensor:
    """The function in tiles; arguments as in `span_attention`, tables in the dtype to compute in.

    Keeps qkv and two numbers per position and head for backward. Gradients of gradients come from
    `span_offsets`.
    """
    return _SpanTiles.apply(qkv, rel_pos_h, rel_pos_w, mask, floor, num_heads, mask_padding, scale)[
        0
    ]
