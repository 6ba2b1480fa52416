"""Residual layers on the maps that Gram matrices are made of, all branches at once.

All take the branches' maps side by side, [B, M*G, H, W], and give tokens [M, B*H*W, G].
Letters: B batch, H W map, N = H*W positions, G gram_dim, M branches.
"""

import torch
from timm.layers import DropPath, drop_path
from torch import Tensor, nn

from qna_timm.layers.branches import (
    BranchDepthwiseConv,
    BranchLinear,
    BranchMlp,
    BranchNorm,
    check_divisor,
)
from qna_timm.layers.stripe_attn import StripeAttention

GRAM_LAYERS = ("convnext", "cswin", None)


def branch_tokens(x: Tensor, num_branches: int) -> Tensor:
    """[B, M*G, H, W] -> [M, B*H*W, G]."""
    batch, channels, height, width = x.shape
    dim = channels // num_branches
    x = x.permute(0, 2, 3, 1).reshape(batch * height * width, num_branches, dim)
    return x.transpose(0, 1).contiguous()


class BranchTokens(nn.Module):
    """No layer: the branches' maps as tokens.

    Args:
        num_branches: M.

    Shape: [B, M*G, H, W] -> [M, B*H*W, G].
    """

    def __init__(self, num_branches: int) -> None:
        super().__init__()
        self.num_branches = num_branches

    def forward(self, x: Tensor) -> Tensor:
        return branch_tokens(x, self.num_branches)


class BranchDropPath(DropPath):
    """timm's stochastic depth with a mask of its own for every image of every branch.

    Shape: [M, B*N, G] and B -> [M, B*N, G].
    """

    def forward(self, x: Tensor, batch: int) -> Tensor:
        # here and not by timm's function, since an empty batch cannot divide the length
        if self.drop_prob == 0.0 or not self.training:
            return x
        branches, length, dim = x.shape
        x = x.reshape(branches * batch, length // batch, dim)
        x = drop_path(x, self.drop_prob, self.training, self.scale_by_keep)
        return x.view(branches, length, dim)


class ConvNeXtGramLayer(nn.Module):
    """A ConvNeXt block per branch: x + drop_path(gamma * mlp(norm(conv_dw(x)))).

    conv_dw is 7x7 depthwise, norm has eps 1e-6, the MLP is four times as wide as the map.

    Args:
        dim: G.
        num_branches: M.
        drop_path: Stochastic depth, images and branches apart.
        init_values: Initial gamma.

    Shape: [B, M*G, H, W] -> [M, B*H*W, G].
    """

    def __init__(
        self,
        dim: int,
        num_branches: int,
        drop_path: float = 0.0,
        init_values: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_branches = num_branches
        self.init_values = init_values
        self.conv_dw = BranchDepthwiseConv(dim, num_branches, 7, **dd)
        self.norm = BranchNorm(dim, num_branches, eps=1e-6, **dd)
        self.mlp = BranchMlp(dim, 4 * dim, num_branches, in_turn=True, **dd)
        self.gamma = nn.Parameter(torch.empty(num_branches * dim, **dd))
        self.drop_path = BranchDropPath(drop_path)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial layer scale; other parameters belong to layers of their own."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        shortcut = branch_tokens(x, self.num_branches)
        x = self.conv_dw(shortcut.unflatten(1, (batch, height, width)))
        x = self.mlp(self.norm(x.flatten(1, 3)))
        x = x * self.gamma.view(self.num_branches, 1, -1)
        return self.drop_path(x, batch) + shortcut


class CSWinGramLayer(nn.Module):
    """A CSWin block per branch: x <- x + proj(attn(norm1(x))), x <- x + mlp(norm2(x)).

    The first half of a branch's channels attends in stripes of all the map's height and split_size
    columns, the second half in stripes of split_size rows and all its width; the stripes of all
    branches are attended to together, as further heads.

    Args:
        dim: G.
        num_branches: M.
        num_heads: Heads of a branch, both halves together.
        split_size: Narrow side of the stripes, in positions.
        mlp_groups: Groups of the MLP.
        drop_path: Stochastic depth of both residuals, images and branches apart.

    Shape: [B, M*G, H, W] -> [M, B*H*W, G].

    Raises:
        ValueError: num_heads is odd or does not divide dim, mlp_groups does not divide dim, or
            split_size is below 1.
    """

    def __init__(
        self,
        dim: int,
        num_branches: int,
        num_heads: int = 6,
        split_size: int = 7,
        mlp_groups: int = 1,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_divisor("gram_num_heads", num_heads, 2, gram_dim=dim)
        check_divisor("gram_mlp_groups", mlp_groups, gram_dim=dim)
        if split_size < 1:
            raise ValueError(f"gram_split_size must be at least 1, got {split_size}")
        self.num_branches = num_branches
        self.norm1 = BranchNorm(dim, num_branches, **dd)
        self.qkv = BranchLinear(dim, 3 * dim, num_branches, **dd)
        half, heads = num_branches * dim // 2, num_branches * num_heads // 2
        self.attn = nn.ModuleList(
            StripeAttention(half, heads, stripe, **dd)
            for stripe in ((0, split_size), (split_size, 0))
        )
        self.proj = BranchLinear(dim, dim, num_branches, **dd)
        self.norm2 = BranchNorm(dim, num_branches, **dd)
        self.mlp = BranchMlp(
            dim, 4 * dim, num_branches, mlp_groups, is_conv=mlp_groups > 1, in_turn=True, **dd
        )
        self.drop_path1, self.drop_path2 = BranchDropPath(drop_path), BranchDropPath(drop_path)

    def _attend(self, x: Tensor, batch: int, height: int, width: int) -> Tensor:
        branches, length, dim = x.shape
        # M, B*N, 3*G -> (q k v, half, B, H, W, M*G/2)
        x = self.qkv(x).view(branches, batch, height, width, 3, 2, dim // 2)
        x = x.permute(4, 5, 1, 2, 3, 0, 6).reshape(
            3, 2, batch, height, width, branches * (dim // 2)
        )
        halves = []
        for i, attn in enumerate(self.attn):
            y = attn(x[0, i], x[1, i], x[2, i]).reshape(length, branches, dim // 2)
            halves.append(y)
        return self.proj(torch.cat(halves, dim=2).transpose(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        x = branch_tokens(x, self.num_branches)
        x = x + self.drop_path1(self._attend(self.norm1(x), batch, height, width), batch)
        return x + self.drop_path2(self.mlp(self.norm2(x)), batch)


def create_gram_layer(
    dim: int,
    num_branches: int,
    kind: str | None,
    *,
    num_heads: int,
    split_size: int,
    mlp_groups: int,
    drop_path: float,
    init_values: float,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The layer of a kind of `GRAM_LAYERS`; see the classes for the other arguments."""
    dd = {"device": device, "dtype": dtype}
    if kind == "convnext":
        return ConvNeXtGramLayer(dim, num_branches, drop_path, init_values, **dd)
    if kind == "cswin":
        return CSWinGramLayer(dim, num_branches, num_heads, split_size, mlp_groups, drop_path, **dd)
    return BranchTokens(num_branches)
