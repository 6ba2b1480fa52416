"""GELU by its tanh formula, without PyTorch's tanh where that is slow."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers that caches hold: beyond, more passes over memory take what the faster function gains.
FEW_NUMBERS = 2**22

_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR


def _is_small_inference(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    recorded = torch.is_grad_enabled() and x.requires_grad
    wide = x.dtype == torch.float32 or x.dtype == torch.float64
    return x.device.type == "cpu" and wide and not recorded and x.numel() <= FEW_NUMBERS


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with tanh ("Gaussian Error Linear Units", 1606.08415, section 2).

        x / 2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) = x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))

    The right-hand side where a CPU records no gradients, in half the time: PyTorch's tanh takes
    several times as long as its exponential. Elsewhere PyTorch's own.

    Args:
        x: Of any shape.

    Returns:
        Of the same shape and dtype.
    """
    if torch.jit.is_scripting():
        return F.gelu(x, approximate="tanh")
    else:  # in so many words: the script compiler skips an else branch, not code that follows
        if not _is_small_inference(x):
            return F.gelu(x, approximate="tanh")
        argument = torch.addcmul(x.new_full((), _LINEAR), x, x, value=_CUBIC).mul_(x)
        return argument.sigmoid_().mul_(x)
