"""A problem of learned-query attention as its Triton kernels address it, and how they start.

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

# Bytes of values in a program's block [positions, heads, channels of a head]: two loads of 16 bytes
# for each thread of 4 warps. With three, registers spill.
BLOCK_BYTES = 4096
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


class Bands(NamedTuple):
    """Banded Toeplitz matrices of both sums, [Q, h, kh, tokens, columns], relative to the largest
    biases `tops` [Q, h]."""

    numerators: Tensor
    denominators: Tensor
    tops: Tensor


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


def addressable(x: Tensor) -> Tensor:
    """Maps may have any strides of image, row and column; what lies behind is contiguous."""
    step = 1
    for axis in range(x.dim() - 1, 2, -1):
        if x.shape[axis] != 1 and x.stride(axis) != step:
            return x.contiguous()
        step *= x.shape[axis]
    return x


def toeplitz(table: Tensor, columns: int, tokens: int) -> Tensor:
    """Banded Toeplitz matrices of rows [..., kw]: entry [..., t, c] is that of offset t - c."""
    rows = F.pad(table, [columns - 1, tokens - table.shape[-1]])
    return rows.unfold(rows.dim() - 1, columns, 1).flip(-1)  # ..., t, c


class Problem:
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
        self.scores, self.value = addressable(scores), addressable(value)
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
        # of the tensor cores' products
        self.low_precision = value.dtype == torch.bfloat16
        self.columns = 32 if self.out_size[1] > 16 and self.queries <= 2 else 16
        tokens = self.columns + kernel_size[1] - 1
        self.tokens = triton.cdiv(tokens, TOEPLITZ_CHUNK) * TOEPLITZ_CHUNK
        self.dims = min(triton.next_power_of_2(self.head_dim), TOEPLITZ_DIMS)
        self.parts = triton.cdiv(self.head_dim, self.dims)
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

    def bands(self, transposed: bool = False) -> Bands:
        """Tables of the tensor cores' products; `transposed` for the windows that see a token."""
        *tables, tops = self.exponentials()
        columns, tokens = self.columns, self.tokens
        if transposed:
            tables = [table.flip(2, 3) for table in tables]
        numerators, denominators = (toeplitz(table, columns, tokens) for table in tables)
        if self.low_precision:
            numerators, high = (x.to(torch.bfloat16) for x in (numerators, denominators))
            denominators = torch.cat([high, (denominators - high).to(torch.bfloat16)], dim=-1)
        return Bands(numerators, denominators, tops)

    def tiles(self, size: tuple[int, ...]) -> tuple[int, int]:
        """Tiles of a map, down and across."""
        tile = self.block.tile
        return triton.cdiv(size[0], tile[0]), triton.cdiv(size[1], tile[1])

    @property
    def product_tile(self) -> tuple[int, int]:
        """Height and width of the tiles of tensor cores."""
        return TOEPLITZ_ROWS, self.columns

    def product_tiles(self, size: tuple[int, ...]) -> tuple[int, int]:
        """Tiles of a map, down and across, for tensor cores."""
        return triton.cdiv(size[0], TOEPLITZ_ROWS), triton.cdiv(size[1], self.columns)

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
        with on(self.value.device):
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

    def launch_products(
        self,
        kernel: KernelInterface,
        size: tuple[int, ...],
        args: tuple[Tensor | None, ...],
        strides: tuple[tuple[int, ...], ...],
        *steps: int,
    ) -> None:
        """Runs a kernel of tensor cores, with a program for a tile, a head and a part of it."""
        tile, tiles = self.product_tile, self.product_tiles(size)
        grid = (self.batch * tiles[0] * tiles[1], self.heads * self.parts)
        if grid[0] == 0:
            return
        options = {**OPTIONS, "num_stages": 1}  # loads far ahead would take registers
        if self.low_precision and self.queries <= 2 and torch.version.hip is None:
            options["maxnreg"] = TOEPLITZ_REGISTERS
        with on(self.value.device):
            kernel[grid](
                *args,
                self.size,
                self.out_size,
                tiles,
                *strides,
                self.weight_step,
                *steps,
                **self.constants,
                TILE_H=tile[0],
                TILE_W=tile[1],
                TOKENS=self.tokens,
                CHUNK=TOEPLITZ_CHUNK,
                BD=self.dims,
                LOW_PRECISION=self.low_precision,
                INTERPRETED=isinstance(kernel, InterpretedFunction),
                **options,
            )


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
