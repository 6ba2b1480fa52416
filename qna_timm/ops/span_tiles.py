"""Local self-attention tile by tile, with its gradient written out.

A tile of T = th*tw neighbouring queries sees S = (th+2p)*(tw+2p) keys. Their products are one
matrix product [T, d] x [d, S], of which each query's window is a strided view, the band. Only a few
tiles' scores exist at a time, in the processor's cache; for backward they are computed anew from
the queries, keys and two numbers per query.

Letters: B batch, H W map, C = h*d channels, h heads, d head_dim, k kernel_size, K = k*k offsets,
p = (k-1)/2 radius; R, Q tiles down and across, N = images * R * Q tiles at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qna_timm.ops.span_attn import off_map

# Queries of a tile, down and across: of matrices this small larger ones are faster, of windows
# this small smaller ones waste less.
TILE = (4, 8)
# Scores at a time: what caches hold on a CPU, enough to fill a GPU.
CPU_SCORES = 2**19
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

    def pad(self, x: Tensor, radius: int, dtype: torch.dtype) -> Tensor:
        """[n, H, W, d] in a frame of zeros, continued to whole tiles."""
        rows, cols = (n * side for n, side in zip(self.tiles, self.tile, strict=True))
        shape = (x.shape[0], rows + 2 * radius, cols + 2 * radius, x.shape[3])
        out = torch.zeros(shape, dtype=dtype, device=x.device)
        out[:, radius : radius + self.height, radius : radius + self.width] = x
        return out

    def queries(self, x: Tensor, rows: slice) -> Tensor:
        """Padded map without a frame -> [N, T, d]."""
        down, across = self.tile
        x = x[:, rows.start * down : rows.stop * down]
        x = x.unflatten(2, (-1, across)).unflatten(1, (-1, down))  # n, R, th, Q, tw, d
        return x.transpose(2, 3).reshape(-1, self.num_queries, x.shape[-1])

    def put_queries(self, out: Tensor, tiles: Tensor, rows: slice) -> None:
        """[N, T, d] -> their places in a map [n, H, W, d]."""
        down, across = self.tile
        tiles = tiles.view(out.shape[0], -1, self.tiles[1], down, across, out.shape[3])
        tiles = tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        place = out[:, rows.start * down : rows.stop * down]
        place.copy_(tiles[:, : place.shape[1], : place.shape[2]])

    def keys(self, x: Tensor, rows: slice) -> Tensor:
        """Padded map with its frame -> [N, S, d]."""
        down, across = self.tile
        halo_h, halo_w = self.halo
        x = x[:, rows.start * down : (rows.stop - 1) * down + halo_h]
        x = x.unfold(1, halo_h, down).unfold(2, halo_w, across)  # n, R, Q, d, halo
        return x.permute(0, 1, 2, 4, 5, 3).reshape(-1, self.num_keys, x.shape[3])

    def add_keys(self, out: Tensor, tiles: Tensor, rows: slice) -> None:
        """Adds [N, S, d] to their places in a padded map with its frame."""
        (down, across), (halo_h, halo_w) = self.tile, self.halo
        num, cols = rows.stop - rows.start, self.tiles[1]
        tiles = tiles.view(out.shape[0], num, cols, halo_h, halo_w, out.shape[3])
        # halos overlap; pieces of them as large as a tile do not
        for top in range(0, halo_h, down):
            piece_h = min(down, halo_h - top)
            first = rows.start * down + top
            for left in range(0, halo_w, across):
                piece_w = min(across, halo_w - left)
                piece = tiles[:, :, :, top : top + piece_h, left : left + piece_w]
                place = out[:, first:, left:]
                place = place.as_strided(
                    (out.shape[0], num, cols, piece_h, piece_w, out.shape[3]),
                    (
                        out.stride(0),
                        down * out.stride(1),
                        across * out.stride(2),
                        out.stride(1),
                        out.stride(2),
                        1,
                    ),
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

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def get(self, name: str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A buffer of this shape, zeros at first, then what was left in it."""
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape != shape:
            buffer = self.buffers[name] = like.new_zeros(shape)
        return buffer


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
        self.total: Tensor | None = mask
        self.excluded: Tensor | None = None
        if mask is not None:
            self.total = mask if floor is None else mask + floor
            excluded = self.total == 0.0
            if mask.is_cuda or bool(excluded.any()):
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
        torch.add(band, by_row[..., None], out=scores)
        scores.add_(by_col[..., None, :])
        if self.excluded is not None:
            scores.masked_fill_(self.excluded, float("-inf"))
        if self.outside is not None:
            outside = self.outside[rows].flatten(0, 1)  # R*Q, th, tw, k, k
            scores.unflatten(0, (-1, outside.shape[0])).masked_fill_(outside, float("-inf"))
        self.top = scores.amax(dim=(3, 4), keepdim=True) if top is None else top
        return scores.sub_(self.top).exp_()

    def weigh(self, exps: Tensor) -> Tensor:
        """Sums of (m + floor) e: [N, th, tw, k, k] -> [N, T, 1]."""
        flat = exps.view(exps.shape[0], self.grid.num_queries, -1)
        if self.total is None:
            return flat.sum(dim=2, keepdim=True)
        return torch.matmul(flat, self.total[:, None])

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
        self, exps: Tensor, grad: Tensor, delta: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of the scores, in place of exps, and of the mask [K].

            ds = e (m t - (m + floor) delta),  dm = sum e (t - delta),  t = grad . value

        Args:
            exps: [N, th, tw, k, k].
            grad: Gradient of the output over the denominator [N, T, d].
            delta: Its product with the output [N, T, 1].
            value: [N, S, d].
        """
        delta = delta.view(*exps.shape[:3], 1, 1)
        slopes = self.work.get("slopes", exps, tuple(exps.shape))
        torch.sub(self._products(grad, value, "slopes"), delta, out=slopes)
        slopes.mul_(exps)
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
    tiles = grid.queries(grid.pad(outside[None], 0, torch.bool), slice(0, grid.tiles[0]))
    return tiles.view(*grid.tiles, *grid.tile, grid.kernel_size, grid.kernel_size)


def _heads(
    grid: _Grid,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    mask: Tensor | None,
    floor: Tensor | None,
    num_heads: int,
    mask_padding: bool,
) -> list[_Head]:
    outside = _outside(grid, rel_pos_h.device) if mask_padding else None
    rel_pos = torch.cat([rel_pos_h, rel_pos_w], dim=1).chunk(num_heads)
    masks = [None] * num_heads if mask is None else mask.unbind(0)
    work = _Workspace()
    return [_Head(grid, work, rel_pos[j], masks[j], floor, outside) for j in range(num_heads)]


def _most_scores(x: Tensor) -> int:
    return CPU_SCORES if x.device.type == "cpu" else GPU_SCORES


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    mask: Tensor | None,
    floor: Tensor | None,
    num_heads: int,
    mask_padding: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and of every query the largest score and the denominator [2, h, B, R, Q, T]."""
    batch, height, width, channels = query.shape
    grid, dtype = _Grid(height, width, rel_pos_h.shape[1]), rel_pos_h.dtype
    radius, head_dim = grid.kernel_size // 2, channels // num_heads
    out = torch.empty_like(value)
    shape = (2, num_heads, batch, *grid.tiles, grid.num_queries)
    stats = torch.empty(shape, dtype=dtype, device=query.device)
    heads = _heads(grid, rel_pos_h, rel_pos_w, mask, floor, num_heads, mask_padding)
    for j, head in enumerate(heads):
        chunk = slice(j * head_dim, (j + 1) * head_dim)
        for images, rows in grid.parts(batch, _most_scores(query)):
            if rows.start == 0:
                q = grid.pad(query[images, ..., chunk], 0, dtype).mul_(scale)
                k = grid.pad(key[images, ..., chunk], radius, dtype)
                v = grid.pad(value[images, ..., chunk], radius, dtype)
            exps = head.exps(grid.queries(q, rows), grid.keys(k, rows), rows, None)
            total = head.weigh(exps)
            tiles = torch.bmm(head.spread(exps, True), grid.keys(v, rows)).div_(total)
            grid.put_queries(out[images, ..., chunk], tiles, rows)
            place = stats[:, j, images, rows]
            place[0].copy_(head.top.view(place[0].shape))
            place[1].copy_(total.view(place[1].shape))
    return out, stats


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    stats: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    mask: Tensor | None,
    floor: Tensor | None,
    num_heads: int,
    mask_padding: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value [B, H, W, C], both tables [C, 2*k] and the mask [h, K]."""
    batch, height, width, channels = query.shape
    grid, dtype = _Grid(height, width, rel_pos_h.shape[1]), rel_pos_h.dtype
    radius, head_dim = grid.kernel_size // 2, channels // num_heads
    grads = [torch.empty_like(x) for x in (query, key, value)]
    grad_rel = rel_pos_h.new_zeros(channels, 2 * grid.kernel_size)
    grad_mask = rel_pos_h.new_zeros(num_heads, grid.kernel_size**2)
    inner = slice(radius, radius + height), slice(radius, radius + width)
    heads = _heads(grid, rel_pos_h, rel_pos_w, mask, floor, num_heads, mask_padding)
    for j, head in enumerate(heads):
        chunk = slice(j * head_dim, (j + 1) * head_dim)
        for images, rows in grid.parts(batch, _most_scores(query)):
            if rows.start == 0:
                q = grid.pad(query[images, ..., chunk], 0, dtype).mul_(scale)
                k = grid.pad(key[images, ..., chunk], radius, dtype)
                v = grid.pad(value[images, ..., chunk], radius, dtype)
                g = grid.pad(grad[images, ..., chunk], 0, dtype)
                o = grid.pad(out[images, ..., chunk], 0, dtype)
                grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
            q_tiles, k_tiles = grid.queries(q, rows), grid.keys(k, rows)
            top, total = stats[:, j, images, rows].flatten(1, 3).unbind(0)  # N, T
            g_tiles = grid.queries(g, rows) / total[..., None]
            delta = (g_tiles * grid.queries(o, rows)).sum(dim=2, keepdim=True)
            exps = head.exps(q_tiles, k_tiles, rows, top.view(-1, *grid.tile, 1, 1))
            attn = head.spread(exps, True)
            grid.add_keys(grad_v, torch.bmm(attn.transpose(1, 2), g_tiles), rows)
            slopes, grad_m = head.grad_scores(exps, g_tiles, delta, grid.keys(v, rows))
            if grad_m is not None:
                grad_mask[j] += grad_m
            spread = head.spread(slopes, False)
            grid.add_keys(grad_k, torch.bmm(spread.transpose(1, 2), q_tiles), rows)
            by_axis = torch.cat([slopes.sum(dim=4), slopes.sum(dim=3)], dim=3).flatten(0, 2)
            grad_rel[chunk] += torch.mm(q_tiles.flatten(0, 1).t(), by_axis)
            tiles = torch.bmm(spread, k_tiles)
            tiles.flatten(0, 1).addmm_(by_axis, head.rel_pos.t())
            grid.put_queries(grads[0][images, ..., chunk], tiles.mul_(scale), rows)
            if rows.stop == grid.tiles[0]:
                grads[1][images, ..., chunk] = grad_k[:, inner[0], inner[1]]
                grads[2][images, ..., chunk] = grad_v[:, inner[0], inner[1]]
    return grads[0], grads[1], grads[2], grad_rel, grad_mask


_TABLES = "Tensor rel_pos_h, Tensor rel_pos_w, Tensor? mask, Tensor? floor"
_SETTINGS = "int num_heads, bool mask_padding, float scale"
_library = torch.library.Library("qna_timm", "FRAGMENT")
_library.define(
    "span_tiles(Tensor query, Tensor key, Tensor value, "
    f"{_TABLES}, {_SETTINGS}) -> (Tensor, Tensor)"
)
_library.define(
    "span_tiles_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor stats, {_TABLES}, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("span_tiles", _forward, "CompositeExplicitAutograd")
_library.impl("span_tiles_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("qna_timm::span_tiles", lib=_library)
def _fake_forward(query, key, value, rel_pos_h, rel_pos_w, mask, floor, num_heads, *_):
    grid = _Grid(query.shape[1], query.shape[2], rel_pos_h.shape[1])
    shape = (2, num_heads, query.shape[0], *grid.tiles, grid.num_queries)
    return torch.empty_like(value), rel_pos_h.new_empty(shape)


@torch.library.register_fake("qna_timm::span_tiles_backward", lib=_library)
def _fake_backward(
    grad, query, key, value, out, stats, rel_pos_h, rel_pos_w, mask, floor, num_heads, *_
):
    channels, kernel_size = rel_pos_h.shape
    return (
        torch.empty_like(query),
        torch.empty_like(key),
        torch.empty_like(value),
        rel_pos_h.new_empty(channels, 2 * kernel_size),
        rel_pos_h.new_empty(num_heads, kernel_size**2),
    )


class _SpanTiles(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        query, key, value, rel_pos_h, rel_pos_w, mask, floor, num_heads, mask_padding, scale
    ):
        return torch.ops.qna_timm.span_tiles(
            query, key, value, rel_pos_h, rel_pos_w, mask, floor, num_heads, mask_padding, scale
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, rel_pos_h, rel_pos_w, mask, floor, *settings = inputs
        out, stats = output
        ctx.mark_non_differentiable(stats)
        ctx.settings = settings
        ctx.save_for_backward(query, key, value, rel_pos_h, rel_pos_w, mask, floor, out, stats)

    @staticmethod
    def backward(ctx, grad, _):
        query, key, value, rel_pos_h, rel_pos_w, mask, floor, out, stats = ctx.saved_tensors
        tables = (rel_pos_h, rel_pos_w, mask, floor)
        grads = torch.ops.qna_timm.span_tiles_backward(
            grad, query, key, value, out, stats, *tables, *ctx.settings
        )
        by_row, by_col = grads[3].chunk(2, dim=1)
        grad_mask = None if mask is None else grads[4]
        return *grads[:3], by_row, by_col, grad_mask, None, None, None, None


def span_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    mask: Tensor | None,
    floor: Tensor | None,
    num_heads: int,
    mask_padding: bool,
    scale: float,
) -> Tensor:
    """The function in tiles; arguments as in `span_attention`, tables in the dtype to compute in.

    Keeps query, key, value, the output and two numbers per position and head for backward.
    Gradients of gradients come from `span_offsets`.
    """
    return _SpanTiles.apply(
        query, key, value, rel_pos_h, rel_pos_w, mask, floor, num_heads, mask_padding, scale
    )[0]
