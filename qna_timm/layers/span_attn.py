"""Local self-attention with relative keys, in a window that is fixed or learned.

Letters: B batch, H W map, C = h*d channels, h heads, d head_dim, k kernel_size, K = k*k offsets.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, register_notrace_module, use_fused_attn
from torch import Tensor, nn

from qna_timm.layers.called import must_be_called
from qna_timm.ops import ring_index, ring_weights, span_attention

REL_AXES = ("split", "both")

register_notrace_function(ring_index)
register_notrace_function(ring_weights)
register_notrace_function(span_attention)


def _exact(span: Tensor) -> Tensor:
    """Spans in float64, where the device has it."""
    return span if span.device.type == "mps" else span.double()


@register_notrace_module
class AdaptiveSpan(nn.Module):
    """How far each head looks, as learned fractions of max_span, and the window that this takes.

        m_0 = 1,   m_r = clamp((1 - r + span * max_span) / span_ramp + 1, 0, 1)

    is the weight of ring r, the offsets at distance max(|dy|, |dx|) = r. The first ring has weight
    1 even at span 0. All heads run in one window, as wide as the widest of them needs:

        radius = min(max_span, ceil(max(span) * max_span) + span_ramp),   kernel = 2 * radius + 1

    ("Adaptive Attention Span in Computer Vision", arXiv:2004.08708.)

    Args:
        num_heads: h.
        max_span: Largest radius, in pixels.
        span_ramp: Pixels over which a ring's weight falls from 1 to 0.
        span_init: Initial span, a fraction of max_span.
        exact_radius: The radius without two artefacts of the released code's rounding. It takes the
            ceiling of span * max_span in float64, where float32's 0.2 times 5 exceeds 1, which adds
            a ring without weight; and it rounds a fractional radius down, so that span_ramp=2.3
            loses a ring that has weight.

    Raises:
        ValueError: max_span below 1 or not whole, span_ramp not above 0, span_init not in 0..1.
    """

    def __init__(
        self,
        num_heads: int,
        max_span: int = 5,
        span_ramp: float = 2.0,
        span_init: float = 0.1,
        exact_radius: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if max_span < 1 or max_span != int(max_span):
            raise ValueError(f"max_span must be at least 1 pixel, whole, got {max_span}")
        if not 0.0 < span_ramp < math.inf:
            raise ValueError(f"span_ramp must be more than 0 pixels, got {span_ramp}")
        if not 0.0 <= span_init <= 1.0:
            raise ValueError(f"span_init must be in 0..1 (of max_span), got {span_init}")
        self.num_heads = num_heads
        self.max_span = int(max_span)
        self.span_ramp = float(span_ramp)
        self.span_init = span_init
        self.exact_radius = exact_radius
        self.span = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial span for every head."""
        nn.init.constant_(self.span, self.span_init)

    def penalty(self) -> Tensor:
        """Sum of |span| over the heads: fractions, not pixels."""
        return self.span.abs().sum()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Brings every span back into [0, 1]."""
        self.span.clamp_(0.0, 1.0)

    def pixels(self) -> Tensor:
        """Spans in pixels [h], without the ramp."""
        return self.span.detach() * self.max_span

    def radius(self) -> Tensor:
        """The running radius in pixels, a scalar on the parameter's device."""
        # spans that are no numbers any more take the widest window, as compiled layers do
        widest = self.span.detach().max().nan_to_num(nan=1.0)
        if not self.exact_radius:
            widest = _exact(widest)
        reach = (widest * self.max_span).ceil() + self.span_ramp
        reach = reach.ceil() if self.exact_radius else reach.floor()
        return reach.clamp(0, self.max_span)

    def running_radius(self) -> int:
        """The running radius in pixels; waits for the device."""
        return int(self.radius().item())

    def forward(self, radius: int, eps: float) -> tuple[Tensor, Tensor | None]:
        """Weights of a window's offsets.

        Args:
            radius: Of the window, at least the running one.
            eps: What every offset of the running window adds to its weight in the denominator.

        Returns:
            The mask [h, K] and, unless eps is 0, the floor [K]: 0 beyond the running radius.
        """
        rings = ring_index(2 * radius + 1, self.span.device)
        # float64 as for the radius: rounding to float32 puts a span of 0.6 on a ring's bound, which
        # passes a gradient
        weights = ring_weights(_exact(self.span), self.max_span, self.span_ramp, radius)
        running = (rings <= self.radius()).to(weights.dtype)
        floor: Tensor | None = None
        if eps > 0.0:
            floor = running * eps
        return weights[:, rings] * running, floor

    def extra_repr(self) -> str:
        return f"{self.num_heads}, max_span={self.max_span}, span_ramp={self.span_ramp:g}"


