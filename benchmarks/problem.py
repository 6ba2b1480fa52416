"""Sizes of an operator or a layer that is measured."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Problem:
    """Maps of batch x size x size x channels, and attention on them.

    Args:
        heads: Of learned-query attention.
        queries: Of learned-query attention.
        peer_heads: Of all other attention. FlexAttention takes no head_dim below 16 on a GPU.
        window: k, of windows of k x k tokens.
        dtype: Of maps and layers.
        device: Where they are.
        score_std: Standard deviation of an operator's random scores.
        bias_std: Standard deviation of its bias.
    """

    batch: int = 8
    size: int = 56
    channels: int = 64
    heads: int = 8
    queries: int = 2
    peer_heads: int = 4
    window: int = 3
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    score_std: float = 1.0
    bias_std: float = 0.2
