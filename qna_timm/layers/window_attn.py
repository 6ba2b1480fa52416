"""Multi-head self-attention in tiled windows, as a layer on channels-last maps."""

from collections.abc import Sequence

import torch
from timm.layers import register_notrace_function, to_2tuple, use_fused_attn
from timm.layers.weight_init import lecun_normal_
from torch import Tensor, nn

from qna_timm.ops import resize_offset_table, window_attention

register_notrace_function(window_attention)

Size2 = int | tuple[int, int]


def _table_side(window_size: tuple[int, int]) -> tuple[int, int]:
    return 2 * window_size[0] - 1, 2 * window_size[1] - 1


def stage_windows(
    window_size: Size2 | Sequence[Size2], num_stages: int
) -> tuple[tuple[int, int], ...]:
    """One (height, width) per stage from an int, or a sequence with an int or pair per stage.

    Raises:
        ValueError: another number of entries, or sides below 1.
    """
    if isinstance(window_size, int):
        window_size = (window_size,) * num_stages
    if len(window_size) != num_stages:
        raise ValueError(
            f"window_size must be an int or one entry for each of {num_stages} stages, "
            f"got {window_size}"
        )
    windows = tuple(tuple(int(side) for side in to_2tuple(window)) for window in window_size)
    if min(side for window in windows for side in window) < 1:
        raise ValueError(f"window_size must be positive, got {window_size}")
    return windows


def scale_windows(
    windows: Sequence[tuple[int, int]],
    old_size: tuple[int, int],
    new_size: tuple[int, int],
    reductions: Sequence[int],
) -> tuple[tuple[int, int], ...]:
    """Windows that cover the same share of each stage's map after a change of image size.

    Args:
        windows: (height, width) per stage, in tokens.
        old_size: Image (height, width) they were made for, in pixels.
        new_size: New image (height, width).
        reductions: Pixels per token side, per stage.
    """
    return tuple(
        tuple(
            max(1, round(side * -(-new // reduction) / -(-old // reduction)))
            for side, old, new in zip(window, old_size, new_size, strict=True)
        )
        for window, reduction in zip(windows, reductions, strict=True)
    )


class WindowAttention(nn.Module):
    """Self-attention inside non-overlapping windows with a relative position bias.

        out_a = proj(concat_j sum_b softmax_b(q_a . k_b / sqrt(d) + rel_pos_bias[a - b, j]) v_b)

    A map that the windows do not divide is continued by padding that no query sees; a map smaller
    than the window is one window, with the biases of the distances that occur.

    Args:
        dim: Input channels.
        num_heads: Heads, a divisor of attn_dim.
        window_size: (height, width) of a window, in tokens.
        attn_dim: Channels of queries, keys, values and output, dim if None.
        rel_pos_bias: Learn a bias for each distance and head.
        qkv_bias: Biases on the projections.
        proj_drop: Dropout after the output projection.

    Shape: [B, H, W, dim] -> [B, H, W, attn_dim], any H and W.

    Raises:
        ValueError: heads that do not divide attn_dim.
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: tuple[int, int],
        attn_dim: int | None = None,
        rel_pos_bias: bool = True,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        attn_dim = attn_dim or dim
        if num_heads < 1 or attn_dim % num_heads:
            raise ValueError(f"num_heads must divide attn_dim={attn_dim}, got {num_heads}")
        self.num_heads = num_heads
        self.window_size = window_size
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * attn_dim, bias=qkv_bias, **dd)
        self.rel_pos_bias: nn.Parameter | None = None
        if rel_pos_bias:
            rows, cols = _table_side(window_size)
            self.rel_pos_bias = nn.Parameter(torch.empty(rows * cols, num_heads, **dd))
        self.proj = nn.Linear(attn_dim, attn_dim, bias=qkv_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LeCun-normal projections, zero biases."""
        for linear in (self.qkv, self.proj):
            lecun_normal_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.rel_pos_bias is not None:
            nn.init.zeros_(self.rel_pos_bias)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the released recipe does not decay."""
        return set() if self.rel_pos_bias is None else {"rel_pos_bias"}

    @torch.jit.ignore
    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Change the window, (height, width) in tokens; the bias table is resized with it."""
        if self.rel_pos_bias is not None:
            table = self.rel_pos_bias
            resized = resize_offset_table(
                table.detach(), _table_side(self.window_size), _table_side(window_size)
            )
            self.rel_pos_bias = nn.Parameter(resized, requires_grad=table.requires_grad)
        self.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        x = window_attention(
            self.qkv(x), self.rel_pos_bias, self.num_heads, self.window_size, self.fused_attn
        )
        return self.proj_drop(self.proj(x))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}"
