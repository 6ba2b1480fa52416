"""Gramian attention heads: several classifiers on one map, computed together.

"Gramian Attention Heads are Strong yet Efficient Vision Learners", ICCV 2023,
https://arxiv.org/abs/2310.16483.
Letters: B batch, H W map, N = H*W positions, D channels, G gram_dim, T = G(G+1)/2, M branches,
e attn_dim.
"""

import torch
from timm.layers import get_device_dtype, register_notrace_function
from torch import Tensor, nn

from qna_timm.layers.batch_norm import SmallBatchNorm2d
from qna_timm.layers.branches import (
    BranchClassifier,
    BranchConv1x1,
    BranchDepthwiseConv,
    BranchLinear,
    BranchMlp,
    BranchNorm,
    BranchScale,
    check_divisor,
    init_layer,
)
from qna_timm.layers.called import must_be_called
from qna_timm.layers.gram_layer import GRAM_LAYERS, create_gram_layer
from qna_timm.ops.gramian import (
    attend_by_keys,
    class_attention,
    gram_triangle,
    triangle_index,
)

# dtypes and autocast decide inside; FX takes each as one node
register_notrace_function(attend_by_keys)
register_notrace_function(class_attention)
register_notrace_function(gram_triangle)

CONV_INITS = ("trunc_normal", "default")


