"""Gramian attention heads (arXiv:2310.16483) on any timm model that gives maps: `ga_backbone`."""

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch
from timm.models import (
    PretrainedCfg,
    generate_default_cfgs,
    register_model,
    resolve_model_input_args,
)
from timm.models._features import FeatureGetterNet
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from qna_timm.convert.common import unwrap
from qna_timm.layers.fuse import FuseBottleneck, MapFusion
from qna_timm.models.gramian import GramianNet, create_gramian, gramian_cfg, init_trunc_normal
from qna_timm.models.gramian import checkpoint_filter_fn as checkpoint_filter_fn

__all__ = ["GramianBackbone"]

DEFAULT_BACKBONE = "efficientnet_b0"
FINEST_STRIDE = 4  # of the default taps: the paper fuses stages of strides 4 to 32
MAX_DEFAULT_WIDTH = 1024  # D of the paper's ResNet-50, whose last stage would have twice that
MAP_METHODS = ("forward_intermediates", "prune_intermediate_layers")
OWN_ARGS = ("num_classes", "in_chans", "img_size", "features_only", "device", "dtype")
BACKBONE_CFG = (
    "input_size",
    "test_input_size",
    "min_input_size",
    "interpolation",
    "crop_pct",
    "test_crop_pct",
    "crop_mode",
    "mean",
    "std",
)


