"""Learned-query attention on a CPU by compiled functions (`native/qna.cpp`), where an installation
has them.

Letters: B batch, H W map, Y X output map, Q queries, h heads, d head_dim, C = h*d channels,
K offsets.
"""

import ctypes

import torch
from torch import Tensor

from qna_timm.ops.native import Call, address, in_float32, load_library
from qna_timm.ops.qna.windows import Windows

# Of `native/qna.cpp`; to be raised on both sides with every change of what is compiled.
VERSION = 7
MOST_CHANNELS = 64
# Whether windows' sums come from Fourier transforms: never, where that is faster, always.
NEVER, WHERE_FASTER, ALWAYS = range(3)
TRANSFORMS = WHERE_FASTER

_POINTER = ctypes.c_void_p
_INPUTS = [_POINTER, _POINTER, _POINTER, _POINTER, ctypes.c_int64, _POINTER, ctypes.c_int]

FUNCTIONS = {
    "qna_floats": ([_POINTER, ctypes.c_int, ctypes.c_int], ctypes.c_int64),
    "qna_forward": ([_POINTER, *_INPUTS, _POINTER], ctypes.c_int64),
    "qna_backward": ([_POINTER, _POINTER, *_INPUTS, *[_POINTER] * 4], ctypes.c_int64),
}
# at import, so that a compiler which follows `unsupported` finds it loaded
LIBRARY = load_library("qna", VERSION, FUNCTIONS)


def unsupported(scores: Tensor, value: Tensor) -> str | None:
    """What is to be said against the compiled functions for a problem; None for nothing."""
    if value.device.type != "cpu":
        return f"the map is on {value.device.type}"
    if scores.dtype != torch.float32:
        return f"it computes in float32, scores are {str(scores.dtype).removeprefix('torch.')}"
    head_dim = value.shape[3] // scores.shape[4]
    if head_dim > MOST_CHANNELS:
        return f"a head has {head_dim} channels, more than {MOST_CHANNELS}"
    return LIBRARY.why_not


def _call(
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    windows: Windows,
    backward: bool,
) -> tuple[Call, tuple]:
    """Of scores [B, H, W, Q, h], value [B, H, W, C], bias [K, Q, h], weight [K or 1, Q, h]."""
    head_dim = value.shape[3] // scores.shape[4]
    window = *windows.kernel_size, windows.stride, windows.padding
    sizes = (*scores.shape, head_dim, *window, TRANSFORMS)
    inputs = scores, value, rel_pos_bias, query_weight
    call = Call(LIBRARY, "qna", sizes, inputs, backward)
    return call, call.arguments(0 if query_weight is None else query_weight.shape[0])


def native_forward(
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    windows: Windows,
    out: Tensor | None = None,
) -> Tensor:
    """[B, Y, X, C] in float32, in `out` where given; arguments as in `_call`."""
    call, arguments = _call(scores, value, rel_pos_bias, query_weight, windows, False)
    if out is None:
        out = scores.new_empty(len(scores), *windows.out_size(*scores.shape[1:3]), value.shape[3])
    LIBRARY.functions["qna_forward"](call.sizes, *arguments, address(out))
    call.work.release()
    return out


def native_backward(
    grad: Tensor,
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    windows: Windows,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of scores, value, bias and weight [K, Q, h], all in float32."""
    call, arguments = _call(scores, value, rel_pos_bias, query_weight, windows, True)
    grad = in_float32(grad)
    table = (windows.num_offsets, *scores.shape[3:])
    shapes = scores.shape, value.shape, table, table
    grads = tuple(scores.new_empty(shape) for shape in shapes)
    LIBRARY.functions["qna_backward"](
        call.sizes, address(grad), *arguments, *(address(x) for x in grads)
    )
    call.work.release()
    return grads
