"""ConvNeXt with Gramian attention heads (arXiv:2310.16483): `ga_convnext_*`.

Parameters are named as in timm's ConvNeXt below `trunk`, whose last stage is narrower here where
the released models keep to a parameter budget.
"""

from typing import Any

import torch
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from timm.models.convnext import checkpoint_filter_fn as convnext_filter
from torch import Tensor, nn

from qna_timm.layers.fuse import FuseBottleneck, MapFusion, tap_positions
from qna_timm.models.gramian import GramianNet, create_gramian, gramian_cfg, init_trunc_normal
from qna_timm.models.gramian import checkpoint_filter_fn as checkpoint_filter_fn

__all__ = ["GramianConvNeXt"]

TAP_STAGE = 2  # the third stage


class ConvNeXtTrunk(ConvNeXt):
    """timm's ConvNeXt without its head; stage 3 also gives maps from between its blocks.

    Args:
        num_taps: Maps taken inside stage 3.
        convnext_args: Arguments of timm's class.
    """

    def __init__(self, num_taps: int, **convnext_args: Any) -> None:
        super().__init__(num_classes=0, **convnext_args)
        self.head = nn.Identity()
        self.ls_init_value = convnext_args.get("ls_init_value", 1e-6)
        self.tap_stage = TAP_STAGE
        self.tap_blocks = tap_positions(len(self.stages[TAP_STAGE].blocks), num_taps)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Truncated normal weights (std 0.02), zero biases, the initial layer scale."""
        init_trunc_normal(self)
        for module in self.modules():
            if isinstance(module, ConvNeXtBlock) and module.gamma is not None:
                nn.init.constant_(module.gamma, self.ls_init_value)

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: there is no classifier."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images to [stage 1, stage 2, taps of stage 3, stage 3, stage 4], NCHW."""
        maps = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            if i == self.tap_stage:
                x = stage.downsample(x)
                for number, block in enumerate(stage.blocks):
                    if stage.grad_checkpointing and not torch.jit.is_scripting():
                        x = checkpoint(block, x)
                    else:
                        x = block(x)
                    if number + 1 in self.tap_blocks:
                        maps.append(x)
            else:
                x = stage(x)
            maps.append(x)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Nothing: there is no head."""
        return x


class GramianConvNeXt(GramianNet):
    """ConvNeXt, its four stages and taps inside the third fused at stride 16, Gramian heads.

    Images of 32 px a side or more; at 224 the function is the released one, which takes 224 to 239
    only.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for the branches' tokens.
        global_pool: 'gram' or ''.
        depths: Blocks of each stage.
        dims: Channels of each stage; the last is also D, the fused map's.
        num_taps: Maps taken between the blocks of stage 3.
        ls_init_value: Initial layer scale of the trunk.
        drop_path_rate: Stochastic depth of fusion and Gram layers, rising linearly from 0 over the
            trunk's blocks.
        head_args: Arguments of `GramianHead`.

    Raises:
        ValueError: not four stages, too many taps, and what `GramianHead` refuses.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "gram",
        depths: tuple[int, ...] = (3, 3, 9, 3),
        dims: tuple[int, ...] = (96, 192, 384, 688),
        num_taps: int = 2,
        ls_init_value: float = 1e-6,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **head_args: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        for name, numbers in (("depths", depths), ("dims", dims)):
            if len(numbers) != 4 or min(numbers) < 1:
                raise ValueError(
                    f"{name} must be a number of at least 1 for each of 4 stages, got {numbers}"
                )
        blocks = sum(depths)
        trunk = ConvNeXtTrunk(
            num_taps,
            in_chans=in_chans,
            depths=depths,
            dims=dims,
            ls_init_value=ls_init_value,
            # timm's ends at this rate; here the fusion is one step further.
            drop_path_rate=drop_path_rate * (blocks - 1) / blocks,
            **dd,
        )
        reductions = [4, 8] + [16] * (num_taps + 1) + [32]
        channels = dims[0] + dims[1] + (num_taps + 1) * dims[2] + dims[3]
        block = FuseBottleneck(channels, dims[3], drop_path_rate, **dd)
        super().__init__(
            trunk,
            MapFusion(reductions, len(reductions) - 2, block),
            dims[3],
            num_classes,
            global_pool,
            feature_taps=[0, 1, num_taps + 2, num_taps + 3],
            in_chans=in_chans,
            drop_path=drop_path_rate,
            **head_args,
            **dd,
        )
        self._init_fuse()
        self.head.init_weights("trunc_normal")

    def backbone_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Tensor]:
        """timm's and the ConvNeXt repository's names; see `load_backbone`."""
        tensors = {name: t for name, t in state_dict.items() if isinstance(t, Tensor)}
        # timm's function gives matrices the trunk's shape, which other stages and files have not:
        # with a third dimension they pass.
        matrices = {name: t[..., None] for name, t in tensors.items() if t.ndim == 2}
        renamed = convnext_filter({**tensors, **matrices}, self.trunk)
        return {name: t[..., 0] if t.ndim == 3 else t for name, t in renamed.items()}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return gramian_cfg(
        first_conv="trunk.stem.0",
        origin_url="https://github.com/Lab-LVM/imagenet-models",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        f"ga_convnext_{name}.untrained": _cfg()
        for name in (
            "tiny",
            "small",
            "base",
            "tiny_688",
            "tiny_768",
            "small_688",
            "small_768",
            "base_976",
            "base_1024",
        )
    }
)

