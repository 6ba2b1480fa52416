"""Learned-query attention as sums over windows, with its gradient written out.

    out = sum_q N_q / D_q,   N_q[y] = sum_o exp(bias[o]) weight[o] e[y+o] value[y+o],
                             D_q[y] = sum_o exp(bias[o]) e[y+o],   e = exp(scores - maximum)

("Learned Queries for Efficient Local Attention", CVPR 2022, section 4.) Two forms of the sums, each
a class: depthwise convolutions (`depthwise`) and Fourier transforms (`fourier`).

One maximum serves a whole map. Where scores spread far, what matters to a window can be lost beside
it: forward and backward look at what came out and give None then.

Letters: n images, H W map, Y X output map, Q queries, h heads, d head_dim, C = h*d channels,
K offsets. A form has a layout of its own for head maps, [n, Q, h, 1, H, W] in some order, and
channel maps, [n, Q, h, d, H, W] in that order.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from qna_timm.ops.qna.grid import COMMON_ROUNDINGS, PEAK
from qna_timm.ops.qna.windows import Windows
from qna_timm.ops.workspace import Workspace

# Least D, where e is at most 1: far above the smallest float32 number, so that what has vanished
# below that does not count.
SMALLEST_SUM = 1e-25
# Range of scores up to which one maximum serves all maps at once; it is found faster than many.
SHARED_RANGE = 30.0
# Errors that are allowed, in units of the rounding of a number: of the output over its largest
# number (5e-5 in float32), of a gradient over its norm (5e-4).
OUT_TOLERANCE = 420.0
GRAD_TOLERANCE = 4200.0
# Roundings that both terms of a gradient have gone through when they are added.
ROUNDINGS = 8.0


class Tables:
    """exp(bias) and exp(bias) * weight [K, Q, h], the factors of both sums."""

    def __init__(
        self, bias: Tensor | None, weight: Tensor | None, shape: tuple[int, ...], like: Tensor
    ) -> None:
        self.has_bias, self.has_weight = bias is not None, weight is not None
        self.weight = like.new_ones(()) if weight is None else weight
        self.weight_rows = self.weight if weight is None else weight.flatten(1)
        if bias is None:
            self.below = like.new_ones(shape)
        else:
            self.below = (bias - bias.amax(dim=0)).exp()
        self.above = self.below * self.weight


def norm(x: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """Euclidean norm over some dimensions, or all."""
    return torch.linalg.vector_norm(x, dim=dims)


class WindowSums(ABC):
    """Forward and backward of a few images; how maps lie and how sums are computed is the form's.

    A form that mixes all of a map has errors relative to the whole map: of a sum,
    |error| <= noise * |map| * |table| and some roundings of a sum of mean size; norms over
    positions and over offsets.
    """

    # of sums, and of gradients of tables; 0 where sums are as exact as any
    noise = 0.0
    table_noise = 0.0
    # how [n, H, W, Q, h, d] is permuted
    order: tuple[int, ...]

    def __init__(
        self,
        size: tuple[int, int],
        windows: Windows,
        num_queries: int,
        num_heads: int,
        tables: Tables,
    ) -> None:
        self.size, self.windows, self.tables = size, windows, tables
        self.out_size = windows.out_size(*size)
        self.num_queries, self.num_heads = num_queries, num_heads
        self.work = Workspace(tables.below)
        self.eps = torch.finfo(tables.below.dtype).eps
        self.channel = self.order.index(5)
        self.positions = self.order.index(1), self.order.index(2)
        self.back = tuple(self.order.index(i) for i in range(6))

    @abstractmethod
    def place(self, name: str, like: Tensor, channels: int, of_windows: bool = False) -> Tensor:
        """A map to write to: of `channels` channels a head, at tokens or at windows."""

    @abstractmethod
    def ready(self, name: str, x: Tensor) -> Any:
        """What has been written to a place, made ready for sums."""

    @abstractmethod
    def sums(self, x: Any, table: Tensor) -> Tensor:
        """sum_o table[o] x[y+o] for every window y, of one channel map or head map."""

    @abstractmethod
    def sums_back(self, grad: Any, table: Tensor) -> Tensor:
        """The transpose of `sums`: gradients at tokens."""

    @abstractmethod
    def table_grad(self, x: Any, grad: Any) -> Tensor:
        """Gradients of the table of `sums` [K, Q, h], over all images and a head's channels."""

    def spread(self, name: str, x: Tensor, channels: int) -> Tensor:
        """Head map -> channel map, or what broadcasts to one."""
        return x

    def collect(self, x: Tensor) -> Tensor:
        """Sums of a channel map over each head's channels."""
        return x.sum(dim=self.channel, keepdim=True)

    def shared(self, name: str, x: Tensor) -> Tensor:
        """[n, y, x, C] -> channel map that all queries share."""
        return x.unflatten(3, (1, self.num_heads, -1)).permute(self.order)

    def norms(self, name: str, x: Tensor) -> Tensor:
        """Norms over positions of what has been written to a place: [n, Q, h, channels]."""
        return norm(x, self.positions)

    def over_queries(self, x: Tensor) -> Tensor:
        """Sum of a channel map over queries, [n, y, x, h, d]; spends the map."""
        first, *others = x.permute(self.back).unbind(3)
        for other in others:
            first.add_(other)
        return first

    def _exps(self, scores: Tensor) -> Tensor:
        """e = exp(score - maximum) as a head map."""
        low, shift = scores.aminmax()
        if shift - low > SHARED_RANGE:
            shift = scores.amax(dim=(1, 2), keepdim=True)
        shifted = (scores - shift).unsqueeze(5)
        return torch.exp(shifted.permute(self.order), out=self.place("exps", scores, 1))

    def _in_range(self, exps: Tensor, below: Tensor) -> bool:
        """Whether no window has vanished beside the map's maximum. Waits for the device."""
        if not self.noise:
            return bool(below.amin() >= SMALLEST_SUM)  # not so for NaN
        error = self.norms("exps", exps).flatten(1) * norm(self.tables.below, (0,)).flatten()
        count = self.out_size[0] * self.out_size[1]
        size = norm(below, self.positions).flatten(1) / math.sqrt(count)
        error = error * (self.noise * PEAK) + size * (COMMON_ROUNDINGS * self.eps)
        lost = (error / (OUT_TOLERANCE * self.eps)).clamp(min=SMALLEST_SUM)
        return bool((below.amin(self.positions).flatten(1) >= lost).all())

    def forward(self, scores: Tensor, value: Tensor) -> Tensor | None:
        """[n, Y, X, h, d] of scores [n, H, W, Q, h], value [n, H, W, C]; None: out of range."""
        exps = self._exps(scores)
        below = self.sums(self.ready("exps", exps), self.tables.below)
        if not self._in_range(exps, below):
            return None
        value = self.shared("value", value)
        dim = value.shape[self.channel]
        weighted = self.place("weighted", scores, dim)
        weighted = torch.mul(self.spread("spread", exps, dim), value, out=weighted)
        above = self.sums(self.ready("weighted", weighted), self.tables.above)
        out = self.over_queries(above.mul_(self.spread("spread", 1.0 / below, dim)))
        if self.noise and not self._precise(weighted, below, out):
            return None
        return out

    def _precise(self, weighted: Tensor, below: Tensor, out: Tensor) -> bool:
        """Whether errors of N are small beside the output."""
        error = self.norms("weighted", weighted).amax(dim=3).flatten(1)
        error = error * norm(self.tables.above, (0,)).flatten()
        error = error / below.amin(dim=self.positions).flatten(1) * (self.noise * PEAK)
        return bool(error.amax() <= OUT_TOLERANCE * self.eps * out.abs().amax())

    def backward(
        self, grad: Tensor, scores: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Gradients of scores, value [n, H, W, h, d], both tables [K, Q, h]; None: out of range.

        Args:
            grad: [n, Y, X, C].
            scores: [n, H, W, Q, h].
            value: [n, H, W, C].
        """
        exps = self._exps(scores)
        attn_ready = self.ready("exps", exps)
        below = self.sums(attn_ready, self.tables.below)
        if not self._in_range(exps, below):
            return None
        value, grad = self.shared("value", value), self.shared("grad", grad)
        dim = value.shape[self.channel]
        spread = self.spread("spread", exps, dim)
        weighted = torch.mul(spread, value, out=self.place("weighted", scores, dim))
        weighted_ready = self.ready("weighted", weighted)
        above = self.sums(weighted_ready, self.tables.above)
        below = below.reciprocal_()
        # gradients of N and D: grad / D and -sum_d grad N / D^2
        grad_above = self.place("grad_above", scores, dim, True)
        torch.mul(self.spread("spread_below", below, dim), grad, out=grad_above)
        slopes = self.collect(above.mul_(grad_above))
        grad_below = self.place("grad_below", scores, 1, True)
        grad_below = torch.mul(slopes, below.neg_(), out=grad_below)
        above_ready = self.ready("grad_above", grad_above)
        below_ready = self.ready("grad_below", grad_below)

        errors = self._errors(exps, weighted, grad_above, grad_below)
        by_above = self.table_grad(weighted_ready, above_ready).mul_(self.tables.below)
        by_below = self.table_grad(attn_ready, below_ready).mul_(self.tables.below)
        grad_bias = (by_above * self.tables.weight, by_below)
        grad_weighted = self.sums_back(above_ready, self.tables.above)
        by_value = self.collect(torch.mul(grad_weighted, value, out=weighted)).mul_(exps)
        by_total = self.sums_back(below_ready, self.tables.below).mul_(exps)
        grad_value = self.over_queries(grad_weighted.mul_(spread))
        parts = ((by_value, by_total), (grad_value,), grad_bias, (by_above,))
        found = [_total(terms, error) for terms, error in zip(parts, errors, strict=True)]
        if any(x is None for x in found):
            return None
        grad_scores, *others = found
        return grad_scores.permute(self.back).squeeze(5), *others

    def _errors(
        self, exps: Tensor, weighted: Tensor, above: Tensor, below: Tensor
    ) -> list[Tensor | float]:
        """How far gradients of scores, value, bias and weight may be off, as norms.

        Args:
            exps: e as a head map.
            weighted: e * value as a channel map.
            above: Gradients of N as a channel map.
            below: Gradients of D as a head map.
        """
        if not (self.noise or self.table_noise):
            return [0.0] * 4
        maps = {"exps": exps, "weighted": weighted, "grad_above": above, "grad_below": below}
        exps, weighted, above, below = (
            norm(self.norms(name, x), (3,)).flatten(1) for name, x in maps.items()
        )
        tables = self.tables
        of_above = self.noise * above * norm(tables.above, (0,)).flatten()
        of_below = self.noise * below * norm(tables.below, (0,)).flatten()
        by_above = self.table_noise * norm(weighted * above, (0,)) * tables.below.flatten(1)
        by_below = self.table_noise * norm(exps * below, (0,)) * tables.below.flatten(1)
        by_weight = by_above * tables.weight_rows
        return [
            norm(torch.stack([weighted * of_above, exps * of_below])),
            norm(exps * of_above),
            norm(torch.stack([by_weight, by_below])) if tables.has_bias else 0.0,
            norm(by_above) if tables.has_weight else 0.0,
        ]


def _total(terms: tuple[Tensor, ...], error: Tensor | float) -> Tensor | None:
    """Sum of terms, None where it may be off by too much: of terms much larger, or by `error`."""
    if len(terms) == 1 and isinstance(error, float):
        return terms[0]
    total = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    eps = torch.finfo(total.dtype).eps
    most = float(error)
    if len(terms) > 1:
        most += ROUNDINGS * eps * float(_wide_norm(terms[0]) + _wide_norm(terms[1]))
    fits = math.isfinite(most) and most <= GRAD_TOLERANCE * eps * float(_wide_norm(total))
    return total if fits else None


def _wide_norm(x: Tensor) -> Tensor:
    """Norm of numbers whose squares float32 may not hold, as far as the device can."""
    return torch.linalg.vector_norm(x, dtype=None if x.is_mps else torch.float64)
