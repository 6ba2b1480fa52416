"""Learned-query attention on GPU, forward and backward, by Triton kernels.

Letters: B batch, H W map, Y X output map, Q queries, h heads, d head_dim, C = h*d channels,
K = kh*kw offsets.
"""

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from qna_timm.ops.qna.triton.backward import delta_kernel, token_kernel
from qna_timm.ops.qna.triton.forward import forward_kernel
from qna_timm.ops.qna.triton.problem import OPTIONS, Problem, addressable, on
from qna_timm.ops.qna.triton.tables import table_kernel
from qna_timm.ops.qna.triton.toeplitz import toeplitz_kernel
from qna_timm.ops.qna.triton.toeplitz_backward import toeplitz_delta_kernel, toeplitz_token_kernel
from qna_timm.ops.qna.triton.toeplitz_tables import toeplitz_table_kernel

# The first version whose kernels take tuples, and carry them through loops.
OLDEST_TRITON = (3, 3)
MAX_HEAD_DIM = 256
# Programs that share the sums over all positions: several for each multiprocessor of any GPU, and
# each leaves partial sums as large as both tables.
TABLE_PROGRAMS = 2048
# Offsets that one of them sums for: two sums for each, query and head stay in registers.
TABLE_OFFSETS = 4
# Tokens and rows of a product of tensor cores there.
TABLE_TOKENS = 64
TABLE_ROWS = 4
# Numbers that such a product sums at least, rows times channels.
LEAST_SUM = 16


def unsupported(
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    kernel_size: tuple[int, int],
    stride: int,
    padding: int,
) -> str | None:
    """Why the kernels cannot compute this problem, in a clause, or None where they can."""
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {triton.__version__} is too old, 3.3 is the first that can"
    if not value.is_cuda and not isinstance(forward_kernel, InterpretedFunction):
        return f"value is on {value.device.type}, Triton needs a GPU"
    if any(
        x is not None and x.device != value.device for x in (scores, rel_pos_bias, query_weight)
    ):
        return "the tensors are on several devices"
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"value is {value.dtype}, not float32, bfloat16 or float16"
    if any(
        x is not None and x.dtype != torch.float32 for x in (scores, rel_pos_bias, query_weight)
    ):
        return f"scores are {scores.dtype}, not float32"
    if scores.shape[4] == 0 or scores.shape[3] == 0 or value.shape[3] == 0:
        return "there are no queries, heads or channels"
    head_dim = value.shape[3] // scores.shape[4]
    if head_dim > MAX_HEAD_DIM:
        return f"a head has {head_dim} channels, more than {MAX_HEAD_DIM}"
    return None


def forward(
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    kernel_size: tuple[int, int],
    stride: int,
    padding: int,
) -> tuple[Tensor, Tensor]:
    """Learned-query attention in one kernel; arguments as in `qna_attention`, scores float32.

    Returns:
        out [B, Y, X, C] in value's dtype, and stats [2, B, Y, X, Q, h] float32 of the softmax: a
        shift, the largest score of the window or of its tile, and the logarithm
        log sum_o exp(score - shift + rel_pos_bias[o]) over the window. They stay apart: at scores
        of 1e4 a float32 sum would keep three decimals.
    """
    problem = Problem(scores, value, rel_pos_bias, query_weight, kernel_size, stride, padding)
    shape = (problem.batch, *problem.out_size)
    out = torch.empty(*shape, value.shape[3], dtype=value.dtype, device=value.device)
    stats = torch.empty(2, *shape, *scores.shape[3:], dtype=torch.float32, device=value.device)
    maps = (problem.scores, problem.value, problem.bias, problem.weight, out, *stats)
    if problem.takes_tensor_cores():
        args = (*maps, *problem.bands())
        problem.launch_products(toeplitz_kernel, problem.out_size, args, problem.strides)
    else:
        problem.launch(forward_kernel, problem.out_size, maps, problem.strides)
    return out, stats


