"""Attention inside tiled windows of a map, at any map size.

Letters: B batch, H W map, C channels, h heads, d head_dim, N tokens of a window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rel_pos_bias_matrix(
    table: Tensor, table_window: tuple[int, int], window: tuple[int, int]
) -> Tensor:
    """Bias of every token pair of a window, [h, N, N], from the table of relative positions.

    Args:
        table: [(2*Wh-1) * (2*Ww-1), h]; row (ya-yb+Wh-1) * (2*Ww-1) + (xa-xb+Ww-1) is the bias of
            query a for key b.
        table_window: (Wh, Ww) that the table was made for.
        window: (height, width) of the window, at most the table's.
    """
    height, width = window
    top = table_window[0] - height
    left = table_window[1] - width
    grid = table.unflatten(0, (2 * table_window[0] - 1, 2 * table_window[1] - 1))
    grid = grid[top : top + 2 * height - 1, left : left + 2 * width - 1]
    # Element [ya, r] of the unfolded grid is row ya + r; the flip makes r = height-1-yb of it.
    grid = grid.unfold(0, height, 1).flip(3)  # ya, 2*width-1, h, yb
    grid = grid.unfold(1, width, 1).flip(4)  # ya, xa, h, yb, xb
    return grid.permute(2, 0, 1, 3, 4).reshape(-1, height * width, height * width)


def _window_mask(size: tuple[int, int], window: tuple[int, int], device: torch.device) -> Tensor:
    """Which keys of each window lie on the map: bool [windows, 1, 1, N]."""
    counts = ((size[0] + window[0] - 1) // window[0], (size[1] + window[1] - 1) // window[1])
    rows = torch.arange(counts[0] * window[0], device=device).view(counts[0], 1, window[0], 1)
    cols = torch.arange(counts[1] * window[1], device=device).view(1, counts[1], 1, window[1])
    return ((rows < size[0]) & (cols < size[1])).flatten(2).flatten(0, 1)[:, None, None]


def _attend_in_windows(
    qkv: Tensor,
    rel_pos_bias: Tensor | None,
    num_heads: int,
    window_size: tuple[int, int],
    fused: bool,
) -> Tensor:
    """`window_attention` of what has been checked."""
    batch, height, width, channels = qkv.shape
    # a map smaller than the window is a window of its own: same pairs, same biases
    # (a number behind a guard where sizes are symbols: a minimum would enter all that follows)
    window = (
        window_size[0] if height >= window_size[0] else height,
        window_size[1] if width >= window_size[1] else width,
    )
    # Sizes are products of counts, and no reshape infers one: with symbolic sizes (compiling for
    # any size) proving divisibility takes minutes.
    rows = (height + window[0] - 1) // window[0]
    cols = (width + window[1] - 1) // window[1]
    pad_h = rows * window[0] - height
    pad_w = cols * window[1] - width
    qkv = F.pad(qkv, [0, 0, 0, pad_w, 0, pad_h])
    tokens = window[0] * window[1]
    head_dim = channels // (3 * num_heads)
    qkv = qkv.view(batch, rows, window[0], cols, window[1], 3, num_heads, head_dim)
    # 3, B, rows, cols, h, wy, wx, d -> 3, B, windows*h, N, d
    qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(
        3, batch, rows * cols * num_heads, tokens, head_dim
    )
    q, k, v = qkv.unbind(0)

    mask: Tensor | None = None
    if rel_pos_bias is not None:
        mask = rel_pos_bias_matrix(rel_pos_bias, window_size, window).to(q.dtype)
        # windows*h, N, N; not a copy where there is one window
        mask = mask.expand(rows * cols, -1, -1, -1).flatten(0, 1)
    if pad_h > 0 or pad_w > 0:
        valid = _window_mask((height, width), window, q.device)
        valid = valid.expand(-1, num_heads, tokens, -1).flatten(0, 1)
        if mask is None:
            mask = torch.zeros_like(valid, dtype=q.dtype)
        mask = mask.masked_fill(~valid, float("-inf"))
    if fused:
        # of as many dimensions as the maps: with fewer, CPUs take a slower way
        mask = None if mask is None else mask.unsqueeze(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        attn = (q * head_dim**-0.5) @ k.transpose(-2, -1)
        if mask is not None:
            attn = attn + mask
        out = attn.softmax(dim=-1) @ v
    out = out.view(batch, rows, cols, num_heads, window[0], window[1], head_dim)
    out = out.permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(batch, rows * window[0], cols * window[1], num_heads * head_dim)
    return out[:, :height, :width]


# Traces follow a function's branches for other sizes only as a script.
_for_any_size = torch.jit.script_if_tracing(_attend_in_windows)


def window_attention(
    qkv: Tensor,
    rel_pos_bias: Tensor | None,
    num_heads: int,
    window_size: tuple[int, int],
    fused: bool = True,
) -> Tensor:
    """Multi-head self-attention inside non-overlapping windows that tile the map.

        out_a = sum_b softmax_b(q_a . k_b / sqrt(d) + bias[a - b]) v_b,  a, b in the same window

    A map smaller than the window is one window. A map that windows do not divide is continued by
    padding at the bottom and right that takes no part in any softmax.

    Args:
        qkv: [B, H, W, 3*C], queries, keys and values one after the other, heads inside each.
        rel_pos_bias: [(2*Wh-1) * (2*Ww-1), h] or None.
        num_heads: h.
        window_size: (Wh, Ww) in tokens.
        fused: PyTorch's fused attention; otherwise matrix products (for exporters).

    Returns:
        [B, H, W, C].

    Raises:
        ValueError: qkv is no map or, outside of traces, its channels are not those of three
            projections of num_heads heads.
    """
    if qkv.dim() != 4:
        raise ValueError(f"qkv must be a channels-last map [B, H, W, 3*C], got {list(qkv.shape)}")
    channels = qkv.shape[3]
    if not torch.jit.is_tracing() and channels % (3 * num_heads) != 0:  # traces have tensors there
        raise ValueError(
            f"qkv must have 3 * num_heads = {3 * num_heads} times the channels of a head, "
            f"got {channels}"
        )
    if not torch.jit.is_scripting():  # noqa: SIM102 (scripts skip such a branch by itself alone)
        if torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export():
            return _for_any_size(qkv, rel_pos_bias, num_heads, window_size, fused)
    return _attend_in_windows(qkv, rel_pos_bias, num_heads, window_size, fused)
