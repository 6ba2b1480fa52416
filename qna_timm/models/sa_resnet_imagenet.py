"""ResNets of stand-alone self-attention for ImageNet, with 26, 38 and 50 layers.

Paper: "Stand-Alone Self-Attention in Vision Models", https://arxiv.org/abs/1906.05909
Every 3x3 convolution of a ResNet is attention here; the 7x7 one of the stem is kept. Those named
`_adaptive` learn their windows (https://arxiv.org/abs/2004.08708), up to 11x11 unless max_span says
else: the released code names networks of such depths and cannot build them.
"""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model

from qna_timm.models.sa_resnet import SAResNet, create_sa_resnet

__all__: list[str] = []


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
        "license": "apache-2.0",
        "paper_ids": "arXiv:1906.05909",
        "paper_name": "Stand-Alone Self-Attention in Vision Models",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        f"sa_resnet{depth}{window}.untrained": _cfg()
        for depth in (26, 38, 50)
        for window in ("", "_adaptive")
    }
)

_IMAGENET = dict(
    channels=(64, 128, 256, 512),
    strides=(1, 2, 2, 2),
    stem_type="conv7_pool",
    pool_attn=True,
    kernel_size=7,
    num_heads=8,
    rel_axes="both",
)


@register_model
def sa_resnet26(pretrained: bool = False, **kwargs: Any) -> SAResNet:
    """SA-ResNet-26, windows of 7x7: 10.3 M parameters."""
    model_args = dict(_IMAGENET, layers=(1, 2, 4, 1), spatial="local")
    return create_sa_resnet("sa_resnet26", pretrained, **dict(model_args, **kwargs))


@register_model
def sa_resnet26_adaptive(pretrained: bool = False, **kwargs: Any) -> SAResNet:
    """SA-ResNet-26, learned windows (11x11 at most): 10.4 M parameters."""
    model_args = dict(_IMAGENET, layers=(1, 2, 4, 1), spatial="adaptive")
    return create_sa_resnet("sa_resnet26_adaptive", pretrained, **dict(model_args, **kwargs))


@register_model
def sa_resnet38(pretrained: bool = False, **kwargs: Any) -> SAResNet:
    """SA-ResNet-38, windows of 7x7: 14.2 M parameters."""
    model_args = dict(_IMAGENET, layers=(2, 3, 5, 2), spatial="local")
    return create_sa_resnet("sa_resnet38", pretrained, **dict(model_args, **kwargs))


@register_model
def sa_resnet38_adaptive(pretrained: bool = False, **kwargs: Any) -> SAResNet:
    """SA-ResNet-38, learned windows (11x11 at most): 14.3 M parameters."""
    model_args = dict(_IMAGENET, layers=(2, 3, 5, 2), spatial="adaptive")
    return create_sa_resnet("sa_resnet38_adaptive", pretrained, **dict(model_args, **kwargs))


@register_model
def sa_resnet50(pretrained: bool = False, **kwargs: Any) -> SAResNet:
    """SA-ResNet-50, windows of 7x7: 18.0 M parameters."""
    model_args = dict(_IMAGENET, layers=(3, 4, 6, 3), spatial="local")
    return create_sa_resnet("sa_resnet50", pretrained, **dict(model_args, **kwargs))


@register_model
def sa_resnet50_adaptive(pretrained: bool = False, **kwargs: Any) -> SAResNet:
    """SA-ResNet-50, learned windows (11x11 at most): 18.1 M parameters."""
    model_args = dict(_IMAGENET, layers=(3, 4, 6, 3), spatial="adaptive")
    return create_sa_resnet("sa_resnet50_adaptive", pretrained, **dict(model_args, **kwargs))
