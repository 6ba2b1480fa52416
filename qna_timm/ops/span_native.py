"""Local self-attention on a CPU by compiled functions (`native/span.cpp`), where there are any.

Letters: B batch, H W map, C = h*d channels, h heads, k kernel_size, K = k*k offsets.
"""

import ctypes

import torch
from torch import Tensor

from qna_timm.ops.native import address, load_library
from qna_timm.ops.workspace import Workspace

# Of `native/span.cpp`; to be raised on both sides with every change of what is compiled.
VERSION = 2

_POINTER = ctypes.c_void_p
_INPUTS = [*[_POINTER] * 5, ctypes.c_float, _POINTER, ctypes.c_int]

FUNCTIONS = {
    "span_floats": ([_POINTER, ctypes.c_int, ctypes.c_int], ctypes.c_int64),
    "span_forward": ([_POINTER, *_INPUTS, _POINTER], None),
    "span_backward": ([_POINTER, _POINTER, *_INPUTS, *[_POINTER] * 3], None),
}
LIBRARY = load_library("span", VERSION, FUNCTIONS)


def unsupported(qkv: Tensor) -> str | None:
    """What is to be said against the compiled functions for a problem; None for nothing."""
    if qkv.device.type != "cpu":
        return f"the map is on {qkv.device.type}"
    if qkv.dtype == torch.float64:
        return "it computes in float32, qkv is float64"
    return LIBRARY.why_not


class NativeProblem:
    """One call's sizes, inputs and memory."""

    def __init__(
        self,
        qkv: Tensor,
        rel_pos_h: Tensor,
        rel_pos_w: Tensor,
        mask: Tensor | None,
        floor: Tensor | None,
        num_heads: int,
        mask_padding: bool,
        scale: float,
        backward: bool,
    ) -> None:
        """Arguments as in `span_offsets`, qkv in any dtype."""
        batch, height, width, _ = qkv.shape
        channels, kernel_size = rel_pos_h.shape
        sizes = (batch, height, width, num_heads, channels // num_heads, kernel_size, mask_padding)
        self.sizes = (ctypes.c_int64 * len(sizes))(*sizes)
        given = qkv, rel_pos_h, rel_pos_w, mask, floor
        self.inputs = [
            None if x is None else x.detach().to(torch.float32).contiguous() for x in given
        ]
        self.scale = scale
        self.threads = torch.get_num_threads()
        floats = LIBRARY.functions["span_floats"](self.sizes, int(backward), self.threads)
        self.work = Workspace(self.inputs[0])
        self.memory = self.work.get("native", (floats,))

    def arguments(self) -> tuple:
        """What both functions take after sizes and gradient."""
        inputs = (address(x) for x in self.inputs)
        return *inputs, self.scale, address(self.memory), self.threads


def forward(qkv: Tensor, *rest: object) -> Tensor:
    """Output [B, H, W, C] in qkv's dtype; arguments as in `NativeProblem`."""
    problem = NativeProblem(qkv, *rest, backward=False)
    out = problem.inputs[0].new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    LIBRARY.functions["span_forward"](problem.sizes, *problem.arguments(), address(out))
    problem.work.release()
    return out.to(qkv.dtype)


def backward(grad: Tensor, qkv: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv [B, H, W, 3*C], in its dtype, both tables [C, 2*k] and the mask [h, K]."""
    problem = NativeProblem(qkv, *rest, backward=True)
    inputs, grad = problem.inputs, grad.to(torch.float32).contiguous()
    channels, kernel_size = inputs[1].shape
    grad_qkv = torch.empty_like(inputs[0])
    grad_rel = grad_qkv.new_empty(channels, 2 * kernel_size)
    grad_mask = grad_qkv.new_empty(problem.sizes[3], kernel_size**2)
    LIBRARY.functions["span_backward"](
        problem.sizes,
        address(grad),
        *problem.arguments(),
        *(address(x) for x in (grad_qkv, grad_rel, grad_mask)),
    )
    problem.work.release()
    return grad_qkv.to(qkv.dtype), grad_rel, grad_mask