@register_notrace_module
class SpanAttention(nn.Module):
    r"""Self-attention of every position to the window around it.

        q, k, v     = qkv(x)
        score[o]    = scale * q[y] . (k[y+o] + rel_pos[o])
        e[o]        = exp(score[o] - max score)
        out[y]      = sum_o m[o] e[o] v[y+o] / sum_o (m[o] + eps) e[o]

    per head, with o over a kernel_size x kernel_size window. Fixed attention has m = 1 and eps = 0,
    a softmax; with adaptive, m is `AdaptiveSpan`'s weight of the offset's ring and kernel_size
    that of the running radius. rel_pos[o] is a learned vector of the offset's row on one half of
    the channels and of its column on the other. Keys and values off the map are zero; they take
    part as the released code has it, with the scores of their relative vectors. ("Stand-Alone
    Self-Attention in Vision Models", arXiv:1906.05909, section 2.2; arXiv:2004.08708.)

    Defaults are the released code's; arguments that say so switch to what the papers describe.

    Args:
        in_chs: Input channels.
        out_chs: Output channels C, even.
        num_heads: Heads h, a divisor of out_chs.
        kernel_size: Side of the fixed window, odd; of no effect if adaptive.
        adaptive: Learn the window, see `AdaptiveSpan`.
        max_span: Largest radius if adaptive, in pixels.
        span_ramp: See `AdaptiveSpan`.
        span_init: See `AdaptiveSpan`.
        rel_size: Offsets per axis in the relative tables, of which the middle is used. kernel_size
            if None; if adaptive, 33 (the released tables') or what max_span needs.
        rel_axes: 'split', rows on the first half of all channels, so that with an even number of
            heads each sees one axis; 'both', rows on the first half of every head's.
        mask_padding: Leave positions off the map out of the softmax.
        scale_scores: scale = 1/sqrt(d) in place of 1.
        eps: See above; 0 gives masked-out rings no part in the softmax, nor a gradient to spans.
        exact_radius: See `AdaptiveSpan`.
        impl: See `qna_timm.ops.span_attention`; 'auto' is 'offsets', PyTorch's own operators, after
            ``timm.layers.set_fused_attn(False)``.

    Shape: [B, in_chs, H, W] -> [B, out_chs, H, W].

    Raises:
        ValueError: An argument does not fit, see above.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        num_heads: int = 4,
        kernel_size: int = 5,
        adaptive: bool = False,
        max_span: int = 5,
        span_ramp: float = 2.0,
        span_init: float = 0.1,
        rel_size: int | None = None,
        rel_axes: str = "split",
        mask_padding: bool = False,
        scale_scores: bool = False,
        eps: float = 1e-8,
        exact_radius: bool = False,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if not adaptive and (kernel_size < 1 or kernel_size % 2 == 0):
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if num_heads < 1 or out_chs % num_heads:
            raise ValueError(f"num_heads must divide out_chs={out_chs}, got {num_heads}")
        if rel_axes not in REL_AXES:
            raise ValueError(f"rel_axes must be one of {REL_AXES}, got {rel_axes!r}")
        halved = out_chs if rel_axes == "split" else out_chs // num_heads
        if halved % 2:
            name = "out_chs" if rel_axes == "split" else "out_chs / num_heads"
            raise ValueError(f"{name} must be even for rel_axes={rel_axes!r}, got {halved}")
        if not 0.0 <= eps < math.inf:
            raise ValueError(f"eps must not be negative, got {eps}")
        widest = 2 * max_span + 1 if adaptive else kernel_size
        if rel_size is None:
            rel_size = max(33, widest) if adaptive else kernel_size
        if rel_size < widest or rel_size % 2 == 0:
            raise ValueError(f"rel_size must be odd and at least {widest}, got {rel_size}")
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.rel_axes = rel_axes
        self.mask_padding = mask_padding
        self.scale = (out_chs // num_heads) ** -0.5 if scale_scores else 1.0
        self.eps = eps
        # exporters that know no operators of ours ask timm for plain ones
        self.impl = impl if impl != "auto" or use_fused_attn() else "offsets"
        self.fixed_radius = -1 if adaptive else kernel_size // 2

        self.qkv = nn.Conv2d(in_chs, 3 * out_chs, 1, bias=False, **dd)
        self.rel_pos_h = nn.Parameter(torch.empty(out_chs // 2, rel_size, **dd))
        self.rel_pos_w = nn.Parameter(torch.empty(out_chs // 2, rel_size, **dd))
        self.span_mask: AdaptiveSpan | None = None
        if adaptive:
            self.span_mask = AdaptiveSpan(
                num_heads, max_span, span_ramp, span_init, exact_radius, **dd
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections N(0, 2/C), Kaiming's of each by its outputs; relative vectors N(0, 1)."""
        std = math.sqrt(2.0 / (self.qkv.out_channels // 3))
        nn.init.normal_(self.qkv.weight, std=std)
        nn.init.normal_(self.rel_pos_h)
        nn.init.normal_(self.rel_pos_w)

    def fix_radius(self, fix: bool = True) -> None:
        """Runs learned windows at their present radius from now on, or (False) follows them again.

        For deployment: a compiled or exported model, or one on a GPU, does not look at the spans
        and otherwise runs at max_span with the rings beyond the running radius left out, which
        gives the same numbers and takes longer.
        """
        if self.span_mask is not None:
            self.fixed_radius = self.span_mask.running_radius() if fix else -1

    def _follows_spans(self) -> bool:
        """Whether the running radius may be read now: values are at hand, no graph is recorded."""
        if torch.jit.is_scripting():
            return True
        else:  # TorchScript skips an else branch, not code after a return
            if torch.compiler.is_compiling() or torch.jit.is_tracing():
                return False
            return self.rel_pos_h.device.type == "cpu"

    def _radius(self) -> int:
        if self.span_mask is None or self.fixed_radius >= 0:
            return self.fixed_radius
        if not self._follows_spans():
            return self.span_mask.max_span
        if torch.jit.is_scripting():
            return self.span_mask.running_radius()
        else:
            return self._radius_at_hand()

    @torch.jit.unused
    def _radius_at_hand(self) -> int:
        try:
            return self.span_mask.running_radius()
        except RuntimeError:  # no value under vmap, nor of fake tensors
            return self.span_mask.max_span

    def _tables(self, radius: int) -> tuple[Tensor, Tensor]:
        """Relative vectors [C, k] of rows and columns, zero on channels that see the other."""
        start = self.rel_pos_h.shape[1] // 2 - radius
        rows = self.rel_pos_h[:, start : start + 2 * radius + 1]
        cols = self.rel_pos_w[:, start : start + 2 * radius + 1]
        parts = 1 if self.rel_axes == "split" else self.num_heads
        rows, cols = rows.unflatten(0, (parts, -1)), cols.unflatten(0, (parts, -1))
        rows, cols = (
            torch.cat([rows, torch.zeros_like(rows)], dim=1),
            torch.cat([torch.zeros_like(cols), cols], dim=1),
        )
        return rows.flatten(0, 1), cols.flatten(0, 1)

    def _projected(self, x: Tensor) -> Tensor:
        """Queries, keys and values [B, H, W, 3C] of a map."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - its compiler skips no half of a condition
            if must_be_called(self.qkv):
                return self.qkv(x).permute(0, 2, 3, 1)
        # a linear map of channels-last maps, which is how the operator reads them
        return F.linear(x.permute(0, 2, 3, 1), self.qkv.weight.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        radius = self._radius()
        mask: Tensor | None = None
        floor: Tensor | None = None
        if self.span_mask is not None:
            mask, floor = self.span_mask(radius, self.eps)
        rel_pos_h, rel_pos_w = self._tables(radius)
        x = span_attention(
            self._projected(x),
            rel_pos_h,
            rel_pos_w,
            self.num_heads,
            mask,
            floor,
            self.scale,
            self.mask_padding,
            self.impl,
        )
        return x.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        window = "" if self.span_mask is not None else f", kernel_size={self.kernel_size}"
        return f"num_heads={self.num_heads}{window}, rel_axes={self.rel_axes!r}"
