"""Local self-attention with unfolded keys, written plainly: what benchmarks compare with.

As the released code computes it: projections of the padded map, every position's window of keys
and values as a tensor of its own, [B, C, H, W, k, k], relative vectors added to the keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qna_timm.layers.span_attn import SpanAttention


class UnfoldedAttention(nn.Module):
    """The function of a `SpanAttention`, and its parameters."""

    def __init__(self, layer: SpanAttention) -> None:
        super().__init__()
        self.num_heads = layer.num_heads
        self.fixed_radius = layer.fixed_radius
        self.eps = layer.eps
        self.qkv = layer.qkv
        self.rel_pos_h = layer.rel_pos_h
        self.rel_pos_w = layer.rel_pos_w
        self.span_mask = layer.span_mask

    def forward(self, x: Tensor) -> Tensor:
        radius = self.fixed_radius
        if self.span_mask is not None:
            radius = self.span_mask.running_radius()
        size = 2 * radius + 1
        batch, _, height, width = x.shape
        query, key, value = (weight for weight in self.qkv.weight.chunk(3))
        padded = F.pad(x, [radius] * 4)
        query, key, value = F.conv2d(x, query), F.conv2d(padded, key), F.conv2d(padded, value)
        key, value = (t.unfold(2, size, 1).unfold(3, size, 1) for t in (key, value))
        start = self.rel_pos_h.shape[1] // 2 - radius
        rows = self.rel_pos_h[:, start : start + size].view(1, -1, 1, 1, size, 1)
        cols = self.rel_pos_w[:, start : start + size].view(1, -1, 1, 1, 1, size)
        upper, lower = key.chunk(2, dim=1)
        key = torch.cat([upper + rows, lower + cols], dim=1)
        shape = (batch, self.num_heads, -1, height, width, size * size)
        key, value = key.contiguous().view(shape), value.contiguous().view(shape)
        query = query.view(batch, self.num_heads, -1, height, width, 1)
        attn = (query * key).sum(dim=2, keepdim=True).softmax(dim=-1)
        if self.span_mask is not None:
            mask = self.span_mask(radius, 0.0)[0].to(attn.dtype)
            attn = attn * mask.view(1, self.num_heads, 1, 1, 1, -1)
            attn = attn / (attn.sum(dim=-1, keepdim=True) + self.eps)
        return (attn * value).sum(dim=-1).flatten(1, 2)
