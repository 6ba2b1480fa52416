"""Architectures; importing this package registers them with timm."""

from qna_timm.models.ga_backbone import GramianBackbone
from qna_timm.models.qna_vit import QnAViT

__all__ = ["GramianBackbone", "QnAViT"]