def backward(
    grad: Tensor,
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    stats: Tensor,
    kernel_size: tuple[int, int],
    stride: int,
    padding: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of scores, value (in its dtype), rel_pos_bias and query_weight (None without one).

    Without atomics: the same inputs give the same bits.

    Args:
        grad: Gradient of out, [B, Y, X, C].
        stats: As `forward` returned them.
        others: As in `qna_attention`.
    """
    problem = Problem(scores, value, rel_pos_bias, query_weight, kernel_size, stride, padding)
    grad, stats = addressable(grad), stats.contiguous()
    strides = (grad.stride()[:3], *problem.strides)
    maps = (grad, problem.scores, problem.value, problem.bias, problem.weight, *stats)
    if problem.takes_tensor_cores():
        delta, peaks, grad_scores, grad_value = _gradients_of_products(
            problem, maps, stats, strides
        )
    else:
        peaks = None
        delta = torch.empty(stats.shape[1:], dtype=torch.float32, device=value.device)
        problem.launch(delta_kernel, problem.out_size, (*maps, delta), strides)
        grad_scores = torch.empty(scores.shape, dtype=torch.float32, device=value.device)
        grad_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        args = (*maps, delta, grad_scores, grad_value)
        problem.launch(token_kernel, problem.size, args, strides)
    if problem.bias is None and problem.weight is None:
        return grad_scores, grad_value, None, None

    sums = _table_sums(problem, grad, stats, delta, peaks)
    if peaks is not None:
        sums += _table_sums_of_products(problem, grad, stats, delta, peaks)
    products, means = sums.unbind(0)
    grad_bias, grad_weight = None, None
    if problem.bias is not None:
        grad_bias = (products if problem.weight is None else products * problem.weight) - means
    if problem.weight is not None:
        grad_weight = products.sum_to_size(problem.weight.shape)
    return grad_scores, grad_value, grad_bias, grad_weight


def _gradients_of_products(
    problem: Problem,
    maps: tuple[Tensor | None, ...],
    stats: Tensor,
    strides: tuple[tuple[int, ...], ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """delta, the peaks of tiles, and gradients of scores and values, on tensor cores."""
    scores, value = problem.scores, problem.value
    options = {"dtype": torch.float32, "device": value.device}
    # parts of a head's channels have their sums apart
    delta = torch.empty(problem.parts, *stats.shape[1:], **options)
    numerators, denominators, _ = problem.bands()
    tiles = problem.product_tiles(problem.out_size)
    num_tiles = problem.batch * tiles[0] * tiles[1]
    peaks = torch.empty(num_tiles, problem.queries, problem.heads, **options)
    args = (*maps, delta, peaks, numerators, denominators)
    problem.launch_products(toeplitz_delta_kernel, problem.out_size, args, strides, delta.stride(0))
    delta = _whole(delta)
    grad_scores = torch.empty(problem.parts, *scores.shape, **options)
    grad_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    args = (*maps, delta, grad_scores, grad_value, *problem.bands(transposed=True))
    strides = (*strides, stats.stride()[1:4])
    problem.launch_products(
        toeplitz_token_kernel, problem.size, args, strides, grad_scores.stride(0)
    )
    return delta, peaks, _whole(grad_scores), grad_value


def _whole(parts: Tensor) -> Tensor:
    """The sum of parts [parts, ...], no copy where there is one."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(dim=0)


def _table_sums_of_products(
    problem: Problem, grad: Tensor, stats: Tensor, delta: Tensor, peaks: Tensor
) -> Tensor:
    """`_table_sums` on tensor cores, over the tiles of finite peaks."""
    kernel_h, kernel_w = problem.constants["KERNEL_H"], problem.constants["KERNEL_W"]
    tile, tiles = problem.product_tile, problem.product_tiles(problem.out_size)
    num_tiles = problem.batch * tiles[0] * tiles[1]
    blocks = triton.cdiv(tile[1] + kernel_w - 1, TABLE_TOKENS)
    others = (problem.heads, kernel_h * blocks)
    programs = min(num_tiles, max(TABLE_PROGRAMS // (others[0] * others[1]), 1))
    table = (kernel_h * kernel_w, problem.queries, problem.heads)
    part = torch.empty(2, programs, blocks, *table, dtype=torch.float32, device=grad.device)
    _, denominators, tops = problem.exponentials()
    if programs > 0:
        with on(grad.device):
            toeplitz_table_kernel[(programs, *others)](
                *(grad, problem.scores, problem.value, *stats, delta, peaks, tops, part),
                problem.size,
                problem.out_size,
                tiles,
                num_tiles,
                grad.stride()[:3],
                *problem.strides,
                stats.stride()[1:4],
                **problem.constants,
                TILE_H=tile[0],
                TILE_W=tile[1],
                ROWS=max(TABLE_ROWS, LEAST_SUM // problem.dims),
                BLOCK=TABLE_TOKENS,
                BD=problem.dims,
                LOW_PRECISION=problem.low_precision,
                INTERPRETED=isinstance(toeplitz_table_kernel, InterpretedFunction),
                **{**OPTIONS, "num_stages": 1},
            )
    return part.sum(dim=(1, 2)) * denominators.flatten(2).permute(2, 0, 1)


def _table_sums(
    problem: Problem, grad: Tensor, stats: Tensor, delta: Tensor, peaks: Tensor | None
) -> Tensor:
    """Sums of attn <grad, value> and of attn delta over all positions, [2, K, Q, h]; with the
    peaks of tiles, over those where they are infinite."""
    block, tiles = problem.block, problem.tiles(problem.out_size)
    num_tiles = problem.batch * tiles[0] * tiles[1]
    kernel_h, kernel_w = problem.constants["KERNEL_H"], problem.constants["KERNEL_W"]
    offsets = min(TABLE_OFFSETS, triton.next_power_of_2(kernel_w))
    steps = triton.cdiv(kernel_w, offsets)
    others = (triton.cdiv(problem.heads, block.heads), kernel_h * steps)
    programs = min(num_tiles, max(TABLE_PROGRAMS // (others[0] * others[1]), 1))
    table = (kernel_h, steps * offsets, problem.queries, problem.heads)
    part = torch.empty(2, programs, *table, dtype=torch.float32, device=grad.device)
    is_any_left = None if peaks is None else peaks.isinf().any().to(torch.int32)
    if programs > 0:
        with on(grad.device):
            table_kernel[(programs, *others)](
                *(grad, problem.scores, problem.value, problem.bias, *stats, delta),
                *(peaks, is_any_left, part),
                problem.size,
                problem.out_size,
                tiles,
                num_tiles,
                problem.product_tiles(problem.out_size),
                grad.stride()[:3],
                *problem.strides,
                **problem.constants,
                TILE_H=block.tile[0],
                TILE_W=block.tile[1],
                BK=offsets,
                BH=block.heads,
                BD=block.dims,
                PEAK_TILE_H=problem.product_tile[0],
                PEAK_TILE_W=problem.product_tile[1],
                **OPTIONS,
            )
    return part.sum(dim=1)[:, :, :kernel_w].flatten(1, 2)
