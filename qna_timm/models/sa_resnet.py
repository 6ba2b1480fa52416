"""ResNets of stand-alone self-attention, in windows that are fixed or learned.

Paper: "Adaptive Attention Span in Computer Vision", https://arxiv.org/abs/2004.08708
Released code: https://github.com/JoeRoussy/adaptive-attention-in-cv (MIT licence);
`checkpoint_filter_fn` reads its checkpoints. Networks for ImageNet: sa_resnet_imagenet.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    ConvNormAct,
    calculate_drop_path_rates,
    get_device_dtype,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    named_apply,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from qna_timm.convert import span_state_dict
from qna_timm.layers import (
    SPATIAL_LAYERS,
    BottleneckArgs,
    SABottleneck,
    SpanAttention,
)
from qna_timm.layers.sa_block import check_stages

__all__ = ["SAResNet"]

EXPANSION = 4
CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
CIFAR100_STD = (0.2673, 0.2564, 0.2762)
# (channels, side of the convolution, its stride, whether max pooling follows)
STEMS = {"conv3": (32, 3, 1, False), "conv7_pool": (64, 7, 2, True)}


class SAResNet(nn.Module):
    """ResNet whose bottlenecks hold a convolution, or self-attention of stride 1.

    Stages of widths `channels`, four times as many on their maps, then the mean of the last map
    and a linear classifier. Images of any size: maps are halved rounding up, where the released
    code, which pools rounding down, fails on odd ones; and the head takes the mean of the whole
    map, where the release pools 4x4 (2x2 behind the 'conv7_pool' stem), the same at the sizes that
    it is made for, 32 and 64 pixels.

    Defaults are the released code's. Those of its traits that the papers do not describe can be
    turned off: see rel_axes, mask_padding, scale_scores, eps and exact_radius of `SpanAttention`.
    A learned window is followed as it changes; for deployment `fix_radius` freezes its size.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for pooled features.
        global_pool: 'avg', or another pooling of timm's `ClassifierHead`; '' for a map.
        layers: Blocks of each stage.
        channels: Width of each stage's spatial layers.
        strides: Stride of each stage's first block.
        spatial: The spatial layer: 'cnn', a convolution; 'local', attention in a fixed window;
            'adaptive', in a learned one for each head; 'augmented', a convolution beside attention
            to the whole map (`AugmentedConv2d`).
        stem_type: 'conv3', a 3x3 convolution to 32 channels, for images of about 32 pixels;
            'conv7_pool', a strided 7x7 convolution to 64 and max pooling, for larger ones.
        pool_attn: Average over strided cells right behind the spatial layer instead of at the end
            of the block.
        kernel_size: Side of fixed windows and of convolutions, odd; of no effect if adaptive.
        num_heads: Attention heads, a divisor of all widths.
        max_span: Largest radius of learned windows, in pixels.
        span_ramp: Pixels over which a learned window fades out.
        span_init: Initial span, a fraction of max_span.
        rel_axes: See `SpanAttention`.
        mask_padding: See `SpanAttention`.
        scale_scores: See `SpanAttention`.
        eps: See `SpanAttention`.
        exact_radius: See `AdaptiveSpan`.
        impl: See `qna_timm.ops.span_attention`.
        key_dim: Channels of queries in augmented convolutions.
        value_dim: Channels that attention gives in augmented convolutions.
        relative: Relative vectors in augmented convolutions, of offsets up to 31 pixels.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        act_layer: Activation.
        norm_layer: Normalisation.

    Raises:
        ValueError: An argument does not fit, see above.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        layers: Sequence[int] = (1, 1, 1, 1),
        channels: Sequence[int] = (32, 64, 128, 256),
        strides: Sequence[int] = (1, 2, 2, 2),
        spatial: str = "local",
        stem_type: str = "conv3",
        pool_attn: bool = False,
        kernel_size: int = 5,
        num_heads: int = 4,
        max_span: int = 5,
        span_ramp: float = 2.0,
        span_init: float = 0.1,
        rel_axes: str = "split",
        mask_padding: bool = False,
        scale_scores: bool = False,
        eps: float = 1e-8,
        exact_radius: bool = False,
        impl: str = "auto",
        key_dim: int = 40,
        value_dim: int = 4,
        relative: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: str | Callable[..., nn.Module] = "relu",
        norm_layer: str | Callable[..., nn.Module] = "batchnorm2d",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_stages(layers, channels, strides)
        if stem_type not in STEMS:
            raise ValueError(f"stem_type must be one of {list(STEMS)}, got {stem_type!r}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_heads = num_heads
        self.channels_last = spatial in ("local", "adaptive")
        self.grad_checkpointing = False
        args = BottleneckArgs(
            spatial=spatial,
            kernel_size=kernel_size,
            num_heads=num_heads,
            pool_attn=pool_attn,
            span_args=dict(
                max_span=max_span,
                span_ramp=span_ramp,
                span_init=span_init,
                rel_axes=rel_axes,
                mask_padding=mask_padding,
                scale_scores=scale_scores,
                eps=eps,
                exact_radius=exact_radius,
                impl=impl,
            ),
            augmented_args=dict(key_dim=key_dim, value_dim=value_dim, relative=relative),
            act_layer=act_layer,
            norm_layer=norm_layer,
            dd=dd,
        )
        width, stem_kernel, reduction, pooled = STEMS[stem_type]
        self.stem = ConvNormAct(
            in_chans,
            width,
            stem_kernel,
            reduction,
            norm_layer=norm_layer,
            act_layer=act_layer,
            **dd,
        )
        self.stem_pool = nn.MaxPool2d(3, 2, padding=1) if pooled else nn.Identity()
        reduction *= 2 if pooled else 1

        self.feature_info = []
        stages = []
        drop_paths = iter(calculate_drop_path_rates(drop_path_rate, sum(layers)))
        plan = zip(layers, channels, strides, strict=True)
        for i, (depth, mid_chs, stride) in enumerate(plan):
            out_chs = mid_chs * EXPANSION
            blocks = [
                SABottleneck(
                    out_chs if j else width,
                    mid_chs,
                    out_chs,
                    1 if j else stride,
                    args,
                    next(drop_paths),
                )
                for j in range(depth)
            ]
            stages.append(nn.Sequential(*blocks))
            width, reduction = out_chs, reduction * stride
            self.feature_info.append(dict(num_chs=width, reduction=reduction, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        self.num_features = width
        self.head = ClassifierHead(width, num_classes, global_pool, drop_rate, **dd)
        self.head_hidden_size = self.head.num_features

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """The released initialisation, which is that of each module: PyTorch's, and attention's.

        Args:
            needs_reset: Call `reset_parameters` of all modules (after `to_empty`).
        """

        def reset(module: nn.Module, name: str) -> None:
            if needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()

        named_apply(reset, self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Nothing: the release decays every parameter.

        timm leaves out vectors, spans among them, unless told `filter_bias_and_bn=False`.
        """
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names for layer-wise learning rates."""
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)")

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in backward."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def fix_radius(self, fix: bool = True) -> None:
        """Freezes the sizes of all learned windows, see `SpanAttention.fix_radius`.

        They belong to the present spans: to be called again after other weights are loaded, and
        undone (False) before training.
        """
        for module in self.modules():
            if isinstance(module, SpanAttention):
                module.fix_radius(fix)

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
            norm: Of no effect: stages end in activations.
            stop_early: Do not run stages after the last one wanted.
            output_fmt: 'NCHW'.
            intermediates_only: Return the maps alone.

        Returns:
            The maps, or (features as from `forward_features`, the maps).
        """
        assert output_fmt == "NCHW", "output_fmt must be NCHW"
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        x = self.forward_stem(x)
        if torch.jit.is_scripting() or not stop_early:  # scripted lists of modules don't slice
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        for i, stage in enumerate(stages):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
            if i in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
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
            prune_norm: Of no effect: there is no final norm.
            prune_head: Also remove classifier and pooling.

        Returns:
            Indices of those stages.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_end:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_stem(self, x: Tensor) -> Tensor:
        """The first maps; channels-last where attention, which gives such maps, would mix both."""
        if self.channels_last:
            # not contiguous(memory_format=...), which vmap does not know
            x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return self.stem_pool(self.stem(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map of the last stage [B, num_features, ceil(H / reduction), ceil(W / reduction)]."""
        x = self.forward_stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.stages, x, flatten=True)
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling and classifier on that map; the classifier left out with pre_logits."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: dict[str, Any], model: SAResNet) -> dict[str, Tensor]:
    """Released or own parameters for this model."""
    return span_state_dict(state_dict, model)


def create_sa_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> SAResNet:
    """Builds a registered model; kwargs are those of `SAResNet`."""
    return build_model_with_cfg(
        SAResNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(len(kwargs["layers"]))), flatten_sequential=True),
        **kwargs,
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 100,
        "input_size": (3, 32, 32),
        "pool_size": (4, 4),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": CIFAR100_MEAN,
        "std": CIFAR100_STD,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "license": "mit",
        "paper_ids": "arXiv:2004.08708",
        "paper_name": "Adaptive Attention Span in Computer Vision",
        "origin_url": "https://github.com/JoeRoussy/adaptive-attention-in-cv",
        **kwargs,
    }


