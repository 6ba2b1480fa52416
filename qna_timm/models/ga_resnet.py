"""ResNet-50 with Gramian attention heads (arXiv:2310.16483): `ga_resnet50`.

The authors published no code for it. Its settings are derived: of the constructions tried, this
one meets the parameter counts of all four ResNet-50 rows in the paper's ablation (class
attention and Gramian heads, one and five branches) and the multiply-adds of its main table.

Parameters are named as in timm's ResNet below `trunk`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import SEModule
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from qna_timm.layers.batch_norm import SmallBatchNorm2d
from qna_timm.layers.fuse import FuseBottleneck, MapFusion
from qna_timm.models.gramian import GramianNet, create_gramian, gramian_cfg
from qna_timm.models.gramian import checkpoint_filter_fn as checkpoint_filter_fn

__all__ = ["GramianResNet"]

REDUCTIONS = [2, 4, 8, 16, 32]
FUSED_AT = REDUCTIONS.index(16)


class SEBottleneck(Bottleneck):
    """timm's bottleneck block with squeeze-and-excitation on the 3x3 convolution's output.

    timm has it on the block's output, which is four times as wide. The gate's hidden width is
    planes / 16, at least 8.

    Args:
        inplanes: Input channels.
        planes: Width of the 3x3 convolution.
        block_args: Other arguments of timm's class.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        *block_args: Any,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **block_kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(inplanes, planes, *block_args, **block_kwargs, **dd)
        self.se = SEModule(self.conv2.out_channels, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inplanes, H, W] to [B, 4 * planes, H / stride, W / stride]."""
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.se(self.act2(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        if self.drop_path is not None:
            y = self.drop_path(y)
        if self.downsample is not None:
            x = self.downsample(x)
        return self.act3(y + x)


class ResNetTrunk(ResNet):
    """timm's ResNet without its head, of `SEBottleneck` blocks, that also gives its stem's map.

    Args:
        resnet_args: Arguments of timm's class.
    """

    def __init__(self, **resnet_args: Any) -> None:
        super().__init__(SEBottleneck, num_classes=0, **resnet_args)
        self.global_pool = nn.Identity()

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: there is no classifier."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images to [stem before its pooling, stage 1, 2, 3, 4], NCHW."""
        x = self.act1(self.bn1(self.conv1(x)))
        maps = [x]
        x = self.maxpool(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
                x = checkpoint_seq(stage, x)
                maps.append(x)
            return maps
        x = self.layer1(x)
        maps.append(x)
        x = self.layer2(x)
        maps.append(x)
        x = self.layer3(x)
        maps.append(x)
        maps.append(self.layer4(x))
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Nothing: there is no head."""
        return x


class GramianResNet(GramianNet):
    """ResNet, its stem and four stages fused at stride 16, Gramian heads on that.

    The stem has three 3x3 convolutions (32, 32 and 64 channels at the first width) and max
    pooling; strided blocks have a strided 1x1 shortcut. Images of any size.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for the branches' tokens.
        global_pool: 'gram' or ''.
        layers: Blocks of each stage.
        channels: Width of each stage's 3x3 convolutions; its maps have four times as many.
        stem_width: Channels of the stem's first two convolutions; the third has twice as many.
        num_features: D, channels of the fused map.
        drop_path_rate: Stochastic depth of the fusion, rising linearly from 0 over the trunk's
            blocks; also of Gram layers where there are any.
        head_args: Arguments of `GramianHead`.

    Raises:
        ValueError: see `GramianHead`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "gram",
        layers: tuple[int, ...] = (3, 4, 6, 3),
        channels: tuple[int, ...] = (64, 128, 256, 256),
        stem_width: int = 32,
        num_features: int = 1024,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **head_args: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        blocks = sum(layers)
        trunk = ResNetTrunk(
            layers=layers,
            channels=channels,
            in_chans=in_chans,
            stem_type="deep",
            stem_width=stem_width,
            norm_layer=SmallBatchNorm2d,
            # timm's ends at this rate; here the fusion is one step further.
            drop_path_rate=drop_path_rate * (blocks - 1) / blocks,
            **dd,
        )
        in_features = sum(info["num_chs"] for info in trunk.feature_info)
        block = FuseBottleneck(in_features, num_features, drop_path_rate, **dd)
        super().__init__(
            trunk,
            MapFusion(REDUCTIONS, FUSED_AT, block),
            num_features,
            num_classes,
            global_pool,
            feature_taps=list(range(len(REDUCTIONS))),
            in_chans=in_chans,
            drop_path=drop_path_rate,
            **head_args,
            **dd,
        )
        self._init_fuse()
        self.head.init_weights("trunc_normal")

    @torch.jit.ignore
    def _init_fuse(self) -> None:
        """As timm's ResNet: Kaiming-normal weights by fan-out, zero biases."""
        for layer in self.fuse.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def backbone_state_dict(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """timm's names; see `load_backbone`.

        A 7x7 stem leaves all of the stem fresh: its batch norm belongs to its convolution.
        """
        plain_stem = "conv1.weight" in state_dict
        return {
            name: tensor
            for name, tensor in state_dict.items()
            if not (plain_stem and name.startswith("bn1."))
        }


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return gramian_cfg(first_conv="trunk.conv1.0", **kwargs)


default_cfgs = generate_default_cfgs({"ga_resnet50.untrained": _cfg()})


@register_model
def ga_resnet50(pretrained: bool = False, **kwargs: Any) -> GramianResNet:
    """GA-ResNet50: 41.29 M parameters, 4.73 GMACs at 224.

    The paper: 82.5 % top-1 with 41.3 M and 5.2 G. Never released, derived from the paper's counts;
    with keys and values of every position, which ours does not compute, it takes 5.23 GMACs.
    """
    model_args = dict(
        gram_dim=128,
        gram_layer=None,
        proj_groups=8,
        embed_groups=16,
        attn_dim=256,
        mlp_groups=4,
    )
    return create_gramian(
        GramianResNet,
        "ga_resnet50",
        pretrained,
        feature_indices=(0, 1, 2, 3, 4),
        **dict(model_args, **kwargs),
    )