class GramianBackbone(GramianNet):
    """Gramian heads on a timm model, its maps fused into one.

    Made by timm's factory, also from the command line, where `--model ga_NAME` stands for it:

        timm.create_model("ga_backbone", backbone="resnet18", num_classes=10, num_branches=3)

    The backbone is asked for its maps by timm's `forward_intermediates`, and not called: hooks on
    its parts fire, FSDP2 takes those for units. It is cut after its last tap; its own norm (unless
    `tap_norm`) and classifier go. It keeps its initialisation, or weights; fusion and heads are
    initialised as the released ConvNeXts are. Images of the sizes that the backbone takes.

    Args:
        backbone: timm's name of a model, with or without the tag of its weights.
        taps: Indices into the backbone's feature_info of the maps that are fused; negative from
            the end. Default: the last map of each stride from 4 up. With fewer, backbones of
            parallel branches (CoaT, CrossViT, HRNet) may keep parameters that nothing uses.
        tap_norm: Apply the backbone's final norm to the maps that it normalises in timm's
            `forward_intermediates`. Default: where all maps have one stride (plain ViTs).
        fuse_reduction: Wanted stride of the fused map; the nearest tapped one is taken, and the
            last tap of that stride gives the size.
        num_features: D. Default: the last tap's width, if it is alone a multiple of 32, else
            rounded to one between 64 and 1024. A single tap of D channels is taken as it is.
        in_chans: Image channels.
        num_classes: Classes; 0 for the branches' tokens.
        global_pool: 'gram' or ''.
        img_size: Image size, for backbones whose constructor takes one.
        drop_rate: Dropout of the tokens before the classifiers (0 if None), and of the backbone
            inside, if it takes a rate (its own default if None).
        drop_path_rate: Stochastic depth of fusion and Gram layers (0 if None) and the rate handed
            to the backbone, if it takes one (its own default if None).
        backbone_pretrained: Start from the backbone's published weights; not when weights of the
            whole model are loaded.
        backbone_args: More arguments of the backbone's constructor.
        gram_dim: G.
        gram_layer: 'convnext', 'cswin' or None, see `GramianHead`.
        mlp_ratio: Hidden width of the heads' MLP over D.
        proj_groups: Groups of the projection D -> G. Default: the most up to 8 that divide both.
        embed_groups: Groups of the embedding G(G+1)/2 -> D. Default: the most up to 16.
        mlp_groups: Groups of the MLP. Default: the most up to 4.
        head_args: More arguments of `GramianHead`: num_branches, attn_dim, num_heads...

    Raises:
        ValueError: the backbone is unknown or gives no maps, or an argument does not fit it.
    """

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        taps: Sequence[int] | None = None,
        tap_norm: bool | None = None,
        fuse_reduction: int = 16,
        num_features: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "gram",
        img_size: int | tuple[int, int] | None = None,
        drop_rate: float | None = None,
        drop_path_rate: float | None = None,
        backbone_pretrained: bool = False,
        backbone_args: Mapping[str, Any] | None = None,
        gram_dim: int = 128,
        gram_layer: str | None = None,
        mlp_ratio: float = 4.0,
        proj_groups: int | None = None,
        embed_groups: int | None = None,
        mlp_groups: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **head_args: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        optional = {"img_size": img_size, "drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
        trunk = create_trunk(
            backbone, backbone_pretrained, in_chans, optional, backbone_args or {}, **dd
        )
        info = trunk.feature_info
        indices = _tap_indices(backbone, taps, [entry["reduction"] for entry in info])
        if tap_norm is None:
            tap_norm = len({entry["reduction"] for entry in info}) == 1
        trunk.prune_intermediate_layers(indices, prune_norm=not tap_norm, prune_head=True)
        reductions = [info[i]["reduction"] for i in indices]
        width = "num_chs_norm" if tap_norm else "num_chs"
        channels = [info[i].get(width, info[i]["num_chs"]) for i in indices]
        if num_features is None:
            num_features = _default_width(channels)
        reference = _nearest(reductions, fuse_reduction)
        block = nn.Identity()
        if channels != [num_features]:
            block = FuseBottleneck(sum(channels), num_features, drop_path_rate or 0.0, **dd)
        triangle = gram_dim * (gram_dim + 1) // 2
        super().__init__(
            trunk,
            MapFusion(reductions, reference, block),
            num_features,
            num_classes,
            global_pool,
            in_chans=in_chans,
            gram_dim=gram_dim,
            gram_layer=gram_layer,
            mlp_ratio=mlp_ratio,
            proj_groups=proj_groups or _most_groups(8, num_features, gram_dim),
            embed_groups=embed_groups or _most_groups(16, num_features, triangle),
            mlp_groups=mlp_groups or _most_groups(4, num_features, int(num_features * mlp_ratio)),
            drop_rate=drop_rate or 0.0,
            drop_path=drop_path_rate or 0.0,
            **head_args,
            **dd,
        )
        self.taps = indices
        self.tap_norm = tap_norm
        self.fuse_reduction = reductions[reference]
        self.backbone_args = dict(backbone_args or {})
        self._trunk_args = dict(trunk._model_args)
        # Beyond the last tap the trunk is cut.
        self.feature_info = self.feature_info[: indices[-1] + 1]
        init_trunc_normal(self.fuse)
        self.head.init_weights("trunc_normal")

    def forward_taps(self, x: Tensor) -> list[Tensor]:
        """Images to the tapped maps, NCHW, in the order in which the backbone makes them."""
        maps = self.trunk.forward_intermediates(
            x,
            indices=self.taps,
            norm=self.tap_norm,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        if torch.jit.is_scripting():
            assert torch.jit.isinstance(maps, list[Tensor])
        return maps

    def _features_and_maps(
        self, x: Tensor, indices: list[int], norm: bool
    ) -> tuple[Tensor, list[Tensor]]:
        if norm != self.tap_norm:
            # The fusion takes the maps with, the caller without the norm, or the reverse.
            return self.fuse(self.forward_taps(x)), self._trunk_maps(x, indices, norm)
        wanted = sorted({*indices, *self.taps})
        maps = self._trunk_maps(x, wanted, norm)
        fused = self.fuse([maps[wanted.index(i)] for i in self.taps])
        return fused, [maps[wanted.index(i)] for i in indices]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any] | Callable[[str], Any]:
        """Parameter groups for layer-wise learning rates: the trunk's, the fusion, the head.

        A trunk that does not say its groups has one for each of its maps.
        """
        if hasattr(self.trunk, "group_matcher"):
            matcher = super().group_matcher(coarse)
            if not isinstance(matcher, dict):
                return matcher
        else:
            modules = [re.escape(info["module"]) for info in self.feature_info]
            matcher = {"stem": rf"^(?!head|fuse|(?:{'|'.join(modules)})\.)"}
            matcher.update({name: rf"^{name}\." for name in modules})
        # After the trunk's groups one for what they leave out (a last norm), or it joins the head.
        matcher.pop("fuse", None)
        return {**matcher, "rest": r"^trunk", "fuse": r"^fuse"}

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None, **sizes: Any) -> None:
        """Adapt the backbone to another image size, as its own method of this name does.

        Args:
            img_size: New image size; the current one if None.
            sizes: Further arguments of the backbone's method, window sizes for instance.

        Raises:
            ValueError: the backbone's sizes are fixed when it is made.
        """
        name = type(self.trunk).__name__
        if "patch_size" in sizes:
            raise ValueError("patch_size: the fusion is made for one, give it in backbone_args")
        if hasattr(self.trunk, "set_input_size"):
            self.trunk.set_input_size(img_size=img_size, **sizes)
            self.backbone_args.update(self._new_sizes())
        elif sizes or self.trunk.pretrained_cfg.get("fixed_input_size"):
            argument = next(iter(sizes), "img_size")
            raise ValueError(f"{argument}: {name} cannot change it, give it when the model is made")
        size = self._traits.get("img_size") if img_size is None else img_size
        update_model_input_size(self, size, backbone_args=self.backbone_args or None)

    def _new_sizes(self) -> dict[str, Any]:
        """Arguments that make the backbone as it now is; for stages that were cut, the last's."""
        kept, stages = len(self.feature_info), len(self.trunk.feature_info)
        sizes = {}
        for name, value in self.trunk._model_args.items():
            if name in OWN_ARGS or value == self._trunk_args.get(name):
                continue
            per_stage = isinstance(value, list | tuple) and all(
                isinstance(entry, list | tuple) for entry in value
            )
            sizes[name] = [*value, *value[-1:] * (stages - kept)] if per_stage else value
        return sizes

    def backbone_state_dict(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """A file of the backbone's under timm's names, position tables resized; see
        `load_backbone`."""
        state_dict = unwrap(state_dict)
        own = {name: state_dict[name] for name in self.trunk.state_dict() if name in state_dict}
        if len(own) == len(self.trunk.state_dict()):
            state_dict = own  # the backbone's filter may ask the trunk for layers that were cut
        module = sys.modules[type(self.trunk).__module__]
        convert = getattr(module, "checkpoint_filter_fn", None)
        if convert is None:
            return state_dict
        try:
            return convert(dict(state_dict), self.trunk)
        except (AttributeError, KeyError, RuntimeError):
            return state_dict


def create_trunk(
    backbone: str,
    pretrained: bool,
    in_chans: int,
    optional: Mapping[str, Any],
    backbone_args: Mapping[str, Any],
    **dd: Any,
) -> nn.Module:
    """The backbone without its classifier.

    Args:
        backbone: timm's name.
        pretrained: Load published weights.
        in_chans: Image channels.
        optional: Arguments that not every model takes; those that are None are left out, and those
            that it refuses.
        backbone_args: Arguments that it must take.
        dd: Device and dtype.

    Raises:
        ValueError: timm has no such model, or it gives no maps.
    """
    reserved = [name for name in OWN_ARGS if name in backbone_args]
    if reserved:
        raise ValueError(f"backbone_args: {reserved[0]} is an argument of ga_backbone itself")
    if not _is_timm_name(backbone):
        raise ValueError(f"backbone: timm has no model {backbone!r} (timm.list_models() lists all)")
    given = {name: value for name, value in optional.items() if value is not None}
    while True:
        try:
            trunk = timm.create_model(
                backbone,
                pretrained=pretrained,
                num_classes=0,
                in_chans=in_chans,
                **{**given, **backbone_args},
                **dd,
            )
            break
        except TypeError as error:
            refused = [name for name in given if f"'{name}'" in str(error)]
            if not refused:
                raise
            del given[refused[0]]
    missing = [name for name in MAP_METHODS if not hasattr(trunk, name)]
    if isinstance(trunk, GramianNet):
        raise ValueError(f"backbone: {backbone!r} has Gramian heads, give the model without them")
    if missing or not getattr(trunk, "feature_info", None):
        raise ValueError(
            f"backbone: {backbone!r} gives no feature maps, it lacks timm's"
            f" {missing[0] if missing else 'feature_info'}"
        )
    return trunk


def _is_timm_name(backbone: Any) -> bool:
    """Whether timm has a model of this name; names of hubs and local folders are left to timm."""
    if not isinstance(backbone, str):
        return False
    return ":" in backbone or timm.is_model(backbone.partition(".")[0])


def _tap_indices(backbone: str, taps: Sequence[int] | None, reductions: list[int]) -> list[int]:
    """Indices of the tapped maps, rising; by default the last map of each stride from 4 up."""
    if taps is None:
        last = {reduction: i for i, reduction in enumerate(reductions)}
        coarse = [i for reduction, i in last.items() if reduction >= FINEST_STRIDE]
        return sorted(coarse or last.values())
    count = len(reductions)
    listed = isinstance(taps, Sequence) and len(taps) > 0
    if not listed or not all(isinstance(tap, int) and -count <= tap < count for tap in taps):
        strides = ", ".join(map(str, reductions))
        raise ValueError(
            f"taps must be a list of indices from 0 to {count - 1} into the maps of {backbone}"
            f" (strides {strides}), got {taps}"
        )
    return sorted({tap % count for tap in taps})


def _nearest(reductions: list[int], wanted: int) -> int:
    """Index of the last map whose stride is nearest to the wanted one, by ratio."""
    if wanted < 1:
        raise ValueError(f"fuse_reduction must be at least 1, got {wanted}")
    distances = [abs(math.log(reduction / wanted)) for reduction in reductions]
    nearest = reductions[distances.index(min(distances))]
    return max(i for i, reduction in enumerate(reductions) if reduction == nearest)


def _default_width(channels: list[int]) -> int:
    last = channels[-1]
    if len(channels) == 1 and last % 32 == 0:
        return last
    return min(max(64, 32 * round(last / 32)), MAX_DEFAULT_WIDTH)


def _most_groups(limit: int, *sizes: int) -> int:
    """The largest number up to the limit that divides all sizes."""
    common = math.gcd(*sizes)
    return max(groups for groups in range(1, limit + 1) if common % groups == 0)


class TapFeatures(FeatureGetterNet):
    """timm's feature extractor; the model's taps unless indices are given."""

    def __init__(
        self, model: GramianBackbone, out_indices: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(model, model.taps if out_indices is None else out_indices, *args, **kwargs)


# What the backbone decides is left open here, and filled in for the model that is built. A fixed
# size makes timm's scripts hand on --img-size.
default_cfgs = generate_default_cfgs(
    {
        "ga_backbone.untrained": gramian_cfg(
            mean=None,
            std=None,
            interpolation=None,
            crop_pct=None,
            pool_size=None,
            fixed_input_size=True,
        )
    }
)


def _cfg_overlay(
    backbone: str,
    backbone_args: Mapping[str, Any],
    given: PretrainedCfg | Mapping[str, Any] | str | None,
    overlay: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What the backbone decides of the model's cfg, under what the user does.

    Args:
        backbone: timm's name.
        backbone_args: Its arguments.
        given: The cfg that the model is made with; from timm's scripts the registered one with
            the user's changes in it.
        overlay: The user's changes.
    """
    registered = default_cfgs["ga_backbone"].default.to_dict()
    if isinstance(given, PretrainedCfg):
        given = given.to_dict()
    cfg = given if isinstance(given, Mapping) else registered
    if cfg.get("pool_size"):  # the cfg of a model that was built, and saved
        return dict(overlay or {})
    names = [name for name in ("pretrained_cfg", "pretrained_cfg_overlay") if name in backbone_args]
    own_args = {name: backbone_args[name] for name in names}
    source = resolve_model_input_args(backbone, **own_args)["pretrained_cfg"]
    stems = source.get("first_conv") or ()
    single = isinstance(stems, str)
    decided = {
        "fixed_input_size": bool(source.get("fixed_input_size")),
        "first_conv": f"trunk.{stems}" if single else tuple(f"trunk.{stem}" for stem in stems),
    }
    for key in BACKBONE_CFG:
        if key in source and cfg.get(key) == registered.get(key):
            decided[key] = source[key]
    return {**decided, **(overlay or {})}


def _add_pool_size(model: GramianBackbone) -> None:
    """Complete the cfg by the size of the fused map, known once the model is built."""
    cfg = model.pretrained_cfg
    if cfg.get("pool_size"):
        return
    stride = model.fuse_reduction
    # Patches fit into a fixed size, strided convolutions are padded.
    cfg["pool_size"] = tuple(
        side // stride if cfg["fixed_input_size"] else -(-side // stride)
        for side in cfg["input_size"][1:]
    )


@register_model
def ga_backbone(pretrained: bool = False, **kwargs: Any) -> GramianBackbone:
    """Gramian heads on `backbone`, by default EfficientNet-B0: see `GramianBackbone`."""
    backbone = kwargs.get("backbone", DEFAULT_BACKBONE)
    overlay = kwargs.pop("pretrained_cfg_overlay", None)
    if _is_timm_name(backbone):
        backbone_args = kwargs.get("backbone_args") or {}
        overlay = _cfg_overlay(backbone, backbone_args, kwargs.get("pretrained_cfg"), overlay)
    if pretrained:
        kwargs["backbone_pretrained"] = False
    if kwargs.get("features_only") and kwargs.get("feature_cls") in (None, "getter"):
        kwargs["feature_cls"] = TapFeatures
    model = create_gramian(
        GramianBackbone,
        "ga_backbone",
        pretrained,
        feature_indices=None,
        pretrained_cfg_overlay=overlay,
        **kwargs,
    )
    if isinstance(model, GramianBackbone):
        _add_pool_size(model)
    return model
