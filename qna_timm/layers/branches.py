"""Layers of several branches at once: same shape, weights of their own.

A weight holds the branches' weights stacked on its first axis, [M*out, in/groups], as if it were
one wide grouped map, and vectors are [M*dim]: weight decay filters, fan-in initialisations and
unit-wise clipping see what they expect. Tokens are branch-first, [M, L, dim].

Letters: M branches, L tokens of a branch, B batch, H W map.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, trunc_normal_
from torch import Tensor, nn

from qna_timm.layers.called import must_be_called
from qna_timm.ops.branches import part_linear

register_notrace_function(part_linear)  # has a gradient of its own; FX takes it as one node


def check_divisor(name: str, value: int, step: int = 1, **sizes: int) -> None:
    """Raise ValueError, with the divisors that would do, unless value divides all sizes.

    Args:
        name: The argument.
        value: What it was given.
        step: What it has to be a multiple of: 2 for even divisors.
        sizes: What it has to divide, by name.
    """
    common = math.gcd(*sizes.values())
    if value >= 1 and common >= 1 and value % step == 0 and common % value == 0:
        return
    wholes = " and ".join(f"{key}={size}" for key, size in sizes.items())
    divisors = [str(n) for n in range(step, common + 1, step) if common % n == 0]
    allowed = f"one of {', '.join(divisors)}" if divisors else "nothing does"
    multiple = f"be a multiple of {step} and " if step > 1 else ""
    raise ValueError(f"{name} must {multiple}divide {wholes}: {allowed}; got {value}")


def init_layer(weight: Tensor, bias: Tensor | None, conv_init: str) -> None:
    """Truncated normal with zero bias, or ('default') PyTorch's own."""
    if conv_init == "trunc_normal":
        trunc_normal_(weight, std=0.02)
        if bias is not None:
            nn.init.zeros_(bias)
        return
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    if bias is not None:
        bound = weight[0].numel() ** -0.5  # of the fan-in
        nn.init.uniform_(bias, -bound, bound)


