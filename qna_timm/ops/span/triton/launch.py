"""Local self-attention with relative keys by fused kernels, see `kernels`.

Letters: B batch, H W map, C = h*d channels, h heads, d head_dim, k kernel_size, K = k*k offsets.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from qna_timm.ops.span.triton.blocks import INTERPRETED, span_weights_kernel
from qna_timm.ops.span.triton.kernels import (
    span_bwd_keys_kernel,
    span_bwd_queries_kernel,
    span_fwd_kernel,
)

MOST_CHANNELS = 128  # of a head: programs hold a tile's queries, outputs and gradients
MOST_STEPS = 64  # kernel_size: and its relative scores
# Tiles of queries, down and across, of 32: what two warps multiply at a time.
TILES = ((4, 8), (8, 4), (2, 16))
COLUMNS = 16  # of a block, as few as a matrix product takes
PROGRAMS = 2048  # that share the tiles of the second kernel: more than a GPU runs at a time


def unsupported(qkv: Tensor, kernel_size: int, num_heads: int) -> str | None:
    """Why the kernels cannot compute this, in a clause, or None where they can."""
    if not hasattr(triton.language, "gather"):
        return f"the kernels need triton 3.3, this is {triton.__version__}"
    if not (qkv.is_cuda or qkv.is_meta or INTERPRETED):
        return f"qkv is on {qkv.device.type}, Triton needs a GPU"
    if qkv.is_cuda and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(qkv.device)
        if properties.major < 8:
            return f"{properties.name} is older than the kernels, made for capability 8.0"
    if qkv.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"qkv is {qkv.dtype}, not float32, bfloat16 or float16"
    if qkv.shape[3] > 3 * num_heads * MOST_CHANNELS:
        head_dim = qkv.shape[3] // (3 * num_heads)
        return f"a head has {head_dim} channels, more than {MOST_CHANNELS}"
    if kernel_size > MOST_STEPS:
        return f"kernel_size is {kernel_size}, more than {MOST_STEPS - 1}"
    return None


def choose_tile(kernel_size: int) -> tuple[int, int]:
    """Tile with the fewest pairs of query and key, in whole blocks of columns."""

    def pairs(tile: tuple[int, int]) -> int:
        halo_h, halo_w = (side + kernel_size - 1 for side in tile)
        return halo_h * triton.cdiv(halo_w, COLUMNS)

    return min(TILES, key=pairs)


def constants(
    dtype: torch.dtype, head_dim: int, kernel_size: int, has_mask: bool, has_floor: bool
) -> dict[str, Any]:
    """What the kernels are compiled for, but for MASK_PADDING."""
    tile = choose_tile(kernel_size)
    return dict(
        HEAD_DIM=head_dim,
        KERNEL=kernel_size,
        HAS_MASK=has_mask,
        HAS_FLOOR=has_floor,
        TILE_H=tile[0],
        TILE_W=tile[1],
        BLOCK_N=COLUMNS,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_S=max(16, triton.next_power_of_2(kernel_size)),
        PRECISION="ieee" if dtype == torch.float32 else "tf32",  # of products of float32
    )


def launch_options(
    dtype: torch.dtype, block_d: int, block_s: int, many_sums: bool = False
) -> dict[str, Any]:
    """Warps of a program, and rows of keys under way: as few and as many as registers allow.

    Args:
        dtype: Of qkv.
        block_d: D.
        block_s: S.
        many_sums: For the kernel that adds up the tables' gradients.
    """
    if dtype == torch.float32:
        num_warps, num_stages = 4 if block_d <= 32 else 8, 1
    elif many_sums:
        num_warps, num_stages = 2 if max(block_d, block_s) == 16 else max(4, block_d // 16), 1
    else:
        num_warps, num_stages = max(2, block_d // 16), 2 if block_d <= 64 else 1
    return dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


class _Problem:
    """Arguments of the kernels, in the order in which they take them."""

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
    ) -> None:
        self.qkv = _unit_channels(qkv)
        self.tables = rel_pos_h.contiguous(), rel_pos_w.contiguous()
        self.batch, self.height, self.width, channels = qkv.shape
        self.channels, self.num_heads, self.scale = channels // 3, num_heads, scale
        self.kernel_size, self.mask_padding = rel_pos_h.shape[1], mask_padding
        head_dim = self.channels // num_heads
        self.constants = constants(
            qkv.dtype, head_dim, self.kernel_size, mask is not None, floor is not None
        )
        sizes = qkv.dtype, self.constants["BLOCK_D"], self.constants["BLOCK_S"]
        self.options = launch_options(*sizes)
        self.options_for_sums = launch_options(*sizes, many_sums=True)
        down, across = self.constants["TILE_H"], self.constants["TILE_W"]
        self.num_tiles = self.batch * -(-self.height // down) * -(-self.width // across)
        self.weights = self._weights(mask, floor)

    def _weights(self, mask: Tensor | None, floor: Tensor | None) -> tuple[Tensor, Tensor]:
        """log w and r of every offset [h, 2, K], and rows and columns of any weight [h, 4]."""
        if mask is None or self.num_tiles == 0:
            return self.qkv, self.qkv  # never read
        heads, offsets = mask.shape
        weights = torch.empty(heads, 2, offsets, dtype=torch.float32, device=mask.device)
        ranges = torch.empty(heads, 4, dtype=torch.int32, device=mask.device)
        span_weights_kernel[(heads,)](
            mask.contiguous(),
            mask if floor is None else floor.contiguous(),
            weights,
            ranges,
            KERNEL=self.kernel_size,
            HAS_FLOOR=floor is not None,
            BLOCK=triton.next_power_of_2(offsets),
            enable_fp_fusion=True,
        )
        return weights, ranges

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.qkv, *self.tables, *self.weights

    @property
    def sizes(self) -> tuple[int | float, ...]:
        return self.height, self.width, self.num_heads, self.scale


def _unit_channels(x: Tensor) -> Tensor:
    """A map whose channels lie side by side, as the kernels load them."""
    return x if x.stride(3) == 1 else x.contiguous()


def _on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def forward(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Output [B, H, W, C] and, for `backward`, every query's max and total [2, B, h, H, W].

    Arguments as in `span_attention`, in the order of `span_offsets`; tables, mask and floor are
    float32.
    """
    with _on_device(qkv):
        problem = _Problem(qkv, *rest)
        batch, height, width, _ = qkv.shape
        out = torch.empty(
            batch, height, width, problem.channels, dtype=qkv.dtype, device=qkv.device
        )
        stats = torch.empty(
            2, batch, problem.num_heads, height, width, dtype=torch.float32, device=qkv.device
        )
        if problem.num_tiles:
            span_fwd_kernel[(problem.num_tiles * problem.num_heads,)](
                *problem.inputs,
                out,
                *stats,
                *problem.qkv.stride()[:3],
                *problem.sizes,
                MASK_PADDING=problem.mask_padding,
                **problem.constants,
                **problem.options,
            )
    return out, stats