class BranchClassAttention(nn.Module):
    """CaiT's class-attention block with layer scale, a token per branch:

        t <- t + ls1(proj(attn(norm1([t, x]))))
        t <- t + ls2(mlp(norm2(t)))

    where the token is the only query and attends to itself and to all positions; the map x is the
    same for all branches and stays as it is.

    Args:
        dim: D.
        num_branches: M.
        attn_dim: e.
        num_heads: Attention heads, a divisor of e.
        mlp_ratio: Hidden width of the MLP over D.
        mlp_groups: Groups of the MLP.
        init_values: Initial layer scale.

    Shape: tokens [M, B, D] and x [B, N, D] -> [M, B, D].
    """

    def __init__(
        self,
        dim: int,
        num_branches: int,
        attn_dim: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        mlp_groups: int = 4,
        init_values: float = 1e-4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = int(dim * mlp_ratio)
        check_divisor("num_heads", num_heads, attn_dim=attn_dim)
        check_divisor("mlp_groups", mlp_groups, in_features=dim, hidden_features=hidden)
        self.num_heads = num_heads
        self.num_branches = num_branches
        self.norm1 = BranchNorm(dim, num_branches, **dd)
        self.q = BranchLinear(dim, attn_dim, num_branches, bias=False, **dd)
        self.k = BranchLinear(dim, attn_dim, num_branches, bias=False, **dd)
        self.v = BranchLinear(dim, attn_dim, num_branches, bias=False, **dd)
        self.proj = BranchLinear(attn_dim, dim, num_branches, **dd)
        self.ls1 = BranchScale(dim, num_branches, init_values, **dd)
        self.norm2 = BranchNorm(dim, num_branches, **dd)
        self.mlp = BranchMlp(dim, hidden, num_branches, mlp_groups, is_conv=True, **dd)
        self.ls2 = BranchScale(dim, num_branches, init_values, **dd)

    def _has_plain_layers(self) -> bool:
        """Whether nothing is hooked on, or in the place of, the layers that are folded."""
        layers = ((self.norm1, BranchNorm), (self.k, BranchLinear), (self.v, BranchLinear))
        return not any(must_be_called(layer, (kind,)) for layer, kind in layers)

    def _attend_by_layers(self, token: Tensor, x: Tensor) -> Tensor:
        batch, positions, dim = x.shape
        # M, B, 1+N, D
        both = torch.cat([token[:, :, None], x.expand(self.num_branches, -1, -1, -1)], dim=2)
        both = self.norm1(both.flatten(1, 2))
        key, value = [f(both).unflatten(1, (batch, 1 + positions)) for f in (self.k, self.v)]
        own = both.view(-1, batch, 1 + positions, dim)[:, :, 0]
        return attend_by_keys(self.q(own), key, value, self.num_heads)

    def _attend(self, token: Tensor, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 - its compiler skips no half of a condition
            if not self._has_plain_layers():
                return self._attend_by_layers(token, x)
        own = self.norm1.standardize(token)
        return class_attention(
            self.q(self.norm1.affine(own)),
            self.norm1.standardize(x),
            own,
            self.k.weight,
            self.v.weight,
            self.norm1.weight,
            self.norm1.bias,
            self.num_heads,
        )

    def forward(self, token: Tensor, x: Tensor) -> Tensor:
        token = token + self.ls1(self.proj(self._attend(token, x)))
        return token + self.ls2(self.mlp(self.norm2(token)))


class GramianHead(nn.Module):
    """Class tokens from Gram matrices of a map, attention of each to the map, and classifiers.

    Each of M branches computes, on the same map x,

        f = gram_layer(norm(gram_proj(x)))                 [G, H, W]
        t = norm(gram_embed(triu(f f^T) / |triu(f f^T)|))  [D], its class token
        t = block(t, x)                                    class attention, see BranchClassAttention
        logits = fc(t)

    and all branches are computed at once. The Gram matrix is float32 whatever the rest is; a batch
    of one image trains, its token's batch norm then uses its running statistics.

    Args:
        in_features: D.
        num_classes: Classes; 0 for the tokens, [B, M * D].
        num_branches: M.
        gram_dim: G.
        proj_groups: Groups of gram_proj, a divisor of D and G.
        embed_groups: Groups of gram_embed, a divisor of T and D; a group of channels sees its run
            of the triangle only.
        gram_layer: Residual layer before the Gram matrix: 'convnext', 'cswin' or None.
        attn_dim: Width e of the class attention; D // 4 rounded down to a multiple of num_heads if
            None.
        num_heads: Heads of the class attention.
        mlp_ratio: Hidden width of its MLP over D.
        mlp_groups: Groups of that MLP.
        gram_mlp_groups: Groups of the MLP in a 'cswin' gram_layer.
        gram_num_heads: Heads in a 'cswin' gram_layer, an even divisor of G.
        gram_split_size: Width of its stripes, in positions.
        drop_rate: Dropout of the tokens before the classifiers.
        drop_path: Stochastic depth of the gram_layer.
        init_values: Initial layer scale of the class attention.
        gram_init_values: Initial layer scale of a 'convnext' gram_layer.
        global_pool: 'gram'; or '' (without classes) for the map as it is: no branches.

    Shape: [B, D, H, W], any H and W -> [B, num_classes], the mean of the branches, or, while
    `branch_outputs` is set, [B, M, num_classes], in training and evaluation alike.

    Raises:
        ValueError: widths and groups that do not go together, or unknown gram_layer or
            global_pool.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_branches: int = 5,
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
        drop_rate: float = 0.0,
        drop_path: float = 0.0,
        init_values: float = 1e-4,
        gram_init_values: float = 1e-6,
        *,
        global_pool: str = "gram",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        triangle = gram_dim * (gram_dim + 1) // 2
        _check_sizes(in_features=in_features, num_branches=num_branches, gram_dim=gram_dim)
        check_divisor("proj_groups", proj_groups, in_features=in_features, gram_dim=gram_dim)
        check_divisor("embed_groups", embed_groups, triangle=triangle, in_features=in_features)
        if gram_layer not in GRAM_LAYERS:
            raise ValueError(f"gram_layer must be one of {GRAM_LAYERS}, got {gram_layer!r}")
        _check_sizes(num_heads=num_heads)
        if attn_dim is None:
            attn_dim = in_features // 4 // num_heads * num_heads
            if attn_dim == 0:
                raise ValueError(
                    f"num_heads must be 1 to {in_features // 4} for in_features={in_features},"
                    f" or attn_dim be given; got {num_heads}"
                )
        _check_sizes(attn_dim=attn_dim)

        self.in_features = in_features
        self.num_branches = num_branches
        self.gram_dim = gram_dim
        self.branch_outputs = False
        self.proj_groups, self.embed_groups = proj_groups, embed_groups
        self.gram_layer_args = {
            "kind": gram_layer,
            "num_heads": gram_num_heads,
            "split_size": gram_split_size,
            "mlp_groups": gram_mlp_groups,
            "drop_path": drop_path,
            "init_values": gram_init_values,
        }
        self.block_args = {
            "attn_dim": attn_dim,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "mlp_groups": mlp_groups,
            "init_values": init_values,
        }
        self.num_features = num_branches * in_features
        self._build_branches(**dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = nn.Identity()
        self.conv_init = CONV_INITS[0]
        index = torch.empty(triangle, dtype=torch.int64, device=device)
        self.register_buffer("triangle", index, persistent=False)
        self.global_pool = "gram"
        self.reset(num_classes, global_pool)
        self.init_weights()

    @torch.jit.ignore
    def _build_branches(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        features, branches, gram_dim = self.in_features, self.num_branches, self.gram_dim
        triangle = gram_dim * (gram_dim + 1) // 2
        self.gram_proj: nn.Module | None
        self.gram_proj = BranchConv1x1(features, gram_dim, branches, self.proj_groups, **dd)
        self.gram_proj_norm: nn.Module | None = SmallBatchNorm2d(branches * gram_dim, **dd)
        self.gram_layer: nn.Module | None
        self.gram_layer = create_gram_layer(gram_dim, branches, **self.gram_layer_args, **dd)
        self.gram_embed: nn.Module | None
        self.gram_embed = BranchLinear(
            triangle, features, branches, self.embed_groups, is_conv=True, **dd
        )
        self.gram_embed_norm: nn.Module | None = SmallBatchNorm2d(branches * features, **dd)
        self.block: nn.Module | None
        self.block = BranchClassAttention(features, branches, **self.block_args, **dd)

    def init_weights(self, conv_init: str = "trunc_normal") -> None:
        """Set every parameter and buffer, also after `to_empty`.

        Weights are truncated normal (std 0.02), biases 0, norms 1 and 0.

        Args:
            conv_init: What the convolutions of the released code get: 'trunc_normal', as all else
                (its ConvNeXt models), or 'default', PyTorch's initialisation (its CSWin models).
                They are gram_proj, gram_embed, grouped MLPs, the class attention's MLP and
                depthwise convolutions.

        Raises:
            ValueError: an unknown conv_init.
        """
        if conv_init not in CONV_INITS:
            raise ValueError(f"conv_init must be one of {CONV_INITS}, got {conv_init!r}")
        self.conv_init = conv_init
        for module in self.modules():
            if isinstance(module, BranchConv1x1 | BranchDepthwiseConv | BranchLinear):
                module.reset_parameters(conv_init)
            elif isinstance(module, nn.Conv2d):
                init_layer(module.weight, module.bias, conv_init)
            elif module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.init_non_persistent_buffers()

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Positions of the triangle in a flattened Gram matrix."""
        # where the parameters are: a head that was built on meta and given some has it there still
        device = next(self.parameters(), self.triangle).device
        self.triangle = triangle_index(self.gram_dim, device)

    @torch.jit.ignore
    def reset(
        self,
        num_classes: int,
        global_pool: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Replace the classifiers.

        Args:
            num_classes: Classes; 0 for none.
            global_pool: 'gram', or '', which removes the branches; the current one if None, but
                'gram' for classes. Branches that were removed come back fresh.
            device: Of the new parameters; where the others are if None.
            dtype: Likewise.

        Raises:
            ValueError: classes without branches, or an unknown pooling.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if global_pool is None and num_classes > 0:
            pool = "gram"
        if pool not in ("gram", ""):
            raise ValueError(f"global_pool must be 'gram' or '' (no pooling), got {pool!r}")
        if pool == "" and num_classes > 0:
            raise ValueError(f"global_pool='' needs num_classes=0, got {num_classes}")
        dd = get_device_dtype(self, device=device, dtype=dtype)
        self.fc = nn.Identity()
        if num_classes > 0:
            self.fc = BranchClassifier(self.in_features, num_classes, self.num_branches, **dd)
        self.fc.train(self.training)
        if pool == "":
            self.gram_proj = self.gram_proj_norm = self.gram_layer = None
            self.gram_embed = self.gram_embed_norm = self.block = None
            self.num_features = self.in_features
        elif self.block is None:
            self._build_branches(**dd)
            self.train(self.training)
            self.init_weights(self.conv_init)
            self.num_features = self.num_branches * self.in_features
        self.num_classes = num_classes
        self.global_pool = pool

    def _tokens(self, x: Tensor) -> Tensor:
        """Every branch's token after class attention: [B, D, H, W] -> [M, B, D]."""
        batch, _, height, width = x.shape
        branches = self.num_branches
        # channels-last; not contiguous(memory_format=...), which vmap does not know
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        f = self.gram_layer(self.gram_proj_norm(self.gram_proj(x)))
        f = f.view(branches, batch, height * width, self.gram_dim)
        token = self.gram_embed(gram_triangle(f, self.triangle, height).to(f.dtype))
        # M, B, D -> B, M*D, 1, 1 and back
        token = token.transpose(0, 1).reshape(batch, branches * self.in_features, 1, 1)
        token = self.gram_embed_norm(token).view(batch, branches, self.in_features).transpose(0, 1)
        return self.block(token, x.flatten(2).transpose(1, 2))

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.block is None:
            return x
        else:  # TorchScript skips an else branch, not code after a return
            tokens = self._tokens(x)
            if pre_logits or self.num_classes <= 0:
                return tokens.transpose(0, 1).flatten(1)
            logits = self.fc(self.head_drop(tokens))  # M, B, classes
            if self.branch_outputs:
                return logits.transpose(0, 1)
            return logits.mean(dim=0)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_branches={self.num_branches}, "
            f"gram_dim={self.gram_dim}, global_pool={self.global_pool!r}"
        )


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
