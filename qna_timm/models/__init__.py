"""Architectures; importing this package registers them with timm."""

import qna_timm.models.sa_resnet_imagenet  # noqa: F401 - registers its models
from qna_timm.models.cswin import CSWin
from qna_timm.models.ga_backbone import GramianBackbone
from qna_timm.models.ga_convnext import GramianConvNeXt
from qna_timm.models.ga_cswin import GramianCSWin
from qna_timm.models.ga_resnet import GramianResNet
from qna_timm.models.ga_vit import GramianViT
from qna_timm.models.gramian import GramianNet
from qna_timm.models.qna_vit import QnAViT
from qna_timm.models.sa_resnet import SAResNet

__all__ = [
    "CSWin",
    "GramianBackbone",
    "GramianCSWin",
    "GramianConvNeXt",
    "GramianNet",
    "GramianResNet",
    "GramianViT",
    "QnAViT",
    "SAResNet",
]
