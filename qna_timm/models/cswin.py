"""CSWin Transformer, a hierarchical vision transformer with cross-shaped windows.

Paper: "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped Windows",
CVPR 2022, https://arxiv.org/abs/2107.00652
Released code and checkpoints: https://github.com/microsoft/CSWin-Transformer (MIT licence);
`checkpoint_filter_fn` reads its files, such as cswin_tiny_224.pth.

Letters: B batch, H W map, C channels.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    calculate_drop_path_rates,
    get_act_layer,
    get_device_dtype,
    get_norm_layer,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    named_apply,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from qna_timm.convert.cswin import cswin_state_dict
from qna_timm.layers.cswin_block import CSWinBlock

__all__ = ["CSWin", "CSWinStage"]

STEM_REDUCTION = 4


class ConvNorm(nn.Module):
    """Convolution, norm over channels, activation.

    [B, H, W, C], or [B, C, H, W] with from_nchw, to a map [B, H', W', C'].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        stride: int,
        padding: int,
        norm_layer: Callable[..., nn.Module],
        act_layer: Callable[..., nn.Module] = nn.Identity,
        bias: bool = True,
        from_nchw: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.from_nchw = from_nchw
        self.conv = nn.Conv2d(
            in_features, out_features, kernel_size, stride, padding, bias=bias, **dd
        )
        self.norm = norm_layer(out_features, **dd)
        self.act = act_layer()

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.from_nchw else x.permute(0, 3, 1, 2)
        return self.act(self.norm(self.conv(x).permute(0, 2, 3, 1)))


def _stem(
    stem_type: str,
    in_chans: int,
    width: int,
    dim: int,
    norm_layer: Callable[..., nn.Module],
    act_layer: Callable[..., nn.Module],
    dd: dict[str, Any],
) -> nn.Sequential:
    if stem_type == "patch":
        return nn.Sequential(ConvNorm(in_chans, dim, 7, 4, 2, norm_layer, from_nchw=True, **dd))
    if stem_type == "deep":
        conv = partial(ConvNorm, kernel_size=3, padding=1, norm_layer=norm_layer, bias=False, **dd)
        return nn.Sequential(
            conv(in_chans, width, stride=2, act_layer=act_layer, from_nchw=True),
            conv(width, width, stride=1, act_layer=act_layer),
            conv(width, dim, stride=2),
        )
    raise ValueError(f"stem_type must be 'patch' or 'deep', got {stem_type!r}")


class CSWinStage(nn.Module):
    """A strided convolution (but in the first stage), then blocks, on maps [B, H, W, C]."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[CSWinBlock]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward_taps(self, x: Tensor, positions: list[int]) -> list[Tensor]:
        """The outputs of some blocks and, last, of the stage.

        Args:
            x: The map before.
            positions: Blocks counted from 1, ascending.
        """
        x = self.downsample(x)
        taps: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
            if i + 1 in positions:
                taps.append(x)
        taps.append(x)
        return taps

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_taps(x, [])[-1]


DIMS = (64, 128, 256, 512)  # of the tiny and the small network


def check_per_stage(**values: Sequence[int]) -> None:
    """Raise ValueError unless each argument has a positive number for each stage, as dims has."""
    stages = len(values["dims"])
    for name, numbers in values.items():
        if len(numbers) != stages or min(numbers, default=0) < 1:
            raise ValueError(
                f"{name} must be a number of at least 1 for each of {stages} stages, got {numbers}"
            )


class CSWin(nn.Module):
    """CSWin Transformer, on images of any size.

    Stages at strides 4, 8, 16 and 32, each a 3x3 convolution with stride 2 (not the first) and
    pre-norm blocks; half of a block's channels attend in vertical, half in horizontal stripes as
    wide as the stage's split size, all of them in the whole map in the last stage. Maps are
    channels-last throughout.

    Image sizes: at 224 the function is the released one. Maps that the stripes do not divide are
    padded at the bottom and right up to whole stripes, and no token attends to padding. Stripes
    keep their width in tokens at every size: the released models for 384 pixels are these with
    split_sizes=(1, 2, 12, 12). The patch stem needs 3 pixels a side.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for pooled features.
        global_pool: 'avg', or another pooling of timm's `ClassifierHead`; '' for a map.
        dims: Width of each stage.
        depths: Blocks of each stage.
        num_heads: Heads of each stage, an even number but in the last one.
        split_sizes: Width of the stripes of each stage, in tokens; that of the last is not used.
        mlp_ratio: Hidden width of MLPs over their width.
        qkv_bias: Bias on queries, keys and values.
        stem_type: 'patch', a 7x7 convolution with stride 4, or 'deep', three 3x3 convolutions with
            strides 2, 1 and 2; each convolution with norm, GELU between them.
        stem_width: Channels inside the deep stem; those of the first stage if None.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after attention projections and in MLPs.
        attn_drop_rate: Dropout of attention weights.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        act_layer: Activation of MLPs and of the deep stem.
        norm_layer: Normalisation over channels.
        norm_eps: Its epsilon.
        final_norm: Normalise the last map.

    Raises:
        ValueError: numbers of stages that differ, heads and stripes that do not go with a width, or
            an unknown stem_type.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = DIMS,
        depths: Sequence[int] = (1, 2, 21, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        split_sizes: Sequence[int] = (1, 2, 7, 7),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        stem_type: str = "patch",
        stem_width: int | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: str | Callable[..., nn.Module] = "gelu",
        norm_layer: str | Callable[..., nn.Module] = "layernorm",
        norm_eps: float = 1e-5,
        final_norm: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_per_stage(dims=dims, depths=depths, num_heads=num_heads, split_sizes=split_sizes)
        act = get_act_layer(act_layer)
        norm = partial(get_norm_layer(norm_layer), eps=norm_eps)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.output_fmt = "NHWC"
        self.feature_info = [
            dict(num_chs=dim, reduction=STEM_REDUCTION * 2**i, module=f"stages.{i}")
            for i, dim in enumerate(dims)
        ]
        self.num_features = dims[-1]
        self.stem = _stem(stem_type, in_chans, stem_width or dims[0], dims[0], norm, act, dd)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            blocks = [
                CSWinBlock(
                    dim,
                    num_heads[i],
                    split_sizes[i],
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=rate,
                    full_window=i == len(dims) - 1,
                    act_layer=act,
                    norm_layer=norm,
                    **dd,
                )
                for rate in rates[i]
            ]
            before = ConvNorm(dims[i - 1], dim, 3, 2, 1, norm, **dd) if i > 0 else nn.Identity()
            stages.append(CSWinStage(before, blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = norm(self.num_features, **dd) if final_norm else nn.Identity()
        self.head = ClassifierHead(
            self.num_features, num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Truncated-normal linear weights (std 0.02), zero biases; convolutions as PyTorch's.

        Args:
            needs_reset: Also call `reset_parameters` of all other modules (after `to_empty`).
        """

        def init(module: nn.Module, name: str) -> None:
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()

        named_apply(init, self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names for layer-wise learning rates."""
        return dict(
            stem=r"^stem",
            blocks=r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in backward."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Classes; 0 for none.
            global_pool: New pooling; the current one if None.
        """
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **dd)
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Forward pass that also returns the maps of stages.

        Args:
            x: Images [B, in_chans, H, W].
            indices: Stages to return: the last n if an int, these if a list, all if None.
            norm: Apply the final norm to the last stage's map.
            stop_early: Do not run stages after the last one wanted.
            output_fmt: 'NCHW' or 'NHWC', layout of the returned maps.
            intermediates_only: Return the maps alone.

        Returns:
            The maps, or (features as from `forward_features`, the maps).
        """
        assert output_fmt in ("NCHW", "NHWC"), "output_fmt must be NCHW or NHWC"
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        if torch.jit.is_scripting() or not stop_early:  # scripted lists of modules don't slice
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        last = len(self.feature_info) - 1
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                y = self.norm(x) if norm and i == last else x
                if output_fmt == "NCHW":
                    y = y.permute(0, 3, 1, 2).contiguous()
                intermediates.append(y)
        if intermediates_only:
            return intermediates
        if len(stages) == len(self.feature_info):
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the maps of the given stages do not need.

        Args:
            indices: Stages to keep maps of: the last n if an int, these if a list.
            prune_norm: Also remove the final norm.
            prune_head: Also remove classifier and pooling.

        Returns:
            Indices of those stages.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or prune_end:
            self.norm = nn.Identity()  # made for the last stage
        if prune_end:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised map of the last stage, [B, H/32, W/32, num_features]."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling and classifier on `forward_features`' map; the classifier left out with
        pre_logits."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: dict[str, Any], model: CSWin) -> dict[str, Tensor]:
    """Released or own parameters for this model, under its names."""
    return cswin_state_dict(state_dict, model)


def _create_cswin(variant: str, pretrained: bool = False, **kwargs: Any) -> CSWin:
    num_stages = len(kwargs.get("dims", DIMS))
    return build_model_with_cfg(
        CSWin,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(num_stages)), flatten_sequential=True),
        **kwargs,
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0.conv",
        "classifier": "head.fc",
        "license": "mit",
        "paper_ids": "arXiv:2107.00652",
        "paper_name": "CSWin Transformer: A General Vision Transformer Backbone with "
        "Cross-Shaped Windows",
        "origin_url": "https://github.com/microsoft/CSWin-Transformer",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "cswin_tiny.untrained": _cfg(),
        "cswin_small.untrained": _cfg(),
        "cswin_base.untrained": _cfg(),
        "cswin_large.untrained": _cfg(),
    }
)


@register_model
def cswin_tiny(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """CSWin-T: 22.3 M parameters, 4.32 GMACs at 224; 82.8 % top-1 in its README (23 M, 4.3 G)."""
    return _create_cswin("cswin_tiny", pretrained, **kwargs)


@register_model
def cswin_small(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """CSWin-S: 34.6 M parameters, 6.80 GMACs at 224; 83.6 % top-1 in its README (35 M, 6.9 G)."""
    model_args = dict(depths=(2, 4, 32, 2))
    return _create_cswin("cswin_small", pretrained, **dict(model_args, **kwargs))


@register_model
def cswin_base(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """CSWin-B: 77.4 M parameters, 15.0 GMACs at 224; 84.2 % top-1 in its README (78 M, 15.0 G)."""
    model_args = dict(dims=(96, 192, 384, 768), depths=(2, 4, 32, 2), num_heads=(4, 8, 16, 32))
    return _create_cswin("cswin_base", pretrained, **dict(model_args, **kwargs))


@register_model
def cswin_large(pretrained: bool = False, **kwargs: Any) -> CSWin:
    """CSWin-L: 173.3 M parameters, 33.1 GMACs at 224; its README has 173 M, 31.5 G and, with
    ImageNet-22K pretraining, 86.5 % top-1."""
    model_args = dict(dims=(144, 288, 576, 1152), depths=(2, 4, 32, 2), num_heads=(6, 12, 24, 24))
    return _create_cswin("cswin_large", pretrained, **dict(model_args, **kwargs))
