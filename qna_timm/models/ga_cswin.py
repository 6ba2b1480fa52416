"""CSWin with Gramian attention heads (arXiv:2310.16483): `ga_cswin_*`.

The released class leaves several settings open. Those here are inferred: of all that differ from
its defaults in at most two places they meet both parameter counts of the paper, and they exist in
every published version of the file.

The first public version of that file tapped one block earlier than the corrected one, which is
followed here; shapes do not tell the two's checkpoints apart, so one from the first version loads
and computes another function.

Letters: B batch, H W map, A channels of all maps together, D channels of the fused map.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from qna_timm.convert.common import unwrap
from qna_timm.convert.cswin import is_released_cswin, rename_cswin
from qna_timm.layers.branches import check_divisor
from qna_timm.layers.cswin_block import CSWinBlock
from qna_timm.layers.fuse import FuseBottleneck, MapFusion, tap_positions
from qna_timm.models.cswin import CSWin, check_per_stage
from qna_timm.models.gramian import GramianNet, create_gramian, gramian_cfg
from qna_timm.models.gramian import checkpoint_filter_fn as checkpoint_filter_fn

__all__ = ["GramianCSWin"]

TAP_STAGE = 2  # the third stage


class CSWinTrunk(CSWin):
    """CSWin without final norm and head; stage 3 also gives maps from between its blocks.

    Args:
        num_taps: Maps taken inside stage 3.
        cswin_args: Arguments of `CSWin`.
    """

    taps: list[list[int]]

    def __init__(self, num_taps: int, **cswin_args: Any) -> None:
        super().__init__(num_classes=0, global_pool="", final_norm=False, **cswin_args)
        self.taps = [[] for _ in self.stages]
        self.taps[TAP_STAGE] = tap_positions(len(self.stages[TAP_STAGE].blocks), num_taps)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images to [stage 1, stage 2, taps of stage 3, stage 3, stage 4], NCHW."""
        maps: list[Tensor] = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            if len(self.taps[i]) == 0:
                x = stage(x)
            else:
                outputs = stage.forward_taps(x, self.taps[i])
                for y in outputs[:-1]:
                    maps.append(y.permute(0, 3, 1, 2))
                x = outputs[-1]
            maps.append(x.permute(0, 3, 1, 2))
        return maps


