"""Layers: parameters and their names, above the operators."""

from qna_timm.layers.qna_attn import LearnedQueryAttention, LearnedQueryPool
from qna_timm.layers.stem import BiasedBatchNorm2d, PatchStem, ResNetStem
from qna_timm.layers.window_attn import WindowAttention

__all__ = [
    "BiasedBatchNorm2d",
    "LearnedQueryAttention",
    "LearnedQueryPool",
    "PatchStem",
    "ResNetStem",
    "WindowAttention",
]
