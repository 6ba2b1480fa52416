"""QnA-ViT, a hierarchical vision transformer with learned-query local attention.

Paper: "Learned Queries for Efficient Local Attention", CVPR 2022, https://arxiv.org/abs/2112.11435
Released JAX code and checkpoints: https://github.com/moabarar/qna (MIT licence);
`checkpoint_filter_fn` reads its parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    AvgPool2dSame,
    ClassifierHead,
    DropPath,
    LayerNorm,
    LayerScale,
    Mlp,
    calculate_drop_path_rates,
    get_act_layer,
    get_device_dtype,
    get_norm_layer,
    to_2tuple,
    to_ntuple,
)
from timm.layers.weight_init import lecun_normal_
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    named_apply,
    register_model,
)
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from qna_timm.convert import qna_vit_state_dict
from qna_timm.layers import (
    LearnedQueryAttention,
    LearnedQueryPool,
    PatchStem,
    ResNetStem,
    WindowAttention,
)

__all__ = ["QnAViT"]

Size2 = int | tuple[int, int]

STEM_REDUCTION = 4
REF_IMG_SIZE = (224, 224)
REF_WINDOW_SIZE = (14, 14, 14, 7)


@dataclass(frozen=True)
class BlockArgs:
    """What all blocks of a model have in common."""

    num_queries: int = 2
    normalize_stop_grad: bool = False
    query_weight: str = "normal"
    pos_embed: str = "relative"
    window_pos_embed: str = "relative"
    qkv_bias: bool = False
    mlp_ratio: float = 4.0
    proj_drop: float = 0.0
    init_values: float | None = None
    down_shortcut: str = "conv"
    act_layer: Callable[..., nn.Module] = nn.GELU
    norm_layer: Callable[..., nn.Module] = LayerNorm
    dd: dict[str, Any] | None = None


class Shortcut(nn.Module):
    """Residual path of a strided block: [B, H, W, dim] -> [B, ceil(H/2), ceil(W/2), dim_out].

    Even rows and columns, or their "same"-padded average, then a projection without bias.
    """

    def __init__(self, dim: int, dim_out: int, kernel_size: int, kind: str, dd: dict) -> None:
        super().__init__()
        if kind not in ("conv", "avgpool"):
            raise ValueError(f"down_shortcut must be 'conv' or 'avgpool', got {kind!r}")
        self.pool = AvgPool2dSame(kernel_size, 2) if kind == "avgpool" else None
        self.proj = nn.Linear(dim, dim_out, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = self.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:
            x = x[:, ::2, ::2]
        return self.proj(x)


class Block(nn.Module):
    """Pre-norm residual block: x <- shortcut(x) + attn(norm1(x)), x <- x + mlp(norm2(x))."""

    def __init__(
        self,
        dim: int,
        dim_out: int,
        attn: nn.Module,
        args: BlockArgs,
        drop_path: float,
        attn_drop_path: float,
        shortcut: nn.Module | None = None,
    ) -> None:
        super().__init__()
        dd = args.dd or {}
        self.shortcut = shortcut if shortcut is not None else nn.Identity()
        self.norm1 = args.norm_layer(dim, **dd)
        self.attn = attn
        self.ls1 = self._layer_scale(dim_out, args)
        self.drop_path1 = DropPath(attn_drop_path) if attn_drop_path > 0.0 else nn.Identity()
        self.norm2 = args.norm_layer(dim_out, **dd)
        self.mlp = Mlp(
            dim_out,
            int(dim_out * args.mlp_ratio),
            act_layer=args.act_layer,
            drop=args.proj_drop,
            **dd,
        )
        self.ls2 = self._layer_scale(dim_out, args)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    @staticmethod
    def _layer_scale(dim: int, args: BlockArgs) -> nn.Module:
        if args.init_values is None:
            return nn.Identity()
        return LayerScale(dim, args.init_values, **(args.dd or {}))

    def forward(self, x: Tensor) -> Tensor:
        x = self.shortcut(x) + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def qna_block(
    dim: int,
    num_heads: int,
    kernel_size: int,
    normalize: bool,
    args: BlockArgs,
    drop_path: float,
    dim_out: int | None = None,
) -> Block:
    """A learned-query block; with dim_out it halves the map and widens it to dim_out.

    A strided block drops only its MLP branch, as the release does.
    """
    strided = dim_out is not None
    width = dim_out or dim
    dd = args.dd or {}
    attn = LearnedQueryAttention(
        dim,
        num_heads,
        dim_attn=width,
        kernel_size=kernel_size,
        stride=2 if strided else 1,
        num_queries=args.num_queries,
        pos_embed=args.pos_embed,
        query_weight=args.query_weight,
        normalize=normalize,
        normalize_stop_grad=args.normalize_stop_grad,
        qkv_bias=args.qkv_bias,
        proj_drop=args.proj_drop,
        **dd,
    )
    shortcut = Shortcut(dim, width, kernel_size, args.down_shortcut, dd) if strided else None
    return Block(dim, width, attn, args, drop_path, 0.0 if strided else drop_path, shortcut)


def window_block(
    dim: int, num_heads: int, window_size: tuple[int, int], args: BlockArgs, drop_path: float
) -> Block:
    """A block of self-attention in tiled windows. Drop path acts per image at every size."""
    attn = WindowAttention(
        dim,
        num_heads,
        window_size,
        rel_pos_bias=args.window_pos_embed == "relative",
        qkv_bias=args.qkv_bias,
        proj_drop=args.proj_drop,
        **(args.dd or {}),
    )
    return Block(dim, dim, attn, args, drop_path, drop_path)


class QnAStage(nn.Module):
    """[strided QnA block,] window-attention blocks, QnA blocks, at one resolution."""

    def __init__(self, downsample: Block | None, blocks: list[Block]) -> None:
        super().__init__()
        self.downsample = downsample if downsample is not None else nn.Identity()
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            if isinstance(self.downsample, Block):
                x = checkpoint(self.downsample, x)
            for block in self.blocks:
                x = checkpoint(block, x)
            return x
        return self.blocks(self.downsample(x))


def _stage_windows(
    window_size: Size2 | Sequence[Size2], num_stages: int
) -> tuple[tuple[int, int], ...]:
    """One (height, width) per stage from an int, or a sequence with an int or pair per stage."""
    if isinstance(window_size, int):
        window_size = (window_size,) * num_stages
    if len(window_size) != num_stages:
        raise ValueError(
            f"window_size must be an int or one entry for each of {num_stages} stages, "
            f"got {window_size}"
        )
    windows = tuple(tuple(int(side) for side in to_2tuple(window)) for window in window_size)
    if min(side for window in windows for side in window) < 1:
        raise ValueError(f"window_size must be positive, got {window_size}")
    return windows


def _scale_windows(
    windows: Sequence[tuple[int, int]], old: tuple[int, int], new: tuple[int, int]
) -> tuple[tuple[int, int], ...]:
    """Windows that cover the same share of each stage's map after a change of image size."""

    def side(window: int, old_size: int, new_size: int, reduction: int) -> int:
        old_map, new_map = -(-old_size // reduction), -(-new_size // reduction)
        return max(1, round(window * new_map / old_map))

    return tuple(
        tuple(side(w, o, n, STEM_REDUCTION * 2**stage) for w, o, n in zip(window, old, new))
        for stage, window in enumerate(windows)
    )


class QnAViT(nn.Module):
    """QnA-ViT, on images of any size.

    Four stages at strides 4, 8, 16 and 32 of width embed_dim * (1, 2, 4, 8), each made of
    window-attention blocks, then learned-query ("QnA") blocks; a strided QnA block leads into the
    next stage. Maps are channels-last throughout.

    Image sizes: at 224 the function is the released one, bit for bit up to rounding. Sides that 4
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
            whole map; 'qna_v2', the sum of both.
        init_values: Initial layer scale; None for no layer scale.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after attention projections and in MLPs.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0.
        drop_path_downsample: Strided blocks take a step of that rise (and drop their MLP branch).
        act_layer: Activation of MLPs.
        norm_layer: Normalisation over channels.
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
        if len(window_depths) != num_stages:
            raise ValueError(
                f"qna_depths and window_depths must have one entry a stage, got {qna_depths} and "
                f"{window_depths}"
            )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.output_fmt = "NHWC"
        self.img_size = REF_IMG_SIZE if img_size is None else tuple(to_2tuple(img_size))
        if window_size is None:
            windows = _stage_windows(REF_WINDOW_SIZE[-num_stages:], num_stages)
            windows = _scale_windows(windows, REF_IMG_SIZE, self.img_size)
        else:
            windows = _stage_windows(window_size, num_stages)
        self.window_size = windows
        norm_layer = get_norm_layer(norm_layer)
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
            norm_layer=norm_layer,
            dd=dd,
        )
        stems = {"patch": PatchStem, "resnet": ResNetStem}
        if stem_type not in stems:
            raise ValueError(f"stem_type must be one of {list(stems)}, got {stem_type!r}")
        self.stem = stems[stem_type](in_chans, embed_dim, **dd)

        kernels = to_ntuple(num_stages)(kernel_size)
        normalize = to_ntuple(num_stages)(normalize_query)
        rates = self._drop_path_rates(
            drop_path_rate, qna_depths, window_depths, drop_path_downsample
        )
        stages = []
        self.feature_info = []
        for i in range(num_stages):
            dim = embed_dim * 2**i
            down = None
            if i > 0:
                down = qna_block(
                    dim // 2,
                    2 * qna_num_heads[i - 1],
                    kernels[i - 1],
                    normalize[i - 1],
                    args,
                    rates[i - 1][-1],
                    dim_out=dim,
                )
            blocks = [
                window_block(dim, window_num_heads[i], windows[i], args, rates[i][j])
                for j in range(window_depths[i])
            ]
            blocks += [
                qna_block(
                    dim, qna_num_heads[i], kernels[i], normalize[i], args, rates[i][j]
                )
                for j in range(window_depths[i], window_depths[i] + qna_depths[i])
            ]
            stages.append(QnAStage(down, blocks))
            reduction = STEM_REDUCTION * 2**i
            self.feature_info.append(
                dict(num_chs=dim, reduction=reduction, module=f"stages.{i}")
            )
        self.stages = nn.Sequential(*stages)

        self.num_features = dim
        self.norm = norm_layer(dim, **dd)
        self.head_type = head_type
        self.attn_pool = self._build_attn_pool(head_type, qna_num_heads[-1], normalize[-1], args)
        self.head = ClassifierHead(
            dim, num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    @staticmethod
    def _drop_path_rates(
        max_rate: float,
        qna_depths: Sequence[int],
        window_depths: Sequence[int],
        downsample: bool,
    ) -> list[list[float]]:
        """Rates of each stage's window blocks, QnA blocks and outgoing strided block."""
        last = len(qna_depths) - 1
        slots = [
            w + q + (1 if downsample and i < last else 0)
            for i, (w, q) in enumerate(zip(window_depths, qna_depths))
        ]
        rates = calculate_drop_path_rates(max_rate, slots, stagewise=True)
        if not downsample:
            rates = [[*stage, 0.0] for stage in rates]
        return rates

    def _build_attn_pool(
        self, head_type: str, num_heads: int, normalize: bool, args: BlockArgs
    ) -> LearnedQueryPool | None:
        if head_type == "gap":
            return None
        if head_type not in ("qna_v1", "qna_v2"):
            raise ValueError(f"head_type must be 'gap', 'qna_v1' or 'qna_v2', got {head_type!r}")
        size = self._map_size(self.img_size)
        pool = LearnedQueryPool(
            self.num_features,
            num_heads,
            max(size),
            num_queries=2,
            query_weight=args.query_weight,
            pos_embed=args.pos_embed,
            normalize=normalize,
            normalize_stop_grad=args.normalize_stop_grad,
            **(args.dd or {}),
        )
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
        """
        new_size = self.img_size if img_size is None else tuple(to_2tuple(img_size))
        if min(new_size) < 1:
            raise ValueError(f"img_size must be positive, got {img_size}")
        if window_size is None:
            windows = _scale_windows(self.window_size, self.img_size, new_size)
        else:
            windows = _stage_windows(window_size, len(self.window_size))
        for stage, window in zip(self.stages, windows):
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
    state_dict = state_dict.get("state_dict", state_dict.get("model", state_dict))
    return qna_vit_state_dict(state_dict, model)


def _create_qna_vit(variant: str, pretrained: bool = False, **kwargs: Any) -> QnAViT:
    return build_model_with_cfg(
        QnAViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
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
    """QnA-ViT-Tiny: 15.7 M parameters, 2.42 GMACs at 224, 81.7 % top-1 in the paper."""
    model_args = dict(drop_path_rate=0.05)
    return _create_qna_vit("qna_vit_tiny", pretrained, **dict(model_args, **kwargs))


@register_model
def qna_vit_tiny_7x7(pretrained: bool = False, **kwargs: Any) -> QnAViT:
    """QnA-ViT-Tiny with 7x7 windows: 15.8 M parameters, 2.51 GMACs at 224, 82.0 % top-1."""
    model_args = dict(kernel_size=7, drop_path_rate=0.05)
    return _create_qna_vit("qna_vit_tiny_7x7", pretrained, **dict(model_args, **kwargs))


@register_model
def qna_vit_small(pretrained: bool = False, **kwargs: Any) -> QnAViT:
    """QnA-ViT-Small: 25.0 M parameters, 4.34 GMACs at 224, 83.2 % top-1 in the paper."""
    model_args = dict(
        qna_depths=(2, 3, 6, 0), window_depths=(0, 0, 12, 2), drop_path_rate=0.2
    )
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
