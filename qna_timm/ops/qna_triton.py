"""Learned-query attention on GPU: launchers of the Triton kernels.

Block sizes come from the problem's sizes alone, never from timings: the same call gives the same
bits, on any day and on every process.

Letters: B batch, H W map, Y X output map, Q queries, h heads, d head_dim, C = h*d channels,
K = kh*kw offsets.
"""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.runtime import KernelInterface
from triton.runtime.interpreter import InterpretedFunction

from qna_timm.ops.qna_triton_backward import delta_kernel, table_kernel, token_kernel
from qna_timm.ops.qna_triton_kernels import forward_kernel
from qna_timm.ops.qna_triton_toeplitz import toeplitz_kernel

MAX_HEAD_DIM = 256
# Bytes of values in a program's block [positions, heads, channels of a head]: two loads of 16 bytes
# for each thread of 4 warps. With three, registers spill.
BLOCK_BYTES = 4096
# Programs that share the sums over all positions: several for each multiprocessor of any GPU, and
# each leaves partial sums as large as both tables.
TABLE_PROGRAMS = 2048
# Offsets that one of them sums for: two sums for each, query and head stay in registers.
TABLE_OFFSETS = 4
# Offsets of a window from which on the tensor cores are taken.
TENSOR_CORE_OFFSETS = 49
# Rows and channels of a program there, which make the 128 rows of a product of 16 tokens. More
# channels of a head are more programs; more queries would have more sums than registers.
TOEPLITZ_ROWS = 16
TOEPLITZ_DIMS = 8
TOEPLITZ_QUERIES = 4
TOEPLITZ_CHUNK = 16
# Registers of a thread there, so that three programs share a multiprocessor.
TOEPLITZ_REGISTERS = 168
# Fused multiply-adds, which the next versions of Triton leave out unless they are asked for.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


class _Block(NamedTuple):
    """What a program takes: powers of two of positions, heads and channels of a head."""

    positions: int
    heads: int
    dims: int

    @property
    def tile(self) -> tuple[int, int]:
        """Height and width of a tile of that many positions, as square as can be: least halo."""
        height = 1 << (self.positions.bit_length() - 1) // 2
        return height, self.positions // height


