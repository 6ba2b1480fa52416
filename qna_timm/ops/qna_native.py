"""Learned-query attention on a CPU by compiled functions (`native/qna.cpp`), where an installation
has them.

Letters: B batch, H W map, Y X output map, Q queries, h heads, d head_dim, C = h*d channels,
K offsets.
"""

import ctypes

import torch
from torch import Tensor

from qna_timm.ops.native import address, load_library
from qna_timm.ops.qna_windows import Windows
from qna_timm.ops.workspace import Workspace

# Of `native/qna.cpp`; to be raised on both sides with every change of what is compiled.
VERSION = 3
MOST_CHANNELS = 64

_POINTER = ctypes.c_void_p
_INPUTS = [_POINTER, _POINTER, _POINTER, _POINTER, ctypes.c_int64, _POINTER, ctypes.c_int]


FUNCTIONS = {
    "qna_floats": ([_POINTER, ctypes.c_int, ctypes.c_int], ctypes.c_int64),
    "qna_forward": ([_POINTER, *_INPUTS, _POINTER], None),
    "qna_backward": ([_POINTER, _POINTER, *_INPUTS, *[_POINTER] * 4], None),
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


class NativeProblem:
    """One call's sizes, inputs and memory."""

    def __init__(
        self,
        scores: Tensor,
        value: Tensor,
        rel_pos_bias: Tensor | None,
        query_weight: Tensor | None,
        windows: Windows,
        work: Workspace,
        backward: bool,
    ) -> None:
        """Of scores [B, H, W, Q, h], value [B, H, W, C], bias [K, Q, h], weight [K or 1, Q, h]."""
        batch, height, width, num_queries, num_heads = scores.shape
        head_dim = value.shape[3] // num_heads
        sizes = (batch, height, width, num_queries, num_heads, head_dim)
        sizes = (*sizes, *windows.kernel_size, windows.stride, windows.padding)
        self.sizes = (ctypes.c_int64 * len(sizes))(*sizes)
        given = scores, value, rel_pos_bias, query_weight
        self.inputs = [
            None if x is None else x.detach().to(torch.float32).contiguous() for x in given
        ]
        self.weight_rows = 0 if query_weight is None else query_weight.shape[0]
        self.threads = torch.get_num_threads()
        floats = LIBRARY.functions["qna_floats"](self.sizes, int(backward), self.threads)
        self.memory = work.get("native", (floats,))

    def arguments(self) -> tuple:
        """What both functions take after sizes and gradient."""
        inputs = (address(x) for x in self.inputs)
        return *inputs, self.weight_rows, address(self.memory), self.threads


def native_forward(
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    windows: Windows,
) -> Tensor:
    """[B, Y, X, C] in float32; arguments as in `NativeProblem`."""
    work = Workspace(scores)
    problem = NativeProblem(scores, value, rel_pos_bias, query_weight, windows, work, False)
    out = scores.new_empty(len(scores), *windows.out_size(*scores.shape[1:3]), value.shape[3])
    LIBRARY.functions["qna_forward"](problem.sizes, *problem.arguments(), address(out))
    work.release()
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
    work = Workspace(scores)
    problem = NativeProblem(scores, value, rel_pos_bias, query_weight, windows, work, True)
    grad = grad.to(torch.float32).contiguous()
    table = (windows.num_offsets, *scores.shape[3:])
    shapes = scores.shape, value.shape, table, table
    grads = tuple(scores.new_empty(shape) for shape in shapes)
    LIBRARY.functions["qna_backward"](
        problem.sizes, address(grad), *problem.arguments(), *(address(x) for x in grads)
    )
    work.release()
    return grads
