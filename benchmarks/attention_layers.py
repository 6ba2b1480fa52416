"""Local attention as layers, projections included: ours and others', at the same window and width.

Each takes maps in the layout it likes. Letters: B batch, H W map, C channels, h heads, d head_dim,
N = H*W tokens, K = k*k offsets of a window of k x k.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from problem import Problem
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

from qna_timm.layers import LearnedQueryAttention, SpanAttention

TILE = 8


class UnfoldAttention(nn.Module):
    """Stand-alone self-attention written plainly: keys and values of every window side by side.

        out[y] = proj(sum_o softmax_o(q[y] . k[y+o] / sqrt(d)) v[y+o])

    Zero-padded; without relative positions, which would cost more. (arXiv:1906.05909, section 2.2.)

    Shape: [B, C, H, W] -> [B, C, H, W].
    """

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)
        self.proj = nn.Conv2d(dim, dim, 1, bias=False)

    def _windows(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, h, d, K, N]."""
        windows = F.unfold(x, self.window, padding=self.window // 2)
        return windows.view(len(x), self.num_heads, -1, self.window**2, windows.shape[2])

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=1)
        query = query.reshape(len(x), self.num_heads, -1, 1, x.shape[2] * x.shape[3])
        query = query * query.shape[2] ** -0.5
        attn = (query * self._windows(key)).sum(dim=2, keepdim=True).softmax(dim=3)
        out = (attn * self._windows(value)).sum(dim=3)  # B, h, d, N
        return self.proj(out.view(x.shape))


class TokenAttention(nn.Module):
    """Projections around an attention function of queries, keys and values [B, H, W, h, d].

    Shape: [B, H, W, C] -> [B, H, W, C].
    """

    def __init__(self, dim: int, num_heads: int, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.num_heads, self.attend = num_heads, attend
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(3, (3, self.num_heads, -1))
        return self.proj(self.attend(*qkv.unbind(3)).flatten(3))


def _to_tiles(x: Tensor) -> Tensor:
    """Tokens of a map [B, H, W, ...], tile by tile: [B, N, ...]."""
    x = x.unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE))
    return x.transpose(2, 3).flatten(1, 4)


def _from_tiles(x: Tensor, size: int) -> Tensor:
    """[B, N, ...] -> [B, H, W, ...], H = W = size."""
    x = x.unflatten(1, (size // TILE, size // TILE, TILE, TILE))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def flex_attend(size: int, window: int, tiled: bool, device: str) -> Callable[..., Tensor]:
    """FlexAttention, compiled, over the tokens that are at most window//2 rows and columns away.

    Args:
        size: H = W.
        window: k.
        tiled: Order the tokens by tiles of 8 x 8, so that more blocks of the mask are empty.
        device: Of the maps.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if tiled and size % TILE:
        raise ValueError(f"a map of {size} does not divide into tiles of {TILE} x {TILE}")
    radius = window // 2

    def place(token: Tensor) -> tuple[Tensor, Tensor]:
        if not tiled:
            return token // size, token % size
        tile, inside = token // TILE**2, token % TILE**2
        per_row = size // TILE
        return (
            tile // per_row * TILE + inside // TILE,
            tile % per_row * TILE + inside % TILE,
        )

    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        (query_y, query_x), (key_y, key_x) = place(query), place(key)
        return ((query_y - key_y).abs() <= radius) & ((query_x - key_x).abs() <= radius)

    mask = create_block_mask(near, None, None, size**2, size**2, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(*qkv: Tensor) -> Tensor:
        tokens = (_to_tiles(x) if tiled else x.flatten(1, 2) for x in qkv)  # B, N, h, d
        out = compiled(*(x.transpose(1, 2) for x in tokens), block_mask=mask).transpose(1, 2)
        return _from_tiles(out, size) if tiled else out.unflatten(1, (size, size))

    return attend


def natten_attend(window: int) -> Callable[..., Tensor]:
    """NATTEN's fused attention, whose windows stay on the map: moved, not cut, at its border."""
    try:
        from natten.functional import na2d
    except ImportError:
        raise ValueError("natten is not installed") from None
    return partial(na2d, kernel_size=(window, window))


def _make_qna(p: Problem, impl: str = "auto") -> nn.Module:
    return LearnedQueryAttention(
        p.channels, p.heads, kernel_size=p.window, num_queries=p.queries, impl=impl
    )


def _make_span(p: Problem, impl: str = "auto") -> nn.Module:
    return SpanAttention(p.channels, p.channels, p.peer_heads, p.window, impl=impl)


def _make_halo(p: Problem) -> nn.Module:
    """Blocks of 8 x 8 queries see the windows of all of them: 8 + 2 (k//2) squared tokens."""
    if p.size % TILE:
        raise ValueError(f"a map of {p.size} does not divide into blocks of {TILE} x {TILE}")
    return HaloAttn(p.channels, num_heads=p.peer_heads, block_size=TILE, halo_size=p.window // 2)


def _make_flex(p: Problem, tiled: bool) -> nn.Module:
    attend = flex_attend(p.size, p.window, tiled, p.device)
    return TokenAttention(p.channels, p.peer_heads, attend)


# name: (maker, whether its maps are [B, C, H, W])
LAYERS: dict[str, tuple[Callable[[Problem], nn.Module], bool]] = {
    "qna": (_make_qna, False),
    "qna-triton": (partial(_make_qna, impl="triton"), False),
    "span": (_make_span, True),
    "span-triton": (partial(_make_span, impl="triton"), True),
    "unfold": (lambda p: UnfoldAttention(p.channels, p.peer_heads, p.window), True),
    "halo": (_make_halo, True),
    "flex": (partial(_make_flex, tiled=False), False),
    "flex-tiled": (partial(_make_flex, tiled=True), False),
    "natten": (
        lambda p: TokenAttention(p.channels, p.peer_heads, natten_attend(p.window)),
        False,
    ),
}


def make_layer(problem: Problem, name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A layer by name, in training mode, and its input's shape."""
    torch.manual_seed(0)
    maker, channels_first = LAYERS[name]
    p = problem
    layer = maker(p).to(p.device, p.dtype).train()
    sides = (p.size, p.size)
    return layer, (p.batch, p.channels, *sides) if channels_first else (p.batch, *sides, p.channels)


def make_call(problem: Problem, name: str, mode: str) -> Callable[[], object]:
    """The call to measure: a forward pass without gradients, or one with all gradients.

    Args:
        problem: Sizes.
        name: One of `LAYERS`.
        mode: "forward" or "step".
    """
    layer, shape = make_layer(problem, name)
    factory = {"device": problem.device, "dtype": problem.dtype}
    x = torch.randn(shape, **factory)
    if mode == "forward":
        call = torch.no_grad()(lambda: layer(x))
    else:
        grad = torch.randn(shape, **factory)
        inputs = (x.requires_grad_(), *layer.parameters())

        def call() -> tuple[Tensor, ...]:
            return torch.autograd.grad(layer(x), inputs, grad)

    if name.startswith("flex"):
        call()  # compiles now, not in the time that is measured
    return call
