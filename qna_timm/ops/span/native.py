"""Local self-attention on a CPU by compiled functions (`native/span.cpp`), where there are any.

Letters: B batch, H W map, C = h*d channels, h heads, k kernel_size, K = k*k offsets.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from qna_timm.ops.native import Call, address, in_float32, load_library

# Of `native/span.cpp`; to be raised on both sides with every change of what is compiled.
VERSION = 3

_POINTER = ctypes.c_void_p
_INPUTS = [*[_POINTER] * 5, ctypes.c_float, _POINTER, ctypes.c_int]

FUNCTIONS = {
    "span_floats": ([_POINTER, ctypes.c_int, ctypes.c_int], ctypes.c_int64),
    "span_forward": ([_POINTER, *_INPUTS, _POINTER], None),
    "span_backward": ([_POINTER, _POINTER, *_INPUTS, *[_POINTER] * 3], None),
}
# at import, so that a compiler which follows `unsupported` finds it loaded
LIBRARY = load_library("span", VERSION, FUNCTIONS)
# Of qkv; halves are computed in float32.
DTYPES = torch.float32, torch.bfloat16, torch.float16


def unsupported(qkv: Tensor) -> str | None:
    """What is to be said against the compiled functions for a problem; None for nothing."""
    if qkv.device.type != "cpu":
        return f"the map is on {qkv.device.type}"
    if qkv.dtype not in DTYPES:
        return f"it computes in float32, qkv is {str(qkv.dtype).removeprefix('torch.')}"
    if qkv.layout != torch.strided:
        return f"it takes dense maps, qkv is {str(qkv.layout).removeprefix('torch.')}"
    return LIBRARY.why_not


def _call(
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    mask: Tensor | None,
    floor: Tensor | None,
    num_heads: int,
    mask_padding: bool,
    scale: float,
    backward: bool,
) -> tuple[Call, tuple]:
    """Arguments as in `span_offsets`, qkv of any of `DTYPES`."""
    channels, kernel_size = rel_pos_h.shape
    sizes = (*qkv.shape[:3], num_heads, channels // num_heads, kernel_size, mask_padding)
    inputs = qkv, rel_pos_h, rel_pos_w, mask, floor
    call = Call(LIBRARY, "span", sizes, inputs, backward)
    return call, call.arguments(scale)


def forward(qkv: Tensor, *rest: Any) -> Tensor:
    """Output [B, H, W, C] in qkv's dtype; arguments as in `_call`."""
    call, arguments = _call(qkv, *rest, backward=False)
    out = call.inputs[0].new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    LIBRARY.functions["span_forward"](call.sizes, *arguments, address(out))
    call.work.release()
    return out.to(qkv.dtype)


def backward(
    grad: Tensor, qkv: Tensor, rel_pos_h: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv [B, H, W, 3*C], both tables [C, 2*k] and the mask [h, K]."""
    call, arguments = _call(qkv, rel_pos_h, *rest, backward=True)
    (channels, kernel_size), num_heads = rel_pos_h.shape, call.sizes[3]
    grad = in_float32(grad)
    grad_qkv = torch.empty_like(call.inputs[0])
    grad_rel = grad_qkv.new_empty(channels, 2 * kernel_size)
    grad_mask = grad_qkv.new_empty(num_heads, kernel_size**2)
    grads = grad_qkv, grad_rel, grad_mask
    LIBRARY.functions["span_backward"](
        call.sizes, address(grad), *arguments, *(address(x) for x in grads)
    )
    call.work.release()
    return grad_qkv.to(qkv.dtype), grad_rel.to(rel_pos_h.dtype), grad_mask.to(rel_pos_h.dtype)