_SIZES = ("small", "medium", "large")
default_cfgs = generate_default_cfgs(
    {
        f"sa_resnet_{size}_{spatial}.untrained": _cfg()
        for size in _SIZES
        for spatial in SPATIAL_LAYERS
    }
)

_SMALL = dict(layers=(1, 1, 1), channels=(32, 64, 128), strides=(2, 2, 2))
_MEDIUM = dict(layers=(1, 1, 1, 1), channels=(32, 64, 128, 256), strides=(1, 2, 2, 2))
_LARGE = dict(layers=(1, 3, 4, 1), channels=(32, 64, 128, 256), strides=(1, 2, 2, 2))


@register_model
def sa_resnet_small_cnn(pretrained: bool = False, **kwargs: Any) -> SAResNet:
    """Small network, convolutions: 546,180 parameters at 100 classes."""
    model_args = dict(_SMALL, spatial="cnn", kernel_size=3)
    return create_sa_resnet("sa_resnet_small_cnn", pretrained, **dict(model_args, **kwargs))


@register_model
def sa_resnet_small_local(pretrained: bool = False, **kwargs: Any) -> SAResNet:
    """Small network, attention in windows of 5x5: 418,276 parameters at 100 classes."""
    model_args = dict(_SMALL, spatial="local")
    return create_sa_resnet("sa_resnet_small_local", pretrained, **dict(model_args, **kwargs))


