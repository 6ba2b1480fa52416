"""Vision transformers with Gramian attention heads (arXiv:2310.16483): `ga_vit_*`.

The authors published no code for them. Their settings are derived: with a plain vision
transformer as trunk, its patch tokens after the final norm as the map that the branches read and
no class token, they meet the parameter counts and multiply-adds of the paper's tables.

Parameters are named as in timm's VisionTransformer below `trunk`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._input import update_model_input_size
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from qna_timm.convert import ConversionError
from qna_timm.convert.common import unwrap
from qna_timm.models.gramian import GramianNet, create_gramian, gramian_cfg
from qna_timm.models.gramian import checkpoint_filter_fn as gramian_filter

__all__ = ["GramianViT"]

PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")
PATCH_WEIGHT = "patch_embed.proj.weight"

torch.fx.wrap("resample_abs_pos_embed")  # sizes decide inside: one node of a symbolic trace


class ViTTrunk(VisionTransformer):
    """timm's VisionTransformer without class token and head, for images of any size.

    Sides that the patch does not divide are zero-padded at the bottom and right; positions are
    resampled (bicubic) wherever the map is not of the size that they were made for.

    Args:
        vit_args: Arguments of timm's class.
    """

    def __init__(self, **vit_args: Any) -> None:
        super().__init__(
            num_classes=0,
            global_pool="",
            class_token=False,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            **vit_args,
        )

    def reset_classifier(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: there is no classifier."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        # B, H, W, D -> B, H*W, D
        positions = resample_abs_pos_embed(
            self.pos_embed, [x.shape[1], x.shape[2]], self.patch_embed.grid_size, 0
        )
        return self.pos_drop(x.flatten(1, 2) + positions)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images to [patch tokens after the final norm], NCHW."""
        x = self.patch_embed(x)
        height, width = x.shape[1], x.shape[2]
        x = self._pos_embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return [tokens_to_map(self.norm(x), height, width)]