class BranchConv1x1(nn.Module):
    """A 1x1 convolution per branch, on the same map: y_m = weight_m x + bias_m.

    Args:
        in_features: Channels of the map.
        out_features: Channels of each branch.
        num_branches: M.
        groups: Groups of the convolution, a divisor of both.

    Shape: [B, in_features, H, W] -> [B, M * out_features, H, W].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_branches: int,
        groups: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_branches = num_branches
        self.groups = groups
        shape = (num_branches * out_features, in_features // groups, 1, 1)
        self.weight = nn.Parameter(torch.empty(shape, **dd))
        self.bias = nn.Parameter(torch.empty(shape[0], **dd))
        self.reset_parameters()

    def reset_parameters(self, conv_init: str = "trunc_normal") -> None:
        """See `GramianHead.init_weights`."""
        init_layer(self.weight, self.bias, conv_init)

    def _swap(self, x: Tensor, outer: int, inner: int) -> Tensor:
        """Channels by (outer, inner) to (inner, outer)."""
        return x.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.groups == 1:  # a linear map of channels-last maps
            x = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
            return x.permute(0, 3, 1, 2)
        # One convolution of all branches has its groups outside: swap branches and groups of its
        # weight, and back in what comes out.
        weight = self._swap(self.weight, self.num_branches, self.groups)
        bias = self._swap(self.bias, self.num_branches, self.groups)
        x = F.conv2d(x, weight, bias, groups=self.groups)
        return x.unflatten(1, (self.groups, self.num_branches, -1)).transpose(1, 2).flatten(1, 3)

    def extra_repr(self) -> str:
        out_features = self.weight.shape[0] // self.num_branches
        return (
            f"{self.weight.shape[1] * self.groups}, {out_features}, "
            f"num_branches={self.num_branches}, groups={self.groups}"
        )


class BranchDepthwiseConv(nn.Module):
    """A depthwise convolution per branch, zero-padded to keep the map's size.

    Computed a branch at a time: PyTorch's weight gradient of a channels-last map takes twice as
    long per channel where the map is five times as wide.

    Args:
        dim: Channels of a branch.
        num_branches: M.
        kernel_size: Side of the window, odd.

    Shape: [M, B, H, W, dim] -> the same.
    """

    def __init__(
        self,
        dim: int,
        num_branches: int,
        kernel_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dim = dim
        self.num_branches = num_branches
        self.padding = kernel_size // 2
        shape = (num_branches * dim, 1, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, **dd))
        self.bias = nn.Parameter(torch.empty(shape[0], **dd))
        self.reset_parameters()

    def reset_parameters(self, conv_init: str = "trunc_normal") -> None:
        """See `GramianHead.init_weights`."""
        init_layer(self.weight, self.bias, conv_init)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.unflatten(0, (self.num_branches, self.dim)).unbind(0)
        bias = self.bias.view(self.num_branches, self.dim).unbind(0)
        parts = x.permute(0, 1, 4, 2, 3).unbind(0)
        out = []
        for i in range(self.num_branches):
            y = F.conv2d(parts[i], weight[i], bias[i], padding=self.padding, groups=self.dim)
            out.append(y.permute(0, 2, 3, 1))
        return torch.stack(out)

    def extra_repr(self) -> str:
        return f"{self.dim}, num_branches={self.num_branches}, kernel_size={2 * self.padding + 1}"


class BranchLinear(nn.Module):
    """A linear map per branch, in groups of channels: y_m = weight_m x_m + bias_m.

    Args:
        in_features: Channels of a token.
        out_features: Channels that come out.
        num_branches: M.
        groups: Groups of channels that see only each other, a divisor of both.
        bias: Learn a bias.
        is_conv: The released code has a convolution here, which matters to its initialisation.

    Shape: [M, L, in_features] -> [M, L, out_features].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_branches: int,
        groups: int = 1,
        bias: bool = True,
        is_conv: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_branches = num_branches
        self.groups = groups
        self.is_conv = is_conv
        shape = (num_branches * out_features, in_features // groups)
        self.weight = nn.Parameter(torch.empty(shape, **dd))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[0], **dd))
        self.reset_parameters()

    def reset_parameters(self, conv_init: str = "trunc_normal") -> None:
        """See `GramianHead.init_weights`."""
        init_layer(self.weight, self.bias, conv_init if self.is_conv else "trunc_normal")

    def of_branches(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weight [out, in] and bias [out] of every branch, of a map with bias, without groups."""
        weight, bias = self.weight.unflatten(0, (self.num_branches, -1)), self.bias
        assert bias is not None
        return weight.unbind(0), bias.view(self.num_branches, -1).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.num_branches * self.groups
        if self.groups > 1:  # M, L, groups*in -> M*groups, L, in
            x = x.unflatten(2, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        weight = self.weight.view(parts, -1, self.weight.shape[1])
        bias: Tensor | None = None
        if self.bias is not None:
            bias = self.bias.view(parts, -1)
        x = part_linear(x, weight, bias)
        if self.groups > 1:  # M*groups, L, out -> M, L, groups*out
            x = x.unflatten(0, (self.num_branches, self.groups)).transpose(1, 2).flatten(2)
        return x

    def extra_repr(self) -> str:
        out_features = self.weight.shape[0] // self.num_branches
        return (
            f"{self.weight.shape[1] * self.groups}, {out_features}, "
            f"num_branches={self.num_branches}, groups={self.groups}, bias={self.bias is not None}"
        )


class BranchNorm(nn.Module):
    """A layer norm per branch: [M, L, dim] -> the same.

    Args:
        dim: Channels.
        num_branches: M.
        eps: Added to the variance.
    """

    def __init__(
        self,
        dim: int,
        num_branches: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_branches = num_branches
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(num_branches * dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_branches * dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ones and zeros."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def standardize(self, x: Tensor) -> Tensor:
        """Mean 0 and variance 1 over the last axis, without weight and bias."""
        return F.layer_norm(x, (self.dim,), None, None, self.eps)

    def affine(self, x: Tensor) -> Tensor:
        """The norm of what `standardize` returned."""
        shape = (self.num_branches, 1, self.dim)
        return torch.addcmul(self.bias.view(shape), x, self.weight.view(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.affine(self.standardize(x))

    def extra_repr(self) -> str:
        return f"{self.dim}, num_branches={self.num_branches}, eps={self.eps}"


class BranchScale(nn.Module):
    """Layer scale of each branch: [M, L, dim] -> gamma_m * x_m.

    Args:
        dim: Channels.
        num_branches: M.
        init_values: Initial gamma.
    """

    def __init__(
        self,
        dim: int,
        num_branches: int,
        init_values: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_branches = num_branches
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(num_branches * dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial value everywhere."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.view(self.num_branches, 1, -1)

    def extra_repr(self) -> str:
        return f"num_branches={self.num_branches}, init_values={self.init_values}"


class BranchMlp(nn.Module):
    """Two linear maps per branch with an exact GELU between them, optionally in groups.

    Between grouped maps channels are shuffled: hidden channel a*groups + b goes to
    b*(hidden/groups) + a, so that every output group sees all hidden groups.

    Args:
        dim: Channels.
        hidden: Channels between the maps.
        num_branches: M.
        groups: Groups of both maps, a divisor of dim and hidden.
        is_conv: See `BranchLinear`.
        in_turn: Compute branch after branch (maps without groups only), so that one branch's hidden
            channels stay in a processor's cache: the head's forward pass takes 0.65 of the time.

    Shape: [M, L, dim] -> the same.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_branches: int,
        groups: int = 1,
        is_conv: bool = False,
        in_turn: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kwargs = dict(groups=groups, is_conv=is_conv, device=device, dtype=dtype)
        self.num_branches, self.groups = num_branches, groups
        self.in_turn = in_turn and groups == 1
        self.fc1 = BranchLinear(dim, hidden, num_branches, **kwargs)
        self.act = nn.GELU()
        self.fc2 = BranchLinear(hidden, dim, num_branches, **kwargs)

    def _forward_in_turn(self, x: Tensor) -> Tensor:
        parts = x.unbind(0)
        weights, biases = self.fc1.of_branches()
        out_weights, out_biases = self.fc2.of_branches()
        out = []
        for i in range(self.num_branches):
            hidden = self.act(F.linear(parts[i], weights[i], biases[i]))
            out.append(F.linear(hidden, out_weights[i], out_biases[i]))
        return torch.stack(out)

    def _has_plain_layers(self) -> bool:
        """Whether nothing is hooked on, or in the place of, the linear maps."""
        return not any(must_be_called(layer, (BranchLinear,)) for layer in (self.fc1, self.fc2))

    def forward(self, x: Tensor) -> Tensor:
        in_turn = self.in_turn
        if not torch.jit.is_scripting():
            in_turn = in_turn and self._has_plain_layers()
        if in_turn:
            return self._forward_in_turn(x)
        x = self.act(self.fc1(x))
        if self.groups > 1:
            x = x.unflatten(2, (-1, self.groups)).transpose(2, 3).flatten(2)
        return self.fc2(x)


class BranchClassifier(nn.Module):
    """A classifier per branch: logits_m = weight_m token_m + bias_m.

    Args:
        in_features: Channels D of a token.
        num_classes: Classes.
        num_branches: M.

    Shape: [M, B, D] -> [M, B, num_classes]. weight is [M, num_classes, D], bias [M, num_classes].
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_branches: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_branches, num_classes, in_features, **dd))
        self.bias = nn.Parameter(torch.empty(num_branches, num_classes, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights, zero biases."""
        trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return part_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        branches, classes, in_features = self.weight.shape
        return f"{in_features}, {classes}, num_branches={branches}"