@register_model
def sa_resnet_small_adaptive(pretrained: bool = False, **kwargs: Any) -> SAResNet:
    """Small network, attention in learned windows: 424,560 parameters at 100 classes."""
    model_args = dict(_SMALL, spatial="adaptive")
    return create_sa_resnet("sa_resnet_small_adaptive", pretrained, **dict(model_args, **kwargs))


@register_model
def sa_resnet_small_augmented(pretrained: bool = False, **kwargs: Any) -> SAResNet:
    """Small network, attention-augmented 3x3 convolutions: 707,984 parameters at 100 classes."""
    model_args = dict(_SMALL, spatial="augmented", kernel_size=3)
    return create_sa_resnet("sa_resnet_small_augmented", pretrained, **dict(model_args, **kwargs))


@register_model
def sa_resnet_medium_cnn(pretrained: bool = False, **kwargs: Any) -> SAResNet:
    """Medium network, convolutions: 2,109,828 parameters at 100 classes."""
    model_args = dict(_MEDIUM, spatial="cnn", kernel_size=3)
    return create_sa_resnet("sa_resnet_medium_cnn", pretrained, **dict(model_args, **kwargs))


@register_model
def sa_resnet_medium_local(pretrained: bool = False, **kwargs: Any) -> SAResNet:
    """Medium network, attention in windows of 5x5: 1,589,988 parameters at 100 classes."""
    model_args = dict(_MEDIUM, spatial="local")
    return create_sa_resnet("sa_resnet_medium_local", pretrained, **dict(model_args, **kwargs))


@register_model
def sa_resnet_medium_adaptive(pretrained: bool = False, **kwargs: Any) -> SAResNet:
    """Medium network, attention in learned windows: 1,603,444 parameters at 100 classes."""
    model_args = dict(_MEDIUM, spatial="adaptive")
    return create_sa_resnet("sa_resnet_medium_adaptive", pretrained, **dict(model_args, **kwargs))


@register_model
def sa_resnet_medium_augmented(pretrained: bool = False, **kwargs: Any) -> SAResNet:
    """Medium network, attention-augmented 3x3 convolutions: 2,456,308 parameters at 100 classes."""
    model_args = dict(_MEDIUM, spatial="augmented", kernel_size=3)
    return create_sa_resnet("sa_resnet_medium_augmented", pretrained, **dict(model_args, **kwargs))


@register_model
def sa_resnet_large_cnn(pretrained: bool = False, **kwargs: Any) -> SAResNet:
    """Large network, convolutions: 3,090,820 parameters at 100 classes."""
    model_args = dict(_LARGE, spatial="cnn", kernel_size=3)
    return create_sa_resnet("sa_resnet_large_cnn", pretrained, **dict(model_args, **kwargs))


@register_model
def sa_resnet_large_local(pretrained: bool = False, **kwargs: Any) -> SAResNet:
    """Large network, attention in windows of 5x5: 2,229,476 parameters at 100 classes."""
    model_args = dict(_LARGE, spatial="local")
    return create_sa_resnet("sa_resnet_large_local", pretrained, **dict(model_args, **kwargs))


@register_model
def sa_resnet_large_adaptive(pretrained: bool = False, **kwargs: Any) -> SAResNet:
    """Large network, attention in learned windows: 2,257,288 parameters at 100 classes."""
    model_args = dict(_LARGE, spatial="adaptive")
    return create_sa_resnet("sa_resnet_large_adaptive", pretrained, **dict(model_args, **kwargs))


@register_model
def sa_resnet_large_augmented(pretrained: bool = False, **kwargs: Any) -> SAResNet:
    """Large network, attention-augmented 3x3 convolutions: 3,806,952 parameters at 100 classes."""
    model_args = dict(_LARGE, spatial="augmented", kernel_size=3)
    return create_sa_resnet("sa_resnet_large_augmented", pretrained, **dict(model_args, **kwargs))