def backward(
    grad: Tensor,
    qkv: Tensor,
    rel_pos_h: Tensor,
    rel_pos_w: Tensor,
    mask: Tensor | None,
    floor: Tensor | None,
    num_heads: int,
    mask_padding: bool,
    scale: float,
    out: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv [B, H, W, 3*C], both tables [C, 2*k] and the mask [h, K].

    The sum over programs comes last and always adds in the same order.
    """
    with _on_device(qkv):
        problem = _Problem(qkv, rel_pos_h, rel_pos_w, mask, floor, num_heads, mask_padding, scale)
        parts = min(problem.num_tiles, triton.cdiv(PROGRAMS, num_heads))
        make = dict(dtype=torch.float32, device=qkv.device)
        kernel_size = problem.kernel_size
        delta = torch.empty(stats.shape[1:], **make)
        grad_rel = torch.empty(parts, problem.channels, 2 * kernel_size, **make)
        grad_mask = torch.empty(parts if mask is not None else 0, num_heads, kernel_size**2, **make)
        grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        if problem.num_tiles:
            grad = _unit_channels(grad)
            strides = *grad.stride()[:3], *problem.qkv.stride()[:3]
            span_bwd_queries_kernel[(parts * num_heads,)](
                grad,
                *problem.inputs,
                out.contiguous(),
                *stats,
                delta,
                grad_qkv,
                grad_rel,
                grad_mask,
                *strides,
                problem.num_tiles,
                *problem.sizes,
                MASK_PADDING=mask_padding,
                **problem.constants,
                **problem.options_for_sums,
            )
            span_bwd_keys_kernel[(problem.num_tiles * num_heads,)](
                grad,
                *problem.inputs,
                *stats,
                delta,
                grad_qkv,
                *strides,
                *problem.sizes,
                **problem.constants,
                **problem.options,
            )
        grad_mask = grad_mask.sum(dim=0)
        if mask is not None:
            weight = mask if floor is None else mask + floor
            grad_mask = torch.where(weight == 0.0, 0.0, grad_mask / weight)
        return grad_qkv, grad_rel.sum(dim=0), grad_mask