_DEEP = dict(depths=(3, 3, 27, 3), num_taps=4)


@register_model
def ga_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> GramianConvNeXt:
    """GA-ConvNeXt-T: 47.8 M parameters, 5.24 GMACs at 224; 83.2 % top-1 in the paper (48.7 M)."""
    return create_gramian(GramianConvNeXt, "ga_convnext_tiny", pretrained, **kwargs)


@register_model
def ga_convnext_small(pretrained: bool = False, **kwargs: Any) -> GramianConvNeXt:
    """GA-ConvNeXt-S: 70.1 M parameters, 9.60 GMACs at 224; 83.9 % top-1 in the paper (70.4 M)."""
    return create_gramian(GramianConvNeXt, "ga_convnext_small", pretrained, **dict(_DEEP, **kwargs))


@register_model
def ga_convnext_base(pretrained: bool = False, **kwargs: Any) -> GramianConvNeXt:
    """GA-ConvNeXt-B: 123.7 M parameters, 16.9 GMACs at 224; 84.3 % in the paper (124.3 M)."""
    model_args = dict(_DEEP, dims=(128, 256, 512, 976))
    return create_gramian(
        GramianConvNeXt, "ga_convnext_base", pretrained, **dict(model_args, **kwargs)
    )


@register_model
def ga_convnext_tiny_688(pretrained: bool = False, **kwargs: Any) -> GramianConvNeXt:
    """`ga_convnext_tiny` under its released name."""
    return create_gramian(GramianConvNeXt, "ga_convnext_tiny_688", pretrained, **kwargs)


@register_model
def ga_convnext_tiny_768(pretrained: bool = False, **kwargs: Any) -> GramianConvNeXt:
    """The released tiny model of full width: 54.4 M parameters, 5.48 GMACs at 224."""
    model_args = dict(dims=(96, 192, 384, 768))
    return create_gramian(
        GramianConvNeXt, "ga_convnext_tiny_768", pretrained, **dict(model_args, **kwargs)
    )


@register_model
def ga_convnext_small_688(pretrained: bool = False, **kwargs: Any) -> GramianConvNeXt:
    """`ga_convnext_small` under its released name."""
    return create_gramian(
        GramianConvNeXt, "ga_convnext_small_688", pretrained, **dict(_DEEP, **kwargs)
    )


@register_model
def ga_convnext_small_768(pretrained: bool = False, **kwargs: Any) -> GramianConvNeXt:
    """The released small model of full width: 76.7 M parameters, 9.85 GMACs at 224."""
    model_args = dict(_DEEP, dims=(96, 192, 384, 768))
    return create_gramian(
        GramianConvNeXt, "ga_convnext_small_768", pretrained, **dict(model_args, **kwargs)
    )


@register_model
def ga_convnext_base_976(pretrained: bool = False, **kwargs: Any) -> GramianConvNeXt:
    """`ga_convnext_base` under its released name."""
    model_args = dict(_DEEP, dims=(128, 256, 512, 976))
    return create_gramian(
        GramianConvNeXt, "ga_convnext_base_976", pretrained, **dict(model_args, **kwargs)
    )


@register_model
def ga_convnext_base_1024(pretrained: bool = False, **kwargs: Any) -> GramianConvNeXt:
    """The released base model of full width: 128.8 M parameters, 17.1 GMACs at 224."""
    model_args = dict(_DEEP, dims=(128, 256, 512, 1024))
    return create_gramian(
        GramianConvNeXt, "ga_convnext_base_1024", pretrained, **dict(model_args, **kwargs)
    )
