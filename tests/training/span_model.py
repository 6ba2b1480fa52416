"""A small model with learned windows; without batch norm.

Registered as `test_spans`; scripts import it by ``--device-modules span_model``.
"""

import torch
from timm.layers import LayerNorm2d
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from qna_timm.layers.span_attn import SpanAttention


class Spans(nn.Module):
    """A convolution, two layers of local attention, their average, a classifier."""

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        dim: int = 8,
        num_heads: int = 2,
        adaptive: bool = True,
        span_init: float = 0.1,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dim, 8, stride=8), LayerNorm2d(dim))
        self.blocks = nn.Sequential(
            *(
                SpanAttention(dim, dim, num_heads, 3, adaptive, span_init=span_init, rel_axes=axes)
                for axes in ("split", "both")
            )
        )
        self.fc = nn.Linear(dim, num_classes)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.stem(x)
        return self.fc((x + self.blocks(x).relu()).mean((2, 3)))


default_cfgs = {
    "test_spans": {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 32, 32),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "stem.0",
        "classifier": "fc",
    }
}


@register_model
def test_spans(pretrained: bool = False, **kwargs: object) -> Spans:
    """Two layers of two heads."""
    for key in ("drop_rate", "drop_path_rate"):
        kwargs.pop(key, None)
    return build_model_with_cfg(Spans, "test_spans", pretrained, **kwargs)


test_spans.__test__ = False
