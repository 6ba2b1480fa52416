"""Where the windows of learned-query attention lie on a map.

Letters: H W map, Y X output map, K = kh*kw offsets of a window.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


def check_problem(
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    kernel_size: tuple[int, int],
    stride: int,
    padding: int,
) -> None:
    """Arguments as in `qna_attention`.

    Raises:
        ValueError: shapes that do not go together.
    """
    if scores.dim() != 5 or value.dim() != 4 or scores.shape[:3] != value.shape[:3]:
        raise ValueError(
            "scores must be [B, H, W, Q, h] and value [B, H, W, C] of the same B, H, W, "
            f"got {list(scores.shape)} and {list(value.shape)}"
        )
    if 0 in scores.shape[1:] or value.shape[3] == 0:
        raise ValueError(
            "scores must have tokens, queries and heads, and value channels, "
            f"got {list(scores.shape)} and {list(value.shape)}"
        )
    if value.shape[3] % scores.shape[4] != 0:
        raise ValueError(
            f"value's {value.shape[3]} channels must divide into scores' {scores.shape[4]} heads"
        )
    if isinstance(kernel_size, int) or len(kernel_size) != 2:
        raise ValueError(f"kernel_size must be a pair (height, width), got {kernel_size}")
    if min(kernel_size) < 1 or stride < 1 or padding < 0 or padding >= min(kernel_size):
        raise ValueError(
            "kernel_size and stride must be at least 1 and padding in 0..kernel_size-1, "
            f"got {kernel_size}, {stride}, {padding}"
        )
    for axis in (0, 1):
        if scores.shape[1 + axis] + 2 * padding < kernel_size[axis]:
            raise ValueError(
                f"a kernel of {kernel_size} with padding {padding} does not fit the map "
                f"{list(scores.shape[1:3])}"
            )
    offsets = kernel_size[0] * kernel_size[1]
    table = [offsets, scores.shape[3], scores.shape[4]]
    if rel_pos_bias is not None and list(rel_pos_bias.shape) != table:
        raise ValueError(
            f"rel_pos_bias must be [K, Q, h] = {table}, got {list(rel_pos_bias.shape)}"
        )
    if query_weight is not None:
        shape = list(query_weight.shape)
        if shape != table and shape != [1, table[1], table[2]]:
            raise ValueError(f"query_weight must be {table} or {[1, *table[1:]]}, got {shape}")


def window_max(scores: Tensor, kernel_size: tuple[int, int], stride: int) -> Tensor:
    """Maximum of framed scores [n, H+2p, W+2p, Q, h] over every window, [n, Y, X, Q, h]."""
    num_heads = scores.shape[-1]
    flat = scores.flatten(3).permute(0, 3, 1, 2)
    # rows, then columns: kh + kw instead of kh * kw comparisons
    flat = F.max_pool2d(flat, (kernel_size[0], 1), (stride, 1))
    flat = F.max_pool2d(flat, (1, kernel_size[1]), (1, stride))
    return flat.permute(0, 2, 3, 1).unflatten(3, (-1, num_heads))


@dataclass(frozen=True)
class Windows:
    """Window (y, x) begins at token (stride*y - padding, stride*x - padding).

    Args:
        kernel_size: (kh, kw) in tokens.
        stride: Tokens between windows.
        padding: Tokens around the map.
    """

    kernel_size: tuple[int, int]
    stride: int
    padding: int

    @property
    def num_offsets(self) -> int:
        """K."""
        return self.kernel_size[0] * self.kernel_size[1]

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Windows down and across, (Y, X)."""
        return tuple(
            (side + 2 * self.padding - kernel) // self.stride + 1
            for side, kernel in zip((height, width), self.kernel_size, strict=True)
        )

    def framed(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Map [n, H, W, ...] in its padding."""
        p = self.padding
        return F.pad(x, [0, 0] * (x.dim() - 3) + [p, p, p, p], value=fill)

    def inner(self, framed: Tensor) -> Tensor:
        """The map in a framed one."""
        p = self.padding
        return framed[:, p : framed.shape[1] - p, p : framed.shape[2] - p]

    def shifts(self, framed: Tensor) -> Iterator[Tensor]:
        """What windows see at each of their offsets: K views [n, Y, X, ...], in row-major order."""
        kernel_h, kernel_w = self.kernel_size
        step = self.stride
        rows, cols = framed.shape[1] - kernel_h + 1, framed.shape[2] - kernel_w + 1
        for ky in range(kernel_h):
            for kx in range(kernel_w):
                yield framed[:, ky : ky + rows : step, kx : kx + cols : step]
