"""Gramian heads written plainly, one branch after the other: what `GramianHead` must compute.

Each branch has modules of its own; the Gram matrix is float64 while training with fewer than 128
images, its triangle is picked with an index held in numpy, and keys and values are projections of
all tokens. Parameters have the names that `GramianHead` gives them, one branch's share each.

Letters: B batch, H W map, N = H*W positions, D channels, G gram_dim, M branches, e attn_dim.
"""

from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn


class GroupedMlp(nn.Module):
    """Two 1x1 convolutions in groups; hidden channel a*groups + b goes to b*(hidden/groups) + a."""

    def __init__(self, dim: int, hidden: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.fc1 = nn.Conv2d(dim, hidden, 1, groups=groups)
        self.fc2 = nn.Conv2d(hidden, dim, 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, N, dim]."""
        x = self.fc1(x.transpose(1, 2)[..., None])
        batch, hidden, length, _ = x.shape
        x = x.view(batch, hidden // self.groups, self.groups, length, 1).transpose(1, 2)
        x = self.fc2(F.gelu(x.reshape(batch, hidden, length, 1)))
        return x.flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """Two linear maps with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Scale(nn.Module):
    """Layer scale."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x


class ConvNeXtLayer(nn.Module):
    """A ConvNeXt block on [B, G, H, W]."""

    def __init__(self, dim: int, drop_path: float, init_values: float) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma = nn.Parameter(torch.full((dim,), init_values))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        y = (self.gamma * self.mlp(y)).permute(0, 3, 1, 2)
        return x + self.drop_path(y)


class Stripes(nn.Module):
    """Multi-head attention inside windows, plus a depthwise convolution of the values (LePE)."""

    def __init__(self, dim: int, num_heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Three [B, H, W, dim] -> [B, H, W, dim], window after window."""
        height, width = q.shape[1:3]
        rows, cols = (side or full for side, full in zip(self.window, (height, width), strict=True))
        out = torch.empty_like(q)
        for top in range(0, height, rows):
            for left in range(0, width, cols):
                part = (slice(None), slice(top, top + rows), slice(left, left + cols))
                out[part] = self._window(q[part], k[part], v[part])
        return out

    def _window(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lepe = self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        # B, y, x, h*d -> B, h, y*x, d
        q, k, v = (
            t.flatten(1, 2).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v)
        )
        attn = (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(dim=3)
        return (attn @ v).transpose(1, 2).reshape(lepe.shape) + lepe


class CSWinLayer(nn.Module):
    """A CSWin block on [B, G, H, W]: one half of the channels in stripes of each direction."""

    def __init__(
        self, dim: int, num_heads: int, split_size: int, mlp_groups: int, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        windows = ((0, split_size), (split_size, 0))
        self.attn = nn.ModuleList(Stripes(dim // 2, num_heads // 2, window) for window in windows)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim) if mlp_groups == 1 else GroupedMlp(dim, 4 * dim, mlp_groups)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        halves = zip(*(t.chunk(2, dim=3) for t in self.qkv(self.norm1(x)).chunk(3, 3)), strict=True)
        y = [attn(*half) for attn, half in zip(self.attn, halves, strict=True)]
        x = x + self.drop_path(self.proj(torch.cat(y, dim=3)))
        y = self.mlp(self.norm2(x).flatten(1, 2)).reshape(x.shape)
        return (x + self.drop_path(y)).permute(0, 3, 1, 2)


class ClassAttention(nn.Module):
    """CaiT's class-attention block: the token attends to itself and all positions."""

    def __init__(
        self, dim: int, attn_dim: int, num_heads: int, mlp_ratio: float, mlp_groups: int
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (attn_dim // num_heads) ** -0.5
        self.norm1 = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, attn_dim, bias=False)
        self.k = nn.Linear(dim, attn_dim, bias=False)
        self.v = nn.Linear(dim, attn_dim, bias=False)
        self.proj = nn.Linear(attn_dim, dim)
        self.ls1 = Scale(dim, 1e-4)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = GroupedMlp(dim, int(dim * mlp_ratio), mlp_groups)
        self.ls2 = Scale(dim, 1e-4)

    def forward(self, token: Tensor, x: Tensor) -> Tensor:
        """[B, 1, D] and [B, N, D] -> [B, 1, D]."""
        u = self.norm1(torch.cat([token, x], dim=1))
        # B, N+1, e -> B, h, N+1, d
        q, k, v = (
            linear(part).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for linear, part in ((self.q, u[:, :1]), (self.k, u), (self.v, u))
        )
        attn = (q * self.scale @ k.transpose(2, 3)).softmax(dim=3)
        y = (attn @ v).transpose(1, 2).flatten(2)
        token = token + self.ls1(self.proj(y))
        return token + self.ls2(self.mlp(self.norm2(token)))


class GramToken(nn.Module):
    """Upper triangle of F F^T, normalised: [B, G, H, W] -> [B, T, 1, 1]."""

    def __init__(self, gram_dim: int) -> None:
        super().__init__()
        index = np.arange(gram_dim**2).reshape(gram_dim, gram_dim)
        self.index = index[np.triu_indices(gram_dim)].astype(np.float64)

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        height, positions = x.shape[2], x.shape[2] * x.shape[3]
        x = x.flatten(2) / height
        if self.training and len(x) < 128:
            x = x.double()
        gram = (torch.bmm(x, x.transpose(1, 2)) / positions).to(dtype).flatten(1)
        triangle = F.normalize(gram[:, self.index.astype(np.int64)])
        return triangle.to(torch.promote_types(dtype, torch.float32))[..., None, None]


def branch(
    in_features: int,
    num_classes: int,
    gram_dim: int = 192,
    proj_groups: int = 1,
    embed_groups: int = 8,
    gram_layer: str | None = "convnext",
    attn_dim: int | None = None,
    num_heads: int = 8,
    mlp_ratio: float = 4.0,
    mlp_groups: int = 4,
    gram_mlp_groups: int = 1,
    gram_num_heads: int = 6,
    gram_split_size: int = 7,
    drop_path: float = 0.0,
) -> nn.ModuleDict:
    """One branch's modules, by `GramianHead`'s names."""
    triangle = gram_dim * (gram_dim + 1) // 2
    attn_dim = attn_dim or in_features // 4 // num_heads * num_heads
    layers = {
        None: nn.Identity,
        "convnext": lambda: ConvNeXtLayer(gram_dim, drop_path, 1e-6),
        "cswin": lambda: CSWinLayer(
            gram_dim, gram_num_heads, gram_split_size, gram_mlp_groups, drop_path
        ),
    }
    return nn.ModuleDict(
        OrderedDict(
            gram_proj=nn.Conv2d(in_features, gram_dim, 1, groups=proj_groups),
            gram_proj_norm=nn.BatchNorm2d(gram_dim),
            gram_layer=layers[gram_layer](),
            gram=GramToken(gram_dim),
            gram_embed=nn.Conv2d(triangle, in_features, 1, groups=embed_groups),
            gram_embed_norm=nn.BatchNorm2d(in_features),
            block=ClassAttention(in_features, attn_dim, num_heads, mlp_ratio, mlp_groups),
            fc=nn.Linear(in_features, num_classes),
        )
    )


class ReferenceHead(nn.Module):
    """All branches in turn: [B, D, H, W] -> a list of [B, classes]."""

    def __init__(self, in_features: int, num_classes: int, num_branches: int = 5, **kwargs) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            branch(in_features, num_classes, **kwargs) for _ in range(num_branches)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self._branch(part, x) for part in self.branches]

    @staticmethod
    def _branch(part: nn.ModuleDict, x: Tensor) -> Tensor:
        y = part["gram_layer"](part["gram_proj_norm"](part["gram_proj"](x)))
        token = part["gram_embed_norm"](part["gram_embed"](part["gram"](y)))
        token = part["block"](token.flatten(2).transpose(1, 2), x.flatten(2).transpose(1, 2))
        return part["fc"](token[:, 0])

    def load_stacked(self, state: dict[str, Tensor]) -> None:
        """Take the parameters of a `GramianHead`, where branches are stacked on the first axis."""
        count = len(self.branches)
        for i, part in enumerate(self.branches):
            own = part.state_dict()
            part.load_state_dict(
                {
                    name: state[name]
                    if value.dim() == 0
                    else state[name].unflatten(0, (count, -1))[i].reshape(value.shape)
                    for name, value in own.items()
                }
            )
