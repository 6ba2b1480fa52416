"""Networks with Gramian attention heads: a trunk, its maps fused into one, several heads on it.

Paper: "Gramian Attention Heads are Strong yet Efficient Vision Learners", ICCV 2023,
https://arxiv.org/abs/2310.16483
Released code: https://github.com/Lab-LVM/imagenet-models (folder GA).

`GramianNet` is what all families share; `ga_convnext`, `ga_cswin`, `ga_resnet`, `ga_vit` and
`ga_backbone` build it on their trunks.

Letters: B batch, D channels of the fused map, M branches.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_device_dtype, trunc_normal_
from timm.models import adapt_input_conv, build_model_with_cfg, load_state_dict
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from qna_timm.convert import ConversionError, gramian_state_dict
from qna_timm.layers.gramian_head import GramianHead


@dataclass(frozen=True)
class BackboneReport:
    """What `GramianNet.load_backbone` found: tensors loaded, and those of the trunk left fresh."""

    loaded: int
    fresh: list[str]

    def __str__(self) -> str:
        groups = sorted({re.sub(r"\.(weight|bias|gamma|running_\w+)$", "", n) for n in self.fresh})
        fresh = f"fresh: {', '.join(groups)}" if groups else "nothing fresh"
        return f"{self.loaded} tensors of the trunk loaded, {fresh}"


class GramianNet(nn.Module):
    """A trunk whose maps are fused into one, [B, D, H, W], that several branches read.

    logits = mean over branches of branch logits. The released code returns the list of branch
    logits and sums them for evaluation: the same ranking, probabilities and losses of logits
    five times sharper.

    Subclasses build the trunk and pass it here: a timm model without classifier, called with images
    for the list of NCHW maps that `fuse` takes. A stage that gives maps from between its blocks
    runs block by block and is not called itself: hooks on it do not fire, those on its blocks do,
    and FSDP2 takes the trunk or its blocks for units.

    Args:
        trunk: See above.
        fuse: From the list of maps to [B, num_features, H, W].
        num_features: D.
        num_classes: Classes; 0 for the branches' tokens side by side, [B, M * D].
        global_pool: 'gram', the class tokens made of Gram matrices; '' (without classes) for the
            fused map itself.
        feature_taps: For each entry of `trunk.feature_info` its index in the list of maps; None
            where the maps are not among them and `_features_and_maps` is overridden.
        in_chans: Image channels.
        head_args: Arguments of `GramianHead`.
    """

    def __init__(
        self,
        trunk: nn.Module,
        fuse: nn.Module,
        num_features: int,
        num_classes: int = 1000,
        global_pool: str = "gram",
        feature_taps: list[int] | None = None,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **head_args: Any,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = num_features
        self.trunk = trunk
        self.fuse: nn.Module | None = fuse
        self.feature_taps = feature_taps
        self.feature_info = [
            dict(info, module=f"trunk.{info['module']}") for info in trunk.feature_info
        ]
        self.head = GramianHead(
            num_features,
            num_classes,
            global_pool=global_pool,
            device=device,
            dtype=dtype,
            **head_args,
        )
        self.head_hidden_size = self.head.num_features

    @property
    def num_branches(self) -> int:
        """M."""
        return self.head.num_branches

    @torch.jit.ignore
    def set_branch_outputs(self, enable: bool = True) -> None:
        """Return the logits of every branch, [B, M, classes], instead of their mean [B, classes].

        In training and evaluation alike; not part of the state. What a loss on branches needs.
        """
        self.head.branch_outputs = enable

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Set trunk, fusion and heads to initial values, as the constructor does.

        Parameters of a `ga_backbone` that neither its backbone's `init_weights` nor its modules'
        `reset_parameters` know stay as they are.

        Args:
            needs_reset: Also call `reset_parameters` of all modules (after `to_empty`).
        """
        parts = [self.trunk] if self.fuse is None else [self.trunk, self.fuse]
        if needs_reset:
            for module in (module for part in parts for module in part.modules()):
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
                if hasattr(module, "init_non_persistent_buffers"):
                    module.init_non_persistent_buffers()
        if hasattr(self.trunk, "init_weights"):
            self.trunk.init_weights()
        if self.fuse is not None:
            self._init_fuse()
        self.head.init_weights(self.head.conv_init)

    @torch.jit.ignore
    def _init_fuse(self) -> None:
        """Initial weights of the fusion, where they are not PyTorch's."""
        init_trunc_normal(self.fuse)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The trunk's parameters that its recipe does not decay."""
        own = getattr(self.trunk, "no_weight_decay", set)
        return {f"trunk.{name}" for name in own()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any] | Callable[[str], Any]:
        """Parameter groups for layer-wise learning rates: the trunk's, the fusion, the head."""
        matcher = self.trunk.group_matcher(coarse=coarse)
        if not isinstance(matcher, dict):
            return lambda name: _group_of(name, matcher)

        def below_trunk(pattern: str) -> str:
            # Patterns are matched at the start of names, also the alternatives in them.
            unanchored = re.sub(r"(?<!\[)\^", "", pattern)
            return rf"^trunk\.(?:{unanchored})"

        groups: dict[str, Any] = {
            key: [(below_trunk(pattern), suffix) for pattern, suffix in spec]
            if isinstance(spec, list | tuple)
            else below_trunk(spec)
            for key, spec in matcher.items()
            if spec is not None
        }
        return {**groups, "fuse": r"^fuse"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the trunk's activations in backward."""
        self.trunk.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier of all branches: weight [M, classes, D], bias [M, classes]."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifiers of all branches.

        Args:
            num_classes: Classes; 0 for none.
            global_pool: 'gram' or ''; the current one if None.

        Raises:
            ValueError: branches where pruning has removed the fused map.
        """
        if self.fuse is None and (num_classes > 0 or global_pool == "gram"):
            raise ValueError(
                "the fused map was pruned, so that num_classes must be 0 and global_pool '', "
                f"got {num_classes} and {global_pool!r}"
            )
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))
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
        """Forward pass that also returns maps of the trunk.

        Args:
            x: Images [B, in_chans, H, W].
            indices: Maps to return: the last n if an int, these if a list, all if None.
            norm: Apply the trunk's final norm, if it has one, to maps that may have it.
            stop_early: Run nothing after the last map wanted; features then end there.
            output_fmt: 'NCHW'.
            intermediates_only: Return the maps alone.

        Returns:
            The maps, or (features as from `forward_features`, the maps).
        """
        assert output_fmt == "NCHW", "output_fmt must be NCHW"
        take, last = feature_take_indices(len(self.feature_info), indices)
        early = stop_early and last < len(self.feature_info) - 1
        if intermediates_only or early or self.fuse is None:
            wanted = take if intermediates_only else sorted({*take, last})
            maps = self._trunk_maps(x, wanted, norm)
            if intermediates_only:
                return maps
            return maps[-1], [maps[wanted.index(i)] for i in take]
        return self._features_and_maps(x, take, norm)

    def _trunk_maps(self, x: Tensor, indices: list[int], norm: bool = False) -> list[Tensor]:
        return self.trunk.forward_intermediates(
            x, indices=indices, norm=norm, stop_early=True, intermediates_only=True
        )

    def _features_and_maps(
        self, x: Tensor, indices: list[int], norm: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The fused map, and maps of the trunk from the same pass."""
        taps = self.forward_taps(x)
        return self.fuse(taps), [taps[self.feature_taps[i]] for i in indices]

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the maps of the given indices do not need.

        The fusion follows the last map as final norms do: it goes with prune_norm or when the
        trunk is cut before its last map; features then are the last map kept.

        Args:
            indices: Maps to keep: the last n if an int, these if a list.
            prune_norm: Also remove the fusion.
            prune_head: Also remove the heads.

        Returns:
            Indices of those maps.
        """
        take, last = feature_take_indices(len(self.feature_info), indices)
        prune_end = last < len(self.feature_info) - 1
        if prune_end or prune_norm:
            self.trunk.prune_intermediate_layers(take, prune_norm=prune_norm, prune_head=True)
            self.fuse = None
            self._last = last
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or prune_end or prune_norm:
            self.reset_classifier(0, "")
            self.head_hidden_size = self.num_features
        return take

    def forward_taps(self, x: Tensor) -> list[Tensor]:
        """Images to the NCHW maps that are fused."""
        return self.trunk(x)

    @torch.jit.unused
    def _pruned_features(self, x: Tensor) -> Tensor:
        return self._trunk_maps(x, [self._last])[0]

    def forward_features(self, x: Tensor) -> Tensor:
        """The fused map, [B, D, H, W]."""
        if self.fuse is None:
            return self._pruned_features(x)
        return self.fuse(self.forward_taps(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The heads on `forward_features`' map; with pre_logits the tokens of all branches side
        by side, [B, M * D]."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to logits [B, classes], or see `set_branch_outputs`."""
        return self.forward_head(self.forward_features(x))

    def backbone_state_dict(self, state_dict: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """A backbone's file under the trunk's names; what the trunk lacks may stay in it."""
        return state_dict

    @torch.jit.ignore
    def load_backbone(self, source: str) -> BackboneReport:
        """Load weights of a backbone, trained for itself, into the trunk.

        What fits by name and shape is loaded; the first convolution is adapted to `in_chans`.

        Args:
            source: A file (safetensors, or PyTorch's, of tensors only) or the name of a timm model
                with published weights, such as 'convnext_tiny.fb_in1k'.

        Returns:
            How many tensors were loaded and which of the trunk were not.

        Raises:
            ConversionError: unreadable, or nothing in it fits.
        """
        state_dict = self.backbone_state_dict(_read_backbone(source))
        wanted = self.trunk.state_dict()
        cfg = getattr(self, "pretrained_cfg", None) or {}  # timm's factory sets it
        stems = cfg.get("first_conv") or ()
        stems = (stems,) if isinstance(stems, str) else stems
        stems = {f"{stem.removeprefix('trunk.')}.weight" for stem in stems}
        found = {}
        for name, tensor in state_dict.items():
            if name in stems and name in wanted and tensor.shape[1] != wanted[name].shape[1]:
                tensor = adapt_input_conv(self.in_chans, tensor)
            if name in wanted and tensor.shape == wanted[name].shape:
                found[name] = tensor
        fresh = [name for name in wanted if name not in found and not name.endswith("_tracked")]
        weights = [name for name in found if not name.endswith("_tracked")]
        if not weights:
            raise ConversionError(f"{source}: no tensor fits the trunk, {type(self).__name__}")
        self.trunk.load_state_dict(found, strict=False)
        return BackboneReport(len(weights), fresh)


def init_trunc_normal(module: nn.Module) -> None:
    """Truncated normal weights (std 0.02) and zero biases in convolutions and linear maps."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _group_of(name: str, matcher: Callable[[str], Any]) -> Any:
    if not name.startswith("trunk."):
        return (float("inf"),)
    return matcher(name.removeprefix("trunk."))


def _read_backbone(source: str) -> Mapping[str, Any]:
    if Path(source).exists() or "/" in source or not timm.is_model(source.split(".")[0]):
        try:
            return load_state_dict(source, use_ema=True)
        except Exception as error:
            # The first sentence: torch's later ones advise to trust the file.
            reason = re.split(r"\n|[.] ", str(error).strip() or type(error).__name__)[0]
            raise ConversionError(
                f"{source}: neither a readable checkpoint nor a timm model ({reason})"
            ) from error
    try:
        return timm.create_model(source, pretrained=True).state_dict()
    except (RuntimeError, OSError, ValueError) as error:
        raise ConversionError(f"{source}: {str(error).strip().splitlines()[0]}") from error


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: GramianNet) -> dict[str, Tensor]:
    """Released or own parameters for this model: names, and the branches' weights stacked."""
    return gramian_state_dict(state_dict, model)


def create_gramian(
    model_class: type[GramianNet],
    variant: str,
    pretrained: bool = False,
    feature_indices: tuple[int, ...] | None = (0, 1, 2, 3),
    filter_fn: Callable[..., dict[str, Tensor]] = checkpoint_filter_fn,
    **kwargs: Any,
) -> GramianNet:
    """timm's builder with what all Gramian models share.

    Args:
        model_class: Subclass of `GramianNet`.
        variant: Registered name.
        pretrained: Load the cfg's weights.
        feature_indices: Maps that `features_only` gives unless told otherwise; None for all.
        filter_fn: From a checkpoint's state dict to the model's.
        kwargs: Arguments of the class and of timm's builder.

    Raises:
        ValueError: a way to take features that does not fit a network whose maps lie in its trunk.
    """
    feature_cls = kwargs.get("feature_cls") or "getter"
    if feature_cls in ("list", "dict", "hook", "fx"):
        raise ValueError(f"feature_cls of {variant} must be 'getter', got {feature_cls!r}")
    return build_model_with_cfg(
        model_class,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg=dict(feature_cls="getter", out_indices=feature_indices),
        **kwargs,
    )


def gramian_cfg(**kwargs: Any) -> dict[str, Any]:
    """Pretrained cfg with what all Gramian models share."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (14, 14),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2310.16483",
        "paper_name": "Gramian Attention Heads are Strong yet Efficient Vision Learners",
        **kwargs,
    }