def _block(num_heads: int, head_dim: int, item_bytes: int) -> _Block:
    numbers = BLOCK_BYTES // item_bytes
    dims = triton.next_power_of_2(head_dim)
    heads = min(triton.next_power_of_2(num_heads), max(64 // dims, 1))
    return _Block(min(max(numbers // (heads * dims), 4), 128), heads, dims)


def _addressable(x: Tensor) -> Tensor:
    """Maps may have any strides of image, row and column; what lies behind is contiguous."""
    step = 1
    for axis in range(x.dim() - 1, 2, -1):
        if x.shape[axis] != 1 and x.stride(axis) != step:
            return x.contiguous()
        step *= x.shape[axis]
    return x


class _Problem:
    """Inputs as the kernels address them, and what is the same for all kernels."""

    def __init__(
        self,
        scores: Tensor,
        value: Tensor,
        rel_pos_bias: Tensor | None,
        query_weight: Tensor | None,
        kernel_size: tuple[int, int],
        stride: int,
        padding: int,
    ) -> None:
        self.scores, self.value = _addressable(scores), _addressable(value)
        self.bias = None if rel_pos_bias is None else rel_pos_bias.contiguous()
        self.weight = None if query_weight is None else query_weight.contiguous()
        self.batch, *size = value.shape[:3]
        self.queries, self.heads = scores.shape[3:]
        self.head_dim = value.shape[3] // self.heads
        self.offsets = kernel_size[0] * kernel_size[1]
        self.size = tuple(size)
        self.out_size = tuple(
            (n + 2 * padding - k) // stride + 1 for n, k in zip(size, kernel_size, strict=True)
        )
        # a weight that all offsets share has no step from one offset to the next
        per_offset = query_weight is not None and query_weight.shape[0] == self.offsets
        self.weight_step = self.queries * self.heads if per_offset else 0
        self.block = _block(self.heads, self.head_dim, value.element_size())
        self.strides = (self.scores.stride()[:3], self.value.stride()[:3])
        self.constants = {
            "QUERIES": self.queries,
            "HEADS": self.heads,
            "HEAD_DIM": self.head_dim,
            "KERNEL_H": kernel_size[0],
            "KERNEL_W": kernel_size[1],
            "STRIDE": stride,
            "PADDING": padding,
        }

    def takes_tensor_cores(self) -> bool:
        """Where the zeros of a banded product cost less than its speed gains, and its sums for all
        queries stay in registers."""
        large = self.offsets >= TENSOR_CORE_OFFSETS
        return large and self.constants["STRIDE"] == 1 and self.queries <= TOEPLITZ_QUERIES

    def exponentials(self) -> tuple[Tensor, Tensor, Tensor]:
        """exp(bias) * weight and exp(bias), [Q, h, kh, kw], relative to the largest bias [Q, h]."""
        kernel_size = (self.constants["KERNEL_H"], self.constants["KERNEL_W"])
        tops = torch.zeros(self.queries, self.heads, device=self.value.device)
        denominator = tops.new_ones(self.queries, self.heads, self.offsets)
        if self.bias is not None:
            tops = self.bias.amax(dim=0)
            denominator = (self.bias - tops).exp().permute(1, 2, 0)
        numerator = denominator
        if self.weight is not None:
            numerator = denominator * self.weight.permute(1, 2, 0)
        return numerator.unflatten(2, kernel_size), denominator.unflatten(2, kernel_size), tops

    def tiles(self, size: tuple[int, ...]) -> tuple[int, int]:
        """Tiles of a map, down and across."""
        tile = self.block.tile
        return triton.cdiv(size[0], tile[0]), triton.cdiv(size[1], tile[1])

    def launch(
        self,
        kernel: KernelInterface,
        size: tuple[int, ...],
        maps: tuple[Tensor | None, ...],
        strides: tuple[tuple[int, ...], ...],
    ) -> None:
        """Runs a kernel with a program for every tile of a map and block of heads."""
        block, tiles = self.block, self.tiles(size)
        grid = (self.batch * tiles[0] * tiles[1], triton.cdiv(self.heads, block.heads))
        if grid[0] == 0:
            return
        tile_h, tile_w = block.tile
        with _on(self.value.device):
            kernel[grid](
                *maps,
                self.size,
                self.out_size,
                tiles,
                *strides,
                self.weight_step,
                **self.constants,
                TILE_H=tile_h,
                TILE_W=tile_w,
                BH=block.heads,
                BD=block.dims,
                **OPTIONS,
            )


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


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
        out [B, Y, X, C] in value's dtype, and lse [B, Y, X, Q, h] float32, the logarithm of the
        softmax's denominator: log sum_o exp(score + rel_pos_bias[o]) over the window.
    """
    problem = _Problem(scores, value, rel_pos_bias, query_weight, kernel_size, stride, padding)
    shape = (problem.batch, *problem.out_size)
    out = torch.empty(*shape, value.shape[3], dtype=value.dtype, device=value.device)
    lse = torch.empty(*shape, *scores.shape[3:], dtype=torch.float32, device=value.device)
    maps = (problem.scores, problem.value, problem.bias, problem.weight, out, lse)
    if problem.takes_tensor_cores():
        _launch_toeplitz(problem, out, lse)
    else:
        problem.launch(forward_kernel, problem.out_size, maps, problem.strides)
    return out, lse


def _bands(table: Tensor, columns: int, tokens: int) -> Tensor:
    """Banded Toeplitz matrices of rows [..., kw]: entry [..., t, c] is that of offset t - c."""
    rows = F.pad(table, [columns - 1, tokens - table.shape[-1]])
    return rows.unfold(rows.dim() - 1, columns, 1).flip(-1)  # ..., t, c


def _launch_toeplitz(problem: _Problem, out: Tensor, lse: Tensor) -> None:
    columns = 32 if problem.out_size[1] > 16 and problem.queries <= 2 else 16
    tile = (TOEPLITZ_ROWS, columns)
    tiles = tuple(triton.cdiv(n, t) for n, t in zip(problem.out_size, tile, strict=True))
    dims = min(triton.next_power_of_2(problem.head_dim), TOEPLITZ_DIMS)
    parts = triton.cdiv(problem.head_dim, dims)
    grid = (problem.batch * tiles[0] * tiles[1], problem.heads * parts)
    if grid[0] == 0:
        return
    low_precision = problem.value.dtype == torch.bfloat16
    tokens = tile[1] + problem.constants["KERNEL_W"] - 1
    tokens = triton.cdiv(tokens, TOEPLITZ_CHUNK) * TOEPLITZ_CHUNK
    *tables, tops = problem.exponentials()
    numerators, denominators = (_bands(table, tile[1], tokens) for table in tables)
    if low_precision:
        numerators, high = (bands.to(torch.bfloat16) for bands in (numerators, denominators))
        denominators = torch.cat([high, (denominators - high).to(torch.bfloat16)], dim=-1)
    options = {**OPTIONS, "num_stages": 1}  # loads far ahead would take registers
    if low_precision and problem.queries <= 2 and torch.version.hip is None:
        options["maxnreg"] = TOEPLITZ_REGISTERS
    with _on(out.device):
        toeplitz_kernel[grid](
            *(problem.scores, problem.value, problem.bias, problem.weight),
            *(numerators, denominators, tops),
            *(out, lse, problem.size, problem.out_size, tiles),
            *problem.strides,
            problem.weight_step,
            **problem.constants,
            TILE_H=tile[0],
            TILE_W=tile[1],
            TOKENS=tokens,
            CHUNK=TOEPLITZ_CHUNK,
            BD=dims,
            LOW_PRECISION=low_precision,
            INTERPRETED=isinstance(toeplitz_kernel, InterpretedFunction),
            **options,
        )


def backward(
    grad: Tensor,
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel_size: tuple[int, int],
    stride: int,
    padding: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of scores, value (in its dtype), rel_pos_bias and query_weight (None without one).

    Without atomics: the same inputs give the same bits.

    Args:
        grad: Gradient of out, [B, Y, X, C].
        out: As `forward` returned it; not read, since the outputs of single queries, which this
            needs, are not in it.
        lse: As `forward` returned it.
    """
    problem = _Problem(scores, value, rel_pos_bias, query_weight, kernel_size, stride, padding)
    grad, lse = _addressable(grad), lse.contiguous()
    strides = (grad.stride()[:3], *problem.strides)
    maps = (grad, problem.scores, problem.value, problem.bias, problem.weight, lse)
    delta = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
    problem.launch(delta_kernel, problem.out_size, (*maps, delta), strides)
    grad_scores = torch.empty(scores.shape, dtype=torch.float32, device=value.device)
    grad_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    grads = (delta, grad_scores, grad_value)
    problem.launch(token_kernel, problem.size, (*maps, *grads), strides)
    if problem.bias is None and problem.weight is None:
        return grad_scores, grad_value, None, None

    products, means = _table_sums(problem, grad, lse, delta).unbind(0)
    grad_bias, grad_weight = None, None
    if problem.bias is not None:
        grad_bias = (products if problem.weight is None else products * problem.weight) - means
    if problem.weight is not None:
        grad_weight = products.sum_to_size(problem.weight.shape)
    return grad_scores, grad_value, grad_bias, grad_weight


def _table_sums(problem: _Problem, grad: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Sums of attn <grad, value> and of attn delta over all positions, [2, K, Q, h]."""
    block, tiles = problem.block, problem.tiles(problem.out_size)
    num_tiles = problem.batch * tiles[0] * tiles[1]
    kernel_h, kernel_w = problem.constants["KERNEL_H"], problem.constants["KERNEL_W"]
    offsets = min(TABLE_OFFSETS, triton.next_power_of_2(kernel_w))
    steps = triton.cdiv(kernel_w, offsets)
    others = (triton.cdiv(problem.heads, block.heads), kernel_h * steps)
    programs = min(num_tiles, max(TABLE_PROGRAMS // (others[0] * others[1]), 1))
    table = (kernel_h, steps * offsets, problem.queries, problem.heads)
    part = torch.empty(2, programs, *table, dtype=torch.float32, device=grad.device)
    if programs > 0:
        with _on(grad.device):
            table_kernel[(programs, *others)](
                *(grad, problem.scores, problem.value, problem.bias, lse, delta, part),
                problem.size,
                problem.out_size,
                tiles,
                num_tiles,
                grad.stride()[:3],
                *problem.strides,
                **problem.constants,
                TILE_H=block.tile[0],
                TILE_W=block.tile[1],
                BK=offsets,
                BH=block.heads,
                BD=block.dims,
                **OPTIONS,
            )
    return part.sum(dim=1)[:, :, :kernel_w].flatten(1, 2)
