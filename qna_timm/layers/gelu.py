"""GELU by its tanh formula, as a layer."""

from timm.layers import register_notrace_function
from torch import Tensor, nn

from qna_timm.ops import gelu_tanh

register_notrace_function(gelu_tanh)


class GELUTanh(nn.Module):
    """See `gelu_tanh`; `inplace`, which others take, changes nothing.

    Shape: any -> the same.
    """

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return gelu_tanh(x)
