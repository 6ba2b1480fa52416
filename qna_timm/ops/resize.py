"""Resizing of maps, and of tables that hold a row for each offset of a window."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _shares(old: int, new: int, like: Tensor) -> Tensor:
    """What old places give to the means that adaptive pooling takes: [new, old]."""
    places = torch.arange(old, device=like.device)
    first = torch.arange(new, device=like.device)[:, None]
    low, high = first * old // new, ((first + 1) * old + new - 1) // new
    return ((low <= places) & (places < high)).to(like.dtype) / (high - low)


def average_pool_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Adaptive average pooling of maps [..., H, W] to a size.

    PyTorch's own; but its gradient on a GPU adds up in any order, and is refused where
    deterministic algorithms are asked for: there means come from products of rows and columns.
    """
    if torch.jit.is_scripting():
        return F.adaptive_avg_pool2d(x, size)
    else:  # TorchScript skips an else branch, not code after a return
        if not torch.are_deterministic_algorithms_enabled():
            return F.adaptive_avg_pool2d(x, size)
        rows, cols = _shares(x.shape[-2], size[0], x), _shares(x.shape[-1], size[1], x)
        return rows @ x @ cols.t()


def resize_offset_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Bicubic resize of a table over window offsets, as the released fine-tuning code does it.

    Keys' kernel with a = -0.5 on half-pixel centres, widened when shrinking. PyTorch's plain
    bicubic takes a = -0.75; its antialiased one takes -0.5 and is the same kernel when enlarging.

    Args:
        table: [old_h * old_w, ...], row-major.
        old: (old_h, old_w).
        new: (new_h, new_w).

    Returns:
        [new_h * new_w, ...] in the table's dtype.
    """
    if old == new:
        return table
    shape = [new[0] * new[1]] + list(table.shape[1:])  # noqa: RUF005 - scriptable
    if table.is_meta:
        return torch.empty(shape, dtype=table.dtype, device=table.device)
    grid = table.flatten(1).t().unflatten(1, old).unsqueeze(0)
    if grid.dtype != torch.float64:
        grid = grid.float()
    size = [new[0], new[1]]
    grid = F.interpolate(grid, size, mode="bicubic", align_corners=False, antialias=True)
    return grid[0].flatten(1).t().contiguous().view(shape).to(table.dtype)
