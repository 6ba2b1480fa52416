"""QnA-ViT, a hierarchical vision transformer with learned-query local attention.

Paper: "Learned Queries for Efficient Local Attention", CVPR 2022, https://arxiv.org/abs/2112.11435
Released JAX code and checkpoints: https://github.com/moabarar/qna (MIT licence);
`checkpoint_filter_fn` reads its parameters.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    get_act_layer,
    get_device_dtype,
    get_norm_layer,
    to_2tuple,
)
from timm.layers.weight_init import lecun_normal_
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    named_apply,
    register_model,
)
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from qna_timm.convert import qna_vit_state_dict
from qna_timm.layers import (
    BlockArgs,
    LearnedQueryAttention,
    LearnedQueryPool,
    PatchStem,
    QnAStage,
    ResNetStem,
    StageArgs,
    WindowAttention,
    scale_windows,
    stage_windows,
)
from qna_timm.layers.qna_stage import check_depths, drop_path_rates, plan_stages
from qna_timm.layers.window_attn import Size2

__all__ = ["QnAViT"]


STEM_REDUCTION = 4
REF_IMG_SIZE = (224, 224)
REF_WINDOW_SIZE = (14, 14, 14, 7)


class QnAViT(nn.Module):
    """QnA-ViT, on images of any size.

    Four stages at strides 4, 8, 16 and 32 of width embed_dim * (1, 2, 4, 8), each made of
    window-attention blocks, then learned-query ("QnA") blocks; a strided QnA block leads into the
    next stage. Maps are channels-last throughout.

    Image sizes: at 224 the function is the released one up to rounding. Sides that 4
    does not divide are zero-padded by the stem, split over both sides; odd maps are halved
    rounding up. Window attention pads its map at the bottom and right up to whole windows, and
    no token attends to padding; a map smaller than a window is one window. So `model(x)` takes any
    height and width at the windows it was built with; `img_size` (or `set_input_size`) scales the
    windows with the map instead, (14, 7) at 224 to (24, 12) at 384, and resizes the bias tables as
    the released fine-tuning code does.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for pooled features.
        global_pool: 'avg', or another pooling of timm's `ClassifierHead`; '' for a map.
        img_size: Image height and width that window_size=None is scaled to; 224 if None.
        embed_dim: Width of the first stage.
        qna_depths: QnA blocks in each stage, strided ones not counted.
        window_depths: Window-attention blocks in each stage.
        qna_num_heads: Heads of each stage's QnA blocks; its strided block has twice as many.
        window_num_heads: Heads of each stage's window-attention blocks.
        kernel_size: Window side of QnA blocks, in tokens, for all stages or each.
        window_size: Window side, or (height, width), of window-attention blocks, in tokens, for all
            stages or each; None for the released windows at img_size.
        num_queries: Learned queries.
        normalize_query: Divide queries by their norm, for all stages or each.
        normalize_stop_grad: Take that norm as a constant in backward.
        query_weight: See `LearnedQueryAttention`.
        pos_embed: See `LearnedQueryAttention`.
        window_pos_embed: 'relative' or 'none' for the window attention.
        qkv_bias: Biases on attention projections.
        mlp_ratio: Hidden width of MLPs over their width.
        stem_type: 'patch', a 4x4 convolution, or 'resnet'.
        down_shortcut: Residual path of strided blocks, 'conv' or 'avgpool'.
        head_type: 'gap', mean of the normalised map; 'qna_v1', learned-query attention over the
            whole map with 2 normalised queries, a weight for each offset and relative position
            biases, whatever the blocks have; 'qna_v2', the sum of both.
        init_values: Initial layer scale; None for no layer scale.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after attention projections and in MLPs.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        drop_path_downsample: Strided blocks take a step of that rise (and drop their MLP branch).
        act_layer: Activation of MLPs.
        norm_layer: Normalisation over channels.

    Raises:
        ValueError: lists that are not one entry for each stage, sizes below 1, an unknown kind of
            stem, head or table.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: Size2 | None = None,
        embed_dim: int = 64,
        qna_depths: Sequence[int] = (2, 3, 2, 0),
        window_depths: Sequence[int] = (0, 0, 4, 2),
        qna_num_heads: Sequence[int] = (8, 16, 32, 64),
        window_num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int | Sequence[int] = 3,
        window_size: Size2 | Sequence[Size2] | None = None,
        num_queries: int = 2,
        normalize_query: bool | Sequence[bool] = True,
        normalize_stop_grad: bool = False,
        query_weight: str = "normal",
        pos_embed: str = "relative",
        window_pos_embed: str = "relative",
        qkv_bias: bool = False,
        mlp_ratio: float = 4.0,
        stem_type: str = "patch",
        down_shortcut: str = "conv",
        head_type: str = "gap",
        init_values: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_downsample: bool = True,
        act_layer: str | Callable[..., nn.Module] = "gelu_tanh",
        norm_layer: str | Callable[..., nn.Module] = "layernorm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        num_stages = len(qna_depths)
        check_depths(qna_depths, window_depths)
        if min(in_chans, embed_dim) < 1:
            raise ValueError(
                f"in_chans and embed_dim must be at least 1, got {in_chans} and {embed_dim}"
            )
        if window_pos_embed not in ("relative", "none"):
            raise ValueError(
                f"window_pos_embed must be 'relative' or 'none', got {window_pos_embed!r}"
            )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.output_fmt = "NHWC"
        self.feature_info = [
            dict(num_chs=embed_dim * 2**i, reduction=STEM_REDUCTION * 2**i, module=f"stages.{i}")
            for i in range(num_stages)
        ]
        self.num_features = self.feature_info[-1]["num_chs"]
        self.img_size = REF_IMG_SIZE if img_size is None else tuple(to_2tuple(img_size))
        if window_size is None:
            if num_stages > len(REF_WINDOW_SIZE):
                raise ValueError(
                    f"window_size must be given for {num_stages} stages, its default is for up to "
                    f"{len(REF_WINDOW_SIZE)}"
                )
            windows = stage_windows(REF_WINDOW_SIZE[-num_stages:], num_stages)
            windows = scale_windows(windows, REF_IMG_SIZE, self.img_size, self._reductions())
        else:
            windows = stage_windows(window_size, num_stages)
        self.window_size = windows
        args = BlockArgs(
            num_queries=num_queries,
            normalize_stop_grad=normalize_stop_grad,
            query_weight=query_weight,
            pos_embed=pos_embed,
            window_pos_embed=window_pos_embed,
            qkv_bias=qkv_bias,
            mlp_ratio=mlp_ratio,
            proj_drop=proj_drop_rate,
            init_values=init_values,
            down_shortcut=down_shortcut,
            act_layer=get_act_layer(act_layer),
            norm_layer=get_norm_layer(norm_layer),
            dd=dd,
        )
        stems = {"patch": PatchStem, "resnet": ResNetStem}
        if stem_type not in stems:
            raise ValueError(f"stem_type must be one of {list(stems)}, got {stem_type!r}")
        self.stem = stems[stem_type](in_chans, embed_dim, **dd)

        plan = plan_stages(
            [info["num_chs"] for info in self.feature_info],
            qna_depths,
            window_depths,
            qna_num_heads,
            window_num_heads,
            kernel_size,
            windows,
            normalize_query,
            drop_path_rates(drop_path_rate, qna_depths, window_depths, drop_path_downsample),
        )
        befores = [None, *plan[:-1]]
        self.stages = nn.Sequential(
            *(QnAStage(stage, before, args) for stage, before in zip(plan, befores, strict=True))
        )

        self.norm = args.norm_layer(self.num_features, **dd)
        self.head_type = head_type
        self.attn_pool = self._build_attn_pool(head_type, plan[-1], dd)
        self.head = ClassifierHead(
            self.num_features, num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    def _reductions(self) -> list[int]:
        return [info["reduction"] for info in self.feature_info]

    def _build_attn_pool(
        self, head_type: str, last: StageArgs, dd: dict[str, Any]
    ) -> LearnedQueryPool | None:
        if head_type == "gap":
            return None
        if head_type not in ("qna_v1", "qna_v2"):
            raise ValueError(f"head_type must be 'gap', 'qna_v1' or 'qna_v2', got {head_type!r}")
        size = self._map_size(self.img_size)
        # the released head's, whatever the blocks have
        pool = LearnedQueryPool(last.dim, last.qna_num_heads, max(size), num_queries=2, **dd)
        pool.set_kernel_size(size)
        return pool

    def _map_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the last map for an image size."""
        reduction = self.feature_info[-1]["reduction"]
        return tuple(-(-side // reduction) for side in img_size)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """LeCun-normal weights and zero biases, as in the release.

        Args:
            needs_reset: Also call `reset_parameters` of all other modules (after `to_empty`).
        """

        def init(module: nn.Module, name: str) -> None:
            if isinstance(module, nn.Linear | nn.Conv2d):
                lecun_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif needs_reset and hasattr(module, "reset_parameters"):
                module.reset_parameters()

        named_apply(init, self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Position tables and query weights: what the released recipe does not decay."""
        return {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if isinstance(module, LearnedQueryAttention | WindowAttention)
            for name in module.no_weight_decay()
        }

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
                (r"^norm|^attn_pool", (99999,)),
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

    def set_input_size(
        self,
        img_size: Size2 | None = None,
        window_size: Size2 | Sequence[Size2] | None = None,
    ) -> None:
        """Adapt windows and position tables to another image size.

        Windows of the window attention keep their share of each stage's map unless given; their
        bias tables, and those of a 'qna_v1' or 'qna_v2' head, are resized bicubically. QnA blocks
        need no change: their windows are local.

        Args:
            img_size: New image size; the current one if None.
            window_size: New windows, for all stages or each.

        Raises:
            ValueError: sides below 1, or windows for another number of stages.
        """
        new_size = self.img_size if img_size is None else tuple(to_2tuple(img_size))
        if min(new_size) < 1:
            raise ValueError(f"img_size must be positive, got {img_size}")
        if window_size is None:
            windows = scale_windows(
                self.window_size,
                self.img_size,
                new_size,
                self._reductions()[: len(self.window_size)],
            )
        else:
            windows = stage_windows(window_size, len(self.window_size))
        for stage, window in zip(self.stages, windows, strict=True):
            for module in stage.modules():
                if isinstance(module, WindowAttention):
                    module.set_window_size(window)
        if self.attn_pool is not None:
            self.attn_pool.set_kernel_size(self._map_size(new_size))
        self.img_size, self.window_size = new_size, windows
        update_model_input_size(self, new_size, window_size=windows)

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
        self.window_size = self.window_size[: max_index + 1]
        if prune_norm or prune_end:
            self.norm = nn.Identity()  # made for the last stage
        if prune_end:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.attn_pool = None
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Map of the last stage before the final norm, [B, H/32, W/32, num_features]."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Norm, pooling and classifier on `forward_features`' map; the classifier left out with
        pre_logits."""
        x = self.norm(x)
        if self.attn_pool is not None and not self.head.global_pool.is_identity():
            pooled = self.attn_pool(x)  # B, 1, 1, C
            x = pooled if self.head_type == "qna_v1" else x + pooled
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: dict[str, Any], model: QnAViT) -> dict[str, Tensor]:
    """Released or own parameters for this model: names, layouts, and table sizes.

    Tables made for other windows or kernels are resized as in `set_input_size`.
    """
    return qna_vit_state_dict(state_dict, model)


def _create_qna_vit(variant: str, pretrained: bool = False, **kwargs: Any) -> QnAViT:
    num_stages = len(kwargs.get("qna_depths", REF_WINDOW_SIZE))
    return build_model_with_cfg(
        QnAViT,
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
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "license": "mit",
        "paper_ids": "arXiv:2112.11435",
        "paper_name": "Learned Queries for Efficient Local Attention",
        "origin_url": "https://github.com/moabarar/qna",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "qna_vit_tiny.untrained": _cfg(),
        "qna_vit_tiny_7x7.untrained": _cfg(),
        "qna_vit_small.untrained": _cfg(),
        "qna_vit_base.untrained": _cfg(),
    }
)


@register_model
def qna_vit_tiny(pretrained: bool = False, **kwargs: Any) -> QnAViT:
    """QnA-ViT-Tiny: 15.7 M parameters, 2.42 GMACs at 224, 81.7 % top-1 in the released README."""
    model_args = dict(drop_path_rate=0.05)
    return _create_qna_vit("qna_vit_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def qna_vit_tiny_7x7(pretrained: bool = False, **kwargs: Any) -> QnAViT:
    """QnA-ViT-Tiny with 7x7 windows: 15.8 M parameters, 2.51 GMACs at 224, 82.0 % top-1."""
    model_args = dict(kernel_size=7, drop_path_rate=0.05)
    return _create_qna_vit("qna_vit_tiny_7x7", pretrained, **dict(model_args, **kwargs))


@register_model
def qna_vit_small(pretrained: bool = False, **kwargs: Any) -> QnAViT:
    """QnA-ViT-Small: 25.0 M parameters, 4.34 GMACs at 224, 83.2 % top-1 in the released README."""
    model_args = dict(qna_depths=(2, 3, 6, 0), window_depths=(0, 0, 12, 2), drop_path_rate=0.2)
    return _create_qna_vit("qna_vit_small", pretrained, **dict(model_args, **kwargs))


@register_model
def qna_vit_base(pretrained: bool = False, **kwargs: Any) -> QnAViT:
    """QnA-ViT-Base: 55.7 M parameters, 9.51 GMACs at 224, 83.9 % top-1 in the released README."""
    model_args = dict(
        embed_dim=96,
        qna_depths=(2, 3, 6, 0),
        window_depths=(0, 0, 12, 2),
        qna_num_heads=(6, 12, 24, 48),
        window_num_heads=(3, 6, 12, 24),
        drop_path_rate=0.5,
    )
    return _create_qna_vit("qna_vit_base", pretrained, **dict(model_args, **kwargs))