def tokens_to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, H * W, D], row-major, to [B, D, H, W]."""
    batch, _, dim = tokens.shape
    return tokens.transpose(1, 2).reshape(batch, dim, height, width)


class SingleMap(nn.Module):
    """Fusion of a single map: the map."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        """[one map [B, D, H, W]] to the map."""
        return maps[0]


class GramianViT(GramianNet):
    """Vision transformer, Gramian heads on its patch tokens.

    Image sizes: any height and width. At `img_size` the positions are the table itself; elsewhere
    it is resampled on the fly, and sides that the patch does not divide are zero-padded.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for the branches' tokens.
        global_pool: 'gram' or ''.
        img_size: Image height and width that the position table is made for.
        patch_size: Height and width of patches.
        embed_dim: D, width of the tokens.
        depth: Blocks.
        trunk_num_heads: Attention heads of each block; `num_heads` are those of class attention.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0; also of Gram
            layers where there are any.
        head_args: Arguments of `GramianHead`.

    Raises:
        ValueError: see `GramianHead`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "gram",
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        embed_dim: int = 384,
        depth: int = 12,
        trunk_num_heads: int = 6,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **head_args: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        trunk = ViTTrunk(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=trunk_num_heads,
            drop_path_rate=drop_path_rate,
            **dd,
        )
        super().__init__(
            trunk,
            SingleMap(),
            embed_dim,
            num_classes,
            global_pool,
            in_chans=in_chans,
            drop_path=drop_path_rate,
            **head_args,
            **dd,
        )
        self.head.init_weights("trunc_normal")

    def _features_and_maps(
        self, x: Tensor, indices: list[int], norm: bool
    ) -> tuple[Tensor, list[Tensor]]:
        tokens, maps = self.trunk.forward_intermediates(x, indices=indices, norm=norm)
        height, width = maps[0].shape[-2:]
        return self.fuse([tokens_to_map(tokens, height, width)]), maps

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Resample the position table (and patch kernels) for another image (and patch) size.

        Args:
            img_size: New image height and width; the current ones if None.
            patch_size: New patch height and width; the current ones if None.
        """
        self.trunk.set_input_size(img_size=img_size, patch_size=patch_size)
        patch_embed = self.trunk.patch_embed
        for info in self.feature_info:
            info["reduction"] = patch_embed.feat_ratio()
        update_model_input_size(self, patch_embed.img_size, patch_size=patch_size)

    def backbone_state_dict(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """timm's names, DeiT's among them; see `load_backbone`.

        Class, distillation and register tokens are dropped with their positions, positions and
        patch kernels of other sizes resampled, layer scale multiplied into the layer before it.

        Raises:
            ConversionError: positions that make no square grid.
        """
        tensors = _fold_layer_scale(state_dict)
        table = tensors.get("pos_embed")
        if table is not None and table.ndim == 3:
            num_prefix = sum(tensors[name].shape[1] for name in PREFIX_TOKENS if name in tensors)
            tensors["pos_embed"] = _fit_positions(table, num_prefix, self)
        patch = tensors.get(PATCH_WEIGHT)
        if patch is not None and patch.ndim == 4:
            size = self.trunk.patch_embed.patch_size
            tensors[PATCH_WEIGHT] = resample_patch_embed(patch, list(size))
        return tensors


def _fold_layer_scale(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """gamma * (W x + b) is (gamma W) x + gamma b."""
    scaled = {"1": "attn.proj", "2": "mlp.fc2"}
    tensors = dict(state_dict)
    for name, gamma in state_dict.items():
        match = re.fullmatch(r"(blocks\.\d+)\.(?:ls|gamma_)([12])(?:\.gamma)?", name)
        if match is None:
            continue
        weight, bias = (f"{match[1]}.{scaled[match[2]]}.{part}" for part in ("weight", "bias"))
        if weight in tensors and bias in tensors:
            tensors[weight] = gamma[:, None] * tensors[weight]
            tensors[bias] = gamma * tensors[bias]
    return tensors


def _fit_positions(table: Tensor, num_prefix: int, model: GramianViT) -> Tensor:
    """A position table [1, count, D] without those of num_prefix tokens, at the trunk's grid.

    Some vision transformers give their prefix tokens no position. The grid is taken as square.
    """
    grid = model.trunk.patch_embed.grid_size
    count = table.shape[1]
    for skipped in (num_prefix, 0):
        side = math.isqrt(max(count - skipped, 0))
        if side > 0 and side * side == count - skipped:
            return resample_abs_pos_embed(table[:, skipped:], list(grid), [side, side], 0)
    raise ConversionError(
        f"pos_embed: {count} positions are no square grid, with or without {num_prefix} tokens"
    )


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: GramianViT) -> dict[str, Tensor]:
    """Own parameters for this model, positions resampled where it was made for another size."""
    tensors = unwrap(state_dict)
    table = tensors.get("trunk.pos_embed")
    if table is not None and table.ndim == 3 and table.shape != model.trunk.pos_embed.shape:
        tensors["trunk.pos_embed"] = _fit_positions(table, 0, model)
    return gramian_filter(tensors, model)


def _create_ga_vit(variant: str, pretrained: bool, **kwargs: Any) -> GramianViT:
    model_args = dict(gram_dim=128, gram_layer=None, mlp_groups=2)
    return create_gramian(
        GramianViT,
        variant,
        pretrained,
        feature_indices=(-3, -2, -1),
        filter_fn=checkpoint_filter_fn,
        **dict(model_args, **kwargs),
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return gramian_cfg(first_conv="trunk.patch_embed.proj", **kwargs)


default_cfgs = generate_default_cfgs(
    {"ga_vit_small.untrained": _cfg(), "ga_vit_medium.untrained": _cfg()}
)


@register_model
def ga_vit_small(pretrained: bool = False, **kwargs: Any) -> GramianViT:
    """GA-ViT-S: 27.67 M parameters, 4.61 GMACs at 224.

    The paper: 80.9 % top-1 with 27.7 M and 4.3 G. Never released, derived from the paper's counts;
    4.30 GMACs without attention's products but with the heads' keys and values of every position,
    which ours does not compute.
    """
    model_args = dict(proj_groups=8, embed_groups=48, attn_dim=96)
    return _create_ga_vit("ga_vit_small", pretrained, **dict(model_args, **kwargs))


@register_model
def ga_vit_medium(pretrained: bool = False, **kwargs: Any) -> GramianViT:
    """GA-ViT-M: 60.48 M parameters, 10.04 GMACs at 224.

    The paper: 82.6 % top-1 with 60.5 M and 9.6 G. Never released, derived from the paper's counts;
    9.64 GMACs, counted as for `ga_vit_small`.
    """
    model_args = dict(
        embed_dim=576, trunk_num_heads=9, proj_groups=4, embed_groups=32, attn_dim=144
    )
    return _create_ga_vit("ga_vit_medium", pretrained, **dict(model_args, **kwargs))
