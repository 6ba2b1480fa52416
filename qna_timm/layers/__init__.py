"""Layers: parameters and their names, above the operators."""

from qna_timm.layers.augmented_conv import AugmentedConv2d
from qna_timm.layers.batch_norm import SmallBatchNorm2d
from qna_timm.layers.cswin_block import CSWinBlock
from qna_timm.layers.fuse import FuseBottleneck, MapFusion
from qna_timm.layers.gramian_head import GramianHead
from qna_timm.layers.qna_attn import LearnedQueryAttention, LearnedQueryPool
from qna_timm.layers.qna_block import Block, BlockArgs, qna_block, window_block
from qna_timm.layers.qna_stage import QnAStage, StageArgs
from qna_timm.layers.sa_block import SPATIAL_LAYERS, BottleneckArgs, SABottleneck
from qna_timm.layers.span_attn import AdaptiveSpan, SpanAttention
from qna_timm.layers.stem import BiasedBatchNorm2d, PatchStem, ResNetStem
from qna_timm.layers.stripe_attn import StripeAttention
from qna_timm.layers.window_attn import WindowAttention, scale_windows, stage_windows

__all__ = [
    "SPATIAL_LAYERS",
    "AdaptiveSpan",
    "AugmentedConv2d",
    "BiasedBatchNorm2d",
    "Block",
    "BlockArgs",
    "BottleneckArgs",
    "CSWinBlock",
    "FuseBottleneck",
    "GramianHead",
    "LearnedQueryAttention",
    "LearnedQueryPool",
    "MapFusion",
    "PatchStem",
    "QnAStage",
    "ResNetStem",
    "SABottleneck",
    "SmallBatchNorm2d",
    "SpanAttention",
    "StageArgs",
    "StripeAttention",
    "WindowAttention",
    "qna_block",
    "scale_windows",
    "stage_windows",
    "window_block",
]