class FuseCSWin(nn.Module):
    """1x1 convolution from A to D channels, LayerNorm, a CSWin block.

    Args:
        in_features: A.
        out_features: D.
        num_heads: Heads of the block.
        split_size: Width of its stripes.
        mlp_ratio: Hidden width of its MLP over D.
        drop_path: Its stochastic depth.

    Shape: [B, A, H, W] -> [B, D, H, W].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_heads: int,
        split_size: int,
        mlp_ratio: float,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_features, out_features, 1, **dd)
        self.norm = nn.LayerNorm(out_features, **dd)
        self.block = CSWinBlock(
            out_features, num_heads, split_size, mlp_ratio=mlp_ratio, drop_path=drop_path, **dd
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return self.block(x).permute(0, 3, 1, 2)


class GramianCSWin(GramianNet):
    """CSWin, its four stages and taps inside the third fused at stride 16, Gramian heads.

    Images of any size (see `CSWin`); at 224 the function is the released one, which takes no other.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for the branches' tokens.
        global_pool: 'gram' or ''.
        dims: Channels of each stage; the last is also D, the fused map's.
        depths: Blocks of each stage.
        trunk_num_heads: Heads of each stage; num_heads are the class attention's.
        split_sizes: Width of each stage's stripes.
        stem_type: 'deep' or 'patch', see `CSWin`.
        num_taps: Maps taken between the blocks of stage 3.
        fuse_type: 'cswin', a 1x1 convolution and a CSWin block, or 'bottleneck', a convolutional
            bottleneck block.
        fuse_num_heads: Heads of the fusion's CSWin block.
        fuse_split_size: Width of its stripes.
        fuse_mlp_ratio: Hidden width of its MLP over D.
        gram_layer: See `GramianHead`, as the next two.
        proj_groups: Groups of the maps that Gram matrices are made of.
        mlp_groups: Groups of the class attention's MLP.
        drop_path_rate: Stochastic depth of fusion and Gram layers, rising linearly from 0 to it
            over the trunk's blocks.
        head_args: Other arguments of `GramianHead`.

    Raises:
        ValueError: not four stages, unknown stem_type or fuse_type, and what `CSWin` and
            `GramianHead` refuse.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "gram",
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (1, 2, 21, 1),
        trunk_num_heads: Sequence[int] = (2, 4, 8, 16),
        split_sizes: Sequence[int] = (1, 2, 7, 7),
        stem_type: str = "deep",
        num_taps: int = 1,
        fuse_type: str = "cswin",
        fuse_num_heads: int = 16,
        fuse_split_size: int = 7,
        fuse_mlp_ratio: float = 2.0,
        gram_layer: str | None = "cswin",
        proj_groups: int = 8,
        mlp_groups: int = 2,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **head_args: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        if len(dims) != 4:
            raise ValueError(f"dims must have an entry for each of 4 stages, got {dims}")
        check_per_stage(dims=dims, trunk_num_heads=trunk_num_heads)
        for i, num_heads in enumerate(trunk_num_heads):
            halves = 2 if i < 3 else 1
            check_divisor(f"trunk_num_heads[{i}]", num_heads, halves, **{f"dims[{i}]": dims[i]})
        trunk = CSWinTrunk(
            num_taps,
            in_chans=in_chans,
            dims=dims,
            depths=depths,
            num_heads=trunk_num_heads,
            split_sizes=split_sizes,
            stem_type=stem_type,
            drop_path_rate=drop_path_rate,
            **dd,
        )
        reductions = [4, 8] + [16] * (num_taps + 1) + [32]
        channels = dims[0] + dims[1] + (num_taps + 1) * dims[2] + dims[3]
        if fuse_type == "cswin":
            check_divisor("fuse_num_heads", fuse_num_heads, 2, **{"dims[3]": dims[3]})
            fuse_args = (fuse_num_heads, fuse_split_size, fuse_mlp_ratio, drop_path_rate)
            block: nn.Module = FuseCSWin(channels, dims[3], *fuse_args, **dd)
        elif fuse_type == "bottleneck":
            block = FuseBottleneck(channels, dims[3], drop_path_rate, **dd)
        else:
            raise ValueError(f"fuse_type must be 'cswin' or 'bottleneck', got {fuse_type!r}")
        super().__init__(
            trunk,
            MapFusion(reductions, len(reductions) - 2, block),
            dims[3],
            num_classes,
            global_pool,
            feature_taps=[0, 1, num_taps + 2, num_taps + 3],
            in_chans=in_chans,
            gram_layer=gram_layer,
            proj_groups=proj_groups,
            mlp_groups=mlp_groups,
            drop_path=drop_path_rate,
            **head_args,
            **dd,
        )
        self._init_fuse()
        self.head.init_weights("default")

    @torch.jit.ignore
    def _init_fuse(self) -> None:
        """Linear maps truncated normal (std 0.02) as in the trunk; convolutions as PyTorch's."""
        for module in self.fuse.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def backbone_state_dict(self, state_dict: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The CSWin repository's names or ours; see `load_backbone`.

        A stem of the other type is left out whole: parts of it would fit by name and shape.
        """
        tensors = unwrap(state_dict)
        renamed = rename_cswin(tensors) if is_released_cswin(tensors) else dict(tensors)
        own_stem = {name for name in self.trunk.state_dict() if name.startswith("stem.")}
        if own_stem == {name for name in renamed if name.startswith("stem.")}:
            return renamed
        return {name: t for name, t in renamed.items() if not name.startswith("stem.")}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return gramian_cfg(
        crop_pct=0.9,
        first_conv="trunk.stem.0.conv",
        origin_url="https://github.com/Lab-LVM/imagenet-models",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": _cfg()
        for name in (
            "ga_cswin_tiny",
            "ga_cswin_small",
            "ga_CSWin_64_12211_tiny_224",
            "ga_CSWin_64_24322_small_224",
        )
    }
)

_SMALL = dict(depths=(2, 4, 32, 2))


@register_model
def ga_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> GramianCSWin:
    """GA-CSWin-T: 42.0 M parameters, 6.0 GMACs at 224 (paper: 6.1), 84.1 % top-1 there."""
    return create_gramian(GramianCSWin, "ga_cswin_tiny", pretrained, **kwargs)


@register_model
def ga_cswin_small(pretrained: bool = False, **kwargs: Any) -> GramianCSWin:
    """GA-CSWin-S: 54.3 M parameters, 8.5 GMACs at 224 (paper: 8.7), 84.7 % top-1 there."""
    return create_gramian(GramianCSWin, "ga_cswin_small", pretrained, **dict(_SMALL, **kwargs))


@register_model
def ga_CSWin_64_12211_tiny_224(pretrained: bool = False, **kwargs: Any) -> GramianCSWin:
    """`ga_cswin_tiny` under the name in the paper's commands."""
    return create_gramian(GramianCSWin, "ga_CSWin_64_12211_tiny_224", pretrained, **kwargs)


@register_model
def ga_CSWin_64_24322_small_224(pretrained: bool = False, **kwargs: Any) -> GramianCSWin:
    """`ga_cswin_small` under the name in the paper's commands."""
    name = "ga_CSWin_64_24322_small_224"
    return create_gramian(GramianCSWin, name, pretrained, **dict(_SMALL, **kwargs))
