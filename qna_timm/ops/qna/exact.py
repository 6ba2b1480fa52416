"""Learned-query attention offset by offset, exact for any scores, with its gradient written out.

Every window is shifted by its own maximum. Nothing is kept for each offset: exponentials are
computed anew in each pass over the window. Slower than window sums (`sums`), which cannot serve
where scores spread far.

Letters: n images, H W map, Y X output map, Q queries, h heads, d head_dim, C = h*d channels,
K offsets.
"""

from collections.abc import Iterator
from itertools import repeat

import torch
from torch import Tensor

from qna_timm.ops.qna.windows import Windows, window_max

# Of a sum that are added one after the other: in a sum of thousands small numbers would leave their
# last digits, all in the same way.
MOST_ADDENDS = 256


def in_parts(total: Tensor, count: int) -> Iterator[Tensor]:
    """For each of `count` addends the tensor to add it to; at the end `total` has them all."""
    if count <= MOST_ADDENDS:
        yield from repeat(total, count)
        return
    for first in range(0, count, MOST_ADDENDS):
        part = torch.zeros_like(total)
        yield from repeat(part, min(MOST_ADDENDS, count - first))
        total += part


class ExactWindows:
    """The softmax of every window of a map, given out offset by offset."""

    def __init__(self, scores: Tensor, rel_pos_bias: Tensor | None, windows: Windows) -> None:
        """Of scores [n, H, W, Q, h] and bias [K, Q, h]."""
        self.windows, self.rel_pos_bias = windows, rel_pos_bias
        self.scores = windows.framed(scores, float("-inf"))
        # The window's maximum goes before the bias comes: at scores of 1e4 a float32 sum with the
        # bias would keep only three decimals of it.
        self.shift = window_max(self.scores, windows.kernel_size, windows.stride)
        self.top = torch.full_like(self.shift, float("-inf"))
        for biased in self._biased():
            torch.maximum(self.top, biased, out=self.top)
        self.total = torch.zeros_like(self.shift)
        parts = in_parts(self.total, windows.num_offsets)
        for part, biased in zip(parts, self._biased(), strict=True):
            part += (biased - self.top).exp_()

    def _biased(self) -> Iterator[Tensor]:
        for offset, seen in enumerate(self.windows.shifts(self.scores)):
            biased = seen - self.shift
            yield biased if self.rel_pos_bias is None else biased.add_(self.rel_pos_bias[offset])

    def attn(self) -> Iterator[Tensor]:
        """Softmax weights of each offset: K times [n, Y, X, Q, h]."""
        for biased in self._biased():
            yield biased.sub_(self.top).exp_().div_(self.total)


def _row(query_weight: Tensor | None, offset: int) -> Tensor | float:
    if query_weight is None:
        return 1.0
    return query_weight[offset if query_weight.shape[0] > 1 else 0]


def exact_forward(
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    windows: Windows,
) -> Tensor:
    """Arguments as in `qna_attention`, all of one dtype; [n, Y, X, h, d]."""
    heads = value.unflatten(3, (scores.shape[4], -1))
    softmax = ExactWindows(scores, rel_pos_bias, windows)
    seen = windows.shifts(windows.framed(heads))
    out = heads.new_zeros(*softmax.shift.shape[:3], *heads.shape[3:])  # n, Y, X, h, d
    walks = (in_parts(out, windows.num_offsets), softmax.attn(), seen)
    for offset, (part, attn, tokens) in enumerate(zip(*walks, strict=True)):
        weight = (attn * _row(query_weight, offset)).sum(dim=3)
        part.addcmul_(weight.unsqueeze(4), tokens)
    return out


def exact_backward(
    grad: Tensor,
    scores: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    query_weight: Tensor | None,
    windows: Windows,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of scores, value [n, H, W, h, d], bias and weight [K, Q, h].

    slope[o] = weight[o] <grad, value[y+o]>
    ds[y+o] += attn[o] (slope[o] - sum_o attn[o] slope[o])
    """
    heads = value.unflatten(3, (scores.shape[4], -1))
    grad = grad.unflatten(3, (scores.shape[4], -1))
    softmax = ExactWindows(scores, rel_pos_bias, windows)
    framed = windows.framed(heads)
    mean = torch.zeros_like(softmax.shift)
    walks = (in_parts(mean, windows.num_offsets), softmax.attn(), windows.shifts(framed))
    for offset, (part, attn, tokens) in enumerate(zip(*walks, strict=True)):
        product = (grad * tokens).sum(dim=4).unsqueeze(3)  # n, Y, X, 1, h
        part += attn * product * _row(query_weight, offset)

    grad_scores = torch.zeros_like(softmax.scores)
    grad_value = torch.zeros_like(framed)
    shape = (windows.num_offsets, *scores.shape[3:])
    grad_bias, grad_weight = scores.new_empty(shape), scores.new_empty(shape)
    walks = (softmax.attn(), *(windows.shifts(x) for x in (framed, grad_scores, grad_value)))
    for offset, (attn, tokens, score_place, value_place) in enumerate(zip(*walks, strict=True)):
        row = _row(query_weight, offset)
        product = (grad * tokens).sum(dim=4).unsqueeze(3)
        grad_weight[offset] = (attn * product).sum(dim=(0, 1, 2))
        slopes = attn * (product * row - mean)
        grad_bias[offset] = slopes.sum(dim=(0, 1, 2))
        score_place += slopes
        value_place.addcmul_((attn * row).sum(dim=3).unsqueeze(4), grad)
    inner = windows.inner
    return inner(grad_scores), inner(grad_value), grad_bias, grad_weight
